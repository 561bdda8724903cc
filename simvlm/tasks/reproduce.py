"""`simvlm reproduce`: the paper's experiments as jobs (pretrain, finetune, eval), run where they stopped.

A job's result is one file, `<out>/jobs/<name>.json`; where it is there the job is done. Checkpoints lie in `<work>/`
and may be removed: they are made again for jobs that still need them. What the rows are made of: rows.py.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import json
import multiprocessing
import os
import shlex
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from simvlm.files import write_whole

Kind = Literal["pretrain", "finetune", "eval"]
JOBS = "jobs"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One command.

    Attributes:
        name: of its result, and of its folder.
        kind: which command.
        settings: its options: fields of PretrainSettings, FinetuneSettings or EvalSettings. "@name" stands for the
            checkpoint of another job.
        row: of the table.
        seed: of the row.
        gallery: an evaluation whose first examples are shown: its result keeps small copies of their pictures.
    """

    name: str
    kind: Kind
    settings: Mapping[str, Any]
    row: str
    seed: int
    gallery: bool = False

    @property
    def needs(self) -> str | None:
        """The job whose checkpoint this one reads."""
        value = self.settings.get("checkpoint", "")
        return value[1:] if value.startswith("@") else None


def run(jobs: Sequence[Job], out: Path, work: Path, *, workers: int) -> list[str]:
    """Runs all jobs that have no result yet, each after the one it needs; returns the names of those that failed.

    Args:
        jobs: all that are wanted.
        out: where results are kept.
        work: where checkpoints are; results tell paths from there.
        workers: processes; they share the processor's cores.

    Raises:
        ValueError: a job has a result, but of another command: an older recipe's, or of other data.
        OSError: a worker was killed.
    """
    (out / JOBS).mkdir(parents=True, exist_ok=True)
    by_name = {job.name: job for job in jobs}
    missing = [job for job in jobs if not result_path(out, job.name).exists()]
    others = [job.name for job in jobs if job not in missing and not _is_its_own(job, out, work)]
    if others:
        raise ValueError(
            f"out: {out / JOBS} holds results of commands that are not those of now: {', '.join(others)}; "
            "remove them, or take another --out"
        )
    wanted: dict[str, Job] = {}
    for job in missing:  # and the checkpoints that are gone but needed
        chain = [job]
        while (needed := chain[-1].needs) is not None and not checkpoint_of(by_name[needed], work).exists():
            chain.append(by_name[needed])
        for each in reversed(chain):
            wanted.setdefault(each.name, each)
    threads = max(1, len(os.sched_getaffinity(0)) // workers)
    context = multiprocessing.get_context("spawn")
    failed: list[str] = []
    with concurrent.futures.ProcessPoolExecutor(
        workers, mp_context=context, initializer=_begin, initargs=(threads, os.getpid())
    ) as pool:
        running: dict[concurrent.futures.Future[dict[str, Any]], Job] = {}
        waiting = list(wanted.values())
        while waiting or running:
            busy = {job.name for job in running.values()} | {job.name for job in waiting}
            for job in [job for job in waiting if job.needs is None or job.needs not in busy]:
                if job.needs in failed:
                    waiting.remove(job)
                    failed.append(job.name)
                elif len(running) < workers:  # no more: the order is that of the jobs, not of what can begin first
                    waiting.remove(job)
                    running[pool.submit(do, job, by_name, work)] = job
            done, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in done:
                job = running.pop(future)
                try:
                    text = json.dumps(future.result(), indent=1, ensure_ascii=False) + "\n"
                    write_whole(result_path(out, job.name), _without(work, text))
                    print(f"{job.name}: done", flush=True)
                except concurrent.futures.BrokenExecutor:
                    raise OSError(
                        f"reproduce: a worker was killed at {job.name} or beside it, out of memory perhaps; "
                        "the same command goes on, with fewer --workers if it happens again"
                    ) from None
                except (ValueError, OSError, RuntimeError) as error:  # torch's own, out of memory among them
                    failed.append(job.name)
                    print(f"{job.name}: {error}", flush=True)
    return failed


def do(job: Job, by_name: Mapping[str, Job], work: Path) -> dict[str, Any]:
    """One job's result: what its command found, its seconds, the command, and the machine."""
    from simvlm.tasks import evaluate, finetune
    from simvlm.tasks.reproduce_gallery import thumbnail
    from simvlm.tasks.settings import EvalSettings, FinetuneSettings

    folder = work / job.name
    if (folder / finetune.RESULT).exists():  # wanted anew; one that was cut off goes on
        shutil.rmtree(folder)
    began = time.perf_counter() - _earlier(folder, job.kind)
    settings = dict(job.settings)
    if (needed := job.needs) is not None:
        settings["checkpoint"] = str(checkpoint_of(by_name[needed], work))
    found: dict[str, Any]
    if job.kind == "eval":
        found = evaluate.evaluate(EvalSettings(**settings, out=str(folder)))
        if job.gallery:
            for sample in found["samples"]:
                sample["pictures"] = [thumbnail(Path(settings["data"], path)) for path in sample["images"]]
    elif job.kind == "finetune":
        found = finetune.finetune(FinetuneSettings(**settings, out=str(folder)))
    else:
        found = _pretrained(folder, settings)
    return {
        "row": job.row,
        "seed": job.seed,
        "kind": job.kind,
        "command": command(job),
        "seconds": round(time.perf_counter() - began, 1),
        "machine": machine(settings.get("device", "auto")),
        "found": found,
    }


def checkpoint_of(job: Job, work: Path) -> Path:
    """Where a job's model lies once it is trained."""
    return work / job.name / "checkpoint"


def result_path(out: Path, name: str) -> Path:
    return out / JOBS / f"{name.replace('/', '.')}.json"


def _is_its_own(job: Job, out: Path, work: Path) -> bool:
    stored = json.loads(result_path(out, job.name).read_text())["command"]
    return shlex.split(stored) == shlex.split(_without(work, command(job)))  # what is quoted depends on where work is


def _without(work: Path, text: str) -> str:
    """Paths of no one machine."""
    return text.replace(f"{work}/", "")


def command(job: Job) -> str:
    """The command line that does the same, but that "@name" stands for a checkpoint of that job."""
    flat = _flat(job.settings)
    parts = ["simvlm", job.kind, *([str(flat.pop("task"))] if "task" in flat else [])]
    for name, value in (flat | {"out": job.name}).items():
        parts.append(f"--{name.replace('_', '-')}")
        if value is not True:  # a flag
            parts += map(str, value if isinstance(value, (tuple, list)) else (value,))
    return shlex.join(parts)


def machine(device: str) -> dict[str, Any]:
    """What a job ran on: device, threads, versions. No host name: results are public."""
    import torch

    import simvlm
    from simvlm.doctor import cpu_model
    from simvlm.train.torch_device import device_of

    chosen = device_of(device)
    return {
        "device": torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else cpu_model(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "simvlm": simvlm.__version__,
    }


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            for field in dataclasses.fields(value):
                own = getattr(value, field.name)
                if own != field.default and own != ():
                    found[f"{name}.{field.name}"] = own
        else:
            found[name] = value
    return found


def _pretrained(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    from simvlm.train import loop
    from simvlm.train.pretrain import pretrain
    from simvlm.train.settings import PretrainSettings

    last = pretrain(PretrainSettings(**settings, out=str(folder)), resume=True)
    link = folder / "checkpoint"
    link.unlink(missing_ok=True)
    link.symlink_to(last.relative_to(folder))
    log = [json.loads(line) for line in (folder / loop.LOG).read_text().splitlines()]
    return {"log": [{name: line[name] for name in ("step", "loss")} for line in log], "skipped": log[-1]["skipped"]}


def _earlier(folder: Path, kind: Kind) -> float:
    """Seconds that a job which was cut off took for what it goes on from."""
    from simvlm.train import loop

    path = folder / loop.LOG  # of finetuning too
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if kind == "finetune":
        return float(sum(line["seconds"] for line in lines))
    steps = [0, *(line["step"] for line in lines)]
    return float(sum(line["step_s"] * (b - a) for line, (a, b) in zip(lines, itertools.pairwise(steps), strict=True)))


def _begin(threads: int, parent: int) -> None:
    """Of a worker process: so many threads, and its end when the command's own process is gone."""
    import torch

    torch.set_num_threads(threads)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
