"""What every op's cpp_jax.py needs: the compiled module's handlers in XLA's hands, and calls of them.

A call is one XLA custom call: its arrays are contiguous, its results XLA's own memory. Threads are those of numpy
callers, fixed when a call is traced; they are a pool of our own, never torch's.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from simvlm.kernels import cpp_module
from simvlm.kernels.manual_axes import axes_of

Array = Any  # jax arrays and tracers


@functools.cache
def unavailable() -> str | None:
    """Why JAX cannot call the compiled module here, or None; the first time it is asked, XLA learns of the handlers."""
    why = cpp_module.unavailable()
    if why is not None:
        return why
    module = cpp_module.compiled()
    if not hasattr(module, "xla_targets"):
        return "built without jax's headers: install jax, then reinstall"
    built, here = module.xla_interface, _interface()
    if built[0] != here[0] or built[1] > here[1]:  # XLA would refuse them too, and its whole CPU backend with them
        return (
            f"built for version {built[0]}.{built[1]} of XLA's foreign function interface, jax {jax.__version__} has "
            f"{here[0]}.{here[1]}: upgrade jax, or reinstall with --no-build-isolation"
        )
    for name, handler in module.xla_targets().items():
        jax.ffi.register_ffi_target(_target(name), handler, platform="cpu")
    return None


def _interface() -> tuple[int, int]:
    """The installed XLA's version of the interface; only its headers say it without starting a backend."""
    header = (Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h").read_text()
    major, minor = (re.search(rf"define XLA_FFI_API_{part} (\d+)", header) for part in ("MAJOR", "MINOR"))
    return (int(major[1]), int(minor[1])) if major and minor else (0, 0)


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
        attributes: bools, ints (int64 in C++), floats (double) and numpy scalars.
    """
    arrays = [jnp.zeros(*NOTHING) if x is None else x for x in operands]
    attributes = {key: np.int64(value) if type(value) is int else value for key, value in attributes.items()}
    shapes = [jax.ShapeDtypeStruct(shape, dtype, **_on_mesh(arrays)) for shape, dtype in results]
    called = jax.ffi.ffi_call(_target(name), shapes, vmap_method="expand_dims")
    return called(*arrays, **attributes, threads=np.int64(cpp_module.numpy_threads()))


def _on_mesh(operands: Sequence[Array]) -> dict[str, Any]:
    """Of a result's type inside shard_map: it varies over the mesh's axes as its operands do."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return {}
    varying = frozenset[str]().union(*(axes_of(x) for x in operands))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return {"manual_axis_type": jax.sharding.ManualAxisType(varying=varying), "sharding": whole}


NOTHING = ((0,), np.float32)
"""An array that stands for none."""


def _target(name: str) -> str:
    return f"simvlm.{name}"
