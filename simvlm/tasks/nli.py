"""SNLI: does a text entail a hypothesis, contradict it, or neither? `snli_1.0_train.jsonl`, `…_dev…`, `…_test…`."""

from __future__ import annotations

import os

from simvlm.tasks.annotations import Annotations, Missing, check_split
from simvlm.tasks.examples import Example, Split

TASK = "nli"
LABELS = ("entailment", "neutral", "contradiction")
NO_LABEL = "-"
"""the annotators did not agree"""
OFFICIAL_COUNTS = {"train": 549_367, "dev": 9_842, "test": 9_824}
"""pairs with a label; recalled"""


def read(folder: str | os.PathLike[str], split: str, *, missing: Missing = "refuse") -> Split:
    """A split: premises as `source`, hypotheses as `text`; pairs without a gold label are left out and counted.

    Args:
        folder: with the files named above.
        split: "train", "dev" or "test".
        missing: for the sake of one signature; no image can be missing.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: a record is not as it should be, another count or hash.
    """
    check_split(TASK, split, tuple(OFFICIAL_COUNTS))
    annotations = Annotations(TASK, folder)
    examples, unlabelled = [], 0
    for record in annotations.json_lines(f"snli_1.0_{split}.jsonl"):
        label = record.choice("gold_label", (*LABELS, NO_LABEL))
        if label == NO_LABEL:
            unlabelled += 1
            continue
        examples.append(
            Example(
                id=record.text("pairID"),
                source=record.text("sentence1"),
                text=record.text("sentence2"),
                label=LABELS.index(label),
            )
        )
    left_out = {"no gold label": unlabelled} if unlabelled else {}
    return annotations.split(split, examples, official=OFFICIAL_COUNTS[split], labels=LABELS, left_out=left_out)
