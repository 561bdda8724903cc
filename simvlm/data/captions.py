"""English captions of scenes: alt-text for pretraining, and another grammar for benchmarks.

The prompted grammar, `A picture of a small red circle with a large blue star to the right of it and a small green ring
below that`, is regular on purpose: shapes come from left to right, each relation follows both shapes it is about. A
prompted caption is always complete and true, so that the prompt asks for such captions; all other alt-text varies and
may be partial or wrong.

Sentences, `The circle is red, the star is above the circle`, name a shape before they say what is seen there, which "a
red circle" never does: they teach to find what a word names. The prompted grammar takes longer to learn beside them.

`simvlm.data.judge` reads every grammar of this file.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

from simvlm.data.draws import Draws
from simvlm.data.scenes import SEEN, Scene, Shape, relation

PROMPT = "A picture of"
PHRASES = {"left of": "to the left of", "right of": "to the right of", "above": "above", "below": "below"}
NUMBERS = ("no", "one", "two", "three")
PARTIAL_PERCENT, WRONG_PERCENT = 30, 10
_PROMPTED_PERCENT = 90
"""of the complete captions."""
_PROMPTED_PERCENT_WITH_SENTENCES = 60
_SENTENCES_PERCENT = 85
"""of the captions without the prompt, where every shape can be told from the others by kind or colour."""

_PARTLY_SAID = (
    ("kind",),
    ("size", "kind"),
    ("colour",),
    ("size", "colour"),
    ("texture", "kind"),
    ("texture", "colour"),
    ("size", "texture", "kind"),
)
_INTROS = ("", "", "image of ", "drawing of ", "there is ", "photo with ", "shapes: ", "stock picture, ")
_BENCHMARK_PHRASES = {
    "left of": ("to the left of", "on the left side of", "left of"),
    "right of": ("to the right of", "on the right side of", "right of"),
    "above": ("above", "over", "higher than"),
    "below": ("below", "under", "beneath"),
}
_BENCHMARK_SIZES = {"small": "little", "large": "big"}
_VERBS = ("sits", "lies", "is placed", "can be seen")


@dataclasses.dataclass(frozen=True)
class Caption:
    """A pretraining caption and its grade: "complete", "partial" (true, but something is left out) or "wrong"."""

    text: str
    grade: str


def noun(shape: Shape, said: Sequence[str] = ("size", "colour", "kind")) -> str:
    """What is said of a shape, without article: "small red circle"; a shape whose kind is not said is a "shape"."""
    words = [getattr(shape, word) for word in ("size", "texture", "colour") if word in said]
    return " ".join([*words, shape.kind if "kind" in said else "shape"])


def with_article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def plural(phrase: str) -> str:
    return phrase + ("es" if phrase.endswith("s") else "s")


def prompted_caption(scene: Scene) -> str:
    """The complete caption that begins with the prompt."""
    shapes = sorted(scene.shapes, key=lambda shape: shape.x)
    return f"{PROMPT} {_beside(shapes, [with_article(noun(shape)) for shape in shapes])}"


def pretraining_caption(scene: Scene, seed: int, *, sentences: bool = False) -> Caption:
    """An alt-text as the web might have it: 30 % leave something out, 10 % are wrong. Half are `sentences`, or none."""
    draws = Draws("caption", scene.split, len(scene.shapes), scene.seed, seed)
    lot = draws.below(100)
    if lot < WRONG_PERCENT:
        return Caption(_complete(draws.shuffled(_falsified(scene.shapes, draws)), draws, sentences), "wrong")
    if lot < WRONG_PERCENT + PARTIAL_PERCENT:
        return Caption(_partial(draws.shuffled(scene.shapes), draws, sentences), "partial")
    if draws.chance(_PROMPTED_PERCENT_WITH_SENTENCES if sentences else _PROMPTED_PERCENT):
        return Caption(prompted_caption(scene), "complete")
    return Caption(_complete(draws.shuffled(scene.shapes), draws, sentences), "complete")


def benchmark_captions(scene: Scene, seed: int = 0) -> list[str]:
    """Five complete captions as a benchmark's annotators might write them: sentences with verbs and other words."""
    draws = Draws("benchmark", scene.split, len(scene.shapes), scene.seed, seed)
    captions: dict[str, None] = {}
    while len(captions) < 5:
        captions[_annotation(draws.shuffled(scene.shapes), draws)] = None
    return list(captions)


def _complete(shapes: Sequence[Shape], draws: Draws, sentences: bool) -> str:
    if sentences and (names := _names(shapes, draws)) is not None:
        natures, places, looks = _facts(shapes, names)
        place, *more = draws.shuffled(places) or [""]
        more = draws.shuffled([*more, *looks])[: draws.between(0, len(shapes))]
        return _sentences(draws.shuffled([*natures, *filter(None, [place]), *more]), draws, len(shapes))
    said = ["colour", "kind", *(["size"] if draws.chance(50) else []), *(["texture"] if draws.chance(60) else [])]
    return _alt_text(_related(shapes, said, draws), draws, len(shapes))


def _partial(shapes: Sequence[Shape], draws: Draws, sentences: bool) -> str:
    """Without a shape, without relations, or without colours or kinds."""
    if sentences and (names := _names(shapes, draws)) is not None:
        natures, places, looks = _facts(shapes, names)
        natures.pop(draws.below(len(shapes)))  # of one shape it stays unsaid what it is
        facts = draws.shuffled([*natures, *places, *looks])
        return _sentences(facts[: draws.between(1, min(2 * len(shapes), len(facts)))], draws, None)
    what = draws.choose(("words", "relations", "shapes")) if len(shapes) > 1 else "words"
    if what == "words":
        said = draws.choose(_PARTLY_SAID)
        return _alt_text(_related(shapes, said, draws), draws, len(shapes))
    said = draws.choose((("colour", "kind"), ("size", "colour", "kind")))
    if what == "relations":
        return _alt_text(_listed([noun(shape, said) for shape in shapes], draws.chance(60)), draws, len(shapes))
    kept = shapes[: draws.between(1, len(shapes) - 1)]
    return _alt_text(_related(kept, said, draws), draws, None)


def _names(shapes: Sequence[Shape], draws: Draws) -> list[str] | None:
    """What each shape is called in sentences, its kind or else its colour; None: let it be no sentences."""
    if not draws.chance(_SENTENCES_PERCENT):
        return None
    names = []
    for shape in shapes:
        own = [
            noun(shape, (word,))
            for word in ("kind", "colour")
            if sum(getattr(other, word) == getattr(shape, word) for other in shapes) == 1
        ]
        if not own:
            return None
        names.append(own[0])
    return names


def _facts(shapes: Sequence[Shape], names: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """What each shape is, colour and kind; where it is from every other; its size and texture."""
    called = list(zip(shapes, names, strict=True))
    natures = [
        f"the {name} is {shape.colour if name == shape.kind else with_article(shape.kind)}" for shape, name in called
    ]
    places = [
        f"the {name} is {_phrase(shape, other)} the {other_name}"
        for (shape, name), (other, other_name) in itertools.permutations(called, 2)
    ]
    looks = [f"the {name} is {word}" for shape, name in called for word in (shape.size, shape.texture)]
    return natures, places, looks


def _falsified(shapes: Sequence[Shape], draws: Draws) -> list[Shape]:
    """The shapes with one colour or kind changed, or turned by half a circle, which turns every relation round."""
    twins = len({(shape.kind, shape.colour) for shape in shapes}) < len(shapes)
    if len(shapes) > 1 and not twins and draws.chance(50):
        return [dataclasses.replace(shape, x=-shape.x, y=-shape.y) for shape in shapes]
    changed = draws.below(len(shapes))
    true = shapes[changed]
    others = [pair for pair in SEEN if (pair[0] == true.kind) != (pair[1] == true.colour)]
    kind, colour = draws.choose(others)
    false = dataclasses.replace(true, kind=kind, colour=colour)
    return [false if i == changed else shape for i, shape in enumerate(shapes)]


def _related(shapes: Sequence[Shape], said: Sequence[str], draws: Draws) -> str:
    """The shapes with the relation of each two neighbours of the list."""
    nouns = [noun(shape, said) for shape in shapes]
    articles = draws.chance(60)
    names = [with_article(word) for word in nouns] if articles else nouns
    if len(shapes) == 1:
        return names[0]
    if len(shapes) == 2 and nouns[0] == nouns[1]:
        return f"two {plural(nouns[0])}, one {_phrase(*shapes)} the other"
    style = draws.below(3)
    if style == 0:
        return _chain(shapes, names, PHRASES.__getitem__, "which is")
    short = [noun(shape, ("kind",)) if "kind" in said else word for shape, word in zip(shapes, nouns, strict=True)]
    definite = short if len(set(short)) == len(short) and draws.chance(50) else nouns
    if style == 1 and len(set(definite)) == len(definite):
        facts = [
            f"the {definite[i]} is {_phrase(shapes[i], shapes[i + 1])} the {definite[i + 1]}"
            for i in range(len(shapes) - 1)
        ]
        return f"{_listed(nouns, articles)}; {' and '.join(facts)}"
    return _beside(shapes, names)


def _phrase(a: Shape, b: Shape) -> str:
    return PHRASES[relation(a, b)]


def _beside(shapes: Sequence[Shape], names: Sequence[str]) -> str:
    """`A with B above it and C below that`: each relation after both names, to the shape named before."""
    text = names[0]
    for i, (before, shape) in enumerate(itertools.pairwise(shapes)):
        link, pronoun = ("with", "it") if i == 0 else ("and", "that")
        text += f" {link} {names[i + 1]} {_phrase(shape, before)} {pronoun}"
    return text


def _chain(shapes: Sequence[Shape], names: Sequence[str], word: Callable[[str], str], which: str) -> str:
    """`A above B, which is below C`."""
    text = f"{names[0]} {word(relation(shapes[0], shapes[1]))} {names[1]}"
    if len(shapes) == 3:
        text += f", {which} {word(relation(shapes[1], shapes[2]))} {names[2]}"
    return text


def _listed(nouns: Sequence[str], articles: bool) -> str:
    """`a red circle, two blue stars`, without relations."""
    names = []
    for word in dict.fromkeys(nouns):
        times = nouns.count(word)
        names.append(f"{NUMBERS[times]} {plural(word)}" if times > 1 else with_article(word) if articles else word)
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _alt_text(body: str, draws: Draws, count: int | None) -> str:
    """Some introduction, capitals and full stops as they come; a count is stated only of the whole picture."""
    return _finished(draws.choose(_INTROS), body, draws, count)


def _sentences(facts: Sequence[str], draws: Draws, count: int | None) -> str:
    return _finished("", draws.choose((", ", "; ", " and ")).join(facts), draws, count)


def _finished(intro: str, body: str, draws: Draws, count: int | None) -> str:
    if count is not None and count > 1 and draws.chance(15):
        intro = f"{NUMBERS[count]} shapes: "
    text = intro + body
    if draws.chance(50):
        text = text[0].upper() + text[1:]
    return text + ("." if draws.chance(40) else "")


def _annotation(shapes: Sequence[Shape], draws: Draws) -> str:
    said = ("size", "colour", "kind") if draws.chance(60) else ("colour", "kind")
    nouns = [" ".join(_BENCHMARK_SIZES.get(word, word) for word in noun(shape, said).split()) for shape in shapes]
    names = [with_article(word) for word in nouns]
    verb = draws.choose(_VERBS)

    def word(name: str) -> str:
        return draws.choose(_BENCHMARK_PHRASES[name])

    if len(shapes) == 1:
        templates = ("The picture shows {}", "One can see {}", "{} lies alone", "There is only {} here", "We see {}")
        text = draws.choose(templates).format(names[0])
        return text[0].upper() + text[1:] + "."
    # A verb after the first name only where no other verb comes before it.
    style = draws.below(4)
    if style == 0:
        text = "The picture shows " + _chain(shapes, names, word, f"which {verb}")
    elif style == 1:
        text = _chain(shapes, [f"{names[0]} {verb}", *names[1:]], word, f"which {verb}")
    elif style == 2 and len(set(nouns)) == len(nouns):
        facts = [
            f"the {nouns[i]} {verb} {word(relation(shapes[i], shapes[i + 1]))} the {nouns[i + 1]}"
            for i in range(len(shapes) - 1)
        ]
        text = f"One can see {_listed(nouns, True)}: {', and '.join(facts)}"
    else:
        text = f"{names[0]} {verb} {word(relation(shapes[0], shapes[1]))} {names[1]}"
        if len(shapes) == 3:
            text += f", and {names[2]} {verb} {word(relation(shapes[2], shapes[1]))} that"
    return text[0].upper() + text[1:] + "."
