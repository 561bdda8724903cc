"""One run of `python -m benchmarks.gpu`: what its stages share."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PROCESSES = min(16, len(os.sched_getaffinity(0)))
"""Each holds a context on the GPU, about half a GiB."""


class NeedsError(Exception):
    """A stage wants what is not installed: it is left out, which is no failure."""


@dataclasses.dataclass
class Run:
    """One run: where it writes, when it must end, and what it knows so far; `dry` without a GPU, tiny.

    Attributes:
        report: what gpu.json holds; "stages" has what became of each, other keys are a stage's own.
        contests: op → what a page is written of.
        lost: a fault has made the GPU useless to this process.
    """

    out: Path
    dry: bool
    ends: float
    report: dict[str, Any]
    contests: dict[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)
    lost: bool = False

    def save(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        path = self.out / "gpu.json"
        aside = path.with_suffix(".part")
        aside.write_text(json.dumps(self.report, indent=1, ensure_ascii=False) + "\n")
        aside.replace(path)

    def free(self) -> None:
        """Gives memory back to the GPU, and finds out whether there still is one."""
        if self.device == "cuda" and not self.lost:
            self.lost = context_is_lost()
            with contextlib.suppress(RuntimeError):
                torch.cuda.empty_cache()

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @property
    def left_s(self) -> float:
        return self.ends - time.monotonic()


def context_is_lost() -> bool:
    """Has a kernel's fault, an address that is not there for instance, ended this process's use of the GPU?"""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def in_processes(
    function: Callable[[Any], Any], jobs: list[Any], processes: int, seconds: float
) -> tuple[list[Any], int]:
    """(results, in no order; how many jobs have none), after so many seconds at the most."""
    ends, found = time.monotonic() + seconds, []
    with multiprocessing.get_context("spawn").Pool(processes) as pool:  # whose end ends its processes
        results = pool.imap_unordered(function, jobs)
        with contextlib.suppress(multiprocessing.TimeoutError):
            for _ in jobs:
                found.append(results.next(max(ends - time.monotonic(), 0.001)))
    return found, len(jobs) - len(found)
