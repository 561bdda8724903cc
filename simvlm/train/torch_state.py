"""What a checkpoint holds of a torch run: weights, AdamW's moments and the average, cut as they are cut (DCP).

Any number of processes reads what any other number wrote. Beside it lies the model as a user loads it, whole, in one
file, under its canonical names: what torch's checkpoint format promises no later version of torch.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from simvlm.data.tokenizer import Tokenizer
from simvlm.model import folder as folders
from simvlm.model.config import SimVLMConfig
from simvlm.model.folder import METADATA
from simvlm.train.export import EMA

DCP = "dcp"
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # a run of one process


@contextlib.contextmanager
def _of_checkpoints() -> Iterator[None]:
    """What failed in some process, as an OSError: torch's own is no Exception, and nobody's `except` would see it."""
    try:
        yield
    except CheckpointException as error:
        told = {rank: _line(cause) for rank, (cause, _) in error.failures.items()}
        raise OSError("; ".join(f"process {rank}: {text}" for rank, text in sorted(told.items()))) from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class TorchState:
    """Saves and loads model, optimizer and average.

    Args:
        model, optimizer: of the run.
        ema: the average of each parameter by name; {} for none.
        group: processes that write together, not used for anything else meanwhile; None for a single one.
        is_first: this process writes the model's file.
    """

    def __init__(
        self,
        model: nn.Module,
        config: SimVLMConfig,
        optimizer: torch.optim.Optimizer,
        ema: dict[str, Tensor],
        group: Any,
        *,
        is_first: bool,
    ) -> None:
        self.model, self.config, self.optimizer, self.ema = model, config, optimizer, ema
        self.group, self.is_first = group, is_first
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "simvlm-checkpoint")

    def save(self, folder: Path, tokenizer: Tokenizer) -> Future[None]:
        """Copies the state to the host, and writes it while training goes on."""
        weights = self.gathered_weights()
        average = self._gathered(self.model.state_dict() | self.ema) if self.ema else None
        with _of_checkpoints():
            cut = dcp.async_save(
                self._state(), checkpoint_id=folder / DCP, process_group=self.group, no_dist=self.group is None
            )
        assert isinstance(cut, Future)

        def write() -> None:
            with _of_checkpoints():
                cut.result()
            if self.is_first:
                save = lambda path: safetensors.torch.save_file(weights, path, METADATA)  # noqa: E731
                folders.write(folder, self.config, tokenizer, save)
                if average is not None:
                    safetensors.torch.save_file(average, folder / EMA, METADATA)

        return self._thread.submit(write)

    def load(self, folder: Path) -> None:
        """Takes back what `save` wrote, on any number of processes.

        Raises:
            OSError: a file cannot be read.
            ValueError: config or tensors are not those of this model; every difference is named.
        """
        folders.check_config(folder, self.config)
        if not (folder / DCP / ".metadata").is_file():
            raise ValueError(f"engine must be the one that wrote {folder}, got torch: it holds no {DCP}/.metadata")
        stored = dcp.FileSystemReader(folder / DCP).read_metadata().state_dict_metadata
        if any(name.startswith("exp_avg.") for name in stored):
            self._make_moments()
        state = self._state()
        names = {name: tuple(x.shape) for name, x in state.items()}
        found = {name: tuple(getattr(x, "size", ())) for name, x in stored.items()}
        if not self.ema:  # a run may leave its average behind
            found = {name: shape for name, shape in found.items() if not name.startswith("ema.")}
        elif not any(name.startswith("ema.") for name in found):
            raise ValueError(f"ema must be None, as in the run that wrote {folder}, which holds no average")
        folders.check_tensors(names, found, str(folder / DCP))
        with _of_checkpoints():
            dcp.load(state, checkpoint_id=folder / DCP, process_group=self.group, no_dist=self.group is None)

    def _state(self) -> dict[str, Tensor]:
        state = {f"model.{name}": x for name, x in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            of_parameter = self.optimizer.state.get(parameter, {})
            state |= {f"{moment}.{name}": of_parameter[moment] for moment in _MOMENTS if moment in of_parameter}
        return state | {f"ema.{name}": x for name, x in self.ema.items()}

    def _make_moments(self) -> None:
        for parameter in self.model.parameters():
            if parameter not in self.optimizer.state:
                moments = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
                step = torch.zeros((), device=parameter.device)  # where fused AdamW keeps it
                self.optimizer.state[parameter] = {"step": step, **moments}

    def gathered_weights(self) -> dict[str, Tensor]:
        """Copies of the model's whole tensors, on the host of the first process; {} on others. All of them call it."""
        return self._gathered(self.model.state_dict())

    def _gathered(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies of the whole tensors, on the host of the first process."""
        whole = {}
        for name, x in tensors.items():
            full = x.full_tensor().detach() if isinstance(x, DTensor) else x.detach()
            if self.is_first:
                # On a CPU this may be the very memory that training goes on in.
                whole[name] = (full.clone() if full.device.type == "cpu" else full.cpu()).contiguous()
        return whole
