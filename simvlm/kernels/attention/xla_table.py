"""The relative-position table laid out so that the bias of any block is one slice of it: no gather, no scatter.

The bias between the patches p = r·Gw + c and j = r'·Gw + c' is table[n, r'-r+Gh-1, c'-c+Gw-1]. Copies, each shifted,
make

    spread[n, a·Gw + c, m·Gw + c'] = table[n, m-a, c'-c+Gw-1]

for a few rows of patches a, as many as a block of queries may meet, and every m. A block of queries that begins at
patch (r, c) finds its bias towards the keys from j on in the rows from c on and the columns from (Gh-1-r)·Gw + j on. So
a forward pass slices blocks and a backward pass adds to them, and the sum's way back to the table is the transpose of
the copies. For 64×64 patches in blocks of 512 it takes 19 MB a head.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Array = Any  # jax arrays and tracers


@dataclasses.dataclass(frozen=True)
class Spread:
    """The geometry of one grid under blocks of block_t queries and block_s keys.

    Attributes:
        aligned: every block of queries begins at a multiple of block_t.
    """

    grid: tuple[int, int]
    block_t: int
    block_s: int
    aligned: bool

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def _on_edge(self) -> bool:
        """Every block of queries begins a row of patches."""
        return self.aligned and (self.block_t % self.grid[1] == 0 or self.block_t >= self.patches)

    @property
    def _patch_rows(self) -> int:
        height, width = self.grid
        return min(height, -(-(self.block_t + (0 if self._on_edge else width - 1)) // width))

    @property
    def shape(self) -> tuple[int, int]:
        height, width = self.grid
        rows = max(self._patch_rows * width, self.block_t + (0 if self._on_edge else width - 1))
        return rows, (2 * height - 1) * width + self.block_s

    @property
    def bytes_a_head(self) -> int:
        return 4 * self.shape[0] * self.shape[1]

    def of(self, table: Array) -> Array:
        """float32[N, *shape] from [N, 2Gh-1, 2Gw-1]; linear."""
        height, width = self.grid
        rows, columns = self.shape
        x = _skew(table.astype(jnp.float32), width).transpose(0, 2, 1, 3)
        x = x.reshape(table.shape[0], width, (2 * height - 1) * width)
        x = jnp.pad(x, ((0, 0), (0, 0), ((self._patch_rows - 1) * width, self.block_s)))
        starts = (width * a for a in reversed(range(self._patch_rows)))
        x = jnp.concatenate([x[:, :, start : start + columns] for start in starts], 1)
        return jnp.pad(x, ((0, 0), (0, rows - x.shape[1]), (0, 0)))

    def dtable(self, dspread: Array, table: Array) -> Array:
        """The transpose of `of`, in the table's dtype."""
        _, transpose = jax.vjp(self.of, table.astype(jnp.float32))
        (dtable,) = transpose(dspread)
        return dtable.astype(table.dtype)

    def block(self, spread: Array, position: Array, key: Array) -> Array:
        """float32[N, block_t, block_s]: the bias between queries from `position` on and keys from `key` on."""
        shape = spread.shape[0], self.block_t, self.block_s
        x = lax.dynamic_slice(spread, self._start(position, key), shape)
        return jnp.where(self._both_patches(position, key), x, 0.0)

    def add(self, dspread: Array, dblock: Array, position: Array, key: Array) -> Array:
        """dspread plus the transpose of `block`."""
        start = self._start(position, key)
        dblock = jnp.where(self._both_patches(position, key), dblock, 0.0)
        return lax.dynamic_update_slice(dspread, lax.dynamic_slice(dspread, start, dblock.shape) + dblock, start)

    def _start(self, position: Array, key: Array) -> tuple[Any, ...]:
        height, width = self.grid
        first = 0 if self._on_edge else position % width
        return 0, first, (height - 1 - position // width) * width + key

    def _both_patches(self, position: Array, key: Array) -> Array:
        queries, keys = position + jnp.arange(self.block_t), key + jnp.arange(self.block_s)
        return (queries < self.patches)[:, None] & (keys < self.patches)


def _skew(x: Array, side: int) -> Array:
    """[…, i, j] = x[…, j - i + side - 1] for i, j < side, without a gather.

    Copies of x with one zero appended, end to end, and read in rows one element shorter: each row starts one later.
    """
    span = 2 * side - 1
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 1)])
    x = jnp.broadcast_to(x[..., None, :], (*x.shape[:-1], side, span + 1)).reshape(*x.shape[:-1], -1)
    return x[..., : side * span].reshape(*x.shape[:-1], side, span)[..., side - 1 :]
