"""The device of a torch run, the precision that suits it, and how much it could do."""

from __future__ import annotations

import torch

from simvlm.train.settings import Precision

# Dense products in bfloat16 with float32 sums, a second, as NVIDIA's data sheets say; the first name that fits.
_BF16_FLOPS = (
    ("B200", 2250e12),
    ("GH200", 989e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("A10G", 70e12),
    ("RTX 4090", 165e12),
)


def device_of(name: str) -> torch.device:
    """
    Raises:
        ValueError: this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device must be one of this machine's, got {name!r} ({str(error).splitlines()[0]})") from None
    return device


def precision_of(name: Precision, device: torch.device) -> Precision:
    """ "auto": bfloat16 where the processor multiplies it."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    multiplies = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if device.type == "cpu" and multiplies else "float32"


def peak_flops(device: torch.device, precision: Precision) -> float | None:
    """Of products, a second; None where it is not known."""
    if device.type != "cuda" or precision != "bfloat16":
        return None
    return peak_flops_of(torch.cuda.get_device_name(device))


def peak_flops_of(name: str) -> float | None:
    """Of a GPU by its name, in bfloat16, a second."""
    return next((flops for part, flops in _BF16_FLOPS if part in name), None)
