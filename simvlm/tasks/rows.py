"""The rows of the paper's tables as jobs: what is pretrained, finetuned and evaluated for each, at a scale.

ablation     VQA after pretraining in eleven ways and without any (SimVLM §4.4)
finetuning   VQAv2, NLVR2, SNLI-VE with their blind models; COCO captions, NoCaps, Multi30k (§4.2)
zero-shot    captioning by the prompt; SNLI-VE from text-only NLI, German captions from text-only translation, with
             pictures masked and shuffled; open-ended VQA (§4.3)
probe        ImageNet on frozen features, and on those of a model that nothing trained
completion   visual text completion, which is shown and not scored
text         text-only understanding
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from simvlm.data.documents import GERMAN_PROMPT
from simvlm.tasks.evaluate import SAMPLES
from simvlm.tasks.reproduce import Job
from simvlm.train.settings import DataSettings, OptimizerSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Where everything is read from."""

    pairs: str
    documents: str
    tokenizer: str
    benchmarks: str
    """a folder of folders, named as `simvlm data benchmarks` names them"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes and lengths of all runs.

    Attributes:
        variant: of the model, as for `simvlm pretrain`.
        steps: of the pretraining of the model that everything but the ablation asks.
        ablation_steps: of the pretraining of the ablation's models.
        pairs, documents: what is in a step.
        pretraining: the optimizer.
        lr: of finetuning, to choose from on dev.
        lr_of: of tasks that have their own.
        ablation_lr, ablation_epochs: of the ablation's finetuning: one for all rows.
        epochs: of finetuning, by task.
        batch: of finetuning.
        dropout, stochastic_depth: of finetuning.
        finetuning: its optimizer.
        seeds, core_seeds: of rows, and of the core rows, which are compared pair by pair.
        device, precision: of all.
        image_size: of finetuning; None: as pretrained.
        max_len: tokens that are written at the most.
        german: what zero-shot captions in German begin with.
        rand_augment: the tasks that it is used for.
        vqa_splits: to train, to choose and to report on; None: those of the files, whose test must have answers.
    """

    variant: str
    steps: int
    ablation_steps: int
    pairs: int
    documents: int
    pretraining: OptimizerSettings
    lr: tuple[float, ...]
    ablation_lr: float
    ablation_epochs: int
    epochs: Mapping[str, int]
    batch: int
    finetuning: OptimizerSettings
    seeds: int
    core_seeds: int
    dropout: float = 0.1
    stochastic_depth: float = 0.1
    image_size: int | None = None
    max_len: int = 30
    german: str = ""
    rand_augment: tuple[str, ...] = ()
    vqa_splits: tuple[str, str, str] | None = None
    lr_of: Mapping[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    device: str = "auto"
    precision: Any = "auto"


_PAPER = OptimizerSettings(warmup=0.1)
_PAPERS_LR = (1e-5, 2e-5, 5e-5)
_RATES = (1e-4, 3e-4, 1e-3)
_EPOCHS = {
    "vqav2": 10,
    "nlvr2": 10,
    "snli-ve": 5,
    "nli": 3,
    "coco": 10,
    "multi30k": 10,
    "translation": 10,
    "open-vqa": 10,
}
_SMALL = Scale(
    variant="small",
    steps=200_000,
    ablation_steps=200_000,  # as the paper's (recalled)
    pairs=4096,
    documents=512,
    pretraining=OptimizerSettings(),
    lr=_PAPERS_LR,
    ablation_lr=2e-5,
    ablation_epochs=10,
    epochs=_EPOCHS,
    batch=256,
    finetuning=_PAPER,
    seeds=1,
    core_seeds=1,
    image_size=480,
    rand_augment=("vqav2", "nlvr2", "snli-ve"),
    vqa_splits=("karpathy-train", "karpathy-val", "karpathy-test"),
)
SCALES = {
    "demo": Scale(
        variant="demo",
        steps=12_000,
        ablation_steps=2000,
        pairs=32,
        documents=8,
        pretraining=OptimizerSettings(lr=6e-4, beta2=0.98, max_grad_norm=1.0),
        # Of a model of this size, which has nothing to spare: no dropout, and a rate that leaves alone what it knows.
        lr=(2e-4,),
        # What is transferred is chosen by the run itself, on text.
        lr_of={"snli-ve": (3e-4,), "nli": _RATES, "translation": _RATES},
        ablation_lr=2e-4,
        ablation_epochs=2,
        dropout=0.0,
        stochastic_depth=0.0,
        epochs={
            "vqav2": 10,
            "nlvr2": 12,
            "snli-ve": 12,
            "nli": 10,
            "coco": 2,
            "multi30k": 6,
            "translation": 1,  # solved on dev: further ones only take from what the model knows of pictures
            "cola": 4,
            "rte": 4,
            "open-vqa": 4,
        },
        batch=32,
        finetuning=OptimizerSettings(warmup=0.1, beta2=0.98, max_grad_norm=1.0),
        seeds=1,
        core_seeds=5,
        max_len=60,
        german=GERMAN_PROMPT,
        device="cpu",
    ),
    "small": _SMALL,
    "base": dataclasses.replace(_SMALL, variant="base", steps=1_000_000),
}

HEADLINE = "headline"
FULL = "full"
NO_PRETRAINING = "no-pretraining"
ABLATION: dict[str, dict[str, Any]] = {
    FULL: {},
    "lm": {"objective": "lm"},
    "span-corruption": {"objective": "span_corruption"},
    "without-image-text": {"pairs": 0},
    "linear-patches": {"conv_stages": 0},
    "without-text": {"documents": 0},
    "fewer-stages": {"conv_stages": -1},
    "one-stage-more": {"conv_stages": 1},
    "decoder-only": {"arch": "decoder_only"},
    "decoder-only-lm": {"arch": "decoder_only", "objective": "lm"},
    "tenth-of-pairs": {"fraction": 0.1},
}
"""What each row changes in pretraining; `conv_stages` below or above the variant's own is relative to it."""
CORE = (FULL, NO_PRETRAINING, "lm", "span-corruption", "without-image-text", "linear-patches")
GALLERY = {
    "captioning": "eval/coco/zero-shot-own",
    "German captioning": "eval/german-captions/zero-shot-frozen-own",
    "generative VQA": "eval/open-vqa/finetuned",
    "visual text completion": "eval/completion/zero-shot",
    "open-ended VQA": "eval/open-vqa/without-finetuning",
}
"""The panels of the paper's gallery, and the jobs that fill them."""
_VQA = ("vqav2", "open-vqa")
_OPEN_VQA_LEFT_OUT = ("purple", "star", "black", "ring")


def jobs(scale: Scale, data: Data, stages: int) -> list[Job]:
    """All jobs of all rows.

    Args:
        scale: of the runs.
        data: what they read.
        stages: convolution stages of the variant.
    """
    by_row = {
        row: [
            _ablation(scale, data, row, seed, stages)
            for seed in range(scale.core_seeds if row in CORE else scale.seeds)
        ]
        for row in (*ABLATION, NO_PRETRAINING)
    }
    # The model that is asked everything, then the rows, seed by seed: a run that is stopped has whole tables.
    made = _headline(scale, data)
    while any(by_row.values()):
        for of_seeds in by_row.values():
            made += of_seeds.pop(0) if of_seeds else []
    return made


def _ablation(scale: Scale, data: Data, row: str, seed: int, stages: int) -> list[Job]:
    """Pretraining, VQA, and its score."""
    made = []
    tuned = f"finetune/vqav2/{row}-{seed}"
    start: dict[str, Any] = {"variant": scale.variant, "tokenizer": data.tokenizer}
    if row != NO_PRETRAINING:
        pretrained = pretrain_name(row, seed)
        settings = _pretraining(scale, data, row, seed, stages)
        made.append(Job(name=pretrained, kind="pretrain", row=row, seed=seed, settings=settings))
        start = {"checkpoint": f"@{pretrained}"}
    lr = (scale.ablation_lr,)
    epochs = scale.ablation_epochs
    made.append(_finetune(scale, data, "vqav2", tuned, row, seed, lr=lr, epochs=epochs, **start))
    made.append(_eval(scale, data, "vqav2", f"eval/vqav2/{row}-{seed}", row, seed, checkpoint=f"@{tuned}"))
    return made


def _headline(scale: Scale, data: Data) -> list[Job]:
    """The model that is trained longest, and all that it is asked."""
    name = f"pretrain/{HEADLINE}"
    own = f"@{name}"
    settings = _pretraining(scale, data, FULL, 0, 0) | {"steps": scale.steps}
    made = [Job(name=name, kind="pretrain", row=HEADLINE, seed=0, settings=settings)]

    def tune(task: str, name: str, **settings: Any) -> str:
        settings = {"checkpoint": own, "lr": scale.lr_of.get(task, scale.lr)} | settings
        made.append(_finetune(scale, data, task, f"finetune/{name}", name, 0, **settings))
        return f"@finetune/{name}"

    def judge(task: str, name: str, checkpoint: str, **settings: Any) -> None:
        job = _eval(scale, data, task, f"eval/{name}", name, 0, checkpoint=checkpoint, **settings)
        made.append(dataclasses.replace(job, gallery=job.name in GALLERY.values()))

    for task in ("vqav2", "nlvr2", "snli-ve"):
        judge(task, f"{task}/finetuned", tune(task, f"{task}/finetuned"))
        judge(task, f"{task}/blind", tune(task, f"{task}/blind", pictures="masked"), pictures="masked")
    captioner = tune("coco", "coco/finetuned")
    for pictures in ("own", "shuffled"):
        judge("coco", f"coco/finetuned-{pictures}", captioner, pictures=pictures)
        judge("coco", f"coco/zero-shot-{pictures}", own, pictures=pictures)
    judge("coco", "coco/hundredth", tune("coco", "coco/hundredth", fraction=0.01))
    judge("nocaps", "nocaps/finetuned", captioner, split="val")
    judge("nocaps", "nocaps/zero-shot", own, split="val")
    judge("multi30k", "multi30k/finetuned", tune("multi30k", "multi30k/finetuned"))
    for frozen in (True, False):
        kind = "frozen" if frozen else "whole"
        parts = {"freeze": ("conv", "projection", "encoder") if frozen else ("conv", "projection")}
        nli = tune("nli", f"nli/{kind}", **parts)
        judge("nli", f"nli/{kind}", nli)
        translator = tune("translation", f"translation/{kind}", **parts)
        judge("translation", f"translation/{kind}", translator)
        for pictures in ("own", "masked", "shuffled"):
            judge("snli-ve", f"snli-ve/zero-shot-{kind}-{pictures}", nli, pictures=pictures)
            german = {"pictures": pictures, "begin": scale.german}
            judge("german-captions", f"german-captions/zero-shot-{kind}-{pictures}", translator, **german)
    judge(
        "open-vqa", "open-vqa/finetuned", tune("open-vqa", "open-vqa/finetuned", leave_out_answers=_OPEN_VQA_LEFT_OUT)
    )
    judge("open-vqa", "open-vqa/without-finetuning", own)
    judge("completion", "completion/zero-shot", own, limit=SAMPLES)
    judge("imagenet", "imagenet/probe", own)
    still = _pretraining(scale, data, FULL, 0, 0)
    # A rate that moves nothing, and enough steps for BatchNorm's statistics.
    still |= {"steps": 60, "optimizer": OptimizerSettings(lr=1e-12)}
    made.append(Job(name="pretrain/untrained", kind="pretrain", row="imagenet/untrained", seed=0, settings=still))
    judge("imagenet", "imagenet/untrained", "@pretrain/untrained")
    for task in ("cola", "rte"):  # the labels of test are the server's
        judge(task, f"{task}/finetuned", tune(task, f"{task}/finetuned"), split="dev")
    return made


def pretrain_name(row: str, seed: int) -> str:
    return f"pretrain/{row}-{seed}"


def _pretraining(scale: Scale, data: Data, row: str, seed: int, stages: int) -> dict[str, Any]:
    changes = dict(ABLATION[row])
    pairs, documents = changes.pop("pairs", scale.pairs), changes.pop("documents", scale.documents)
    if row == "without-image-text":  # as many sequences
        documents = scale.pairs + scale.documents
    if row == "without-text":
        pairs = scale.pairs + scale.documents
    fraction = changes.pop("fraction", 1.0)
    if changes.get("conv_stages"):
        changes["conv_stages"] += stages
    return {
        "variant": scale.variant,
        "steps": scale.ablation_steps,
        "seed": seed,
        "data": DataSettings(
            pairs=(data.pairs,),
            documents=(data.documents,),
            tokenizer=data.tokenizer,
            pairs_per_step=pairs,
            documents_per_step=documents,
            fraction=fraction,
        ),
        "optimizer": scale.pretraining,
        "device": scale.device,
        "precision": scale.precision,
        "keep": 1,
        **changes,
    }


def _finetune(
    scale: Scale, data: Data, task: str, name: str, row: str, seed: int, *, lr: tuple[float, ...], **settings: Any
) -> Job:
    from simvlm.tasks.table import task_of

    values = {
        "task": task,
        "data": f"{data.benchmarks}/{task_of(task).folder}",
        "epochs": scale.epochs.get(task, 3),
        "batch": scale.batch,
        "dropout": scale.dropout,
        "stochastic_depth": scale.stochastic_depth,
        "lr": lr,
        "optimizer": scale.finetuning,
        "image_size": scale.image_size,
        "seed": seed,
        "device": scale.device,
        "precision": scale.precision,
        **settings,
    }
    if task in scale.rand_augment:
        values["rand_augment"] = True
    if scale.vqa_splits is not None and task in _VQA:
        values["splits"] = scale.vqa_splits[:2]
    return Job(name=name, kind="finetune", row=row, seed=seed, settings=values)


def _eval(scale: Scale, data: Data, task: str, name: str, row: str, seed: int, **settings: Any) -> Job:
    from simvlm.tasks.table import task_of

    values = {
        "task": task,
        "data": f"{data.benchmarks}/{task_of(task).folder}",
        "max_len": scale.max_len,
        "device": scale.device,
        "precision": scale.precision,
        **settings,
    }
    if scale.vqa_splits is not None and task in _VQA:
        values["split"] = scale.vqa_splits[2]
    return Job(name=name, kind="eval", row=row, seed=seed, settings=values)
