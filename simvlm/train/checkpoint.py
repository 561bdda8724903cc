"""Checkpoints of a run: one folder per step, written aside and renamed when whole, the oldest removed.

checkpoints/step-00001200/   model.safetensors config.json tokenizer.model   what `simvlm.load` reads
                             optimizer.safetensors                            AdamW's moments by parameter name
                             state.json                                       the step, and what was counted so far
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from simvlm.train.processes import ALONE, Processes

STATE = "state.json"
_NAME = re.compile(r"step-(\d{8})")


def save(
    run: Path,
    step: int,
    state: dict[str, Any],
    write: Callable[[Path], None],
    keep: int,
    processes: Processes = ALONE,
) -> Path:
    """Saves the state after `step` steps and removes all but the `keep` newest checkpoints; returns its folder.

    Args:
        run: the run's folder.
        state: JSON, to which "step" is added.
        write: puts the engine's own files into a folder; called by every process.
        processes: of the run, all of which must call this; they see one file system.

    Raises:
        OSError: it could not be written, and what was written of it is removed; older ones are untouched.
    """
    target = run / "checkpoints" / f"step-{step:08d}"
    if target.is_dir():  # a run that stops at the step it went on from
        return target
    aside = target.with_name(target.name + ".part")
    try:
        if processes.is_first:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        processes.barrier(f"a folder for step {step}")
        write(aside)
        processes.barrier(f"step {step} is written")
        if processes.is_first:
            (aside / STATE).write_text(json.dumps(state | {"step": step}, indent=1) + "\n")
            for path in [*aside.rglob("*"), aside]:
                _to_disk(path)
            aside.replace(target)
            _to_disk(target.parent)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if type(error).__name__ == "SafetensorError":  # its only word for a disk that is full
            raise OSError(f"cannot write {target} ({error})") from error
        raise
    processes.barrier(f"step {step} is in place")
    if not processes.is_first:
        return target
    for _, old in _all(run)[:-keep]:
        # Under another name first: half a folder must not pass for a checkpoint.
        shutil.rmtree(old.replace(old.with_name(old.name + ".old")), ignore_errors=True)
    return target


def newest(run: Path) -> tuple[int, Path] | None:
    """(step, folder) of the last whole checkpoint."""
    found = _all(run)
    return found[-1] if found else None


def read_state(folder: Path) -> dict[str, Any]:
    """What `save` was given."""
    return json.loads((folder / STATE).read_text())


def write_whole(path: Path, text: str) -> None:
    """Writes a file that is there whole or as it was before."""
    aside = path.with_name(path.name + ".part")
    try:
        aside.write_text(text)
        _to_disk(aside)
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def _all(run: Path) -> list[tuple[int, Path]]:
    named = ((_NAME.fullmatch(path.name), path) for path in run.glob("checkpoints/step-*"))
    return sorted((int(match[1]), path) for match, path in named if match)


def _to_disk(path: Path) -> None:
    # A rename may reach the disk before the bytes of the file that it names.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
