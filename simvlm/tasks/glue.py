"""GLUE's tab-separated files: CoLA, SST-2, MRPC, RTE, one folder each with `train.tsv`, `dev.tsv`, `test.tsv`."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from simvlm.tasks.annotations import Annotations, Missing, check_split
from simvlm.tasks.examples import Example, Split

SPLITS = ("train", "dev", "test")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Layout:
    """Columns of one task's files: of train and dev, of test, and which of them are read.

    Attributes:
        header: whether the first line of train and dev names the columns (that of test always does).
        sentences: the first goes to the encoder, a second one to the decoder.
        values: how the label column says each label, in the order of `labels`.
    """

    columns: tuple[str, ...]
    test_columns: tuple[str, ...]
    header: bool
    sentences: tuple[str, ...]
    label: str
    values: tuple[str, ...]
    labels: tuple[str, ...]
    counts: tuple[int, int, int]


_LAYOUTS = {
    "CoLA": _Layout(
        columns=("source", "label", "mark", "sentence"),
        test_columns=("index", "sentence"),
        header=False,
        sentences=("sentence",),
        label="label",
        values=("0", "1"),
        labels=("unacceptable", "acceptable"),
        counts=(8_551, 1_043, 1_063),
    ),
    "SST-2": _Layout(
        columns=("sentence", "label"),
        test_columns=("index", "sentence"),
        header=True,
        sentences=("sentence",),
        label="label",
        values=("0", "1"),
        labels=("negative", "positive"),
        counts=(67_349, 872, 1_821),
    ),
    "MRPC": _Layout(
        columns=("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"),
        test_columns=("index", "#1 ID", "#2 ID", "#1 String", "#2 String"),
        header=True,
        sentences=("#1 String", "#2 String"),
        label="Quality",
        values=("0", "1"),
        labels=("not_equivalent", "equivalent"),
        counts=(3_668, 408, 1_725),
    ),
    "RTE": _Layout(
        columns=("index", "sentence1", "sentence2", "label"),
        test_columns=("index", "sentence1", "sentence2"),
        header=True,
        sentences=("sentence1", "sentence2"),
        label="label",
        values=("entailment", "not_entailment"),
        labels=("entailment", "not_entailment"),
        counts=(2_490, 277, 3_000),
    ),
}
"""Counts of CoLA, SST-2 and MRPC as TensorFlow Datasets' and Hugging Face's catalogues give them; RTE's recalled."""
TASKS = tuple(_LAYOUTS)


def read(folder: str | os.PathLike[str], split: str, *, task: str, missing: Missing = "refuse") -> Split:
    """A split: the (first) sentence as `source`, the second, where the task has pairs, as `text`.

    Args:
        folder: the task's, named as it.
        split: "train", "dev" or "test", which has no labels.
        task: "CoLA", "SST-2", "MRPC" or "RTE".
        missing: for the sake of one signature; no image can be missing.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: another task, header or number of columns, an unknown label, another count or hash.
    """
    if Path(folder).resolve().name != task:  # files of two tasks may have the same columns
        raise ValueError(f"{task}: folder must be named {task}, got {Path(folder).resolve().name}")
    check_split(task, split, SPLITS)
    layout = _LAYOUTS[task]
    annotations = Annotations(task, folder)
    name = f"{split}.tsv"
    lines = [line.split("\t") for line in annotations.lines(name)]
    columns = layout.test_columns if split == "test" else layout.columns
    first = 0
    if layout.header or split == "test":
        if not lines or tuple(lines[0]) != columns:
            got = ", ".join(lines[0]) if lines else "an empty file"
            raise ValueError(f"{task}: header of {name} must be {', '.join(columns)}, got {got}")
        first = 1
    examples = []
    for number, cells in enumerate(lines[first:], first + 1):
        if len(cells) != len(columns):
            raise ValueError(f"{task}: {name}, line {number} must have {len(columns)} columns, got {len(cells)}")
        row = dict(zip(columns, cells, strict=True))
        label = None
        if split != "test":
            if row[layout.label] not in layout.values:
                wanted = ", ".join(layout.values)
                raise ValueError(
                    f"{task}: {layout.label} must be one of {wanted}, got {row[layout.label]!r} ({name}, line {number})"
                )
            label = layout.values.index(row[layout.label])
        sentences = [row[column].strip() for column in layout.sentences]
        if not all(sentences):
            raise ValueError(f"{task}: {name}, line {number} must have its sentences, got an empty one")
        examples.append(
            Example(id=str(number - first - 1), source=sentences[0], text="".join(sentences[1:]), label=label)
        )
    official = layout.counts[SPLITS.index(split)]
    return annotations.split(split, examples, official=official, labels=layout.labels)
