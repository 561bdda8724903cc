"""Beam search without a framework: who lives, who has finished, when an item is done (Wu et al. 2016, eq. 14).

    score = Σ ln p / ((5 + len) / 6)^0.6,    the end counted in len

A hypothesis is finished when its end is among the K best continuations. An item is done when no live one can still beat
the best that has finished: Σ ln p only falls, so its score is at most Σ ln p / ((5 + max_len) / 6)^0.6. K finished ones
do not end it: where a model is sure of a text, ends that it hardly believes in are among the K best at every step. At
the length limit the live ones stand as they are. Ties go to the lowest id. A beam of one is greedy search. What a text
has to begin with is no choice: it counts in len, and not in Σ ln p.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from simvlm.model.items import BOS, EOS, PAD

ALPHA = 0.6

Continuations = tuple[np.ndarray, np.ndarray, np.ndarray]
"""The 2K best of each of n items, best first, of equals the lowest (parent, token) first: Σ ln p, parent, token, each
[n, 2K]; a parent is counted within its item."""
Best = Callable[[list[int], int, list[int] | None, list[float]], Continuations]
"""Of n·K hypotheses: their last tokens, how many came before, the hypotheses of the last step that they go on from
(None: themselves), their Σ ln p."""


@dataclasses.dataclass(frozen=True)
class Generated:
    """One text: its ids without the end, its normalized log-probability, and whether it ended before the limit."""

    tokens: tuple[int, ...]
    score: float
    finished: bool


def beam_search(best: Best, count: int, beam: int, max_len: int, begin: Sequence[int] = ()) -> list[Generated]:
    """The best hypothesis of each of `count` items, of those that begin with these tokens."""
    searches = [_Search(beam, max_len) for _ in range(count)]
    tokens, parents = [BOS] * (count * beam), None
    for time in range(max_len):
        found = best(tokens, time, parents, [score for search in searches for score in search.scores])
        if time < len(begin):
            for search in searches:
                search.begin_with(begin[time])
            tokens = [begin[time]] * (count * beam)
            continue
        for search, *row in zip(searches, *(part.tolist() for part in found), strict=True):
            search.advance(list(zip(*row, strict=True)))
        if all(search.done for search in searches):
            break
        tokens = [token for search in searches for token in search.last]
        if beam > 1:
            parents = [item * beam + parent for item, search in enumerate(searches) for parent in search.parents]
    return [search.best() for search in searches]


class _Search:
    """One item's hypotheses, on the host: those that are live, and the best that has finished."""

    def __init__(self, beam: int, max_len: int) -> None:
        self.beam, self.max_len = beam, max_len
        self.done = False
        self.finished: Generated | None = None
        # At first all beams are the same: one of them may go on.
        self.scores = [0.0] + [-math.inf] * (beam - 1)
        self.texts: list[tuple[int, ...]] = [()] * beam
        self.parents = list(range(beam))

    @property
    def last(self) -> list[int]:
        return [text[-1] if text else PAD for text in self.texts]

    def begin_with(self, token: int) -> None:
        self.texts = [(*text, token) for text in self.texts]

    def advance(self, candidates: list[tuple[float, int, int]]) -> None:
        """Takes the 2K best (Σ ln p, parent, token), best first."""
        if self.done:
            self.parents = list(range(self.beam))
            return
        live: list[tuple[float, int, tuple[int, ...]]] = []
        for rank, (value, parent, token) in enumerate(candidates):
            text = self.texts[parent]
            if token == EOS:
                score = value / norm(len(text) + 1)
                if rank < self.beam and score > (-math.inf if self.finished is None else self.finished.score):
                    self.finished = Generated(text, score, True)
            elif len(live) < self.beam:
                live.append((value, parent, (*text, token)))
        self.scores = [value for value, _, _ in live]
        self.parents = [parent for _, parent, _ in live]
        self.texts = [text for _, _, text in live]
        if self.finished is not None:
            self.done = self.beam == 1 or self.finished.score >= max(self.scores) / norm(self.max_len)

    def best(self) -> Generated:
        texts = [] if self.finished is None else [self.finished]
        if not self.done:
            texts += [
                Generated(text, value / norm(len(text)), False)
                for value, text in zip(self.scores, self.texts, strict=True)
            ]
        return max(texts, key=lambda text: text.score)  # the first of equals


def norm(length: int) -> float:
    return ((5 + length) / 6) ** ALPHA
