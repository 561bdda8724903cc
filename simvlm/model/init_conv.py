"""The convolution stage from a ResNet trained before: `--init-conv timm:resnet101` (the paper begins at random)."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

import torch
from torch import Tensor

from simvlm.model.torch_model import SimVLM

_BLOCK = re.compile(r"layer(\d+)\.(\d+)\.(.+)")
_PARTS = {
    "conv1.weight": "conv1.weight",
    "conv2.weight": "conv2.weight",
    "conv3.weight": "conv3.weight",
    "bn1": "norm1",
    "bn2": "norm2",
    "bn3": "norm3",
    "downsample.0.weight": "shortcut.weight",
    "downsample.1": "shortcut_norm",
}


def load_conv(model: SimVLM, source: str) -> None:
    """Puts weights and running statistics of a pretrained ResNet into the model's convolution stage.

    Args:
        model: whose `conv_stem` is "resnet"; it takes as many stages as it has.
        source: "timm:" and the name of a ResNet v1.5 of timm's (torchvision's weights among them).

    Raises:
        ValueError: timm is not installed, has no such model, or its blocks are not the variant's; the difference is
            named.
    """
    library, _, name = source.partition(":")
    if library != "timm" or not name:
        raise ValueError(f"init_conv must be timm: and the name of a ResNet, timm:resnet101 say, got {source!r}")
    if importlib.util.find_spec("timm") is None:
        raise ValueError(f"init_conv: {source} needs timm, not installed here (pip install timm)")
    import timm

    try:
        theirs = timm.create_model(name, pretrained=True)
    except Exception as error:  # an unknown name, no network, no file
        raise ValueError(f"init_conv: timm cannot give {name!r}: {' '.join(str(error).split())}") from error
    tensors = _renamed(theirs.state_dict())
    own = model.conv.state_dict()
    # Stages past the model's own are left out.
    tensors = {name: x for name, x in tensors.items() if not _is_past(name, len(model.conv.stages))}
    wrong = [f"missing {name}" for name in own if name not in tensors]
    wrong += [f"unexpected {name}" for name in tensors if name not in own]
    wrong += [
        f"{name} of shape {list(x.shape)} instead of {list(own[name].shape)}"
        for name, x in tensors.items()
        if name in own and x.shape != own[name].shape
    ]
    if wrong:
        raise ValueError(
            f"init_conv: {source} must have the convolution stage's blocks, got {'; '.join(wrong[:6])}"
            f"{f'; and {len(wrong) - 6} more' if len(wrong) > 6 else ''}"
        )
    with torch.no_grad():
        for name, x in tensors.items():
            own[name].copy_(x)


def _is_past(name: str, stages: int) -> bool:
    return name.startswith("stages.") and int(name.split(".")[1]) >= stages


def _renamed(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's names, which timm shares, as the convolution stage's own."""
    found: dict[str, Any] = {}
    for name, x in theirs.items():
        if name.startswith("fc.") or name.endswith("num_batches_tracked"):
            continue
        if (match := _BLOCK.fullmatch(name)) is not None:
            stage, block, part = int(match[1]) - 1, match[2], match[3]
            prefix = next((old for old in _PARTS if part == old or part.startswith(old + ".")), None)
            renamed = part if prefix is None else _PARTS[prefix] + part[len(prefix) :]
            found[f"stages.{stage}.{block}.{renamed}"] = x
        else:
            stem = {"conv1.weight": "stem.weight"}.get(name, name.replace("bn1.", "stem_norm."))
            found[stem] = x
    return found
