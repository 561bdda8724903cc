"""The processes of one run: which of them this is, and what they tell each other. Knows no framework."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeVar, cast

import numpy as np

_T = TypeVar("_T")


class ProcessLost(OSError):
    """Another process of the run ended or does not answer; nothing can be agreed on any more."""


@dataclasses.dataclass(frozen=True)
class Processes:
    """
    Attributes:
        index, count: this process, of how many.
        share: int64[n] of this process → int64[count, n] of all; every process calls it with the same n.

    Raises:
        ProcessLost: by every method, when another process is gone.
    """

    index: int = 0
    count: int = 1
    share: Callable[[np.ndarray], np.ndarray] = lambda values: values[None]

    @property
    def is_first(self) -> bool:
        """This one writes what is written once."""
        return self.index == 0

    def share_text(self, text: str) -> list[str]:
        """The text of every process."""
        if self.count == 1:
            return [text]
        own = np.frombuffer(text.encode(), np.uint8)
        lens = self.share(np.array([len(own)]))[:, 0]
        room = np.zeros(-(-int(lens.max()) // 8) * 8, np.uint8)
        room[: len(own)] = own
        texts = self.share(room.view(np.int64))
        return [bytes(row.view(np.uint8)[:size]).decode() for row, size in zip(texts, lens, strict=True)]

    def together(self, part: Callable[[], _T]) -> _T:
        """part() here, while every other process calls its own; none goes on if one failed.

        Raises:
            Exception: what this process's part raised.
            OSError: what other processes' parts raised, where this one's did not.
        """
        found, own, said = None, None, ""
        try:
            found = part()
        except Exception as error:
            own, said = error, " ".join(str(error).split()) or type(error).__name__
        failures = [f"process {i}: {text}" for i, text in enumerate(self.share_text(said)) if text]
        if own is not None:
            raise own
        if failures:
            raise OSError("; ".join(failures))
        return cast(_T, found)


ALONE = Processes()
