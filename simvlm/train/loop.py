"""The training loop: data in, steps of an engine, what is logged and kept. Knows no framework.

A run's folder holds `run.yaml` (its settings), `log.jsonl` (a line every `log_every` steps), `skipped.jsonl` (samples
that were left out), `tensorboard/` and `checkpoints/`. A batch is a function of its step, so the state of the data is
the step; a run that was killed goes on with the same samples and the same bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from simvlm.data.mixture import Mixed, Mixture
from simvlm.data.tokenizer import Tokenizer
from simvlm.model.batch import IMAGE_TEXT, SOURCES
from simvlm.train import checkpoint, progress
from simvlm.train.optim import learning_rate
from simvlm.train.settings import PretrainSettings
from simvlm.train.step import Diverged, StepLoss

LOG, SKIPPED = "log.jsonl", "skipped.jsonl"
_ENOUGH_SAMPLES = 1000
"""before the share of broken ones means anything"""


class Engine(Protocol):
    """One framework's model and optimizer."""

    def step(self, mixed: Mixed, lr: float) -> StepLoss: ...
    def save(self, folder: Path, tokenizer: Tokenizer) -> None: ...
    def load(self, folder: Path) -> None: ...


class Interrupted(Exception):
    """The run was asked to stop, and has saved itself.

    Attributes:
        step: how many are done.
    """

    def __init__(self, step: int) -> None:
        super().__init__(step)
        self.step = step


def train(engine: Engine, mixture: Mixture, settings: PretrainSettings, *, image_len: int) -> Path:
    """Takes the steps that are left and returns the folder of the last checkpoint.

    Args:
        engine: fresh; it is given the state of the run's newest checkpoint, if there is one.
        mixture: of the data.
        settings: of the run.
        image_len: tokens of one image, for the count of tokens per second.

    Raises:
        Interrupted: SIGINT or SIGTERM came; the run has saved itself.
        ValueError: a loss is not finite, too many samples are broken, or a checkpoint is of another tokenizer.
        OSError: the last checkpoint could not be written.
    """
    run = _Run(engine, mixture, settings, image_len)
    return run.all_steps()


class _Run:
    def __init__(self, engine: Engine, mixture: Mixture, settings: PretrainSettings, image_len: int) -> None:
        self.engine, self.mixture, self.settings, self.image_len = engine, mixture, settings, image_len
        self.folder = Path(settings.out)
        self.step = 0
        self.samples = 0
        self.skipped: Counter[str] = Counter()
        if (found := checkpoint.newest(self.folder)) is not None:
            self._resume(found[1])

    def _resume(self, folder: Path) -> None:
        state = checkpoint.read_state(folder)
        if state["tokenizer_sha256"] != self.mixture.tokenizer.sha256:
            raise ValueError(f"data.tokenizer must be the one that {folder} was trained with, got another")
        self.engine.load(folder)
        self.step, self.samples, self.skipped = state["step"], state["samples"], Counter(state["skipped"])
        for name in (LOG, SKIPPED):
            _keep_until(self.folder / name, self.step)

    def all_steps(self) -> Path:
        settings = self.settings
        saved = checkpoint.newest(self.folder)
        with (
            _stop_signals() as stop,
            open(self.folder / LOG, "a", buffering=1) as log,
            progress.Display(self.folder, settings.steps, self.step) as display,
        ):
            window = _Window(self.image_len)
            batches = self.mixture.iterate(self.step, settings.steps)
            while self.step < settings.steps:
                mixed = window.waiting_for(batches)
                self._note_skipped(mixed)
                lr = learning_rate(self.step, settings.steps, settings.optimizer)
                try:
                    window.add(mixed, self.engine.step(mixed, lr))
                except Diverged as diverged:
                    raise self._divergence(mixed, diverged) from None
                self.step += 1
                last = self.step == settings.steps
                if self.step % settings.log_every == 0 or last:
                    entry = {"step": self.step, "lr": lr, **window.summary(), "skipped": sum(self.skipped.values())}
                    log.write(json.dumps(entry) + "\n")
                    display.show(entry)
                    window = _Window(self.image_len)
                if stop or last:
                    saved = self.step, self.save()
                elif self.step % settings.checkpoint_every == 0:
                    try:
                        saved = self.step, self.save()
                    except OSError as error:  # a full disk may be emptied before the next one
                        display.say(f"step {self.step}: no checkpoint written: {error}; the run goes on")
                if stop and not last:
                    raise Interrupted(self.step)
        assert saved is not None
        return saved[1]

    def save(self) -> Path:
        state = {
            "samples": self.samples,
            "skipped": dict(self.skipped),
            "tokenizer_sha256": self.mixture.tokenizer.sha256,
        }
        return checkpoint.save(
            self.folder,
            self.step,
            state,
            lambda folder: self.engine.save(folder, self.mixture.tokenizer),
            self.settings.keep,
        )

    def _note_skipped(self, mixed: Mixed) -> None:
        self.samples += len(mixed.batch.sources) + len(mixed.skipped)
        if not mixed.skipped:
            return
        with open(self.folder / SKIPPED, "a") as file:
            for sample in mixed.skipped:
                self.skipped[sample.kind] += 1
                file.write(json.dumps({"step": self.step + 1, **dataclasses.asdict(sample)}) + "\n")
        count, share = sum(self.skipped.values()), self.settings.data.max_skipped_share
        if self.samples >= _ENOUGH_SAMPLES and count > share * self.samples:
            kinds = ", ".join(f"{kind} {many}" for kind, many in self.skipped.most_common())
            raise ValueError(
                f"{count} of {self.samples} samples are broken ({kinds}), more than data.max_skipped_share {share}; "
                f"they are listed in {self.folder / SKIPPED}"
            )

    def _divergence(self, mixed: Mixed, diverged: Diverged) -> ValueError:
        """The error of a step that was not taken; what was reached before it is saved."""
        batch = mixed.batch
        rows = diverged.rows or range(len(batch.sources))
        names = [self.mixture.where(int(batch.sources[row]), int(batch.sample_ids[row])) for row in rows]
        shown = ", ".join(f"{key} of {shard}" for shard, key in names[:8])
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        kept = self.save() if self.step else "none"
        return ValueError(
            f"step {self.step + 1} gave {diverged.value}, in samples {shown}{more}; the run stopped before it "
            f"(checkpoint: {kept}); a smaller optimizer.lr or optimizer.max_grad_norm may get past it"
        )


class _Window:
    """What is summed up between two lines of the log."""

    def __init__(self, image_len: int) -> None:
        self.image_len = image_len
        self.began = time.perf_counter()
        self.waited = 0.0
        self.nll, self.suffix_tokens = np.zeros(2), np.zeros(2, np.int64)
        self.samples = self.tokens = self.steps = 0
        self.grad_norm = 0.0
        self.ids = hashlib.sha256()

    def waiting_for(self, batches: Iterator[Mixed]) -> Mixed:
        began = time.perf_counter()
        mixed = next(batches)
        self.waited += time.perf_counter() - began
        return mixed

    def add(self, mixed: Mixed, loss: StepLoss) -> None:
        batch = mixed.batch
        self.nll += loss.nll
        self.suffix_tokens += loss.tokens
        self.grad_norm += loss.grad_norm
        self.steps += 1
        self.samples += len(batch.sources)
        self.tokens += int(batch.encoder_lens(self.image_len).sum() + batch.decoder_lens.sum())
        self.ids.update(batch.sources.tobytes() + batch.sample_ids.tobytes())

    def summary(self) -> dict[str, Any]:
        """Losses per suffix token, in nats; rates per second."""
        seconds = time.perf_counter() - self.began
        total = max(int(self.suffix_tokens.sum()), 1)
        losses = self.nll / np.maximum(self.suffix_tokens, 1)
        return {
            "loss": float(self.nll.sum() / total),
            **{f"loss_{name}": float(loss) for name, loss in zip(SOURCES, losses, strict=True)},
            "image_text_token_share": float(self.suffix_tokens[IMAGE_TEXT] / total),
            "grad_norm": self.grad_norm / self.steps,
            "step_s": seconds / self.steps,
            "samples_per_s": self.samples / seconds,
            "tokens_per_s": self.tokens / seconds,
            "data_wait_share": self.waited / seconds,
            "sample_ids_sha256": self.ids.hexdigest()[:16],
        }


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that SIGINT and SIGTERM append to; the second SIGINT acts at once."""
    caught: list[int] = []

    def note(number: int, frame: Any) -> None:
        caught.append(number)
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: its owner answers signals
        yield caught
        return
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _keep_until(path: Path, step: int) -> None:
    """Removes the lines of a log that come after a step: they will be written again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            break  # cut off when the run was killed
    path.write_text("".join(kept))
