"""The PyTorch engine of pretraining on one device: one step of PrefixLM, and what a checkpoint holds of it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from simvlm.data.mixture import Mixed
from simvlm.data.tokenizer import Tokenizer
from simvlm.model import folder as folders
from simvlm.model.config import SimVLMConfig
from simvlm.model.folder import WEIGHTS
from simvlm.model.torch_model import SimVLM
from simvlm.model.weights import load_tensors
from simvlm.train.objectives import suffix_nll
from simvlm.train.optim import adamw
from simvlm.train.processes import ALONE
from simvlm.train.settings import Precision, PretrainSettings
from simvlm.train.step import Diverged, StepLoss

_OPTIMIZER = "optimizer.safetensors"
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class TorchEngine:
    """Model and optimizer.

    Args:
        settings: of the run.
        config: of the model.

    Raises:
        ValueError: there is no such device or kernel.
    """

    def __init__(self, settings: PretrainSettings, config: SimVLMConfig) -> None:
        self.processes = ALONE
        self.device = device_of(settings.device)
        self.precision = precision_of(settings.precision, self.device)
        torch.manual_seed(settings.seed)
        self.model = SimVLM(config, impl=settings.impl).to(self.device).train()
        self.optimizer = adamw(self.model, settings.optimizer)
        self._weights = np.array(settings.loss_weights)
        self._max_grad_norm = settings.optimizer.max_grad_norm

    def step(self, mixed: Mixed, lr: float) -> StepLoss:
        """One step of the optimizer.

        Raises:
            Diverged: loss or gradient is not finite; model and optimizer are as they were before.
        """
        batch, model = mixed.batch, self.model
        inputs = batch.inputs(model.config).to(self.device)
        # Who owns which row is known on the host: no step waits for it.
        owners = np.repeat(np.arange(len(batch.sources)), batch.decoder_lens)
        rows = np.zeros(len(batch.targets), np.int64)
        rows[: len(owners)] = batch.sources[owners]
        tokens = np.bincount(batch.sources, batch.decoder_lens, minlength=2).astype(np.int64)
        # The forward pass moves BatchNorm's running statistics.
        statistics = [buffer.clone() for buffer in model.buffers()]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            nll = suffix_nll(model(inputs), model.embedding, inputs.targets)
        nlls = nll.new_zeros(2).index_add(0, torch.from_numpy(rows).to(self.device), nll)
        weights = torch.from_numpy(self._weights).to(nlls)
        loss = (weights * nlls).sum() / (float(self._weights @ tokens) or 1.0)
        loss.backward()
        grad_norm = self._clipped()
        # One wait for the device: of the step's three numbers.
        image_text, text_only, norm = torch.stack([*nlls.detach(), grad_norm.to(nlls)]).tolist()
        if not math.isfinite(image_text + text_only + norm):
            with torch.no_grad():
                for buffer, before in zip(model.buffers(), statistics, strict=True):
                    buffer.copy_(before)
            self.optimizer.zero_grad()
            not_finite = np.unique(owners[~np.isfinite(nll.detach().float().cpu().numpy()[: len(owners)])])
            raise Diverged(image_text + text_only if math.isfinite(norm) else norm, not_finite.tolist())
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        return StepLoss(nll=np.array([image_text, text_only]), tokens=tokens, grad_norm=norm)

    def _clipped(self) -> torch.Tensor:
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self._max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self._max_grad_norm, norm)
        return norm

    def save(self, folder: Path, tokenizer: Tokenizer) -> None:
        """Puts model, tokenizer and optimizer into a folder."""
        self.model.save_pretrained(folder, tokenizer)
        moments = {
            f"{moment}.{name}": self.optimizer.state[parameter][moment].cpu().contiguous()
            for name, parameter in self.model.named_parameters()
            if parameter in self.optimizer.state
            for moment in _MOMENTS
        }
        safetensors.torch.save_file(moments, folder / _OPTIMIZER)

    def load(self, folder: Path) -> None:
        """Takes back what `save` wrote.

        Raises:
            ValueError: config or tensors are not those of this model; every difference is named.
        """
        folders.check_config(folder, self.model.config)
        if not (folder / _OPTIMIZER).is_file():
            raise ValueError(f"engine must be the one that wrote {folder}, got torch: it holds no {_OPTIMIZER}")
        load_tensors(self.model, safetensors.torch.load_file(folder / WEIGHTS), str(folder / WEIGHTS))
        moments = safetensors.torch.load_file(folder / _OPTIMIZER)
        state = self.optimizer.state_dict()
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        ordered = [names[parameter] for group in self.optimizer.param_groups for parameter in group["params"]]
        wanted = {f"{moment}.{name}" for name in ordered for moment in _MOMENTS}
        if moments and set(moments) != wanted:
            missing = sorted(wanted ^ set(moments))
            raise ValueError(f"{folder / _OPTIMIZER} must hold the moments of every parameter, got others: {missing}")
        if moments:
            state["state"] = {
                i: {moment: moments[f"{moment}.{name}"] for moment in _MOMENTS} for i, name in enumerate(ordered)
            }
        self.optimizer.load_state_dict(state)


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
