"""`embed_sequence` as data, in numpy alone: cases, inputs, FLOPs, bytes, error budget. See attention/spec.py."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from simvlm.kernels.attention.layout import PrefixLayout
from simvlm.kernels.attention.spec import DTYPES, FLOOR, RATIO_MAX, RATIO_RMS
from simvlm.kernels.stem import embed_sequence

__all__ = ["CASES", "DIFFERENTIABLE", "DTYPES", "FLOOR", "OUTPUTS", "RATIO_MAX", "RATIO_RMS", "Case"]

OUTPUTS = ("rows",)
DIFFERENTIABLE = ("features", "weight", "bias", "image_positions", "text")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One call.

    Attributes:
        text_lens: text rows of each sequence, beside the Gh·Gw patches of those that `has_image` (None: all).
        channels: C, or None for the identity instead of a projection.
        padded: T for [B, T, D] storage, None for packed storage.
        tail: text rows past the last sequence's, NaN.
        memory: "contiguous"; "strided_batch" (features are every other image of a larger array); "misaligned".
    """

    name: str
    text_lens: tuple[int, ...]
    image_grid: tuple[int, int] | None = (2, 3)
    has_image: tuple[bool, ...] | None = None
    channels: int | None = 24
    width: int = 16
    bias: bool = True
    padded: int | None = None
    tail: int = 3
    memory: str = "contiguous"
    gradients: bool = True
    tier: str = "core"

    @property
    def images(self) -> tuple[bool, ...]:
        """Which sequences have one."""
        if self.image_grid is None:
            return (False,) * len(self.text_lens)
        return (True,) * len(self.text_lens) if self.has_image is None else self.has_image

    @property
    def patches(self) -> int:
        return math.prod(self.image_grid) if self.image_grid is not None else 0

    def layout(self) -> PrefixLayout:
        q_lens = [n + self.patches * has for n, has in zip(self.text_lens, self.images, strict=True)]
        has_image = None if self.has_image is None else list(self.has_image)
        if self.padded is None:
            return PrefixLayout.packed(q_lens, image_grid=self.image_grid, has_image=has_image)
        return PrefixLayout.padded(
            len(q_lens), self.padded, q_lens=q_lens, image_grid=self.image_grid, has_image=has_image
        )


def make_inputs(case: Case, seed: int = 0) -> dict[str, np.ndarray]:
    """float32 inputs and the cotangent `drows`; NaN in every row that no sequence owns."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    layout, images = case.layout(), sum(case.images)
    text_rows = sum(case.text_lens) + case.tail
    inputs: dict[str, np.ndarray] = {"text": normal(text_rows, case.width)}
    inputs["text"][sum(case.text_lens) :] = np.nan
    if case.image_grid is not None:
        channels = case.width if case.channels is None else case.channels
        inputs["features"] = normal(images, *case.image_grid, channels)
        inputs["image_positions"] = normal(case.patches, case.width)
        if case.channels is not None:
            inputs["weight"] = normal(case.width, channels) / np.float32(math.sqrt(channels))
        if case.bias:
            inputs["bias"] = normal(case.width)
    rows = layout.batch * case.padded if case.padded is not None else images * case.patches + text_rows
    drows = np.full((rows, case.width), np.nan, np.float32)
    for start, length in zip(layout.q_starts, layout.q_lens, strict=True):
        drows[start : start + length] = normal(length, case.width)
    inputs["drows"] = drows if case.padded is None else drows.reshape(layout.batch, case.padded, case.width)
    return inputs


def call(case: Case, layout: PrefixLayout, inputs: dict[str, Any], impl: str | None) -> tuple[Any]:
    """The op on arrays of any library: (rows,)."""
    features, weight, bias, positions = (inputs.get(name) for name in DIFFERENTIABLE[:4])
    return (embed_sequence(features, weight, bias, positions, inputs["text"], layout, impl=impl),)


def flops(case: Case, direction: str) -> int:
    """Floating-point operations of the projection's products: one forward, two backward."""
    products = {"forward": 1, "backward": 2, "both": 3}[direction]
    return 2 * products * sum(case.images) * case.patches * case.width * (case.channels or 0)


def bytes_moved(case: Case, direction: str, itemsize: int) -> int:
    """The least traffic: every input read once and every output written once (parameters in float32)."""
    patches = sum(case.images) * case.patches
    rows = case.padded * len(case.text_lens) if case.padded is not None else patches + sum(case.text_lens) + case.tail
    features = patches * (case.width if case.channels is None else case.channels) * itemsize
    text, out = (sum(case.text_lens) + case.tail) * case.width * itemsize, rows * case.width * itemsize
    weight = case.width * (case.channels or 0) * 4
    positions = (case.patches + case.bias) * case.width * 4
    forward = features + text + out + weight + positions
    backward = forward + weight + (features if case.channels is not None else 0)
    return {"forward": forward, "backward": backward, "both": forward + backward}[direction]


def floors(case: Case, inputs: dict[str, np.ndarray], dtype: str) -> dict[str, tuple[float, float]]:
    """FLOOR times the largest and the rms of each formula with every term replaced by its absolute value, float64."""
    size = {name: np.abs(x.astype(np.float64)) for name, x in inputs.items()}
    layout = case.layout()
    drows = size["drows"].reshape(-1, case.width)
    owned = [np.arange(start, start + length) for start, length in zip(layout.q_starts, layout.q_lens, strict=True)]
    of_text = [rows[patches:] for rows, patches in zip(owned, layout.image_lens, strict=True)]
    text_rows = np.concatenate([np.zeros(0, np.int64), *of_text])
    sizes = {"rows": [size["text"][: len(text_rows)].ravel()], "dtext": [drows[text_rows].ravel()]}
    if case.image_grid is not None:
        patch_rows = [rows[:patches] for rows, patches in zip(owned, layout.image_lens, strict=True) if patches]
        features = size["features"].reshape(len(patch_rows), case.patches, case.channels or case.width)
        dimages = drows[np.array(patch_rows, np.int64).reshape(len(patch_rows), case.patches)]
        weight = size.get("weight", np.eye(case.width))
        sizes["rows"].append((features @ weight.T + size.get("bias", 0.0) + size["image_positions"]).ravel())
        sizes |= {
            "dfeatures": [(dimages @ weight).ravel()],
            "dweight": [np.einsum("jid,jic->dc", dimages, features).ravel()],
            "dbias": [dimages.sum((0, 1))],
            "dimage_positions": [dimages.sum(0).ravel()],
        }
    flat = {name: np.concatenate(parts) for name, parts in sizes.items()}
    return {name: (FLOOR * float(x.max()), FLOOR * math.sqrt(np.mean(x**2))) for name, x in flat.items() if x.size}


_MIXED = (True, False, True, True, False)

CASES: tuple[Case, ...] = (
    Case(name="smallest", text_lens=(1,), image_grid=(1, 1), channels=1, width=1, tail=0),
    Case(name="mixed", text_lens=(4, 9, 0, 17, 1), has_image=_MIXED),
    Case(name="mixed_padded", text_lens=(4, 9, 0, 17, 1), has_image=_MIXED, padded=25),
    Case(name="mixed_identity", text_lens=(4, 9, 0, 17, 1), has_image=_MIXED, channels=None),
    Case(
        name="mixed_identity_padded", text_lens=(4, 9, 0, 17, 1), has_image=_MIXED, channels=None, padded=23, bias=False
    ),
    Case(name="mixed_without_bias", text_lens=(4, 9, 0, 17, 1), has_image=_MIXED, bias=False),
    Case(name="image_only", text_lens=(0, 0, 0), tail=0),
    Case(name="image_only_padded", text_lens=(0, 0, 0), padded=8),
    Case(name="text_only", text_lens=(5, 0, 12), image_grid=None),
    Case(name="text_only_padded", text_lens=(5, 0, 12), image_grid=None, padded=12),
    Case(name="text_only_with_grid", text_lens=(5, 0, 12), has_image=(False, False, False)),
    Case(name="empty_sequences", text_lens=(0, 0, 3, 0), has_image=(False, True, False, False), padded=9),
    Case(name="nobody", text_lens=(0, 0), has_image=(False, False), padded=4),
    Case(name="grid_row", text_lens=(3, 2), image_grid=(1, 17)),
    Case(name="grid_column", text_lens=(3, 2), image_grid=(17, 1), padded=31),
    *(
        Case(name=f"odd_{channels}_{width}", text_lens=(6, 3), image_grid=(3, 5), channels=channels, width=width)
        for channels, width in ((1, 8), (15, 17), (33, 31), (64, 65), (129, 127), (80, 80))
    ),
    Case(name="many_images", text_lens=(2,) * 33, image_grid=(2, 2), channels=8, width=24),
    Case(name="large_grid", text_lens=(40,), image_grid=(14, 14), channels=32, width=40),
    Case(name="strided_batch", text_lens=(4, 2), memory="strided_batch"),
    Case(name="misaligned", text_lens=(4, 2, 7), has_image=(True, False, True), memory="misaligned"),
    # the model variants: Base projects 1024 channels to 768, Large and Huge have equal widths
    Case(
        name="base",
        text_lens=(64, 256, 9),
        image_grid=(14, 14),
        has_image=(True, False, True),
        channels=1024,
        width=768,
        tier="full",
    ),
    Case(name="base_480", text_lens=(30,), image_grid=(30, 30), channels=1024, width=768, padded=930, tier="full"),
    Case(name="large", text_lens=(64, 256), image_grid=(14, 14), channels=None, width=1024, bias=False, tier="full"),
    Case(name="huge", text_lens=(64, 20), image_grid=(14, 14), channels=None, width=1280, padded=260, tier="full"),
)
