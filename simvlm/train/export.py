"""`simvlm export`: the model of a run's checkpoint as a folder of its own, which `simvlm.load` reads."""

from __future__ import annotations

import shutil
from pathlib import Path

from simvlm.model.folder import CONFIG, TOKENIZER, WEIGHTS
from simvlm.train import checkpoint

EMA = "ema.safetensors"


def export(run: str | Path, folder: str | Path, *, step: int | None = None, ema: bool = False) -> str:
    """Copies weights, config and tokenizer; returns what to print.

    Args:
        run: the run's folder, or that of one of its checkpoints.
        folder: where the model goes; made if missing.
        step: of the checkpoint; None: the newest.
        ema: the weights' average in place of the weights.

    Raises:
        FileNotFoundError: there is no such checkpoint, or it has no average.
        FileExistsError: the folder holds a model.
    """
    run, folder = Path(run), Path(folder)
    source = run if (run / checkpoint.STATE).is_file() else _checkpoint(run, step)
    weights = source / (EMA if ema else WEIGHTS)
    if not weights.is_file():
        raise FileNotFoundError(f"export: {source} holds no {weights.name}: the run was without --ema")
    if (folder / WEIGHTS).exists():
        raise FileExistsError(f"export: {folder} holds a model already; another folder, or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    for name in (CONFIG, TOKENIZER):
        shutil.copyfile(source / name, folder / name)
    aside = folder / f"{WEIGHTS}.part"
    shutil.copyfile(weights, aside)
    aside.replace(folder / WEIGHTS)
    return f"{source}: {'average' if ema else 'weights'} in {folder}"


def _checkpoint(run: Path, step: int | None) -> Path:
    steps = dict(checkpoint.all_of(run))
    if not steps:
        raise FileNotFoundError(f"export: {run} holds no checkpoint")
    chosen = max(steps) if step is None else step
    if chosen not in steps:
        raise FileNotFoundError(f"export: {run} holds the checkpoints of steps {sorted(steps)}, got {step}")
    return steps[chosen]
