"""ImageNet (ILSVRC 2012) as folders: `train/<class>/*.JPEG`, `val/<class>/*.JPEG`."""

from __future__ import annotations

import os

from simvlm.tasks.annotations import Annotations, Missing, check_split
from simvlm.tasks.examples import Example, Split

TASK = "imagenet"
OFFICIAL_COUNTS = {"train": 1_281_167, "val": 50_000}
"""recalled"""


def read(folder: str | os.PathLike[str], split: str, *, missing: Missing = "refuse") -> Split:
    """A split: pictures with the index of their class; the classes are train's folders by the alphabet.

    Args:
        folder: with the folders named above.
        split: "train" or "val".
        missing: what becomes of empty files.

    Raises:
        FileNotFoundError: the split's folder is missing, or a picture is empty.
        ValueError: pictures outside a class, a class that train has not, another count.
    """
    check_split(TASK, split, tuple(OFFICIAL_COUNTS))
    annotations = Annotations(TASK, folder)
    classes = {name: sorted(_entries(annotations, name)) for name in dict.fromkeys(("train", split))}
    labels = tuple(classes["train"])
    index = {name: i for i, name in enumerate(labels)}
    examples = []
    for name in classes[split]:
        if name not in index:
            raise ValueError(f"{TASK}: every class of {split} must be one of train, got {name}")
        place = annotations.folder / split / name
        pictures = sorted(entry.name for entry in os.scandir(place) if entry.name.endswith(".JPEG"))
        examples += [
            Example(id=f"{name}/{picture}", images=(place / picture,), label=index[name]) for picture in pictures
        ]
    official = OFFICIAL_COUNTS[split]
    return annotations.split(split, examples, official=official, labels=labels, missing=missing)


def _entries(annotations: Annotations, split: str) -> list[str]:
    place = annotations.folder / split
    if not place.is_dir():
        raise FileNotFoundError(f"{TASK}: {place} must be a folder of classes, got no such folder")
    entries = list(os.scandir(place))
    for entry in entries:
        if not entry.is_dir():
            raise ValueError(f"{TASK}: {place} must hold a folder for each class, got {entry.name}; sort it by class")
    return [entry.name for entry in entries]
