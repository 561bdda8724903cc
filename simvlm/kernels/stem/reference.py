"""The stem's two ops in plain PyTorch: their meaning (docs/contract.md §3), for any float dtype.

`batch_norm_act` and `embed_sequence` are whole and differentiable by autograd, twice too. The functions below them are
the halves that torch_op.py calls on plain tensors, here as formulas of docs/stem.md; every torch implementation brings
the same functions under the same names. 16-bit inputs become float32 at the load and are rounded once, at the end.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from simvlm.kernels import xla_device
from simvlm.kernels.stem.places import rows_shape


def unavailable() -> str | None:
    return None


def batch_norm_unsupported(x: Tensor) -> str | None:
    return None


def embed_unsupported(text: Tensor, weight: Tensor | None) -> str | None:
    return None if weight is None else xla_device.imprecise("text", text)


def batch_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    residual: Tensor | None,
    branch_scale: Tensor | None,
    eps: float,
    act: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, var) as `batch_norm_act` documents them."""
    if branch_scale is not None:
        branch_scale = branch_scale.detach()
    if mean is not None and var is not None:
        return (
            batch_norm_apply(x, mean.detach(), var.detach(), weight, bias, residual, branch_scale, eps, act),
            mean,
            var,
        )
    mean, var = batch_norm_statistics(x)
    y = batch_norm_apply(x, mean, var, weight, bias, residual, branch_scale, eps, act)
    return y, mean.detach(), var.detach()


def batch_norm_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, var), biased, over all axes but the last; both 0 where there is no pixel."""
    pixels = max(x.numel() // x.shape[-1], 1)
    x = x.to(_wide(x))
    mean = x.sum((0, 1, 2)) / pixels
    return mean, (x - mean).square().sum((0, 1, 2)) / pixels


def batch_norm_apply(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    branch_scale: Tensor | None,
    eps: float,
    act: str,
) -> Tensor:
    """y in x's dtype."""
    z = _pre_activation(x, mean, var, weight, bias, branch_scale, eps)
    if residual is not None:
        z = z + residual.to(z.dtype)
    return (torch.relu(z) if act == "relu" else z).to(x.dtype)


def batch_norm_backward_reductions(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    branch_scale: Tensor | None,
    eps: float,
    act: str,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(Σ dz, Σ dz·norm, dy masked by y or None): the per-channel sums and, with y, the residual's gradient."""
    dz, masked = _through_activation(dy, x, y, mean, var, weight, bias, branch_scale, eps, act)
    norm = _norm(x, mean, var, eps)
    return dz.sum((0, 1, 2)), (dz * norm).sum((0, 1, 2)), masked.to(dy.dtype) if y is not None else None


def batch_norm_backward_apply(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    branch_scale: Tensor | None,
    mean_dz: Tensor | None,
    mean_dz_norm: Tensor | None,
    eps: float,
    act: str,
) -> Tensor:
    """dx in x's dtype; without the two means the statistics were constants."""
    dz, _ = _through_activation(dy, x, None, mean, var, weight, bias, branch_scale, eps, act)
    if mean_dz is not None and mean_dz_norm is not None:
        dz = dz - mean_dz - _norm(x, mean, var, eps) * mean_dz_norm
    return (weight.to(dz.dtype) * torch.rsqrt(var.to(dz.dtype) + eps) * dz).to(x.dtype)


def _norm(x: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    wide = _wide(x)
    return (x.to(wide) - mean.to(wide)) * torch.rsqrt(var.to(wide) + eps)


def _pre_activation(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, branch_scale: Tensor | None, eps: float
) -> Tensor:
    """z, the residual apart."""
    z = _norm(x, mean, var, eps) * weight.to(_wide(x)) + bias.to(_wide(x))
    return z if branch_scale is None else z * branch_scale.to(z.dtype)[:, None, None, None]


def _through_activation(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    branch_scale: Tensor | None,
    eps: float,
    act: str,
) -> tuple[Tensor, Tensor]:
    """(dz, masked dy): dy where the activation let it through, with the branch scale and without it.

    y tells where, if z cannot be had from x alone; else None.
    """
    masked = dy.to(_wide(x))
    if act == "relu":
        live = y if y is not None else _pre_activation(x, mean, var, weight, bias, branch_scale, eps)
        masked = torch.where(live > 0, masked, 0.0)
    dz = masked if branch_scale is None else masked * branch_scale.to(masked.dtype)[:, None, None, None]
    return dz, masked


def embed_sequence(
    features: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    image_positions: Tensor | None,
    text: Tensor,
    places: Tensor,
    query_len: int | None,
) -> Tensor:
    """rows as `embed_sequence` documents them; `places` as in places.py, `query_len` the T of a padded layout.

    A patch or text row that `places` asks for and that does not exist gives 0.
    """
    (text_rows, width), wide = text.shape, _wide(text)
    image_shape = None if features is None else features.shape
    source = _source_of_each_row(places, image_shape, text_rows, query_len)
    sources = [text.to(wide), text.new_zeros(1, width, dtype=wide)]
    if features is not None:
        x = _of_real_images(features, places)
        with torch.autocast(text.device.type, enabled=False):
            if weight is not None:
                weight = weight.to(wide)
                # Rounded to the features' dtype for the product; the gradient passes as if it were not.
                x = x @ (weight + (weight.to(features.dtype).to(wide) - weight).detach()).T
        if bias is not None:
            x = x + bias.to(wide)
        if image_positions is not None:
            x = x + image_positions.to(wide)
        sources.append(x.reshape(-1, width))
    rows = torch.cat(sources)[source].to(text.dtype)
    return rows.reshape(rows_shape(image_shape, text_rows, width, places.shape[1], query_len))


def embed_sequence_backward(
    drows: Tensor,
    features: Tensor | None,
    weight: Tensor | None,
    places: Tensor,
    image_shape: tuple[int, ...] | None,
    text_rows: int,
    query_len: int | None,
    wanted: tuple[bool, bool, bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """(dfeatures, dweight, dbias, dimage_positions, dtext), None where not wanted.

    Parameter gradients are wide (float32, float64 for float64). `features` is None where weight is.
    """
    width, wide = drows.shape[-1], _wide(drows)
    source = _source_of_each_row(places, image_shape, text_rows, query_len)
    patches = math.prod(image_shape[:3]) if image_shape is not None else 0
    # Every source feeds one row at the most, but for the zero between text and patches, which takes what is nobody's.
    dsources = drows.new_zeros(text_rows + 1 + patches, width, dtype=wide)
    dsources[source] = drows.reshape(-1, width).to(wide)
    grads: list[Tensor | None] = [None, None, None, None, dsources[:text_rows].to(drows.dtype, copy=True)]
    if image_shape is not None:
        dimages = dsources[text_rows + 1 :].reshape(image_shape[0], image_shape[1] * image_shape[2], width)
        dx = dimages
        if features is not None and weight is not None:
            with torch.autocast(drows.device.type, enabled=False):
                dx = dimages @ weight.to(wide)
                grads[1] = torch.einsum("bid,bic->dc", dimages, _of_real_images(features, places))
        grads[0] = dx.reshape(image_shape).to(drows.dtype, copy=True)
        grads[2], grads[3] = dimages.sum((0, 1)), dimages.sum(0)
    return tuple(grad if want else None for grad, want in zip(grads, wanted, strict=True))


def _source_of_each_row(
    places: Tensor, image_shape: tuple[int, ...] | None, text_rows: int, query_len: int | None
) -> Tensor:
    """int64 for each storage row: its text row, or text_rows for none, or text_rows + 1 + its patch."""
    batch = places.shape[1]
    grid, patches = (0, 0) if image_shape is None else (image_shape[1] * image_shape[2], math.prod(image_shape[:3]))
    # An empty sequence in front: every storage row has an owner then, without a special case for no sequences.
    places = torch.cat([places.new_zeros(5, 1), places], 1).long()
    q_starts, q_lens, image_lens, image_index, text_starts = places
    row = torch.arange(math.prod(rows_shape(image_shape, text_rows, 1, batch, query_len)), device=places.device)
    owner = torch.searchsorted(q_starts, row, right=True) - 1
    i = row - q_starts[owner]
    in_image = i < image_lens[owner]
    patch, text_row = image_index[owner] * grid + i, text_starts[owner] + i - image_lens[owner]
    exists = (i < q_lens[owner]) & torch.where(in_image, patch < patches, text_row < text_rows)
    return torch.where(exists, torch.where(in_image, text_rows + 1 + patch, text_row), text_rows)


def _of_real_images(features: Tensor, places: Tensor) -> Tensor:
    """features, wide, [Bi, I, C]; images beyond the sequences' own may hold NaN, which times 0 would reach dweight."""
    real = torch.arange(features.shape[0], device=features.device) < places[2].clip(0, 1).sum()
    return torch.where(real[:, None, None], features.flatten(1, 2).to(_wide(features)), 0.0)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
