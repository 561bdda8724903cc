"""`batch_norm_act` and `embed_sequence`: what surrounds the convolutions, from image to the encoder's input."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from simvlm.kernels import dispatch
from simvlm.kernels.arrays import autocast
from simvlm.kernels.attention.layout import PrefixLayout
from simvlm.kernels.stem import checks
from simvlm.kernels.stem.places import places
from simvlm.kernels.stem.table import BATCH_NORM_ACT, EMBED_SEQUENCE


def batch_norm_act(
    x: Any,
    weight: Any,
    bias: Any,
    *,
    mean: Any = None,
    var: Any = None,
    residual: Any = None,
    branch_scale: Any = None,
    eps: float = 1e-5,
    act: str = "relu",
    impl: str | None = None,
) -> tuple[Any, Any, Any]:
    """Batch normalization, stochastic depth, residual sum and activation of channels-last images.

    With M = B·Hh·Ww pixels, per channel c:

        mean = Σ x / M,    var = Σ (x - mean)² / M                      (over the batch, biased; unless both are given)
        norm = (x - mean) / sqrt(var + eps)
        y    = act(branch_scale[b] · (norm · weight + bias) + residual)

    Statistics and sums are float32 (float64 for float64) whatever x is. An empty batch gives mean = var = 0. Ioffe and
    Szegedy 2015, Algorithm 1; the branch scale is stochastic depth (Huang et al. 2016, §3), 0 for a dropped image and
    1/(1 - rate) for a kept one.

    Args:
        x: float[B, Hh, Ww, C], float32, bfloat16, float16, or float64 (reference only). Any strides with the last axis
            contiguous: `x.permute(0, 2, 3, 1)` of a torch tensor in channels_last memory.
        weight, bias: float[C], x's dtype or float32.
        mean, var: float[C], x's dtype or float32: constants to normalize with (inference, frozen statistics). None:
            this batch's.
        residual: x's shape and dtype, or None.
        branch_scale: float[B], x's dtype or float32, or None for 1; a constant, no gradient flows to it.
        eps: a Python float above 0.
        act: "relu" or "none".
        impl: the name of one implementation (see `implementations`); None: the first that takes the call.

    Returns:
        y, in x's dtype and shape; mean and var, float32[C] (float64 for float64) of this batch, or the given ones. No
        gradient flows from mean and var. The running statistics of torch's BatchNorm2d take the unbiased variance,
        `var · M / (M - 1)`. Gradients flow from y to x, weight, bias and residual (torch and jax; numpy arrays are
        forward only).

    Raises:
        TypeError, ValueError: an argument is not what is written here; the message names it.
        UnsupportedError: the implementation that was named cannot take the call.
    """
    op = "batch_norm_act"
    needed = {"x": x, "weight": weight, "bias": bias}
    family = checks.family(op, needed, {"mean": mean, "var": var, "residual": residual, "branch_scale": branch_scale})
    impl = dispatch.checked_name(op, BATCH_NORM_ACT, family, impl)
    if family == "torch":
        x, residual = autocast(x, residual)
    eps = checks.batch_norm_act(family, x, weight, bias, mean, var, residual, branch_scale, eps, act)
    if family == "torch":
        from simvlm.kernels.stem import torch_op

        return torch_op.batch_norm_act(x, weight, bias, mean, var, residual, branch_scale, eps, act, impl)
    kernel = dispatch.select(op, BATCH_NORM_ACT, family, impl, x)
    return kernel.batch_norm_act(x, weight, bias, mean, var, residual, branch_scale, eps, act)


def embed_sequence(
    features: Any,
    weight: Any,
    bias: Any,
    image_positions: Any,
    text: Any,
    layout: PrefixLayout,
    *,
    impl: str | None = None,
) -> Any:
    """The encoder's input: every sequence's projected patches, then its text, each in its place.

    Position i of sequence b, in storage row `q_starts[b] + i` for 0 ≤ i < q_lens[b], holds

        weight · features[image of b, i // Gw, i % Gw] + bias + image_positions[i]     where i < image_lens[b]
        text[text rows of the sequences before b + i - image_lens[b]]                  elsewhere

    Rows that no sequence owns are 0. Features and text that no sequence asks for (static shapes, larger than a batch
    needs) reach nothing, whatever they hold, and get gradient 0. SimVLM (Wang et al. 2022, §3.2): patches from a
    convolution stage, flattened and projected, in front of the text prefix.

    Args:
        features: float[Bi, Gh, Gw, C], row-major patches of the sequences that have an image, in order; Bi may be 0.
            float32, bfloat16, float16, or float64 (reference only). None with a layout that has no image_grid.
        weight: float[D, C], the features' dtype or float32, or None for the identity (C = D). A float32 weight is
            rounded to the features' dtype for the product (matrix units read 16 bits); its gradient stays float32.
        bias: float[D], the features' dtype or float32, or None.
        image_positions: float[I, D] with I = Gh·Gw, the features' dtype or float32. None with a layout that has no
            image_grid.
        text: float[Rt, D], the features' dtype: the embedded text of all sequences end to end, q_lens[b] -
            image_lens[b] rows each.
        layout: whose query rows are filled; built once a batch, on text's device.
        impl: the name of one implementation (see `implementations`); None: the first that takes the call.

    Returns:
        rows, in text's dtype: float[B, T, D] with a padded layout, float[R, D] with a packed one, R = Bi·I + Rt.
        Gradients flow to features, weight, bias, image_positions and text (torch and jax; numpy arrays are forward
        only).

    Raises:
        TypeError, ValueError: an argument is not what is written here; the message names it. Lengths are checked where
            that waits for no device.
        UnsupportedError: the implementation that was named cannot take the call.
    """
    op = "embed_sequence"
    if not isinstance(layout, PrefixLayout):
        raise TypeError(f"{op}: layout must be a PrefixLayout, got {type(layout).__name__}")
    of_images = {"features": features, "weight": weight, "bias": bias, "image_positions": image_positions}
    family = checks.family(op, {"text": text}, of_images)
    impl = dispatch.checked_name(op, EMBED_SEQUENCE, family, impl)
    if family == "torch":
        text, features = autocast(text, features)
    checks.embed_sequence(family, features, weight, bias, image_positions, text, layout)
    query_len = layout.padded_shape[0] if layout.padded_shape is not None else None
    if family == "torch":
        from simvlm.kernels.stem import torch_op

        return torch_op.embed_sequence(features, weight, bias, image_positions, text, layout.bounds, query_len, impl)
    if isinstance(layout.bounds, np.ndarray):
        placed = places(layout.bounds, np.stack)
        checks.lengths(placed, None if features is None else features.shape, text.shape[0])
    else:
        placed = places(layout.bounds, sys.modules["jax.numpy"].stack)
    kernel = dispatch.select(op, EMBED_SEQUENCE, family, impl, text, weight)
    return kernel.embed_sequence(features, weight, bias, image_positions, text, placed, query_len)
