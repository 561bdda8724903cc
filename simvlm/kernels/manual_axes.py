"""What JAX functions with a gradient rule, or a loop, of their own need inside `shard_map`."""

from __future__ import annotations

from typing import Any

import jax
from jax import lax

Array = Any  # jax arrays and tracers


def axes_of(x: Array) -> frozenset[str]:
    """The mesh axes that x varies over."""
    kind = jax.typeof(x)
    return frozenset(kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else kind.vma)


def varying(x: Array, axes: frozenset[str]) -> Array:
    """x, said to vary over these axes too."""
    return lax.pcast(x, tuple(axes), to="varying") if axes else x


def varying_alike(*arrays: Array | None) -> Any:
    """The same arrays, each varying over every mesh axis that one of them varies over; None stays None.

    A rule's cotangents vary over the axes of all arguments, but `shard_map` (with check_vma) wants each to vary over
    its own argument's; and a loop's carry must vary as what comes out of it. What is widened in front of the rule, JAX
    transposes to the sum over replicas that the gradient of a replicated parameter is. Outside `shard_map` nothing is
    done.
    """
    axes = frozenset[str]().union(*(axes_of(x) for x in arrays if x is not None))
    return tuple(None if x is None else varying(x, axes - axes_of(x)) for x in arrays)
