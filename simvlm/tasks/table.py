"""The benchmarks by name: who reads them, what the model does with them, how they are scored."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, Protocol

from simvlm.data.captions import PROMPT
from simvlm.kernels.dispatch import did_you_mean
from simvlm.tasks import (
    coco_captions,
    completion,
    glue,
    imagenet,
    multi30k,
    nli,
    nlvr2,
    nocaps,
    snli_ve,
    text_pairs,
    vqav2,
)
from simvlm.tasks.annotations import Missing
from simvlm.tasks.examples import Split

Head = Literal["classify", "answers", "write", "probe"]
Metric = Literal["accuracy", "vqa", "captions", "bleu", "none"]


class Reader(Protocol):
    def __call__(self, folder: str | Path, split: str, *, missing: Missing = "refuse") -> Split: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """One benchmark.

    Attributes:
        name: as on the command line.
        read: its reader.
        folder: where `simvlm data benchmarks` puts it.
        head: "classify": a linear map of the decoder's last state to the labels; "answers": to VQA's vocabulary, with
            soft scores; "write": the decoder writes; "probe": a linear map of the frozen encoder's mean.
        metric: what is reported; "none": nothing, the texts are to be read.
        splits: train, dev and test; "" where there is none.
        prompt: what the encoder reads before the decoder writes.
        sequences: of one example: NLVR2's two pictures are two.
        reads_source: the encoder reads `Example.source`.
        write_predictions: in the format that the benchmark's server takes.
        read_predictions: of such a file.
    """

    name: str
    read: Reader
    folder: str
    head: Head
    metric: Metric
    splits: tuple[str, str, str]
    prompt: str = ""
    sequences: int = 1
    reads_source: bool = True
    write_predictions: Callable[[Path, Mapping[str, str]], None] | None = None
    read_predictions: Callable[[Path], dict[str, str]] | None = None


def _glue(name: str) -> Task:
    return Task(
        name=name.lower(),
        read=functools.partial(glue.read, task=name),
        folder=f"glue/{name}",
        head="classify",
        metric="accuracy",
        splits=("train", "dev", "test"),
    )


_CAPTIONS = functools.partial(Task, head="write", metric="captions", prompt=PROMPT)
_TASKS = (
    Task(
        name="vqav2",
        read=vqav2.read,
        folder="vqav2",
        head="answers",
        metric="vqa",
        splits=("train", "val", "test"),
        write_predictions=vqav2.write_predictions,
        read_predictions=vqav2.read_predictions,
    ),
    Task(  # the decoder writes the answer, whatever it is
        name="open-vqa",
        read=vqav2.read,
        folder="vqav2",
        head="write",
        metric="vqa",
        splits=("train", "val", "test"),
        write_predictions=vqav2.write_predictions,
        read_predictions=vqav2.read_predictions,
    ),
    Task(
        name="nlvr2",
        read=nlvr2.read,
        folder="nlvr2",
        head="classify",
        metric="accuracy",
        splits=("train", "dev", "test1"),
        sequences=2,
        write_predictions=nlvr2.write_predictions,
        read_predictions=nlvr2.read_predictions,
    ),
    Task(
        name="snli-ve",
        read=snli_ve.read,
        folder="snli_ve",
        head="classify",
        metric="accuracy",
        splits=("train", "dev", "test"),
    ),
    Task(  # text alone: what the zero-shot transfer to snli-ve learns from
        name="nli",
        read=nli.read,
        folder="nli",
        head="classify",
        metric="accuracy",
        splits=("train", "dev", "test"),
    ),
    _CAPTIONS(
        name="coco",
        read=coco_captions.read,
        folder="coco",
        splits=("train", "val", "test"),
        write_predictions=coco_captions.write_predictions,
        read_predictions=coco_captions.read_predictions,
    ),
    _CAPTIONS(
        name="nocaps",
        read=nocaps.read,
        folder="nocaps",
        splits=("", "val", "test"),
        write_predictions=nocaps.write_predictions,
        read_predictions=nocaps.read_predictions,
    ),
    Task(  # the decoder goes on from the first half of a caption
        name="completion",
        read=completion.read,
        folder="coco",
        head="write",
        metric="none",
        splits=("", "val", "test"),
        prompt=PROMPT,
    ),
    Task(
        name="multi30k",
        read=multi30k.read,
        folder="multi30k",
        head="write",
        metric="bleu",
        splits=("train", "val", "test_2016_flickr"),
    ),
    Task(  # the same pictures without the English: captions in German
        name="german-captions",
        read=multi30k.read,
        folder="multi30k",
        head="write",
        metric="bleu",
        splits=("", "val", "test_2016_flickr"),
        prompt=PROMPT,  # English, as all text that the encoder read when it learnt to translate
        reads_source=False,
    ),
    Task(  # text alone: what the zero-shot transfer to german-captions learns from
        name="translation",
        read=text_pairs.read,
        folder="translation",
        head="write",
        metric="bleu",
        splits=("train", "val", "test"),
    ),
    Task(
        name="imagenet",
        read=imagenet.read,
        folder="imagenet",
        head="probe",
        metric="accuracy",
        splits=("train", "val", "val"),
    ),
    *map(_glue, glue.TASKS),
)
TASKS = {task.name: task for task in _TASKS}


def task_of(name: str) -> Task:
    """
    Raises:
        ValueError: no benchmark has that name; the nearest are offered.
    """
    if name not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {name!r}{did_you_mean(name, list(TASKS))}")
    return TASKS[name]
