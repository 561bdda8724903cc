"""The JAX engine of pretraining: one jitted step on a mesh of devices, of one process or many, and its checkpoints."""

from __future__ import annotations

import math
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import safetensors.numpy
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from simvlm.data.mixture import COARSE, Mixed
from simvlm.data.tokenizer import Tokenizer
from simvlm.kernels import OPS
from simvlm.kernels.dispatch import did_you_mean
from simvlm.model import folder as folders
from simvlm.model import units
from simvlm.model.batch import Batch, Inputs
from simvlm.model.config import SimVLMConfig
from simvlm.model.folder import METADATA, WEIGHTS
from simvlm.model.jax_transformer import AXES, UNITS, Execution
from simvlm.model.jax_weights import canonical, canonical_shapes, from_canonical
from simvlm.train.jax_step import Sums, TrainStep
from simvlm.train.processes import ALONE, Processes
from simvlm.train.settings import JaxSettings, Precision, PretrainSettings
from simvlm.train.step import Diverged, StepLoss, row_multiple
from simvlm.train.tpu_chips import GENERATIONS

_STATE = "orbax"


class JaxEngine:
    """Model and optimizer on all devices of all processes.

    Args:
        settings: of the run.
        config: of the model.

    Raises:
        ValueError: there is no such device or kernel, or mesh, batch and processes do not divide each other; before
            anything is compiled.
    """

    def __init__(self, settings: PretrainSettings, config: SimVLMConfig) -> None:
        devices = _devices(settings.device)
        self.device = devices[0].platform
        self.precision = _precision(settings.precision, self.device)
        self.peak_flops = _peak_flops(devices)
        mesh = mesh_of(settings.jax, devices, config)
        self.processes = _processes()
        self._accumulate = settings.accumulate
        self._units = math.prod(mesh.shape[axis] for axis in UNITS)
        _check_batch(settings, self._units, self.processes.count)
        execution = Execution(
            impl=_impl(settings.impl),
            dtype=jnp.dtype(self.precision),
            mesh=mesh,
            remat=settings.remat,
        )
        self.step_of = TrainStep(config, execution, settings.optimizer, settings.loss_weights)
        self.config, self._weights = config, np.array(settings.loss_weights)
        self.state = self.step_of.initial(settings.seed)
        self._multiple = row_multiple(settings, config.max_text_len, self._units * self._accumulate, COARSE)

    def step(self, mixed: Mixed, lr: float, tokens: np.ndarray) -> StepLoss:
        """One step of the optimizer.

        Args:
            mixed: this process's part of the batch.
            tokens: int[2], suffix tokens of each source in all parts.

        Raises:
            Diverged: loss or gradient is not finite; model and optimizer are as they were before.
        """
        local = self._units // self.processes.count * self._accumulate
        rows = units.split(mixed.batch, local)
        inputs = self._inputs([units.taken(mixed.batch, own) for own in rows])
        on_mesh = jax.tree.map(self._on_mesh, inputs)
        denominator = float(self._weights @ tokens) or 1.0
        self.state, sums = self.step_of.jitted(self.state, on_mesh, np.float32(lr), np.float32(denominator))
        return self._checked(sums, mixed.batch, rows)

    def _inputs(self, batches: list[Batch]) -> Inputs:
        """Of this process's units: [accumulate, local units, …], in numpy."""
        capacity = units.Capacity.of(batches, self._multiple)
        if self.processes.count > 1:
            fields = ("sequences", "images", "encoder_rows", "decoder_rows")
            most = self.processes.share(np.array([getattr(capacity, name) for name in fields])).max(0)
            capacity = units.Capacity(**dict(zip(fields, map(int, most), strict=True)))
        joined = units.stacked(batches, self.config, capacity)
        local = len(batches) // self._accumulate  # not -1: without pictures their array has no size
        return jax.tree.map(lambda x: x.reshape(self._accumulate, local, *x.shape[1:]), joined)

    def _on_mesh(self, local: np.ndarray) -> jax.Array:
        shape = (local.shape[0], self._units, *local.shape[2:])
        return jax.make_array_from_process_local_data(self.step_of.of_inputs, local, shape)

    def _checked(self, sums: Sums, batch: Batch, rows: list[np.ndarray]) -> StepLoss:
        nll, norm = np.asarray(sums.nll, np.float64), float(sums.grad_norm)
        if math.isfinite(nll.sum() + norm):
            return StepLoss(nll=nll, grad_norm=norm)
        # Which of this process's sequences; the units' rows are every process's.
        first = self.processes.index * (self._units // self.processes.count)
        own = np.asarray(sums.row_nll)[:, first:][:, : self._units // self.processes.count]
        bad: set[int] = set()
        for of_unit, sequences in zip(own.reshape(len(rows), -1), rows, strict=True):
            owners = np.repeat(sequences, batch.decoder_lens[sequences])
            bad.update(owners[~np.isfinite(of_unit[: len(owners)])].tolist())
        raise Diverged(float(nll.sum()) if math.isfinite(norm) else norm, sorted(bad))

    def peak_memory(self) -> int:
        """Bytes of the fullest of this process's devices that were in use at once; 0 where nobody counts."""
        found = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
        return max(found)

    def close(self) -> None:
        """Nothing is held that the process's end does not free."""

    def save(self, folder: Path, tokenizer: Tokenizer) -> Future[None]:
        """Puts model, tokenizer and the whole state into a folder that every process sees."""
        written: Future[None] = Future()
        self._save(folder, tokenizer)
        written.set_result(None)
        return written

    def _save(self, folder: Path, tokenizer: Tokenizer) -> None:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save((folder / _STATE).absolute(), _pure(self.state))
        of_model = {"params": self.state["params"], "statistics": self.state["statistics"]}
        if self.processes.count > 1:
            of_model = multihost_utils.process_allgather(of_model, tiled=True)
        if self.processes.is_first:
            of_model = jax.device_get(of_model)
            tensors = {name: np.ascontiguousarray(x) for name, x in self._canonical(of_model).items()}
            folders.write(
                folder, self.config, tokenizer, lambda path: safetensors.numpy.save_file(tensors, path, METADATA)
            )

    def load(self, folder: Path) -> None:
        """Takes back what `save` wrote; the mesh may be another.

        Raises:
            ValueError: config or tensors are not those of this model; every difference is named.
        """
        folders.check_config(folder, self.config)
        if not (folder / _STATE).is_dir():
            raise ValueError(f"engine must be the one that wrote {folder}, got jax: it holds no state of Orbax's")
        wanted = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            _pure(self.step_of.abstract_state),
            _pure(self.step_of.shardings),
        )
        with ocp.StandardCheckpointer() as checkpointer:
            restored = checkpointer.restore((folder / _STATE).absolute(), wanted)
        self.state = jax.tree.unflatten(jax.tree.structure(self.state), jax.tree.leaves(restored))

    def load_weights(self, folder: Path) -> None:
        """Takes weights and running statistics of a model that either framework wrote; the optimizer stays new.

        Raises:
            FileNotFoundError, ValueError: the folder is not one of this model.
        """
        folders.check_config(folder, self.config)
        tensors = safetensors.numpy.load_file(folders.existing(folder, WEIGHTS))
        folders.check_tensors(
            canonical_shapes(self.step_of.abstract_state["params"])
            | canonical_shapes(self.step_of.abstract_state["statistics"]),
            {name: x.shape for name, x in tensors.items()},
            str(folder / WEIGHTS),
        )
        for part in ("params", "statistics"):
            values = from_canonical(self.step_of.abstract_state[part], tensors)
            self.state[part] = jax.device_put(values, self.step_of.shardings[part])

    def _canonical(self, state: Any) -> dict[str, Any]:
        return canonical(state["params"]) | canonical(state["statistics"])


def connect(settings: JaxSettings) -> None:
    """Joins the run's other processes, where there are any; before anything else of jax's."""
    if not settings.coordinator or jax.distributed.is_initialized():
        return
    if settings.coordinator == "auto":
        jax.distributed.initialize()
        return
    index, count = settings.process
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(settings.coordinator, num_processes=count, process_id=index)


def _processes() -> Processes:
    if jax.process_count() == 1:
        return ALONE

    def share(values: np.ndarray) -> np.ndarray:
        # As pairs of 32 bits: jax would cut 64 down to them.
        halves = np.ascontiguousarray(values, np.int64).view(np.int32)
        return np.ascontiguousarray(multihost_utils.process_allgather(halves)).view(np.int64)

    return Processes(jax.process_index(), jax.process_count(), share)


def _pure(state: Any) -> Any:
    """nnx's states as plain dictionaries, for Orbax."""
    is_state = lambda x: isinstance(x, nnx.State)  # noqa: E731
    return jax.tree.map(lambda x: nnx.to_pure_dict(x) if is_state(x) else x, state, is_leaf=is_state)


def mesh_of(settings: JaxSettings, devices: list[Any], config: SimVLMConfig) -> Mesh:
    """The mesh of the settings over these devices.

    Raises:
        ValueError: it wants more devices than there are, or does not divide the model.
    """
    shape = dict(zip(AXES, settings.mesh, strict=True))
    if shape["data"] == 0:
        rest = shape["fsdp"] * shape["tensor"]
        if len(devices) % rest:
            raise ValueError(f"jax.mesh: fsdp · tensor must divide the {len(devices)} devices, got {rest}")
        shape["data"] = len(devices) // rest
    size = math.prod(shape.values())
    if size > len(devices) or (size < len(devices) and jax.process_count() > 1):
        raise ValueError(f"jax.mesh must be of the {len(devices)} devices, got {tuple(shape.values())}")
    for name in ("num_heads", "width", "mlp_dim"):
        if getattr(config, name) % shape["tensor"]:
            raise ValueError(f"jax.mesh: tensor must divide {name} = {getattr(config, name)}, got {shape['tensor']}")
    return Mesh(np.array(devices[:size]).reshape(*shape.values()), AXES)


def _check_batch(settings: PretrainSettings, count: int, processes: int) -> None:
    parts = count * settings.accumulate
    if count % processes:
        raise ValueError(f"jax.mesh: data · fsdp must be a multiple of the {processes} processes, got {count}")
    for name in ("pairs_per_step", "documents_per_step"):
        value = getattr(settings.data, name)
        used = bool(settings.data.pairs if name == "pairs_per_step" else settings.data.documents)
        if used and value % parts:
            raise ValueError(
                f"data.{name} must be a multiple of data · fsdp · accumulate = {parts} of the mesh, got {value}"
            )


def _devices(name: str) -> list[Any]:
    try:
        return jax.devices() if name == "auto" else jax.devices(name)
    except RuntimeError as error:
        raise ValueError(f"device must be one of jax's, got {name!r} ({str(error).splitlines()[0]})") from None


def _peak_flops(devices: list[Any]) -> float | None:
    """Of all devices, a second; None where it is not known."""
    kind = getattr(devices[0], "device_kind", "").lower().replace("tpu ", "").replace(" lite", "e")
    found = GENERATIONS.get(kind)
    return None if found is None else found.bf16_flops * len(devices)


def _precision(name: Precision, platform: str) -> Precision:
    if name != "auto":
        return name
    return "float32" if platform == "cpu" else "bfloat16"


def _impl(name: str | None) -> str | None:
    names = sorted({row.name for rows in OPS.values() for row in rows if row.family == "jax"})
    if name is not None and name not in names:
        raise ValueError(f"impl must be one of {names}, got {name!r}{did_you_mean(name, names)}")
    return name
