"""`simvlm finetune TASK`: a pretrained model on one benchmark (SimVLM §4.1; what the paper leaves open: docs/tasks.md).

Classification adds a linear head to the decoder's last state; captioning, translation and open-ended questions are what
pretraining was, a prefix and a text that is written. BatchNorm's statistics stay those of pretraining.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simvlm.data.tokenizer import Tokenizer
from simvlm.files import whole, write_whole
from simvlm.model.folder import sha256_of
from simvlm.model.torch_model import SimVLM
from simvlm.model.weights import load
from simvlm.tasks import vqav2
from simvlm.tasks.annotations import Missing
from simvlm.tasks.batches import Batches
from simvlm.tasks.classifier import TASK, Classifier
from simvlm.tasks.examples import Example, Split
from simvlm.tasks.metrics import vqa_normalise, vqa_soft_score
from simvlm.tasks.settings import FinetuneSettings, check_finetune
from simvlm.tasks.table import Task, task_of
from simvlm.train.objectives import suffix_nll
from simvlm.train.optim import adamw, learning_rate
from simvlm.train.torch_device import device_of, precision_of

CHECKPOINT, LOG, RESULT = "checkpoint", "log.jsonl", "finetune.json"
STATE = "unfinished.pt"
"""of a run that was cut off, after its last whole epoch"""
_DEV_BATCH = 64


@dataclasses.dataclass(frozen=True)
class Target:
    """What one example teaches: a class, the scores of classes, or a text."""

    example: Example
    label: int = -1
    scores: dict[int, float] = dataclasses.field(default_factory=dict)
    text: str = ""


def finetune(settings: FinetuneSettings) -> dict[str, Any]:
    """Trains with every learning rate, keeps the model that is best on dev, and returns what `finetune.json` holds.

    A run that was cut off goes on after its last whole epoch.

    Raises:
        ValueError, OSError: a setting, a file or the checkpoint is at fault; it is named.
    """
    task = task_of(settings.task)
    check_finetune(settings, task)
    out = Path(settings.out)
    if (out / RESULT).exists():
        raise FileExistsError(f"out: {out} holds a finished run; another --out, or remove it")
    splits = settings.splits or task.splits[:2]
    missing: Missing = "leave out" if settings.skip_missing else "refuse"
    train, dev = (task.read(settings.data, name, missing=missing) for name in splits)
    labels = labels_of(task, train, settings.data)
    teaching, judging = _targets(task, train, labels), _targets(task, dev, labels)
    if settings.leave_out_answers:
        teaching, judging = _without(settings.leave_out_answers, teaching, judging)
    teaching = _fraction(teaching, settings)
    for split, targets in ((train, teaching), (dev, judging)):
        if not targets:
            raise ValueError(f"{task.name}: {split.name} must have examples, got none")
    out.mkdir(parents=True, exist_ok=True)
    files = train.sha256 | dev.sha256 | {"checkpoint": settings.checkpoint and sha256_of(settings.checkpoint)}
    state = _State.read(out, dataclasses.asdict(settings) | {"out": "", "files": files})
    for lr in settings.lr[len(state.runs) :]:
        run = _Run(settings, task, labels, teaching, judging, lr, state)
        found = run.train()
        if not state.runs or found["dev"] > max(other["dev"] for other in state.runs):
            run.save(out / CHECKPOINT)
        state.runs.append(found)
        state.epoch = {}
        state.write()
    runs = state.runs
    best = max(runs, key=lambda found: found["dev"])
    result = {
        "settings": dataclasses.asdict(settings),
        "train_examples": len(teaching),
        "dev_examples": len(judging),
        "sha256": train.sha256 | dev.sha256,
        "runs": runs,
        **best,
    }
    write_whole(out / RESULT, json.dumps(result, indent=1) + "\n")
    (out / STATE).unlink(missing_ok=True)
    return result


def labels_of(task: Task, split: Split, data: str) -> tuple[str, ...]:
    """Names of the classes; of VQA the answer vocabulary; () where the model writes."""
    if task.head == "answers":
        return vqav2.answer_vocabulary(data, normalise=vqa_normalise)
    return split.labels if task.head == "classify" else ()


def _without(
    answers: Sequence[str], teaching: list[Target], judging: list[Target]
) -> tuple[list[Target], list[Target]]:
    """Both without the questions that have these answers: what picks epoch and learning rate knows them no more.

    Raises:
        ValueError: no training question has such an answer.
    """
    left_out = {vqa_normalise(answer): answer for answer in answers}
    unknown = left_out.keys() - {vqa_normalise(target.text) for target in teaching}
    if unknown:
        raise ValueError(f"leave_out_answers must be answers of training questions, got {left_out[min(unknown)]!r}")
    kept = [[target for target in part if vqa_normalise(target.text) not in left_out] for part in (teaching, judging)]
    return kept[0], kept[1]


def _fraction(teaching: list[Target], settings: FinetuneSettings) -> list[Target]:
    """The targets of a share of the examples: of a picture all captions or none."""
    if settings.fraction == 1:
        return teaching
    ids = list(dict.fromkeys(target.example.id for target in teaching))
    order = np.random.default_rng(settings.seed).permutation(len(ids))
    kept = {ids[i] for i in order[: max(1, round(settings.fraction * len(ids)))]}
    return [target for target in teaching if target.example.id in kept]


@dataclasses.dataclass
class _State:
    """What a run goes on from.

    Attributes:
        out: the run's folder.
        settings: of the run, but for its folder, and the hashes of the files that it reads, weights among them.
        log: a line for each epoch of all learning rates.
        runs: what the learning rates found that are done.
        epoch: what the last epoch of the learning rate in hand left; {} before its first.
    """

    out: Path
    settings: dict[str, Any]
    log: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    runs: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    epoch: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, out: Path, settings: dict[str, Any]) -> _State:
        """The state in the folder, or a new one.

        Raises:
            ValueError: the folder holds part of a run with other settings, or what cannot be read.
        """
        state = cls(out, settings)
        if (out / STATE).exists():
            try:
                state = cls(out, **torch.load(out / STATE, map_location="cpu", weights_only=True))
            except (RuntimeError, EOFError, TypeError, pickle.UnpicklingError) as error:
                why = " ".join(str(error).split())
                raise ValueError(f"out: {out}/{STATE} cannot be read; remove it to begin anew: {why}") from error
            differing = sorted(name for name, value in settings.items() if value != state.settings.get(name))
            if differing:
                raise ValueError(
                    f"out: {out} holds part of a run with another {', '.join(differing)}; with its own settings it "
                    "goes on, another --out begins anew"
                )
        write_whole(out / LOG, "".join(json.dumps(line) + "\n" for line in state.log))
        return state

    def write(self) -> None:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "out"}
        try:
            with whole(self.out / STATE) as aside:
                torch.save(values, aside)
        except (OSError, RuntimeError) as error:  # torch tells of a full disk in the second way
            why = " ".join(str(error).split())
            print(
                f"finetune: {self.out / STATE} was not written ({why}); the run goes on, but if it is cut off it "
                "repeats this epoch",
                file=sys.stderr,
                flush=True,
            )


class _Run:
    """One learning rate, from the pretrained model on, or from where it was cut off."""

    def __init__(
        self,
        settings: FinetuneSettings,
        task: Task,
        labels: tuple[str, ...],
        teaching: list[Target],
        judging: list[Target],
        lr: float,
        state: _State,
    ) -> None:
        self.settings, self.task, self.teaching, self.judging, self.state = settings, task, teaching, judging, state
        self.device = device_of(settings.device)
        self.precision = precision_of(settings.precision, self.device)
        torch.manual_seed(settings.seed)
        model, self.tokenizer = _start(settings)
        model.to(self.device)
        self.model = model
        self.module: nn.Module = model
        if labels:
            classifier = Classifier(model, labels, task.sequences, task=task.name).to(self.device)
            if task.head == "answers":
                classifier.set_prior(_frequencies(teaching, len(labels)))
            self.module = classifier
        for name in settings.freeze:
            if not isinstance(part := getattr(model, name, self), (nn.Module, nn.Parameter, type(None))):
                raise ValueError(f"freeze must name parts of the model, got {name!r}")
            if part is not None:  # a model may have no projection
                part.requires_grad_(False)
        if not any(target.example.images for target in teaching):
            # Text alone leaves alone what only pictures pass: weight decay would shrink it all the same.
            for reads_pictures in (model.conv, model.projection):
                if reads_pictures is not None:
                    reads_pictures.requires_grad_(False)
        self.optimizer_settings = dataclasses.replace(settings.optimizer, lr=lr)
        self.optimizer = adamw(self.module, self.optimizer_settings)
        self.batches = Batches(
            task,
            model.config,
            self.tokenizer,
            pictures=settings.pictures,
            augment=settings.rand_augment,
            seed=settings.seed,
        )
        self.steps_per_epoch = -(-len(teaching) // settings.batch)

    def train(self) -> dict[str, Any]:
        """The best epoch's dev score; the module holds its weights."""
        settings, state = self.settings, self.state
        steps = settings.epochs * self.steps_per_epoch
        best, best_epoch, kept = -math.inf, 0, {}
        done = 0
        if state.epoch:
            done, best, best_epoch, kept = (state.epoch[name] for name in ("done", "best", "best_epoch", "kept"))
            self.module.load_state_dict(state.epoch["module"])
            self.optimizer.load_state_dict(state.epoch["optimizer"])
            self.batches.cut.update(state.epoch["cut"])
        step = done * self.steps_per_epoch
        for epoch in range(done, settings.epochs):
            self.module.train()
            began, total = time.perf_counter(), 0.0
            for ids in self._order(epoch):
                lr = learning_rate(step, steps, self.optimizer_settings)
                total += self._step(ids, epoch, step, lr)
                step += 1
            dev = self._dev()
            if not math.isfinite(dev):
                raise ValueError(f"finetune: epoch {epoch + 1} gave {dev} on dev; a smaller lr may get past it")
            entry = {
                "lr": self.optimizer_settings.lr,
                "epoch": epoch + 1,
                "loss": total / self.steps_per_epoch,
                "dev": dev,
                "seconds": round(time.perf_counter() - began, 2),
            }
            if dev > best:
                best, best_epoch = dev, epoch + 1
                kept = {name: x.detach().clone() for name, x in self.module.state_dict().items()}
            state.log.append(entry)
            state.epoch = {
                "done": epoch + 1,
                "best": best,
                "best_epoch": best_epoch,
                "kept": kept,
                "module": self.module.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "cut": sorted(self.batches.cut),
            }
            state.write()
            with open(state.out / LOG, "a") as log:
                log.write(json.dumps(entry) + "\n")
        self.module.load_state_dict(kept)
        cut = len(self.batches.cut)
        return {"lr": self.optimizer_settings.lr, "epoch": best_epoch, "dev": best, "examples_cut": cut}

    def save(self, folder: Path) -> None:
        if isinstance(self.module, Classifier):
            self.module.save(folder, self.tokenizer)
            return
        self.model.save_pretrained(folder, self.tokenizer)
        if self.task.metric == "vqa":  # `simvlm eval` tells answers that were taught from others
            answers = sorted({vqa_normalise(target.text) for target in self.teaching})
            values = {"task": self.task.name, "answers": answers}
            write_whole(folder / TASK, json.dumps(values, ensure_ascii=False, indent=1) + "\n")

    def _order(self, epoch: int) -> Iterator[np.ndarray]:
        order = np.random.default_rng((self.settings.seed, epoch)).permutation(len(self.teaching))
        for first in range(0, len(order), self.settings.batch):
            yield order[first : first + self.settings.batch]

    def _step(self, ids: np.ndarray, epoch: int, step: int, lr: float) -> float:
        """Returns the loss without label smoothing."""
        targets = [self.teaching[i] for i in ids]
        loss, reported = (x.mean() for x in self._losses(targets, ids, epoch, (self.settings.seed, step)))
        if not torch.isfinite(loss):
            raise ValueError(f"finetune: step {step + 1} gave a loss of {loss.item()}; a smaller lr may get past it")
        loss.backward()
        norm = self.settings.optimizer.max_grad_norm
        if norm is not None:
            nn.utils.clip_grad_norm_(self.module.parameters(), norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(reported.detach())

    def _losses(
        self, targets: list[Target], ids: Any, epoch: int | None, noise: tuple[int, int] | None
    ) -> tuple[Tensor, Tensor]:
        """(what training minimises, the same without label smoothing): float[n] of examples, or of tokens written."""
        texts = [target.text for target in targets] if self.task.head == "write" else None
        batch = self.batches.batch([target.example for target in targets], texts, ids=ids, epoch=epoch)
        inputs = batch.inputs(self.model.config).to(self.device)
        smoothing = self.settings.label_smoothing if epoch is not None else 0.0
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            if texts is None:
                logits = self.module(inputs, noise).float()
                plain = _class_loss(logits, targets)
                return (_class_loss(logits, targets, smoothing) if smoothing else plain), plain
            hidden = self.model(inputs, noise)
            plain = suffix_nll(hidden, self.model.embedding, inputs.targets)[: int(batch.decoder_lens.sum())]
            if not smoothing:
                return plain, plain
            return _smooth_nll(self.model.logits(hidden).float(), inputs.targets, smoothing), plain

    @torch.no_grad()
    def _dev(self) -> float:
        """Accuracy or VQA's score; for writing, minus the mean loss of a token."""
        self.module.eval()
        found: list[Tensor] = []
        for first in range(0, len(self.judging), _DEV_BATCH):
            part = self.judging[first : first + _DEV_BATCH]
            ids = range(first, first + len(part))
            if self.task.head == "write":
                found.append(-self._losses(part, ids, None, None)[1])
                continue
            batch = self.batches.batch([target.example for target in part], None, ids=ids)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
                chosen = self.module(batch.inputs(self.model.config).to(self.device)).argmax(1).tolist()
            scores = [
                target.scores.get(best, 0.0) if self.task.head == "answers" else float(target.label == best)
                for target, best in zip(part, chosen, strict=True)
            ]
            found.append(torch.tensor(scores))
        return float(torch.cat(found).double().mean())


def _start(settings: FinetuneSettings) -> tuple[SimVLM, Tokenizer]:
    rates: dict[str, Any] = {
        "dropout": settings.dropout,
        "stochastic_depth": settings.stochastic_depth,
        "impl": settings.impl,
    }
    if settings.checkpoint:
        model, _, tokenizer = load(settings.checkpoint, image_size=settings.image_size, **rates)
        # Pretraining without pictures gathered none, and those of a new model would all but switch pictures off.
        gathered = any(name.endswith("running_mean") and bool(x.any()) for name, x in model.conv.named_buffers())
        model.conv.freeze_statistics(gathered)
        return model, tokenizer
    from simvlm.train.pretrain import model_config
    from simvlm.train.settings import PretrainSettings

    tokenizer = Tokenizer(settings.tokenizer)
    wanted = PretrainSettings(out="", variant=settings.variant, image_size=settings.image_size)
    # Statistics that nothing gathered are gathered now.
    return SimVLM(model_config(wanted, tokenizer.vocab_size), **rates), tokenizer


def _frequencies(targets: list[Target], labels: int) -> Tensor:
    """The mean score of each answer."""
    total = torch.zeros(labels)
    for target in targets:
        for label, score in target.scores.items():
            total[label] += score
    return total / len(targets)


def _targets(task: Task, split: Split, labels: tuple[str, ...]) -> list[Target]:
    """What each example teaches; several for one with several captions.

    Raises:
        ValueError: an example has no label or reference.
    """
    classes = {label: i for i, label in enumerate(labels)}
    found = []
    for example in split.examples:
        if task.head == "classify":
            if example.label is None:
                raise ValueError(f"{task.name}: {split.name} must have labels, got none for example {example.id}")
            found.append(Target(example, label=example.label))
            continue
        if not example.references:
            raise ValueError(f"{task.name}: {split.name} must have references, got none for example {example.id}")
        if task.head == "answers":
            scores = vqav2.soft_scores(example.references, classes, normalise=vqa_normalise, soft_score=vqa_soft_score)
            found.append(Target(example, scores=scores))
        elif task.metric == "vqa":
            found.append(Target(example, text=vqav2.chosen_most(example.references)))
        else:
            found += [Target(example, text=text) for text in example.references]
    return found


def _class_loss(logits: Tensor, targets: list[Target], smoothing: float = 0.0) -> Tensor:
    """Cross-entropy; of soft scores binary cross-entropy, summed over the classes."""
    if targets[0].label >= 0:
        labels = torch.tensor([target.label for target in targets], device=logits.device)
        return F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    wanted = torch.zeros_like(logits)
    for row, target in enumerate(targets):
        for index, score in target.scores.items():
            wanted[row, index] = score
    return F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").sum(1)


def _smooth_nll(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    written = targets >= 0
    return F.cross_entropy(logits[written], targets[written].long(), reduction="none", label_smoothing=smoothing)
