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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from simvlm.data.mixture import Mixed, Mixture
from simvlm.data.tokenizer import Tokenizer
from simvlm.model.batch import IMAGE_TEXT, SOURCES
from simvlm.train import checkpoint, progress
from simvlm.train.optim import learning_rate
from simvlm.train.processes import Processes
from simvlm.train.settings import PretrainSettings
from simvlm.train.step import Diverged, StepLoss

LOG, SKIPPED = "log.jsonl", "skipped.jsonl"
_ENOUGH_SAMPLES = 1000
"""before the share of broken ones means anything"""


class Engine(Protocol):
    """One framework's model and optimizer."""

    processes: Processes

    def step(self, mixed: Mixed, lr: float) -> StepLoss: ...
    def save(self, folder: Path, tokenizer: Tokenizer) -> None: ...
    def load(self, folder: Path) -> None: ...


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop, and has saved itself."""


class Run:
    """A run on its way: `all_steps` takes those that are left.

    Args:
        engine: fresh; it is given the state of the run's newest checkpoint, if there is one.
        mixture: of the data.
        settings: of the run.
        image_len: tokens of one image, for the count of tokens per second.

    Raises:
        ValueError: the newest checkpoint is of another model, tokenizer or data; nothing was written.
    """

    def __init__(self, engine: Engine, mixture: Mixture, settings: PretrainSettings, *, image_len: int) -> None:
        self.engine, self.mixture, self.settings, self.image_len = engine, mixture, settings, image_len
        self.folder = Path(settings.out)
        self.step = 0
        self.samples = 0
        self.skipped: Counter[str] = Counter()
        if (found := checkpoint.newest(self.folder)) is not None:
            self._resume(found[1])

    def _resume(self, folder: Path) -> None:
        state = checkpoint.read_state(folder)
        for name, value in self._what_must_stay().items():
            if state[name] != value:
                setting = f"data.{name.removesuffix('_sha256')}"
                what = "the one" if name.endswith("_sha256") else f"the {state[name]} samples"
                got = "another" if name.endswith("_sha256") else f"{value}"
                raise ValueError(f"{setting} must be {what} that {folder} was trained with, got {got}")
        self.engine.load(folder)
        self.step, self.samples, self.skipped = state["step"], state["samples"], Counter(state["skipped"])

    def _what_must_stay(self) -> dict[str, Any]:
        """What the order of the samples depends on, as a checkpoint remembers it."""
        documents = self.mixture.documents
        return {
            "tokenizer_sha256": self.mixture.tokenizer.sha256,
            "pairs": self.mixture.num_pairs,
            "documents": 0 if documents is None else len(documents),
        }

    def all_steps(self) -> Path:
        """Returns the folder of the last checkpoint.

        Raises:
            Interrupted: SIGINT or SIGTERM came; the run has saved itself.
            ValueError: a loss is not finite, or too many samples are broken; the state before is saved.
            OSError: the last checkpoint could not be written, or the data not read.
        """
        if self.engine.processes.is_first:
            for name in (LOG, SKIPPED):  # what comes after the checkpoint will be written again
                _keep_until(self.folder / name, self.step)
        with _stop_signals() as stop, self._display() as display:
            try:
                return self._steps(stop, display)
            except (OSError, ValueError):
                self._try_to_save(display)
                raise

    def _display(self) -> progress.Display:
        quiet = not self.engine.processes.is_first
        return progress.Display(self.folder, self.settings.steps, self.step, quiet=quiet)

    def _steps(self, stop: list[int], display: progress.Display) -> Path:
        settings = self.settings
        window = _Window(self.image_len, self.engine.processes.count)
        batches = self.mixture.iterate(self.step, settings.steps)
        while self.step < settings.steps:
            mixed = window.waiting_for(batches)
            lr = learning_rate(self.step, settings.steps, settings.optimizer)
            try:
                window.add(mixed, self.engine.step(mixed, lr))
            except Diverged as diverged:
                raise self._divergence(mixed, diverged, display) from None
            self.step += 1
            self._note_skipped(mixed, display)
            if self.step % settings.log_every == 0 or self.step == settings.steps:
                entry = {"step": self.step, "lr": lr, **window.summary(), "skipped": sum(self.skipped.values())}
                self._append(LOG, [entry], display)
                display.show(entry)
                window = _Window(self.image_len, self.engine.processes.count)
            if self.step == settings.steps:
                break
            if self.engine.processes.agree(bool(stop)):
                self.save()
                raise Interrupted(
                    f"stopped after step {self.step}, saved; `simvlm pretrain --resume {self.folder}` goes on"
                )
            if self.step % settings.checkpoint_every == 0:
                self._try_to_save(display)
        return self.save()

    def save(self) -> Path:
        state = {"samples": self.samples, "skipped": dict(self.skipped), **self._what_must_stay()}
        return checkpoint.save(
            self.folder,
            self.step,
            state,
            lambda folder: self.engine.save(folder, self.mixture.tokenizer),
            self.settings.keep,
            self.engine.processes,
        )

    def _try_to_save(self, display: progress.Display) -> Path | None:
        """Where a full disk must not end what goes on: it may be emptied before the next try."""
        if self.step == 0:
            return None
        try:
            return self.save()
        except OSError as error:
            display.say(f"step {self.step}: no checkpoint written: {error}")
            return None

    def _append(self, name: str, lines: Sequence[dict[str, Any]], display: progress.Display) -> None:
        if not self.engine.processes.is_first:
            return
        try:
            with open(self.folder / name, "a") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
        except OSError as error:
            display.say(f"step {self.step}: {name} not written: {error}")

    def _note_skipped(self, mixed: Mixed, display: progress.Display) -> None:
        self.samples += (len(mixed.batch.sources) + len(mixed.skipped)) * self.engine.processes.count
        if not mixed.skipped:
            return
        self.skipped.update(sample.kind for sample in mixed.skipped)
        lines = [{"step": self.step, **dataclasses.asdict(sample)} for sample in mixed.skipped]
        self._append(SKIPPED, lines, display)
        count, share = sum(self.skipped.values()), self.settings.data.max_skipped_share
        if self.samples >= _ENOUGH_SAMPLES and count > share * self.samples:
            kinds = ", ".join(f"{kind} {many}" for kind, many in self.skipped.most_common())
            raise ValueError(
                f"{count} of {self.samples} samples are broken ({kinds}), more than data.max_skipped_share {share}; "
                f"they are listed in {self.folder / SKIPPED}"
            )

    def _divergence(self, mixed: Mixed, diverged: Diverged, display: progress.Display) -> ValueError:
        """The error of a step that was not taken; what was reached before it is saved."""
        batch = mixed.batch
        rows = diverged.rows or range(len(batch.sources))
        names = [self.mixture.where(int(batch.sources[row]), int(batch.sample_ids[row])) for row in rows]
        shown = ", ".join(f"{key} of {shard}" for shard, key in names[:8])
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        kept = self._try_to_save(display)
        return ValueError(
            f"step {self.step + 1} gave {diverged.value}, in samples {shown}{more}; the run stopped before it "
            f"(checkpoint: {kept or 'none'}); a smaller optimizer.lr or an optimizer.max_grad_norm may get past it"
        )


class _Window:
    """What is summed up between two lines of the log."""

    def __init__(self, image_len: int, processes: int) -> None:
        self.image_len, self.processes = image_len, processes
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
        self.samples += len(batch.sources) * self.processes  # all have equal parts, but for what was skipped
        self.tokens += self.processes * int(batch.encoder_lens(self.image_len).sum() + batch.decoder_lens.sum())
        self.ids.update(batch.sources.tobytes() + batch.sample_ids.tobytes())

    def summary(self) -> dict[str, Any]:
        """Losses per suffix token, in nats; rates per second."""
        seconds = time.perf_counter() - self.began
        total = max(int(self.suffix_tokens.sum()), 1)
        losses = self.nll / np.maximum(self.suffix_tokens, 1)
        return {
            "loss": float(self.nll.sum() / total),
            **{
                f"loss_{name}": float(loss)
                for name, loss, tokens in zip(SOURCES, losses, self.suffix_tokens, strict=True)
                if tokens
            },
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
        with contextlib.suppress(ValueError):  # cut off when the run was killed
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    checkpoint.write_whole(path, "".join(kept))
