"""`embed_sequence` against the same in plain PyTorch: a linear map, a sum, and patches and text put in their places.

"both" is forward and backward with the gradients of features, weight, bias, image positions and text.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import stem_cases
from benchmarks.contest import Stopwatch
from benchmarks.record import Settings
from benchmarks.stem_contest import Compute, Op, Peer, Problem
from simvlm.kernels.stem import embed_spec


def bench_embed_sequence(
    stopwatch: Stopwatch, benchmark: Any, settings: Settings, case: str, dtype: str, direction: str
) -> None:
    OP.run(stopwatch, benchmark, settings, case, dtype, direction)


def selection(cases: list[str], dtypes: list[str], quick: bool) -> list[tuple[str, str, str]]:
    return OP.selection(cases, dtypes, quick)


def compile_ahead(case: str, dtype: str, direction: str, device: str) -> None:
    OP.compile_ahead(case, dtype, direction, device)


def described(case: embed_spec.Case) -> str:
    form = "packed" if case.padded is None else f"padded to {case.padded}"
    shortest, longest = min(case.text_lens), max(case.text_lens)
    parts = [f"{len(case.text_lens)} sequences, {form}"]
    if case.image_grid is not None:
        parts.append(f"{sum(case.images)} images of {case.image_grid[0]}×{case.image_grid[1]} patches")
    parts.append(f"{shortest if shortest == longest else f'{shortest}–{longest}'} text rows")
    channels = "no projection" if case.channels is None else f"{case.channels} channels"
    return ", ".join([*parts, f"{channels}, width {case.width}"])


class Places:
    """Where each patch and each text row goes, counted once a batch.

    Attributes:
        shape: of the output.
        patch_rows, text_rows: int64, the storage rows of all patches, and of the text rows in use.
        sources: int64[rows], of every storage row in patches, then text, then one row of zeros.
        full: does every storage row belong to a sequence?
    """

    def __init__(self, problem: Problem) -> None:
        case, layout = problem.case, problem.case.layout()
        self.shape = tuple(problem.cotangent.shape)
        patches, texts = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for start, length, image_len in zip(layout.q_starts, layout.q_lens, layout.image_lens, strict=True):
            patches.append(start + np.arange(image_len))
            texts.append(start + np.arange(image_len, length))
        patch_rows, text_rows = np.concatenate(patches), np.concatenate(texts)
        rows = problem.cotangent.numel() // case.width
        sources = np.full(rows, len(patch_rows) + problem.inputs["text"].shape[0])
        sources[patch_rows] = np.arange(len(patch_rows))
        sources[text_rows] = len(patch_rows) + np.arange(len(text_rows))
        self.full = len(patch_rows) + len(text_rows) == rows
        self.patch_rows, self.text_rows, self.sources = (
            torch.from_numpy(x).to(problem.device) for x in (patch_rows, text_rows, sources)
        )


def _patches(inputs: dict[str, Tensor]) -> list[Tensor]:
    """[[Bi·I, D]], projected, with their positions; no patch, no entry."""
    if "features" not in inputs:
        return []
    x, dtype = inputs["features"].flatten(1, 2), inputs["features"].dtype
    bias = inputs.get("bias")
    if "weight" in inputs:
        x = F.linear(x, inputs["weight"].to(dtype), None if bias is None else bias.to(dtype))
    elif bias is not None:
        x = x + bias.to(dtype)
    return [(x + inputs["image_positions"].to(dtype)).flatten(0, 1)]


def _gathered(problem: Problem) -> Compute:
    places = Places(problem)

    def compute(inputs: dict[str, Tensor]) -> Tensor:
        text = inputs["text"]
        nobody = [] if places.full else [text.new_zeros(1, text.shape[1])]
        return torch.cat([*_patches(inputs), text, *nobody])[places.sources].view(places.shape)

    return compute


def _placed(problem: Problem) -> Compute:
    places = Places(problem)

    def compute(inputs: dict[str, Tensor]) -> Tensor:
        text = inputs["text"]
        rows = (torch.empty if places.full else torch.zeros)(
            places.sources.shape[0], text.shape[1], dtype=text.dtype, device=text.device
        )
        for patches in _patches(inputs):
            rows = rows.index_copy_(0, places.patch_rows, patches)
        return rows.index_copy_(0, places.text_rows, text[: places.text_rows.shape[0]]).view(places.shape)

    return compute


def _compiled(problem: Problem) -> Compute:
    return torch.compile(_gathered(problem), dynamic=False)


PEERS: tuple[Peer, ...] = (
    Peer(
        name="torch, cat",
        what="linear, + positions, cat of patches and text, one index that puts the rows in order; the index was made "
        "before. Parameters are rounded to the features' dtype",
        prepare=_gathered,
    ),
    Peer(
        name="torch, index_copy_",
        what="the same, patches and text copied to their rows of an empty array",
        prepare=_placed,
    ),
    Peer(name="compiled cat", what="torch.compile of the first, static shapes", prepare=_compiled, compiled=True),
)

OP = Op(
    name="embed_sequence",
    spec=embed_spec,
    cases=stem_cases.EMBED,
    gpu_cases=stem_cases.EMBED_GPU,
    asked=("text", "weight"),
    peers=PEERS,
    quick_cases=("base_b8", "demo_b36"),
    described=described,
)
