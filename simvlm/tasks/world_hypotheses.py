"""Hypotheses about scenes of the generated world, and texts that say all that the hypotheses are about.

A hypothesis is about the only shape of a kind or colour. It is entailed if so, contradicted if not so, and neutral of a
scene without that shape.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from simvlm.data.captions import PHRASES, noun, prompted_caption
from simvlm.data.draws import Draws
from simvlm.data.scenes import COLOURS, KINDS, OPPOSITE, SEEN, SIZES, TEXTURES, Scene, Shape, relation
from simvlm.tasks.nli import LABELS
from simvlm.tasks.world_balance import Asked, Query, ask_in_rounds, only

_ENTAILED, _NEUTRAL, _CONTRADICTED = LABELS


def ask_hypotheses(
    scenes: Sequence[Scene], most: int, draws: Draws, *, labels: tuple[str, ...] = LABELS, per_scene: int = 2
) -> list[Asked]:
    """Hypotheses about some of the scenes, each text with `labels` equally often; `most` in all, or a few more."""
    makers = [lambda draws, make=make: make(draws, labels) for make in _MAKERS]
    return ask_in_rounds(scenes, makers, draws, per_scene=per_scene, most=most)


def premise(scene: Scene, draws: Draws) -> str:
    """An English text that says everything about a scene without twins, in the words of the pretraining documents."""
    shapes = sorted(scene.shapes, key=lambda shape: shape.x)
    facts = [f"the {_name(shape)} is {shape.texture}" for shape in shapes]
    # The caption says the relation of neighbours.
    facts += [
        f"the {_name(a)} is {PHRASES[relation(a, b)]} the {_name(b)}"
        for a, b in itertools.combinations(shapes, 2)
        if shapes.index(b) - shapes.index(a) > 1
    ]
    return " ".join(fact[0].upper() + fact[1:] + "." for fact in (prompted_caption(scene), *draws.shuffled(facts)))


def _name(shape: Shape) -> str:
    return noun(shape, ("colour", "kind"))


def _about(text: str, labels: tuple[str, ...], name: str, value: str, **said: str) -> Query:
    """Says that the only shape with some attributes has a value of another one."""

    def answer(scene: Scene) -> str | None:
        i = only(scene, **said)
        if i is not None:
            return _ENTAILED if getattr(scene.shapes[i], name) == value else _CONTRADICTED
        twins = any(getattr(shape, key) == word for shape in scene.shapes for key, word in said.items())
        return None if twins else _NEUTRAL

    return Query(group=name, text=text, answers=labels, answer=answer)


def _draw_colour(draws: Draws, labels: tuple[str, ...]) -> Query:
    kind, colour = draws.choose(SEEN)
    return _about(f"The {kind} is {colour}.", labels, "colour", colour, kind=kind)


def _draw_kind(draws: Draws, labels: tuple[str, ...]) -> Query:
    kind, colour = draws.choose(SEEN)
    return _about(f"The {colour} shape is a {kind}.", labels, "kind", kind, colour=colour)


def _draw_size(draws: Draws, labels: tuple[str, ...]) -> Query:
    phrase, said = _draw_subject(draws)
    size = draws.choose(tuple(SIZES))
    return _about(f"The {phrase} is {size}.", labels, "size", size, **said)


def _draw_texture(draws: Draws, labels: tuple[str, ...]) -> Query:
    phrase, said = _draw_subject(draws)
    texture = draws.choose(TEXTURES)
    return _about(f"The {phrase} is {texture}.", labels, "texture", texture, **said)


def _draw_relation(draws: Draws, labels: tuple[str, ...]) -> Query:
    a, b = draws.shuffled(KINDS)[:2]
    place = draws.choose(tuple(PHRASES))

    def answer(scene: Scene) -> str | None:
        kinds = [shape.kind for shape in scene.shapes]
        if a not in kinds or b not in kinds:
            return _NEUTRAL
        if kinds.count(a) > 1 or kinds.count(b) > 1:
            return None
        found = relation(scene.shapes[kinds.index(a)], scene.shapes[kinds.index(b)])
        # A clear no: what is to the left is not asked to be above.
        return _ENTAILED if found == place else _CONTRADICTED if found == OPPOSITE[place] else None

    return Query(group="relation", text=f"The {a} is {PHRASES[place]} the {b}.", answers=labels, answer=answer)


def _draw_subject(draws: Draws) -> tuple[str, dict[str, str]]:
    if draws.chance(50):
        kind = draws.choose(KINDS)
        return kind, {"kind": kind}
    colour = draws.choose(tuple(COLOURS))
    return f"{colour} shape", {"colour": colour}


_MAKERS: tuple[Callable[[Draws, tuple[str, ...]], Query], ...] = (
    _draw_colour,
    _draw_kind,
    _draw_size,
    _draw_texture,
    _draw_relation,
)
