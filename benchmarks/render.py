"""From a result's JSON: a table on the console, a Markdown page, a plot. Measures nothing.

`python -m benchmarks.render FILE.json` renders a result anew.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import plot
from benchmarks.goals import Goal, goals
from benchmarks.machine import YARDSTICK, device_of
from benchmarks.plot import DIRECTIONS, number
from simvlm.kernels.attention.spec import H200_BYTES_PER_S, H200_FLOPS_PER_S

Report = dict[str, Any]
Row = dict[str, Any]

NOTHING = "—"
BUDGET = "Before anything is timed it must meet its error budget on the case itself, outputs and gradients."

GPU_NOTES = [
    "* **floor ms**: no kernel on an H200 is faster: the op's products at "
    f"{H200_FLOPS_PER_S / 1e12:.0f} TFLOP/s or its bytes at {H200_BYTES_PER_S / 1e12:.1f} TB/s, whichever is more. "
    "**copy** is what a copy of 1 GiB reached just before and just after. Times are of events around a call, launches "
    "included, the L2 cache cold."
]
STEP_NOTES = [
    f"* **MFU**: the step's FLOPs, however it computes them, over its time and an H200's {H200_FLOPS_PER_S / 1e12:.0f} "
    "TFLOP/s."
]


def write(report: Report, folder: Path, op: str, console: Console | None = None) -> None:
    """Writes <folder>/<op>.json, .md and .png, and prints the tables."""
    write_pages(report, folder, op)
    draw(report, folder, op)
    console = console or Console(width=None if sys.stdout.isatty() else 110)
    for table in console_tables(report, op):
        console.print(table)
    for refusal in refusals(report):
        console.print(f"no time: {refusal}", markup=False, highlight=False)
    console.print(f"written: {folder / op}.json, .md, .png", markup=False, highlight=False, soft_wrap=True)


def write_pages(report: Report, folder: Path, op: str) -> None:
    """Writes <folder>/<op>.json and .md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{op}.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    (folder / f"{op}.md").write_text(markdown(report, op))


def draw(report: Report, folder: Path, op: str) -> None:
    """Writes <folder>/<op>.png, which takes seconds."""
    plot.draw(report, op, folder / f"{op}.png")


def contests(report: Report) -> list[dict[str, Any]]:
    return [benchmark["extra_info"] for benchmark in report["benchmarks"]]


def contestants(report: Report) -> dict[str, Row]:
    """name → one of its rows, in the order in which the report first names them."""
    found: dict[str, Row] = {}
    for contest in contests(report):
        for row in contest["rows"]:
            found.setdefault(row["name"], row)
    return found


# Column: heading, and how a row fills it. Console and Markdown share them.
COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("median ms", lambda row: number(row["median_ms"])),
    ("p20–p80", lambda row: f"{number(row['p20_ms'])}–{number(row['p80_ms'])}"),
    ("× ours", lambda row: ratio(row["ratio"])),
    ("per round", lambda row: ratio(row["ratio_per_round"])),
    ("GFLOP/s", lambda row: rate(row["gflops"])),
    ("GB/s", lambda row: rate(row["gbytes_per_s"])),
    ("extra MiB", lambda row: NOTHING if row["peak_extra_mib"] is None else f"{row['peak_extra_mib']:.1f}"),
    ("first call s", lambda row: f"{row['first_call_s']:.2g}"),
    ("error", lambda row: NOTHING if row["error"] is None else f"{row['error']:.1e}"),
)
# Of training steps alone.
STEP_COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("samples/s", lambda row: number(row["samples_per_s"])),
    ("MFU %", lambda row: number(1e11 * row["gflops"] / H200_FLOPS_PER_S)),
)
CONSOLE = ("samples/s", "median ms", "p20–p80", "× ours", "GFLOP/s", "GB/s", "extra MiB")


def columns(report: Report) -> tuple[tuple[str, Callable[[Row], str]], ...]:
    rows = contestants(report).values()
    if not any("samples_per_s" in row for row in rows):
        return COLUMNS
    return (*COLUMNS, *STEP_COLUMNS) if any(row.get("gflops") for row in rows) else (*COLUMNS, *STEP_COLUMNS[:1])


def device(report: Report) -> str:
    return device_of(report["machine_info"]["slug"])


def rate(value: float | None) -> str:
    """Nothing for work that nobody counted, or that there is none of."""
    return number(value) if value else NOTHING


def ratio(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}"


def console_tables(report: Report, op: str) -> Iterable[Table]:
    """The rows of every contest, then ours against the strongest peer of each, in 80 columns where names allow."""
    detail = Table(title=f"{op} on {report['machine_info']['device']}", title_justify="left", box=box.SIMPLE_HEAD)
    detail.add_column("contestant (* computes less)", no_wrap=True)
    shown = [(heading, fill) for heading, fill in columns(report) if heading in CONSOLE]
    for heading, _ in shown:
        detail.add_column(heading, justify="right", no_wrap=True)
    for contest in contests(report):
        detail.add_section()
        detail.add_row(f"[bold]{title(contest)}[/bold]")
        for row in contest["rows"]:
            style = {"ours": "bold cyan", "bound": "dim", "reference": "dim"}.get(row["kind"])
            if row["reason"]:
                detail.add_row(row["name"], NOTHING, style=style)
            else:
                star = "*" if row["kind"] == "bound" else ""
                detail.add_row(row["name"] + star, *(fill(row) for _, fill in shown), style=style)
    yield detail
    summary = Table(title=f"{op}: ours and the strongest peer", title_justify="left", box=box.SIMPLE_HEAD)
    floor = ("floor ms",) if device(report) == "cuda" else ()
    for heading in ("case", "ours ms", "GFLOP/s", "matmul", *floor, "strongest peer", "its time ÷ ours"):
        summary.add_column(heading, justify="left" if heading in ("case", "strongest peer") else "right", no_wrap=True)
    for contest in contests(report):
        peers = [row for row in contest["rows"] if row["kind"] == "peer" and row.get("ratio")]
        best = min(peers, key=lambda row: row["ratio"], default=None)
        style = None if best is None else "green" if best["ratio"] >= 1 else "red"
        summary.add_row(
            title(contest),
            *summary_cells(contest, report)[3 : 6 + len(floor)],
            *((best["name"], ratio(best["ratio"])) if best else (NOTHING, NOTHING)),
            style=style,
        )
    yield summary
    held = goals(contests(report), op, device(report))
    if held:
        table = Table(title=f"{op}: goals", title_justify="left", box=box.SIMPLE_HEAD)
        for heading in GOAL_HEADINGS:
            table.add_column(heading, justify="right" if heading in ("goal", "measured") else "left")
        for goal in held:
            table.add_row(*goal_cells(goal), style={True: "green", False: "red"}.get(goal.met))  # type: ignore[arg-type]
        yield table


GOAL_HEADINGS = ("what", "dtype", "goal", "measured", "met")


def goal_cells(goal: Goal) -> list[str]:
    bound = "≤" if goal.at_most else "≥"
    measured = NOTHING if goal.measured is None else f"{number(goal.measured)} {goal.unit}"
    met = {True: "yes", False: "no", None: NOTHING}[goal.met]
    return [goal.what, goal.dtype, f"{bound} {goal.goal:g} {goal.unit}", measured, met]


def title(contest: dict[str, Any]) -> str:
    return f"{contest['case']}, {contest['dtype']}, {DIRECTIONS[contest['direction']]}"


def refusals(report: Report) -> Iterable[str]:
    """Why rows have no time, each reason once, with where it applies (the Markdown page has all of them)."""
    where: dict[tuple[str, str], list[str]] = {}
    for contest in contests(report):
        for row in contest["rows"]:
            if row["reason"]:
                where.setdefault((row["name"], row["reason"]), []).append(title(contest))
    for (name, reason), found in where.items():
        places = "; ".join(found) if len(found) < 4 else f"{len(found)} of {len(contests(report))} contests"
        yield f"{name}, {places}: {reason}"


def cells(row: Row, columns: Sequence[tuple[str, Callable[[Row], str]]]) -> list[str]:
    """Contestant, the columns, note."""
    notes = ["computes less" if row["kind"] == "bound" else "", row["reason"] or ""]
    filled = [NOTHING] * len(columns) if row["reason"] else [fill(row) for _, fill in columns]
    return [row["name"], *filled, "; ".join(note for note in notes if note)]


def summary_headings(report: Report) -> list[str]:
    rivals = [name for name, row in contestants(report).items() if row["kind"] != "ours"]
    return [*_facts(report), *rivals]


def _facts(report: Report) -> list[str]:
    on_gpu = ["floor ms", "copy GB/s"] if device(report) == "cuda" else []
    return ["case", "dtype", "direction", "ours ms", "ours GFLOP/s", "matmul GFLOP/s", *on_gpu]


def summary_cells(contest: dict[str, Any], report: Report) -> list[str]:
    rows = {row["name"]: row for row in contest["rows"]}
    base = rows.get(contest["baseline"] or "")
    rivals = [rows.get(name) for name in summary_headings(report)[len(_facts(report)) :]]
    on_gpu = []
    if device(report) == "cuda":
        least_ms = contest["least_ms"]
        on_gpu = [NOTHING if least_ms is None else number(least_ms), _span(contest["yardsticks"]["copy_gbytes_per_s"])]
    return [
        contest["case"],
        contest["dtype"],
        DIRECTIONS[contest["direction"]],
        number(base["median_ms"]) if base else "red",
        rate(base["gflops"]) if base else NOTHING,
        _span(contest["yardsticks"]["matmul_gflops"]),
        *on_gpu,
        *(_summary_ratio(row) for row in rivals),
    ]


def _span(values: Sequence[float]) -> str:
    return "–".join(f"{value:.0f}" for value in sorted(values))


def _summary_ratio(row: Row | None) -> str:
    """Bold where we lose to somebody who does the same work."""
    if row is None:
        return ""
    if row["reason"] or row["ratio"] is None:
        return NOTHING
    if row["kind"] == "bound":
        return f"{row['ratio']:.2f}*"
    return f"**{row['ratio']:.2f}**" if row["ratio"] < 1 and row["kind"] == "peer" else f"{row['ratio']:.2f}"


def markdown(report: Report, op: str) -> str:
    """The page beside the JSON."""
    first = contests(report)[0]
    machine, commit = report["machine_info"], report["commit_info"]
    dirty = " with uncommitted changes" if commit["dirty"] else ""
    baselines = sorted({contest["baseline"] or "none" for contest in contests(report)})
    lines = [
        f"# `{op}` on {machine['device']}",
        "",
        f"Written by `{report['command']}`; change nothing by hand.",
        *([] if not report["quick"] else ["", "**Made with `--quick`: few rounds, a look and not a result.**"]),
        *([] if baselines != ["simvlm reference"] else ["", "**No kernel of ours runs here: ours is the reference.**"]),
        "",
        f"![time of each contestant divided by ours]({op}.png)",
        "",
        "## How to read this",
        "",
        f"* Ours is {' or '.join(f'`{name}`' for name in baselines)}, called through the public function. "
        f"{first.get('checked') or BUDGET}",
        "* **× ours** is a contestant's median time divided by ours: above 1 it is slower than ours, **bold** below 1. "
        "**per round** is the median of the ratios within each round. The contestants of a case run interleaved, once "
        "a round each, in an order that changes every round.",
        "* The machine is shared and noisy: ratios mean something, absolute times little. **matmul** is what a plain "
        f"{YARDSTICK[device(report)]}³ matrix product reached just before and just after the contest.",
        "* Rows marked * (computes less) leave mask or bias out: a bound for what could be reached, no rival.",
        f"* **GFLOP/s**: {_formula(first['flops_formula'])} The same count for every contestant, whatever it does.",
        *(
            [f"* **GB/s**: {_formula(first['bytes_formula'])} The same count for every contestant."]
            if first["bytes_formula"]
            else []
        ),
        *(GPU_NOTES if device(report) == "cuda" else []),
        *(STEP_NOTES if STEP_COLUMNS[1] in columns(report) else []),
        "* **extra MiB**: resident memory of the process at its peak during one warm call, less what was resident "
        "before, results included (GPU: torch's allocator). **first call** includes compilation.",
        "* **error**: rms of the output's error against the reference in float64, divided by the output's rms.",
        "",
        "## Ratios at a glance",
        "",
        *markdown_table(
            summary_headings(report), [summary_cells(contest, report) for contest in contests(report)], left=3
        ),
        "",
        *_goal_lines(report, op),
        "## Contestants",
        "",
        *(f"* **{name}**: {row['what']}." for name, row in contestants(report).items() if row.get("what")),
    ]
    for case, shape in {contest["case"]: contest["shape"] for contest in contests(report)}.items():
        lines += ["", f"## {case}", "", f"{shape}."]
        for contest in contests(report):
            if contest["case"] != case:
                continue
            rounds = max((row["rounds"] for row in contest["rows"] if not row["reason"]), default=0)
            lines += ["", f"### {title(contest)} ({rounds} rounds)", ""]
            headings = ["contestant", *(heading for heading, _ in columns(report)), "note"]
            lines += markdown_table(headings, [cells(row, columns(report)) for row in contest["rows"]], left=1)
    implementations = machine["implementations"].get(op, {})
    lines += [
        "",
        "## Where and when",
        "",
        f"* {machine['device']}; processor {machine['cpu']['model']}, {machine['cpu']['cores']} cores, "
        f"{machine['cpu']['capability']}; {machine['threads']} threads; {machine['system']}",
        f"* {', '.join(f'{name} {version}' for name, version in machine['versions'].items())}",
        f"* commit {commit['id']}{dirty}, {report['datetime'][:16].replace('T', ' ')} UTC",
        *(f"* {name}: {state}" for name, state in implementations.items()),
    ]
    return "\n".join(lines) + "\n"


def _goal_lines(report: Report, op: str) -> list[str]:
    held = goals(contests(report), op, device(report))
    if not held:
        return []
    return ["## Goals", "", *markdown_table(list(GOAL_HEADINGS), [goal_cells(goal) for goal in held], left=2), ""]


def _formula(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:]


def markdown_table(headings: list[str], rows: Iterable[list[str]], left: int) -> list[str]:
    """Markdown, the first `left` columns and the notes aligned left."""
    rule = ["---" if index < left or heading == "note" else "---:" for index, heading in enumerate(headings)]
    # A bar inside a cell (an error message) would end it.
    return [f"| {' | '.join(cell.replace('|', '∣') for cell in row)} |" for row in (headings, rule, *rows)]


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        path = Path(argument)
        write(json.loads(path.read_text()), path.parent, path.stem)
