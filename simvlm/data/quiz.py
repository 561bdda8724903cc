"""Texts that ask about a scene which they describe, and answer: questions and true-or-false, in words alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from simvlm.data.captions import NUMBERS, PHRASES, noun, plural, with_article
from simvlm.data.draws import Draws
from simvlm.data.scenes import COLOURS, KINDS, SEEN, SIZES, TEXTURES, Scene, Shape, relation

ATTRIBUTES = {"colour": tuple(COLOURS), "size": tuple(SIZES), "texture": TEXTURES}


def quiz(scene: Scene, draws: Draws) -> list[str]:
    """Some questions with their answers, and statements that are judged; each is "Question? Answer."."""
    makers: list[Callable[[Scene, Draws], str | None]] = [_attribute, _kind, _count, _exists, _neighbour, _place]
    asked = [draws.choose(makers)(scene, draws) for _ in range(draws.between(4, 8))]
    judged = [_statement(scene, draws) for _ in range(draws.between(0, 4))]
    return draws.shuffled(list(dict.fromkeys(filter(None, [*asked, *judged]))))


def _attribute(scene: Scene, draws: Draws) -> str | None:
    shape, name = _one_of_its_kind(scene, draws), draws.choose(tuple(ATTRIBUTES))
    if shape is None:
        return None
    asks = {
        "colour": ("What colour is the {}?", "Which colour has the {}?", "The {} has what colour?"),
        "size": ("Is the {} small or large?", "How large is the {}?"),
        "texture": ("What pattern has the {}?", "Is the {} plain, striped or dotted?"),
    }
    return f"{draws.choose(asks[name]).format(shape.kind)} {getattr(shape, name).capitalize()}."


def _kind(scene: Scene, draws: Draws) -> str | None:
    alone = [shape for shape in scene.shapes if sum(other.colour == shape.colour for other in scene.shapes) == 1]
    if not alone:
        return None
    shape = draws.choose(alone)
    ask = draws.choose(("What shape is {}?", "Which shape is the {} one?", "What is {}?"))
    return f"{ask.format(shape.colour)} {draws.choose(('The ', 'A ', ''))}{shape.kind}."


def _count(scene: Scene, draws: Draws) -> str:
    if draws.chance(50):
        return f"{draws.choose(('How many shapes are there?', 'How many shapes?'))} {NUMBERS[len(scene.shapes)]}."
    kind = draws.choose([*(shape.kind for shape in scene.shapes), *KINDS[:2]])
    count = sum(shape.kind == kind for shape in scene.shapes)
    return f"How many {plural(kind)} are there? {(NUMBERS[count] if count else 'none').capitalize()}."


def _exists(scene: Scene, draws: Draws) -> str:
    kind, colour = draws.choose(SEEN)
    if draws.chance(50):
        shape = draws.choose(scene.shapes)
        kind, colour = shape.kind, shape.colour
    found = any((shape.kind, shape.colour) == (kind, colour) for shape in scene.shapes)
    ask = draws.choose(("Is there {}?", "Do you see {}?"))
    return f"{ask.format(with_article(f'{colour} {kind}'))} {'Yes' if found else 'No'}."


def _neighbour(scene: Scene, draws: Draws) -> str | None:
    pair = _pair(scene, draws)
    if pair is None or len(scene.shapes) != 2:  # of three, two may be above the other
        return None
    a, b = pair
    said = draws.choose((("kind",), ("colour", "kind")))
    ask = f"What is {PHRASES[relation(a, b)]} the {noun(b, said)}?"
    return f"{ask} {with_article(noun(a, said)).capitalize()}."


def _place(scene: Scene, draws: Draws) -> str | None:
    pair = _pair(scene, draws)
    if pair is None:
        return None
    a, b = pair
    place = draws.choose(tuple(PHRASES))
    said = draws.choose((("kind",), ("colour", "kind")))
    if draws.chance(50):
        place = relation(a, b)
    answer = "Yes" if place == relation(a, b) else "No"
    return f"Is the {noun(a, said)} {PHRASES[place]} the {noun(b, said)}? {answer}."


def _statement(scene: Scene, draws: Draws) -> str | None:
    """A sentence and whether it is so; of a shape that the scene does not have nobody knows."""
    words = draws.choose((("true", "false", "unknown"), ("yes", "no", "maybe")))
    if draws.chance(25):
        kinds = {shape.kind for shape in scene.shapes}
        kind = draws.choose([kind for kind in KINDS if kind not in kinds])
        name = draws.choose(tuple(ATTRIBUTES))
        return f"The {kind} is {draws.choose(ATTRIBUTES[name])}: {words[2]}."
    pair = _pair(scene, draws)
    if pair is not None and draws.chance(40):
        a, b = pair
        place = relation(a, b) if draws.chance(50) else draws.choose(tuple(PHRASES))
        verdict = words[place != relation(a, b)]
        return f"The {a.kind} is {PHRASES[place]} the {b.kind}: {verdict}."
    shape, name = _one_of_its_kind(scene, draws), draws.choose(tuple(ATTRIBUTES))
    if shape is None:
        return None
    true = getattr(shape, name)
    value = true if draws.chance(50) else draws.choose(ATTRIBUTES[name])
    return f"The {shape.kind} is {value}: {words[value != true]}."


def _one_of_its_kind(scene: Scene, draws: Draws) -> Shape | None:
    alone = [shape for shape in scene.shapes if sum(other.kind == shape.kind for other in scene.shapes) == 1]
    return draws.choose(alone) if alone else None


def _pair(scene: Scene, draws: Draws) -> tuple[Shape, Shape] | None:
    """Two shapes that their kinds tell apart."""
    shapes: Sequence[Shape] = draws.shuffled(scene.shapes)[:2]
    if len(shapes) < 2 or sum(shape.kind in (shapes[0].kind, shapes[1].kind) for shape in scene.shapes) > 2:
        return None
    return (shapes[0], shapes[1]) if shapes[0].kind != shapes[1].kind else None
