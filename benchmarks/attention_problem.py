"""One case of `prefix_attention` as tensors on a device, in the forms that its contestants need, and its truth."""

from __future__ import annotations

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import attention_cases
from simvlm.kernels import prefix_attention
from simvlm.kernels.attention import spec
from simvlm.kernels.parity import DTYPES


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
