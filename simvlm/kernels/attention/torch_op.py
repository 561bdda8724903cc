"""The registered torch op behind `prefix_attention`: pure, flat arguments, with fake, gradient and vmap rule.

Every torch implementation runs through this one pair of ops, so a kernel file brings `forward` and `backward` on plain
tensors and nothing of autograd. The implementation is chosen when the op runs, on real tensors: a compiled graph holds
one opaque node and serves every layout of the same shapes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from simvlm.kernels import dispatch
from simvlm.kernels.arrays import call_op, check_saved, refuse_transforms
from simvlm.kernels.attention import reference, table
from simvlm.kernels.attention.layout import BOUNDS, PrefixLayout

_STATICS = "bool padded, bool cross, bool at_origin, int[] image_grid, SymInt max_q_len, SymInt max_k_len, str impl"
_LIBRARY = torch.library.Library("simvlm", "FRAGMENT")
_LIBRARY.define(
    "prefix_attention(Tensor q, Tensor k, Tensor v, Tensor bounds, Tensor? rel_bias, float scale, "
    f"{_STATICS}) -> (Tensor out, Tensor lse)"
)
_LIBRARY.define(
    "prefix_attention_backward(Tensor dout, Tensor dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"Tensor bounds, Tensor? rel_bias, float scale, {_STATICS}, bool[] wanted) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor drel_bias)"
)


def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout, rel_bias: Tensor | None, scale: float, impl: str | None
) -> tuple[Tensor, Tensor]:
    """(out, lse) through the registered op; `impl="reference"` is plain PyTorch and takes every transform."""
    if impl == "reference":
        return reference.forward(q, k, v, layout, rel_bias, scale)
    refuse_transforms("prefix_attention", q, k, v, rel_bias)
    return call_op(
        torch.ops.simvlm.prefix_attention,
        _forward,
        q,
        k,
        v,
        torch.as_tensor(layout.bounds, dtype=torch.int32),
        rel_bias,
        scale,
        layout.is_padded,
        layout.cross,
        layout.at_origin,
        list(layout.image_grid or ()),
        layout.max_q_len,
        layout.max_k_len,
        impl or "",
    )


def _layout(
    q: Tensor, k: Tensor, bounds: Tensor, padded: bool, cross: bool, at_origin: bool, grid: Any, *maxima: int
) -> PrefixLayout:
    if bounds.dtype != torch.int32 or bounds.ndim != 2 or bounds.shape[0] != len(BOUNDS):
        got = f"{bounds.dtype}{list(bounds.shape)}"
        raise ValueError(f"prefix_attention: bounds must be int32[{len(BOUNDS)}, B], got {got}")
    return PrefixLayout(
        bounds=bounds,
        padded_shape=(q.shape[1], k.shape[1]) if padded else None,
        image_grid=(grid[0], grid[1]) if grid else None,
        max_q_len=maxima[0],
        max_k_len=maxima[1],
        cross=cross,
        at_origin=at_origin,
    )


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _forward(q: Any, k: Any, v: Any, bounds: Any, rel_bias: Any, scale: float, *statics: Any) -> tuple[Tensor, Tensor]:
    layout = _layout(q, k, bounds, *statics[:6])
    kernel = dispatch.select("prefix_attention", table.IMPLS, "torch", statics[6] or None, q, k, v, layout, rel_bias)
    out, lse = kernel.forward(q, k, v, layout, rel_bias, scale)
    return out.contiguous(), lse.contiguous()


def _forward_fake(q: Any, k: Any, v: Any, bounds: Any, rel_bias: Any, scale: float, *statics: Any) -> tuple[Any, Any]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=_lse_dtype(q))


def _backward(
    dout: Any,
    dlse: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    bounds: Any,
    rel_bias: Any,
    scale: float,
    *rest: Any,
) -> tuple[Tensor, ...]:
    *statics, wanted = rest
    layout = _layout(q, k, bounds, *statics[:6])
    # torch sees to it that dout and dlse are like out and lse as these were returned.
    keys = (*dout.shape[:-3], k.shape[-3] if k.ndim == dout.ndim else 0, *dout.shape[-2:])
    grid = tuple(2 * side - 1 for side in layout.image_grid or ())
    check_saved(
        "prefix_attention",
        q=(q, dout.shape, dout.dtype),
        k=(k, keys, dout.dtype),
        v=(v, keys, dout.dtype),
        out=(out, dout.shape, dout.dtype),
        lse=(lse, dlse.shape, dlse.dtype),
        rel_bias=(rel_bias, (dout.shape[-2], *grid), None),
    )
    kernel = dispatch.select("prefix_attention", table.IMPLS, "torch", statics[6] or None, q, k, v, layout, rel_bias)
    grads = kernel.backward(dout, dlse, q, k, v, out, lse, layout, rel_bias, scale, tuple(wanted))
    return tuple(q.new_empty(0) if grad is None else grad.contiguous() for grad in grads)


def _backward_fake(
    dout: Any,
    dlse: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    bounds: Any,
    rel_bias: Any,
    scale: float,
    *rest: Any,
) -> tuple[Any, ...]:
    wanted = rest[-1]
    inputs = (q, k, v, rel_bias)
    return tuple(x.new_empty(x.shape) if want else q.new_empty(0) for x, want in zip(inputs, wanted, strict=True))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bounds, rel_bias, ctx.scale, *ctx.statics = inputs
    ctx.save_for_backward(q, k, v, *output, bounds, rel_bias)


def _gradient(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Any, ...]:
    *saved, bounds, rel_bias = ctx.saved_tensors
    needed = ctx.needs_input_grad
    wanted = [needed[0], needed[1], needed[2], rel_bias is not None and needed[4]]
    args = (dout, dlse, *saved, bounds, rel_bias, ctx.scale, *ctx.statics, wanted)
    grads = call_op(torch.ops.simvlm.prefix_attention_backward, _backward, *args)
    dq, dk, dv, dtable = (grad if want else None for grad, want in zip(grads, wanted, strict=True))
    return dq, dk, dv, None, dtable, *(None for _ in range(1 + len(ctx.statics)))


def _no_second_gradient(ctx: Any, *grads: Any) -> None:
    raise NotImplementedError(
        "prefix_attention: double backward is not supported by the kernels; impl='reference' supports it"
    )


def _fold(info: Any, x: Tensor | None, dim: int | None, axis: int) -> Tensor | None:
    """A vmapped dimension becomes more heads: [V, …, N, …] → [V·N] at `axis`, counted in the unbatched tensor."""
    if x is None:
        return None
    x = x.unsqueeze(0).expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.movedim(0, axis).flatten(axis, axis + 1)


def _unfold(info: Any, x: Tensor, axis: int) -> Tensor:
    return x.unflatten(axis, (info.batch_size, -1)) if x.ndim > 1 else x.unsqueeze(0).expand(info.batch_size, *x.shape)


def _vmap(info: Any, in_dims: Any, q: Any, k: Any, v: Any, bounds: Any, rel_bias: Any, *rest: Any) -> Any:
    if in_dims[3] is not None:
        raise NotImplementedError(
            "prefix_attention: vmap over the layout is not supported; vmap over q, k, v and rel_bias"
        )
    heads = 2 if rest[1] else 1
    qkv = (_fold(info, x, dim, heads) for x, dim in zip((q, k, v), in_dims, strict=False))
    table_ = _fold(info, rel_bias, in_dims[4], 0)
    out, lse = torch.ops.simvlm.prefix_attention(*qkv, bounds, table_, *rest)
    return (_unfold(info, out, heads), _unfold(info, lse, heads)), (heads, heads)


def _vmap_backward(info: Any, in_dims: Any, *args: Any) -> Any:
    if in_dims[7] is not None:
        raise NotImplementedError(
            "prefix_attention: vmap over the layout is not supported; vmap over q, k, v and rel_bias"
        )
    heads = 2 if args[10] else 1
    folded = [_fold(info, x, dim, heads) for x, dim in zip(args[:7], in_dims, strict=False)]
    table_ = _fold(info, args[8], in_dims[8], 0)
    grads = torch.ops.simvlm.prefix_attention_backward(*folded, args[7], table_, *args[9:])
    axes = [heads if grad.ndim > 1 else 0 for grad in grads[:3]] + [0]
    return tuple(_unfold(info, grad, axis) for grad, axis in zip(grads, axes, strict=True)), tuple(axes)


_LIBRARY.impl("prefix_attention", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("prefix_attention_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("simvlm::prefix_attention", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("simvlm::prefix_attention_backward", _backward_fake, lib=_LIBRARY)
torch.library.register_autograd("simvlm::prefix_attention", _gradient, setup_context=_setup_context, lib=_LIBRARY)
torch.library.register_autograd("simvlm::prefix_attention_backward", _no_second_gradient, lib=_LIBRARY)
torch.library.register_vmap("simvlm::prefix_attention", _vmap, lib=_LIBRARY)
torch.library.register_vmap("simvlm::prefix_attention_backward", _vmap_backward, lib=_LIBRARY)
