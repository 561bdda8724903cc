"""Text-only tasks about the generated world in GLUE's formats: acceptability as CoLA, entailment as RTE."""

from __future__ import annotations

from collections.abc import Sequence

from simvlm.data.captions import benchmark_captions
from simvlm.data.draws import Draws
from simvlm.data.judge import parse
from simvlm.data.scenes import Scene
from simvlm.tasks.nli import LABELS
from simvlm.tasks.world_hypotheses import ask_hypotheses, premise
from simvlm.tasks.world_pictures import Folder

_ENTAILED, _NEUTRAL, _CONTRADICTED = LABELS


def write_acceptability(folder: Folder, split: str, scenes: Sequence[Scene], draws: Draws) -> None:
    """A caption of every scene and the same words in an order that does not parse: CoLA's `<split>.tsv`."""
    rows = []
    for scene in scenes:
        caption = benchmark_captions(scene)[0]
        rows += [("1", "", caption), ("0", "*", swapped(caption, draws))]
    folder.write_lines(f"{split}.tsv", ("\t".join(("world", *row)) for row in draws.shuffled(rows)))
    folder.counts[split] = len(rows)


def swapped(caption: str, draws: Draws) -> str:
    """The caption with two of its words in each other's place, so that it is no caption any more."""
    text = caption[0].lower() + caption[1:].removesuffix(".")
    while True:
        words = text.split(" ")
        i, j = draws.shuffled(range(len(words)))[:2]
        words[i], words[j] = words[j], words[i]
        wrong = " ".join(words)
        wrong = wrong[0].upper() + wrong[1:] + "."
        try:
            parse(wrong)
        except ValueError:
            return wrong


def write_entailment(folder: Folder, split: str, scenes: Sequence[Scene], count: int, draws: Draws) -> None:
    """Premises and hypotheses: RTE's `<split>.tsv`; what does not follow is as often neutral as contradicted."""
    labels = (_ENTAILED, _ENTAILED, _NEUTRAL, _CONTRADICTED)
    rows = []
    for scene, asked in zip(scenes, ask_hypotheses(scenes, count, draws, labels=labels), strict=True):
        text = premise(scene, draws) if asked else ""
        rows += [(text, query.text, _ENTAILED if label == _ENTAILED else "not_entailment") for query, label in asked]
    lines = ["\t".join(("index", "sentence1", "sentence2", "label"))]
    lines += ["\t".join((str(number), *row)) for number, row in enumerate(rows)]
    folder.write_lines(f"{split}.tsv", lines)
    folder.counts[split] = len(rows)
