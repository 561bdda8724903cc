"""One run of `python -m benchmarks.gpu`: what its stages share."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

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
    """

    out: Path
    dry: bool
    ends: float
    report: dict[str, Any]
    contests: dict[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)

    def save(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        path = self.out / "gpu.json"
        aside = path.with_suffix(".part")
        aside.write_text(json.dumps(self.report, indent=1, ensure_ascii=False) + "\n")
        aside.replace(path)

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @property
    def left_s(self) -> float:
        return self.ends - time.monotonic()
