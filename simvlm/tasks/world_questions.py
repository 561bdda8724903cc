"""VQA's questions about the generated world: eight types, ten answers each with the noise that annotators make."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence

from simvlm.data.captions import PHRASES, plural, with_article
from simvlm.data.draws import Draws
from simvlm.data.scenes import COLOURS, KINDS, OPPOSITE, SEEN, SIZES, TEXTURES, Scene, relation
from simvlm.tasks.vqav2 import ANSWERS
from simvlm.tasks.world_balance import Asked, Query, ask_in_rounds, only

PER_PICTURE = 3
SYNONYMS = {
    "yes": "yeah",
    "purple": "violet",
    "large": "big",
    "small": "little",
    "plain": "solid",
    "striped": "stripes",
    "dotted": "dots",
    "ring": "donut",
    "cross": "plus",
    "moon": "crescent",
    "1": "one",
    "2": "two",
    "3": "three",
}
_SYNONYM_PERCENT, _SLIP_PERCENT, _NOISY = 8, 3, 3
"""of one annotator; at most so many of ten say anything but the truth"""
_YES_NO = ("no", "yes")


def ask_questions(scenes: Sequence[Scene], draws: Draws) -> list[Asked]:
    """Three questions about every scene (a few scenes may have two), each text with all its answers equally often."""
    asked = ask_in_rounds(scenes, _MAKERS, draws, per_scene=PER_PICTURE)
    _fill_up(scenes, asked, draws)
    return asked


def ten_answers(query: Query, answer: str, draws: Draws) -> list[str]:
    """What ten annotators say: the truth at least seven times, else a synonym or a slip."""
    others = [other for other in query.answers if other != answer]
    answers = []
    noisy = 0
    for _ in range(ANSWERS):
        lot = draws.below(100)
        said = answer
        if noisy < _NOISY and lot < _SYNONYM_PERCENT:
            said = SYNONYMS.get(answer, answer)
        elif noisy < _NOISY and lot < _SYNONYM_PERCENT + _SLIP_PERCENT:
            said = draws.choose(others)
        noisy += said != answer
        answers.append(said)
    return answers


def answer_type(query: Query) -> str:
    """As the official annotations have it: "yes/no", "number" or "other"."""
    return "yes/no" if query.answers == _YES_NO else "number" if query.group == "how many" else "other"


def _exists(kind: str, colour: str) -> Query:
    def answer(scene: Scene) -> str:
        return _YES_NO[any((shape.kind, shape.colour) == (kind, colour) for shape in scene.shapes)]

    text = f"Is there {with_article(f'{colour} {kind}')}?"
    return Query(group="is there", text=text, answers=_YES_NO, answer=answer)


def _attribute(group: str, text: str, name: str, answers: tuple[str, ...], **said: str) -> Query:
    """Asks for one attribute of the only shape with some others; answers are never held-out combinations."""

    def answer(scene: Scene) -> str | None:
        i = only(scene, **said)
        return None if i is None else getattr(scene.shapes[i], name)

    return Query(group=group, text=text, answers=answers, answer=answer)


def _draw_exists(draws: Draws) -> Query:
    return _exists(*draws.choose(SEEN))


def _draw_colour(draws: Draws) -> Query:
    kind = draws.choose(KINDS)
    answers = tuple(colour for seen, colour in SEEN if seen == kind)
    return _attribute("what colour", f"What colour is the {kind}?", "colour", answers, kind=kind)


def _draw_kind(draws: Draws) -> Query:
    colour = draws.choose(tuple(COLOURS))
    answers = tuple(kind for kind, seen in SEEN if seen == colour)
    return _attribute("what shape", f"What shape is {colour}?", "kind", answers, colour=colour)


def _draw_size(draws: Draws) -> Query:
    kind = draws.choose(KINDS)
    return _attribute("small or large", f"Is the {kind} small or large?", "size", tuple(SIZES), kind=kind)


def _draw_pattern(draws: Draws) -> Query:
    kind = draws.choose(KINDS)
    return _attribute("what pattern", f"What pattern has the {kind}?", "texture", TEXTURES, kind=kind)


def _draw_count(draws: Draws) -> Query:
    if draws.chance(50):
        return Query(
            group="how many",
            text="How many shapes are there?",
            answers=("1", "2", "3"),
            answer=lambda scene: str(len(scene.shapes)),
        )
    kind = draws.choose(KINDS)

    def answer(scene: Scene) -> str:
        return str(sum(shape.kind == kind for shape in scene.shapes))

    text = f"How many {plural(kind)} are there?"
    return Query(group="how many", text=text, answers=("0", "1", "2"), answer=answer)


def _draw_relation(draws: Draws) -> Query:
    a, b = draws.shuffled(KINDS)[:2]
    place = draws.choose(tuple(PHRASES))

    def answer(scene: Scene) -> str | None:
        i, j = only(scene, kind=a), only(scene, kind=b)
        if i is None or j is None:
            return None
        # A clear no: above is not asked of what is to the left.
        found = relation(scene.shapes[i], scene.shapes[j])
        return "yes" if found == place else "no" if found == OPPOSITE[place] else None

    return Query(group="is the", text=f"Is the {a} {PHRASES[place]} the {b}?", answers=_YES_NO, answer=answer)


def _draw_neighbour(draws: Draws) -> Query:
    """What is beside the only shape of a kind, or of a colour."""
    place = draws.choose(tuple(PHRASES))
    name = draws.choose(("kind", "colour"))
    value = draws.choose(KINDS if name == "kind" else tuple(COLOURS))
    phrase = value if name == "kind" else f"{value} shape"

    def answer(scene: Scene) -> str | None:
        i = only(scene, **{name: value})
        if i is None:
            return None
        there = [
            shape.kind for j, shape in enumerate(scene.shapes) if j != i and relation(shape, scene.shapes[i]) == place
        ]
        return there[0] if len(there) == 1 else None

    answers = tuple(kind for kind in KINDS if kind != value)
    return Query(group="what is", text=f"What is {PHRASES[place]} the {phrase}?", answers=answers, answer=answer)


_MAKERS: tuple[Callable[[Draws], Query], ...] = (
    _draw_exists,
    _draw_colour,
    _draw_kind,
    _draw_count,
    _draw_relation,
    _draw_neighbour,
    _draw_size,
    _draw_pattern,
)


def _fill_up(scenes: Sequence[Scene], asked: list[Asked], draws: Draws) -> None:
    """Pairs of scenes that lack a question are asked for a shape that one of them shows and the other does not."""
    lacking = collections.deque(
        draws.shuffled([i for i, queries in enumerate(asked) for _ in range(PER_PICTURE - len(queries))])
    )
    # A scene may stand there several times, and with itself it makes no pair: each is tried with every other once.
    failures = 0
    while len(lacking) > 1 and failures < len(lacking):
        first = lacking.popleft()
        for _ in range(len(lacking)):
            second = lacking.popleft()
            if _ask_both(scenes, asked, first, second, draws):
                failures = 0
                break
            lacking.append(second)
        else:
            lacking.append(first)
            failures += 1


def _ask_both(scenes: Sequence[Scene], asked: list[Asked], first: int, second: int, draws: Draws) -> bool:
    for shape in draws.shuffled(scenes[first].shapes + scenes[second].shapes):
        query = _exists(shape.kind, shape.colour)
        answers = [query.answer(scenes[i]) for i in (first, second)]
        new = all(query.text != other.text for i in (first, second) for other, _ in asked[i])
        if new and set(answers) == set(_YES_NO):
            for i, answer in zip((first, second), answers, strict=True):
                asked[i].append((query, str(answer)))
            return True
    return False
