"""torch's profiler over some steps of a run: one trace a process, for chrome://tracing, Perfetto or TensorBoard."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

FOLDER = "profile"


class Profile:
    """Records the steps that it is asked to, and nothing if there are none.

    Args:
        steps: (the first, how many); None for none.
        run: the run's folder; traces go to `profile/process-<rank>.json.gz` in it.
        rank: of this process.
    """

    def __init__(self, steps: tuple[int, int] | None, run: Path, rank: int) -> None:
        self._first, self._count = steps or (0, 0)
        self._path = run / FOLDER / f"process-{rank}.json.gz"
        self._profiler: Any = None

    def before(self, step: int) -> None:
        """Step `step`, counted from 0, is about to be taken."""
        if self._count and step == self._first:
            self._profiler = torch.profiler.profile(record_shapes=True, profile_memory=True)
            self._profiler.start()

    def after(self, step: int) -> None:
        """It was taken."""
        if self._profiler is not None and step + 1 >= self._first + self._count:
            self.close()

    def close(self) -> None:
        """Writes what was recorded; a trace that cannot be written costs the run nothing."""
        if self._profiler is None:
            return
        self._profiler.stop()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._profiler.export_chrome_trace(str(self._path))
        except OSError as error:
            print(f"profile: {self._path} not written: {error}", file=sys.stderr)
        self._profiler = None
