"""Dropout and stochastic depth whose random numbers are keyed by (seed, step, sample), not drawn in some order.

    u = hash(seed, step, sample, position, site, channel) / 2^32,    kept where u ≥ rate, then scaled by 1 / (1 - rate)

So a sample's masks do not depend on its batch, the rank, the packing, the device or what ran before.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_IMAGE = 1 << 20  # sites of the convolution stage, apart from those of the stacks


@dataclasses.dataclass(frozen=True, eq=False)
class Noise:
    """The rates, and a key per thing: int64[R, 1] for rows, int64[B, 1] for sequences or images."""

    keys: Tensor
    owners: Tensor
    sequence_keys: Tensor
    dropout_rate: float
    depth_rate: float

    def dropout(self, x: Tensor, site: int) -> Tensor:
        """x[R, D] with elements dropped."""
        if not self.dropout_rate:
            return x
        channels = torch.arange(x.shape[1], device=x.device)
        return x * _keep(mix(mix(self.keys + site) + channels), self.dropout_rate, x.dtype)

    def branch(self, x: Tensor, site: int) -> Tensor:
        """A residual branch x[R, D], dropped whole for some sequences."""
        if not self.depth_rate:
            return x
        return x * _keep(mix(self.sequence_keys + site), self.depth_rate, x.dtype)[self.owners]


def row_noise(
    seed: int, step: int | Tensor, sample_ids: Tensor, starts: Tensor, rows: int, dropout: float, depth: float
) -> Noise:
    """Noise for packed rows; sequence b begins at row starts[b]."""
    sequence_keys = _sample_keys(seed, step, sample_ids)
    row = torch.arange(rows, device=starts.device)
    owners = (torch.searchsorted(starts.contiguous(), row.to(starts.dtype), right=True) - 1).clamp(min=0)
    keys = mix(sequence_keys[owners] + mix(row - starts[owners])[:, None])
    return Noise(keys, owners, sequence_keys, dropout, depth)


def image_branch_scale(seed: int, step: int | Tensor, sample_ids: Tensor, rate: float, site: int) -> Tensor:
    """float32[Bi]: 0 for an image whose block is dropped, else 1 / (1 - rate)."""
    return _keep(mix(_sample_keys(seed, step, sample_ids) + _IMAGE + site), rate, torch.float32)[:, 0]


def uniform(keys: Tensor) -> Tensor:
    """float64 in (0, 1), one per key."""
    return (mix(keys).double() + 0.5) / 2**32


def mix(x: Tensor) -> Tensor:
    """A hash of 32 bits, held in int64: the finalizer "lowbias32" of Wellons' hash prospector."""
    x = x & _WORD
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _WORD
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _WORD
    return x ^ (x >> 16)


def _sample_keys(seed: int, step: int | Tensor, sample_ids: Tensor) -> Tensor:
    """int64[B, 1]; ids above 32 bits count with all their bits."""
    ids = sample_ids.long()
    key = mix(torch.zeros_like(ids) + seed)
    for part in (step, ids, ids >> 32):
        key = mix(key + mix(torch.zeros_like(ids) + part))
    return key[:, None]


def _keep(hashed: Tensor, rate: float, dtype: torch.dtype) -> Tensor:
    return (hashed >= int(rate * 2**32)).to(dtype) / (1 - rate)
