"""The plot of a result: for every case, each contestant's time divided by ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch

DIRECTIONS = {"forward": "forward", "both": "fwd + bwd", "step": "training step"}
PALETTE = (
    *("#0072b2", "#56b4e9", "#009e73", "#999999", "#e69f00", "#d55e00", "#cc79a7", "#7f3c8d", "#a5aa99", "#4b4b8f"),
    *("#8c564b", "#bcbd22", "#17becf", "#1b4332", "#f2a6a6"),
)
BAR_CM, GROUP_GAP = 0.46, 1.0
MARKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200)


def draw(report: dict[str, Any], op: str, path: Path) -> None:
    """One panel for each dtype (across) and direction (down), one group of bars for each case."""
    contests = [benchmark["extra_info"] for benchmark in report["benchmarks"]]
    dtypes = list(dict.fromkeys(contest["dtype"] for contest in contests))
    directions = list(dict.fromkeys(contest["direction"] for contest in contests))
    names = dict.fromkeys(row["name"] for contest in contests for row in _rivals(contest))
    colors = {name: PALETTE[index % len(PALETTE)] for index, name in enumerate(names)}

    def of(dtype: str, direction: str) -> list[dict[str, Any]]:
        return [contest for contest in contests if (contest["dtype"], contest["direction"]) == (dtype, direction)]

    heights = [max(_height(of(dtype, direction)) for dtype in dtypes) for direction in directions]
    figure, panels = plt.subplots(
        len(directions),
        len(dtypes),
        figsize=(6.6 * len(dtypes), sum(heights) * BAR_CM / 2.54 + 2.6),
        gridspec_kw={"height_ratios": heights},
        sharex=True,  # one scale, so that panels compare
        squeeze=False,
        layout="constrained",
    )
    for panel, direction in zip(panels, directions, strict=True):
        for axes, dtype in zip(panel, dtypes, strict=True):
            _panel(axes, of(dtype, direction), colors)
            axes.set_title(f"{dtype}, {DIRECTIONS[direction]}", fontsize=11)
    _scale(panels[0, 0], contests)
    machine = report["machine_info"]
    baselines = sorted({contest["baseline"] or "none" for contest in contests})
    figure.suptitle(
        f"{op}: time ÷ time of ours ({', '.join(baselines)}), {machine['device']}, {machine['threads']} threads\n"
        "medians of interleaved rounds, lines p20–p80, log scale\nright of 1× is slower than ours",
        fontsize=11,
    )
    handles = [Patch(facecolor=color, label=name) for name, color in colors.items()]
    handles.append(Patch(facecolor="white", edgecolor="black", hatch="////", label="hatched: computes less"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


def number(value: float) -> str:
    """Three digits, never an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def _rivals(contest: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows with a bar. The reference is not written to be fast, and its ratio would squeeze all others."""
    return [row for row in contest["rows"] if row["name"] != contest["baseline"] and row["kind"] != "reference"]


def _height(contests: list[dict[str, Any]]) -> float:
    return max(4.0, sum(len(_rivals(contest)) + GROUP_GAP for contest in contests))


def _panel(axes: Axes, contests: list[dict[str, Any]], colors: dict[str, str]) -> None:
    place = 0.0
    ticks, labels = [], []
    for contest in contests:
        base_ms = next((row["median_ms"] for row in contest["rows"] if row["name"] == contest["baseline"]), None)
        start = place
        for row in _rivals(contest):
            _bar(axes, place, row, base_ms, colors[row["name"]])
            place += 1
        ours = "no time" if base_ms is None else f"ours {number(base_ms)} ms"
        ticks.append((start + place - 1) / 2)
        labels.append(f"{contest['case']}\n{ours}")
        place += GROUP_GAP
        axes.axhline(place - (1 + GROUP_GAP) / 2, color="#dddddd", linewidth=0.8)
    axes.set_ylim(place - (1 + GROUP_GAP) / 2, -1)
    axes.set_yticks(ticks, labels, fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelbottom=True)
    axes.axvline(1.0, color="black", linewidth=1.2)
    axes.grid(axis="x", color="#eeeeee", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("time ÷ ours", fontsize=9)


def _scale(axes: Axes, contests: list[dict[str, Any]]) -> None:
    """The shared logarithmic axis: round marks, room for the numbers beside the bars."""
    ratios = [row["ratio"] for contest in contests for row in _rivals(contest) if row.get("ratio")]
    low, high = min([0.7, *ratios]) / 1.4, max([2.0, *ratios]) * 1.7
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    marks = [mark for mark in MARKS if low <= mark <= high]
    axes.set_xticks(marks, [f"{mark:g}×" for mark in marks])
    axes.minorticks_off()


def _bar(axes: Axes, place: float, row: dict[str, Any], base_ms: float | None, color: str) -> None:
    if row["reason"] or not base_ms:
        axes.text(1.03, place, f"{row['name']}: no result", va="center", fontsize=7, color="#777777", style="italic")
        return
    ratio = row["ratio"]
    hatch = "////" if row["kind"] == "bound" else None
    axes.barh(place, ratio - 1, left=1, height=0.82, color=color, hatch=hatch, edgecolor="white", linewidth=0.4)
    low, high = row["p20_ms"] / base_ms, row["p80_ms"] / base_ms
    axes.plot([low, high], [place, place], color="black", linewidth=0.8)
    text = f"{ratio:.2f}×" if ratio < 10 else f"{ratio:.0f}×"
    axes.annotate(
        text,
        (max(high, ratio, 1.0), place),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=7.5,
        fontweight="bold" if ratio < 1 and row["kind"] == "peer" else "normal",
    )
