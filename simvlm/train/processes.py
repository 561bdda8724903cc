"""The processes of one run: which of them this is, and how they wait for each other. Knows no framework."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Processes:
    """
    Attributes:
        index, count: this process, of how many.
        barrier: returns when every process has called it with the same name.
        agree: whether any process's flag is set; every process calls it.
    """

    index: int = 0
    count: int = 1
    barrier: Callable[[str], None] = lambda name: None
    agree: Callable[[bool], bool] = lambda flag: flag

    @property
    def is_first(self) -> bool:
        """This one writes what is written once."""
        return self.index == 0


ALONE = Processes()
