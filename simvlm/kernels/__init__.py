"""The public ops and what runs them. One import door for torch, jax and numpy; none of them is imported here."""

from __future__ import annotations

from simvlm.kernels.attention import prefix_attention
from simvlm.kernels.attention.layout import PrefixLayout
from simvlm.kernels.attention.table import IMPLS as _ATTENTION
from simvlm.kernels.dispatch import Impl, Status, UnsupportedError, statuses
from simvlm.kernels.stem import batch_norm_act, embed_sequence
from simvlm.kernels.stem.table import BATCH_NORM_ACT as _BATCH_NORM_ACT
from simvlm.kernels.stem.table import EMBED_SEQUENCE as _EMBED_SEQUENCE

__all__ = [
    "OPS",
    "PrefixLayout",
    "UnsupportedError",
    "batch_norm_act",
    "embed_sequence",
    "implementations",
    "prefix_attention",
]

OPS: dict[str, tuple[Impl, ...]] = {
    "prefix_attention": _ATTENTION,
    "batch_norm_act": _BATCH_NORM_ACT,
    "embed_sequence": _EMBED_SEQUENCE,
}


def implementations(op: str) -> list[Status]:
    """Every implementation of `op` in order of preference: name, family, and why this machine cannot run it.

    Args:
        op: "prefix_attention", "batch_norm_act" or "embed_sequence".

    Raises:
        ValueError: no op has that name.
    """
    if op not in OPS:
        raise ValueError(f"implementations: op must be one of {list(OPS)}, got {op!r}")
    return statuses(OPS[op])
