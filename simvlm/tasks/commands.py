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


def reproduce(
    out: str,
    work: str,
    *,
    scale: str,
    rows: Sequence[str],
    data: str,
    workers: int,
    share: float,
    show: bool,
    page: bool,
) -> str:
    """`simvlm reproduce`: runs what has no result yet, and writes the page of all results.

    Raises:
        ValueError: no scale or row has that name, a number is out of range, or jobs failed.
    """
    from pathlib import Path

    from simvlm.kernels.dispatch import did_you_mean
    from simvlm.model.config import variant
    from simvlm.tasks import reproduce as runner
    from simvlm.tasks import reproduce_page, world_data
    from simvlm.tasks.rows import SCALES, Data, jobs

    if scale not in SCALES:
        raise ValueError(f"scale must be one of {list(SCALES)}, got {scale!r}{did_you_mean(scale, list(SCALES))}")
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1, got {share}")
    chosen = SCALES[scale]
    root = Path(data or f"{work}/data")
    found = Data(
        pairs=f"{root}/pairs/*.tar",
        documents=f"{root}/documents/*",
        tokenizer=f"{root}/tokenizer.model",
        benchmarks=f"{root}/benchmarks",
    )
    if scale == "demo":
        found = world_data.paths(root)
    made = jobs(chosen, found, len(variant(chosen.variant).conv_depths))
    names = sorted({job.row for job in made})
    for row in rows:
        if row not in names:
            raise ValueError(f"rows must be of {names}, got {row!r}{did_you_mean(row, names)}")
    wanted = [job for job in made if not rows or job.row in rows]
    needed = {job.name for job in wanted}
    for job in reversed(made):
        if job.name in needed and job.needs is not None:
            needed.add(job.needs)
    all_jobs = [job for job in made if job.name in needed]
    if show:
        return "\n".join(f"{job.name}\t{runner.command(job)}" for job in all_jobs)
    if page:
        return str(reproduce_page.write(Path(out), made, scale, chosen, Path(work)))
    if scale == "demo":
        world_data.prepare(root, share=share, workers=workers)
    try:
        failed = runner.run(all_jobs, Path(out), Path(work), workers=workers)
    finally:  # whatever stopped it
        written = reproduce_page.write(Path(out), made, scale, chosen, Path(work))
    if failed:
        raise ValueError(f"{len(failed)} of {len(all_jobs)} jobs failed: {', '.join(failed)}; the others: {written}")
    return f"{len(all_jobs)} jobs done: {written}"
