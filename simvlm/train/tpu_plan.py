"""`simvlm tpu-plan`: compiles the real training step for a TPU slice, without a TPU, and says what it would need.

XLA's TPU compiler (libtpu) runs on any machine. What comes from it is fact: the program exists, and its arguments,
temporaries and peak fit a core or do not. Operations and bytes are counted by arithmetic (cost.py) and out of the
program's text (hlo.py); times follow from them by published peak rates, and are predictions.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from simvlm.kernels.dispatch import did_you_mean
from simvlm.model import units
from simvlm.model.batch import IMAGE_TEXT, TEXT_ONLY, Batch
from simvlm.model.config import SimVLMConfig, variant
from simvlm.train import cost as costs
from simvlm.train.settings import OptimizerSettings
from simvlm.train.tpu_chips import GENERATIONS, GIB, Generation

_EFFORT = "jax_exec_time_optimization_effort"
_SIMULATED_STEPS = 64
_STATE_CUT = 4
"""Chips that share the state where no mesh is given: few gather quickly, and a quarter of Huge's state is 2.5 GiB."""
_ROWS = 16
"""Row capacities are multiples of a bfloat16 tile's rows."""
STEPS = 1_000_000
"""the paper's pretraining"""
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """What is planned.

    Attributes:
        variant: a size by name.
        topology: generation:chips, as v3:16x32.
        image_text_batch, text_batch: sequences of a step, all devices together.
        caption_tokens, document_tokens: of each text; prefixes are uniform, as in training.
        mesh: devices along data, fsdp and tensor; None: fsdp over four chips, tensor over a chip's cores.
        remat: what the backward pass computes again.
        accumulate: micro-batches of a step.
        impl: the kernels by name.
        quick: the compiler optimizes less, in less than half the time.
        save_hlo: a folder for the compiled program's text.
    """

    variant: str = "base"
    topology: str = "v3:16x32"
    image_text_batch: int = 4096
    text_batch: int = 512
    caption_tokens: int = 64
    document_tokens: int = 256
    mesh: tuple[int, int, int] | None = None
    remat: str = "layer"
    accumulate: int = 1
    impl: str = "xla"
    quick: bool = False
    save_hlo: str | None = None


def plan(settings: PlanSettings) -> dict[str, Any]:
    """What the compiler and the arithmetic say; keys carry their units.

    Raises:
        ValueError: libtpu is missing, there is no such topology, or batch, mesh and model do not divide each other;
            before anything is compiled. Or the compiler finds that the step does not fit; its words are kept.
    """
    config = variant(settings.variant)
    generation, chips = _topology(settings.topology)
    if importlib.util.find_spec("libtpu") is None or importlib.util.find_spec("jax") is None:
        raise ValueError("tpu-plan: needs TPU's compiler, libtpu, not installed here (pip install 'simvlm[tpu]')")
    together = math.gcd(chips, _STATE_CUT)
    mesh_shape = settings.mesh or (chips // together, together, generation.devices_per_chip)
    capacity, fill, batch = _packed(settings, config, mesh_shape, chips * generation.devices_per_chip)
    compiled, seconds = _compiled(settings, config, generation, mesh_shape, capacity)
    text = compiled.as_text()
    if settings.save_hlo:
        folder = Path(settings.save_hlo)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{settings.variant}-{settings.topology.replace(':', '-')}.hlo.txt").write_text(text)
    memory = compiled.memory_analysis()
    return {
        **dataclasses.asdict(settings),
        "mesh": list(mesh_shape),
        "devices": math.prod(mesh_shape),
        "chips": chips,
        "units": mesh_shape[0] * mesh_shape[1],
        "capacity": dataclasses.asdict(capacity),
        "row_fill": fill,
        "compile_s": round(seconds, 1),
        "argument_gib": memory.argument_size_in_bytes / GIB,
        "temporary_gib": memory.temp_size_in_bytes / GIB,
        "peak_gib": _peak(memory) / GIB,
        "usable_gib": generation.hbm_bytes / GIB,
        **_predicted(settings, config, generation, batch, text, mesh_shape),
    }


def _peak(memory: Any) -> int:
    """Of a device: what the compiler says, or arguments, results that are not arguments again, and temporaries."""
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    total = memory.argument_size_in_bytes + new + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    return max(getattr(memory, "peak_memory_in_bytes", 0), total)


def _topology(name: str) -> tuple[Generation, int]:
    kind, _, shape = name.partition(":")
    if kind not in GENERATIONS:
        names = list(GENERATIONS)
        raise ValueError(f"topology must begin with one of {names}, got {name!r}{did_you_mean(kind, names)}")
    try:
        sides = [int(side) for side in shape.split("x")]
    except ValueError:
        raise ValueError(f"topology must be a generation and a shape, as v3:16x32, got {name!r}") from None
    generation, chips = GENERATIONS[kind], math.prod(sides)
    if not 0 < chips <= generation.largest:
        raise ValueError(f"topology must have at most the {generation.largest} chips of a {kind} pod, got {name!r}")
    return generation, chips


def _packed(
    settings: PlanSettings, config: SimVLMConfig, mesh: tuple[int, int, int], devices: int
) -> tuple[units.Capacity, float, Batch]:
    """(room of a unit, share of its rows in use, one step's batch without pictures), by packing steps of random
    prefixes."""
    if math.prod(mesh) != devices:
        raise ValueError(f"mesh must be of the topology's {devices} devices, got {mesh}: {math.prod(mesh)}")
    parts = mesh[0] * mesh[1] * settings.accumulate
    pairs, documents = settings.image_text_batch, settings.text_batch
    for name, value in (("image_text_batch", pairs), ("text_batch", documents)):
        if value % parts:
            raise ValueError(
                f"{name} must be a multiple of data · fsdp · accumulate = {parts}, got {value}; "
                f"--mesh {math.gcd(pairs, documents)},1,… would divide it"
            )
    for name, value in (("num_heads", config.num_heads), ("width", config.width), ("mlp_dim", config.mlp_dim)):
        if value % mesh[2]:
            raise ValueError(f"mesh: tensor must divide {name} = {value}, got {mesh[2]}")
    for name, tokens in (("caption_tokens", settings.caption_tokens), ("document_tokens", settings.document_tokens)):
        if not 2 <= tokens <= config.max_text_len:
            raise ValueError(f"{name} must lie in 2 … {config.max_text_len}, got {tokens}")
    has_image = np.arange(pairs + documents) < pairs
    lens = np.where(has_image, settings.caption_tokens, settings.document_tokens)
    rng = np.random.default_rng(0)
    most, encoder = np.zeros(2, np.int64), lens
    for _ in range(_SIMULATED_STEPS):
        encoder = rng.integers(np.where(has_image, 0, 1), lens)
        owner = units.dealt(encoder, lens - encoder, has_image, parts)
        rows = [int(np.bincount(owner, part, parts).max()) for part in (encoder, lens - encoder)]
        most = np.maximum(most, rows)
    room = (-(-most // _ROWS) * _ROWS).tolist()
    images = pairs // parts
    capacity = units.Capacity(
        sequences=(pairs + documents) // parts, images=images, encoder_rows=room[0], decoder_rows=room[1]
    )
    used = pairs * config.image_len + int(lens.sum())
    fill = used / (parts * (images * config.image_len + sum(room)))
    batch = Batch(
        images=np.zeros((0, config.image_size, config.image_size, 3), np.uint8),
        has_image=np.zeros_like(has_image),
        encoder_text=np.zeros(int(encoder.sum()), np.int32),
        encoder_text_lens=encoder.astype(np.int32),
        decoder_inputs=np.zeros(int((lens - encoder).sum()), np.int32),
        targets=np.zeros(int((lens - encoder).sum()), np.int32),
        decoder_lens=(lens - encoder).astype(np.int32),
        sources=np.where(has_image, IMAGE_TEXT, TEXT_ONLY).astype(np.int8),
        sample_ids=np.arange(len(lens)),
    )
    return capacity, fill, batch


def set_environment() -> None:
    """Lets libtpu compile where no TPU is: it must ask nobody for one. Before jax is imported, if it was not yet."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def _compiled(
    settings: PlanSettings,
    config: SimVLMConfig,
    generation: Generation,
    mesh_shape: tuple[int, int, int],
    capacity: units.Capacity,
) -> tuple[Any, float]:
    set_environment()
    import jax
    import jax.numpy as jnp
    from jax.experimental.topologies import get_topology_desc
    from jax.sharding import Mesh

    from simvlm.model.jax_transformer import AXES, Execution
    from simvlm.train.jax_step import TrainStep

    try:
        topology = get_topology_desc(platform="tpu", topology_name=settings.topology, **dict(generation.options))
    except Exception as error:
        raise ValueError(
            f"topology must be one that TPU's compiler knows, got {settings.topology!r}: {error}"
        ) from None
    mesh = Mesh(np.array(topology.devices).reshape(mesh_shape), AXES)
    execution = Execution(impl=settings.impl, dtype=jnp.bfloat16, mesh=mesh, remat=settings.remat)
    step = TrainStep(config, execution, OptimizerSettings())
    inputs = _abstract_inputs(config, capacity, settings.accumulate, mesh_shape[0] * mesh_shape[1])
    state, scalar = step.abstract_state, jax.ShapeDtypeStruct((), jnp.float32)
    began = time.perf_counter()
    effort: float = getattr(jax.config, _EFFORT)
    jax.config.update(_EFFORT, -1.0 if settings.quick else effort)
    try:
        with jax.set_mesh(mesh):  # where the Pallas kernels look for the generation that they are for
            return step.jitted.lower(state, inputs, scalar, scalar).compile(), time.perf_counter() - began
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"tpu-plan: the compiler refuses the step: {str(error)[:600]}") from None
    finally:
        jax.config.update(_EFFORT, effort)


def _abstract_inputs(config: SimVLMConfig, capacity: units.Capacity, accumulate: int, count: int) -> Any:
    """Shapes of `TrainStep`'s inputs."""
    import jax

    empty = Batch(
        images=np.zeros((capacity.images, config.image_size, config.image_size, 3), np.uint8),
        has_image=np.arange(capacity.sequences) < capacity.images,
        encoder_text=np.zeros(capacity.encoder_rows, np.int32),
        encoder_text_lens=np.ones(capacity.sequences, np.int32),
        decoder_inputs=np.zeros(capacity.decoder_rows, np.int32),
        targets=np.zeros(capacity.decoder_rows, np.int32),
        decoder_lens=np.ones(capacity.sequences, np.int32),
        sources=np.zeros(capacity.sequences, np.int8),
        sample_ids=np.zeros(capacity.sequences, np.int64),
    )
    inputs = units.stacked([empty], config, capacity)

    def shape(x: np.ndarray) -> Any:
        dtype = np.dtype(np.int32) if x.dtype == np.int64 else x.dtype
        return jax.ShapeDtypeStruct((accumulate, count, *x.shape[1:]), dtype)

    return jax.tree.map(shape, inputs)


def _predicted(
    settings: PlanSettings,
    config: SimVLMConfig,
    generation: Generation,
    batch: Batch,
    text: str,
    mesh: tuple[int, int, int],
) -> dict[str, Any]:
    from simvlm.train.hlo import collectives

    devices = math.prod(mesh)
    cost = costs.step_cost(config, settings.image_text_batch, batch.encoder_text_lens, batch.decoder_lens)
    traffic = collectives(text)
    sent = sum(found.sent_bytes for found in traffic.values())
    # Gathered parameters are written and read by each pass, in 16 bits; the state is cut over fsdp and tensor.
    passes = 3 if settings.remat == "layer" else 2
    parameters = costs.parameter_counts(config)["total"]
    weights = settings.accumulate * passes * 2 * 2 * parameters / mesh[2]
    moved = cost.hardware_bytes(settings.remat) / devices + weights + costs.state_bytes(config) / (mesh[1] * mesh[2])
    seconds = {
        "compute": cost.hardware_flops(settings.remat) / devices / generation.bf16_flops,
        "memory": moved / generation.hbm_bytes_per_s,
        "links": sent / generation.link_bytes_per_s,
    }
    least, most = max(seconds.values()), sum(seconds.values())
    tokens = sum(cost.rows)
    return {
        "model_flops": cost.model_flops,
        "hardware_flops": cost.hardware_flops(settings.remat),
        "flops_by_part": cost.flops,
        "hbm_bytes_per_device": round(moved),
        "collectives": {kind: dataclasses.asdict(found) for kind, found in traffic.items()},
        "sent_bytes_per_device": sent,
        "predicted": {
            **{f"{name}_s": value for name, value in seconds.items()},
            "step_s_overlapped": least,
            "step_s_in_turn": most,
            "tokens_per_s": tokens / most,
            "mfu": cost.model_flops / devices / generation.bf16_flops / most,
            "days_for_1m_steps": most * STEPS / 86400,
        },
    }


def report(found: dict[str, Any]) -> str:
    """One plan as text, the arithmetic shown."""
    predicted, capacity = found["predicted"], found["capacity"]
    data, fsdp, tensor = found["mesh"]
    lines = [
        f"{found['variant']} on {found['topology']}: {found['devices']} devices, mesh data {data} × fsdp {fsdp} × "
        f"tensor {tensor}, remat {found['remat']}, accumulate {found['accumulate']}, kernels {found['impl']}"
        + (", compiled quickly" if found["quick"] else ""),
        f"a step: {found['image_text_batch']} pairs of {found['caption_tokens']} tokens, {found['text_batch']} "
        f"documents of {found['document_tokens']}; {found['units']} units of {capacity['images']} pictures, "
        f"{capacity['sequences']} sequences, {capacity['encoder_rows']} + {capacity['decoder_rows']} text rows, "
        f"{found['row_fill']:.1%} of all rows in use",
        "",
        f"compiled in {found['compile_s']} s; per device: arguments {found['argument_gib']:.2f} GiB, temporaries "
        f"{found['temporary_gib']:.2f} GiB, peak {found['peak_gib']:.2f} of {found['usable_gib']:.2f} GiB usable"
        + _misfit(found),
        f"operations: {found['model_flops']:.3g} of the model, {found['hardware_flops']:.3g} with what is computed "
        "again",
        f"bytes per device: memory {found['hbm_bytes_per_device']:.3g} (counted), links "
        f"{found['sent_bytes_per_device']:.3g}",
    ]
    for kind, traffic in found["collectives"].items():
        lines.append(f"  {kind:20} {traffic['count']:6} a step, {traffic['sent_bytes'] / 2**20:10.1f} MiB sent")
    lines += [
        "",
        "predicted, not measured:",
        f"  compute {predicted['compute_s']:.3f} s + memory {predicted['memory_s']:.3f} s + links "
        f"{predicted['links_s']:.3f} s = {predicted['step_s_in_turn']:.3f} s a step in turn, "
        f"{predicted['step_s_overlapped']:.3f} s if all overlap",
        f"  in turn: {predicted['tokens_per_s']:.3g} tokens/s, MFU {predicted['mfu']:.1%}, "
        f"{predicted['days_for_1m_steps']:.1f} days for {STEPS:,} steps",
    ]
    return "\n".join(lines)


def _misfit(found: dict[str, Any]) -> str:
    return "" if found["peak_gib"] <= found["usable_gib"] else ", does not fit"


_COLUMNS = (
    ("topology", lambda x: x["topology"]),
    ("mesh", lambda x: "×".join(map(str, x["mesh"]))),
    ("remat", lambda x: x["remat"]),
    ("peak GiB", lambda x: f"{x['peak_gib']:.2f} of {x['usable_gib']:.2f}{_misfit(x)}"),
    ("compute s", lambda x: f"{x['predicted']['compute_s']:.3f}"),
    ("memory s", lambda x: f"{x['predicted']['memory_s']:.3f}"),
    ("links s", lambda x: f"{x['predicted']['links_s']:.3f}"),
    ("step s", lambda x: f"{x['predicted']['step_s_overlapped']:.3f} … {x['predicted']['step_s_in_turn']:.3f}"),
    ("MFU", lambda x: f"{x['predicted']['mfu']:.1%}"),
    ("days, 1M steps", lambda x: f"{x['predicted']['days_for_1m_steps']:.1f}"),
)


def table(plans: list[dict[str, Any]]) -> str:
    """Several plans as a Markdown table; times are predictions, a range from all overlapped to all in turn."""
    rows = [[name for name, _ in _COLUMNS], ["---"] * len(_COLUMNS)]
    rows += [[show(found) for _, show in _COLUMNS] for found in plans]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main(settings: PlanSettings, compare: list[str], as_json: bool) -> str:
    """`simvlm tpu-plan`: what to print."""
    plans = [plan(settings), *(plan(dataclasses.replace(settings, topology=name, mesh=None)) for name in compare)]
    if as_json:
        return json.dumps(plans if compare else plans[0], indent=1)
    return report(plans[0]) if not compare else f"{report(plans[0])}\n\npredicted:\n\n{table(plans)}"
