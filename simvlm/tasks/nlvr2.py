"""NLVR2: a statement about two pictures is true or false.

    train.json  dev.json  test1.json                          a JSON object on every line
    images/train/<directory>/train-10171-0-img0.png           <directory> is a field of the line
    dev/dev-850-0-img0.png  test1/test1-0-1-img1.png

The line "dev-850-0-0" is about dev-850-0-img0.png (left) and dev-850-0-img1.png (right).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from simvlm.tasks.annotations import Annotations, Missing, check_split
from simvlm.tasks.examples import Example, Split
from simvlm.tasks.predictions import by_id

TASK = "nlvr2"
LABELS = ("False", "True")
OFFICIAL_COUNTS = {"train": 86_373, "dev": 6_982, "test1": 6_967}
"""recalled from the dataset's paper"""


def read(folder: str | os.PathLike[str], split: str, *, missing: Missing = "refuse") -> Split:
    """A split: two pictures, left and right, and the statement as `text`.

    Args:
        folder: with the files named above.
        split: "train", "dev" or "test1".
        missing: what becomes of statements with a missing picture.

    Raises:
        FileNotFoundError: a file or picture is missing.
        ValueError: a record is not as it should be, another count or hash.
    """
    check_split(TASK, split, tuple(OFFICIAL_COUNTS))
    annotations = Annotations(TASK, folder)
    examples = []
    for record in annotations.json_lines(f"{split}.json"):
        identifier = record.text("identifier")
        if not re.fullmatch(rf"{split}-\d+-\d+-\d+", identifier):
            raise ValueError(f"{TASK}: identifier must be {split}-SET-PAIR-SENTENCE, got {identifier!r}")
        place = annotations.folder / split
        if split == "train":
            place = annotations.folder / "images" / "train" / str(record.integer("directory"))
        stem = identifier.rpartition("-")[0]
        examples.append(
            Example(
                id=identifier,
                images=(place / f"{stem}-img0.png", place / f"{stem}-img1.png"),
                text=record.text("sentence"),
                label=LABELS.index(record.choice("label", LABELS)),
            )
        )
    official = OFFICIAL_COUNTS[split]
    return annotations.split(split, examples, official=official, labels=LABELS, missing=missing, unique=True)


def write_predictions(path: str | os.PathLike[str], predictions: Mapping[str, str]) -> None:
    """The official script's format, a line `dev-850-0-0,True` each, of "True" and "False" by identifier."""
    Path(path).write_text("".join(f"{identifier},{label}\n" for identifier, label in predictions.items()))


def read_predictions(path: str | os.PathLike[str]) -> dict[str, str]:
    """ "True" or "False" by identifier.

    Raises:
        ValueError: the file is in another format; the line is named.
    """
    return by_id(_rows(path), TASK, path)


def _rows(path: str | os.PathLike[str]) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        found = re.fullmatch(r"\s*(\w+-\d+-\d+-\d+)\s*,\s*(true|false)\s*", line, re.IGNORECASE)
        if found is None:
            raise ValueError(
                f"{TASK}: predictions must be lines as dev-850-0-0,True, got {line[:60]!r} ({path}, line {number})"
            )
        yield found[1], found[2].capitalize()
