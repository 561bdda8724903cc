"""A whole training step of Base on a synthetic batch: forward, loss, backward, clipping, AdamW; bfloat16 is autocast.

The batch is random pixels and tokens, so no data pipeline is needed; its lengths are those of a pretraining batch. Ours
is the model as it is, every op on its kernels. The rivals are the same model with torch's own norms (weights laid
channels-last, as torch's convolutions like them), the reference's `embed_sequence`, and another attention:

* eager SDPA: rows padded to the batch's longest sequence for attention alone, so that all other layers save the padding
  too; the table spread and the mask added in each encoder layer, as must be while it learns; is_causal in the decoder;
  a mask in cross-attention. Masks and places are made once a batch, outside the step.
* compiled FlexAttention: the packed rows as they are, the layout's BlockMask made outside the step, the table captured.

Only benchmarks.gpu runs this: a step of Base takes a CPU minutes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.attention_peers import Attend, flex
from benchmarks.bench_stem_step import with_torch_norms
from benchmarks.contest import Contestant, Stopwatch
from benchmarks.record import Settings, Subject, first_line, record
from simvlm.kernels import PrefixLayout, implementations
from simvlm.kernels.attention.spec import visible_pairs
from simvlm.kernels.parity import DTYPES
from simvlm.model import Batch, SimVLMConfig, transformer, variant
from simvlm.model.batch import IMAGE_TEXT, TEXT_ONLY
from simvlm.model.resnet import ConvStage
from simvlm.model.torch_model import SimVLM
from simvlm.train.objectives import suffix_nll
from simvlm.train.optim import adamw
from simvlm.train.settings import OptimizerSettings

OP = "base_step"
CASES = {"base": ("base", 128, 16), "demo": ("demo", 6, 2)}
"""name → variant, image-text pairs, documents: eight pairs a document, as the paper's 4,096 and 512."""


def bench_base_step(
    stopwatch: Stopwatch, benchmark: Any, settings: Settings, case: str, dtype: str, direction: str
) -> None:
    torch.compiler.reset()  # programs of earlier contests count against the number that one function may have
    name, pairs, documents = CASES[case]
    problem = Problem(variant(name), pairs, documents, dtype, settings.device)
    contestants = [problem.ours(), problem.rival("eager SDPA")]
    refused = []
    if settings.quick:
        refused.append(("compiled FlexAttention", "peer", "left out by --quick"))
    else:
        contestants.append(problem.rival("compiled FlexAttention"))
    batch = problem.batch
    subject = Subject(
        op=OP,
        case=case,
        shape=f"{name}: {pairs} pictures with captions, {documents} documents, "
        f"{int(batch.encoder_text_lens.sum())} prefix tokens, {int(batch.decoder_lens.sum())} suffix tokens",
        dtype=dtype,
        direction=direction,
        flops=flops(problem.config, batch),
        bytes_moved=None,
        flops_formula=first_line(flops),
        bytes_formula=None,
        checked="Its kernels meet their error budgets in the benchmarks of their ops.",
        samples=pairs + documents,
    )
    record(benchmark, stopwatch, settings, subject, contestants, refused)


def selection(cases: list[str], dtypes: list[str], quick: bool) -> list[tuple[str, str, str]]:
    return [(name, dtype, "step") for name in cases or ("base",) for dtype in dtypes]


def compile_ahead(case: str, dtype: str, direction: str, device: str) -> None:
    """Compiles what the case's rival will, one layer deep: all layers of a stack run the same programs."""
    name, pairs, documents = CASES[case]
    shallow = dataclasses.replace(variant(name), encoder_depth=1, decoder_depth=1, conv_depths=(1, 1, 1))
    Problem(shallow, pairs, documents, dtype, device).rival("compiled FlexAttention").call()


def synthetic(config: SimVLMConfig, pairs: int, documents: int) -> Batch:
    """Pictures with a prefix of 0 … 16 and a suffix of 4 … 32 tokens; documents fill a quarter to all of both texts."""
    rng = np.random.default_rng(0)
    has_image = rng.permutation(np.arange(pairs + documents) < pairs)
    size, longest = len(has_image), config.max_text_len
    prefixes = np.where(has_image, rng.integers(0, 17, size), rng.integers(longest // 4, longest + 1, size))
    suffixes = np.where(has_image, rng.integers(4, 33, size), rng.integers(longest // 4, longest + 1, size))

    def tokens(count: int) -> np.ndarray:
        return rng.integers(4, config.vocab_size, count).astype(np.int32)

    return Batch(
        images=rng.integers(0, 256, (pairs, config.image_size, config.image_size, 3), np.uint8),
        has_image=has_image,
        encoder_text=tokens(prefixes.sum()),
        encoder_text_lens=prefixes.astype(np.int32),
        decoder_inputs=tokens(suffixes.sum()),
        targets=tokens(suffixes.sum()),
        decoder_lens=suffixes.astype(np.int32),
        sources=np.where(has_image, IMAGE_TEXT, TEXT_ONLY).astype(np.int8),
        sample_ids=np.arange(size),
    )


def flops(config: SimVLMConfig, batch: Batch) -> int:
    """Floating-point operations of products and convolutions, of real rows and visible pairs: three times forward's."""
    width, mlp, layers = config.width, 2 * config.width * config.mlp_dim, config.decoder_depth
    rows, suffix = int(batch.encoder_lens(config.image_len).sum()), int(batch.decoder_lens.sum())
    patches = len(batch.images) * config.image_len
    encoder = config.encoder_depth * rows * (4 * width**2 + mlp)
    decoder = layers * (suffix * (6 * width**2 + mlp) + rows * 2 * width**2)  # keys and values of cross-attention
    projection = patches * config.patch_channels * width if config.has_projection else 0
    logits = suffix * config.vocab_size * width
    pairs = config.encoder_depth * visible_pairs(batch.encoder_layout(config.image_grid))
    pairs += layers * visible_pairs(batch.decoder_layout())
    pairs += layers * visible_pairs(batch.cross_layout(config.image_grid))
    products = encoder + decoder + projection + logits + 2 * pairs * width
    return 3 * (2 * products + len(batch.images) * _conv_flops(config))


def _conv_flops(config: SimVLMConfig) -> int:
    """Forward, of one image."""
    stage = ConvStage(config, "reference").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        stage(torch.zeros(1, config.image_size, config.image_size, 3))
    return counter.get_total_flops()


class Problem:
    """A batch, and models that step on it."""

    def __init__(self, config: SimVLMConfig, pairs: int, documents: int, dtype: str, device: str) -> None:
        self.config, self.dtype, self.device = config, DTYPES[dtype], device
        self.batch = synthetic(config, pairs, documents)
        self.inputs = self.batch.inputs(config).to(device)

    def model(self, impl: str) -> SimVLM:
        """The same weights every time."""
        torch.manual_seed(0)
        with torch.device(self.device):
            return SimVLM(self.config, impl=impl).train()

    def ours(self) -> Contestant:
        """On a GPU Triton; on a CPU C++, or the reference where it was not built: Triton is interpreted there."""
        rows = implementations("prefix_attention")
        able = [row.name for row in rows if row.family == "torch" and row.available]
        impl = next(name for name in able if name in (("triton",) if self.device == "cuda" else ("cpp", "reference")))
        return self.contestant(f"simvlm {impl}", f"the model with impl={impl!r}", "ours", self.model(impl), None)

    def rival(self, name: str) -> Contestant:
        what, prepare = RIVALS[name]
        model = with_torch_norms(self.model("reference"))
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return self.contestant(name, what, "peer", model, Attention(prepare))

    def contestant(self, name: str, what: str, kind: str, model: SimVLM, attention: Attention | None) -> Contestant:
        """`call` takes a step and returns its loss."""
        optimizer = adamw(model, OptimizerSettings())
        tokens = int(self.batch.decoder_lens.sum())

        def step() -> Tensor:
            with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
                nll = suffix_nll(model(self.inputs), model.embedding, self.inputs.targets)
            loss = nll.sum() / tokens
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        def call() -> Tensor:
            if attention is None:
                return step()
            with mock.patch.object(transformer, "prefix_attention", attention):
                return step()

        return Contestant(name=name, what=what, kind=kind, call=call)


class Attention:
    """Stands in for `prefix_attention`; what `prepare` makes of a layout is made once."""

    def __init__(self, prepare: Callable[[PrefixLayout], Attend]) -> None:
        self._prepare = prepare
        self._ready: dict[int, Attend] = {}

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout, *, rel_bias: Tensor | None = None, impl: Any = None
    ) -> Tensor:
        if id(layout) not in self._ready:
            self._ready[id(layout)] = self._prepare(layout)
        with torch.autocast(q.device.type, enabled=False):  # q, k and v are 16-bit already; the table is as it is
            return self._ready[id(layout)](q, k, v, rel_bias)


def _flex(layout: PrefixLayout) -> Attend:
    compiled: dict[int, Attend] = {}

    def attend(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None) -> Tensor:
        if not compiled:
            compiled[0] = flex(layout, q.shape[0], k.shape[0], 1 / math.sqrt(q.shape[-1]))
        # No parameter itself: the program must not depend on which layer's it is.
        return compiled[0](q, k, v, None if table is None else table.clone())

    return attend


def _dense_sdpa(layout: PrefixLayout) -> Attend:
    """Every row of storage belongs to a sequence here."""
    host = layout.numpy()
    device = torch.as_tensor(layout.bounds).device
    lengths = [-(-int(lens.max()) // 8) * 8 for lens in (host.q_lens, host.k_lens)]  # aligned rows of the mask
    places = []
    for starts, lens, length in zip((host.q_starts, host.k_starts), (host.q_lens, host.k_lens), lengths, strict=True):
        owners = np.repeat(np.arange(host.batch), lens)
        places.append(torch.from_numpy(owners * length + np.arange(lens.sum()) - starts[owners]).to(device))
    causal = not layout.cross and not host.prefix_lens.any()
    i, j = torch.arange(lengths[0], device=device), torch.arange(lengths[1], device=device)
    k_lens = torch.from_numpy(host.k_lens).to(device)
    mask = torch.where(j < k_lens[:, None, None, None], 0.0, -math.inf)  # [B, 1, 1, S]: the rest is bidirectional
    has_image = torch.from_numpy(host.image_lens > 0).to(device)[:, None, None, None]
    index = _pair_index(layout.image_grid, device)

    def padded(x: Tensor, axis: int) -> Tensor:
        """[B, N, T, H]"""
        room = x.new_zeros(host.batch * lengths[axis], *x.shape[1:]).index_copy(0, places[axis], x)
        return room.unflatten(0, (host.batch, lengths[axis])).transpose(1, 2)

    def attend(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None) -> Tensor:
        bias = None if causal else mask.to(q.dtype).expand(-1, 1, len(i), -1)
        if table is not None and index is not None:
            patches = math.isqrt(index.shape[0])
            spread = table.flatten(1).index_select(1, index).unflatten(1, (patches, patches)).to(q.dtype)
            spread = F.pad(spread, (0, lengths[1] - patches, 0, lengths[0] - patches))
            bias = torch.where(has_image, spread, 0.0) + mask.to(q.dtype)
        out = F.scaled_dot_product_attention(padded(q, 0), padded(k, 1), padded(v, 1), attn_mask=bias, is_causal=causal)
        return out.transpose(1, 2).flatten(0, 1).index_select(0, places[0])

    return attend


def _pair_index(grid: tuple[int, int] | None, device: torch.device) -> Tensor | None:
    """int64[I·I]: the entry of a flattened table for each pair of patches."""
    if grid is None:
        return None
    height, width = grid
    at = torch.arange(height * width, device=device)
    rows = at // width - at[:, None] // width + height - 1
    cols = at % width - at[:, None] % width + width - 1
    return (rows * (2 * width - 1) + cols).flatten()


RIVALS: dict[str, tuple[str, Callable[[PrefixLayout], Attend]]] = {
    "eager SDPA": (
        "the model with torch's norms and scaled_dot_product_attention on its best backend, attention's rows padded to "
        "the longest, the table spread in each layer",
        _dense_sdpa,
    ),
    "compiled FlexAttention": (
        "the model with torch's norms and compiled flex_attention on packed rows, the table captured by score_mod",
        _flex,
    ),
}
