"""The training loop: data in, steps of an engine, what is logged and kept. Knows no framework.

A run's folder holds `run.yaml` (its settings), `log.jsonl` (a line every `log_every` steps), `skipped.jsonl` (samples
that were left out), `held_out.jsonl`, `tensorboard/` and `checkpoints/`. A batch is a function of its step, so the
state of the data is the step; a run that was killed goes on with the same samples and the same bits.

All processes of a run take the same way through this file: what one of them knows (no data, a signal, a full disk) it
tells the others once a step, before the step, and all act on it together. None waits for one that has given up.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import resource
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from simvlm.data.mixture import Mixed, Mixture
from simvlm.data.tokenizer import Tokenizer
from simvlm.data.workers import Batches
from simvlm.files import write_whole
from simvlm.model.config import SimVLMConfig
from simvlm.train import checkpoint, progress
from simvlm.train.held_out import HeldOut
from simvlm.train.optim import learning_rate
from simvlm.train.processes import Processes, ProcessLost
from simvlm.train.settings import PretrainSettings
from simvlm.train.step import Diverged, StepLoss
from simvlm.train.watchdog import Watchdog
from simvlm.train.window import Told, Window

LOG, SKIPPED, HELD_OUT = "log.jsonl", "skipped.jsonl", "held_out.jsonl"
_ENOUGH_SAMPLES = 1000
"""before the share of broken ones means anything"""


class Engine(Protocol):
    """One framework's model and optimizer, on this process's devices.

    `save` starts to write a folder and returns at once. `held_out` and `usable_model` are wanted only of an engine
    whose settings name held-out shards.
    """

    processes: Processes
    peak_flops: float | None

    def step(self, mixed: Mixed, lr: float, tokens: np.ndarray) -> StepLoss: ...
    def save(self, folder: Path, tokenizer: Tokenizer) -> Future[None]: ...
    def load(self, folder: Path) -> None: ...
    def peak_memory(self) -> int: ...


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop, and has saved itself."""


class Run:
    """A run on its way: `all_steps` takes those that are left.

    Args:
        engine: fresh; it is given the state of the run's newest checkpoint, if there is one.
        mixture: of the data.
        settings: of the run.
        config: of the model.
        held_out: what is looked at every `settings.held_out.every` steps.

    Raises:
        ValueError: the newest checkpoint is of another model, tokenizer or data; nothing was written.
    """

    def __init__(
        self,
        engine: Engine,
        mixture: Mixture,
        settings: PretrainSettings,
        config: SimVLMConfig,
        held_out: HeldOut | None = None,
    ) -> None:
        self.engine, self.mixture, self.settings, self.config = engine, mixture, settings, config
        self.held_out, self.processes = held_out, engine.processes
        self.folder = Path(settings.out)
        self.step = 0
        self.samples = 0
        self.skipped: Counter[str] = Counter()
        self._saving: checkpoint.Saving | None = None
        # The first process decides: on a shared file system the others may see an older state of the folder.
        newest = checkpoint.newest(self.folder)
        step = int(self.processes.share(np.array([-1 if newest is None else newest[0]]))[0, 0])
        if step >= 0:
            self._resume(checkpoint.folder_of(self.folder, step))

    def _resume(self, folder: Path) -> None:
        state = checkpoint.read_state(folder)
        was = state["trained_with"]
        for setting, value in self._trained_with().items():
            if was.get(setting) != value:
                raise ValueError(f"{setting} must be {was.get(setting)}, as in {folder}, got {value}")
        self.engine.load(folder)
        self.step, self.samples, self.skipped = state["step"], state["samples"], Counter(state["skipped"])

    def _trained_with(self) -> dict[str, Any]:
        """What a step's samples depend on, by setting, as a checkpoint remembers it: none may change in a run."""
        documents = self.mixture.documents
        return {
            "data.tokenizer": f"of sha256 {self.mixture.tokenizer.sha256}",
            "data.pairs": f"{self.mixture.num_pairs} pairs",
            "data.documents": f"{0 if documents is None else len(documents)} documents",
            "seed": self.mixture.seed,
            "data.pairs_per_step": self.mixture.pairs_per_step,
            "data.documents_per_step": self.mixture.documents_per_step,
            "objective": self.mixture.objective,
        }

    def all_steps(self) -> Path:
        """Returns the folder of the last checkpoint.

        Raises:
            Interrupted: SIGINT or SIGTERM came; the run has saved itself.
            ProcessLost: another process is gone.
            ValueError: a loss is not finite, or too many samples are broken; the state before is saved.
            OSError: the last checkpoint could not be written, or the data not read.
        """
        settings = self.settings
        self.processes.together(self._forget_what_comes_again)
        batches = self.mixture.iterate(self.step, settings.steps, workers=settings.data.workers)
        display = progress.Display(self.folder, settings.steps, self.step, quiet=not self.processes.is_first)
        with (
            contextlib.closing(batches),
            _stop_signals() as stop,
            display,
            Watchdog(settings.stall_s, display.say, batches.doing) as watchdog,
        ):
            return self._steps(batches, stop, display, watchdog)

    def _forget_what_comes_again(self) -> None:
        """What the logs tell of steps after the checkpoint."""
        if self.processes.is_first:
            for name in (LOG, SKIPPED, HELD_OUT):
                _keep_until(self.folder / name, self.step)

    def _steps(self, batches: Batches, stop: list[int], display: progress.Display, watchdog: Watchdog) -> Path:
        settings = self.settings
        window, first = Window(self.engine.peak_flops), self.step
        while self.step < settings.steps:
            watchdog.now("data")
            began = time.perf_counter()
            mixed, told = self._next(batches, bool(stop), display)
            window.waited += time.perf_counter() - began
            watchdog.now("the device, or another process's")
            lr = learning_rate(self.step, settings.steps, settings.optimizer)
            began = time.perf_counter()
            try:
                loss = self.engine.step(mixed, lr, told.tokens)
            except Diverged as diverged:
                raise self._divergence(mixed, diverged, display) from None
            window.stepped += time.perf_counter() - began
            window.add(told, loss)
            self.step += 1
            self._note_skipped(mixed, told, display)
            if self.step % settings.log_every == 0 or self.step == settings.steps:
                self._log(lr, window, display)
                window = Window(self.engine.peak_flops)
            if self._saving is not None and told.written == self.processes.count:
                self._finish_saving(display)
            if self.step == settings.steps:
                break
            watchdog.now("a checkpoint, or held-out samples")
            if told.stops or (stop and self.processes.count == 1):  # others hear of a signal before the next step
                self.save()
                raise Interrupted(
                    f"stopped after step {self.step}, saved; `simvlm pretrain --resume {self.folder}` goes on"
                )
            if self.step % settings.checkpoint_every == 0:
                self._start_saving(display)
            if self.held_out is not None and self.step % settings.held_out.every == 0:
                self._look_at_held_out(display)
        last = self.save()
        if self.held_out is not None and self.step > first:
            self._look_at_held_out(display)
        return last

    def _next(self, batches: Batches, stops: bool, display: progress.Display) -> tuple[Mixed, Told]:
        """This process's part of the next batch, and what all processes tell of theirs."""
        mixed, said = None, ""
        try:
            mixed = next(batches)
        except (OSError, ValueError, RuntimeError) as error:
            said = str(error) or type(error).__name__
        written = self._saving is not None and self._saving.is_written
        own = Told(failed=1) if mixed is None else Told.of(mixed, self.config, stops=stops, written=written)
        told = Told(*self.processes.share(np.array(own)).sum(0).tolist())
        if told.failed:
            texts = self.processes.share_text(said)
            kept = self._try_to_save(display)
            raise OSError(
                f"step {self.step + 1}: no data: {_by_process(texts)}; the run stopped before it "
                f"(checkpoint: {kept or 'none'})"
            )
        assert mixed is not None
        return mixed, told

    def save(self) -> Path:
        """Writes a checkpoint and waits for it; returns its folder.

        Raises:
            OSError: it could not be written.
        """
        self._wait_for_saving()
        return self._new_saving().finish()

    def _new_saving(self) -> checkpoint.Saving:
        state = {"samples": self.samples, "skipped": dict(self.skipped), "trained_with": self._trained_with()}
        return checkpoint.Saving(
            self.folder,
            self.step,
            state,
            lambda folder: self.engine.save(folder, self.mixture.tokenizer),
            self.settings.keep,
            self.processes,
        )

    def _start_saving(self, display: progress.Display) -> None:
        self._finish_saving(display)
        try:
            self._saving = self._new_saving()
        except OSError as error:
            self._tell_of_no_checkpoint(self.step, error, display)
            return
        if self.processes.share(np.array([self._saving.is_written])).all():  # an engine that writes at once
            self._finish_saving(display)

    def _finish_saving(self, display: progress.Display) -> None:
        """Where a full disk must not end what goes on: it may be emptied before the next try."""
        saving, self._saving = self._saving, None
        if saving is None:
            return
        try:
            saving.finish()
        except OSError as error:
            self._tell_of_no_checkpoint(saving.step, error, display)

    def _wait_for_saving(self) -> None:
        """The next one stands for it, whatever became of it."""
        saving, self._saving = self._saving, None
        if saving is not None:
            with contextlib.suppress(OSError):
                saving.finish()

    def _try_to_save(self, display: progress.Display) -> Path | None:
        if self.step == 0:
            return None
        try:
            return self.save()
        except OSError as error:
            self._tell_of_no_checkpoint(self.step, error, display)
            return None

    def _tell_of_no_checkpoint(self, step: int, error: OSError, display: progress.Display) -> None:
        if isinstance(error, ProcessLost):
            raise error
        if self.processes.is_first:
            display.say(f"step {step}: no checkpoint written: {error}")

    def _log(self, lr: float, window: Window, display: progress.Display) -> None:
        own = self.engine.peak_memory() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        memory = int(self.processes.share(np.array([own])).max())
        entry = {
            "step": self.step,
            "lr": lr,
            **window.summary(),
            "memory_gib": memory / 2**30,
            "skipped": sum(self.skipped.values()),
            **{f"skipped_{kind.replace(' ', '_')}": count for kind, count in sorted(self.skipped.items())},
        }
        self._append(LOG, [entry], display)
        display.show(entry)

    def _look_at_held_out(self, display: progress.Display) -> None:
        assert self.held_out is not None
        try:
            entry = {"step": self.step, **self.held_out.loss(self.engine)}
            captions = self.held_out.captions(self.engine)
        except ProcessLost:
            raise
        except OSError as error:  # what is only looked at must not end what goes on
            if self.processes.is_first:
                display.say(f"step {self.step}: held-out samples not read: {error}")
            return
        written = [{"text": caption.text, "reference": caption.reference} for caption in captions]
        self._append(HELD_OUT, [entry | {"captions": written}], display)
        display.show_held_out(entry, captions)

    def _append(self, name: str, lines: Sequence[dict[str, Any]], display: progress.Display) -> None:
        if not self.processes.is_first:
            return
        try:
            with open(self.folder / name, "a") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
        except OSError as error:
            display.say(f"step {self.step}: {name} not written: {error}")

    def _note_skipped(self, mixed: Mixed, told: Told, display: progress.Display) -> None:
        self.samples += told.samples + told.skipped
        if not told.skipped:
            return
        own = json.dumps([dataclasses.asdict(sample) for sample in mixed.skipped])
        lines = [sample for text in self.processes.share_text(own) for sample in json.loads(text)]
        self.skipped.update(line["kind"] for line in lines)
        self._append(SKIPPED, [{"step": self.step, **line} for line in lines], display)
        count, share = sum(self.skipped.values()), self.settings.data.max_skipped_share
        if self.samples >= _ENOUGH_SAMPLES and count > share * self.samples:
            kinds = ", ".join(f"{kind} {many}" for kind, many in self.skipped.most_common())
            self._try_to_save(display)
            raise ValueError(
                f"{count} of {self.samples} samples are broken ({kinds}), more than data.max_skipped_share {share}; "
                f"they are listed in {self.folder / SKIPPED}"
            )

    def _divergence(self, mixed: Mixed, diverged: Diverged, display: progress.Display) -> ValueError:
        """The error of a step that was not taken; what was reached before it is saved."""
        batch = mixed.batch
        own = [self.mixture.where(int(batch.sources[row]), int(batch.sample_ids[row])) for row in diverged.rows]
        names = [name for text in self.processes.share_text(json.dumps(own)) for name in json.loads(text)]
        shown = ", ".join(f"{key} of {shard}" for shard, key in names[:8]) or f"{batch.sample_ids[:8].tolist()}, …"
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        kept = self._try_to_save(display)
        return ValueError(
            f"step {self.step + 1} gave {diverged.value}, in samples {shown}{more}; the run stopped before it "
            f"(checkpoint: {kept or 'none'}); a smaller optimizer.lr or an optimizer.max_grad_norm may get past it"
        )


def _by_process(texts: Sequence[str]) -> str:
    if len(texts) == 1:
        return texts[0]
    return "; ".join(f"process {i}: {text}" for i, text in enumerate(texts) if text)


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that SIGINT and SIGTERM append to; the second SIGINT acts at once, a second SIGTERM does not: a launcher
    and its system may each send one."""
    caught: list[int] = []

    def note(number: int, frame: Any) -> None:
        caught.append(number)
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

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
    write_whole(path, "".join(kept))
