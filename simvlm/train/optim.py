"""AdamW, with which SimVLM was trained: which parameters decay, and the learning rate of every step."""

from __future__ import annotations

import torch
from torch import nn

from simvlm.train.settings import OptimizerSettings


def adamw(model: nn.Module, settings: OptimizerSettings) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019); only the weights of products and convolutions decay."""
    # Positions and tables are matrices in memory alone: nothing is multiplied by them.
    decaying = [parameter for name, parameter in model.named_parameters() if _decays(name, parameter)]
    others = [parameter for name, parameter in model.named_parameters() if not _decays(name, parameter)]
    return torch.optim.AdamW(
        [{"params": decaying, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        fused=True,
    )


def _decays(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim >= 2 and not name.endswith(("positions", "rel_bias"))


def learning_rate(step: int, steps: int, settings: OptimizerSettings) -> float:
    """Of step `step`, counted from 0: up in a line over the warm-up, down in a line to 0 after it."""
    warmup = max(1, round(settings.warmup * steps))
    rise, fall = (step + 1) / warmup, (steps - step) / max(steps - warmup, 1)
    return settings.lr * min(1.0, rise, fall)
