"""Random choices that are the same on every machine and in every version of numpy.

`numpy.random.Generator` may change its methods between versions; the raw words of a bit generator never change. So
every choice of the data layer is made from the words of a Philox stream whose key is a hash of what the choice is for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")


class _Key(np.random.bit_generator.ISeedSequence):
    """What Philox takes as its key, as it is: with `Philox(key=…)` numpy would first gather entropy that nobody reads,
    which takes longer than all the rest."""

    def __init__(self, digest: bytes) -> None:
        self._words = np.frombuffer(digest, "<u8").astype(np.uint64)

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray:
        assert n_words == len(self._words)
        assert dtype == np.uint64
        return self._words


class Draws:
    """An endless stream of choices, keyed by what they are for: `Draws("scene", "train", 17)`."""

    def __init__(self, *key: int | str) -> None:
        digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
        self._philox = np.random.Philox(_Key(digest))  # type: ignore[arg-type]  # its stub forgets ISeedSequence
        self._words: list[int] = []

    def below(self, n: int) -> int:
        """An integer of [0, n)."""
        if not self._words:
            self._words = self._philox.random_raw(64).tolist()
        return (self._words.pop() * n) >> 64

    def between(self, low: int, high: int) -> int:
        """An integer of [low, high]."""
        return low + self.below(high - low + 1)

    def chance(self, percent: int) -> bool:
        return self.below(100) < percent

    def choose(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        rest = list(items)
        return [rest.pop(self.below(len(rest))) for _ in items]
