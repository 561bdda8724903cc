"""The registered torch ops behind `batch_norm_act` and `embed_sequence`: pure, flat arguments, with fake and gradient.

A kernel file brings the functions named like the ops (`batch_norm_statistics`, …, see reference.py) on plain tensors
and nothing of autograd; which file is chosen when the op runs, on real tensors, each half by the same question.

Batch normalization is four ops, two forward and two backward. Between them lie [C] vectors only, so that is where
replicas meet: `group` names a process group whose replicas share one batch.

    batch_norm_statistics           reads x                     writes mean, var [C]
    batch_norm_apply                reads x (residual)          writes y
    batch_norm_backward_reductions  reads dy, x (y)             writes Σ dz, Σ dz·norm [C] (dresidual)
    batch_norm_backward_apply       reads dy or dresidual, x    writes dx

Saved for backward: x, the [C] vectors, and y only where a residual went into a relu. Then z cannot be had from x
alone, and y costs no memory: the convolution that reads it keeps it too. Elsewhere z > 0 is computed again from x,
which is read anyway. No mask is stored. With y, the reductions write dresidual, which is wanted anyway, and the second
half reads that in place of dy and y.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from simvlm.kernels import dispatch
from simvlm.kernels.arrays import call_op, check_saved, refuse_transforms
from simvlm.kernels.stem import checks, reference, table
from simvlm.kernels.stem.places import PLACES, places, rows_shape

_NORM = "Tensor x, Tensor mean, Tensor var, Tensor weight, Tensor bias"
_NORM_WITH_Y = "Tensor x, Tensor? y, Tensor mean, Tensor var, Tensor weight, Tensor bias"
_LIBRARY = torch.library.Library("simvlm", "FRAGMENT")
_LIBRARY.define("batch_norm_statistics(Tensor x, str impl) -> (Tensor mean, Tensor var)")
_LIBRARY.define(
    f"batch_norm_apply({_NORM}, Tensor? residual, Tensor? branch_scale, float eps, str act, bool frozen, str group, "
    "str impl) -> Tensor"
)
_LIBRARY.define(
    f"batch_norm_backward_reductions(Tensor dy, {_NORM_WITH_Y}, Tensor? branch_scale, float eps, str act, str impl) "
    "-> (Tensor sum_dz, Tensor sum_dz_norm, Tensor dresidual)"
)
_LIBRARY.define(
    f"batch_norm_backward_apply(Tensor dy, {_NORM}, Tensor? branch_scale, Tensor? mean_dz, Tensor? mean_dz_norm, "
    "float eps, str act, str impl) -> Tensor"
)
_LIBRARY.define(
    "embed_sequence(Tensor? features, Tensor? weight, Tensor? bias, Tensor? image_positions, Tensor text, "
    "Tensor places, SymInt? query_len, str impl) -> Tensor"
)
_LIBRARY.define(
    "embed_sequence_backward(Tensor drows, Tensor? features, Tensor? weight, Tensor places, SymInt[]? image_shape, "
    "SymInt text_rows, SymInt? query_len, bool[] wanted, str impl) "
    "-> (Tensor dfeatures, Tensor dweight, Tensor dbias, Tensor dimage_positions, Tensor dtext)"
)
_OPS = torch.ops.simvlm


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
    impl: str | None,
    group: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, var) through the registered ops; `impl="reference"` is plain PyTorch and takes every transform.

    Args:
        group: name of a process group (`ProcessGroup.group_name`) whose replicas' pixels are one batch, "" for none.
            mean and var are then the whole batch's; the gradients of weight and bias are this replica's share, to be
            summed with the other parameters'. Every replica must take part, one without images too.
    """
    if impl == "reference" and not group:
        return reference.batch_norm_act(x, weight, bias, mean, var, residual, branch_scale, eps, act)
    refuse_transforms("batch_norm_act", x, weight, bias, residual)
    impl = impl or ""
    # Parameters reach the kernels as contiguous float32; these casts, where they are any, round their gradients once.
    wide = _wide(x)
    weight, bias = weight.to(wide).contiguous(), bias.to(wide).contiguous()
    branch_scale = None if branch_scale is None else branch_scale.detach().to(wide).contiguous()
    frozen = mean is not None and var is not None
    if mean is None or var is None:
        mean, var = call_op(_OPS.batch_norm_statistics, _statistics, x.detach(), impl)
        if group:
            mean, var = (x.to(wide) for x in _statistics_of_all(mean, var, _pixels(x), group))
    constants = mean.detach().to(wide).contiguous(), var.detach().to(wide).contiguous()
    args = (x, *constants, weight, bias, residual, branch_scale, eps, act, frozen, group, impl)
    y = call_op(_OPS.batch_norm_apply, _apply, *args)
    return y, mean, var


def _statistics_of_all(mean: Tensor, var: Tensor, pixels: int, group: str) -> tuple[Tensor, Tensor]:
    """mean and var of all replicas' pixels, from each one's; one collective, in float64 as E[x²] - mean² cancels."""
    mean, var, one = mean.double(), var.double(), mean.new_ones(1, dtype=torch.float64)
    total = all_reduce(pixels * torch.cat([mean, var + mean.square(), one]), group)
    mean, square = (total[:-1] / total[-1:].clamp(min=1)).chunk(2)
    return mean, (square - mean.square()).clamp(min=0)


def all_reduce(x: Tensor, group: Any) -> Tensor:
    """The sum over the group; the functional collectives are those that a compiled graph can hold."""
    from torch.distributed import _functional_collectives as collectives

    return collectives.wait_tensor(collectives.all_reduce(x, "sum", group))


def embed_sequence(
    features: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    image_positions: Tensor | None,
    text: Tensor,
    bounds: Any,
    query_len: int | None,
    impl: str | None,
) -> Tensor:
    """rows through the registered op; `impl="reference"` is plain PyTorch and takes every transform."""
    placed = places(torch.as_tensor(bounds), torch.stack).int()
    if impl == "reference":
        if not torch.compiler.is_compiling():  # a traced batch has no lengths to look at
            _check_lengths(placed, features, text)
        return reference.embed_sequence(features, weight, bias, image_positions, text, placed, query_len)
    refuse_transforms("embed_sequence", features, weight, bias, image_positions, text)
    # As above: float32 for the kernels. weight is not among them, the product wants it in the features' dtype.
    wide = _wide(text)
    bias = None if bias is None else bias.to(wide).contiguous()
    image_positions = None if image_positions is None else image_positions.to(wide).contiguous()
    args = (features, weight, bias, image_positions, text, placed, query_len, impl or "")
    return call_op(_OPS.embed_sequence, _embed, *args)


def _check_lengths(placed: Tensor, features: Tensor | None, text: Tensor) -> None:
    if placed.device.type == "cpu":
        checks.lengths(placed.numpy(), None if features is None else features.shape, text.shape[0])


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _pixels(x: Tensor) -> int:
    return x.shape[0] * x.shape[1] * x.shape[2]


def _norm_kernel(x: Tensor, impl: str) -> Any:
    return dispatch.select("batch_norm_act", table.BATCH_NORM_ACT, "torch", impl or None, x)


def _embed_kernel(text: Tensor, weight: Tensor | None, impl: str) -> Any:
    return dispatch.select("embed_sequence", table.EMBED_SEQUENCE, "torch", impl or None, text, weight)


# What runs on real tensors: choose the kernel, call it.


def _statistics(x: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    return _norm_kernel(x, impl).batch_norm_statistics(x)


def _apply(x: Tensor, *rest: Any) -> Tensor:
    *arguments, _frozen, _group, impl = rest
    return _norm_kernel(x, impl).batch_norm_apply(x, *arguments).contiguous()


def _backward_reductions(dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    y, *vectors, eps, act, impl = rest
    x, y, vectors = _saved(dy, x, y, vectors)
    sum_dz, sum_dz_norm, dresidual = _norm_kernel(x, impl).batch_norm_backward_reductions(
        dy.contiguous(), x, y, *vectors, eps, act
    )
    return sum_dz, sum_dz_norm, dy.new_empty(0) if dresidual is None else dresidual.contiguous()


def _backward_apply(dy: Tensor, x: Tensor, *rest: Any) -> Tensor:
    *vectors, mean_dz, mean_dz_norm, eps, act, impl = rest
    x, _, vectors = _saved(dy, x, None, vectors)
    kernel = _norm_kernel(x, impl)
    return kernel.batch_norm_backward_apply(dy.contiguous(), x, *vectors, mean_dz, mean_dz_norm, eps, act).contiguous()


def _saved(dy: Tensor, x: Tensor, y: Tensor | None, vectors: Sequence[Tensor | None]) -> tuple[Any, Any, Any]:
    """x, y, and mean, var, weight, bias, branch_scale as kernels want them; checked against dy, which torch checks."""
    channels, batch, wide = dy.shape[-1:], dy.shape[:1], _wide(dy)
    shapes = {"mean": channels, "var": channels, "weight": channels, "bias": channels, "branch_scale": batch}
    named = {name: (v, shape, wide) for (name, shape), v in zip(shapes.items(), vectors, strict=True)}
    check_saved("batch_norm_act", x=(x, dy.shape, dy.dtype), y=(y, dy.shape, dy.dtype), **named)
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x, None if y is None else y.contiguous(), [None if v is None else v.contiguous() for v in vectors]


def _embed(
    features: Any, weight: Any, bias: Any, image_positions: Any, text: Tensor, placed: Tensor, *rest: Any
) -> Tensor:
    query_len, impl = rest
    _check_lengths(placed, features, text)
    kernel = _embed_kernel(text, weight, impl)
    operand = None if weight is None else weight.to(features.dtype)
    return kernel.embed_sequence(features, operand, bias, image_positions, text, placed, query_len).contiguous()


def _embed_backward(drows: Tensor, features: Any, weight: Any, placed: Tensor, image_shape: Any, *rest: Any) -> Any:
    text_rows, query_len, wanted, impl = rest
    check_saved("embed_sequence", places=(placed, (len(PLACES), *placed.shape[1:2]), torch.int32))
    kernel = _embed_kernel(drows, weight, impl)
    operand = None if weight is None else weight.to(drows.dtype)
    shape = None if image_shape is None else tuple(image_shape)
    grads = kernel.embed_sequence_backward(
        drows.contiguous(), features, operand, placed, shape, text_rows, query_len, tuple(wanted)
    )
    dtypes = (drows.dtype, None if weight is None else weight.dtype, _wide(drows), _wide(drows), drows.dtype)
    return tuple(
        drows.new_empty(0) if grad is None else grad.to(dtype).contiguous()
        for grad, dtype in zip(grads, dtypes, strict=True)
    )


# The same in shapes.


def _statistics_fake(x: Any, impl: str) -> tuple[Any, Any]:
    return x.new_empty(x.shape[-1:], dtype=_wide(x)), x.new_empty(x.shape[-1:], dtype=_wide(x))


def _apply_fake(x: Any, *rest: Any) -> Any:
    return x.new_empty(x.shape)


def _backward_reductions_fake(dy: Any, x: Any, y: Any, *rest: Any) -> tuple[Any, ...]:
    return *_statistics_fake(x, ""), dy.new_empty(0) if y is None else dy.new_empty(dy.shape)


def _backward_apply_fake(dy: Any, x: Any, *rest: Any) -> Any:
    return x.new_empty(x.shape)


def _embed_fake(features: Any, weight: Any, bias: Any, positions: Any, text: Any, placed: Any, *rest: Any) -> Any:
    image_shape = None if features is None else features.shape
    return text.new_empty(rows_shape(image_shape, text.shape[0], text.shape[1], placed.shape[1], rest[0]))


def _embed_backward_fake(drows: Any, features: Any, weight: Any, placed: Any, image_shape: Any, *rest: Any) -> Any:
    text_rows, _, wanted, _ = rest
    width, wide = drows.shape[-1], _wide(drows)
    patches = image_shape[1] * image_shape[2] if image_shape is not None else 0
    shapes = (image_shape, None if weight is None else weight.shape, (width,), (patches, width), (text_rows, width))
    dtypes = (drows.dtype, None if weight is None else weight.dtype, wide, wide, drows.dtype)
    return tuple(
        drows.new_empty(shape, dtype=dtype) if want else drows.new_empty(0)
        for shape, dtype, want in zip(shapes, dtypes, wanted, strict=True)
    )


# Gradients.


def _apply_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, mean, var, weight, bias, residual, branch_scale, ctx.eps, ctx.act, ctx.frozen, ctx.group, ctx.impl = inputs
    y = output if residual is not None and ctx.act == "relu" else None
    ctx.save_for_backward(x, y, mean, var, weight, bias, branch_scale)


def _apply_gradient(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    """Of x, weight, bias and residual; x's includes the way through mean and var unless they are frozen."""
    x, y, *vectors = ctx.saved_tensors
    wants_x, _, _, wants_weight, wants_bias, wants_residual = ctx.needs_input_grad[:6]
    eps, act = ctx.eps, ctx.act
    dx, dresidual = None, dy
    sums: list[Tensor] = []
    if y is not None or wants_weight or wants_bias or (wants_x and not ctx.frozen):
        args = (dy, x, y, *vectors, eps, act, ctx.impl)
        *sums, masked = call_op(_OPS.batch_norm_backward_reductions, _backward_reductions, *args)
        if y is not None:
            dresidual, act = masked, "none"
    if wants_x:
        means = (None, None) if ctx.frozen else _means(sums, _pixels(x), ctx.group)
        args = (dresidual, x, *vectors, *means, eps, act, ctx.impl)
        dx = call_op(_OPS.batch_norm_backward_apply, _backward_apply, *args)
    dweight, dbias = sums[1] if wants_weight else None, sums[0] if wants_bias else None
    return dx, None, None, dweight, dbias, dresidual if wants_residual else None, *(None for _ in range(6))


def _means(sums: Sequence[Tensor], pixels: int, group: Any) -> Sequence[Tensor]:
    """The sums over the batch's number of pixels, all replicas' in one collective."""
    if not group:
        return [total / max(pixels, 1) for total in sums]
    total = all_reduce(torch.cat([*sums, sums[0].new_full((1,), pixels)]), group)
    return (total[:-1] / total[-1:].clamp(min=1)).chunk(2)


def _embed_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, weight, bias, image_positions, text, placed, ctx.query_len, ctx.impl = inputs
    ctx.image_shape = None if features is None else features.shape
    ctx.text_rows = text.shape[0]
    ctx.save_for_backward(None if weight is None else features, weight, placed)


def _embed_gradient(ctx: Any, drows: Tensor) -> tuple[Any, ...]:
    features, weight, placed = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:5])
    args = (drows, features, weight, placed, ctx.image_shape, ctx.text_rows, ctx.query_len, wanted, ctx.impl)
    grads = call_op(_OPS.embed_sequence_backward, _embed_backward, *args)
    return *(grad if want else None for grad, want in zip(grads, wanted, strict=True)), None, None, None


def _no_gradient(op: str) -> Any:
    def refuse(ctx: Any, *grads: Any) -> None:
        raise NotImplementedError(
            f"{op}: double backward is not supported by the kernels; impl='reference' supports it"
        )

    return refuse


def _looped(op: Any) -> Any:
    """vmap as a loop over its dimension: each element is a batch of its own."""

    def rule(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        def element(v: int) -> Any:
            picked = (x.select(dim, v) if isinstance(dim, int) else x for x, dim in zip(args, in_dims, strict=True))
            return op(*picked)

        outputs = [element(v) for v in range(info.batch_size)]
        if isinstance(outputs[0], Tensor):
            return torch.stack(outputs), 0
        stacked = tuple(torch.stack(parts) for parts in zip(*outputs, strict=True))
        return stacked, (0,) * len(stacked)

    return rule


for _name, _run, _fake in (
    ("batch_norm_statistics", _statistics, _statistics_fake),
    ("batch_norm_apply", _apply, _apply_fake),
    ("batch_norm_backward_reductions", _backward_reductions, _backward_reductions_fake),
    ("batch_norm_backward_apply", _backward_apply, _backward_apply_fake),
    ("embed_sequence", _embed, _embed_fake),
    ("embed_sequence_backward", _embed_backward, _embed_backward_fake),
):
    _LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"simvlm::{_name}", _fake, lib=_LIBRARY)
    torch.library.register_vmap(f"simvlm::{_name}", _looped(getattr(_OPS, _name)), lib=_LIBRARY)

torch.library.register_autograd("simvlm::batch_norm_apply", _apply_gradient, setup_context=_apply_setup, lib=_LIBRARY)
torch.library.register_autograd("simvlm::embed_sequence", _embed_gradient, setup_context=_embed_setup, lib=_LIBRARY)
for _name, _op in (
    ("batch_norm_statistics", "batch_norm_act"),
    ("batch_norm_backward_reductions", "batch_norm_act"),
    ("batch_norm_backward_apply", "batch_norm_act"),
    ("embed_sequence_backward", "embed_sequence"),
):
    torch.library.register_autograd(f"simvlm::{_name}", _no_gradient(_op), lib=_LIBRARY)
