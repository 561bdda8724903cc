"""Commands about the benchmarks: each does its work and returns what to print."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

from simvlm.tasks.world import write_benchmarks


def data_benchmarks(folder: str, *, seed: int = 0, scale: float = 1.0, image_size: int = 64, workers: int = 0) -> str:
    """`simvlm data benchmarks`: writes the generated world's; `workers=0` is one for each usable core."""
    began = time.perf_counter()
    pictures = write_benchmarks(
        folder,
        seed=seed,
        scale=scale,
        image_size=image_size,
        workers=workers or len(os.sched_getaffinity(0)),
    )
    return f"benchmarks with {pictures} pictures in {folder} after {time.perf_counter() - began:.0f} s"


def finetune(argv: Sequence[str]) -> str:
    """`simvlm finetune TASK …`: options are the fields of FinetuneSettings."""
    from simvlm.tasks.finetune import CHECKPOINT
    from simvlm.tasks.finetune import finetune as run
    from simvlm.tasks.settings import FinetuneSettings

    settings = _settings(FinetuneSettings, "finetune", argv)
    found = run(settings)
    return (
        f"{settings.task}: {found['dev']:.4f} on dev after epoch {found['epoch']} with lr {found['lr']:g}; "
        f"{settings.out}/{CHECKPOINT}"
    )


def evaluate(argv: Sequence[str]) -> str:
    """`simvlm eval TASK …`: options are the fields of EvalSettings."""
    from simvlm.tasks.evaluate import evaluate as run
    from simvlm.tasks.report import lines
    from simvlm.tasks.settings import EvalSettings

    return lines(run(_settings(EvalSettings, "eval", argv)))


def _settings(kind: Any, command: str, argv: Sequence[str]) -> Any:
    """The settings that the options say; the task stands first, without a name."""
    import tyro

    named = [] if not argv or argv[0].startswith("-") else ["--task", argv[0]]
    return tyro.cli(kind, args=[*named, *argv[len(named) // 2 :]], prog=f"simvlm {command} TASK")
