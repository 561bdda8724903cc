"""VQA's rules against the official evaluation's words, intervals against what they should cover, and chance level."""

from __future__ import annotations

import math

import numpy as np
import pytest

from simvlm.tasks.metrics import (
    Interval,
    bootstrap,
    by_group,
    chance_warning,
    vqa_normalise,
    vqa_soft_score,
)

# Left: an answer; right: what the official vqaEval.py makes of it.
NORMALISED = {
    # The examples of visualqa.org/evaluation.
    "dont": "don't",
    "girl's": "girl's",
    "2:50 pm": "2:50 pm",
    "100,978": "100978",
    # Its rules, one by one.
    "Blue": "blue",
    "end.": "end",
    "3.5": "3.5",
    "three point five": "3 point 5",
    "none": "0",
    "ten": "10",
    "eleven": "eleven",
    "the dog and a cat": "dog and cat",
    "theatre": "theatre",
    "black/white": "black white",
    "t-shirt": "t shirt",
    "yes!": "yes",
    " two\n\tdogs ": "2 dogs",
    # A mark beside a space anywhere goes everywhere; a comma between digits lets all marks go.
    "x-y - z": "xy z",
    "yes, no": "yes no",
    "yes,no": "yes no",
    "1,000 x-y": "1000 xy",
    # Contractions, each with one apostrophe missing; the odd one of the table; one that the table's capitals hide.
    "couldntve": "couldntve",
    "couldnt've": "couldn't've",
    "couldn'tve": "couldn't've",
    "twas": "'twas",
    "Whats": "what's",
    "somebody'd": "somebodyd",
    "Im": "im",
    "lets": "lets",
    # Number words and articles go before contractions are looked up, punctuation before both.
    "The isnt.": "isn't",
    "": "",
    "a": "",
}


@pytest.mark.parametrize("answer", NORMALISED)
def test_vqa_normalisation_is_the_official_one(answer):
    assert vqa_normalise(answer) == NORMALISED[answer]


def test_vqa_periods_stop_going_after_the_official_count():
    assert vqa_normalise("x" + ". " * 33 + "y") == "x . y"


@pytest.mark.parametrize(("matches", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_soft_score_leaves_each_annotator_out(matches, score):
    answers = ["two"] * matches + ["three"] * (10 - matches)
    assert vqa_soft_score("two", answers) == pytest.approx(score)


def test_vqa_answers_are_normalised_only_where_annotators_differ():
    assert vqa_soft_score("2", ["two"] * 10) == 0
    assert vqa_soft_score(" two\n", ["two"] * 10) == 1
    assert vqa_soft_score("2", ["two"] * 9 + ["The two."]) == 1
    assert vqa_soft_score("Two", ["two"] * 3 + ["a dog"] * 7) == pytest.approx(0.9)


def test_vqa_question_without_answers():
    with pytest.raises(ValueError, match="vqa_soft_score: answers must be the annotators', got none"):
        vqa_soft_score("yes", [])


def test_bootstrap_of_a_coin_is_the_binomial_interval():
    values = [1.0] * 300 + [0.0] * 700
    interval = bootstrap(values)
    assert (interval.value, interval.n) == (0.3, 1000)
    spread = 1.96 * math.sqrt(0.3 * 0.7 / 1000)
    assert interval.low == pytest.approx(0.3 - spread, abs=0.003)
    assert interval.high == pytest.approx(0.3 + spread, abs=0.003)
    assert bootstrap(values) == interval
    assert bootstrap(values, seed=1) != interval


def test_bootstrap_of_many_values_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    intervals = [bootstrap(rng.exponential(size=60), seed=trial) for trial in range(200)]
    covered = np.mean([interval.low <= 1 <= interval.high for interval in intervals])
    # 95 % for a normal mean; a percentile interval of 60 skewed values covers a little less.
    assert 0.88 < covered < 0.98


def test_bootstrap_draws_in_parts(monkeypatch):
    values = np.random.default_rng(0).standard_normal(50)
    whole = bootstrap(values)
    monkeypatch.setattr("simvlm.tasks.metrics._DRAWS_AT_ONCE", 70)
    parts = bootstrap(values)
    assert (parts.low, parts.high) == pytest.approx((whole.low, whole.high), rel=1e-12)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], r"values must be a row of one or more numbers, got shape \[0\]"),
        ([[1.0]], r"got shape \[1, 1\]"),
        ([0.0, math.nan], "values must be finite, got nan at 1"),
    ],
)
def test_bootstrap_refuses(values, message):
    with pytest.raises(ValueError, match=message):
        bootstrap(values)


def test_by_group():
    groups = by_group([1, 0, 1, 1], ["out", "in", "out", "in"])
    assert list(groups) == ["in", "out"]
    assert groups["in"] == bootstrap([0, 1])
    assert (groups["out"].value, groups["out"].n) == (1, 2)
    with pytest.raises(ValueError, match="by_group: groups must be one for each of 2 values, got 1"):
        by_group([1, 0], ["in"])


def test_a_warning_where_the_interval_reaches_chance():
    assert chance_warning(Interval(0.6, 0.51, 0.7, 40), 0.5) is None
    reached = chance_warning(Interval(0.6, 0.5, 0.7, 40), 0.5)
    assert reached is not None
    assert "0.600 is not above chance" in reached
    assert "0.500 to 0.700 over 40 items" in reached
    assert chance_warning(Interval(0.2, 0.1, 0.3, 40), 0.5) is not None
