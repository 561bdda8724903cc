"""SimVLM: fast prefix attention with learnable 2D relative positions, and the vision-language model that needs it.

Importing this package imports neither torch, jax, triton nor the compiled module; each comes with its first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simvlm.model.weights import load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from simvlm.model.weights import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
