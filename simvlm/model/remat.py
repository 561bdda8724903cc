"""What a backward pass computes again rather than keeps: activation checkpointing of layers and convolution blocks."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

REMAT = ("none", "layer", "dots")
_again = threading.local()  # the backward pass may run in another thread


def rematerialized(remat: str, function: Callable[..., Tensor], *args: Any) -> Tensor:
    """function(*args), of which `remat` keeps everything, the arguments, or the results of products and attention."""
    if remat == "none" or not torch.is_grad_enabled():
        return function(*args)
    contexts = functools.partial(_contexts, remat)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def is_recomputing() -> bool:
    """Whether this is the second time: what a forward pass does beside its result was done in the first."""
    return getattr(_again, "flag", False)


def _contexts(remat: str) -> tuple[Any, Any]:
    first, second = contextlib.nullcontext(), _recomputing()
    if remat == "layer":
        return first, second
    selects, replays = create_selective_checkpoint_contexts(kept_operations())
    return selects, _both(replays, second)


@functools.cache
def kept_operations() -> list[Any]:
    """Those whose results "dots" keeps."""
    from simvlm.kernels.attention import torch_op  # noqa: F401  registers the op

    aten, own = torch.ops.aten, torch.ops.simvlm
    kept = [aten.mm, aten.addmm, aten.convolution, own.prefix_attention]
    return [op.default for op in kept]


@contextlib.contextmanager
def _recomputing() -> Iterator[None]:
    _again.flag = True
    try:
        yield
    finally:
        _again.flag = False


@contextlib.contextmanager
def _both(outer: Any, inner: Any) -> Iterator[None]:
    with outer, inner:
        yield
