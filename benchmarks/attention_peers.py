"""What competes with `prefix_attention`: the ways to write it in plain PyTorch, and the problem in the forms they need.

Peers work on dense [B, T, N, H] tensors (a packed case is padded to its longest sequence) and everything that a model
could prepare once a batch is prepared outside the timed call, in their favour: padding, the boolean mask, and the index
that spreads the table over pairs of patches. FlexAttention takes packed tensors as they are. On a GPU each backend of
SDPA has rows of its own.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import attention_cases
from simvlm.kernels import PrefixLayout, prefix_attention
from simvlm.kernels.attention import spec
from simvlm.kernels.parity import DTYPES

BACKENDS = {
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "math": SDPBackend.MATH,
}
"""of scaled_dot_product_attention."""

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""(q, k, v, table) → out, in the form of the peer's tensors."""


class Problem:
    """One case in one dtype on one device.

    Attributes:
        stored: q, k, v, dout (and rel_bias, float32) as the case stores them; zeros where no sequence owns the row.
        dense: the same as [B, T, N, H]; the very same tensors for a padded case.
        mask: bool[B, T, S], who sees whom.
        bias_index: int64[B or 1, T, S] into a table flattened and extended by one zero, or None without a table.
    """

    def __init__(self, case: spec.Case, dtype: str, device: str, seed: int = 0) -> None:
        self.case, self.dtype, self.device = case, dtype, device
        self.layout = case.layout().to(device)
        self.stored = {
            name: x.to(torch.float32 if name == "rel_bias" else DTYPES[dtype]).to(device)
            for name, x in self._inputs(seed).items()
        }
        self._real_q, self._real_k, self._rows_q, self._rows_k = self._places()
        self.dense = dict(self.stored)
        if case.padded is None:
            for name, rows, real in (
                ("q", self._rows_q, self._real_q),
                ("dout", self._rows_q, self._real_q),
                ("k", self._rows_k, self._real_k),
                ("v", self._rows_k, self._real_k),
            ):
                self.dense[name] = self.stored[name][rows] * real[..., None, None]
        self.mask = torch.from_numpy(case.layout().as_mask()).to(device)
        self.sees_all = bool(self.mask[self._real_q].all())
        # A padding query sees everything: softmax over nothing is NaN, in its gradients too. Nobody reads its output.
        self.mask |= ~self.mask.any(-1, keepdim=True)
        self.bias_index = self._bias_index()

    @property
    def table(self) -> Tensor | None:
        return self.stored.get("rel_bias")

    @property
    def scale(self) -> float:
        return self.case.softmax_scale

    @property
    def plain_causal(self) -> bool:
        """Is `is_causal=True` this case's mask, for queries that are real? (Padding comes last.)"""
        host = self.case.layout()
        aligned = self.mask.shape[1] == self.mask.shape[2] and np.array_equal(host.q_lens, host.k_lens)
        return aligned and not self.case.has_table and not host.prefix_lens.any() and not host.q_offsets.any()

    def inputs(self, packed: bool) -> dict[str, Tensor]:
        return self.stored if packed else self.dense

    def real(self, x: Tensor, axis: str, packed: bool) -> Tensor:
        """The rows of `x` that belong to a sequence, end to end: equal for every form. `axis`: "q" or "k"."""
        real, rows = (self._real_q, self._rows_q) if axis == "q" else (self._real_k, self._rows_k)
        if packed and self.case.padded is None:
            return x[rows[real]]
        return x[real]

    def error(self, out: Tensor, packed: bool) -> float:
        """rms of the output's error against the reference in float64, relative to the output's rms."""
        truth = _truth(self.case, self.dtype, self.device)
        got = self.real(out.detach(), "q", packed).double()
        return float(((got - truth).square().mean() / truth.square().mean()).sqrt())

    def dense_bias(self, table: Tensor | None) -> Tensor:
        """What SDPA takes as `attn_mask`: bias where seen, -inf elsewhere, [B, N or 1, T, S] in q's dtype."""
        bias = self.bias(table).to(DTYPES[self.dtype])
        return torch.where(self.mask[:, None], bias, float("-inf"))

    def bias(self, table: Tensor | None) -> Tensor:
        """The table spread over pairs of patches, [B or 1, N, T, S]; a zero where there is none."""
        if table is None or self.bias_index is None:
            return torch.zeros((1, 1, 1, 1), device=self.device)
        flat = F.pad(table.flatten(1), (0, 1))
        if self.device == "cuda":  # an index's gradient is sorted there; a select's is summed at once
            return flat.index_select(1, self.bias_index.flatten()).unflatten(1, self.bias_index.shape).transpose(0, 1)
        return flat[:, self.bias_index].transpose(0, 1)

    def _inputs(self, seed: int) -> dict[str, Tensor]:
        """float32; without dlse, for no peer returns lse."""
        case = self.case
        if case not in attention_cases.GPU_BENCHMARKS:
            made = spec.make_inputs(case, seed)
            return {name: torch.from_numpy(np.nan_to_num(x)) for name, x in made.items() if name != "dlse"}
        # numpy would draw them for seconds.
        generator = torch.Generator(self.device).manual_seed(seed)
        draw = functools.partial(torch.randn, device=self.device, generator=generator)
        shapes, size = dict(zip("qk", case.shapes(), strict=True)), (case.heads, case.head_dim)
        inputs = {
            name: draw(*shapes[axis], *size) for name, axis in (("q", "q"), ("k", "k"), ("v", "k"), ("dout", "q"))
        }
        if case.has_table and case.image_grid:
            height, width = case.image_grid
            inputs["rel_bias"] = 1.5 * draw(case.heads, 2 * height - 1, 2 * width - 1)
        return inputs

    def _places(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """bool and int64 [B, T] and [B, S]: is there a token, and in which storage row."""
        host = self.case.layout()
        found = []
        for axis, starts, lens in ((0, host.q_starts, host.q_lens), (1, host.k_starts, host.k_lens)):
            length = host.padded_shape[axis] if host.padded_shape else int(lens.max(initial=0))
            at = np.arange(length)[None]
            real = at < lens[:, None]
            found.append((torch.from_numpy(real), torch.from_numpy(np.where(real, starts[:, None] + at, 0))))
        (real_q, rows_q), (real_k, rows_k) = found
        real_q, real_k, rows_q, rows_k = (x.to(self.device) for x in (real_q, real_k, rows_q, rows_k))
        return real_q, real_k, rows_q.long(), rows_k.long()

    def _bias_index(self) -> Tensor | None:
        if not self.case.has_table or self.case.image_grid is None:
            return None
        bounds = torch.as_tensor(self.layout.bounds).long()
        q_offsets, image_lens = bounds[5][:, None, None], bounds[6][:, None, None]
        height, width = self.case.image_grid
        p = q_offsets + torch.arange(self.mask.shape[1], device=self.device)[:, None]
        j = torch.arange(self.mask.shape[2], device=self.device)
        inside = (p < image_lens) & (j < image_lens)
        rows, cols = j // width - p // width + height - 1, j % width - p % width + width - 1
        index = torch.where(inside, rows * (2 * width - 1) + cols, (2 * height - 1) * (2 * width - 1))
        return index[:1] if bool((index == index[:1]).all()) else index


@functools.lru_cache(maxsize=1)
def _truth(case: spec.Case, dtype: str, device: str) -> Tensor:
    """The reference's output in float64 on inputs rounded to `dtype`: the rows that belong to a sequence."""
    problem = Problem(case, dtype, device)
    q, k, v = (problem.stored[name].double() for name in ("q", "k", "v"))
    out = prefix_attention(q, k, v, problem.layout, rel_bias=problem.table, scale=case.scale, impl="reference")
    return problem.real(out, "q", packed=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peer:
    """One rival.

    Attributes:
        what: one line for the report.
        prepare: what a model does once a batch; returns the function that is timed.
        takes_part: on which problems and directions ("forward", "both") the row means anything.
        exact: does it compute the op on this problem, or less (a bound)?
        compiled: built by torch.compile: left out by --quick.
        packed: takes packed tensors as they are.
    """

    name: str
    what: str
    prepare: Callable[[Problem], Attend]
    takes_part: Callable[[Problem, str], bool] = lambda problem, direction: True
    exact: Callable[[Problem], bool] = lambda problem: True
    compiled: bool = False
    packed: bool = False


def _sdpa(problem: Problem, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=problem.scale, **options).transpose(1, 2)


def _bias_ready(problem: Problem) -> Attend:
    ready = problem.dense_bias(problem.table).contiguous()
    return lambda q, k, v, table: _sdpa(problem, q, k, v, attn_mask=ready)


def _bias_ready_aligned(problem: Problem) -> Attend:
    """Rows of the mask begin at multiples of 16 bytes, else the GPU's kernels copy it to such rows in every call."""
    length = problem.mask.shape[2]
    ready = F.pad(problem.dense_bias(problem.table), (0, -length % 8))[..., :length]
    return lambda q, k, v, table: _sdpa(problem, q, k, v, attn_mask=ready)


def _bias_built(problem: Problem) -> Attend:
    return lambda q, k, v, table: _sdpa(problem, q, k, v, attn_mask=problem.dense_bias(table))


def _causal(problem: Problem) -> Attend:
    return lambda q, k, v, table: _sdpa(problem, q, k, v, is_causal=True)


def _bare(problem: Problem) -> Attend:
    return lambda q, k, v, table: _sdpa(problem, q, k, v)


def _on(backend: str, prepare: Callable[[Problem], Attend]) -> Callable[[Problem], Attend]:
    """The same with one backend of SDPA alone: it fails where that one refuses."""

    def prepare_on(problem: Problem) -> Attend:
        attend = prepare(problem)

        def call(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None) -> Tensor:
            with sdpa_kernel(BACKENDS[backend]):
                return attend(q, k, v, table)

        return call

    return prepare_on


def _padded_to_256(problem: Problem) -> Attend:
    """The same captions in the text decoder's full length: who does not sort captions by length pays this."""
    case = problem.case
    extra = 256 - problem.dense["q"].shape[1]
    q = F.pad(problem.dense["q"], (0, 0, 0, 0, 0, extra))
    own = 0 if case.cross else extra
    k, v = (F.pad(problem.dense[name], (0, 0, 0, 0, 0, own)) for name in "kv")
    mask = F.pad(problem.mask, (0, own, 0, extra), value=False)
    mask |= ~mask.any(-1, keepdim=True)
    ready = torch.where(mask[:, None], 0.0, float("-inf")).to(q.dtype).contiguous()
    return lambda *_: _sdpa(problem, q, k, v, attn_mask=ready)[:, : 256 - extra]


def _eager(problem: Problem) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        scores = q @ k.transpose(-2, -1) * problem.scale + problem.dense_bias(table)
        return (scores.softmax(-1) @ v).transpose(1, 2)

    return attend


def _compiled_eager(problem: Problem) -> Attend:
    return torch.compile(_eager(problem), dynamic=False)


def _flex(problem: Problem) -> Attend:
    q_shape, k_shape = problem.case.shapes()
    return flex(problem.layout, q_shape[-1], k_shape[-1], problem.scale)


def _flex_without_table(problem: Problem) -> Attend:
    attend = _flex(problem)
    return lambda q, k, v, table: attend(q, k, v, None)


def flex(layout: PrefixLayout, q_rows: int, k_rows: int, scale: float) -> Attend:
    """FlexAttention, compiled, with the layout's BlockMask; a table is captured by its score_mod.

    Args:
        q_rows, k_rows: of packed storage; T and S of a padded layout.
    """
    from torch.nn.attention.flex_attention import flex_attention

    packed = not layout.is_padded
    block_mask = layout.as_flex_block_mask(*((q_rows, k_rows) if packed else ()))
    height, width = layout.image_grid or (1, 1)
    bounds = torch.as_tensor(layout.bounds).long()
    q_offsets, image_lens = bounds[5], bounds[6]
    row = torch.arange(q_rows, device=bounds.device)
    owner = torch.searchsorted((bounds[0] + bounds[1]).contiguous(), row, right=True).clamp(max=bounds.shape[1] - 1)

    def attend(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None) -> Tensor:
        def with_bias(score: Tensor, b: Tensor, n: Tensor, i: Tensor, j: Tensor) -> Tensor:
            assert table is not None
            if packed:
                b = owner[i]
                i, j = i - bounds[0][b], j - bounds[2][b]
            p = q_offsets[b] + i
            row = (j // width - p // width + height - 1).clamp(0, 2 * height - 2)
            col = (j % width - p % width + width - 1).clamp(0, 2 * width - 2)
            inside = (p < image_lens[b]) & (j < image_lens[b])
            return score + torch.where(inside, table[n, row, col], 0.0)

        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        score_mod = None if table is None else with_bias
        out = flex_attention(q, k, v, score_mod=score_mod, block_mask=block_mask, scale=scale)
        assert isinstance(out, Tensor)
        return out.transpose(1, 2)

    compiled = torch.compile(attend, dynamic=False)
    if not packed:
        return compiled
    # The batch axis is added out here: torch 2.13's CPU template fails on a view of a tensor with three axes.
    return lambda q, k, v, table: compiled(q[None], k[None], v[None], table)[0]


def _on_gpu(problem: Problem, direction: str) -> bool:
    return problem.device == "cuda"


def _on_cpu(problem: Problem, direction: str) -> bool:
    return problem.device == "cpu"


def _ready_in_time(problem: Problem, direction: str) -> bool:
    """May the bias be built before the call? A table that learns is another one in every call."""
    return direction == "forward" or problem.table is None


PEERS: tuple[Peer, ...] = (
    Peer(
        name="SDPA, bias ready",
        what="scaled_dot_product_attention; the dense mask + bias was built before, as if it cost nothing",
        prepare=_bias_ready,
        takes_part=_ready_in_time,
    ),
    Peer(
        name="SDPA, bias built",
        what="scaled_dot_product_attention; every call spreads the table and adds the mask, as each layer must. "
        "With a table that learns, torch falls back to its unfused math path",
        prepare=_bias_built,
        takes_part=lambda problem, direction: problem.table is not None,
    ),
    Peer(
        name="SDPA, is_causal",
        what="scaled_dot_product_attention(is_causal=True), where that is the case's mask",
        prepare=_causal,
        takes_part=lambda problem, direction: problem.plain_causal,
    ),
    Peer(
        name="SDPA, bare",
        what="scaled_dot_product_attention without mask and bias: the op itself where every query sees every key, "
        "else less than the op (a bound)",
        prepare=_bare,
        takes_part=_on_cpu,
        exact=lambda problem: problem.sees_all and problem.table is None,
    ),
    Peer(
        name="SDPA, padded to 256",
        what="scaled_dot_product_attention on captions padded to the text decoder's 256 tokens, a context row",
        prepare=_padded_to_256,
        takes_part=lambda problem, direction: direction == "forward" and problem.case.name.startswith("captions"),
    ),
    *(
        Peer(
            name=f"SDPA {backend}, bias ready",
            what=f"as SDPA, bias ready, on its backend {backend} alone, the mask's rows aligned",
            prepare=_on(backend, _bias_ready_aligned),
            takes_part=lambda problem, direction: _on_gpu(problem, direction) and _ready_in_time(problem, direction),
        )
        for backend in ("efficient", "cuDNN", "math")
    ),
    *(
        Peer(
            name=f"SDPA {backend}, bias built",
            what=f"as SDPA, bias built, on its backend {backend} alone",
            prepare=_on(backend, _bias_built),
            takes_part=lambda problem, direction: _on_gpu(problem, direction) and problem.table is not None,
        )
        for backend in ("efficient", "cuDNN", "math")
    ),
    *(
        Peer(
            name=f"SDPA {backend}, bare",
            what=f"as SDPA without mask and bias, on its backend {backend} alone: what a GPU can do (a bound)",
            prepare=_on(backend, _bare),
            takes_part=_on_gpu,
            exact=lambda problem: problem.sees_all and problem.table is None,
        )
        for backend in ("cuDNN", "flash")
    ),
    Peer(name="eager", what="matmul, add, softmax, matmul", prepare=_eager, takes_part=_on_cpu),
    Peer(
        name="compiled eager",
        what="torch.compile of eager, static shapes",
        prepare=_compiled_eager,
        takes_part=_on_cpu,
        compiled=True,
    ),
    Peer(
        name="FlexAttention",
        what="torch.compile of flex_attention: BlockMask of the layout, the table captured by score_mod; takes packed "
        "tensors as they are",
        prepare=_flex,
        compiled=True,
        packed=True,
    ),
    Peer(
        name="FlexAttention, no table",
        what="the same without score_mod: mask alone (a bound)",
        prepare=_flex_without_table,
        takes_part=lambda problem, direction: _on_gpu(problem, direction) and problem.table is not None,
        exact=lambda problem: False,
        compiled=True,
        packed=True,
    ),
)
