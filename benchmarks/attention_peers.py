"""What competes with `prefix_attention`: the ways to write it in plain PyTorch.

Peers work on dense [B, T, N, H] tensors (a packed case is padded to its longest sequence) and everything that a model
could prepare once a batch is prepared outside the timed call, in their favour: padding, the boolean mask, and the index
that spreads the table over pairs of patches. FlexAttention takes packed tensors as they are. On a GPU each backend of
SDPA has rows of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.attention_problem import Problem
from simvlm.kernels import PrefixLayout

BACKENDS = {
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "math": SDPBackend.MATH,
}
"""of scaled_dot_product_attention."""

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""(q, k, v, table) → out, in the form of the peer's tensors."""


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
