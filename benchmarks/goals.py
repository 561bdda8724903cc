"""What a result is held against: the goals of an op on a CPU and on a GPU, each computed from the contests of one run.

A goal that is missed stays in the table.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterable
from typing import Any

from benchmarks import attention_cases, stem_cases
from simvlm.kernels.attention.spec import visible_pairs

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

    def baseline(self, case: str, dtype: str, direction: str) -> str:
        return self._contest(case, dtype, direction)["baseline"]

    def yardstick(self, case: str, dtype: str, direction: str, name: str) -> float:
        found = self._contest(case, dtype, direction)["yardsticks"].get(name)
        if not found:
            raise _Missing
        return statistics.mean(found)

    def fact(self, case: str, dtype: str, direction: str, name: str) -> float:
        """What a contest found beside its times."""
        found = self._contest(case, dtype, direction).get("facts", {})
        if name not in found:
            raise _Missing
        return found[name]

    def fastest(self, case: str, dtype: str, direction: str) -> dict[str, Any]:
        """The peer with the shortest time."""
        rows = self._contest(case, dtype, direction)["rows"]
        return min((row for row in rows if row["kind"] == "peer" and not row["reason"]), key=lambda row: row["ratio"])

    def _contest(self, case: str, dtype: str, direction: str) -> Contest:
        if (case, dtype, direction) not in self._contests:
            raise _Missing
        return self._contests[case, dtype, direction]


def goals(contests: Iterable[Contest], op: str, device: str) -> list[Goal]:
    """The goals of an op on a "cpu" or on "cuda"; none for one that has none."""
    run = _Run(contests)
    if device == "cuda":
        return list(_GPU[op](run)) if op in _GPU else []
    if op == "prefix_attention":
        return [goal for dtype in DTYPES for goal in _attention(run, dtype)]
    if op == "jax_attention":
        return [goal for dtype in DTYPES for goal in _jax_attention(run, dtype)]
    if op == "data":
        return list(_data(run))
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
    return _goal(f"{case}: against {peer}", dtype, at, lambda: run.row(case, dtype, direction, peer)["ratio"])


def _goal(what: str, dtype: str, at: float, measure: Callable[[], float], **options: Any) -> Goal:
    """What cannot be measured is None: a contest or a row is missing, or no peer has a time (min of nothing)."""
    try:
        measured: float | None = measure()
    except (_Missing, ValueError):
        measured = None
    return Goal(what=what, dtype=dtype, goal=at, measured=measured, **options)


def _attention(run: _Run, dtype: str) -> Iterable[Goal]:
    half = dtype == "bfloat16"

    def goal(what: str, at: float, measure: Callable[[], float], **options: Any) -> Goal:
        return _goal(what, dtype, at, measure, **options)

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


def _data(run: _Run) -> Iterable[Goal]:
    case, dtype, direction = "photographs", "float32", "step"

    def fact(name: str) -> float:
        return run.fact(case, dtype, direction, name)

    yield _ratio(run, dtype, case, direction, "Pillow alone", 0.9)
    million = "1,000,000 indexed pairs: a fresh process until it knows the first 4,096 keys"
    yield _goal(f"{million}, imports included", dtype, 5.0, lambda: fact("start_s"), at_most=True, unit="s")
    yield _goal(f"{million}, resident memory", dtype, 500.0, lambda: fact("start_mib"), at_most=True, unit="MiB")
    for pairs in (64, 512, 4096):
        what = f"rows that hold something, image tokens among them, in batches of {pairs:,} pairs, an eighth documents"
        yield _goal(what, dtype, 0.97, lambda pairs=pairs: fact(f"fill_{pairs}"), unit="")  # type: ignore[misc]
        what = f"the same of text alone, {pairs:,} pairs"
        yield _goal(what, dtype, 0.97, lambda pairs=pairs: fact(f"text_fill_{pairs}"), unit="")  # type: ignore[misc]


def _jax_attention(run: _Run, dtype: str) -> Iterable[Goal]:
    for direction, words in _WORDS.items():

        def over_torch(direction: str = direction) -> float:
            return 1 / run.row("pretrain", dtype, direction, "simvlm cpp, torch")["ratio"]

        what = f"pretrain: {words}, the time of the C++ kernels called by JAX over that of torch's call"
        yield _goal(what, dtype, 1.1, over_torch, at_most=True)


# ---- GPU: bfloat16, in which such models are trained -----------------------------------------------------------------

FLEX, FLEX_BARE, CUDNN_BARE = "FlexAttention", "FlexAttention, no table", "SDPA cuDNN, bare"
_HALF = "bfloat16"
_WORDS = {"forward": "forward", "both": "forward and backward"}


def _gpu_attention(run: _Run) -> Iterable[Goal]:
    def against(case: str, direction: str, peer: str, at: float) -> Goal:
        what = f"{case}: {_WORDS[direction]} against {peer}"
        return _goal(what, _HALF, at, lambda: run.row(case, _HALF, direction, peer)["ratio"])

    def ms(case: str, part: str, name: str | None) -> float:
        """Forward, or backward: both less forward."""
        if part == "forward":
            return run.row(case, _HALF, "forward", name)["median_ms"]
        return run.row(case, _HALF, "both", name)["median_ms"] - ms(case, "forward", name)

    def without_table(case: str) -> str:
        return f"{run.baseline(case, _HALF, 'forward')}, no table"

    def cost(case: str, part: str) -> float:
        return 100 * (ms(case, part, None) / ms(case, part, without_table(case)) - 1)

    def cudnn(part: str, name: str | None) -> float:
        return ms("gpu_pretrain", part, CUDNN_BARE) / ms("gpu_pretrain", part, name) * visible("gpu_pretrain")

    yield against("gpu_pretrain", "forward", FLEX, 1.3)
    yield against("gpu_pretrain", "both", FLEX, 2.0)
    for direction in _WORDS:
        yield against("gpu_pretrain", direction, FLEX_BARE, 1.0)
    for timed in attention_cases.GPU_BENCHMARKS[1:]:
        for direction in _WORDS if timed.gradients else ("forward",):
            yield against(timed.name, direction, FLEX, 1.0)
    per_flop = "FLOP/s against cuDNN's without mask and bias, of the pairs that each must compute"
    yield _goal(f"gpu_pretrain: forward, {per_flop}", _HALF, 0.9, lambda: cudnn("forward", None))
    yield _goal(
        f"gpu_pretrain: backward without table, {per_flop}",
        _HALF,
        0.6,
        lambda: cudnn("backward", without_table("gpu_pretrain")),
    )
    for case, part, at in (
        ("gpu_pretrain", "forward", 6),
        ("gpu_px480", "forward", 15),
        ("gpu_pretrain", "backward", 10),
        ("gpu_px480", "backward", 30),
    ):
        what = f"{case}: {part}, what the table costs"
        yield _goal(what, _HALF, at, functools.partial(cost, case, part), at_most=True, unit="%")

    def gflops(case: str, direction: str) -> float:
        return run.row(case, _HALF, direction)["gflops"]

    for direction, words in _WORDS.items():
        yield _goal(
            f"gpu_huge (H = 80) against gpu_pretrain (H = 64): {words}, FLOP/s",
            _HALF,
            1.0,
            lambda direction=direction: gflops("gpu_huge", direction) / gflops("gpu_pretrain", direction),  # type: ignore[misc]
        )


def visible(case: str) -> float:
    """The share of a padded case's pairs that its mask lets see each other."""
    found = attention_cases.named(case)
    assert found.padded is not None
    return visible_pairs(found.layout()) / (len(found.q_lens) * found.padded[0] * found.padded[1])


def _gpu_batch_norm(run: _Run) -> Iterable[Goal]:
    def share(case: str, direction: str) -> float:
        copied = run.yardstick(case, _HALF, direction, "copy_gbytes_per_s")
        return 100 * run.row(case, _HALF, direction)["gbytes_per_s"] / copied

    for case in stem_cases.BATCH_NORM_GPU:
        for direction, words in _WORDS.items():
            what = f"{case.name}: {words}, least traffic as a share of a copy's"
            yield _goal(what, _HALF, 85, functools.partial(share, case.name, direction), unit="%")


def _gpu_base_step(run: _Run) -> Iterable[Goal]:
    for peer, at in (("eager SDPA", 1.5), ("compiled FlexAttention", 1.2)):
        yield _ratio(run, _HALF, "base", "step", peer, at)


_GPU: dict[str, Callable[[_Run], Iterable[Goal]]] = {
    "prefix_attention": _gpu_attention,
    "batch_norm_act": _gpu_batch_norm,
    "base_step": _gpu_base_step,
}


def stage_goals(report: dict[str, Any]) -> list[Goal]:
    """Those of `python -m benchmarks.gpu` that no contest tells."""
    return [
        _goal(
            "first call, forward and backward, in a fresh process that has compiled nothing",
            report.get("cold_start", {}).get("dtype", _HALF),
            5.0,
            lambda: _present(report, "cold_start", "first_call_s"),
            at_most=True,
            unit="s",
        ),
        _goal(
            "peak memory of forward and backward: growth from the shortest to the longest, over the lengths' own",
            _HALF,
            MEMORY_GROWTH,
            lambda: _present(report, "memory", "growth"),
            at_most=True,
        ),
    ]


MEMORY_GROWTH = 1.3
"""Linear in T is 1; a term of T² would make it many times that. The rest is the allocator's rounding."""


def _present(report: dict[str, Any], stage: str, name: str) -> float:
    value = report.get(stage, {}).get(name)
    if value is None:
        raise _Missing
    return value
