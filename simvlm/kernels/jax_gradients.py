"""What the gradient rules of ops for jax arrays share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


def differentiable_once(op: str, impl: str, backward: Callable[..., Any]) -> Callable[..., Any]:
    """`backward(static, *arrays)`, whose own derivative raises by name instead of speaking of what is inside."""

    def refuse(*_: Any) -> Any:
        raise NotImplementedError(f"{op}: double backward is not supported by impl='{impl}'")

    once = jax.custom_vjp(backward, nondiff_argnums=(0,))
    once.defvjp(refuse, refuse)
    return once


def is_zero(cotangent: Any) -> bool:
    """Nobody differentiates this result."""
    return isinstance(cotangent, jax.custom_derivatives.SymbolicZero)
