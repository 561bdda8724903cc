"""The tables of `simvlm reproduce`'s page: the paper's figures beside ours, the goals, what was not run."""

from __future__ import annotations

import dataclasses
from typing import Any

from simvlm.tasks import paper, reproduce_plots
from simvlm.tasks.metrics import Interval
from simvlm.tasks.nocaps import DOMAINS
from simvlm.tasks.reproduce_results import LABELS, NOT_RUN, Compared, Results, apart, interval, shown
from simvlm.tasks.rows import FULL, HEADLINE

PICTURES = ("own", "masked", "shuffled")
SKIPPED = "skipped"
LEAST_SCORE, MOST_BLIND, LEAST_GAIN = 85.0, 5.0, 20.0
"""Goals, in points: of a finetuned score, of a blind model's distance from the majority, of the linear probe's gain."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of a table. `jobs`: its own, whose commands and seconds stand with it."""

    cells: tuple[str, ...]
    jobs: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Table:
    title: str
    text: str
    head: tuple[str, ...]
    rows: tuple[Row, ...]
    plot: str = ""
    """file name of the plot that stands below it"""


@dataclasses.dataclass(frozen=True)
class Goal:
    """`met`: None where what it is about was not run, or was skipped, which `found` says."""

    text: str
    found: str
    met: bool | None

    @property
    def verdict(self) -> str:
        if self.met is None:
            return SKIPPED if self.found == SKIPPED else NOT_RUN
        return "met" if self.met else "missed"


@dataclasses.dataclass(frozen=True)
class _Transfer:
    """A task of pictures that is learnt from text; `control` is what needs no picture for the same `measure`."""

    name: str
    task: str
    taught: str
    measure: str
    control: str
    paper: str


def tables(results: Results, compared: list[Compared]) -> list[Table]:
    """All, in the order of the page."""
    return [
        _model(results),
        _finetuning(results),
        _captions(results),
        _nocaps(results),
        _translation(results),
        _transfer(results),
        _open_vqa(results),
        _probe(results),
        _text(results),
        _ablation(results, compared),
    ]


def goals(results: Results) -> list[Goal]:
    """What was set as a goal before anything was run, and whether it was reached."""
    found = []
    for task, name in _CLASSIFIED.items():
        score = interval(results.found(_finetuned(task)).get("score"))
        blind, majority = _blind(results, task)
        found += [_high_enough(name, score), _near_majority(name, blind, majority)]
    captioned = results.found("eval/coco/finetuned-own")
    measures = {"cider": "CIDEr", "judged_right": "judged right"}
    if captioned and "judged_right" not in captioned:
        del measures["judged_right"]  # real pictures have no judge
    for measure, name in measures.items():
        for higher, lower in (("finetuned-own", "zero-shot-own"), ("zero-shot-own", "zero-shot-shuffled")):
            above, below = (_caption(results, f"eval/coco/{kind}", measure) for kind in (higher, lower))
            text = f"captions, {name}: {_KINDS[higher]} above {_KINDS[lower]}"
            skipped = captioned.get("captions", {}).get("all", {}).get("skipped", {})
            found.append(_above(text, above, {_KINDS[lower]: below}, why=SKIPPED if name in skipped else NOT_RUN))
    for transfer in _TRANSFERS:
        for kind in _FREEZES:
            text = f"{transfer.name}, zero-shot, {_FREEZES[kind]}: above its controls, intervals apart"
            found.append(_transferred(results, transfer, kind, text))
    probe, untrained = (
        interval(results.found(f"eval/imagenet/{kind}").get("score")) for kind in ("probe", "untrained")
    )
    gain = None if probe is None or untrained is None else probe.value - untrained.value
    text = f"linear probe: at least {LEAST_GAIN:g} points above an untrained encoder"
    found.append(Goal(text, NOT_RUN if gain is None else f"{gain:+.1f}", None if gain is None else gain >= LEAST_GAIN))
    return found


_CLASSIFIED = {"vqav2": "VQAv2", "nlvr2": "NLVR2", "snli-ve": "SNLI-VE"}
_TRANSFERS = (
    _Transfer("SNLI-VE", "snli-ve", "nli", "score", "majority", str(paper.BASE["snli-ve/zero-shot"])),
    _Transfer(
        "German captions, BLEU-4",
        "german-captions",
        "translation",
        "bleu",
        "constant",
        str(paper.BASE["german-captions/zero-shot"]),
    ),
    _Transfer("German captions, CIDEr", "german-captions", "translation", "cider", "constant", ""),
)
_CONSTANT = "Constant: the one text of the references that does best for all of them."
_FREEZES = {"frozen": "encoder frozen", "whole": "encoder trained"}
_KINDS = {
    "finetuned-own": "finetuned",
    "zero-shot-own": "zero-shot",
    "hundredth": "finetuned on a hundredth",
    "finetuned-shuffled": "finetuned, pictures shuffled",
    "zero-shot-shuffled": "zero-shot, pictures shuffled",
}


def _model(results: Results) -> Table:
    log = results.found(f"pretrain/{HEADLINE}").get("log", [])
    cells = (f"{log[-1]['step']:,}", f"{log[-1]['loss']:.3f}") if log else (NOT_RUN, NOT_RUN)
    return Table(
        "The model",
        "What every table but the ablation asks. The loss: nats per target token, of the last steps. The plot: losses "
        "of pretraining, first seeds; objectives have different targets: those of PrefixLM, LM and span corruption do "
        "not compare.",
        ("pretraining", "steps", "loss"),
        (Row((LABELS[FULL], *cells), (f"pretrain/{HEADLINE}",)),),
        reproduce_plots.LOSS,
    )


def _ablation(results: Results, compared: list[Compared]) -> Table:
    rows = []
    full = paper.ABLATION[FULL]
    for entry in compared:
        theirs = paper.ABLATION.get(entry.row)
        direction = "" if entry.row == FULL else "below"
        if theirs is not None and entry.row != FULL:
            direction += f", {theirs.value - full.value:+.1f} (recalled)"
        values = list(entry.scores.values())
        seeds = ", ".join(f"{score:.1f}" for score in values)
        mean = f"{sum(values) / len(values):.1f}" if values else NOT_RUN
        if len(values) < entry.planned and values:
            mean += f" ({len(values)} of {entry.planned} seeds)"
        elif len(values) == 1:
            mean += " (one seed)"
        difference = ""
        if entry.row != FULL:
            difference = shown(entry.interval)
            if entry.interval is None:
                difference = "".join(f"{one:+.1f}, no interval" for one in entry.differences.values()) or NOT_RUN
        jobs = tuple(job.name for job in results.jobs.values() if job.row == entry.row)
        cells = (LABELS[entry.row], str(theirs or "not known"), direction, mean, seeds, difference, entry.verdict)
        rows.append(Row(cells, jobs))
    return Table(
        "Ablation: VQA after pretraining in other ways",
        "Models of their own, trained shorter. The difference is to the full model with the same seed, its 95 % "
        "interval Student's over seeds; a row is decided only where the interval excludes zero. Intervals are not "
        "corrected for how many rows there are: of twenty comparisons of equals one would be decided. That each row "
        "lies below the full one in the paper was seen; its figures are recalled, of another model on other pictures: "
        "directions compare, sizes do not. Its row of CC3M alone (63.3, recalled) has no likeness in the world.",
        ("pretraining", "paper", "paper's direction", "ours, mean", "each seed", "difference", "verdict"),
        tuple(rows),
        reproduce_plots.ABLATION,
    )


def _finetuning(results: Results) -> Table:
    rows = []
    for task, name in _CLASSIFIED.items():
        score = interval(results.found(_finetuned(task)).get("score"))
        blind, majority = _blind(results, task)
        own = (f"finetune/{task}/finetuned", _finetuned(task))
        reached = (_high_enough(name, score), _near_majority(name, blind, majority))
        cells = (name, str(paper.BASE[task]), shown(score), _number(majority), shown(blind))
        verdicts = tuple(goal.verdict for goal in reached)
        rows.append(Row((*cells, *verdicts), (*own, f"finetune/{task}/blind", f"eval/{task}/blind")))
    return Table(
        "Finetuning",
        "The blind model is finetuned and judged in the same way, with one grey square for every picture. Majority: "
        "always the commonest answer, of VQA that of the question's type. Intervals: bootstrap over the examples.",
        ("task", "paper, Base", "ours", "majority", "blind model", "ours at least 85", "blind within 5"),
        tuple(rows),
    )


def _captions(results: Results) -> Table:
    rows = []
    for kind, name in _KINDS.items():
        result = f"eval/coco/{kind}"
        entry = results.found(result).get("captions", {}).get("all", {})
        cells = (
            name,
            str(paper.BASE.get(f"coco/{kind}", "")),
            shown(_caption(results, result, "cider")) if not entry.get("skipped", {}).get("CIDEr") else SKIPPED,
            *(_value(entry, metric) for metric in ("BLEU-4", "METEOR", "ROUGE-L", "SPICE")),
            shown(_caption(results, result, "judged_right"))
            if not entry or "judged_right" in results.found(result)
            else "",
        )
        tuned = {"finetuned-own": ("finetune/coco/finetuned",), "hundredth": ("finetune/coco/hundredth",)}
        rows.append(Row(cells, (*tuned.get(kind, ()), result)))
    skipped = results.found("eval/coco/finetuned-own").get("captions", {}).get("all", {}).get("skipped", {})
    told = "".join(f" {metric} was skipped: {why.partition(';')[0]}." for metric, why in skipped.items())
    return Table(
        "Captions",
        "The paper's figure is CIDEr. Judged right, on the generated world alone: names every object with kind and "
        "colour, states a relation where there are several, says nothing untrue. Shuffled: each caption is written "
        f"for another picture.{told}",
        ("captions", "paper, Base", "CIDEr", "BLEU-4", "METEOR", "ROUGE-L", "SPICE", "judged right"),
        tuple(rows),
    )


def _nocaps(results: Results) -> Table:
    rows = []
    for kind in ("finetuned", "zero-shot"):
        result = f"eval/nocaps/{kind}"
        for group in ("all", *DOMAINS):
            entry = results.found(result).get("captions", {}).get(group, {})
            figure = paper.BASE.get(f"nocaps/{kind}" if group == "all" else f"nocaps/{kind} {group}", "")
            cider = interval(entry.get("cider"), 1)
            metrics = (_value(entry, metric) for metric in ("BLEU-4", "METEOR", "ROUGE-L", "SPICE"))
            text = SKIPPED if "CIDEr" in entry.get("skipped", {}) else shown(cider)
            rows.append(Row((kind, group, str(figure), text, *metrics), (result,) if group == "all" else ()))
    return Table(
        "NoCaps, by domain",
        "The model finetuned on COCO's captions, and the pretrained one, on the validation split; each domain is "
        "scored as a set of its own. The paper's figure is CIDEr; finetuned, of the test split.",
        ("captions", "domain", "paper, Base", "CIDEr", "BLEU-4", "METEOR", "ROUGE-L", "SPICE"),
        tuple(rows),
    )


def _translation(results: Results) -> Table:
    result = "eval/multi30k/finetuned"
    found = results.found(result)
    constant = interval(found.get("constant", {}).get("bleu"), 1)
    cells = (str(paper.BASE["multi30k"]), shown(interval(found.get("bleu"), 1)), shown(constant))
    return Table(
        "Multi30k",
        f"BLEU-4. Which of its test sets the paper used is not known. {_CONSTANT}",
        ("task", "paper, Base", "ours", "constant"),
        (Row(("English and picture to German", *cells), ("finetune/multi30k/finetuned", result)),),
    )


def _transfer(results: Results) -> Table:
    rows = []
    for transfer in _TRANSFERS:
        for kind, freeze in _FREEZES.items():
            reached = _transferred(results, transfer, kind)
            by_pictures = (_measured(results, transfer, kind, pictures) for pictures in PICTURES)
            text = results.found(f"eval/{transfer.taught}/{kind}")
            on_text = interval(text.get("score")) or interval(text.get("bleu"), 1)
            cells = (
                f"{transfer.name}, {freeze}",
                transfer.paper,
                *map(shown, by_pictures),
                shown(_control(results, transfer, kind)),
                {True: "yes", False: "no", None: reached.found}[reached.met],
                shown(on_text) if transfer.measure != "cider" else "",
            )
            jobs: tuple[str, ...] = ()
            if transfer.measure != "cider":  # the same jobs as BLEU's
                jobs = (f"finetune/{transfer.taught}/{kind}", f"eval/{transfer.taught}/{kind}")
                jobs += tuple(_zero_shot(transfer, kind, pictures) for pictures in PICTURES)
            rows.append(Row(cells, jobs))
    return Table(
        "Zero-shot transfer from text to pictures",
        "Finetuned on text alone, text inference or translation; asked about pictures. SNLI-VE in points of accuracy. "
        "German captions are given their first words, which count neither in them nor in their references; METEOR (the "
        "paper's 24.8, recalled) was skipped: pycocoevalcap calls it for English alone. Majority or constant: what no "
        f"picture is needed for, the commonest label or one text. {_CONSTANT} The convolutions stay as pretrained; "
        "learning rate and epoch are chosen on text.",
        (
            "task",
            "paper, Base",
            "own pictures",
            "masked",
            "shuffled",
            "majority or constant",
            "intervals apart",
            "on its own text",
        ),
        tuple(rows),
    )


def _open_vqa(results: Results) -> Table:
    rows = []
    for kind, name in (("finetuned", "finetuned, some answers left out"), ("without-finetuning", "no VQA finetuning")):
        result = f"eval/open-vqa/{kind}"
        found = results.found(result)
        answers = found.get("answers", {})
        none = NOT_RUN if not found else "not told"
        seen, unseen = (shown(interval(answers[part])) if part in answers else none for part in ("seen", "unseen"))
        if kind == "finetuned":
            figures = [f"{paper.BASE[f'open-vqa {part}'].value:g}" for part in ("all", "seen", "unseen")]
            theirs = f"{' / '.join(figures)} (recalled)"
        else:
            theirs = "often not usable"
        jobs = (f"finetune/open-vqa/{kind}", result) if kind == "finetuned" else (result,)
        score = shown(interval(found.get("score")))
        rows.append(Row((name, theirs, score, seen, unseen, _percent(found.get("majority"))), jobs))
    return Table(
        "Open-ended VQA",
        "The decoder writes the answer. Unseen: questions whose answer was kept out of finetuning. The paper's: all / "
        "seen / unseen.",
        ("model", "paper, Base", "ours, all", "seen answers", "unseen answers", "majority"),
        tuple(rows),
    )


def _probe(results: Results) -> Table:
    rows = []
    for kind, name in (("probe", "pretrained encoder"), ("untrained", "untrained encoder")):
        result = f"eval/imagenet/{kind}"
        found = results.found(result)
        theirs = str(paper.BASE["imagenet"]) if kind == "probe" else ""
        jobs = (result,) if kind == "probe" else ("pretrain/untrained", result)
        rows.append(Row((name, theirs, shown(interval(found.get("score"))), _percent(found.get("majority"))), jobs))
    return Table(
        "Linear probe",
        "A linear map of the frozen encoder's mean state to the classes.",
        ("encoder", "paper, Base", "ours", "majority"),
        tuple(rows),
    )


def _text(results: Results) -> Table:
    rows = []
    for task in ("cola", "rte"):
        result = f"eval/{task}/finetuned"
        found = results.found(result)
        cells = (task, "not known", shown(interval(found.get("score"))), _percent(found.get("majority")))
        rows.append(Row(cells, (f"finetune/{task}/finetuned", result)))
    return Table(
        "Text alone",
        "Accuracy (of CoLA too, whose own measure is Matthews' correlation) on the tasks of GLUE that the world has a "
        "likeness of. GLUE keeps its test labels to itself: these are of dev, on which the epoch was chosen too. The "
        "paper's GLUE figures are not known here.",
        ("task", "paper", "ours", "majority"),
        tuple(rows),
    )


def _high_enough(name: str, score: Interval | None) -> Goal:
    met = None if score is None else score.value >= LEAST_SCORE
    return Goal(f"{name}, finetuned: at least {LEAST_SCORE:g}", shown(score), met)


def _near_majority(name: str, blind: Interval | None, majority: float | None) -> Goal:
    met = None if blind is None or majority is None else abs(blind.value - majority) <= MOST_BLIND
    told = shown(blind) if majority is None else f"{shown(blind)}, majority {majority:.1f}"
    return Goal(f"{name}, blind: within {MOST_BLIND:g} points of the majority", told, met)


def _above(
    text: str,
    own: Interval | None,
    controls: dict[str, Interval | None],
    *,
    intervals_apart: bool = False,
    why: str = NOT_RUN,
) -> Goal:
    """The goal to lie above all of these; `why`: what is said where there is nothing to compare."""
    told = f"{shown(own)} against {'; '.join(f'{name} {shown(control)}' for name, control in controls.items())}"
    ran = [control for control in controls.values() if control is not None]
    if own is None or len(ran) < len(controls):
        return Goal(text, why, None)
    met = all(apart(own, control) if intervals_apart else own.value > control.value for control in ran)
    if met and not all(apart(own, control) for control in ran):
        told += ", intervals touch"
    return Goal(text, told, met)


def _finetuned(task: str) -> str:
    return f"eval/{task}/finetuned"


def _blind(results: Results, task: str) -> tuple[Interval | None, float | None]:
    """The blind model's score, and the majority's on the same examples."""
    found = results.found(f"eval/{task}/blind") or results.found(_finetuned(task))
    blind = interval(results.found(f"eval/{task}/blind").get("score"))
    return blind, 100 * found["majority"] if "majority" in found else None


def _caption(results: Results, name: str, measure: str) -> Interval | None:
    found = results.found(name)
    if measure == "judged_right":
        return interval(found.get("judged_right"))
    return interval(found.get("captions", {}).get("all", {}).get("cider"), 1)


def _transferred(results: Results, transfer: _Transfer, kind: str, text: str = "") -> Goal:
    """The goal to lie above all controls."""
    own, masked, shuffled = (_measured(results, transfer, kind, pictures) for pictures in PICTURES)
    controls = {"masked": masked, "shuffled": shuffled, transfer.control: _control(results, transfer, kind)}
    skipped = results.found(_zero_shot(transfer, kind, "own")).get("skipped", {})
    why = SKIPPED if transfer.measure == "cider" and "CIDEr" in skipped else NOT_RUN
    return _above(text, own, controls, intervals_apart=True, why=why)


def _measured(results: Results, transfer: _Transfer, kind: str, pictures: str) -> Interval | None:
    entry = results.found(_zero_shot(transfer, kind, pictures)).get(transfer.measure)
    return interval(entry, 100 if transfer.measure == "score" else 1)


def _control(results: Results, transfer: _Transfer, kind: str) -> Interval | None:
    """What no picture is needed for; the majority is an interval without width."""
    found = results.found(_zero_shot(transfer, kind, "own"))
    if transfer.control == "constant":
        return interval(found.get("constant", {}).get(transfer.measure), 1)
    if "majority" not in found:
        return None
    value = 100 * found["majority"]
    return Interval(value, value, value, found["score"]["n"])


def _zero_shot(transfer: _Transfer, kind: str, pictures: str) -> str:
    return f"eval/{transfer.task}/zero-shot-{kind}-{pictures}"


def _value(entry: dict[str, Any], metric: str) -> str:
    if not entry:
        return NOT_RUN
    return f"{entry['values'][metric]:.1f}" if metric in entry["values"] else SKIPPED


def _number(value: float | None) -> str:
    return NOT_RUN if value is None else f"{value:.1f}"


def _percent(share: float | None) -> str:
    return NOT_RUN if share is None else f"{100 * share:.1f}"
