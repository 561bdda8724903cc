"""What a run shows while it trains: a line that moves (rich) and TensorBoard's curves."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from simvlm.train.held_out import Caption

_SECONDS_BETWEEN_LINES = 15.0
_NOT_CURVES = ("step", "sample_ids_hash")


class Display:
    """On a terminal a bar with the time left; into a file or pipe a line now and then.

    Args:
        folder: of the run; curves go to `tensorboard/` in it.
        steps: of the whole run.
        first_step: steps that were done before.
        quiet: neither lines nor curves (another process of the run has them); messages all the same.
    """

    def __init__(self, folder: Path, steps: int, first_step: int, *, quiet: bool = False) -> None:
        self._console = Console(stderr=True)
        self._curves: Any = None
        if not quiet:
            # torch's writer: it needs the tensorboard package alone, not TensorFlow.
            from torch.utils.tensorboard import SummaryWriter

            purge = first_step + 1 if first_step else None
            self._curves = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)
        self._progress = Progress(
            TextColumn("step {task.completed:.0f} of {task.total:.0f}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=self._console,
            disable=quiet or not self._console.is_terminal,
            speed_estimate_period=120,
        )
        self._task = self._progress.add_task("", total=steps, completed=first_step)
        self._steps, self._first_step = steps, first_step
        self._began = self._last_line = time.monotonic()

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._progress.stop()
        if self._curves is None:
            return
        with contextlib.suppress(OSError):  # a full disk, of which it was said before
            self._curves.close()

    def show(self, entry: dict[str, Any]) -> None:
        """One line of the log."""
        if self._curves is None:
            return
        self._add_curves(entry)
        text = (
            f"loss {entry['loss']:.3f}  {entry['samples_per_s']:.0f} samples/s  {entry['tokens_per_s']:.0f} tokens/s  "
            f"waiting for data {entry['data_wait_share']:.0%}"
        )
        if entry["skipped"]:
            text += f"  skipped {entry['skipped']}"
        self._progress.update(self._task, completed=entry["step"], description=text)
        now, step = time.monotonic(), entry["step"]
        if not self._console.is_terminal and (now - self._last_line >= _SECONDS_BETWEEN_LINES or step == self._steps):
            self._last_line = now
            left = (now - self._began) / (step - self._first_step) * (self._steps - step)
            self._console.print(f"step {step} of {self._steps}  {text}  left {left / 60:.1f} min", soft_wrap=True)

    def show_held_out(self, entry: dict[str, Any], captions: Sequence[Caption]) -> None:
        """One line of held_out.jsonl, and what was written of its pictures."""
        if self._curves is None:
            return
        self._add_curves(entry)
        for i, caption in enumerate(captions):
            with contextlib.suppress(OSError):
                self._curves.add_image(f"captions/{i}", caption.picture, entry["step"], dataformats="HWC")
                self._curves.add_text(f"captions/{i}", f"{caption.text}\n\n({caption.reference})", entry["step"])
        losses = "  ".join(f"{name} {value:.3f}" for name, value in entry.items() if name != "step")
        self.say(f"step {entry['step']}: {losses}")
        for caption in captions:
            self.say(f"  {caption.text!r} ({caption.reference!r})")

    def _add_curves(self, entry: dict[str, Any]) -> None:
        try:
            for name, value in entry.items():
                if name not in _NOT_CURVES:
                    self._curves.add_scalar(name, value, entry["step"])
        except OSError as error:
            self.say(f"step {entry['step']}: tensorboard not written: {error}")

    def say(self, text: str) -> None:
        """A message that stays."""
        self._console.print(text, soft_wrap=True, highlight=False, markup=False)
