"""Checkpoints of a run: one folder per step, written aside and renamed when whole, the oldest removed.

checkpoints/step-00001200/   model.safetensors config.json tokenizer.model   what `simvlm.load` reads
                             ema.safetensors                                  the weights' average, if there is one
                             dcp/ or orbax/                                   the engine's whole state, in parts
                             state.json                                       the step, and what was counted so far
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from simvlm.files import to_disk
from simvlm.train.processes import ALONE, Processes, ProcessLost

STATE = "state.json"
_ASIDE, _OLD = ".part", ".old"
_NAME = re.compile(r"step-(\d{8})")


class Saving:
    """A checkpoint on its way to the disk, while training goes on; renamed when every process has written its part.

    Args:
        run: the run's folder.
        step: how many steps were taken.
        state: JSON, to which "step" is added.
        write: starts to put the engine's own files into a folder and returns at once; called by every process. What it
            puts there is what was when it was called.
        keep: the newest checkpoints that stay.
        processes: of the run, all of which must make this and call its methods together; they see one file system.

    Raises:
        OSError: the folder cannot be made; on every process.
    """

    def __init__(
        self,
        run: Path,
        step: int,
        state: dict[str, Any],
        write: Callable[[Path], Future[None]],
        keep: int,
        processes: Processes = ALONE,
    ) -> None:
        self.run, self.step, self.keep, self.processes = run, step, keep, processes
        self.state = state | {"step": step}
        self.target = folder_of(run, step)
        self._aside = self.target.with_name(self.target.name + _ASIDE)
        self._written: Future[None] = Future()
        # As the first process sees it, whatever a shared file system shows the others.
        self._in_place = bool(processes.share(np.array([self.target.is_dir()], np.int64))[0, 0])
        if self._in_place:  # a run that stops at the step it went on from
            self._written.set_result(None)
            return
        self._together(self._make_folder)
        try:
            self._written = write(self._aside)
        except Exception as error:
            self._written.set_exception(error)

    @property
    def is_written(self) -> bool:
        """This process has written its part, or failed to."""
        return self._written.done()

    def finish(self) -> Path:
        """Waits for the rest, puts the checkpoint into its place and removes old ones; returns its folder.

        Raises:
            OSError: on every process, if one could not write; what was written is removed, older ones are untouched.
        """
        self._together(self._written.result)
        if not self._in_place:
            self._together(self._publish)
            self._in_place = True
        return self.target

    def _make_folder(self) -> None:
        if self.processes.is_first:
            for end in (_ASIDE, _OLD):  # of a process that was killed
                for left in self.target.parent.glob(f"step-*{end}"):
                    shutil.rmtree(left, ignore_errors=True)
            self._aside.mkdir(parents=True)

    def _publish(self) -> None:
        if not self.processes.is_first:
            return
        (self._aside / STATE).write_text(json.dumps(self.state, indent=1) + "\n")
        for path in [*self._aside.rglob("*"), self._aside]:
            to_disk(path)
        self._aside.replace(self.target)
        to_disk(self.target.parent)
        for _, old in all_of(self.run)[: -self.keep]:
            with contextlib.suppress(OSError):  # the new one is in its place
                # Under another name first: half a folder must not pass for a checkpoint.
                shutil.rmtree(old.replace(old.with_name(old.name + _OLD)), ignore_errors=True)

    def _together(self, part: Callable[[], None]) -> None:
        """part() on every process; an OSError on every process if it failed on one, and nothing is left of this."""
        try:
            self.processes.together(part)
        except ProcessLost:
            raise
        except Exception as error:  # writers raise what they like for a full disk
            if self.processes.is_first:
                shutil.rmtree(self._aside, ignore_errors=True)
            raise OSError(
                f"cannot write {self.target} ({' '.join(str(error).split()) or type(error).__name__})"
            ) from error


def folder_of(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run / "checkpoints" / f"step-{step:08d}"


def newest(run: Path) -> tuple[int, Path] | None:
    """(step, folder) of the last whole checkpoint."""
    found = all_of(run)
    return found[-1] if found else None


def read_state(folder: Path) -> dict[str, Any]:
    """What `Saving` was given."""
    return json.loads((folder / STATE).read_text())


def all_of(run: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every whole checkpoint, ascending."""
    named = ((_NAME.fullmatch(path.name), path) for path in run.glob("checkpoints/step-*"))
    return sorted((int(match[1]), path) for match, path in named if match)
