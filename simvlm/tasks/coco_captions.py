"""COCO Captions: Karpathy's split, or COCO's own JSON.

dataset_coco.json                            Karpathy's: "train" (with "restval"), "val", "test"
annotations/captions_train2014.json          COCO's: "train2014", "val2014"
train2014/COCO_train2014_000000000009.jpg    val2014/…
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from simvlm.tasks import predictions as files
from simvlm.tasks.annotations import Annotations, Missing, Record, check_split
from simvlm.tasks.examples import Example, Split

TASK = "coco_captions"
OFFICIAL_COUNTS = {"train": 113_287, "val": 5_000, "test": 5_000, "train2014": 82_783, "val2014": 40_504}
"""pictures. Karpathy's as captioning papers give them, recalled; COCO's: visualqa.org/download.html"""
_KARPATHY = {"train": "train", "restval": "train", "val": "val", "test": "test"}


def read(folder: str | os.PathLike[str], split: str, *, missing: Missing = "refuse") -> Split:
    """A split: pictures with their captions as `references`.

    Args:
        folder: with the files named above.
        split: "train", "val" or "test" of Karpathy's; "train2014" or "val2014" of COCO's.
        missing: what becomes of pictures that are missing.

    Raises:
        FileNotFoundError: a file or picture is missing.
        ValueError: a record is not as it should be, another count or hash.
    """
    check_split(TASK, split, tuple(OFFICIAL_COUNTS))
    annotations = Annotations(TASK, folder)
    if split in _KARPATHY:
        examples = _karpathy(annotations, split)
    else:
        name = f"annotations/captions_{split}.json"
        examples = [
            captioned(record, annotations.folder / split, captions)
            for record, captions in images_and_captions(annotations.json(name), TASK, name)
        ]
    official = OFFICIAL_COUNTS[split]
    return annotations.split(split, examples, official=official, missing=missing, unique=True)


def images_and_captions(content: Record, task: str, name: str) -> list[tuple[Record, tuple[str, ...]]]:
    """The images of a COCO JSON, each with its captions.

    Raises:
        ValueError: an image without a caption, or a caption without its image.
    """
    captions: dict[int, list[str]] = {}
    for record in content.records("annotations"):
        captions.setdefault(record.integer("image_id"), []).append(record.text("caption"))
    images = list(content.records("images"))
    numbers = [image.integer("id") for image in images]
    for what, ids in (("a caption", set(numbers) - set(captions)), ("an image", set(captions) - set(numbers))):
        if ids:
            raise ValueError(f"{task}: every image id of {name} must have {what}, got none for {min(ids)}")
    return [(image, tuple(captions[number])) for image, number in zip(images, numbers, strict=True)]


def captioned(image: Record, folder: Path, captions: tuple[str, ...], group: str = "") -> Example:
    """The example of an image of a COCO JSON."""
    path = folder / image.text("file_name")
    return Example(id=str(image.integer("id")), images=(path,), references=captions, group=group)


def write_predictions(path: str | os.PathLike[str], predictions: Mapping[str, str]) -> None:
    """The server's format, `[{"image_id": 17, "caption": "…"}, …]`, of captions by image id."""
    files.write_list(path, predictions, "image_id", "caption")


def read_predictions(path: str | os.PathLike[str]) -> dict[str, str]:
    """Captions by image id.

    Raises:
        ValueError: the file is in another format.
    """
    return files.read_list(path, TASK, "image_id", "caption")


def _karpathy(annotations: Annotations, split: str) -> list[Example]:
    examples = []
    for record in annotations.json("dataset_coco.json").records("images"):
        if _KARPATHY[record.choice("split", tuple(_KARPATHY))] != split:
            continue
        number = record.integer("cocoid")
        captions = tuple(sentence.text("raw") for sentence in record.records("sentences"))
        if not captions:
            raise ValueError(f"{TASK}: sentences of image {number} must be at least one, got none")
        path = annotations.folder / record.text("filepath") / record.text("filename")
        examples.append(Example(id=str(number), images=(path,), references=captions))
    return examples
