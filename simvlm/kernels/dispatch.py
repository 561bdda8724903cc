"""Which implementation runs: a table of rows in order of preference, and one question to each, `unsupported`.

The arrays' type picks the family (torch, jax or numpy; tracers too), `impl=` picks the row. Refusals are answered
before anything is launched, never by catching an exception.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

NAMES = ("cpp", "triton", "pallas", "xla", "reference")
"""Of implementations, over all ops and families."""


class UnsupportedError(ValueError):
    """No implementation, or not the one that was named, can take this call; the message says why, row by row."""


@dataclasses.dataclass(frozen=True)
class Impl:
    """One row: the kernel `name` for arrays of `family`, in the module at `path`.

    The module answers `unavailable() -> str | None` (what this machine lacks) and
    `unsupported(...) -> str | None` (why it cannot take the call; under the name `question` where a module holds two
    ops); its path must import without the kernel's own dependencies.
    """

    name: str
    family: str
    path: str
    question: str = "unsupported"

    @functools.cached_property
    def module(self) -> ModuleType:
        return importlib.import_module(self.path)

    def unavailable(self) -> str | None:
        """What this machine lacks to run this row, or None."""
        if sys.modules.get(self.family) is None and importlib.util.find_spec(self.family) is None:
            return f"{self.family} is not installed (pip install 'simvlm[{self.family}]')"
        return self.module.unavailable()

    def unsupported(self, *call: Any) -> str | None:
        """Why the kernel cannot take this call, or None."""
        return getattr(self.module, self.question)(*call)


@dataclasses.dataclass(frozen=True)
class Status:
    """One implementation on this machine: available when `reason` is None."""

    name: str
    family: str
    reason: str | None

    @property
    def available(self) -> bool:
        return self.reason is None


def family_of(**arrays: Any) -> str:
    """Returns "torch", "jax" or "numpy", the one family that every named array belongs to.

    Raises:
        TypeError: an argument is no array, or two come from different families.
    """
    found: dict[str, str] = {}
    for name, array in arrays.items():
        # torch first, and by isinstance: Dynamo traces that for parameters too, and no walk over their classes.
        torch = sys.modules.get("torch")
        is_torch = torch is not None and isinstance(array, torch.Tensor)
        family = "torch" if is_torch else _family(type(array))
        if family is None:
            raise TypeError(f"{name} must be a torch tensor, a jax array or a numpy array, got {type(array).__name__}")
        found[name] = family
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{name} is {family}" for name, family in found.items())
        raise TypeError(f"all arrays must come from one library, got a mixture: {listed}")
    return next(iter(found.values()))


def _family(cls: type) -> str | None:
    for base in cls.__mro__:
        root, _, _ = base.__module__.partition(".")
        if root in ("jax", "jaxlib"):
            return "jax"
        if root == "numpy" and base.__name__ == "ndarray":
            return "numpy"
    return None


def checked_name(op: str, impls: tuple[Impl, ...], family: str, name: str | None) -> str | None:
    """Returns the asked-for row's name (argument first, then SIMVLM_IMPL), None for "the first that can".

    SIMVLM_IMPL speaks to every op: where an op has no row of that name, it stays with the first that can.

    Raises:
        ValueError: no row of this family has the argument's name; SIMVLM_IMPL is the name of no implementation at all.
    """
    names = [impl.name for impl in impls if impl.family == family]
    source = "impl"
    if name is None:
        name, source = os.environ.get("SIMVLM_IMPL") or None, "SIMVLM_IMPL"
        if name in NAMES and name not in names:
            return None
    if name is None or name in names:
        return name
    raise ValueError(
        f"{op}: {source} must be one of {names} for {family} arrays, got {name!r}{did_you_mean(name, names)}"
    )


def did_you_mean(name: object, names: Sequence[str]) -> str:
    """The end of an error message: the names nearest to a misspelt one, or nothing."""
    near = difflib.get_close_matches(str(name), names, n=2, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def select(op: str, impls: tuple[Impl, ...], family: str, name: str | None, *call: Any) -> ModuleType:
    """Returns the module of the first row that takes the call, or of the named row.

    Raises:
        UnsupportedError: none can; every refusal is listed with its reason.
    """
    refusals = []
    for impl in impls:
        if impl.family != family or name not in (None, impl.name):
            continue
        reason = impl.unavailable() or impl.unsupported(*call)
        if reason is None:
            return impl.module
        refusals.append(f"{impl.name}: {reason}")
    why = "; ".join(refusals) or f"there is none for {family} arrays yet"
    raise UnsupportedError(f"{op}: no implementation takes this call. {why}")


def statuses(impls: tuple[Impl, ...]) -> list[Status]:
    """Every row with the reason why this machine cannot run it, if there is one."""
    return [Status(impl.name, impl.family, impl.unavailable()) for impl in impls]
