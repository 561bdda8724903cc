"""Pictures with what a model wrote about them: the gallery of `simvlm reproduce`."""

from __future__ import annotations

import base64
import dataclasses
import io
from pathlib import Path
from typing import Any

from PIL import Image

from simvlm.tasks.reproduce_results import Results
from simvlm.tasks.rows import GALLERY

THUMBNAIL = 96


@dataclasses.dataclass(frozen=True)
class Card:
    """One example.

    Attributes:
        picture: PNG in base64; "" where the result has none.
        read: what the model read beside the picture.
        prediction: what it wrote, or "(nothing)".
        reference: an answer or caption that is right.
        score: of the prediction, in [0, 1]; None where nothing judges it.
    """

    picture: str
    read: str
    prediction: str
    reference: str
    score: float | None

    @property
    def verdict(self) -> str:
        if self.score is None:
            return ""
        return "right" if self.score == 1 else "wrong" if self.score == 0 else f"{100 * self.score:.0f} of 100"


def panels(results: Results) -> dict[str, list[Card]]:
    """Cards of every panel, the first examples of the split in order; none where it was not run."""
    found = {}
    for panel, name in GALLERY.items():
        result = results.found(name)
        found[panel] = [
            _card(sample, judged="score" in result or "judged_right" in result) for sample in result.get("samples", [])
        ]
    return found


def thumbnail(path: Path) -> str:
    """A picture's small copy, at most THUMBNAIL pixels a side, as a PNG in base64."""
    image = Image.open(path).convert("RGB")
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    content = io.BytesIO()
    image.save(content, "png", optimize=True)
    return base64.b64encode(content.getvalue()).decode()


def _card(sample: dict[str, Any], *, judged: bool) -> Card:
    """`judged`: scores are of right and wrong. (CIDEr's of one picture are not.)"""
    return Card(
        picture=next(iter(sample.get("pictures", [])), ""),
        read=sample["read"],
        prediction=sample["prediction"] or "(nothing)",
        reference=sample["reference"],
        score=sample["score"] if judged else None,
    )
