"""The PyTorch engine of pretraining: one step of PrefixLM on one device or on those of all of torchrun's processes."""

from __future__ import annotations

import math
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from simvlm.data.mixture import Mixed
from simvlm.data.tokenizer import Tokenizer
from simvlm.model import units
from simvlm.model.batch import Batch
from simvlm.model.config import SimVLMConfig
from simvlm.model.torch_model import SimVLM
from simvlm.model.transformer import Layer
from simvlm.train.objectives import suffix_nll
from simvlm.train.optim import adamw
from simvlm.train.settings import PretrainSettings
from simvlm.train.step import Diverged, StepLoss, row_multiple
from simvlm.train.torch_device import device_of, peak_flops, precision_of
from simvlm.train.torch_profile import Profile
from simvlm.train.torch_ranks import Ranks, lost_processes
from simvlm.train.torch_state import TorchState


class TorchEngine:
    """Model and optimizer.

    Args:
        settings: of the run.
        config: of the model.

    Raises:
        ValueError: there is no such device or kernel, or torch.replicas does not divide the processes.
    """

    def __init__(self, settings: PretrainSettings, config: SimVLMConfig) -> None:
        device = device_of(settings.device)
        own = settings.torch
        self.ranks = Ranks(device, replicas=own.replicas, timeout_s=settings.timeout_s)
        self.device, self.processes = self.ranks.device, self.ranks.processes
        self.precision = precision_of(settings.precision, self.device)
        torch.manual_seed(settings.seed)
        self.model = SimVLM(config, impl=settings.impl).to(self.device).train()
        if settings.init_conv:
            from simvlm.model.init_conv import load_conv

            load_conv(self.model, settings.init_conv)
        self.model.set_remat(settings.remat)
        if own.sync_batch_norm:
            self.model.conv.share_statistics(self.ranks.group_name)
        if own.compile:
            for layer in self.model.modules():
                if isinstance(layer, Layer):
                    layer.compile()
        self.ranks.cut(self.model, self.precision)
        self.optimizer = adamw(self.model, settings.optimizer)
        self.ema: dict[str, Tensor] = {}
        if settings.ema is not None:
            self.ema = {name: x.detach().clone() for name, x in self.model.named_parameters()}
        group = None if self.ranks.mesh is None else self.ranks.of_checkpoints
        self.state = TorchState(self.model, config, self.optimizer, self.ema, group, is_first=self.processes.is_first)
        one = peak_flops(self.device, self.precision)
        self.peak_flops = None if one is None else one * self.processes.count
        self._profile = Profile(settings.profile, Path(settings.out), self.processes.index)
        self._weights = np.array(settings.loss_weights)
        self._max_grad_norm = settings.optimizer.max_grad_norm
        self._accumulate, self._ema, self._impl = settings.accumulate, settings.ema, settings.impl
        parts = self.processes.count * settings.accumulate
        self._row_multiple = row_multiple(settings, config.max_text_len, parts)

    def step(self, mixed: Mixed, lr: float, tokens: np.ndarray) -> StepLoss:
        """One step of the optimizer.

        Args:
            mixed: this process's part of the batch.
            tokens: int[2], suffix tokens of each source in all parts.

        Raises:
            Diverged: loss or gradient is not finite; model and optimizer are as they were before.
            ProcessLost: another process is gone.
        """
        self.ranks.beat()
        self._profile.before(mixed.step)
        # The forward pass moves BatchNorm's running statistics.
        statistics = [buffer.clone() for buffer in self.model.buffers()]
        rows = units.split(mixed.batch, self._accumulate)
        nlls, row_nlls = torch.zeros(2, device=self.device), []
        with lost_processes():
            for i, of_unit in enumerate(rows):
                unit = mixed.batch if len(rows) == 1 else units.taken(mixed.batch, of_unit, self._row_multiple)
                if self.ranks.mesh is not None:
                    # Gradients cross between processes once a step.
                    self.model.set_requires_gradient_sync(i == len(rows) - 1)  # type: ignore[operator]
                by_row, of_sources = self._nll(unit)
                weights = torch.from_numpy(self._weights).to(of_sources)
                ((weights * of_sources).sum() / (float(self._weights @ tokens) or 1.0)).backward()
                nlls += of_sources.detach()
                row_nlls.append(by_row.detach())
            if self.ranks.mesh is not None:
                dist.all_reduce(nlls)
            grad_norm = self._clipped()
            # One wait for the device: of the step's three numbers.
            image_text, text_only, norm = torch.stack([*nlls, grad_norm.to(nlls)]).tolist()
        if not math.isfinite(image_text + text_only + norm):
            with torch.no_grad():
                for buffer, before in zip(self.model.buffers(), statistics, strict=True):
                    buffer.copy_(before)
            self.optimizer.zero_grad()
            value = image_text + text_only if math.isfinite(norm) else norm
            raise Diverged(value, _not_finite(mixed.batch, rows, row_nlls))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._average()
        self._profile.after(mixed.step)
        return StepLoss(nll=np.array([image_text, text_only]), grad_norm=norm)

    def _nll(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """-ln P of every target, and the sums of the two sources."""
        inputs = batch.inputs(self.model.config).to(self.device)
        # Who owns which row is known on the host: no step waits for it.
        sources = np.zeros(len(batch.targets), np.int64)
        used = int(batch.decoder_lens.sum())
        sources[:used] = np.repeat(batch.sources, batch.decoder_lens)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            nll = suffix_nll(self.model(inputs), self.model.embedding, inputs.targets)
        return nll, nll.new_zeros(2).index_add(0, torch.from_numpy(sources).to(self.device), nll)

    def _clipped(self) -> Tensor:
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if self._max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self._max_grad_norm, norm)
        return norm

    @torch.no_grad()
    def _average(self) -> None:
        if self._ema is None:
            return
        averages = [_local(x) for x in self.ema.values()]
        torch._foreach_lerp_(averages, [_local(x) for x in self.model.parameters()], 1 - self._ema)

    @torch.no_grad()
    def held_out(self, mixed: Mixed) -> np.ndarray:
        """float64[2]: Σ -ln P of each source's suffix tokens in this process's part; every process calls it.

        BatchNorm normalizes with its running statistics.
        """
        self.model.eval()
        try:
            with lost_processes():
                found = self._nll(mixed.batch)[1].double().cpu().numpy()
            if self.ranks.mesh is not None:  # outside of training the root stays as the forward pass left it
                self.model.reshard()  # type: ignore[operator]
            return found
        finally:
            self.model.train()

    def usable_model(self) -> SimVLM | None:
        """A copy of the model in evaluation mode on the first process, None on the others; every process calls it."""
        with lost_processes():
            tensors = self.state.gathered_weights()
        if not self.processes.is_first:
            return None
        model = SimVLM(self.model.config, impl=self._impl)
        model.load_state_dict(tensors)
        return model.to(self.device).eval()

    def peak_memory(self) -> int:
        """Bytes of this process's GPU that were in use at once; 0 on a CPU."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0

    def save(self, folder: Path, tokenizer: Tokenizer) -> Future[None]:
        """Starts to put model, tokenizer and optimizer into a folder, as they are now."""
        with lost_processes():
            return self.state.save(folder, tokenizer)

    def load(self, folder: Path) -> None:
        """Takes back what `save` wrote, on any number of processes.

        Raises:
            ValueError: config or tensors are not those of this model; every difference is named.
        """
        self.state.load(folder)

    def close(self) -> None:
        """Writes a trace that is not written yet, and leaves the other processes."""
        self._profile.close()
        self.ranks.close()


def _not_finite(batch: Batch, rows: list[np.ndarray], row_nlls: list[Tensor]) -> list[int]:
    """The batch's sequences whose loss is not finite."""
    found: set[int] = set()
    for of_unit, nll in zip(rows, row_nlls, strict=True):
        owners = np.repeat(of_unit, batch.decoder_lens[of_unit])
        bad = ~np.isfinite(nll.float().cpu().numpy()[: len(owners)])
        found.update(owners[bad].tolist())
    return sorted(found)


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x
