"""What the jobs of `simvlm reproduce` found, and the ablation's rows compared by seed."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from simvlm.tasks.metrics import Interval, student
from simvlm.tasks.reproduce import Job, result_path
from simvlm.tasks.rows import ABLATION, CORE, FULL, HEADLINE, NO_PRETRAINING

NOT_RUN = "not run"
LABELS = {
    HEADLINE: "full, trained longest",
    FULL: "full: PrefixLM, encoder and decoder",
    "no-pretraining": "no pretraining",
    "lm": "causal LM",
    "span-corruption": "span corruption",
    "without-image-text": "without image-text pairs",
    "linear-patches": "linear patches, no convolutions",
    "without-text": "without text-only documents",
    "fewer-stages": "one convolution stage fewer",
    "one-stage-more": "one convolution stage more",
    "decoder-only": "decoder-only",
    "decoder-only-lm": "decoder-only, causal LM",
    "tenth-of-pairs": "a tenth of the pairs",
}
"""Of what is pretrained."""


class Results:
    """The results that are there.

    Args:
        out: where they are kept.
        jobs: all that there could be.
    """

    def __init__(self, out: Path, jobs: Sequence[Job]) -> None:
        self.jobs = {job.name: job for job in jobs}
        paths = {name: result_path(out, name) for name in self.jobs}
        self.files: dict[str, dict[str, Any]] = {
            name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()
        }

    def found(self, name: str) -> dict[str, Any]:
        """What a job found; {} where it did not run."""
        found: dict[str, Any] = self.files.get(name, {}).get("found", {})
        return found

    def seconds(self, names: Iterable[str]) -> float | None:
        """Of all these jobs that ran; None: none did."""
        ran = [self.files[name]["seconds"] for name in names if name in self.files]
        return sum(ran) if ran else None


def interval(entry: dict[str, Any] | None, scale: float = 100) -> Interval | None:
    """An interval of a result in points; None where there is none, or it is not of finite numbers."""
    if not entry or not all(math.isfinite(entry[end]) for end in ("value", "low", "high")):
        return None
    return Interval(scale * entry["value"], scale * entry["low"], scale * entry["high"], entry["n"])


def shown(found: Interval | None) -> str:
    """ "85.0 (83.1 … 86.9)", or "not run"."""
    return NOT_RUN if found is None else f"{found.value:.1f} ({found.low:.1f} … {found.high:.1f})"


def apart(higher: Interval, lower: Interval) -> bool:
    """Whether one lies above the other and their intervals do not touch."""
    return higher.low > lower.high


@dataclasses.dataclass(frozen=True)
class Compared:
    """A row of the ablation beside the full model.

    Attributes:
        row: its name.
        planned: how many seeds were to run.
        scores: VQA's by seed, in points.
        differences: to the full model's with the same seed, where both are there.
    """

    row: str
    planned: int
    scores: dict[int, float]
    differences: dict[int, float]

    @property
    def interval(self) -> Interval | None:
        """Student's, of the differences; None of fewer than two seeds."""
        return student(list(self.differences.values())) if len(self.differences) > 1 else None

    @property
    def verdict(self) -> str:
        """ "decided: below" or "decided: above" only where the interval excludes zero."""
        if self.row == FULL:
            return "" if self.scores else NOT_RUN
        if not self.differences:
            return NOT_RUN if not self.scores else "undecided: no pair"
        found = self.interval
        if found is None:
            return "undecided: one seed"
        if found.low > 0:
            return "decided: above"
        return "decided: below" if found.high < 0 else "undecided"


def ablation(results: Results) -> list[Compared]:
    """All rows: the full model, the other core rows, the rest."""
    by_row: dict[str, dict[int, float]] = {}
    planned: dict[str, int] = {}
    rows = (*CORE, *(row for row in (*ABLATION, NO_PRETRAINING) if row not in CORE))
    for row in rows:
        names = {job.seed: job.name for job in results.jobs.values() if (job.row, job.kind) == (row, "eval")}
        scores = {seed: interval(results.found(name).get("score")) for seed, name in sorted(names.items())}
        planned[row] = len(names)
        by_row[row] = {seed: score.value for seed, score in scores.items() if score is not None}
    full = by_row[FULL]
    return [
        Compared(
            row, planned[row], scores, {seed: score - full[seed] for seed, score in scores.items() if seed in full}
        )
        for row, scores in by_row.items()
    ]
