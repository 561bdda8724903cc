"""The processes of a torch run: torchrun's, the model cut over them by FSDP2, and how each learns that one is gone."""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from simvlm.model.torch_model import SimVLM
from simvlm.model.transformer import Layer, Linear
from simvlm.train.processes import ALONE, Processes, ProcessLost

BEAT_S, SILENCE_S = 5.0, 45.0
"""A process shows that it lives every so often, and is lost after so long a silence."""


class Ranks:
    """This process among those of torchrun, or alone where torchrun did not start it.

    Args:
        device: of the model; "cuda" is this process's own GPU.
        replicas: copies of the model; the processes of each hold its pieces.
        timeout_s: after which a collective gives up.

    Raises:
        ValueError: replicas do not divide the processes, or this is a task of several that know nothing of each other.

    Attributes:
        processes: what the loop knows of them.
        device: with its index.
        mesh: replicas × pieces; None for one process.
    """

    def __init__(self, device: torch.device, *, replicas: int, timeout_s: float) -> None:
        self.processes, self.device = ALONE, device
        self.mesh: DeviceMesh | None = None
        count = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
        if "RANK" not in os.environ and os.environ.get("SLURM_PROCID", "0") != "0":
            raise ValueError(
                "several tasks of SLURM must be started by torchrun (docs/training.md), got this one without"
            )
        if count % replicas:
            raise ValueError(f"torch.replicas must divide the {count} processes, got {replicas}")
        if count == 1:
            return
        timeout = datetime.timedelta(seconds=timeout_s)
        if device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timeout)
        self.mesh = init_device_mesh(device.type, (replicas, count // replicas), mesh_dim_names=("replica", "piece"))
        # On the host: what is told once a step must not wait for the GPU, nor meet what a checkpoint's thread says.
        group: Any = dist.new_group(backend="gloo", timeout=timeout)
        self.of_checkpoints: Any = dist.new_group(backend="gloo", timeout=timeout)

        def share(values: np.ndarray) -> np.ndarray:
            own = torch.from_numpy(np.ascontiguousarray(values, np.int64))
            parts = [torch.empty_like(own) for _ in range(count)]
            with lost_processes():
                dist.all_gather(parts, own, group=group)
            return torch.stack(parts).numpy()

        self.processes = Processes(dist.get_rank(), count, share)
        self._heart: _Heart | None = None

    @property
    def group_name(self) -> str:
        """Of all processes, for collectives inside the model; "" for one process."""
        return "" if self.mesh is None else dist.group.WORLD.group_name  # type: ignore[union-attr]

    def beat(self) -> None:
        """From now on the others hear that this process lives. Not before the first step: a scan of a large shard lets
        no other thread run."""
        if self.mesh is not None and self._heart is None:
            self._heart = _Heart(self.processes.index, self.processes.count)

    def close(self) -> None:
        """Leaves the others."""
        if self.mesh is not None:
            if self._heart is not None:
                self._heart.stop()
            dist.destroy_process_group()

    def cut(self, model: SimVLM, precision: str) -> None:
        """Cuts the model over the mesh: each layer's products gathered in `precision`, all else in float32.

        A layer is two groups of parameters: FSDP2 knows one dtype a group, and norms and tables stay float32.
        """
        if self.mesh is None:
            return
        low = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        policy = low if precision == "bfloat16" else MixedPrecisionPolicy()
        for layer in model.modules():
            if isinstance(layer, Layer):
                products: list[nn.Module] = [module for module in layer.modules() if isinstance(module, Linear)]
                fully_shard(products, mesh=self.mesh, mp_policy=policy)
                fully_shard(layer, mesh=self.mesh)
        fully_shard(model, mesh=self.mesh)
        for module in model.modules():
            if not isinstance(module, FSDPModule):
                continue
            # Gradients add up: the loss is divided by the tokens of all processes before.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


@contextlib.contextmanager
def lost_processes() -> Iterator[None]:
    """Turns what collectives raise when another process is gone into `ProcessLost`."""
    try:
        yield
    except dist.DistError as error:
        raise ProcessLost(_LOST.format(error=str(error).splitlines()[0])) from error
    except RuntimeError as error:
        said = str(error)
        if not any(words in said for words in _WORDS_OF_GLOO):
            raise
        raise ProcessLost(_LOST.format(error=said.splitlines()[0])) from error


_LOST = "another process of the run ended or does not answer; its own output says why ({error})"
_WORDS_OF_GLOO = (
    "onnection closed by peer",
    "onnection reset by peer",
    "Timed out waiting",
    "gloo/transport",
    "Socket",
)


class _Heart:
    """Tells the others that this process lives, and ends it when one of them has not been heard of for long.

    A GPU's collective waits for a process that is gone until its timeout, and no exception can reach the thread that
    waits for it; so the end is the process's, as torchrun's would be on the machine of the lost one.
    """

    def __init__(self, rank: int, count: int) -> None:
        self._rank, self._count = rank, count
        # A connection of its own: a store answers one caller at a time.
        self._store: Any = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        self._stop = threading.Event()
        self._answered = time.monotonic()
        threads = (("simvlm-heart", self._beat), ("simvlm-store", self._watch_store))
        self._threads = [threading.Thread(target=each, name=name, daemon=True) for name, each in threads]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(BEAT_S)

    def _beat(self) -> None:
        heard = {rank: (b"", time.monotonic()) for rank in range(self._count) if rank != self._rank}
        beat = 0
        while not self._stop.wait(BEAT_S):
            beat += 1
            try:
                self._store.set(f"simvlm/alive/{self._rank}", str(beat))
                for rank, (last, _) in heard.items():
                    key = f"simvlm/alive/{rank}"
                    if self._store.check([key]) and (value := self._store.get(key)) != last:
                        heard[rank] = value, time.monotonic()
            except Exception:  # the store is process 0's; `_watch_store` counts the seconds
                continue
            self._answered = time.monotonic()
            silent = [rank for rank, (_, since) in heard.items() if self._answered - since > SILENCE_S]
            if silent:
                self._end(silent)

    def _watch_store(self) -> None:
        """A machine that is gone without a word leaves `_beat` inside a call to its store."""
        while not self._stop.wait(BEAT_S):
            if time.monotonic() - self._answered > SILENCE_S:
                self._end([0])

    def _end(self, ranks: list[int]) -> None:
        names = ", ".join(map(str, ranks))
        print(
            f"simvlm: process {self._rank} ends: nothing was heard of process {names} for {SILENCE_S:.0f} s; "
            "--resume goes on from the last whole checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)
