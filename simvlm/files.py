"""Files that are there whole or as they were before: full disks, killed processes and lost machines leave no halves."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write a file that becomes `path` when the block ends well, and is removed otherwise."""
    aside = path.with_name(path.name + ".part")
    try:
        yield aside
        to_disk(aside)
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def write_whole(path: Path, text: str) -> None:
    """A text file by way of `whole`."""
    with whole(path) as aside:
        aside.write_text(text)


def to_disk(path: Path) -> None:
    """Waits until the disk has a file's bytes, or a folder's names.

    A rename may reach the disk before the bytes of the file that it names.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
