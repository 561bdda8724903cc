"""What the world's documents ask and answer is so: every question is answered again from the scene."""

from __future__ import annotations

import re

import pytest

from simvlm.data.captions import NUMBERS, PHRASES
from simvlm.data.draws import Draws
from simvlm.data.quiz import ATTRIBUTES, quiz
from simvlm.data.scenes import HELD_OUT, KINDS, relation, sample_scene

K, C = "|".join(KINDS), "|".join(ATTRIBUTES["colour"])
NAME = rf"(?:(?:{C}) )?(?:{K})"
PLACE = "|".join(PHRASES.values())


def found(scene, name):
    """The shapes that a name fits: "star", "red star"."""
    *colour, kind = name.split()
    return [x for x in scene.shapes if x.kind == kind and (not colour or x.colour == colour[0])]


def one(scene, name):
    (shape,) = found(scene, name)
    return shape


def placed(scene, a, place, b):
    return PHRASES[relation(one(scene, a), one(scene, b))] == place


def judged(scene, kind, value):
    """True, false, or None where the scene has no such shape."""
    shapes = found(scene, kind)
    return None if not shapes else any(getattr(one(scene, kind), name) == value for name in ATTRIBUTES)


ANSWERS = (
    (
        rf"(?:What colour is|Which colour has) the ({K})\?|The ({K}) has what colour\?",
        lambda s, a, b: one(s, a or b).colour,
    ),
    (rf"Is the ({K}) small or large\?|How large is the ({K})\?", lambda s, a, b: one(s, a or b).size),
    (rf"What pattern has the ({K})\?|Is the ({K}) plain, striped or dotted\?", lambda s, a, b: one(s, a or b).texture),
    (rf"What shape is ({C})\?|Which shape is the ({C}) one\?|What is ({C})\?", lambda s, *c: by_colour(s, *c)),
    (r"How many shapes(?: are there)?\?", lambda s: NUMBERS[len(s.shapes)]),
    (rf"How many ({K})(?:es|s) are there\?", lambda s, k: NUMBERS[len(found(s, k))].replace("no", "none")),
    (rf"(?:Is there|Do you see) an? ((?:{C}) (?:{K}))\?", lambda s, n: "yes" if found(s, n) else "no"),
    (rf"Is the ({NAME}) ({PLACE}) the ({NAME})\?", lambda s, a, p, b: "yes" if placed(s, a, p, b) else "no"),
)


def by_colour(scene, *colours):
    (shape,) = (x for x in scene.shapes if x.colour == next(filter(None, colours)))
    return shape.kind


def check(scene, text):
    """Which pattern a question or statement is of; fails if its answer is not so."""
    if (match := re.fullmatch(rf"The ({K}) is (\w+): (\w+)\.", text)) is not None:
        verdict = {True: ("true", "yes"), False: ("false", "no"), None: ("unknown", "maybe")}
        assert match[3] in verdict[judged(scene, match[1], match[2])], text
        return "statement"
    if (match := re.fullmatch(rf"The ({K}) is ({PLACE}) the ({K}): (\w+)\.", text)) is not None:
        assert match[4] in (("true", "yes") if placed(scene, match[1], match[2], match[3]) else ("false", "no")), text
        return "relation"
    if (match := re.fullmatch(rf"What is ({PLACE}) the ({NAME})\? An? ({NAME})\.", text)) is not None:
        assert placed(scene, match[3], match[1], match[2]), text
        return "neighbour"
    for pattern, answer in ANSWERS:
        if (match := re.fullmatch(rf"(?:{pattern}) (?:The |A )?(\w+)\.", text)) is not None:
            *asked, said = match.groups()
            assert said.lower() == answer(scene, *asked), text
            return pattern
    pytest.fail(f"an unknown question: {text}")


def test_every_answer_is_so():
    kinds = {check(scene, text) for scene, texts in quizzes(1500) for text in texts}
    assert len(kinds) == len(ANSWERS) + 3


def test_answers_are_not_always_the_same():
    said = [
        text.rsplit(" ", 1)[1] for _, texts in quizzes(500) for text in texts if text.startswith(("Is the", "Is there"))
    ]
    yes = sum(word == "Yes." for word in said) / sum(word in ("Yes.", "No.") for word in said)
    assert 0.35 < yes < 0.75


def test_no_question_says_that_a_held_out_combination_is_there():
    for _, texts in quizzes(500):
        assert not [text for text in texts for kind, colour in HELD_OUT if f"{colour} {kind}" in text]


def quizzes(count):
    for seed in range(count):
        scene = sample_scene(seed, objects=1 + seed % 3)
        yield scene, quiz(scene, Draws("test quiz", seed))
