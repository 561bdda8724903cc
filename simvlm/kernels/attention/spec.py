"""`prefix_attention` as data, in numpy alone: cases, inputs, FLOPs, bytes, error budget.

Tests and benchmarks read this file; a new kernel adds nothing to it. Tiers: "core" runs in `make test`, "full" in
`make test-full`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from simvlm.kernels.attention import prefix_attention
from simvlm.kernels.attention.layout import PrefixLayout

OUTPUTS = ("out", "lse")
DIFFERENTIABLE = ("q", "k", "v", "rel_bias")
DTYPES = ("float32", "bfloat16", "float16")

# docs/contract.md §4: err(kernel) <= ratio · err(yardstick) + floor, for the largest error and for its rms.
RATIO_MAX = {"float32": 3.0, "bfloat16": 3.0, "float16": 3.0}
RATIO_RMS = {"float32": 2.0, "bfloat16": 1.25, "float16": 1.25}
FLOOR = 2.0**-22
"""times the rms (the largest) of the same formula with every term replaced by its absolute value."""
SCORE = 2.0**-24
"""times the formula with P replaced by P·(scale·Σ|q||k| + |bias|): a score is rounded, and softmax passes it on."""
UNIT = {"float32": 2.0**-21, "bfloat16": 2.0**-8, "float16": 2.0**-11}
"""times the same with dS replaced by P·|dout·out|: the gradients' second floor. A flash backward subtracts
delta = <dout, out> with out as it is stored, so one rounding of out is shared by all dS of a row; the unfused yardstick
has no such term. Only an out kept in float32 (memory) or a second pass over the keys (two products) would avoid it."""

HALF_UNIT = {"float32": 0.0, "bfloat16": 2.0**-9, "float16": 2.0**-12}
"""of the last place, at most, in 16 bits. Times the root of the sum of squares of the terms of dq and dk: a kernel
rounds dS before these products, as it does P before out and dv; the yardstick rounds dP instead, and where few terms
are summed chance decides whose error is the larger. Times an array's largest element: the array itself is rounded."""

H200_FLOPS_PER_S = 790e12
"""A large bfloat16 matrix product, measured."""
H200_BYTES_PER_S = 4.3e12
"""A large copy, read and written bytes together, measured."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One call: the layout's arguments, the shape, and how the tensors lie in memory.

    Attributes:
        padded: (T, S) for [B, T, N, H] storage, None for packed storage with `tail` rows that nobody owns.
        memory: "contiguous"; "fused" (q, k and v are slices of one [.., 3, N, H] array); "shared_heads" (k and v have
            stride 0 over heads); "misaligned" (one element off a 64-byte boundary).
        gradients: False where the contract allows none (key ranges that overlap).
    """

    name: str
    q_lens: tuple[int, ...]
    k_lens: tuple[int, ...] | None = None
    k_starts: tuple[int, ...] | None = None
    prefix_lens: Any = None
    q_offsets: Any = None
    image_grid: tuple[int, int] | None = None
    has_image: tuple[bool, ...] | None = None
    cross: bool = False
    padded: tuple[int, int] | None = None
    tail: int = 3
    heads: int = 2
    head_dim: int = 64
    table: bool = True
    scale: float | None = None
    memory: str = "contiguous"
    gradients: bool = True
    tier: str = "core"

    def layout(self) -> PrefixLayout:
        shared: dict[str, Any] = {
            "prefix_lens": self.prefix_lens,
            "q_offsets": self.q_offsets,
            "image_grid": self.image_grid,
            "has_image": None if self.has_image is None else list(self.has_image),
            "cross": self.cross,
        }
        q_lens, k_lens = list(self.q_lens), None if self.k_lens is None else list(self.k_lens)
        if self.padded is not None:
            return PrefixLayout.padded(len(q_lens), *self.padded, q_lens=q_lens, k_lens=k_lens, **shared)
        k_starts = None if self.k_starts is None else list(self.k_starts)
        return PrefixLayout.packed(q_lens, k_lens, k_starts=k_starts, **shared)

    @property
    def has_table(self) -> bool:
        return self.table and self.image_grid is not None

    @property
    def softmax_scale(self) -> float:
        return 1.0 / math.sqrt(self.head_dim) if self.scale is None else self.scale

    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The storage shapes of q and of k, v, less [N, H]."""
        layout = self.layout()
        if self.padded is not None:
            return (layout.batch, self.padded[0]), (layout.batch, self.padded[1])
        return (layout.q_rows + self.tail,), (layout.k_rows + self.tail,)


def make_inputs(case: Case, seed: int = 0) -> dict[str, np.ndarray]:
    """float32 inputs and the cotangents `dout`, `dlse`; NaN in every row that no sequence owns."""
    rng = np.random.default_rng(seed)
    q_shape, k_shape = case.shapes()
    size = (case.heads, case.head_dim)
    inputs = {
        "q": rng.standard_normal((*q_shape, *size), np.float32),
        "k": rng.standard_normal((*k_shape, *size), np.float32),
        "v": rng.standard_normal((*k_shape, *size), np.float32),
        "dout": rng.standard_normal((*q_shape, *size), np.float32),
        "dlse": rng.standard_normal((*q_shape, case.heads), np.float32),
    }
    if case.memory == "shared_heads":
        for name in ("k", "v"):
            inputs[name][..., :, :] = inputs[name][..., :1, :]
    if case.has_table:
        height, width = case.image_grid or (0, 0)
        table = rng.standard_normal((case.heads, 2 * height - 1, 2 * width - 1), np.float32)
        inputs["rel_bias"] = np.float32(1.5) * table
    owned_q, owned_k = owned_rows(case)
    for name in ("q", "dout", "dlse"):
        inputs[name][~owned_q] = np.nan
    for name in ("k", "v"):
        inputs[name][~owned_k] = np.nan
    return inputs


def call(case: Case, layout: PrefixLayout, inputs: dict[str, Any], impl: str | None) -> tuple[Any, Any]:
    """The op on arrays of any library: (out, lse)."""
    return prefix_attention(
        inputs["q"],
        inputs["k"],
        inputs["v"],
        layout,
        rel_bias=inputs.get("rel_bias"),
        scale=case.scale,
        return_lse=True,
        impl=impl,
    )


def owned_rows(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """bool over the storage rows of q and of k: does a sequence own the row?"""
    layout = case.layout()
    masks = []
    for shape, starts, lens in zip(
        case.shapes(), (layout.q_starts, layout.k_starts), (layout.q_lens, layout.k_lens), strict=True
    ):
        owned = np.zeros(math.prod(shape), bool)
        for start, length in zip(starts, lens, strict=True):
            owned[start : start + length] = True
        masks.append(owned.reshape(shape))
    return masks[0], masks[1]


def visible_pairs(layout: PrefixLayout) -> int:
    """Number of (query, key) pairs that the layout lets see each other, over the batch."""
    host = layout.numpy()
    pairs = 0
    for b in range(host.batch):
        position = int(host.q_offsets[b]) + np.arange(host.q_lens[b], dtype=np.int64)
        pairs += int(np.minimum(np.maximum(position + 1, host.prefix_lens[b]), host.k_lens[b]).sum())
    return pairs


def flops(case: Case, direction: str) -> int:
    """Floating-point operations of the products over visible pairs: 2 products forward, 5 backward, 2·H each."""
    products = {"forward": 2, "backward": 5, "both": 7}[direction]
    return 2 * products * visible_pairs(case.layout()) * case.heads * case.head_dim


def bytes_moved(case: Case, direction: str, itemsize: int) -> int:
    """The least traffic: every input read once and every output written once (lse and table in float32)."""
    q_shape, k_shape = case.shapes()
    q, k = (math.prod(shape) * case.heads * case.head_dim * itemsize for shape in (q_shape, k_shape))
    lse = math.prod(q_shape) * case.heads * 4
    height, width = case.image_grid or (0, 0)
    table = case.heads * (2 * height - 1) * (2 * width - 1) * 4 if case.has_table else 0
    forward = 2 * q + 2 * k + lse + table
    backward = 4 * q + 4 * k + lse + 2 * table
    return {"forward": forward, "backward": backward, "both": forward + backward}[direction]


def least_ms(case: Case, direction: str, itemsize: int) -> float:
    """No kernel on an H200 is faster: max(flops / the product's rate, bytes_moved / the copy's rate), in ms.

    For float32 too it takes the rate of bfloat16 products, three or more of which make one of float32.
    """
    products = flops(case, direction) / H200_FLOPS_PER_S
    traffic = bytes_moved(case, direction, itemsize) / H200_BYTES_PER_S
    return 1e3 * max(products, traffic)


def floors(case: Case, inputs: dict[str, np.ndarray], dtype: str) -> dict[str, tuple[float, float]]:
    """For each output and gradient, the (largest, rms) error that `dtype` may add to the yardstick's."""
    layout = case.layout()
    parts: dict[str, list[np.ndarray]] = {name: [] for name in (*OUTPUTS, *(f"d{name}" for name in DIFFERENTIABLE))}
    q, k, v, dout, dlse = (
        inputs[name].reshape(-1, *inputs[name].shape[len(case.shapes()[0]) :]).astype(np.float64)
        for name in ("q", "k", "v", "dout", "dlse")
    )
    stored_rounding = dict.fromkeys(parts, 0.0)  # of the array's largest element: a yardstick may be luckier than that
    scale = case.softmax_scale
    table = inputs.get("rel_bias")
    dtable = None if table is None else np.zeros(table.shape)
    masks = layout.as_mask()
    for b in range(layout.batch):
        queries = slice(layout.q_starts[b], layout.q_starts[b] + layout.q_lens[b])
        keys = slice(layout.k_starts[b], layout.k_starts[b] + layout.k_lens[b])
        mask = masks[b, : layout.q_lens[b], : layout.k_lens[b]]
        bias_index = _bias_index(case, layout, b)
        for n in range(case.heads):
            qb, kb, vb, do = q[queries, n], k[keys, n], v[keys, n], dout[queries, n]
            bias = np.zeros(mask.shape)
            if table is not None and bias_index is not None:
                inside, rows, cols = bias_index
                bias = np.where(inside, table[n, rows, cols].astype(np.float64), 0.0)
            scores = np.where(mask, scale * qb @ kb.T + bias, -np.inf)
            top = np.max(scores, -1, initial=-1e30, keepdims=True)
            p = np.exp(scores - top)
            total = p.sum(-1, keepdims=True)
            p = np.divide(p, total, out=np.zeros_like(p), where=total > 0)
            dp, out = do @ vb.T, p @ vb
            delta = (p * dp).sum(-1) - dlse[queries, n]
            stored = np.sqrt(((do * out) ** 2).sum(-1))
            size = scale * np.abs(qb) @ np.abs(kb).T + np.abs(bias)
            p_error = p * (FLOOR + SCORE * size)
            ds = p_error * (np.abs(dp) + np.abs(delta)[:, None]) + p * UNIT[dtype] * stored[:, None]
            lse = np.where(total > 0, np.log(np.maximum(total, 1e-300)) + top, 0.0)[:, 0]
            exact = p * (dp - delta[:, None])
            for name, x in (("out", out), ("dq", scale * exact @ kb), ("dk", scale * exact.T @ qb), ("dv", p.T @ do)):
                stored_rounding[name] = max(stored_rounding[name], HALF_UNIT[dtype] * np.abs(x).max(initial=0.0))
            parts["out"].append(p_error @ np.abs(vb))
            parts["lse"].append(FLOOR * ((p * size).sum(-1) + np.abs(lse)))
            squares = exact**2
            parts["dq"].append(scale * (ds @ np.abs(kb) + HALF_UNIT[dtype] * np.sqrt(squares @ kb**2)))
            parts["dk"].append(scale * (ds.T @ np.abs(qb) + HALF_UNIT[dtype] * np.sqrt(squares.T @ qb**2)))
            parts["dv"].append(p_error.T @ np.abs(do))
            if dtable is not None and bias_index is not None:
                np.add.at(dtable[n], (rows[inside], cols[inside]), ds[inside])
    if dtable is not None:
        parts["drel_bias"].append(dtable)
    joined = {name: np.concatenate([part.ravel() for part in found]) for name, found in parts.items() if found}
    return {
        name: (x.max(initial=0.0) + stored_rounding[name], math.sqrt(np.mean(x**2)) if x.size else 0.0)
        for name, x in joined.items()
    }


def _bias_index(case: Case, layout: PrefixLayout, b: int) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    if not case.has_table or case.image_grid is None:
        return None
    height, width = case.image_grid
    p = (layout.q_offsets[b] + np.arange(layout.q_lens[b]))[:, None]
    j = np.arange(layout.k_lens[b])[None, :]
    inside = (p < layout.image_lens[b]) & (j < layout.image_lens[b])
    rows = np.where(inside, j // width - p // width + height - 1, 0)
    cols = np.where(inside, j % width - p % width + width - 1, 0)
    return inside, rows, cols


# One below, at and one above the block edges in use (16 to 128), with empty and one-token sequences between.
_EDGES = (1, 0, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129)
_CAPTIONS = (4, 9, 32, 1, 17, 0, 12, 25)

CASES: tuple[Case, ...] = (
    Case(name="smallest", q_lens=(1,), heads=1, head_dim=8, tail=0),
    *(
        Case(
            name=f"head_dim_{head_dim}",
            q_lens=(40, 37),
            prefix_lens=(26, 5),
            image_grid=(4, 5),
            has_image=(True, False),
            padded=(40, 40),
            head_dim=head_dim,
        )
        for head_dim in range(8, 129, 8)
    ),
    Case(name="edges_bidirectional", q_lens=_EDGES, head_dim=32),
    Case(name="edges_causal", q_lens=_EDGES, prefix_lens=0, head_dim=32),
    Case(
        name="edges_prefix_table",
        q_lens=_EDGES,
        prefix_lens=tuple(n * 2 // 3 for n in _EDGES),
        image_grid=(3, 5),
        has_image=tuple(n > 30 for n in _EDGES),
        head_dim=32,
    ),
    Case(name="all_masked", q_lens=(5, 3, 0), k_lens=(0, 4, 7), padded=(6, 9), table=False),
    Case(name="nobody", q_lens=(0, 0), k_lens=(0, 0), padded=(4, 5)),
    Case(
        name="padded_ragged",
        q_lens=(70, 30, 0, 128),
        k_lens=(70, 30, 0, 128),
        prefix_lens=(20, 12, 0, 128),
        image_grid=(3, 4),
        padded=(130, 130),
    ),
    Case(name="grid_row", q_lens=(30,), prefix_lens=17, image_grid=(1, 17)),
    Case(name="grid_column", q_lens=(30,), prefix_lens=17, image_grid=(17, 1)),
    Case(name="grid_without_table", q_lens=(30, 20), image_grid=(4, 4), table=False),
    Case(name="one_head", q_lens=(400,), prefix_lens=350, image_grid=(17, 19), heads=1, head_dim=24),
    Case(name="image_cut", q_lens=(10, 50), image_grid=(4, 7), prefix_lens=0),
    Case(name="scaled", q_lens=(40,), prefix_lens=9, scale=0.37, image_grid=(3, 3)),
    Case(
        name="base_encoder",
        q_lens=(230, 60, 196),
        image_grid=(14, 14),
        has_image=(True, False, True),
    ),
    Case(name="decoder_only", q_lens=(240, 212), prefix_lens=(205, 196), image_grid=(14, 14)),
    Case(
        name="huge_heads",
        q_lens=(150, 64),
        prefix_lens=(130, 10),
        image_grid=(9, 14),
        heads=3,
        head_dim=80,
        has_image=(True, False),
    ),
    Case(name="captions", q_lens=_CAPTIONS, prefix_lens=0),
    Case(name="captions_cross", q_lens=_CAPTIONS, k_lens=tuple(50 + 3 * n for n in _CAPTIONS), cross=True),
    Case(name="decode", q_lens=(1, 1, 1), k_lens=(80, 33, 1), q_offsets=(79, 32, 0), prefix_lens=0),
    Case(
        name="decode_long",
        q_lens=(1, 3, 8),
        k_lens=(300, 129, 260),
        q_offsets=(299, 126, 100),
        prefix_lens=(0, 0, 90),
        image_grid=(9, 11),
        heads=3,
        head_dim=80,
    ),
    Case(
        name="decode_chunk_table",
        q_lens=(5, 7),
        k_lens=(30, 64),
        q_offsets=(3, 57),
        prefix_lens=(8, 12),
        image_grid=(3, 4),
    ),
    Case(
        name="beams",
        q_lens=(1, 1, 1, 1),
        k_lens=(70, 70, 19, 19),
        k_starts=(0, 0, 70, 70),
        cross=True,
        gradients=False,
    ),
    Case(name="fused_qkv", q_lens=(50, 33), padded=(50, 50), prefix_lens=(14, 33), image_grid=(3, 4), memory="fused"),
    Case(name="fused_qkv_packed", q_lens=(50, 33), prefix_lens=(14, 33), image_grid=(3, 4), memory="fused"),
    Case(name="shared_heads", q_lens=(40, 21), prefix_lens=0, memory="shared_heads", heads=3, gradients=False),
    Case(name="misaligned", q_lens=(40, 21), prefix_lens=(12, 0), image_grid=(3, 4), memory="misaligned", head_dim=72),
    Case(name="keys_apart", q_lens=(20, 30), k_lens=(25, 31), k_starts=(2, 40), q_offsets=(5, 1), prefix_lens=(4, 0)),
    # the shapes of the model variants, whole
    Case(
        name="base_pretrain",
        q_lens=(452, 300, 256, 197),
        prefix_lens=(320, 200, 100, 196),
        image_grid=(14, 14),
        has_image=(True, True, False, True),
        heads=12,
        tier="full",
    ),
    Case(name="base_480", q_lens=(964,), prefix_lens=930, image_grid=(30, 30), heads=4, tier="full"),
    Case(name="large_encoder", q_lens=(452, 260), image_grid=(14, 14), heads=16, tier="full"),
    Case(name="huge_encoder", q_lens=(452, 230), image_grid=(14, 14), heads=16, head_dim=80, tier="full"),
    Case(name="base_decoder", q_lens=(256, 100, 32), prefix_lens=0, heads=12, tier="full"),
    Case(name="base_cross", q_lens=(256, 12), k_lens=(452, 210), cross=True, heads=12, tier="full"),
    Case(name="long_causal", q_lens=(2049,), prefix_lens=0, heads=1, tier="full"),
)
