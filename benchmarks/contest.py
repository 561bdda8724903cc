"""Interleaved timing: every contestant runs once a round, so that what disturbs the machine disturbs all of them.

On a shared machine an absolute time means little and a ratio of times taken minutes apart not much more. Here round r
runs every contestant once, one after the other, in row r of a balanced square: over n rounds each contestant takes each
place once, and follows each other contestant equally often, because what ran before decides what the caches hold.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

Timer = Callable[[Callable[[], Any]], float]
"""Runs a call to its end and returns the seconds it took."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contestant:
    """One way to do the work.

    Attributes:
        what: one line for the report.
        kind: "ours"; "variant" (ours under other conditions); "peer" (computes the same); "bound" (computes less, so no
            rival); "reference" (the meaning of the op, written to be read).
        call: does the work once.
        error: the error of what `call` returned against truth; None where there is none to speak of.
    """

    name: str
    what: str
    kind: str
    call: Callable[[], Any]
    error: Callable[[Any], float] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """Statistics of one contestant; ratios say how many times the baseline's time it took (above 1: slower)."""

    rounds: int
    first_call_s: float
    median_ms: float
    p20_ms: float
    p80_ms: float
    ratio: float
    ratio_per_round: float


class Stopwatch:
    """A clock that runs only while the baseline does.

    Given to pytest-benchmark as its timer, it turns the duration of a whole round into the baseline's own, so that
    pytest-benchmark's statistics and comparisons of saved runs speak of the baseline.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    def read(self) -> float:
        return self.seconds


def wall_clock(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - start
    del result  # kept until here: freeing the outputs is the caller's cost, equal for all
    return seconds


class Contest:
    """Times contestants against `baseline`, the name of one of them.

    Args:
        contestants: who takes part.
        baseline: whose time the ratios divide by.
        timer: how one call is timed.
        stopwatch: advanced by the baseline's timed calls.

    Attributes:
        failures: name → reason, of contestants that raised in their first call and left the contest.
    """

    def __init__(
        self,
        contestants: Sequence[Contestant],
        baseline: str,
        *,
        timer: Timer = wall_clock,
        stopwatch: Stopwatch | None = None,
    ) -> None:
        if baseline not in [contestant.name for contestant in contestants]:
            raise ValueError(f"Contest: baseline must be one of the contestants, got {baseline!r}")
        self.contestants = list(contestants)
        self.baseline = baseline
        self.failures: dict[str, Exception] = {}
        self._timer = timer
        self._stopwatch = stopwatch or Stopwatch()
        self._first_call_s: dict[str, float] = {}
        self._seconds: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}

    def warm_up(self, calls: int = 2) -> float:
        """Calls everybody `calls` times; returns the seconds of one warm round.

        Raises:
            Exception: the baseline's own, if it fails.
        """
        warm_s = 0.0
        for contestant in list(self.contestants):
            try:
                self._first_call_s[contestant.name] = self._timer(contestant.call)
            except Exception as error:  # a peer may fail in any way its compiler likes; the row says which
                if contestant.name == self.baseline:
                    raise
                self.failures[contestant.name] = error
                self.contestants.remove(contestant)
                continue
            warm = [self._timer(contestant.call) for _ in range(calls - 1)]
            warm_s += warm[-1] if warm else self._first_call_s[contestant.name]
        return warm_s

    def round(self) -> None:
        """Runs every contestant once, in this round's order."""
        done = len(self._seconds[self.baseline])
        for place in order(len(self.contestants), done):
            contestant = self.contestants[place]
            seconds = self._timer(contestant.call)
            self._seconds[contestant.name].append(seconds)
            if contestant.name == self.baseline:
                self._stopwatch.seconds += seconds

    def timings(self) -> dict[str, Timing]:
        """Statistics of everybody who ran, by name."""
        base = self._seconds[self.baseline]
        return {
            contestant.name: summarize(self._seconds[contestant.name], base, self._first_call_s[contestant.name])
            for contestant in self.contestants
        }


def order(n: int, round_number: int) -> list[int]:
    """Who runs in this round, first to last: a row of a Williams square (mirrored every second time for odd n)."""
    zigzag = [(i + 1) // 2 if i % 2 else (n - i // 2) % n for i in range(n)]
    row = [(place + round_number) % n for place in zigzag]
    return row[::-1] if n % 2 and (round_number // n) % 2 else row


def rounds_within(budget_s: float, round_s: float, at_least: int, at_most: int) -> int:
    """How many rounds fit the budget, within the two bounds."""
    fit = int(budget_s / round_s) if round_s > 0 else at_most
    return max(at_least, min(fit, at_most))


def summarize(seconds: Sequence[float], base: Sequence[float], first_call_s: float) -> Timing:
    """Statistics of one contestant's rounds beside the baseline's same rounds."""
    median = statistics.median(seconds)
    return Timing(
        rounds=len(seconds),
        first_call_s=first_call_s,
        median_ms=1e3 * median,
        p20_ms=1e3 * quantile(seconds, 0.2),
        p80_ms=1e3 * quantile(seconds, 0.8),
        ratio=median / statistics.median(base),
        ratio_per_round=statistics.median(own / ours for own, ours in zip(seconds, base, strict=True)),
    )


def quantile(values: Sequence[float], fraction: float) -> float:
    """Linear interpolation between the two nearest of the sorted values, as numpy's default."""
    ordered = sorted(values)
    place = fraction * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
