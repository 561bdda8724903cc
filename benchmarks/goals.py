"""What a result is held against: the goals of an op on a CPU, each computed from the contests of one run.

A goal that is missed stays in the table.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterable
from typing import Any

Contest = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Goal:
    """Attributes:
    what: what is compared with what.
    at_least: the goal, or the most that is allowed if `at_most`.
    measured: None where the run lacks a contest or a row that it needs.
    """

    what: str
    dtype: str
    goal: float
    measured: float | None
    at_most: bool = False
    unit: str = "×"

    @property
    def met(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured <= self.goal if self.at_most else self.measured >= self.goal


class _Missing(Exception):
    pass


class _Run:
    """The contests of one run by case, dtype and direction."""

    def __init__(self, contests: Iterable[Contest]) -> None:
        self._contests = {(c["case"], c["dtype"], c["direction"]): c for c in contests}

    def row(self, case: str, dtype: str, direction: str, name: str | None = None) -> dict[str, Any]:
        """A row with a time; ours without a name."""
        contest = self._contest(case, dtype, direction)
        for row in contest["rows"]:
            if row["name"] == (name or contest["baseline"]) and not row["reason"]:
                return row
        raise _Missing

    def yardstick(self, case: str, dtype: str, direction: str, name: str) -> float:
        found = self._contest(case, dtype, direction)["yardsticks"].get(name)
        if not found:
            raise _Missing
        return statistics.mean(found)

    def fastest(self, case: str, dtype: str, direction: str) -> dict[str, Any]:
        """The peer with the shortest time."""
        rows = self._contest(case, dtype, direction)["rows"]
        return min((row for row in rows if row["kind"] == "peer" and not row["reason"]), key=lambda row: row["ratio"])

    def _contest(self, case: str, dtype: str, direction: str) -> Contest:
        if (case, dtype, direction) not in self._contests:
            raise _Missing
        return self._contests[case, dtype, direction]


def goals(contests: Iterable[Contest], op: str) -> list[Goal]:
    """The goals of an op; none for one that has none, or on a device that is no CPU."""
    found = list(contests)
    if not any("copy_gbytes_per_s" in contest["yardsticks"] for contest in found):
        return []
    run = _Run(found)
    if op == "prefix_attention":
        return [goal for dtype in DTYPES for goal in _attention(run, dtype)]
    return [_ratio(run, dtype, *row) for row in _RATIOS.get(op, ()) for dtype in DTYPES]


DTYPES = ("float32", "bfloat16")
_NORMS = ("base_stem_b8", "base_stage_1_b8", "base_stage_2_b8", "base_stage_3_b8")
# op: (case, direction, peer, its time ÷ ours at the least)
_RATIOS: dict[str, tuple[tuple[str, str, str, float], ...]] = {
    "batch_norm_act": tuple((case, "both", "torch", 1.5) for case in _NORMS),
    "stem_step": (("base_b4", "step", "torch", 1.15),),
    "demo_step": (("demo", "step", "simvlm reference", 1.5),),
}


def _ratio(run: _Run, dtype: str, case: str, direction: str, peer: str, at: float) -> Goal:
    try:
        measured: float | None = run.row(case, dtype, direction, peer)["ratio"]
    except _Missing:
        measured = None
    return Goal(what=f"{case}: against {peer}", dtype=dtype, goal=at, measured=measured)


def _attention(run: _Run, dtype: str) -> Iterable[Goal]:
    half = dtype == "bfloat16"

    def goal(what: str, at: float, measure: Callable[[], float], **options: Any) -> Goal:
        try:
            measured: float | None = measure()
        except (_Missing, ValueError):
            measured = None
        return Goal(what=what, dtype=dtype, goal=at, measured=measured, **options)

    def against(case: str, peer: str) -> float:
        return run.row(case, dtype, "forward", peer)["ratio"]

    def against_fastest(case: str) -> float:
        return run.fastest(case, dtype, "both")["ratio"]

    cases = ("pretrain", "px480")
    for case in cases:
        ready = functools.partial(against, case, "SDPA, bias ready")
        yield goal(f"{case}: forward against SDPA, bias ready", 5.0 if half else 3.0, ready)
    for case in cases:
        what = f"{case}: forward and backward against the fastest that gives the table's gradient"
        yield goal(what, 3.5, functools.partial(against_fastest, case))
    peak, what = ("matmul_gflops", "a plain product") if half else ("fma_gflops", "the peak of multiply-adds")
    yield goal(
        f"pretrain: forward, visible FLOPs as a share of {what}",
        65.0,
        lambda: (
            100 * run.row("pretrain", dtype, "forward")["gflops"] / run.yardstick("pretrain", dtype, "forward", peak)
        ),
        unit="%",
    )
    yield goal(
        "pretrain: forward with the table against without",
        1.10 if half else 1.05,
        lambda: 1 / against("pretrain", "simvlm cpp, no table"),
        at_most=True,
    )
    yield goal(
        "huge (H = 80) against pretrain (H = 64): forward GFLOP/s",
        0.95,
        lambda: run.row("huge", dtype, "forward")["gflops"] / run.row("pretrain", dtype, "forward")["gflops"],
    )

    def captions(direction: str, peer: str) -> float:
        cases = ("captions", "captions_cross")
        theirs = sum(run.row(case, dtype, direction, peer)["median_ms"] for case in cases)
        return theirs / sum(run.row(case, dtype, direction)["median_ms"] for case in cases)

    yield goal(
        "captions and captions_cross: forward against padding to the longest through SDPA",
        2.5,
        lambda: captions("forward", "SDPA, bias ready"),
    )
    yield goal(
        "captions and captions_cross: forward and backward against the same",
        2.5,
        lambda: captions("both", "SDPA, bias ready"),
    )
    yield goal(
        "decode: bytes read and written as a share of a copy's",
        80.0,
        lambda: 100 * run.row("decode", dtype, "forward")["gbytes_per_s"]
        / run.yardstick("decode", dtype, "forward", "copy_gbytes_per_s"),
        unit="%",
    )  # fmt: skip
    yield goal(
        "smallest: a call with next to no work",
        20.0,
        lambda: 1e3 * run.row("smallest", dtype, "forward")["median_ms"],
        at_most=True,
        unit="µs",
    )

    def scaling() -> float:
        gain = against("pretrain", "simvlm cpp, one thread")
        products = [
            run.yardstick("pretrain", dtype, "forward", f"matmul{which}_gflops") for which in ("", "_one_thread")
        ]
        return gain / (products[0] / products[1])

    yield goal("pretrain: what all threads gain over one, against the same of a plain product", 0.95, scaling)
