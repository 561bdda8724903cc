"""`simvlm pretrain`: from settings to a trained model."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from simvlm.data import index, shards, spans, text
from simvlm.data.mixture import Mixture
from simvlm.data.shards import ImageTextShards
from simvlm.data.text import TextShards
from simvlm.data.tokenizer import Tokenizer
from simvlm.model.config import VARIANTS, SimVLMConfig, as_decoder_only, variant, with_conv_stages
from simvlm.train import checkpoint, loop
from simvlm.train import settings as run_settings
from simvlm.train.held_out import HeldOut
from simvlm.train.processes import ALONE, Processes, ProcessLost
from simvlm.train.settings import PretrainSettings
from simvlm.train.step import row_multiple

_DESCRIPTION = """Pretraining: PrefixLM, or the objectives and architectures that it is compared with.

--config FILE takes the settings of a YAML file, as run.yaml of a run's folder; options given beside it win.
--resume FOLDER goes on with the run in that folder, with its own settings; options given beside it win.
--dry-run N trains nothing: it tells what each of N processes would hold, and how long they would take; --on H100: on
that GPU, not on this machine.

torchrun starts several processes: torchrun --nproc-per-node 8 --no-python simvlm pretrain …
"""


def pretrain(settings: PretrainSettings, *, resume: bool = False) -> Path:
    """Trains, and returns the folder of the last checkpoint, which `simvlm.load` reads.

    Args:
        settings: of the run; written to `run.yaml` in its folder.
        resume: go on from the newest checkpoint of `settings.out`, or from the beginning if it has none yet.

    Raises:
        ValueError, OSError: a setting, a file or the training itself is at fault; see `simvlm.train.loop.Run`.
        Interrupted: it was stopped, and saved itself.
    """
    run_settings.check(settings)
    folder = Path(settings.out)
    if not resume and (checkpoint.newest(folder) is not None or (folder / loop.LOG).exists()):
        raise FileExistsError(
            f"out: {folder} holds a run already; --resume {folder} goes on with it, another --out begins anew"
        )
    tokenizer = Tokenizer(settings.data.tokenizer)
    config = model_config(settings, tokenizer.vocab_size)
    engine = engine_of(settings, config)
    try:
        last = _run(settings, tokenizer, config, engine).all_steps()
    except ProcessLost:
        raise  # nobody is left to say goodbye to
    except (OSError, ValueError, loop.Interrupted):  # of all processes together
        engine.close()
        raise
    engine.close()
    return last


def _run(settings: PretrainSettings, tokenizer: Tokenizer, config: SimVLMConfig, engine: Any) -> loop.Run:
    """The run with its data, from its newest checkpoint; its settings are written."""
    processes = engine.processes
    say = functools.partial(print, file=sys.stderr) if processes.is_first else lambda text: None
    _index(settings, processes)
    mixture = processes.together(lambda: mixture_of(settings, tokenizer, config, processes))
    for source in (mixture.pairs, mixture.documents):
        for shard in [] if source is None else source.cut:
            say(f"{shard} is cut short; what is whole in it is used")
    if settings.data.fraction < 1 and mixture.pairs is not None:
        say(f"data.fraction {settings.data.fraction}: {mixture.num_pairs} of the {len(mixture.pairs)} pairs are used")
    device = str(engine.device) if processes.count == 1 else str(engine.device).partition(":")[0]
    settings = dataclasses.replace(settings, device=device, precision=engine.precision)
    held_out = None
    if settings.held_out.pairs or settings.held_out.documents:
        held_out = HeldOut(settings, config, tokenizer, processes)
    run = loop.Run(engine, mixture, settings, config, held_out)

    def write_settings() -> None:
        if processes.is_first:
            Path(settings.out).mkdir(parents=True, exist_ok=True)
            run_settings.save(settings, Path(settings.out))

    # After all that may refuse: a run that stands must not be spoilt.
    processes.together(write_settings)
    return run


def _index(settings: PretrainSettings, processes: Processes) -> None:
    """Each process scans its share of the shards that have no index."""
    data, held_out = settings.data, settings.held_out
    if processes.count == 1:
        return

    def say(text: str) -> None:
        if processes.is_first:
            print(f"process 0 of {processes.count}: {text}", file=sys.stderr, flush=True)

    def scan() -> None:
        for pattern, scan_shard in (
            (data.pairs, shards.scan),
            (held_out.pairs, shards.scan),
            (data.documents, text.scan),
            (held_out.documents, text.scan),
        ):
            if pattern:
                own = shards.expand(pattern)[processes.index :: processes.count]
                index.indices(own, scan_shard, folder=data.index, say=say)

    processes.together(scan)


def engine_of(settings: PretrainSettings, config: SimVLMConfig) -> Any:
    """The engine of the settings' framework, which is imported here.

    Raises:
        ValueError: the framework is not installed, or has no such device, kernel or mesh.
    """
    if settings.engine == "torch":
        from simvlm.train.torch_engine import TorchEngine

        return TorchEngine(settings, config)
    missing = [name for name in ("jax", "flax", "optax", "orbax.checkpoint") if not _installed(name)]
    if missing:
        raise ValueError(
            f"engine: jax needs {', '.join(missing)}, not installed here (pip install 'simvlm[jax,train]')"
        )
    from simvlm.train import jax_engine

    jax_engine.connect(settings.jax)
    return jax_engine.JaxEngine(settings, config)


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def model_config(settings: PretrainSettings, vocab_size: int) -> SimVLMConfig:
    """The architecture of `settings.variant` with what the settings change in it, and the tokenizer's vocabulary, which
    span corruption adds its sentinels to.

    Raises:
        ValueError: there is no such variant, or it cannot be changed so.
    """
    if settings.variant in VARIANTS or not settings.variant.endswith(".json"):
        config = variant(settings.variant)
    else:
        try:
            values = json.loads(Path(settings.variant).read_text())
        except ValueError as error:
            raise ValueError(f"variant: {settings.variant} must be JSON, got {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"variant: {settings.variant} must hold names and values, got {values!r}")
        config = SimVLMConfig.from_dict(
            {k: v for k, v in values.items() if k not in ("model_type", "tokenizer_sha256")}
        )
    if settings.arch == "encoder_decoder" and config.arch != settings.arch:
        raise ValueError(f"arch must be decoder_only for {settings.variant}, a model of one stack, got {settings.arch}")
    if settings.arch == "decoder_only":
        config = as_decoder_only(config)
    if settings.conv_stages is not None:
        config = with_conv_stages(config, settings.conv_stages)
    sentinels = spans.num_sentinels(config.max_text_len) if settings.objective == "span_corruption" else 0
    image_size = config.image_size if settings.image_size is None else settings.image_size
    return dataclasses.replace(
        config, vocab_size=vocab_size + sentinels, num_sentinels=sentinels, image_size=image_size
    )


def mixture_of(
    settings: PretrainSettings, tokenizer: Tokenizer, config: SimVLMConfig, processes: Processes = ALONE
) -> Mixture:
    """The mixture of the settings' shards; this process's part of it."""
    chosen = settings.data
    say = functools.partial(print, file=sys.stderr, flush=True) if processes.is_first else None
    return Mixture(
        ImageTextShards(chosen.pairs, index=chosen.index, say=say) if chosen.pairs else None,
        TextShards(chosen.documents, index=chosen.index, say=say) if chosen.documents else None,
        tokenizer,
        pairs_per_step=chosen.pairs_per_step,
        documents_per_step=chosen.documents_per_step,
        image_size=config.image_size,
        max_text_len=config.max_text_len,
        row_multiple=row_multiple(settings, config.max_text_len, processes.count),
        seed=settings.seed,
        part=(processes.index, processes.count),
        objective=settings.objective,
        pairs_fraction=chosen.fraction,
    )


def dry_run(settings: PretrainSettings, processes: int, on: str) -> str:
    """What a run of so many processes would read, hold and take; only indices are written. See dry_run.py."""
    from simvlm.train import dry_run as planned

    run_settings.check(settings)
    if processes < 1:
        raise ValueError(f"--dry-run must be a number of processes, at least 1, got {processes}")
    tokenizer = Tokenizer(settings.data.tokenizer)
    config = model_config(settings, tokenizer.vocab_size)
    sample = mixture_of(planned.sample_settings(settings), tokenizer, config).batch(0).batch
    return planned.report(settings, config, mixture_of(settings, tokenizer, config), sample, processes, on)


def main(argv: Sequence[str]) -> str:
    """`simvlm pretrain …`: options over a YAML file over defaults; returns what to print."""
    import tyro

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument("--resume")
    parser.add_argument("--dry-run", type=int)
    parser.add_argument("--on", default="")
    files, options = parser.parse_known_args(argv)
    default: dict[str, Any] = {}
    if files.resume is not None and files.config is not None:
        raise ValueError("--config must not be given with --resume: a run has its own settings")
    if files.resume is not None:
        own = run_settings.load(Path(files.resume) / run_settings.FILE)
        default["default"] = dataclasses.replace(own, out=files.resume)
    elif files.config is not None:
        default["default"] = run_settings.load(Path(files.config))
    settings = tyro.cli(
        PretrainSettings,
        args=options,
        prog="simvlm pretrain",
        description=_DESCRIPTION,
        **default,
    )
    if files.dry_run is not None:
        return dry_run(settings, files.dry_run, files.on)
    return f"trained: {pretrain(settings, resume=files.resume is not None)}"
