"""VQA's soft accuracy, accuracy, and intervals for any mean over items. Captions: caption_metrics.py."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95
_DRAWS_AT_ONCE = 1 << 20


@dataclasses.dataclass(frozen=True)
class Interval:
    """A score with its 95 % bootstrap interval.

    Attributes:
        value: of all `n` items.
        low: 2.5th percentile of the resamples.
        high: 97.5th percentile.
        n: number of items.
    """

    value: float
    low: float
    high: float
    n: int


def resampled_sums(statistics: np.ndarray, counts: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Sums of items' statistics over bootstrap resamples of the items.

    Args:
        statistics: float[U, K], the statistics of the items that differ.
        counts: int[U], how many items have each; a resample draws as many as there are in all.
        seed: of the resamples; the same seed draws the same items.

    Returns:
        float64[RESAMPLES, K].
    """
    rng = np.random.default_rng(seed)
    n, sums = int(counts.sum()), []
    rows = max(1, _DRAWS_AT_ONCE // len(counts))
    for first in range(0, RESAMPLES, rows):
        drawn = rng.multinomial(n, counts / n, size=min(rows, RESAMPLES - first))
        sums.append(drawn @ statistics)
    return np.concatenate(sums)


def percentiles(scores: np.ndarray) -> tuple[float, float]:
    """Both ends of the interval that LEVEL of the resamples' scores lie in."""
    low, high = np.quantile(scores, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def bootstrap(values: Sequence[float] | np.ndarray, *, seed: int = 0) -> Interval:
    """The mean of per-item scores, with its percentile bootstrap interval.

    Equal values give an interval without width: the bootstrap knows nothing of items that it did not see.

    Raises:
        ValueError: no values, or one that is not a finite number.
    """
    scores = np.asarray(values, np.float64)
    if scores.ndim != 1 or not scores.size:
        raise ValueError(f"bootstrap: values must be a row of one or more numbers, got shape {list(scores.shape)}")
    if not np.isfinite(scores).all():
        where = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise ValueError(f"bootstrap: values must be finite, got {scores[where]} at {where}")
    # Most scores have few values, right or wrong: drawing how often each comes is the same as drawing items, but quick.
    distinct, counts = np.unique(scores, return_counts=True)
    means = resampled_sums(distinct[:, None], counts, seed=seed)[:, 0] / scores.size
    return Interval(float(scores.mean()), *percentiles(means), scores.size)


def student(values: Sequence[float]) -> Interval:
    """The mean of a few values that each stand for a run, with Student's 95 % interval.

    Equal values give an interval without width.

    Raises:
        ValueError: fewer than two values, which tell nothing of how far runs lie apart.
    """
    from scipy import stats

    scores = np.asarray(values, np.float64)
    if scores.size < 2:
        raise ValueError(f"student: values must be at least two, got {scores.size}")
    mean = float(scores.mean())
    half = float(stats.t.ppf((1 + LEVEL) / 2, scores.size - 1) * scores.std(ddof=1) / scores.size**0.5)
    return Interval(mean, mean - half, mean + half, scores.size)


def by_group(values: Sequence[float], groups: Sequence[str], *, seed: int = 0) -> dict[str, Interval]:
    """`bootstrap` of each group's items, the groups in order of their names.

    Raises:
        ValueError: there is not one group for each value.
    """
    if len(values) != len(groups):
        raise ValueError(f"by_group: groups must be one for each of {len(values)} values, got {len(groups)}")
    members: dict[str, list[float]] = {group: [] for group in sorted(set(groups))}
    for value, group in zip(values, groups, strict=True):
        members[group].append(value)
    return {group: bootstrap(scores, seed=seed) for group, scores in members.items()}


def chance_warning(value: Interval, chance: float) -> str | None:
    """A line for a score that guessing explains: its interval reaches chance level or lies below. Else None."""
    if value.low > chance:
        return None
    return (
        f"{value.value:.3f} is not above chance: its 95 % interval, {value.low:.3f} to {value.high:.3f} over "
        f"{value.n} items, reaches the chance level {chance:.3f}"
    )


# VQA: the official evaluation's rules (vqaEval.py of github.com/GT-Vision-Lab/VQA), its slips included.

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0", **{word: str(number) for number, word in enumerate(_NUMBERS)}}
_ARTICLES = ("a", "an", "the")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGITS_AROUND_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_PERIODS = 32
"""The official code hands re.UNICODE, which is 32, to `sub` in the place of its count."""
# Each is found with any one of its apostrophes missing. "I'm", "I've" and "I'd've" lack: the official table spells them
# with a capital but looks words up in lower case, so it never finds them.
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't
needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll
why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_CONTRACTIONS = {
    word[:at] + word[at + 1 :]: word for word in _CONTRACTED.split() for at, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}


def vqa_normalise(answer: str) -> str:
    """An answer as the official VQA evaluation compares it.

    Punctuation goes, or becomes a space; periods stay only before a digit; lower case; number words become digits;
    articles go; a missing apostrophe comes back: "The dogs, dont!" is "dogs don't".
    """
    text = _single_line(answer)
    joined = _DIGITS_AROUND_COMMA.search(text) is not None
    out = text
    for mark in _PUNCTUATION:
        # All of a mark's places fare alike, and a comma between digits decides for every mark.
        beside_space = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if joined or beside_space else " ")
    out = _PERIOD.sub("", out, count=_PERIODS)
    words = [_DIGITS.get(word, word) for word in out.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_soft_score(answer: str, answers: Sequence[str]) -> float:
    """The official accuracy of one answer, in [0, 1]: min(1, matches / 3), averaged over leaving out each annotator.

    As in the official code, answers are normalised only where the annotators differ: where all say "two", "2" is wrong.

    Args:
        answer: the model's.
        answers: the annotators', ten in VQA v2.

    Raises:
        ValueError: there are no annotators' answers.
    """
    if not answers:
        raise ValueError("vqa_soft_score: answers must be the annotators', got none")
    answer, answers = _single_line(answer), [_single_line(other) for other in answers]
    if len(set(answers)) > 1:
        answer, answers = vqa_normalise(answer), [vqa_normalise(other) for other in answers]
    same = [other == answer for other in answers]
    matches = sum(same)
    return sum(min(1.0, (matches - left_out) / 3) for left_out in same) / len(same)


def _single_line(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()
