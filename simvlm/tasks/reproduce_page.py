"""The page of `simvlm reproduce`: index.html, one file without scripts or links, and README.md with the same tables."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from simvlm.tasks import reproduce_plots
from simvlm.tasks.reproduce import Job, command
from simvlm.tasks.reproduce_gallery import Card, panels
from simvlm.tasks.reproduce_results import NOT_RUN, Results, ablation
from simvlm.tasks.reproduce_tables import Goal, Row, Table, goals, tables
from simvlm.tasks.rows import GALLERY, Scale

PAGE, README = "index.html", "README.md"
_LABELS = "abcdefgh"

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1c1c20; background: #f6f6f4; margin: 0; }
main { max-width: 1180px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 8px; }
h2 { font-size: 20px; margin: 40px 0 4px; }
h3 { font-size: 16px; margin: 24px 0 6px; }
p { margin: 4px 0 14px; max-width: 80ch; }
.soft, .empty { color: #5b5b63; }
.table { overflow-x: auto; }
table { border-collapse: collapse; background: #fff; border: 1px solid #e2e2de; font-size: 14px; }
td, th { padding: 5px 12px; text-align: left; vertical-align: top; font-variant-numeric: tabular-nums; }
th { font-weight: 600; color: #5b5b63; }
td:last-child { white-space: nowrap; }
tr + tr, tbody tr { border-top: 1px solid #eeeeea; }
.right { color: #15803d; font-weight: 600; }
.wrong { color: #b91c1c; font-weight: 600; }
.empty { font-style: italic; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(162px, 1fr)); gap: 14px; }
.card { background: #fff; border: 1px solid #e2e2de; border-radius: 10px; overflow: hidden; font-size: 14px;
  line-height: 1.4; }
.card img { display: block; width: 100%; }
.card div { padding: 8px 10px 10px; }
.plot { background: #fff; border: 1px solid #e2e2de; border-radius: 10px; max-width: 100%; height: auto; }
details { margin: 8px 0 0; font-size: 14px; }
summary { cursor: pointer; color: #5b5b63; }
code { background: #ececea; border-radius: 4px; padding: 1px 5px; font-size: 12px; overflow-wrap: anywhere; }
li { margin: 4px 0; }
"""
_GOOD = ("met", "yes", "right", "decided: below")
_BAD = ("missed", "no", "wrong", "decided: above")


def write(out: Path, jobs: Sequence[Job], scale_name: str, scale: Scale, work: Path) -> Path:
    """Writes the page, README.md and plots of what results there are.

    Args:
        out: where `jobs/` is; the page goes there.
        jobs: all of the scale; those without a result read "not run".
        scale_name, scale: which.
        work: the folder that paths of commands are told from.

    Returns:
        index.html's path.
    """
    out.mkdir(parents=True, exist_ok=True)
    results = Results(out, jobs)
    compared = ablation(results)
    found = tables(results, compared)
    cards = panels(results)
    plots = {
        name
        for name, drawn in (
            (reproduce_plots.ABLATION, reproduce_plots.ablation(compared, out / reproduce_plots.ABLATION)),
            (reproduce_plots.LOSS, reproduce_plots.losses(results, out / reproduce_plots.LOSS)),
            (reproduce_plots.GALLERY, reproduce_plots.gallery(cards, out / reproduce_plots.GALLERY)),
        )
        if drawn
    }
    written = _Writer(results, scale_name, scale, work, out, plots)
    (out / README).write_text(written.markdown(found, goals(results), cards), encoding="utf-8")
    page = out / PAGE
    page.write_text(written.html(found, goals(results), cards), encoding="utf-8")
    return page


class _Writer:
    """Both files of one set of results."""

    def __init__(self, results: Results, scale_name: str, scale: Scale, work: Path, out: Path, plots: set[str]) -> None:
        self.results, self.scale_name, self.scale = results, scale_name, scale
        self.work, self.out, self.plots = work, out, plots

    def html(self, found: list[Table], reached: list[Goal], cards: dict[str, list[Card]]) -> str:
        parts = [f"<h1>{_TITLE}</h1>", *(f"<p>{html.escape(text)}</p>" for text in self._head())]
        goal_rows = [(goal.text, goal.found, goal.verdict) for goal in reached]
        parts += [_section("Goals", _GOALS), _html_table(("goal", "found", ""), goal_rows)]
        for table in found:
            rows = [(*row.cells, self._time(row)) for row in table.rows]
            parts += [_section(table.title, table.text), _html_table((*table.head, "time"), rows)]
            parts.append(self._html_commands(_jobs(table)))
            if table.plot in self.plots:
                parts.append(self._html_plot(table.plot))
        parts.append(_section("Gallery", _GALLERY))
        for label, (panel, shown) in zip(_LABELS, cards.items(), strict=False):
            parts.append(f"<h3>({label}) {html.escape(panel)}</h3>")
            body = "".join(map(_html_card, shown))
            parts.append(f'<div class="cards">{body}</div>' if body else f'<p class="empty">{NOT_RUN}</p>')
        parts.append(self._html_commands(GALLERY.values()))
        return (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width"><title>{_TITLE}</title><style>{_STYLE}</style></head>'
            f"<body><main>{''.join(parts)}</main></body></html>\n"
        )

    def markdown(self, found: list[Table], reached: list[Goal], cards: dict[str, list[Card]]) -> str:
        parts = [f"# {_TITLE}", *self._head(), "## Goals", _GOALS]
        parts.append(
            _markdown_table(("goal", "found", ""), [(goal.text, goal.found, goal.verdict) for goal in reached])
        )
        for table in found:
            parts += [f"## {table.title}", table.text]
            parts.append(_markdown_table((*table.head, "time"), [(*row.cells, self._time(row)) for row in table.rows]))
            parts.append(self._markdown_commands(_jobs(table)))
            if table.plot in self.plots:
                parts.append(f"![{table.plot.partition('.')[0]}]({table.plot})")
        parts += ["## Gallery", _GALLERY]
        parts += [f"![gallery]({reproduce_plots.GALLERY})"] * (reproduce_plots.GALLERY in self.plots)
        for label, (panel, shown) in zip(_LABELS, cards.items(), strict=False):
            rows = [(card.read, card.prediction, card.reference, card.verdict) for card in shown]
            parts.append(f"### ({label}) {panel}")
            parts.append(_markdown_table(("read", "written", "reference", ""), rows) if rows else NOT_RUN)
        parts.append(self._markdown_commands(GALLERY.values()))
        return "\n\n".join(parts) + "\n"

    def _head(self) -> list[str]:
        """What was run, on what, and how long it took."""
        scale, files = self.scale, self.results.files
        ran = f"{len(files)} of {len(self.results.jobs)} jobs have run"
        seconds = self.results.seconds(files)
        ran += "" if seconds is None else f", {seconds / 3600:.2f} hours of jobs, of which some ran side by side"
        machines: dict[str, int] = {}
        for file in files.values():
            told = file.get("machine")
            name = (
                "a machine that was not noted"
                if told is None
                else (
                    f"{told['device']}, {told['threads']} thread{'s' * (told['threads'] != 1)}, torch {told['torch']}, "
                    f"simvlm {told['simvlm']}"
                )
            )
            machines[name] = machines.get(name, 0) + 1
        world = "on a generated world in the benchmarks' file formats" if self.scale_name == "demo" else "on real files"
        return [
            f"The experiments of SimVLM (Wang et al. 2022) at scale {self.scale_name}, {world}: "
            f"{scale.steps:,} steps of {scale.pairs} pairs and {scale.documents} documents in pretraining, "
            f"{scale.ablation_steps:,} in the ablation's, variant {scale.variant}; "
            f"{_many(scale.core_seeds, 'seed')} of the ablation's core rows, {_many(scale.seeds, 'seed')} of its "
            "others, one of everything else. The paper's figures stand beside ours for the direction, not the size: "
            "model, data and pictures are other ones. Figures marked “recalled” were not looked up.",
            f"{ran}: {'; '.join(f'{many} on {name}' for name, many in machines.items()) or 'none'}. A row without a "
            f"result reads “{NOT_RUN}”. Scores are in points, with 95 % intervals in brackets; times are of a row's "
            "own jobs. Commands are given in the work folder; those of a row's first seed stand for all.",
        ]

    def _time(self, row: Row) -> str:
        seconds = self.results.seconds(row.jobs)
        if seconds is None:
            return NOT_RUN if row.jobs else ""
        ran = sum(name in self.results.files for name in row.jobs)
        told = f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"
        return told if ran == len(row.jobs) else f"{told} ({ran} of {len(row.jobs)} jobs)"

    def _html_commands(self, names: Iterable[str]) -> str:
        items = "".join(
            f"<li>{html.escape(told)}<br><code>{html.escape(line)}</code></li>" for told, line in self._commands(names)
        )
        return f"<details><summary>Commands</summary><ul>{items}</ul></details>"

    def _markdown_commands(self, names: Iterable[str]) -> str:
        lines = "\n".join(f"# {told}\n{line}" for told, line in self._commands(names))
        return f"<details><summary>Commands</summary>\n\n```bash\n{lines}\n```\n\n</details>"

    def _commands(self, names: Iterable[str]) -> list[tuple[str, str]]:
        """(name and seconds, command) of each job; other seeds than the first differ in their --seed alone."""
        found = []
        for name in names:
            job, file = self.results.jobs[name], self.results.files.get(name)
            if job.seed == 0:
                told = f"{name}: " + (NOT_RUN if file is None else f"{file['seconds']:.1f} s")
                found.append((told, _from_work(command(job) if file is None else file["command"], self.work)))
        return found

    def _html_plot(self, name: str) -> str:
        content = base64.b64encode((self.out / name).read_bytes()).decode()
        return f'<p><img class="plot" alt="{name.partition(".")[0]}" src="data:image/png;base64,{content}"></p>'


_TITLE = "SimVLM's experiments, reproduced"
_GOALS = "Set before anything was run."
_GALLERY = (
    "The paper's panels; the first examples of each test split in order, not the best. Below each: what the model read "
    "beside the picture, what it wrote (→), and an answer that is right where the split has one."
)


def _jobs(table: Table) -> list[str]:
    return [name for row in table.rows for name in row.jobs]


def _from_work(line: str, work: Path) -> str:
    """A command as it is given in the work folder; "@name" becomes that job's checkpoint."""
    return re.sub(r"@([\w/.-]+)", r"\1/checkpoint", line.replace(f"{work}/", ""))


def _many(count: int, name: str) -> str:
    return f"{count} {name}{'s' * (count != 1)}"


def _section(title: str, text: str) -> str:
    return f'<h2>{html.escape(title)}</h2><p class="soft">{html.escape(text)}</p>'


def _html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    names = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(map(_html_cell, row))}</tr>" for row in rows)
    return f'<div class="table"><table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table></div>'


def _html_cell(text: str) -> str:
    kind = "right" if text in _GOOD else "wrong" if text in _BAD else "empty" if text == NOT_RUN else ""
    attribute = f' class="{kind}"' if kind else ""
    return f"<td{attribute}>{html.escape(text)}</td>"


def _html_card(card: Card) -> str:
    picture = f'<img alt="" src="data:image/png;base64,{card.picture}">' if card.picture else ""
    lines = [f'<span class="soft">{html.escape(card.read)}</span>'] if card.read else []
    lines.append(f"→ {html.escape(card.prediction)}")
    if card.verdict:
        kind = {"right": "right", "wrong": "wrong"}.get(card.verdict, "soft")
        lines.append(f'<span class="{kind}">{card.verdict}</span>')
    if card.reference and card.verdict != "right":
        lines.append(f'<span class="soft">reference: {html.escape(card.reference)}</span>')
    return f'<div class="card">{picture}<div>{"<br>".join(lines)}</div></div>'


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_markdown_cell(cell) for cell in line) + " |" for line in lines)


def _markdown_cell(text: str) -> str:
    return html.escape(text, quote=False).replace("|", "\\|").replace("\n", " ")
