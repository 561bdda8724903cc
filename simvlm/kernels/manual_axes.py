"""What JAX functions with a gradient rule of their own need inside `shard_map`."""

from __future__ import annotations

from typing import Any

import jax


def varying_alike(*arrays: Any) -> tuple[Any, ...]:
    """The same arrays, each varying over every mesh axis that one of them varies over; None stays None.

    A rule's cotangents vary over the axes of all arguments, but `shard_map` (with check_vma) wants each to vary over
    its own argument's. What is widened here, in front of the rule, JAX transposes to the sum over replicas that the
    gradient of a replicated parameter is. Outside `shard_map` nothing is done.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return arrays
    # A sum over nothing, so NaN or not it is 0, and varies as its array does. The function that widens by name differs
    # from one version of JAX to the next.
    zeros = [x.ravel()[:0].sum().astype("float32") for x in arrays if x is not None]
    zero = sum(zeros[1:], start=zeros[0])
    return tuple(None if x is None else x - zero.astype(x.dtype) for x in arrays)
