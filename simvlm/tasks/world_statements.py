"""NLVR2's statements about two pictures of the generated world, each with two true pairs and two false ones.

The paper's classifier adds up what it sees in either picture, so no statement needs an exclusive or ("exactly one").
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from simvlm.data.captions import NUMBERS, PHRASES, with_article
from simvlm.data.draws import Draws
from simvlm.data.scenes import KINDS, OPPOSITE, SEEN, Scene, relation
from simvlm.tasks.world_balance import only

PAIRS = 4
"""of each statement, half of them true"""
_COUNTS = (1, 2, 3)
_PATIENCE = 200

Test = Callable[[Scene], bool]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Statement:
    """A text and what the left and the right picture must be to make it true, or false, in every way in turn."""

    text: str
    true: tuple[tuple[Test, Test], ...]
    false: tuple[tuple[Test, Test], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judged:
    """A statement about two scenes, left and right, by their index."""

    text: str
    left: int
    right: int
    true: bool


def state(scenes: Sequence[Scene], sets: int, draws: Draws) -> list[list[Judged]]:
    """`sets` statements, each of four pairs in any order; no scene is used twice.

    Raises:
        ValueError: there are too few scenes.
    """
    left = list(range(len(scenes)))
    found: list[list[Judged]] = []
    misses = 0
    while len(found) < sets:
        statement = _MAKERS[len(found) % len(_MAKERS)](draws)
        pairs = _pairs(statement, scenes, left, draws)
        if pairs is None:
            misses += 1
            if misses == _PATIENCE:
                raise ValueError(f"state: scenes must be enough for {sets} statements, got {len(scenes)}")
            continue
        misses = 0
        found.append(draws.shuffled(pairs))
    return found


def _pairs(statement: Statement, scenes: Sequence[Scene], left: list[int], draws: Draws) -> list[Judged] | None:
    taken: list[int] = []
    pairs = []
    for true, ways in ((True, statement.true), (False, statement.false)):
        # In turn, from any: what makes "both" false is as often the left picture as the right.
        first = draws.below(len(ways))
        for i in range(PAIRS // 2):
            both = []
            for test in ways[(first + i) % len(ways)]:
                place = _find(test, scenes, left, draws)
                if place is None:
                    left.extend(taken)
                    return None
                both.append(left[place])
                taken.append(left[place])
                left[place] = left[-1]
                left.pop()
            pairs.append(Judged(text=statement.text, left=both[0], right=both[1], true=true))
    return pairs


def _find(test: Test, scenes: Sequence[Scene], left: Sequence[int], draws: Draws) -> int | None:
    start = draws.below(len(left)) if left else 0
    places = ((start + step) % len(left) for step in range(len(left)))
    return next((place for place in places if test(scenes[left[place]])), None)


def _shows(kind: str, colour: str) -> tuple[Test, Test]:
    """Whether a scene shows this; whether it does not."""

    def shows(scene: Scene) -> bool:
        return any((shape.kind, shape.colour) == (kind, colour) for shape in scene.shapes)

    return shows, lambda scene: not shows(scene)


def _any(scene: Scene) -> bool:
    return True


def _count(count: int) -> Test:
    return lambda scene: len(scene.shapes) == count


def _counts(holds: Callable[[int, int], bool]) -> tuple[tuple[tuple[Test, Test], ...], tuple[tuple[Test, Test], ...]]:
    """The ways in which the numbers of shapes make something true, and false."""
    pairs = [(left, right) for left in _COUNTS for right in _COUNTS]
    true, false = ([pair for pair in pairs if holds(*pair) == wanted] for wanted in (True, False))
    return tuple((_count(a), _count(b)) for a, b in true), tuple((_count(a), _count(b)) for a, b in false)


def _draw_both(draws: Draws) -> Statement:
    kind, colour = draws.choose(SEEN)
    yes, no = _shows(kind, colour)
    text = f"There is {with_article(f'{colour} {kind}')} in both pictures."
    return Statement(text=text, true=((yes, yes),), false=((yes, no), (no, yes)))


def _draw_one(draws: Draws) -> Statement:
    kind, colour = draws.choose(SEEN)
    yes, no = _shows(kind, colour)
    text = f"There is {with_article(f'{colour} {kind}')} in at least one of the pictures."
    return Statement(text=text, true=((yes, no), (no, yes)), false=((no, no),))


def _draw_neither(draws: Draws) -> Statement:
    kind = draws.choose(KINDS)

    def yes(scene: Scene) -> bool:
        return any(shape.kind == kind for shape in scene.shapes)

    def no(scene: Scene) -> bool:
        return not yes(scene)

    return Statement(text=f"Neither picture shows a {kind}.", true=((no, no),), false=((yes, no), (no, yes)))


def _draw_each(draws: Draws) -> Statement:
    (kind, colour), (other_kind, other_colour) = draws.shuffled(SEEN)[:2]
    a, not_a = _shows(kind, colour)
    b, not_b = _shows(other_kind, other_colour)
    names = [with_article(name) for name in (f"{colour} {kind}", f"{other_colour} {other_kind}")]
    text = f"The left picture shows {names[0]} and the right one {names[1]}."
    return Statement(text=text, true=((a, b),), false=((a, not_b), (not_a, b)))


def _draw_more(draws: Draws) -> Statement:
    more = draws.chance(50)
    true, false = _counts(lambda left, right: left > right if more else left < right)
    text = f"The left picture shows {'more' if more else 'fewer'} shapes than the right one."
    return Statement(text=text, true=true, false=false)


def _draw_total(draws: Draws) -> Statement:
    least = draws.between(3, 5)
    true, false = _counts(lambda left, right: left + right >= least)
    numbers = (*NUMBERS, "four", "five")
    return Statement(text=f"There are at least {numbers[least]} shapes in the two pictures.", true=true, false=false)


def _draw_relation(draws: Draws) -> Statement:
    side = draws.below(2)
    a, b = draws.shuffled(KINDS)[:2]
    place = draws.choose(tuple(PHRASES))

    def is_there(where: str) -> Test:
        def test(scene: Scene) -> bool:
            i, j = only(scene, kind=a), only(scene, kind=b)
            return i is not None and j is not None and relation(scene.shapes[i], scene.shapes[j]) == where

        return test

    def pair(test: Test) -> tuple[Test, Test]:
        return (_any, test) if side else (test, _any)

    text = f"In the {('left', 'right')[side]} picture the {a} is {PHRASES[place]} the {b}."
    return Statement(text=text, true=(pair(is_there(place)),), false=(pair(is_there(OPPOSITE[place])),))


_MAKERS: tuple[Callable[[Draws], Statement], ...] = (
    _draw_both,
    _draw_one,
    _draw_neither,
    _draw_each,
    _draw_more,
    _draw_total,
    _draw_relation,
)
