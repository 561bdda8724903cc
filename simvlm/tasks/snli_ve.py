"""SNLI-VE: does a picture entail a hypothesis, contradict it, or neither?

snli_ve_train.jsonl  snli_ve_dev.jsonl  snli_ve_test.jsonl  flickr30k_images/4705552913.jpg
"""

from __future__ import annotations

import os

from simvlm.tasks.annotations import Annotations, Missing, check_split
from simvlm.tasks.examples import Example, Split
from simvlm.tasks.nli import LABELS

TASK = "snli_ve"
IMAGES = "flickr30k_images"
OFFICIAL_COUNTS = {"train": 529_527, "dev": 17_858, "test": 17_901}
"""github.com/necla-ml/SNLI-VE"""


def read(folder: str | os.PathLike[str], split: str, *, missing: Missing = "refuse") -> Split:
    """A split: pictures and hypotheses as `text`. The caption that stood in for the picture in SNLI is not given.

    Args:
        folder: with the files named above.
        split: "train", "dev" or "test".
        missing: what becomes of hypotheses whose picture is.

    Raises:
        FileNotFoundError: a file or picture is missing.
        ValueError: a record is not as it should be, another count or hash.
    """
    check_split(TASK, split, tuple(OFFICIAL_COUNTS))
    annotations = Annotations(TASK, folder)
    examples = [
        Example(
            id=record.text("pairID"),
            images=(annotations.folder / IMAGES / f"{record.text('Flickr30K_ID')}.jpg",),
            text=record.text("sentence2"),
            label=LABELS.index(record.choice("gold_label", LABELS)),
        )
        for record in annotations.json_lines(f"snli_ve_{split}.jsonl")
    ]
    official = OFFICIAL_COUNTS[split]
    return annotations.split(split, examples, official=official, labels=LABELS, missing=missing)
