"""The summary of a run of `python -m benchmarks.gpu`: DIR/README.md, and its short form for the console."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.goals import Goal, goals, stage_goals
from benchmarks.gpu_run import Run
from benchmarks.plot import number
from benchmarks.render import GOAL_HEADINGS, contests, goal_cells, markdown_table

OPS = ("prefix_attention", "base_step", "batch_norm_act")
"""Those with goals on a GPU."""


def all_goals(run: Run) -> list[Goal]:
    """Of the contests, then of the other stages; a dry run's have no case in common with them."""
    found = []
    for op in OPS:
        found += goals(contests({"benchmarks": run.contests.get(op, [])}), op, "cuda")
    return [*found, *stage_goals(run.report)]


def verdict(stage: dict[str, Any]) -> str:
    return f"failed: {stage['failed']}" if stage["failed"] else stage["left_out"] or "done"


def page(run: Run) -> str:
    """DIR/README.md."""
    head = run.report["head"]
    machine, commit = head["machine_info"], head["commit_info"]
    dirty = " with uncommitted changes" if commit["dirty"] else ""
    stages = [[stage["stage"], verdict(stage), f"{stage['seconds']:.0f}"] for stage in run.report["stages"]]
    pages = ", ".join(f"[{op}]({op}.md)" for op, found in run.contests.items() if found)
    held = all_goals(run)
    lines = [
        f"# simvlm on {machine['device']}",
        "",
        f"Written by `{head['command']}`; change nothing by hand.",
        *([] if not run.dry else ["", "**A dry run on the CPU: its times mean nothing.**"]),
        "",
        f"* {machine['device']}; processor {machine['cpu']['model']}, {machine['cpu']['cores']} cores; "
        f"{machine['system']}",
        f"* {', '.join(f'{name} {version}' for name, version in machine['versions'].items())}",
        f"* commit {commit['id']}{dirty}, {head['datetime'][:16].replace('T', ' ')} UTC",
        f"* all numbers: [gpu.json](gpu.json); contests: {pages or 'none yet'}",
        "",
        "## Stages",
        "",
        *markdown_table(["stage", "what became of it", "seconds"], stages, left=2),
        "",
        *findings(run.report),
        "",
        "## Goals",
        "",
        tally(held),
        "",
        *markdown_table(list(GOAL_HEADINGS), map(goal_cells, held), left=2),
    ]
    return "\n".join(lines) + "\n"


def findings(report: dict[str, Any]) -> Iterable[str]:
    """A line for each stage that is no contest."""
    if "parity" in report:
        parity = report["parity"]
        yield f"* parity: {parity['cases']} cases in {', '.join(parity['dtypes'])}, {len(parity['red'])} misses"
        if parity["not_judged"]:
            yield f"    * no time for {parity['not_judged']} cases"
        yield from (f"    * {line}" for line in parity["red"])
    if "repeats" in report:
        repeats = report["repeats"]
        yield f"* repeats: {repeats['repeats']} of {repeats['case']}, different in {len(repeats['different'])} dtypes"
    if "tests" in report:
        tests = report["tests"]
        yield f"* tests: {tests['passed']} passed, {len(tests['failed'])} failed, {tests['skipped']} skipped"
        yield from (f"    * {name}" for name in tests["failed"])
    if "cold_start" in report:
        cold = report["cold_start"]
        yield f"* cold start: {cold['case']}, {cold['dtype']}, first call {cold['first_call_s']:.1f} s"
    if "memory" in report:
        memory = report["memory"]
        peaks = ", ".join(
            f"{length}: {'unknown' if mib is None else number(mib)}" for length, mib in memory["peak_extra_mib"].items()
        )
        yield f"* memory, {memory['heads']} heads of {memory['head_dim']}, peak MiB of both directions by T: {peaks}"
    if "compile" in report:
        compiled = report["compile"]
        yield (
            f"* compile: what rivals of {compiled['contests']} contests build with torch.compile was built ahead, so "
            f"that their first calls find it on disk; {len(compiled['failed'])} failed"
        )
        yield from (f"    * {line}" for line in compiled["failed"])
    for op, found in report.get("contests", {}).items():
        for name in found["failed"]:
            yield f"* {op} failed: {name}"
        for name in found["skipped"]:
            yield f"* {op}, no time left: {name}"


def tally(held: list[Goal]) -> str:
    met = [goal.met for goal in held]
    return f"{met.count(True)} met, {met.count(False)} missed, {met.count(None)} not measured."


def short(run: Run) -> str:
    """Stages that are not done, what was found, goals that are missed."""
    held = all_goals(run)
    stages = run.report["stages"]
    lines = [f"{run.report['head']['machine_info']['device']}: {len(stages)} stages"]
    lines += [f"{stage['stage']}: {verdict(stage)}" for stage in stages if verdict(stage) != "done"]
    lines += findings(run.report)
    lines.append(f"goals: {tally(held)}")
    lines += [f"  missed: {', '.join(goal_cells(goal)[:4])}" for goal in held if goal.met is False]
    return "\n".join([*lines, f"written: {run.out / 'README.md'}"])
