"""What every reader of a benchmark gives: a split of examples."""

from __future__ import annotations

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """One item of a benchmark.

    Attributes:
        id: the benchmark's own: question id, pair id, image id, line number.
        images: paths; none (text-only), one, or two (NLVR2).
        source: what the encoder reads beside the pictures: the English sentence of Multi30k, the premise of text NLI;
            else "".
        text: what the decoder reads: the question, the hypothesis, the statement; else "".
        label: index into `Split.labels`; None where the split has no labels (test sets).
        references: captions or translations; VQA: its ten answers.
        group: what results are broken down by: a question type, NoCaps' domain; else "".
    """

    id: str
    images: tuple[Path, ...] = ()
    source: str = ""
    text: str = ""
    label: int | None = None
    references: tuple[str, ...] = ()
    group: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """One split of a benchmark.

    Attributes:
        task, name: which benchmark, which split.
        examples: in the order of the file.
        labels: names of the classes, in order; () for generation and VQA.
        sha256: of every annotation file that was read, by name.
        left_out: how many records are no examples, by reason: "no gold label", "image missing".
    """

    task: str
    name: str
    examples: tuple[Example, ...]
    labels: tuple[str, ...] = ()
    sha256: dict[str, str]
    left_out: dict[str, int] = dataclasses.field(default_factory=dict)
