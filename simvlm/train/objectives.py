"""PrefixLM: the loss of the suffix given the image and the prefix (SimVLM, Wang et al. 2022, §3.1, eq. 3).

    L = Σ_{suffix tokens} -ln P(x_i | image, prefix, x_p … x_{i-1}) / number of suffix tokens

over the whole global batch: this returns every token's term, and whoever steps the optimizer sums and divides once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor

from simvlm.model.batch import IGNORED

_CHUNK_ROWS = 4096


def suffix_nll(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """-ln P of every target, float32[R] (float64 for float64); 0 where there is none. No [R, V] array exists at once.

    Args:
        hidden: float[R, D], the decoder's final states.
        weight: float[V, D], the tied embedding.
        targets: int[R], `IGNORED` where a row has no loss.
    """
    if hidden.shape[0] <= _CHUNK_ROWS:
        return _nll(hidden, weight, targets)
    chunks = zip(hidden.split(_CHUNK_ROWS), targets.split(_CHUNK_ROWS), strict=True)
    return torch.cat(
        [torch.utils.checkpoint.checkpoint(_nll, part, weight, target, use_reentrant=False) for part, target in chunks]
    )


def _nll(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(hidden, weight.to(hidden.dtype))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets.long(), reduction="none", ignore_index=IGNORED)
