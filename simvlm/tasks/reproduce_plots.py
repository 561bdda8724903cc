"""The pictures of `simvlm reproduce`'s page: the ablation, the losses of pretraining, the gallery."""

from __future__ import annotations

import base64
import io
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from simvlm.tasks import paper
from simvlm.tasks.reproduce_gallery import Card
from simvlm.tasks.reproduce_results import LABELS, Compared, Results
from simvlm.tasks.rows import FULL

ABLATION, LOSS, GALLERY = "ablation.png", "loss.png", "gallery.png"
_OURS, _OPEN, _PAPER = "#2452de", "#9a9aa2", "#c2410c"
_PALETTE = ("#2452de", "#c2410c", "#15803d", "#7c3aed", "#0e7490", "#be185d")
_DPI = 110


def ablation(compared: Sequence[Compared], path: Path) -> bool:
    """Every row's difference to the full model; False, and nothing drawn, where there is none."""
    rows = [entry for entry in compared if entry.row != FULL and entry.differences]
    if not rows:
        return False
    figure = Figure(figsize=(8.6, 1.4 + 0.42 * len(rows)), layout="constrained", dpi=_DPI)
    axes = figure.subplots()
    axes.axvline(0, color="black", linewidth=1)
    full = paper.ABLATION[FULL].value
    for place, entry in enumerate(rows):
        decided = entry.verdict.startswith("decided")
        colour = _OURS if decided else _OPEN
        values = list(entry.differences.values())
        axes.plot(values, [place + 0.16] * len(values), ".", color=colour, markersize=5, alpha=0.6)
        mean = sum(values) / len(values)
        axes.plot(mean, place, "o", color=colour, markerfacecolor=colour if len(values) > 1 else "white", markersize=7)
        if entry.interval is not None:
            axes.plot([entry.interval.low, entry.interval.high], [place, place], color=colour, linewidth=2)
        if entry.row in paper.ABLATION:
            axes.plot(paper.ABLATION[entry.row].value - full, place, "D", color=_PAPER, markersize=5, fillstyle="none")
    axes.set_yticks(range(len(rows)), [LABELS[entry.row] for entry in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("VQA score, difference to the full model with the same seed, points")
    axes.grid(axis="x", color="#eeeeee")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    for label, marker, colour, face in (
        ("decided: 95 % interval excludes 0", "o", _OURS, _OURS),
        ("undecided", "o", _OPEN, _OPEN),
        ("one seed", "o", _OPEN, "white"),
        ("paper's small model (recalled)", "D", _PAPER, "white"),
    ):
        axes.plot([], [], marker, color=colour, markerfacecolor=face, label=label)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path, metadata={"Software": None})
    return True


def losses(results: Results, path: Path) -> bool:
    """The loss of every row's first seed; False, and nothing drawn, where nothing was pretrained."""
    runs = {}
    for job in results.jobs.values():
        log = results.found(job.name).get("log", [])
        points = [(entry["step"], entry["loss"]) for entry in log if math.isfinite(entry["loss"])]
        if job.kind == "pretrain" and job.seed == 0 and points and "/" not in job.row:
            runs[job.row] = points
    if not runs:
        return False
    figure = Figure(figsize=(8.6, 4.4), layout="constrained", dpi=_DPI)
    axes = figure.subplots()
    for place, (row, points) in enumerate(runs.items()):
        style = ("-", "--")[place // len(_PALETTE) % 2]
        steps, values = zip(*points, strict=True)
        marker = "o" if len(points) == 1 else ""
        colour = _PALETTE[place % len(_PALETTE)]
        axes.plot(steps, values, style, marker=marker, color=colour, linewidth=1.2, label=LABELS[row])
    axes.set(xlabel="step", ylabel="nats per target token", ylim=(0, None), xlim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, ncols=2)
    figure.savefig(path, metadata={"Software": None})
    return True


def gallery(panels: dict[str, list[Card]], path: Path, *, columns: int = 6) -> bool:
    """The first cards of every panel that has pictures; False, and nothing drawn, where none has."""
    shown = {name: [card for card in cards if card.picture][:columns] for name, cards in panels.items()}
    shown = {name: cards for name, cards in shown.items() if cards}
    if not shown:
        return False
    figure = Figure(figsize=(2.1 * columns, 3.3 * len(shown)), dpi=_DPI)
    grid = figure.subplots(len(shown), columns, squeeze=False, gridspec_kw={"hspace": 0.75, "wspace": 0.1})
    for line, (name, cards) in zip(grid, shown.items(), strict=True):
        line[0].set_title(name, fontsize=12, loc="left", fontweight="bold")
        for axes in line:
            axes.set_axis_off()
        for axes, card in zip(line, cards, strict=False):
            image = Image.open(io.BytesIO(base64.b64decode(card.picture)))
            axes.imshow(image)
            mark = {"right": "✓ ", "wrong": "✗ "}.get(card.verdict, "")
            said = textwrap.fill(f"{mark}{card.prediction}", 23)
            text = f"{textwrap.fill(card.read, 23)}\n→ {said}" if card.read else said
            text = text.replace("$", r"\$")
            axes.text(0, 1.03 * image.height, text, va="top", fontsize=8.5)
    figure.savefig(path, bbox_inches="tight", pad_inches=0.1, metadata={"Software": None})
    return True
