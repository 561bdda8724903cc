"""Parallel text: line n of `train.en` is line n of `train.de`."""

from __future__ import annotations

import os
from collections.abc import Sequence

from simvlm.tasks.annotations import Annotations, Missing
from simvlm.tasks.examples import Example, Split

TASK = "text_pairs"


def read(folder: str | os.PathLike[str], split: str, *, missing: Missing = "refuse") -> Split:
    """A split: English as `source`, German as the only reference, without images.

    Args:
        folder: with `<split>.en` and `<split>.de`.
        split: any name. Its count is checked only by a manifest: no text is the official one.
        missing: for the sake of one signature; no image can be missing.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: files of unequal length, another count or hash.
    """
    annotations = Annotations(TASK, folder)
    english, german = parallel_lines(annotations, [f"{split}.en", f"{split}.de"])
    examples = [
        Example(id=str(number), source=source, references=(target,))
        for number, (source, target) in enumerate(zip(english, german, strict=True), 1)
    ]
    return annotations.split(split, examples, official=None)


def parallel_lines(annotations: Annotations, names: Sequence[str]) -> list[list[str]]:
    """The lines of files that must have equally many.

    Raises:
        ValueError: they have not.
    """
    files = [annotations.lines(name) for name in names]
    if len({len(lines) for lines in files}) > 1:
        got = ", ".join(f"{len(lines)} of {name}" for name, lines in zip(names, files, strict=True))
        raise ValueError(
            f"{annotations.task}: parallel files must have equally many lines, got {got}; download them again"
        )
    return files
