"""The model: `SimVLM(VARIANTS["base"])`, its config, its packed batch. torch comes with the first use of `SimVLM`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from simvlm.model.batch import Batch, Inputs
from simvlm.model.config import VARIANTS, SimVLMConfig, parameter_counts, variant

if TYPE_CHECKING:
    from simvlm.model.torch_model import SimVLM

__all__ = ["VARIANTS", "Batch", "Inputs", "SimVLM", "SimVLMConfig", "parameter_counts", "variant"]


def __getattr__(name: str) -> Any:
    if name == "SimVLM":
        from simvlm.model.torch_model import SimVLM

        return SimVLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
