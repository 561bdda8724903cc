"""What a step of training takes and gives back, whichever framework it is of."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from simvlm.data.mixture import FINE, capacity_step
from simvlm.train.settings import PretrainSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepLoss:
    """Of one batch, over all processes.

    Attributes:
        nll: float64[2], Σ -ln P of the suffix tokens of image-text pairs and of documents.
        grad_norm: Euclidean, of all gradients, before clipping.
    """

    nll: np.ndarray
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


def row_multiple(settings: PretrainSettings, max_text_len: int, parts: int, sizes: int = FINE) -> int:
    """What the packed rows of each of `parts` equal parts of a batch are padded to a multiple of."""
    samples = settings.data.pairs_per_step + settings.data.documents_per_step
    return capacity_step(-(-samples // parts) * max_text_len, sizes)
