"""Visual text completion: COCO's pictures, each with the first half of a caption that the decoder goes on from.

The paper shows examples and scores none; that the beginnings are halves of captions is ours.
"""

from __future__ import annotations

import dataclasses
import os

from simvlm.tasks import coco_captions
from simvlm.tasks.annotations import Missing
from simvlm.tasks.examples import Example, Split

TASK = "completion"


def read(folder: str | os.PathLike[str], split: str, *, missing: Missing = "refuse") -> Split:
    """COCO's split; of each first caption the first half of the words as `source`, the rest as the only reference.

    Args:
        folder: of COCO Captions.
        split: "train", "val" or "test" of Karpathy's.
        missing: what becomes of pictures that are missing.

    Raises:
        FileNotFoundError, ValueError: as for COCO Captions.
    """
    found = coco_captions.read(folder, split, missing=missing)
    return dataclasses.replace(found, task=TASK, examples=tuple(map(_begun, found.examples)))


def _begun(example: Example) -> Example:
    words = example.references[0].split()
    half = (len(words) + 1) // 2
    return dataclasses.replace(example, source=" ".join(words[:half]), references=(" ".join(words[half:]),))
