"""Pictures with what a model wrote about them: the gallery of `simvlm reproduce`."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image

THUMBNAIL = 96


def thumbnail(path: Path) -> str:
    """A picture's small copy, at most THUMBNAIL pixels a side, as a PNG in base64."""
    image = Image.open(path).convert("RGB")
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    content = io.BytesIO()
    image.save(content, "png", optimize=True)
    return base64.b64encode(content.getvalue()).decode()
