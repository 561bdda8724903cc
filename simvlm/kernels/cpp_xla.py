"""What every op's cpp_jax.py needs: the compiled module's handlers in XLA's hands, and calls of them.

A call is one XLA custom call: its arrays are contiguous, its results XLA's own memory. Threads are those of numpy
callers, fixed when a call is traced; they are a pool of our own, never torch's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from simvlm.kernels import cpp_module

Array = Any  # jax arrays and tracers


@functools.cache
def unavailable() -> str | None:
    """Why JAX cannot call the compiled module here, or None; the first time it is asked, XLA learns of the handlers."""
    why = cpp_module.unavailable()
    if why is not None:
        return why
    targets = getattr(cpp_module.compiled(), "xla_targets", None)
    if targets is None:
        return "built without jax's headers: install jax, then reinstall"
    try:
        for name, handler in targets().items():
            jax.ffi.register_ffi_target(_target(name), handler, platform="cpu")
    except Exception as error:  # jaxlib's own class; it refuses handlers built for an interface that it does not know
        return f"built with the headers of another jax than this {jax.__version__}: reinstall ({error})"
    return None


def unsupported(x: Array) -> str | None:
    """Why the kernels cannot take a call with this array, or None."""
    if jax.default_backend() != "cpu":
        return f"runs on the CPU, jax's default backend is {jax.default_backend()}"
    return cpp_module.unsupported_dtype(x)


def call(
    name: str, results: Sequence[tuple[tuple[int, ...], Any]], *operands: Array | None, **attributes: Any
) -> Sequence[Array]:
    """Calls a handler of csrc/xla_door.cc.

    Args:
        results: shape and dtype of each result; `NOTHING` for one that is not wanted.
        operands: None for one that there is not.
        attributes: Python bools, ints and numpy floats.
    """
    arrays = [jnp.zeros(*NOTHING) if x is None else x for x in operands]
    attributes = {key: np.int64(value) if type(value) is int else value for key, value in attributes.items()}
    shapes = [jax.ShapeDtypeStruct(shape, dtype, **_on_mesh(arrays)) for shape, dtype in results]
    called = jax.ffi.ffi_call(_target(name), shapes, vmap_method="expand_dims")
    return called(*arrays, **attributes, threads=np.int64(cpp_module.numpy_threads()))


def _on_mesh(operands: Sequence[Array]) -> dict[str, Any]:
    """What inside shard_map the type of a result says beside shape and dtype: it varies over the axes of its operands."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return {}
    types = [jax.typeof(x) for x in operands]
    if not hasattr(jax.sharding, "ManualAxisType"):  # jax before 0.10
        return {"vma": frozenset().union(*(one.vma for one in types))}
    kind = jax.sharding.ManualAxisType(varying=frozenset().union(*(one.mat.varying for one in types)))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return {"manual_axis_type": kind, "sharding": whole}


NOTHING = ((0,), np.float32)
"""An array that stands for none."""


def _target(name: str) -> str:
    return f"simvlm.{name}"


def differentiable_once(op: str, backward: Callable[..., Any]) -> Callable[..., Any]:
    """`backward(static, *arrays)`, whose own derivative raises by name instead of speaking of custom calls."""

    def refuse(*_: Any) -> Any:
        raise NotImplementedError(f"{op}: double backward is not supported by impl='cpp'")

    once = jax.custom_vjp(backward, nondiff_argnums=(0,))
    once.defvjp(refuse, refuse)
    return once


def is_zero(cotangent: Any) -> bool:
    return isinstance(cotangent, jax.custom_derivatives.SymbolicZero)
