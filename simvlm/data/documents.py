"""Texts about scenes, without pictures: English documents, German documents, and English–German pairs.

A text is a list of facts, each of which can be said in both languages. The scenes are those of the training split, so
no text names a held-out combination either.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from simvlm.data.captions import NUMBERS, PHRASES, PROMPT, noun, with_article
from simvlm.data.draws import Draws
from simvlm.data.quiz import quiz
from simvlm.data.scenes import OPPOSITE, Scene, Shape, relation, sample_scene

GERMAN_PROMPT = "Ein Bild von"
LANGUAGES = ("en", "de", "en-de")
QUIZ_PERCENT = 80
"""of English documents, that ask about what they say"""

_KINDS = {
    "circle": "Kreis",
    "square": "Quadrat",
    "triangle": "Dreieck",
    "star": "Stern",
    "ring": "Ring",
    "cross": "Kreuz",
    "heart": "Herz",
    "moon": "Mond",
}
_NEUTER = ("square", "triangle", "cross", "heart")
_ADJECTIVES = {
    "small": "klein",
    "large": "groß",
    "plain": "einfarbig",
    "striped": "gestreift",
    "dotted": "gepunktet",
    "red": "rot",
    "orange": "orangefarben",
    "yellow": "gelb",
    "green": "grün",
    "blue": "blau",
    "purple": "violett",
    "black": "schwarz",
    "white": "weiß",
}
_Articles = dict[str, tuple[tuple[str, str], tuple[str, str]]]
# (article, ending of its adjectives) of a masculine and of a neuter noun.
_INDEFINITE: _Articles = {
    "nominative": (("ein", "er"), ("ein", "es")),
    "accusative": (("einen", "en"), ("ein", "es")),
    "dative": (("einem", "en"), ("einem", "en")),
}
_DEFINITE: _Articles = {"nominative": (("der", "e"), ("das", "e")), "dative": (("dem", "en"), ("dem", "en"))}
_PLACES = {"left of": "links von", "right of": "rechts von", "above": "über", "below": "unter"}
_BESIDE = {"left of": "links davon", "right of": "rechts davon", "above": "darüber", "below": "darunter"}
_NUMBERS = ("keine", "eine", "zwei", "drei")


@dataclasses.dataclass(frozen=True)
class Document:
    """A text and its language: "en", "de" or "en-de"."""

    text: str
    lang: str


@dataclasses.dataclass(frozen=True)
class _Fact:
    """One sentence in both languages, without capital and full stop."""

    english: str
    german: str


def document(seed: int, lang: str) -> Document:
    """The document of a seed: several sentences about one scene, or for "en-de" a sentence and its translation."""
    if lang not in LANGUAGES:
        raise ValueError(f"document: lang must be one of {', '.join(LANGUAGES)}, got {lang!r}")
    draws = Draws("document", lang, seed)
    scene = sample_scene(draws.below(2**62), objects=draws.choose((1, 2, 2, 3, 3)))
    facts = _facts(scene, draws)
    if lang == "en" and draws.chance(QUIZ_PERCENT):
        told = [facts[0], *draws.shuffled([*map(_texture, scene.shapes), *_distant(scene)])]
        return Document(" ".join([_sentences([fact.english for fact in told]), *quiz(scene, draws)]), lang)
    if lang == "en-de":
        fact = facts[0] if draws.chance(50) else draws.choose(facts)
        return Document(f"English: {_sentences([fact.english])} German: {_sentences([fact.german])}", lang)
    # The picture comes first or not at all; of the rest, some facts in any order.
    told = facts[:1] * draws.chance(70) + draws.shuffled(facts[1:])[: draws.between(3, 7)]
    return Document(_sentences([fact.english if lang == "en" else fact.german for fact in told]), lang)


def german_prompted_caption(scene: Scene) -> str:
    """The German counterpart of `captions.prompted_caption`; never paired with a picture for pretraining."""
    return _picture(sorted(scene.shapes, key=lambda shape: shape.x)).german


def _facts(scene: Scene, draws: Draws) -> list[_Fact]:
    """What can be said of a scene; the first is the prompted caption."""
    shapes = sorted(scene.shapes, key=lambda shape: shape.x)
    facts = [_picture(shapes), _count(len(shapes))]
    for shape in shapes:
        facts += [_there_is(shape), _texture(shape), _size(shape)]
    # Twins have no names of their own, and "the red circle is left of the red circle" teaches nothing.
    pairs = [pair for pair in itertools.permutations(shapes, 2) if _name(pair[0]) != _name(pair[1])]
    for a, b in pairs:
        facts += [_related(a, b), _therefore(a, b)] if draws.chance(60) else [_related(a, b)]
    return facts


def _picture(shapes: Sequence[Shape]) -> _Fact:
    english = f"{PROMPT} {with_article(noun(shapes[0]))}"
    german = f"{GERMAN_PROMPT} {_german(shapes[0], 'dative')}"
    for i, (before, shape) in enumerate(itertools.pairwise(shapes)):
        place = relation(shape, before)
        english += f" {('with', 'and')[i]} {with_article(noun(shape))} {PHRASES[place]} {('it', 'that')[i]}"
        german += f" {('mit', 'und')[i]} {_german(shape, 'dative')} {_BESIDE[place]}"
    return _Fact(english, german)


def _count(count: int) -> _Fact:
    if count == 1:
        return _Fact("there is one shape in the picture", "in dem Bild ist eine Form")
    return _Fact(f"there are {NUMBERS[count]} shapes in the picture", f"in dem Bild sind {_NUMBERS[count]} Formen")


def _there_is(shape: Shape) -> _Fact:
    return _Fact(f"there is {with_article(noun(shape))}", f"es gibt {_german(shape, 'accusative')}")


def _texture(shape: Shape) -> _Fact:
    return _Fact(f"the {_name(shape)} is {shape.texture}", f"{_german_name(shape)} ist {_ADJECTIVES[shape.texture]}")


def _size(shape: Shape) -> _Fact:
    return _Fact(f"the {_name(shape)} is {shape.size}", f"{_german_name(shape)} ist {_ADJECTIVES[shape.size]}")


def _distant(scene: Scene) -> list[_Fact]:
    """The relations of shapes that are no neighbours in the picture's own sentence."""
    shapes = sorted(scene.shapes, key=lambda shape: shape.x)
    return [_related(shapes[0], shapes[2])] if len(shapes) > 2 and _name(shapes[0]) != _name(shapes[2]) else []


def _related(a: Shape, b: Shape) -> _Fact:
    place = relation(a, b)
    return _Fact(
        f"the {_name(a)} is {PHRASES[place]} the {_name(b)}",
        f"{_german_name(a)} ist {_PLACES[place]} {_german_name(b, 'dative')}",
    )


def _therefore(a: Shape, b: Shape) -> _Fact:
    """A relation and its inverse, which no single sentence shows to be the same."""
    place = relation(a, b)
    forth = _related(a, b)
    return _Fact(
        f"{forth.english}, so the {_name(b)} is {PHRASES[OPPOSITE[place]]} the {_name(a)}",
        f"{forth.german}, also ist {_german_name(b)} {_PLACES[OPPOSITE[place]]} {_german_name(a, 'dative')}",
    )


def _name(shape: Shape) -> str:
    return noun(shape, ("colour", "kind"))


def _german_name(shape: Shape, case: str = "nominative") -> str:
    return _declined(shape, ("colour",), case, _DEFINITE)


def _german(shape: Shape, case: str) -> str:
    return _declined(shape, ("size", "colour"), case, _INDEFINITE)


def _declined(shape: Shape, said: Sequence[str], case: str, articles: _Articles) -> str:
    article, ending = articles[case][shape.kind in _NEUTER]
    adjectives = [_ADJECTIVES[getattr(shape, word)] + ending for word in said]
    kind = "Herzen" if shape.kind == "heart" and case == "dative" else _KINDS[shape.kind]
    return " ".join([article, *adjectives, kind])


def _sentences(facts: Sequence[str]) -> str:
    return " ".join(fact[0].upper() + fact[1:] + "." for fact in facts)


GERMAN_WORDS = frozenset(
    word.lower()
    for words in (
        _KINDS.values(),
        [stem + ending for stem in _ADJECTIVES.values() for ending in ("", "e", "en", "er", "es")],
        (
            "ein",
            "einen",
            "einem",
            "der",
            "das",
            "dem",
            "bild",
            "von",
            "mit",
            "und",
            "ist",
            "sind",
            "es",
            "gibt",
            "also",
        ),
        [word for phrase in (*_PLACES.values(), *_BESIDE.values()) for word in phrase.split()],
    )
    for word in words
) - {"ring", "in"}
"""Words that show a text to be German: no English text of the world holds one ("ring" is both)."""
