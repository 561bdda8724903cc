"""NoCaps: captions of pictures by domain.

nocaps_val_4500_captions.json  nocaps_test_image_info.json  images/0013ea2087020901.jpg
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from simvlm.tasks import predictions as files
from simvlm.tasks.annotations import Annotations, Missing, check_split
from simvlm.tasks.coco_captions import captioned, images_and_captions
from simvlm.tasks.examples import Split

TASK = "nocaps"
DOMAINS = ("in-domain", "near-domain", "out-domain")
_FILES = {"val": "nocaps_val_4500_captions.json", "test": "nocaps_test_image_info.json"}
OFFICIAL_COUNTS = {"val": 4_500, "test": 10_600}
"""pictures: nocaps.org/download"""


def read(folder: str | os.PathLike[str], split: str, *, missing: Missing = "refuse") -> Split:
    """A split: pictures, their domain as `group`, and on val their captions as `references`.

    Args:
        folder: with the files named above.
        split: "val" or "test", which has no captions.
        missing: what becomes of pictures that are missing.

    Raises:
        FileNotFoundError: a file or picture is missing.
        ValueError: a record is not as it should be, another count or hash.
    """
    check_split(TASK, split, tuple(_FILES))
    annotations = Annotations(TASK, folder)
    content = annotations.json(_FILES[split])
    images = annotations.folder / "images"
    if split == "val":
        examples = [
            captioned(record, images, captions, record.choice("domain", DOMAINS))
            for record, captions in images_and_captions(content, TASK, _FILES[split])
        ]
    else:
        examples = [
            captioned(record, images, (), record.choice("domain", DOMAINS) if "domain" in record else "")
            for record in content.records("images")
        ]
    official = OFFICIAL_COUNTS[split]
    return annotations.split(split, examples, official=official, missing=missing, unique=True)


def write_predictions(path: str | os.PathLike[str], predictions: Mapping[str, str]) -> None:
    """The server's format, `[{"image_id": 17, "caption": "…"}, …]`, of captions by image id."""
    files.write_list(path, predictions, "image_id", "caption")


def read_predictions(path: str | os.PathLike[str]) -> dict[str, str]:
    """Captions by image id.

    Raises:
        ValueError: the file is in another format.
    """
    return files.read_list(path, TASK, "image_id", "caption")
