"""What a maker of batches is at: three numbers, cheap to write at every sample, that another process can read."""

from __future__ import annotations

import time
from collections.abc import Callable, MutableSequence

from simvlm.model.batch import SOURCES

Where = Callable[[int, int], tuple[str, str]]
"""(shard, key) of a source's sample"""
_STARTING, _IDLE = -2, -1
"""in place of the step"""
_NO_SAMPLE = -1


class Progress:
    """The step and the sample that is being read, and since when.

    Args:
        name: of the maker, as "worker 1".
        cells: where the numbers are, if not here alone: step (from 0), 2 · sample + source, ns of the monotonic clock.
    """

    def __init__(self, name: str, cells: MutableSequence[int] | None = None) -> None:
        self.name = name
        self._cells = [0, 0, 0] if cells is None else cells
        self._note(_STARTING)

    def begin(self, step: int) -> None:
        self._note(step)

    def read(self, source: int, sample: int) -> None:
        self._cells[1], self._cells[2] = 2 * sample + source, time.monotonic_ns()

    def rest(self) -> None:
        """Until the next step."""
        self._note(_IDLE)

    def _note(self, step: int) -> None:
        self._cells[0], self._cells[1], self._cells[2] = step, _NO_SAMPLE, time.monotonic_ns()

    def place(self, where: Where) -> str:
        """As in "step 12, sample 000000123 of cc/00001.tar"; steps count from 1, as in the log."""
        step, at = self._cells[0], self._cells[1]
        if step == _STARTING:
            return "before its first step"
        if step == _IDLE:
            return "between two steps"
        if at == _NO_SAMPLE:
            return f"step {step + 1}"
        sample, source = divmod(at, 2)
        try:
            shard, key = where(source, sample)
        except Exception:  # the index may be gone with its shard: the number must do
            return f"step {step + 1}, sample number {sample} of {SOURCES[source]}"
        return f"step {step + 1}, sample {key} of {shard}"

    def doing(self, where: Where) -> str:
        """As in "worker 1: step 12, sample 000000123 of cc/00001.tar, for 93 s"."""
        seconds = (time.monotonic_ns() - self._cells[2]) / 1e9
        return f"{self.name}: {self.place(where)}, for {seconds:.0f} s"
