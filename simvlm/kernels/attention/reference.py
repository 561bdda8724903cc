"""Prefix attention in plain PyTorch: the meaning of the op (docs/contract.md §2), dense, for any float dtype.

    score_ij = scale · <q_i, k_j> + bias(i, j)    over the keys j that query i sees
    out_i    = Σ_j softmax_j(score_i)_j · v_j,    lse_i = ln Σ_j exp(score_ij)

Everything is differentiable by autograd, twice too. 16-bit inputs are computed as honest precision does it: float32
scores and softmax, P rounded to 16 bits before P·V, one final rounding. It allocates [B, N, T, S] and is what every
other implementation is compared with; nothing here is fast.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from simvlm.kernels import xla_device
from simvlm.kernels.attention.layout import PrefixLayout


def unavailable() -> str | None:
    return None


def unsupported(q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout, rel_bias: Tensor | None) -> str | None:
    return xla_device.imprecise("q", q)


def forward(
    q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout, rel_bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """(out, lse) as `prefix_attention` documents them."""
    with torch.autocast(q.device.type, enabled=False):  # its products would be rounded to 16 bits
        return _forward(q, k, v, layout, rel_bias, scale)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout, rel_bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    bounds = torch.as_tensor(layout.bounds, device=q.device).long()
    _, q_lens, _, k_lens, prefix_lens, q_offsets, image_lens = (row[:, None] for row in bounds)

    q_rows, i = _rows(q, bounds[0], layout.padded_shape, 0, layout.max_q_len)
    k_rows, j = _rows(k, bounds[2], layout.padded_shape, 1, layout.max_k_len)
    q_real, k_real = i < q_lens, j < k_lens
    q_BTNH = _gather(q, q_rows, q_real).to(wide)
    k_BSNH = _gather(k, k_rows, k_real).to(wide)
    v_BSNH = _gather(v, k_rows, k_real).to(wide)

    position = q_offsets + i
    visible = (j[:, None, :] < prefix_lens[:, :, None]) | (j[:, None, :] <= position[:, :, None])
    visible = (visible & q_real[:, :, None] & k_real[:, None, :])[:, None]
    scores = torch.einsum("btnh,bsnh->bnts", q_BTNH, k_BSNH) * scale
    if rel_bias is not None:
        in_image = (position < image_lens)[:, :, None] & (j < image_lens)[:, None, :]
        scores = scores + torch.where(in_image[:, None], _bias(rel_bias.to(wide), position, j, layout.image_grid), 0.0)
    scores = scores.masked_fill(~visible, float("-inf"))

    sees_any = visible.any(-1)
    lse = torch.logsumexp(scores.masked_fill(~sees_any[..., None], 0.0), -1)
    p = torch.exp(scores - lse[..., None]).masked_fill(~visible, 0.0)
    p = p.to(q.dtype).to(wide)
    out_BTNH = torch.einsum("bnts,bsnh->btnh", p, v_BSNH)
    # Zero already; the select keeps NaN in a padding row's cotangent from reaching anything backward.
    out_BTNH = torch.where(q_real[:, :, None, None], out_BTNH, 0.0)
    lse_BTN = lse.masked_fill(~sees_any, float("-inf")).transpose(1, 2)
    if layout.is_padded:
        return out_BTNH.to(q.dtype), lse_BTN
    return (
        _scatter(out_BTNH, q_rows, q_real, q.shape[0], 0.0).to(q.dtype),
        _scatter(lse_BTN, q_rows, q_real, q.shape[0], float("-inf")),
    )


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
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dq, dk, dv, drel_bias), None where not wanted: a second forward, differentiated.

    Through torch.func, because this runs inside the registered op, below autograd.
    """
    inputs = (q, k, v, rel_bias)

    def outputs(*asked: Tensor) -> tuple[Tensor, Tensor]:
        leaves = iter(asked)
        whole: list[Any] = [next(leaves) if want else x for x, want in zip(inputs, wanted, strict=True)]
        return forward(whole[0], whole[1], whole[2], layout, whole[3], scale)

    asked = [x for x, want in zip(inputs, wanted, strict=True) if want]
    pull: Any = torch.func.vjp(outputs, *asked)[1]
    grads = iter(pull((dout, dlse)))
    return tuple(next(grads) if want else None for want in wanted)  # type: ignore[return-value]


def _rows(
    x: Tensor, starts: Tensor, padded_shape: tuple[int, int] | None, axis: int, longest: int
) -> tuple[Tensor, Tensor]:
    """Storage row of each position, int64[B, T], and the positions, int64[1, T]."""
    length = padded_shape[axis] if padded_shape is not None else min(longest, x.shape[0])
    positions = torch.arange(length, device=x.device)[None, :]
    return starts[:, None] + positions, positions


def _gather(x: Tensor, rows: Tensor, real: Tensor) -> Tensor:
    """[B, T, N, H] with zeros where no token is: NaN in padding must not survive a product with zero."""
    gathered = x.reshape(-1, *x.shape[-2:])[rows.clamp(max=x[..., 0, 0].numel() - 1)]
    return torch.where(real[:, :, None, None], gathered, torch.zeros((), dtype=x.dtype, device=x.device))


def _scatter(x: Tensor, rows: Tensor, real: Tensor, total: int, fill: float) -> Tensor:
    """Packed rows [total, …] from [B, T, …]; rows that no sequence owns hold `fill`."""
    spare = torch.where(real, rows, total)  # positions without a token write one row past the end, cut off below
    target = x.new_full((total + 1, *x.shape[2:]), fill)
    return target.index_put((spare.reshape(-1),), x.reshape(-1, *x.shape[2:]))[:total]


def _bias(table: Tensor, position: Tensor, j: Tensor, grid: tuple[int, int] | None) -> Tensor:
    """[B, N, T, S]: the table's entry for every pair of positions, clamped outside the image."""
    assert grid is not None
    height, width = grid
    p, key = position[:, :, None], j[:, None, :]
    rows = (key // width - p // width + height - 1).clamp(0, 2 * height - 2)
    cols = key % width - p % width + width - 1
    return table[:, rows, cols].transpose(0, 1)
