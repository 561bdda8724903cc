"""What a step of training gives back, whichever framework took it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepLoss:
    """Of one batch.

    Attributes:
        nll: float64[2], Σ -ln P of the suffix tokens of image-text pairs and of documents.
        tokens: int[2], how many suffix tokens.
        grad_norm: Euclidean, of all gradients, before clipping.
    """

    nll: np.ndarray
    tokens: np.ndarray
    grad_norm: float


class Diverged(Exception):
    """A loss or gradient that is not finite.

    Attributes:
        value: of the loss, or of the gradient's norm where the loss is finite.
        rows: the batch's sequences whose loss is not finite.
    """

    def __init__(self, value: float, rows: Sequence[int]) -> None:
        super().__init__(value, rows)
        self.value, self.rows = value, list(rows)
