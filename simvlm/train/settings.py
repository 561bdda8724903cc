"""What describes one pretraining run: a tree of dataclasses, set from YAML and options, saved beside the run."""

from __future__ import annotations

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any, Literal

from simvlm.data.prefixes import Objective
from simvlm.kernels.dispatch import did_you_mean

FILE = "run.yaml"
Arch = Literal["encoder_decoder", "decoder_only"]
Engine = Literal["torch", "jax"]
Precision = Literal["auto", "float32", "bfloat16"]
Remat = Literal["none", "layer", "dots"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSettings:
    """What is read, and how much of it in every step."""

    pairs: tuple[str, ...] = ()
    """tar shards of image-text pairs: paths, globs, {00000..00031}"""
    documents: tuple[str, ...] = ()
    """jsonl, jsonl.gz, json.gz or parquet shards of texts without pictures"""
    tokenizer: str = ""
    """the SentencePiece model"""
    pairs_per_step: int = 4096
    """of every batch (the paper's number); 0: none"""
    documents_per_step: int = 512
    """of every batch (the paper's number); 0: none"""
    fraction: float = 1.0
    """share of the pairs that is used: those that a run over all of them would meet first"""
    max_skipped_share: float = 0.05
    """the run stops when more than this share of the samples is broken"""
    workers: int = 0
    """processes that assemble batches, of every rank; 0: a thread of the training process"""
    index: str | None = None
    """a folder for the index files, where they cannot lie beside the shards; None: beside them"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """AdamW with linear warm-up, then linear decay to 0."""

    lr: float = 5e-4
    """the largest learning rate"""
    warmup: float = 0.02
    """share of the steps before it is reached"""
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.01
    """of matrices and convolutions; vectors, embeddings of places and tables of biases have none"""
    max_grad_norm: float | None = None
    """gradients are scaled down to this norm; None: as they are"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class JaxSettings:
    """Of `engine: jax` alone."""

    mesh: tuple[int, int, int] = (0, 1, 1)
    """devices along data, fsdp and tensor; data 0: all that are left"""
    coordinator: str = ""
    """host:port of process 0, in runs of several processes; "auto" where a cluster's environment tells"""
    process: tuple[int, int] = (0, 1)
    """this process, and how many there are"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TorchSettings:
    """Of `engine: torch` alone; its processes are those of torchrun."""

    replicas: int = 1
    """copies of the model, each cut over processes / replicas of them (FSDP2); as many as processes: none is cut"""
    sync_batch_norm: bool = True
    """BatchNorm's statistics are of all processes' pictures; off: of each one's own, and the first's are saved"""
    compile: bool = False
    """torch.compile of every transformer layer"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOutSettings:
    """What is looked at while the model trains, and never learnt from."""

    pairs: tuple[str, ...] = ()
    """tar shards, as `data.pairs`; none: no held-out pairs"""
    documents: tuple[str, ...] = ()
    """as `data.documents`"""
    every: int = 1000
    """steps"""
    batches: int = 8
    """of the composition of training, whose loss is told"""
    captions: int = 4
    """pictures that are described, for TensorBoard"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainSettings:
    """Pretraining of one model."""

    out: str
    """the run's folder"""
    variant: str = "base"
    """a size by name (`simvlm doctor --variants`), or the path of a config.json; the vocabulary is the tokenizer's"""
    image_size: int | None = None
    """side of the pictures in pixels; None: the variant's"""
    arch: Arch | None = None
    """two stacks, or one with as many layers as both; None: the variant's"""
    conv_stages: int | None = None
    """stages of convolutions, at equal image tokens: from 0 (linear patches) to one more than the variant's; None: the
    variant's"""
    objective: Objective = "prefix_lm"
    """what the encoder reads of a text: a prefix of random length (prefix_lm), as little as can be (lm), or all but the
    spans that the decoder writes (T5's span_corruption)"""
    steps: int = 1_000_000
    """of the optimizer, over the whole run"""
    seed: int = 0
    """of the weights, the order of the samples and everything drawn for them"""
    data: DataSettings = DataSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    loss_weights: tuple[float, float] = (1.0, 1.0)
    """of a token of an image-text pair and of one of a document"""
    init_conv: str = ""
    """where the convolution stage begins: "timm:resnet101", or another ResNet of timm's with the variant's blocks;
    none: at random"""
    accumulate: int = 1
    """micro-batches of every step, whose gradients are added up; BatchNorm's statistics are of each"""
    remat: Remat = "none"
    """what the backward pass computes again: nothing, each layer from its input, or all but matrix products (dots)"""
    ema: float | None = None
    """share that an average of the weights keeps of itself in every step, 0.9999 say; None: no average"""
    held_out: HeldOutSettings = HeldOutSettings()
    engine: Engine = "torch"
    """the framework; both take the same samples and write the same model folder"""
    torch: TorchSettings = TorchSettings()
    jax: JaxSettings = JaxSettings()
    device: str = "auto"
    """"cpu", "cuda", …; auto: the GPU where there is one; of jax: its first platform"""
    precision: Precision = "auto"
    """of products and activations, weights being float32; auto: bfloat16 where the processor multiplies it"""
    impl: str | None = None
    """the kernels by name (`simvlm doctor`); None: the best that takes each call"""
    log_every: int = 10
    """steps"""
    checkpoint_every: int = 1000
    """steps"""
    keep: int = 3
    """checkpoints; older ones are removed"""
    profile: tuple[int, int] | None = None
    """(first step, how many) that torch's profiler records, into `profile/` of the run's folder"""
    stall_s: float = 300.0
    """seconds without a step after which is told what everybody waits for"""
    timeout_s: float = 1800.0
    """seconds after which a process that does not answer the others is taken for lost"""


def check(settings: PretrainSettings) -> None:
    """
    Raises:
        ValueError: a setting is out of range; it is named.
    """
    data, optimizer = settings.data, settings.optimizer
    _require("out", bool(settings.out), "a folder", "none")
    _require("seed", settings.seed >= 0, "at least 0", settings.seed)
    _require("data.tokenizer", bool(data.tokenizer), "a SentencePiece model", repr(data.tokenizer))
    _require("data.pairs, data.documents", bool(data.pairs or data.documents), "some shards", "neither")
    for name in ("steps", "log_every", "checkpoint_every", "keep"):
        _require(name, getattr(settings, name) >= 1, "at least 1", getattr(settings, name))
    for name in ("pairs_per_step", "documents_per_step"):
        _require(f"data.{name}", getattr(data, name) >= 0, "at least 0", getattr(data, name))
    read = (bool(data.pairs) and data.pairs_per_step > 0, bool(data.documents) and data.documents_per_step > 0)
    _require(
        "data.pairs_per_step, data.documents_per_step",
        any(read),
        "above 0 for one that has shards",
        f"{data.pairs_per_step} and {data.documents_per_step}, with shards of {_sources(data)}",
    )
    _require("data.workers", data.workers >= 0, "at least 0", data.workers)
    _require("data.fraction", 0 < data.fraction <= 1, "above 0 and at most 1", data.fraction)
    _require("data.max_skipped_share", 0 <= data.max_skipped_share <= 1, "from 0 to 1", data.max_skipped_share)
    _require("optimizer.lr", optimizer.lr > 0, "above 0", optimizer.lr)
    _require("optimizer.warmup", 0 <= optimizer.warmup < 1, "at least 0 and below 1", optimizer.warmup)
    for name in ("beta1", "beta2"):
        value = getattr(optimizer, name)
        _require(f"optimizer.{name}", 0 <= value < 1, "at least 0 and below 1", value)
    _require("optimizer.weight_decay", optimizer.weight_decay >= 0, "at least 0", optimizer.weight_decay)
    norm = optimizer.max_grad_norm
    _require("optimizer.max_grad_norm", norm is None or norm > 0, "above 0, or None", norm)
    _require(
        "jax.mesh",
        min(settings.jax.mesh) >= 0 and min(settings.jax.mesh[1:]) >= 1,
        "at least 1 each (data may be 0)",
        settings.jax.mesh,
    )
    _require("accumulate", settings.accumulate >= 1, "at least 1", settings.accumulate)
    _require("ema", settings.ema is None or 0 < settings.ema < 1, "between 0 and 1, or None", settings.ema)
    samples = sum(
        getattr(data, name) for name, used in zip(("pairs_per_step", "documents_per_step"), read, strict=True) if used
    )
    _require(
        "accumulate", settings.accumulate <= samples, f"at most the {samples} samples of a step", settings.accumulate
    )
    other, options = ("torch", settings.torch) if settings.engine == "jax" else ("jax", settings.jax)
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        _require(f"{other}.{field.name}", value == field.default, f"left out with engine {settings.engine}", value)
    if settings.engine == "jax":
        given = {name: getattr(settings, name) for name in ("ema", "init_conv", "profile")}
        given["held_out"] = settings.held_out.pairs + settings.held_out.documents
        for name, value in given.items():
            _require(name, not value, "left out with engine jax, which has none of it", repr(value))
    for name in ("every", "batches"):
        value = getattr(settings.held_out, name)
        _require(f"held_out.{name}", value >= 1, "at least 1", value)
    _require("held_out.captions", settings.held_out.captions >= 0, "at least 0", settings.held_out.captions)
    _require("torch.replicas", settings.torch.replicas >= 1, "at least 1", settings.torch.replicas)
    profile = settings.profile
    _require("profile", profile is None or (profile[0] >= 0 and profile[1] >= 1), "a step and a count", profile)
    for name in ("stall_s", "timeout_s"):
        _require(name, getattr(settings, name) > 0, "above 0", getattr(settings, name))
    index, count = settings.jax.process
    _require("jax.process", 0 <= index < count, "an index and a larger count", settings.jax.process)
    weights = settings.loss_weights
    counts = any(weight > 0 for weight, used in zip(weights, read, strict=True) if used)
    _require("loss_weights", min(weights) >= 0 and counts, "at least 0, one above it of what is read", weights)


def _sources(data: DataSettings) -> str:
    return " and ".join(name for name in ("pairs", "documents") if getattr(data, name))


def _require(name: str, fine: bool, what: str, got: Any) -> None:
    if not fine:
        raise ValueError(f"{name} must be {what}, got {got}")


def save(settings: PretrainSettings, folder: Path) -> None:
    """Writes `run.yaml`, whole or not at all."""
    import yaml

    from simvlm.files import write_whole

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, tuple) else value

    values = plain(dataclasses.asdict(settings))
    write_whole(folder / FILE, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def load(path: Path) -> PretrainSettings:
    """The settings of a YAML file; what it leaves out has its default.

    Raises:
        FileNotFoundError, ValueError: there is none, or it is not what this module describes; the field is named.
    """
    import yaml

    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} must be YAML, got {' '.join(str(error).split())}") from error
    if isinstance(values, dict):
        values.setdefault("out", "")  # which `check` refuses, unless an option gives it
    return _built(PretrainSettings, values, str(path))


def _built(kind: Any, value: Any, where: str) -> Any:
    """`value`, as YAML gives it, as a `kind`."""
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(f"{where} must hold names and values, got {value!r}")
        hints = typing.get_type_hints(kind)
        for name in value:
            if name not in hints:
                raise ValueError(f"{where}: no setting is called {name!r}{did_you_mean(str(name), list(hints))}")
        return kind(**{name: _built(hints[name], item, f"{where}: {name}") for name, item in value.items()})  # type: ignore[operator]
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        if not isinstance(value, list) or (parts[-1] is not ... and len(value) != len(parts)):
            raise ValueError(f"{where} must be a list{'' if parts[-1] is ... else f' of {len(parts)}'}, got {value!r}")
        return tuple(_built(parts[0], item, where) for item in value)
    if origin in (types.UnionType, typing.Union):  # X | None
        return None if value is None else _built(parts[0], value, where)
    if origin is Literal:
        if value not in parts:
            raise ValueError(f"{where} must be one of {list(parts)}, got {value!r}{did_you_mean(str(value), parts)}")
        return value
    if kind is bool:
        if not isinstance(value, bool):
            raise ValueError(f"{where} must be true or false, got {value!r}")
        return value
    try:  # YAML reads 1e-3 as text, 1 as an integer
        converted = kind(value)
    except (TypeError, ValueError):
        converted = None
    if converted is None or isinstance(value, bool) or (kind is str and not isinstance(value, str)):
        raise ValueError(f"{where} must be {kind.__name__}, got {value!r}")
    if kind is int and converted != value:
        raise ValueError(f"{where} must be int, got {value!r}")
    return converted
