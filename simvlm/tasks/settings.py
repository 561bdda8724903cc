"""What describes one finetuning run and one evaluation."""

from __future__ import annotations

import dataclasses

from simvlm.tasks.batches import Pictures
from simvlm.tasks.table import Task
from simvlm.train.settings import OptimizerSettings, Precision

_OPTIMIZER = OptimizerSettings(warmup=0.1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneSettings:
    """Finetuning of one model on one benchmark; `lr` is chosen on the dev split, and so is the epoch."""

    task: str
    """the benchmark's name"""
    data: str
    """its folder"""
    out: str
    """the run's folder; the model lies in its `checkpoint/`"""
    splits: tuple[str, ...] = ()
    """to train on, and to choose on; none: the task's train and dev"""
    checkpoint: str = ""
    """the pretrained model's folder; none: a model of `variant` that nothing trained"""
    variant: str = ""
    """of a model without pretraining, as for `simvlm pretrain`"""
    tokenizer: str = ""
    """of a model without pretraining"""
    image_size: int | None = None
    """side of the pictures in pixels, positions and tables resized to it; None: the model's"""
    epochs: int = 10
    """over the training split"""
    batch: int = 32
    """examples of a step"""
    lr: tuple[float, ...] = (1e-5, 2e-5, 5e-5)
    """peak learning rates; the best on dev is kept (the paper's three)"""
    optimizer: OptimizerSettings = _OPTIMIZER
    """its own lr is not used"""
    dropout: float = 0.1
    """the paper's"""
    stochastic_depth: float = 0.1
    """the paper's"""
    label_smoothing: float = 0.0
    """of training; what is reported is not smoothed"""
    freeze: tuple[str, ...] = ()
    """parts that stay as they are: conv, projection, encoder, decoder, embedding"""
    fraction: float = 1.0
    """of the training examples that are used, the first of a shuffled order"""
    rand_augment: bool = False
    """RandAugment in training, of tasks that classify"""
    pictures: Pictures = "own"
    """masked: the model is blind, in training and on dev"""
    leave_out_answers: tuple[str, ...] = ()
    """open-vqa: questions with these answers are neither trained on nor asked on dev"""
    seed: int = 0
    """of the head, the order, crops, dropout and stochastic depth"""
    device: str = "auto"
    precision: Precision = "auto"
    impl: str | None = None
    """the kernels by name; None: the best that takes each call"""
    skip_missing: bool = False
    """leave out examples whose pictures are missing"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """Evaluation of one model on one split of one benchmark."""

    task: str
    """the benchmark's name"""
    data: str
    """its folder"""
    checkpoint: str = ""
    """the model's folder: finetuned on this task or, zero-shot, on another of the same labels, or pretrained"""
    split: str = ""
    """none: the test split"""
    out: str = ""
    """a folder for result.json, items.jsonl and the predictions in the server's format"""
    predictions: str = ""
    """a file in the server's format that is scored in place of a model"""
    pictures: Pictures = "own"
    """masked, shuffled: controls"""
    image_size: int | None = None
    batch: int = 64
    beam: int = 4
    max_len: int = 30
    begin: str = ""
    """what every written text begins with: the first words of captions in German, say"""
    limit: int | None = None
    """the first examples alone"""
    seed: int = 0
    device: str = "auto"
    precision: Precision = "auto"
    impl: str | None = None
    skip_missing: bool = False


def check_finetune(settings: FinetuneSettings, task: Task) -> None:
    """
    Raises:
        ValueError: a setting is out of range, or not one of this task; it is named.
    """
    if not task.splits[0] or task.head == "probe":
        raise ValueError(f"task must be one that has a training split for finetuning, got {task.name}")
    if settings.splits and (len(settings.splits), len(set(settings.splits))) != (2, 2):
        raise ValueError(f"splits must be two that differ, to train and to choose on, got {' '.join(settings.splits)}")
    if bool(settings.checkpoint) == bool(settings.variant):
        raise ValueError(
            "checkpoint, variant: one of the two must be given, got " + ("both" if settings.variant else "none")
        )
    if settings.checkpoint and settings.tokenizer:
        raise ValueError(f"tokenizer must be none with checkpoint, which has its own, got {settings.tokenizer}")
    if settings.variant and not settings.tokenizer:
        raise ValueError("tokenizer must be given with variant, got none")
    _at_least(settings, 1, "epochs", "batch")
    _at_least(settings, 0, "seed")
    if not settings.lr or min(settings.lr) <= 0:
        raise ValueError(f"lr must be one or more numbers above 0, got {settings.lr}")
    if not 0 < settings.fraction <= 1:
        raise ValueError(f"fraction must be above 0 and at most 1, got {settings.fraction}")
    if settings.pictures == "shuffled":
        raise ValueError("pictures must be own or masked in finetuning, got shuffled")
    if not 0 <= settings.label_smoothing < 1:
        raise ValueError(f"label_smoothing must be at least 0 and below 1, got {settings.label_smoothing}")
    if settings.label_smoothing and task.head == "answers":
        raise ValueError(
            f"label_smoothing must be 0 for {task.name}, whose targets are soft already, got {settings.label_smoothing}"
        )
    if settings.rand_augment and task.head == "write":
        raise ValueError(f"rand_augment must be off for {task.name}, which writes what it sees, got on")
    if settings.leave_out_answers and (task.head, task.metric) != ("write", "vqa"):
        raise ValueError(f"leave_out_answers must be empty for all tasks but open-vqa, got some for {task.name}")


def check_eval(settings: EvalSettings) -> None:
    """
    Raises:
        ValueError: a setting is out of range; it is named.
    """
    if bool(settings.checkpoint) == bool(settings.predictions):
        got = "both" if settings.checkpoint else "neither"
        raise ValueError(f"eval: one of checkpoint and predictions must be given, got {got}")
    if settings.predictions and settings.pictures != "own":
        raise ValueError(f"pictures must be own with predictions, which are made already, got {settings.pictures}")
    _at_least(settings, 1, "batch", "beam", "max_len")
    _at_least(settings, 0, "seed")
    if settings.limit is not None:
        _at_least(settings, 1, "limit")


def _at_least(settings: FinetuneSettings | EvalSettings, least: int, *names: str) -> None:
    for name in names:
        if getattr(settings, name) < least:
            raise ValueError(f"{name} must be at least {least}, got {getattr(settings, name)}")
