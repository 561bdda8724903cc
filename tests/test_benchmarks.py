"""The benchmark suite itself: its statistics on a scripted clock, its contestants on tiny cases, its three files."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import (
    bench_attention,
    bench_batch_norm,
    bench_data,
    bench_demo_step,
    bench_embed,
    bench_jax_attention,
    bench_stem_step,
    machine,
    record,
    stem_contest,
)
from benchmarks.attention_cases import BENCHMARKS, named
from benchmarks.attention_peers import PEERS, Peer
from benchmarks.attention_problem import Problem
from benchmarks.contest import Contest, Contestant, Stopwatch, order, quantile, rounds_within
from benchmarks.goals import goals
from simvlm.kernels.attention.spec import Case
from simvlm.model.config import VARIANTS

ROOT = Path(__file__).parent.parent

TINY = (
    Case(
        name="padded_table",
        q_lens=(22, 17, 14),
        prefix_lens=(15, 3, 14),
        image_grid=(3, 4),
        has_image=(True, False, True),
        padded=(22, 22),
        head_dim=16,
    ),
    Case(name="packed_table", q_lens=(20, 30), prefix_lens=(14, 13), image_grid=(3, 4), head_dim=16),
    Case(name="packed_causal", q_lens=(5, 1, 9), prefix_lens=0, head_dim=16),
    Case(name="packed_cross", q_lens=(5, 1, 9), k_lens=(7, 7, 7), cross=True, head_dim=16),
    Case(name="decode", q_lens=(1, 1), k_lens=(9, 9), q_offsets=8, prefix_lens=0, padded=(1, 9), head_dim=16),
)


@pytest.mark.parametrize("n", range(1, 9))
def test_order_balances_places_and_neighbours(n: int) -> None:
    rounds = [order(n, number) for number in range(2 * n)]
    places = Counter(pair for row in rounds for pair in enumerate(row))
    neighbours = Counter(pair for row in rounds for pair in itertools.pairwise(row))
    assert set(places.values()) == {2}
    assert len(places) == n * n
    assert set(neighbours.values()) <= {2}
    assert len(neighbours) == n * (n - 1)


def scripted(seconds: dict[str, list[float]], log: list[str]) -> tuple[list[Contestant], Any]:
    """Contestants whose calls take the written seconds, one after the other."""
    left = {name: iter(values) for name, values in seconds.items()}

    def call(name: str) -> str:
        log.append(name)
        return name

    contestants = [Contestant(name=name, what="", kind="peer", call=lambda name=name: call(name)) for name in seconds]
    return contestants, lambda call: next(left[call()])


def test_statistics_of_interleaved_rounds() -> None:
    log: list[str] = []
    seconds = {"ours": [9.0, 0.5, 1.0, 2.0, 4.0], "peer": [5.0, 0.5, 2.0, 8.0, 4.0], "other": [1.0, 1.0, 3.0, 3.0, 3.0]}
    contestants, timer = scripted(seconds, log)
    watch = Stopwatch()
    contest = Contest(contestants, "ours", timer=timer, stopwatch=watch)
    assert contest.warm_up() == 0.5 + 0.5 + 1.0
    assert watch.read() == 0.0
    log.clear()
    for _ in range(3):
        contest.round()
    names = list(seconds)
    assert log == [names[place] for number in range(3) for place in order(3, number)]
    assert watch.read() == 1.0 + 2.0 + 4.0
    timings = contest.timings()
    ours, peer = timings["ours"], timings["peer"]
    assert (ours.rounds, ours.first_call_s, ours.median_ms, ours.ratio, ours.ratio_per_round) == (3, 9.0, 2000, 1, 1)
    assert (peer.median_ms, peer.ratio, peer.ratio_per_round) == (4000, 2.0, 2.0)
    assert timings["other"].ratio == 1.5
    assert timings["other"].ratio_per_round == 1.5  # of 3, 1.5 and 0.75
    assert ours.p20_ms == pytest.approx(1e3 * np.quantile([1.0, 2.0, 4.0], 0.2))
    assert ours.p80_ms == pytest.approx(1e3 * np.quantile([1.0, 2.0, 4.0], 0.8))


def test_quantile_of_one_value_and_bounds_on_rounds() -> None:
    assert quantile([3.0], 0.8) == 3.0
    assert rounds_within(4.0, 0.1, 8, 100) == 40
    assert rounds_within(4.0, 9.0, 8, 100) == 8
    assert rounds_within(4.0, 0.0, 8, 100) == 100


def broken(name: str = "broken") -> Contestant:
    def fail() -> None:
        raise RuntimeError("\nno kernel in /home/someone/cache/x.py\nmore")

    return Contestant(name=name, what="", kind="peer", call=fail)


def test_a_peer_that_fails_leaves_and_the_baseline_raises() -> None:
    contestants, timer = scripted({"ours": [1.0] * 5}, [])
    contest = Contest([*contestants, broken()], "ours", timer=timer)
    contest.warm_up()
    contest.round()
    assert list(contest.timings()) == ["ours"]
    assert record.one_line(contest.failures["broken"]) == "RuntimeError: no kernel in x.py"
    with pytest.raises(RuntimeError, match="no kernel"):
        Contest([broken()], "broken").warm_up()


class Benchmark:
    """As much of pytest-benchmark's fixture as a contest uses."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}

    def pedantic(self, target: Any, rounds: int, iterations: int) -> None:
        for _ in range(rounds):
            target()


def test_a_red_kernel_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_attention.parity, "violations", lambda *_: ["dq: largest error 1 > 0"])
    monkeypatch.setattr(machine, "yardsticks", lambda *_: {"matmul_gflops": 1.0})
    problem = Problem(TINY[2], "float32", "cpu")
    contestants, refused, red = bench_attention.ours(problem, "forward")
    assert "ours" not in [contestant.kind for contestant in contestants]
    kernels = [status for status in bench_attention.IMPLS if status.family == "torch" and not status.unavailable()]
    assert len(red) == len(refused) == len(kernels) - 1  # all but the reference
    assert all("misses the error budget (dq" in reason for _, _, reason in refused)
    if not red:
        return
    benchmark = Benchmark()
    subject = record.Subject(
        op="op", case="c", shape="", dtype="float32", direction="forward", flops=1, bytes_moved=1, flops_formula="",
        bytes_formula="",
    )  # fmt: skip
    settings = record.Settings.of("cpu", quick=True)
    record.record(benchmark, Stopwatch(), settings, subject, contestants, refused)
    assert benchmark.extra_info["baseline"] is None
    assert {row["name"]: row.get("ratio") for row in benchmark.extra_info["rows"]} == {
        contestant.name: None for contestant in contestants
    } | {name: None for name, _, _ in refused}


def computed(problem: Problem, direction: str, peer: Peer) -> dict[str, torch.Tensor]:
    """Output and gradients on the rows that belong to a sequence."""
    contestant = bench_attention.contestant(problem, direction, peer, "peer")
    got = contestant.call()
    assert contestant.error is not None
    assert contestant.error(got) < 1e-6
    axes = dict(zip(("out", "dq", "dk", "dv"), "qqkk", strict=True))
    named = dict(zip((*axes, "drel_bias"), got, strict=False))
    return {name: problem.real(x, axes[name], peer.packed) if name in axes else x for name, x in named.items()}


@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_every_contestant_computes_the_same(case: Case, direction: str) -> None:
    problem = Problem(case, "float32", "cpu")
    want = computed(problem, direction, bench_attention.public("reference"))
    assert len(want) == (1 if direction == "forward" else 4 + case.has_table)
    peers = [
        peer for peer in PEERS if not peer.compiled and peer.takes_part(problem, direction) and peer.exact(problem)
    ]
    kernels = [kernel.name for kernel in bench_attention.ours(problem, direction)[0]]
    assert len(peers) >= 2
    for peer in (*peers, *(bench_attention.public(name.removeprefix("simvlm ")) for name in kernels)):
        got = computed(problem, direction, peer)
        for name, x in want.items():
            torch.testing.assert_close(
                got[name], x, msg=lambda text, peer=peer, name=name: f"{peer.name} {name}: {text}"
            )


@pytest.mark.parametrize("direction", ["forward", "both"])
def test_every_contestant_of_jax_computes_the_same(direction: str) -> None:
    case = next(case for case in TINY if case.padded is not None and case.has_table)
    problem = Problem(case, "float32", "cpu")
    want = bench_attention.contestant(problem, direction, bench_attention.public("reference"), "peer").call()
    found, refused, red = bench_jax_attention.contestants(problem, direction)
    assert [one.name for one in found if one.kind == "ours"] == ["simvlm cpp", "simvlm xla"]
    assert len(found) == (5 if direction == "forward" else 4)
    assert not refused + red
    axes = dict(zip(("out", "dq", "dk", "dv", "drel_bias"), "qqkk ", strict=True))
    for one in found:
        got = one.call()
        assert one.error is not None
        assert one.error(got) < 1e-6
        for (name, axis), x, y in zip(axes.items(), got, want, strict=False):
            pair = [torch.from_numpy(np.array(z.detach() if isinstance(z, torch.Tensor) else z)) for z in (x, y)]
            if axis != " ":
                pair = [problem.real(z, axis, packed=True) for z in pair]
            torch.testing.assert_close(*pair, msg=lambda text, one=one, name=name: f"{one.name} {name}: {text}")


@pytest.mark.parametrize("name", ["captions", "captions_cross"])
def test_captions_padded_to_256_are_the_same(name: str) -> None:
    problem = Problem(named(name), "float32", "cpu")
    computed(problem, "forward", next(peer for peer in PEERS if peer.name == "SDPA, padded to 256"))


def test_variants_of_ours() -> None:
    problem = Problem(next(case for case in TINY if case.has_table), "float32", "cpu")
    ours = bench_attention.ours(problem, "forward")[0]
    found = {variant.name: variant for variant in bench_attention.variants(problem, "forward", ours)}
    (without,) = (variant for name, variant in found.items() if name.endswith("no table"))
    assert without.kind == "bound"
    assert not torch.allclose(without.call()[0], ours[0].call()[0])
    before = torch.get_num_threads()
    for name, variant in found.items():
        if name.endswith("one thread"):
            assert torch.equal(variant.call()[0], ours[0].call()[0])
    assert torch.get_num_threads() == before


def test_goals_are_measured_met_missed_or_missing() -> None:
    def contest(case: str, rows: dict[str, tuple[str, float, float]], **yardsticks: float) -> dict[str, Any]:
        yard = {"copy_gbytes_per_s": 20.0, "fma_gflops": 200.0} | yardsticks
        return {
            "case": case,
            "dtype": "float32",
            "direction": "forward",
            "baseline": next(iter(rows)),
            "yardsticks": {name: [value, value] for name, value in yard.items()},
            "rows": [
                {"name": name, "kind": kind, "reason": None, "ratio": ratio, "gflops": gflops, "gbytes_per_s": 17.0}
                for name, (kind, ratio, gflops) in rows.items()
            ],
        }

    pretrain = contest("pretrain", {"ours": ("ours", 1, 150), "SDPA, bias ready": ("peer", 2.0, 75)})
    held = goals([pretrain, contest("decode", {"ours": ("ours", 1, 1)})], "prefix_attention", "cpu")
    found = {goal.what: goal for goal in held if goal.dtype == "float32"}
    missed = found["pretrain: forward against SDPA, bias ready"]
    assert (missed.measured, missed.met) == (2.0, False)
    share = found["pretrain: forward, visible FLOPs as a share of the peak of multiply-adds"]
    assert (share.measured, share.met) == (75.0, True)
    decode = found["decode: bytes read and written as a share of a copy's"]
    assert (decode.measured, decode.met) == (85.0, True)
    assert found["px480: forward against SDPA, bias ready"].met is None
    through_jax = contest("pretrain", {"simvlm cpp": ("ours", 1, 1), "simvlm cpp, torch": ("variant", 0.8, 1)})
    over_torch, *missing = goals([through_jax], "jax_attention", "cpu")
    assert (over_torch.measured, over_torch.met) == (1.25, False)
    assert [goal.met for goal in missing] == [None] * 3
    assert goals([pretrain], "another_op", "cpu") == goals([pretrain], "another_op", "cuda") == []


STEM = [
    *((bench_batch_norm.OP, name) for name in ("plain", "residual", "branch_residual", "frozen", "channels_17")),
    *((bench_embed.OP, name) for name in ("mixed", "mixed_padded", "mixed_identity", "image_only", "text_only")),
]


def computed_stem(problem: stem_contest.Problem, direction: str, peer: stem_contest.Peer) -> tuple[torch.Tensor, ...]:
    """Output and gradients."""
    contestant = stem_contest.contestant(problem, direction, peer, "peer")
    got = contestant.call()
    assert contestant.error is not None
    assert contestant.error(got) < 1e-6
    assert len(got) == (1 + len(problem.leaves) if direction == "both" else 1)
    return got


@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize(("op", "name"), STEM, ids=lambda x: x if isinstance(x, str) else x.name)
def test_every_contestant_of_the_stem_computes_the_same(op: stem_contest.Op, name: str, direction: str) -> None:
    problem = stem_contest.Problem(op.spec, op.named(name), "float32", "cpu")
    want = computed_stem(problem, direction, op.public("reference"))
    kernels = [kernel.name.removeprefix("simvlm ") for kernel in op.ours(problem, direction)[0]]
    peers = [peer for peer in op.peers if not peer.compiled]
    assert "reference" in kernels
    assert peers
    for peer in (*peers, *map(op.public, kernels)):
        got = computed_stem(problem, direction, peer)
        torch.testing.assert_close(got, want, msg=lambda text, peer=peer: f"{peer.name}: {text}")


@pytest.mark.full
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("op", "name"), STEM, ids=lambda x: x if isinstance(x, str) else x.name)
def test_compiled_contestants_of_the_stem_compute_the_same(op: stem_contest.Op, name: str) -> None:
    torch.compiler.reset()
    problem = stem_contest.Problem(op.spec, op.named(name), "float32", "cpu")
    want = computed_stem(problem, "both", op.public("reference"))
    for peer in op.peers:
        if peer.compiled:
            torch.testing.assert_close(computed_stem(problem, "both", peer), want)


def test_a_red_kernel_of_the_stem_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stem_contest.parity, "violations", lambda *_: ["dx: largest error 1 > 0"])
    op = bench_batch_norm.OP
    contestants, refused, red = op.ours(stem_contest.Problem(op.spec, op.named("plain"), "float32", "cpu"), "forward")
    assert [contestant.name for contestant in contestants] == ["simvlm reference"]
    assert len(red) == len(refused)
    assert all("misses the error budget (dx" in reason for _, _, reason in refused)


def test_contestants_of_a_stem_step_compute_the_same() -> None:
    problem = bench_stem_step.Problem(VARIANTS["demo"], 3, "float32", "cpu")
    contestants = {contestant.name: contestant for contestant in problem.contestants()}
    assert {"simvlm reference", "torch"} <= set(contestants)
    results = {name: contestant.call() for name, contestant in contestants.items()}
    want = results["simvlm reference"]
    for name, got in results.items():
        assert problem.error(got[0]) < 1e-5
        for x, y in zip(got, want, strict=True):
            # Errors of a whole step: beside each gradient's own size, not element by element.
            assert (x - y).norm() <= 1e-5 * y.norm() + 1e-5, name
    assert problem.flops() > 0


def test_contestants_of_a_demo_step_lose_the_same() -> None:
    problem = bench_demo_step.Problem("float32", "cpu")
    assert len(problem.mixed.batch.images) == 32
    steps = {contestant.name: contestant.call() for contestant in problem.contestants()}
    want = steps["simvlm reference"]
    for step in steps.values():
        np.testing.assert_allclose(step.nll, want.nll, rtol=1e-5)
        assert step.grad_norm == pytest.approx(want.grad_norm, rel=1e-4)


@pytest.mark.full
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("direction", "name"), [("forward", "FlexAttention"), ("both", "compiled eager")])
@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_compiled_contestants_compute_the_same(case: Case, direction: str, name: str) -> None:
    torch.compiler.reset()
    problem = Problem(case, "float32", "cpu")
    peer = next(peer for peer in PEERS if peer.name == name)
    want = computed(problem, direction, bench_attention.public("reference"))
    got = computed(problem, direction, peer)
    for array, x in want.items():
        torch.testing.assert_close(got[array], x, msg=lambda text, array=array: f"{array}: {text}")


def test_benchmark_cases_have_real_shapes() -> None:
    names = [case.name for case in BENCHMARKS]
    assert names == ["pretrain", "px480", "huge", "captions", "captions_cross", "decode", "smallest"]
    assert set(bench_attention.QUICK_CASES) <= set(names)
    described = {case.name: bench_attention.described(case) for case in BENCHMARKS}
    assert described["pretrain"] == (
        "4 sequences, padded to 452×452, 452 queries, 452 keys, 12 heads of 64, prefix 265–413, "
        "table over 14×14 patches"
    )
    assert described["captions"] == "64 sequences, packed, 5–32 queries, 5–32 keys, 12 heads of 64, causal"
    with pytest.raises(ValueError, match="case must be one of"):
        bench_attention.selection(["pretain"], [], quick=False)


def test_benchmark_cases_of_the_stem_have_the_models_shapes() -> None:
    base, demo = VARIANTS["base"], VARIANTS["demo"]
    shapes = {case.name: case for case in bench_batch_norm.OP.cases}
    assert shapes["base_stem_b8"].shape[1:] == (base.image_size // 2, base.image_size // 2, base.conv_stem_width)
    assert shapes["base_stage_3_b8"].shape[1:] == (*base.image_grid, base.patch_channels)
    assert shapes["demo_stem_b32"].shape[1:] == (demo.image_size // 2, demo.image_size // 2, demo.conv_stem_width)
    assert shapes["demo_stage_2_b32"].shape[1:] == (*demo.image_grid, demo.patch_channels)
    embeds = {case.name: case for case in bench_embed.OP.cases}
    for name, config in (("base_b8", base), ("large_b8", VARIANTS["large"]), ("demo_b36", demo)):
        channels = config.patch_channels if config.has_projection else None
        case = embeds[name]
        assert (case.image_grid, case.channels, case.width) == (config.image_grid, channels, config.width)
    for op in (bench_batch_norm.OP, bench_embed.OP):
        assert set(op.quick_cases) <= {case.name for case in op.cases}
    assert bench_batch_norm.described(shapes["base_stage_3_frozen_b8"]) == (
        "8 images of 14×14 pixels, 1024 channels, statistics given, residual, relu; 1.6 million elements"
    )
    assert bench_embed.described(embeds["base_b8"]) == (
        "8 sequences, packed, 8 images of 14×14 patches, 32–256 text rows, 1024 channels, width 768"
    )
    for module in (bench_batch_norm, bench_data, bench_embed, bench_jax_attention, bench_stem_step, bench_demo_step):
        assert module.selection([], [], quick=True)
        with pytest.raises(ValueError, match="case must be"):
            module.selection(["nonsense"], [], quick=False)


def test_peak_memory_sees_one_large_tensor() -> None:
    peak = machine.peak_extra_mib(lambda: torch.ones(64 * 2**20 // 4), "cpu")
    if peak is None:
        pytest.skip("the peak of resident memory cannot be read here")
    assert 60 < peak < 80


def test_slug_of_a_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    for model, want in (
        ("AMD EPYC 7763 64-Core Processor", "cpu-amd-epyc-7763-64core"),
        ("Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", "cpu-intel-xeon-platinum-8481c-64core"),
    ):
        monkeypatch.setattr(machine, "cpu_model", lambda model=model: model)
        assert machine.slug("cpu") == want


@pytest.mark.parametrize(
    ("op", "case", "directions", "said"),
    [
        ("prefix_attention", "scaled", ("forward", "both"), ("SDPA, bias built", "eager", "2·H each", "GB/s**")),
        ("batch_norm_act", "residual", ("forward", "both"), ("F.batch_norm", "error budget on the case", "GB/s**")),
        pytest.param(
            "embed_sequence",
            "mixed",
            ("forward", "both"),
            ("index_copy_", "products", "GB/s**"),
            marks=pytest.mark.full,
        ),
        ("stem_step", "demo_b32", ("step",), ("nn.BatchNorm2d", "the column error tells")),
        pytest.param(
            "data", "photographs", ("step",), ("webdataset", "Pillow alone", "resident memory"), marks=pytest.mark.full
        ),
        pytest.param("demo_step", "demo", ("step",), ("invisible pairs", "4 documents"), marks=pytest.mark.full),
    ],
)
def test_quick_run_writes_its_three_files(
    tmp_path: Path, op: str, case: str, directions: tuple[str, ...], said: tuple[str, ...]
) -> None:
    command = [sys.executable, "-m", "benchmarks", "--quick", "--op", op, "--cases", case]
    command += ["--dtypes", "float32", "--device", "cpu", "--out", str(tmp_path)]
    # A suite of its own, whichever suite it is started from: under pytest-xdist pytest-benchmark would not time.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = tmp_path.iterdir()
    assert {path.name for path in folder.iterdir()} == {f"{op}.{kind}" for kind in ("json", "md", "png")}
    report = json.loads((folder / f"{op}.json").read_text())
    assert [benchmark["param"] for benchmark in report["benchmarks"]] == [
        f"{case}-float32-{direction}" for direction in directions
    ]
    for benchmark in report["benchmarks"]:
        info = benchmark["extra_info"]
        ours = next(row for row in info["rows"] if row["name"] == info["baseline"])
        assert ours["ratio"] == 1.0
        assert benchmark["stats"]["median"] == pytest.approx(ours["median_ms"] / 1e3)  # the stopwatch, not the round
        assert all(row["reason"] or row["ratio"] > 0 for row in info["rows"])
    page = (folder / f"{op}.md").read_text()
    for words in ("--quick", "FLOP", "noisy", "torch 2", "commit", *said):
        assert words in page
    assert ("GB/s**" in page) == ("step" not in directions)
    assert str(ROOT) not in page + json.dumps(report)
    assert (folder / f"{op}.png").read_bytes().startswith(b"\x89PNG")
    assert "strongest peer" in done.stdout


def test_make_quick(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks import quick

    monkeypatch.setattr(quick, "_CASES", 1)
    monkeypatch.setattr(quick, "_ROUNDS", 1)
    monkeypatch.setattr(quick, "named", lambda name: named("scaled"))
    monkeypatch.setattr(quick, "_SHAPE", (2, 4, 4, 16))
    assert quick.main() == 0
    printed = capsys.readouterr().out
    for said in ("prefix_attention", "batch_norm_act", "embed_sequence", "1 of 1", "SDPA, bias built", "simvlm cpp"):
        assert said in printed
    # A kernel that misses its budget is told by the exit status too (and would get no time).
    monkeypatch.setattr(quick.parity, "violations", lambda *rest: ["one"])
    monkeypatch.setattr(quick, "_speeds", lambda contestants: "")
    assert quick.main() == 1
