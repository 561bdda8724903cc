"""Texts first, then scenes that fit: how a benchmark of the generated world tells a blind model nothing.

A query is a text with the answers that are plausible for it. It is asked in rounds: each round finds one scene for each
of its answers. So in every split every text has each of its answers equally often, and whoever sees the text alone is
right one time in as many as there are answers, whatever was learnt from another split.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from simvlm.data.draws import Draws
from simvlm.data.scenes import Scene

_PATIENCE = 40
"""queries of one type in a row that find no scenes before the type is given up"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Query:
    """A text about a scene.

    Attributes:
        group: its type.
        text: the question or hypothesis.
        answers: what a round of it needs, each from another scene; an answer may be listed twice.
        answer: that of a scene; None where the text cannot be asked.
    """

    group: str
    text: str
    answers: tuple[str, ...]
    answer: Callable[[Scene], str | None]


Asked = list[tuple[Query, str]]
"""the queries of one scene with its answers"""


def ask_in_rounds(
    scenes: Sequence[Scene],
    makers: Sequence[Callable[[Draws], Query]],
    draws: Draws,
    *,
    per_scene: int,
    most: int | None = None,
) -> list[Asked]:
    """Queries of every scene, in whole rounds.

    Args:
        scenes: to ask about.
        makers: draw a query each; the type with the fewest queries so far is next.
        draws: of everything.
        per_scene: queries of a scene at the most, all of different texts.
        most: stop after so many queries, or as soon as the round is whole.
    """
    asked: list[Asked] = [[] for _ in scenes]
    # Those that can be asked more, in no order.
    left = list(range(len(scenes)))
    done, misses = [0] * len(makers), [0] * len(makers)
    while most is None or sum(done) < most:
        turn = min((i for i in range(len(makers)) if misses[i] < _PATIENCE), key=done.__getitem__, default=None)
        if turn is None:
            break
        query = makers[turn](draws)
        found = _one_of_each(query, scenes, asked, left, draws)
        if found is None:
            misses[turn] += 1
            continue
        misses[turn] = 0
        done[turn] += len(found)
        for place, answer in found:
            asked[left[place]].append((query, answer))
        for place, _ in sorted(found, reverse=True):
            if len(asked[left[place]]) == per_scene:
                left[place] = left[-1]
                left.pop()
    return asked


def _one_of_each(
    query: Query, scenes: Sequence[Scene], asked: Sequence[Asked], left: Sequence[int], draws: Draws
) -> list[tuple[int, str]] | None:
    """For each answer a place of `left` whose scene has it; None if there is not one for each."""
    if not left:
        return None
    wanted = list(query.answers)
    found = []
    start = draws.below(len(left))
    for step in range(len(left)):
        place = (start + step) % len(left)
        answer = query.answer(scenes[left[place]])
        if answer in wanted and all(query.text != other.text for other, _ in asked[left[place]]):
            wanted.remove(answer)
            found.append((place, answer))
            if not wanted:
                return found
    return None


def only(scene: Scene, **said: str) -> int | None:
    """The index of the only shape with these attributes; None if there are none or several."""
    fitting = [
        i for i, shape in enumerate(scene.shapes) if all(getattr(shape, name) == value for name, value in said.items())
    ]
    return fitting[0] if len(fitting) == 1 else None
