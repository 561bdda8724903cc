"""Tells what a run waits for when no step was taken for long: a worker and its shard, another process, the device."""

from __future__ import annotations

import faulthandler
import sys
import threading
import time
from collections.abc import Callable, Sequence


class Watchdog:
    """A thread that speaks up; the run is left alone, and may go on.

    Args:
        seconds: of silence before it does, and between two times.
        say: prints a message.
        doing: what each of the data's workers does, one line a worker.
    """

    def __init__(self, seconds: float, say: Callable[[str], None], doing: Callable[[], Sequence[str]]) -> None:
        self._seconds, self._say, self._doing = seconds, say, doing
        self._heard, self._waits_for = time.monotonic(), "the first batch"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="simvlm-watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def now(self, waits_for: str) -> None:
        """The run goes on, and waits for this from now on."""
        self._heard, self._waits_for = time.monotonic(), waits_for

    def _watch(self) -> None:
        told = 0.0
        while not self._stop.wait(min(self._seconds / 4, 1.0)):
            silence = time.monotonic() - max(self._heard, told)
            if silence < self._seconds:
                continue
            told = time.monotonic()
            self._say(f"nothing has happened for {told - self._heard:.0f} s: waiting for {self._waits_for}")
            faulthandler.dump_traceback(sys.stderr)
            for line in self._doing():  # last: it may wait for the same file
                self._say(f"  {line}")
