"""`simvlm pretrain --dry-run`: what a run would read, hold and take: memory of a process, tokens, time.

What the forward pass keeps for the backward pass is counted, not guessed: the model runs on tensors without memory
(torch's fake tensors), and every tensor that autograd saves is added up. Parameters, gradients, moments and the largest
gathered piece are arithmetic. What the allocator and workspaces take comes on top: leave a tenth free.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from simvlm.data.mixture import Mixture
from simvlm.model.batch import Batch
from simvlm.model.config import SimVLMConfig
from simvlm.model.remat import kept_operations
from simvlm.model.torch_model import SimVLM
from simvlm.model.transformer import Layer
from simvlm.train.cost import step_cost
from simvlm.train.objectives import suffix_nll
from simvlm.train.settings import Precision, PretrainSettings
from simvlm.train.torch_device import device_of, peak_flops_of, precision_of

GIB = 2**30
UTILIZATION = 0.4
"""of the device's peak, that the time is told for: a guess until it is measured"""
_PAIRS, _DOCUMENTS = 256, 64
"""at the most, whose lengths stand for all"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """Of one process unless said otherwise.

    Attributes:
        parameters: of the model.
        state_bytes: weights, gradients, moments and average, float32, this process's pieces.
        gathered_bytes: the root's parameters and the largest layer's, whole.
        activation_bytes: what one micro-batch's forward pass keeps.
        logit_bytes: of the chunk that exists at once.
        rows: tokens of a step that the encoder and the decoder see, all processes together.
        model_flops: of a step, forward and backward, all processes together.
    """

    parameters: int
    state_bytes: int
    gathered_bytes: int
    activation_bytes: int
    logit_bytes: int
    rows: tuple[int, int]
    model_flops: int

    @property
    def total_bytes(self) -> int:
        return self.state_bytes + self.gathered_bytes + self.activation_bytes + self.logit_bytes


def estimate(settings: PretrainSettings, config: SimVLMConfig, sample: Batch, processes: int) -> Estimate:
    """Of a run of so many processes.

    Args:
        sample: some of its sequences, whose lengths stand for all.

    Raises:
        ValueError: torch.replicas does not divide the processes.
    """
    if processes % settings.torch.replicas:
        raise ValueError(f"torch.replicas must divide the {processes} processes, got {settings.torch.replicas}")
    pieces, parts = processes // settings.torch.replicas, processes * settings.accumulate
    per_step = _per_step(settings)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = SimVLM(config).train()
        parameters = sum(x.numel() for x in model.parameters())
        layers = [sum(x.numel() for x in layer.parameters()) for layer in model.modules() if isinstance(layer, Layer)]
        root = parameters - sum(layers)
        few = _repeated(config, sample, (min(per_step[0], 16), min(per_step[1], 4)))
        kept = _kept_bytes(model, config, settings, few)
    batch = _repeated(config, sample, per_step)
    cost = step_cost(config, per_step[0], batch.encoder_text_lens, batch.decoder_lens)
    # The root's gradients, and the layer's, lie beside the gathered weights until they are summed.
    of_copy = 2 if _precision(settings) == "bfloat16" else 4
    gathered = 0 if pieces == 1 else 2 * 4 * root + 2 * (of_copy + 4) * max(layers)
    if pieces > 1 and settings.accumulate > 1:  # whole gradients stay until the last micro-batch
        gathered += 4 * parameters
    suffix = int(batch.decoder_lens.sum()) // parts
    return Estimate(
        parameters=parameters,
        state_bytes=4 * (4 + (settings.ema is not None)) * parameters // pieces,
        gathered_bytes=gathered,
        # What is kept grows with the tokens in a line.
        activation_bytes=int(kept / _tokens(config, few) * _tokens(config, batch) / parts),
        logit_bytes=3 * 4 * min(suffix, 4096) * config.vocab_size,
        rows=cost.rows,
        model_flops=cost.model_flops,
    )


def report(
    settings: PretrainSettings, config: SimVLMConfig, mixture: Mixture, sample: Batch, processes: int, on: str
) -> str:
    """What to print.

    Args:
        mixture: of the whole data.
        sample: some of its sequences.
        processes: of the run.
        on: the GPU that it would run on, by a part of its name; "": this machine's device.

    Raises:
        ValueError: nobody knows that GPU's peak, or torch.replicas does not divide the processes.
    """
    found = estimate(settings, config, sample, processes)
    gib = {name: getattr(found, f"{name}_bytes") / GIB for name in ("state", "gathered", "activation", "logit")}
    peak, name = _peak(on, settings)
    seconds = found.model_flops / (processes * peak * UTILIZATION)
    hours = seconds * settings.steps / 3600
    took = f"{hours:,.1f} hours" if hours < 72 else f"{hours / 24:,.1f} days"
    return "\n".join(
        [
            f"model   {settings.variant}: {found.parameters:,} parameters, {config.image_size} pixels = "
            f"{config.image_len} tokens, {config.vocab_size:,} pieces",
            *_data_lines(settings, mixture),
            f"step    {sum(_per_step(settings)):,} sequences, {found.rows[0]:,} encoder and {found.rows[1]:,} decoder "
            f"tokens (by the lengths of {len(sample.sources)} samples), {found.model_flops / 1e12:,.3g} TFLOP",
            f"memory  at the least {found.total_bytes / GIB:.2f} GiB on each of {processes} processes: "
            + ", ".join(f"{part} {size:.2f}" for part, size in gib.items())
            + f" (accumulate {settings.accumulate}, remat {settings.remat}, {_precision(settings)})",
            f"time    {seconds:.3g} s a step, {took} for {settings.steps:,} steps, at {UTILIZATION:.0%} of {name}",
        ]
    )


def sample_settings(settings: PretrainSettings) -> PretrainSettings:
    """Of a run whose first batch is some of this one's samples."""
    pairs, documents = _per_step(settings)
    data = dataclasses.replace(
        settings.data, pairs_per_step=min(pairs, _PAIRS), documents_per_step=min(documents, _DOCUMENTS)
    )
    return dataclasses.replace(settings, data=data)


def _per_step(settings: PretrainSettings) -> tuple[int, int]:
    data = settings.data
    return data.pairs_per_step if data.pairs else 0, data.documents_per_step if data.documents else 0


def _data_lines(settings: PretrainSettings, mixture: Mixture) -> list[str]:
    documents = 0 if mixture.documents is None else len(mixture.documents)
    lines = []
    for name, count, per_step in zip(
        ("pairs", "texts"), (mixture.num_pairs, documents), _per_step(settings), strict=True
    ):
        if per_step:
            epochs = settings.steps * per_step / count
            lines.append(f"{name}   {count:,}, {per_step:,} a step: {epochs:,.2f} epochs in {settings.steps:,} steps")
    return lines


def _kept_bytes(model: SimVLM, config: SimVLMConfig, settings: PretrainSettings, batch: Batch) -> int:
    """What autograd saves in the forward pass of a batch."""
    model.set_remat(settings.remat)
    inputs = batch.inputs(config).to("cpu")
    own = {x.untyped_storage()._cdata for x in [*model.parameters(), *model.buffers()]}
    sizes: dict[int, int] = {}
    alive = []

    def pack(x: Any) -> Any:
        storage = x.untyped_storage()
        if storage._cdata not in own:
            sizes[storage._cdata] = storage.nbytes()
            alive.append(x)  # or its number would be given to another
        return x

    kept = _Kept()
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
        torch.autocast("cpu", torch.bfloat16, enabled=_precision(settings) == "bfloat16"),
        kept if settings.remat == "dots" else contextlib.nullcontext(),
    ):
        suffix_nll(model(inputs), model.embedding, inputs.targets)
    return sum(sizes.values()) + kept.nbytes


def _tokens(config: SimVLMConfig, batch: Batch) -> int:
    return int(batch.encoder_lens(config.image_len).sum() + batch.decoder_lens.sum())


def _repeated(config: SimVLMConfig, sample: Batch, counts: tuple[int, int]) -> Batch:
    """A batch of nothing, with the lengths of some pairs and documents over and over."""
    lens = np.stack([sample.encoder_text_lens, sample.decoder_lens], 1)
    chosen = [np.resize(lens[sample.sources == source], (count, 2)) for source, count in enumerate(counts)]
    both = np.concatenate(chosen).astype(np.int32)
    has_image = np.arange(len(both)) < counts[0]
    side = config.image_size
    encoder_rows, decoder_rows = both.sum(0)
    return Batch(
        images=np.broadcast_to(np.uint8(0), (counts[0], side, side, 3)),
        has_image=has_image,
        encoder_text=np.zeros(encoder_rows, np.int32),
        encoder_text_lens=both[:, 0],
        decoder_inputs=np.zeros(decoder_rows, np.int32),
        targets=np.zeros(decoder_rows, np.int32),
        decoder_lens=both[:, 1],
        sources=(~has_image).astype(np.int8),
        sample_ids=np.arange(len(both)),
    )


class _Kept(TorchDispatchMode):
    """Adds up the results of the operations that remat "dots" keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in kept_operations():
            results = result if isinstance(result, tuple) else (result,)
            self.nbytes += sum(x.numel() * x.element_size() for x in results)
        return result


def _precision(settings: PretrainSettings) -> Precision:
    return precision_of(settings.precision, device_of(settings.device))


def _peak(on: str, settings: PretrainSettings) -> tuple[float, str]:
    """Operations a second of one device, and its name."""
    device = device_of(settings.device)
    if on or device.type == "cuda":
        name = on or torch.cuda.get_device_name(device)
        peak = peak_flops_of(name)
        if peak is None:
            raise ValueError(f"on must be a GPU whose peak is known, got {name!r}")
        return peak, f"the {peak / 1e12:,.0f} TFLOP/s of {name} in bfloat16"
    side = 1024
    x = torch.ones(side, side)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        torch.mm(x, x)
        times.append(time.perf_counter() - began)
    peak = 2 * side**3 / min(times)
    return peak, f"the {peak / 1e9:,.0f} GFLOP/s of products that this processor does now"
