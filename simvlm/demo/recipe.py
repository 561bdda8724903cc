"""`simvlm demo`: the world, the tokenizer, as many steps as the minutes allow, the captions and the page.

Everything lands in one folder:

    world/ tokenizer.model run/    what it learnt from, and the run (`simvlm pretrain --resume …/run` goes on with it)
    checkpoint/                    the model, for `simvlm.load` and `simvlm caption`
    predictions.jsonl metrics.json report.html picture.png
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import simvlm
from simvlm.data.shards import ImageTextShards
from simvlm.data.text import TextShards
from simvlm.data.tokenizer import Tokenizer, train_tokenizer
from simvlm.data.world import write_world
from simvlm.demo import evaluate, report
from simvlm.kernels import implementations
from simvlm.model.config import SimVLMConfig
from simvlm.model.weights import load
from simvlm.train import loop
from simvlm.train.export import export
from simvlm.train.pretrain import mixture_of, model_config, pretrain
from simvlm.train.settings import DataSettings, OptimizerSettings, PretrainSettings
from simvlm.train.torch_engine import TorchEngine

PAIRS, DOCUMENTS = 100_000, 10_000
VOCAB_SIZE = 512
BEAM = 4
METRICS = "metrics.json"
_TIMED_STEPS, _WARM_STEPS = 15, 5
_TOKENIZER_TEXTS = 10_000


def recipe(out: Path, *, seed: int, steps: int) -> PretrainSettings:
    """The settings of the demo's run."""
    return PretrainSettings(
        out=str(out / "run"),
        variant="demo",
        steps=steps,
        seed=seed,
        data=DataSettings(
            pairs=(str(out / "world/pairs/*.tar"),),
            documents=(str(out / "world/documents/*.jsonl.gz"),),
            tokenizer=str(out / "tokenizer.model"),
            pairs_per_step=32,
            documents_per_step=4,  # the paper's 8 : 1
        ),
        optimizer=OptimizerSettings(lr=6e-4, beta2=0.98, max_grad_norm=1.0),
        device="cpu",
        log_every=10,
        checkpoint_every=1000,
        keep=1,
    )


def demo(out: Path, *, minutes: float = 12.0, seed: int = 0, pairs: int = PAIRS) -> str:
    """Trains for about `minutes` minutes and reports; returns what to print.

    Raises:
        ValueError, OSError: as `simvlm.train.pretrain.pretrain`; or `out` holds something that is not the demo's.
    """
    if not minutes > 0:
        raise ValueError(f"minutes must be above 0, got {minutes}")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    if out.exists() and any(out.iterdir()) and not (out / "world/manifest.json").exists():
        raise FileExistsError(f"out: {out} holds something else; the demo wants a folder of its own")
    began = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out / "run", ignore_errors=True)
    _world(out, seed, pairs)
    settings = recipe(out, seed=seed, steps=1)
    tokenizer = Tokenizer(settings.data.tokenizer)
    step_s = _step_seconds(settings, tokenizer)
    settings = dataclasses.replace(settings, steps=max(10, round(60 * minutes / step_s)))
    prepared = time.perf_counter()
    _say(f"training: {settings.steps} steps of {step_s:.2f} s")
    checkpoint = pretrain(settings)
    train_seconds = time.perf_counter() - prepared
    shutil.rmtree(out / "checkpoint", ignore_errors=True)
    export(checkpoint, out / "checkpoint")
    model, _, tokenizer = load(out / "checkpoint")
    _say(f"captioning {evaluate.PICTURES} pictures it has not seen, and as many with combinations kept from it")
    predictions = evaluate.predict(model, tokenizer, beam=BEAM)
    evaluate.write(predictions, out / evaluate.FILE)
    log = [json.loads(line) for line in (out / "run" / loop.LOG).read_text().splitlines()]
    numbers: dict[str, Any] = {
        **evaluate.metrics(predictions),
        **{name: round(statistics.median(line[name] for line in log), 4) for name in ("data_wait_share", "loop_share")},
        "train_seconds": round(train_seconds, 1),
        "setup_seconds": round(prepared - began, 1),
        "steps": settings.steps,
        "pictures_seen": settings.steps * settings.data.pairs_per_step,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **_step_times(settings, tokenizer, model.config),
        "seed": seed,
        "beam": BEAM,
        "machine": _machine(),
    }
    (out / METRICS).write_text(json.dumps(numbers, indent=1) + "\n")
    report.write(out, model, tokenizer, predictions, numbers, log)
    return f"{summary(numbers)}\n\nOpen {out / 'report.html'}"


def score(out: Path) -> str:
    """Judges the captions of `predictions.jsonl` again, their scenes made anew from the seeds."""
    path = out / evaluate.FILE
    if not path.exists():
        raise FileNotFoundError(f"out: {out} holds no {evaluate.FILE}; `simvlm demo` writes it")
    predictions = evaluate.read(path)
    evaluate.check_complete(predictions, str(path))
    return summary(evaluate.metrics(predictions))


def summary(numbers: dict[str, Any]) -> str:
    """The shares of right captions as lines of text."""
    lines = (
        ("unseen pictures", "caption_correct"),
        ("  of one object", "caption_correct_1"),
        ("  of two objects", "caption_correct_2"),
        ("  of three objects", "caption_correct_3"),
        ("kept-out combinations", "caption_correct_heldout"),
        ("control: other pictures", "caption_correct_shuffled"),
    )
    return "right captions\n" + "\n".join(f"  {name:25}{numbers[key]:7.1%}" for name, key in lines)


def _world(out: Path, seed: int, pairs: int) -> None:
    """Writes shards and tokenizer."""
    _say(f"writing {pairs:,} captioned pictures and {DOCUMENTS:,} documents")
    shutil.rmtree(out / "world", ignore_errors=True)
    workers = len(os.sched_getaffinity(0))
    write_world(out / "world", seed=seed, pairs=pairs, documents=DOCUMENTS, image_size=64, workers=workers)
    captions = ImageTextShards(str(out / "world/pairs/*.tar"))
    documents = TextShards(str(out / "world/documents/*.jsonl.gz"))
    texts = [captions.text(i) for i in range(min(len(captions), _TOKENIZER_TEXTS))]
    texts += [documents[i].text for i in range(min(len(documents), _TOKENIZER_TEXTS // 2))]
    train_tokenizer(texts, str(out / "tokenizer.model"), vocab_size=VOCAB_SIZE)


def _step_seconds(settings: PretrainSettings, tokenizer: Tokenizer) -> float:
    """The median of a few real steps, on a model that is thrown away."""
    config = model_config(settings, tokenizer.vocab_size)
    engine, mixture = TorchEngine(settings, config), mixture_of(settings, tokenizer, config)
    times = []
    batches = mixture.iterate(0, _WARM_STEPS + _TIMED_STEPS)
    for _ in range(_WARM_STEPS + _TIMED_STEPS):
        began = time.perf_counter()
        mixed = next(batches)
        engine.step(mixed, 1e-4, mixed.batch.suffix_tokens())
        times.append(time.perf_counter() - began)
    return statistics.median(times[_WARM_STEPS:])


def _step_times(settings: PretrainSettings, tokenizer: Tokenizer, config: SimVLMConfig) -> dict[str, float]:
    """Median milliseconds of a step in float32 on the C++ kernels and on the reference, in turn on the same batches."""
    engines = {}
    runs = {
        status.name for status in implementations("prefix_attention") if status.family == "torch" and status.available
    }
    for impl in ("cpp", "reference"):
        if impl not in runs:
            continue
        chosen = dataclasses.replace(settings, impl=impl, precision="float32")
        engines[impl] = TorchEngine(chosen, config)
    mixture = mixture_of(settings, tokenizer, config)
    times: dict[str, list[float]] = {impl: [] for impl in engines}
    for step in range(6):
        mixed = mixture.batch(step)
        for impl, engine in engines.items():
            began = time.perf_counter()
            engine.step(mixed, 1e-4, mixed.batch.suffix_tokens())
            times[impl].append(1e3 * (time.perf_counter() - began))
    return {f"step_{impl}_ms": round(statistics.median(many[1:]), 1) for impl, many in times.items()}


def _machine() -> dict[str, Any]:
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "simvlm": simvlm.__version__,
    }


def _say(text: str) -> None:
    print(text, flush=True)
