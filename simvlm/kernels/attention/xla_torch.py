"""`prefix_attention` in plain torch operations of static shapes, for torch_xla: TPUs, and whatever XLA compiles to.

    score = scale · <q_i, k_j> + bias(i, j),  out_i = Σ_j softmax_j(score_i)_j v_j,  lse_i = ln Σ_j exp(score_ij)

A loop over blocks of 128 keys, unrolled: [B, N, T, 128] scores are the largest thing that depends on two lengths. The
lengths are integers on the device, so one program serves every layout of the same shapes and bucket, and for the same
reason no block is left out that nobody sees: work is B · max_q_len · max_k_len. Saved for backward: out and lse; the
one backward pass goes over key blocks and sums dq along. Sums are float32 and have a fixed order.

The table is expanded to [N, I, I] once per call by a skew (repeat, reshape, slice), and its gradient comes back by the
transpose of that. Packed storage is unpacked to [B, N, max_len, H] and packed again by gathers of rows. Where sequences
have offsets, each gathers its rows of the expanded table, and the table's gradient its rows of dS: nothing scatters.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from simvlm.kernels import xla_device
from simvlm.kernels.attention.layout import PrefixLayout

_BLOCK = 128
_SCRATCH_BYTES = 64 * 2**20
# Finite, because -inf - (-inf) is NaN where a query has seen nothing yet, and below every score that means anything.
_NO_SCORE = -1.0e30


def unavailable() -> str | None:
    return xla_device.unavailable()


def unsupported(q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout, rel_bias: Tensor | None) -> str | None:
    if rel_bias is not None and layout.image_grid is not None:
        patches = layout.image_grid[0] * layout.image_grid[1]
        if 4 * q.shape[-2] * patches**2 > _SCRATCH_BYTES:
            return f"image_grid {layout.image_grid} is too large: the expanded table exceeds {_SCRATCH_BYTES} bytes"
    return xla_device.unsupported("q", q) or xla_device.imprecise("q", q)


def forward(
    q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout, rel_bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """(out, lse) as `prefix_attention` documents them; the layout's bounds are on q's device."""
    if layout.batch == 0 or q.numel() == 0 or k.numel() == 0:
        return torch.zeros_like(q), q.new_full(q.shape[:-1], -math.inf, dtype=torch.float32)
    with torch.autocast(q.device.type, enabled=False):  # its products would be rounded to 16 bits
        call = _Call(q, k, layout, rel_bias, scale)
        q_BNTH, k_BNSH, v_BNSH = call.of_queries(q), call.of_keys(k), call.of_keys(v)
        mixed = torch.zeros_like(q_BNTH, dtype=torch.float32)
        top = torch.full_like(mixed[..., :1], _NO_SCORE)
        total = torch.zeros_like(top)
        for keys in call.key_blocks:
            scores = call.scores(q_BNTH, k_BNSH, keys)
            new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
            p, shrink = torch.exp(scores - new_top), torch.exp(top - new_top)
            mixed = mixed * shrink + _product(p.to(v.dtype), v_BNSH[:, :, keys])
            total = total * shrink + p.sum(-1, keepdim=True)
            top = new_top
        seen = total != 0
        total = torch.where(seen, total, 1.0)
        out = call.to_queries((mixed / total).to(q.dtype), 0.0)
        lse = call.to_queries(torch.where(seen, top + torch.log(total), -math.inf), -math.inf)
        return out, lse.squeeze(-1)


def backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: PrefixLayout,
    rel_bias: Tensor | None,
    scale: float,
    wanted: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """(dq, dk, dv, drel_bias), None where not wanted.

    p = exp(score - lse), dS = p · (<dout, v> - delta), delta = <dout, out> - dlse
    """
    inputs = (q, k, v, rel_bias)
    if layout.batch == 0 or q.numel() == 0 or k.numel() == 0:
        return tuple(
            torch.zeros_like(x) if want and x is not None else None for x, want in zip(inputs, wanted, strict=True)
        )
    with torch.autocast(q.device.type, enabled=False):
        call = _Call(q, k, layout, rel_bias, scale)
        delta = (dout.float() * out.float()).sum(-1, keepdim=True) - dlse[..., None]
        q_BNTH, dout_BNTH, delta, lse = (call.of_queries(x) for x in (q, dout, delta, lse[..., None]))
        lse = torch.where(lse == -math.inf, math.inf, lse)  # a query that sees no key has p = 0
        k_BNSH, v_BNSH = call.of_keys(k), call.of_keys(v)
        dq = torch.zeros_like(q_BNTH, dtype=torch.float32)
        dk, dv, pairs = [], [], []
        for keys in call.key_blocks:
            p = torch.exp(call.scores(q_BNTH, k_BNSH, keys) - lse)
            ds = p * (_product(dout_BNTH, v_BNSH[:, :, keys].mT) - delta)
            rounded = ds.to(q.dtype)
            if wanted[0]:
                dq = dq + _product(rounded, k_BNSH[:, :, keys])
            if wanted[1]:
                dk.append(_product(rounded.mT, q_BNTH))
            if wanted[2]:
                dv.append(_product(p.to(v.dtype).mT, dout_BNTH))
            if wanted[3] and keys.start < call.patches:
                pairs.append(call.pairs(ds, keys))
        return (
            call.to_queries((dq * scale).to(q.dtype), 0.0) if wanted[0] else None,
            call.to_keys((torch.cat(dk, 2) * scale).to(k.dtype)) if wanted[1] else None,
            call.to_keys(torch.cat(dv, 2).to(v.dtype)) if wanted[2] else None,
            _reduced(call.all_pairs(pairs), call.image_grid).to(rel_bias.dtype)
            if wanted[3] and rel_bias is not None and call.image_grid is not None
            else None,
        )


class _Call:
    """One call's lengths as tensors of the device, its storage as [B, N, L, …], its scores and its table."""

    def __init__(self, q: Tensor, k: Tensor, layout: PrefixLayout, rel_bias: Tensor | None, scale: float) -> None:
        self.padded, self.at_origin, self.scale = layout.is_padded, layout.at_origin, scale
        self.q_rows, self.k_rows = q.shape[0], k.shape[0]
        self.q_len, self.k_len = layout.padded_shape or (
            min(layout.max_q_len, self.q_rows),
            min(layout.max_k_len, self.k_rows),
        )
        self.image_grid = layout.image_grid if rel_bias is not None else None
        self.patches = self.image_grid[0] * self.image_grid[1] if self.image_grid is not None else 0
        self.expanded = None if rel_bias is None else _expanded(rel_bias.float(), self.image_grid)
        rows = xla_device.unstacked(layout.bounds)
        self.q_starts, self.q_lens, self.k_starts, self.k_lens, prefix_lens, self.q_offsets, image_lens = rows
        self.has_image = (image_lens > 0)[:, None, None, None]
        i = self._places(self.q_len)
        self.position = self.q_offsets[:, None] + i
        sees = torch.minimum(self.k_lens[:, None], torch.maximum(prefix_lens[:, None], self.position + 1))
        self.limit = torch.where(i < self.q_lens[:, None], sees, 0)[:, None, :, None]

    @property
    def key_blocks(self) -> list[slice]:
        return [slice(start, min(start + _BLOCK, self.k_len)) for start in range(0, self.k_len, _BLOCK)]

    def of_queries(self, x: Tensor) -> Tensor:
        """[B, N, T, …] from query storage; zeros where no token is, whatever storage holds there."""
        return self._unpacked(x, self.q_starts, self.q_lens, self.q_len)

    def of_keys(self, x: Tensor) -> Tensor:
        """The same from key storage."""
        return self._unpacked(x, self.k_starts, self.k_lens, self.k_len)

    def to_queries(self, x: Tensor, fill: float) -> Tensor:
        """Query storage from [B, N, T, …]; rows that no sequence owns hold `fill`."""
        return self._packed(x, self.q_starts, self.q_lens, self.q_rows, fill)

    def to_keys(self, x: Tensor) -> Tensor:
        """Key storage from [B, N, S, …]; rows that no sequence owns hold 0."""
        return self._packed(x, self.k_starts, self.k_lens, self.k_rows, 0.0)

    def scores(self, q_BNTH: Tensor, k_BNSH: Tensor, keys: slice) -> Tensor:
        """float32[B, N, T, block], -inf where a query does not see the key."""
        scores = _product(q_BNTH, k_BNSH[:, :, keys].mT) * self.scale
        if self.expanded is not None and keys.start < self.patches:
            scores = scores + torch.where(self.has_image, self._bias(self.expanded[:, :, keys], keys), 0.0)
        j = torch.arange(keys.start, keys.stop, dtype=self.limit.dtype, device=self.limit.device)
        return torch.where(j < self.limit, scores, -math.inf)

    def pairs(self, ds: Tensor, keys: slice) -> Tensor:
        """float32[N, I, patches among the keys]: Σ_b dS over pairs of patches, the transpose of `_bias`."""
        ds = torch.where(self.has_image, ds, 0.0)[..., : self.patches - keys.start]
        if self.at_origin:
            ds = ds.sum(0)[:, : self.patches]
            return F.pad(ds, (0, 0, 0, self.patches - ds.shape[1]))
        i = self._places(self.patches) - self.q_offsets[:, None]
        first = torch.arange(ds.shape[0], dtype=i.dtype, device=i.device)[:, None] * self.q_len
        rows = ds.transpose(1, 2).flatten(0, 1)
        return xla_device.take(rows, first + i, (i >= 0) & (i < self.q_len)).sum(0).transpose(0, 1)

    def all_pairs(self, blocks: list[Tensor]) -> Tensor:
        """float32[N, I, I] from what `pairs` gave for every block; keys may be fewer than patches."""
        pairs = torch.cat(blocks, -1)
        return F.pad(pairs, (0, self.patches - pairs.shape[-1]))

    def _bias(self, table: Tensor, keys: slice) -> Tensor:
        """float32[B, N, T, block] (B may be 1) from these keys' columns of the expanded table; 0 outside it."""
        right = keys.stop - keys.start - table.shape[2]
        if self.at_origin:
            table = table[:, : self.q_len]
            return F.pad(table, (0, right, 0, self.q_len - table.shape[1]))[None]
        table = F.pad(table, (0, right, 0, 1))  # its last row serves every position past the image
        rows = table.index_select(1, self.position.clamp(max=self.patches).flatten())
        return rows.unflatten(1, self.position.shape).transpose(0, 1)

    def _places(self, length: int) -> Tensor:
        return torch.arange(length, dtype=self.q_starts.dtype, device=self.q_starts.device)

    def _unpacked(self, x: Tensor, starts: Tensor, lens: Tensor, length: int) -> Tensor:
        i = self._places(length)
        real = i < lens[:, None]
        if self.padded:
            x = torch.where(real[:, :, None, None], x, 0.0)
        else:
            x = xla_device.take(x, starts[:, None] + i, real)
        return x.transpose(1, 2)

    def _packed(self, x: Tensor, starts: Tensor, lens: Tensor, rows: int, fill: float) -> Tensor:
        x = x.transpose(1, 2)
        if self.padded:
            real = self._places(x.shape[1]) < lens[:, None]
            return torch.where(real[:, :, None, None], x, fill)
        owner, i, real = xla_device.owners(starts, lens, rows)
        return xla_device.take(x.flatten(0, 1), owner * x.shape[1] + i, real, fill)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """float32; a product in 16 bits would be rounded to them."""
    return a.float() @ b.float()


def _expanded(table: Tensor, grid: tuple[int, int] | None) -> Tensor:
    """[N, I, I] from [N, 2Gh-1, 2Gw-1]: the entry of every pair of patches."""
    assert grid is not None
    height, width = grid
    by_column = _skew(table, width)  # [N, 2Gh-1, c, c']
    by_row = _skew(by_column.permute(0, 2, 3, 1), height)  # [N, c, c', r, r']
    return by_row.permute(0, 3, 1, 4, 2).reshape(-1, height * width, height * width)


def _reduced(pairs: Tensor, grid: tuple[int, int] | None) -> Tensor:
    """[N, 2Gh-1, 2Gw-1] from [N, I, I], the transpose of `_expanded`."""
    assert grid is not None
    height, width = grid
    by_row = pairs.reshape(-1, height, width, height, width).permute(0, 2, 4, 1, 3)
    return _unskew(_unskew(by_row, height).permute(0, 3, 1, 2), width)


def _skew(x: Tensor, side: int) -> Tensor:
    """[…, i, j] = x[…, j - i + side - 1] for i, j < side, without a gather.

    Copies of x with one zero appended, end to end, and read in rows one element shorter: each row starts one later.
    """
    span = 2 * side - 1
    x = F.pad(x, (0, 1))[..., None, :].expand(*x.shape[:-1], side, span + 1).flatten(-2)
    return x[..., : side * span].unflatten(-1, (side, span))[..., side - 1 :]


def _unskew(x: Tensor, side: int) -> Tensor:
    """[…, d] = Σ x[…, i, j] over j - i + side - 1 = d, the transpose of `_skew`."""
    span = 2 * side - 1
    x = F.pad(F.pad(x, (side - 1, 0)).flatten(-2), (0, side))
    return x.unflatten(-1, (side, span + 1)).sum(-2)[..., :span]
