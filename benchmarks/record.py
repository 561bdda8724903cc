"""Runs a contest inside one pytest-benchmark test and writes its rows into `extra_info`; every bench file uses it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks import machine
from benchmarks.contest import Contest, Contestant, Stopwatch, rounds_within
from simvlm.kernels.attention.spec import H200_BYTES_PER_S, H200_FLOPS_PER_S
from simvlm.kernels.parity import DTYPES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How long to measure: as many rounds as fit `budget_s`, within two bounds; so many yardsticks before and after."""

    device: str
    quick: bool
    budget_s: float
    min_rounds: int
    max_rounds: int
    yardsticks: int

    @classmethod
    def of(cls, device: str, quick: bool) -> Settings:
        if quick:
            return cls(device=device, quick=True, budget_s=0.5, min_rounds=3, max_rounds=10, yardsticks=1)
        return cls(device=device, quick=False, budget_s=4.0, min_rounds=8, max_rounds=100, yardsticks=5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """What one contest is about.

    Attributes:
        flops, bytes_moved: the op's, whatever a contestant really does; None where nobody counts the bytes.
        checked: a sentence on what says that ours is right, where no error budget does before the timing.
        samples: of a training step.
    """

    op: str
    case: str
    shape: str
    dtype: str
    direction: str
    flops: int
    bytes_moved: int | None
    flops_formula: str
    bytes_formula: str | None
    checked: str | None = None
    samples: int | None = None

    @property
    def least_ms(self) -> float | None:
        """No kernel on an H200 is faster: max(flops / the product's rate, bytes_moved / the copy's rate), in ms."""
        if self.bytes_moved is None:
            return None
        return 1e3 * max(self.flops / H200_FLOPS_PER_S, self.bytes_moved / H200_BYTES_PER_S)


def first_line(documented: Callable[..., Any]) -> str:
    """The first line of a docstring: a formula is written once, where it is computed."""
    return (documented.__doc__ or "").partition("\n")[0]


def record(
    benchmark: Any,
    stopwatch: Stopwatch,
    settings: Settings,
    subject: Subject,
    contestants: Sequence[Contestant],
    refused: Sequence[tuple[str, str, str]] = (),
) -> None:
    """Times the contestants and fills `benchmark.extra_info`.

    Args:
        contestants: in the order of the rows; the first of kind "ours" is what ratios divide by.
        refused: (name, kind, reason) of rows that get no time.
    """
    ours = [contestant.name for contestant in contestants if contestant.kind == "ours"]
    baseline = ours[0] if ours else contestants[0].name
    contest = Contest(contestants, baseline, timer=machine.timer(settings.device), stopwatch=stopwatch)
    warm_s = contest.warm_up()
    rounds = rounds_within(settings.budget_s, warm_s, settings.min_rounds, settings.max_rounds)
    dtype = DTYPES[subject.dtype]
    before = machine.yardsticks(dtype, settings.device, settings.yardsticks)
    benchmark.pedantic(contest.round, rounds=rounds, iterations=1)
    after = machine.yardsticks(dtype, settings.device, settings.yardsticks)

    timings = contest.timings()
    rows = []
    for contestant in contestants:
        row: dict[str, Any] = {"name": contestant.name, "what": contestant.what, "kind": contestant.kind}
        if contestant.name in contest.failures:
            row["reason"] = one_line(contest.failures[contestant.name])
        else:
            row["reason"] = None
            timing = timings[contestant.name]
            row |= dataclasses.asdict(timing)
            if not ours:
                row |= {"ratio": None, "ratio_per_round": None}
            row["gflops"] = 1e-6 * subject.flops / timing.median_ms
            moved = subject.bytes_moved
            row["gbytes_per_s"] = None if moved is None else 1e-6 * moved / timing.median_ms
            if subject.samples is not None:
                row["samples_per_s"] = 1e3 * subject.samples / timing.median_ms
            row["peak_extra_mib"] = machine.peak_extra_mib(contestant.call, settings.device)
            row["error"] = contestant.error(contestant.call()) if contestant.error else None
        rows.append(row)
    rows += [{"name": name, "kind": kind, "reason": reason} for name, kind, reason in refused]
    benchmark.extra_info.update(
        dataclasses.asdict(subject),
        baseline=ours[0] if ours else None,
        threads=torch.get_num_threads(),
        yardsticks={name: [before[name], after[name]] for name in before},
        rows=rows,
        **({"least_ms": subject.least_ms} if settings.device == "cuda" else {}),
    )


def one_line(error: Exception, longest: int = 160) -> str:
    """The error's first line that says something, without the paths of this machine."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    text = re.sub(r"(?:/[\w.+@-]+){2,}", lambda path: path[0].rsplit("/", 1)[-1], lines[0])
    text = f"{type(error).__name__}: {text}"
    return text if len(text) <= longest else text[: longest - 1] + "…"
