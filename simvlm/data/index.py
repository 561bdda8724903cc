"""Index files: what a scan of a shard found, kept so that later starts need not scan.

`<shard>.idx` is a safetensors file. A start reads its header alone, which holds the count and the shard's size and time
of change; the arrays are read a few rows at a time, so that what is resident does not grow with the number of samples.
(Read, not mapped: a mapped file that is cut short or lost by its server ends the process with SIGBUS.)
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import uuid
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

_VERSION = "2"
_OPEN = 256
"""index files open at a time: a quarter of the files that a process may usually have"""
_DTYPES: dict[str, np.dtype] = {"I64": np.dtype("<i8"), "U8": np.dtype("u1")}

Say = Callable[[str], None]
"""Tells the user something that is no error."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scan:
    """What a shard holds: how many samples, whether it ends too early, and the arrays that its reader needs."""

    count: int
    cut: bool
    arrays: Mapping[str, np.ndarray]


class ShardIndex:
    """One shard's index, in its file or, where that could not be written, in memory.

    Pickling keeps the file's path alone.

    Attributes:
        count: samples.
        cut: the shard ends too early.
        path: of the file; None if in memory.
    """

    def __init__(self, count: int, cut: bool, kept: _Kept | Mapping[str, np.ndarray]) -> None:
        self.count, self.cut, self._kept = count, cut, kept

    @property
    def path(self) -> Path | None:
        return Path(self._kept.path) if isinstance(self._kept, _Kept) else None

    def rows(self, name: str, first: int, end: int) -> np.ndarray:
        """Rows first … end-1 of one of the scan's arrays."""
        if isinstance(self._kept, _Kept):
            return _opened(self._kept).rows(name, first, end)
        return self._kept[name][first:end]

    def array(self, name: str) -> np.ndarray:
        """One of the scan's arrays, whole."""
        return _opened(self._kept).rows(name, 0, None) if isinstance(self._kept, _Kept) else self._kept[name]


@dataclasses.dataclass(frozen=True)
class _Kept:
    """An index file, and which one of that path: another that replaces it is not taken for it."""

    path: str
    inode: int
    changed_ns: int

    @classmethod
    def at(cls, path: str) -> _Kept:
        status = os.stat(path)
        return cls(path, status.st_ino, status.st_mtime_ns)


class _File:
    """An index file that is read in parts.

    Raises:
        OSError, ValueError, KeyError: it is none.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._file)
        self._begin = 8 + int.from_bytes(self._read(0, 8), "little")
        size = os.fstat(self._file).st_size
        if self._begin > size:
            raise ValueError(f"{path} must be an index file, got something else")
        header = json.loads(self._read(8, self._begin - 8))
        self.metadata: dict[str, str] = header.pop("__metadata__")
        if self._begin + max(x["data_offsets"][1] for x in header.values()) != size:
            raise ValueError(f"{path} must be a whole index file, got a part")
        self._arrays = {
            # dtype, rows, shape of a row, bytes of a row, place of the first
            name: (_DTYPES[x["dtype"]], x["shape"][0], x["shape"][1:], _row_bytes(x), x["data_offsets"][0])
            for name, x in header.items()
        }

    def rows(self, name: str, first: int, end: int | None) -> np.ndarray:
        dtype, count, inner, size, offset = self._arrays[name]
        stop = count if end is None else min(end, count)
        content = self._read(self._begin + offset + first * size, max(stop - first, 0) * size)
        found: np.ndarray = np.frombuffer(content, dtype)
        return found.reshape(-1, *inner)

    def _read(self, offset: int, size: int) -> bytes:
        content = os.pread(self._file, size, offset)
        if len(content) < size:
            raise OSError(f"{self._path} ends too early: remove it, and the next start makes it anew")
        return content


def _row_bytes(array: dict[str, Any]) -> int:
    return _DTYPES[array["dtype"]].itemsize * math.prod(array["shape"][1:])


@functools.lru_cache(maxsize=_OPEN)
def _opened(kept: _Kept) -> _File:
    return _File(kept.path)


def indices(
    shards: Sequence[str], scan: Callable[[str], Scan], *, folder: str | None = None, say: Say | None = None
) -> list[ShardIndex]:
    """The index of each shard; those that are missing or older than their shard are made.

    Args:
        scan: finds what a shard holds.
        folder: of the index files; None: each lies beside its shard.
        say: is told how many must be made, and if they cannot be kept.

    Raises:
        OSError, ValueError: a shard cannot be read at all.
    """
    found = [_read(shard, folder) for shard in shards]
    missing = [place for place, index in enumerate(found) if index is None]
    if missing and say is not None:
        say(f"{len(missing)} of {len(shards)} shards have no index: scanning them (`simvlm data index`: in parallel)")
    refused: OSError | None = None
    for place in missing:
        found[place], error = make(shards[place], scan, folder=folder)
        refused = refused or error
    if refused is not None and say is not None:
        say(f"index files cannot be written ({refused}): they stay in memory; data.index names another folder for them")
    return [index for index in found if index is not None]


def make(shard: str, scan: Callable[[str], Scan], *, folder: str | None = None) -> tuple[ShardIndex, OSError | None]:
    """Scans a shard and keeps what it found: in the file, or, if that cannot be written, in memory, with the reason.

    Raises:
        OSError, ValueError: the shard cannot be read at all.
    """
    stamp = _stamp(shard)  # from before the scan: a shard that is written meanwhile is scanned again
    found = scan(shard)
    path = place(shard, folder)
    header = {"version": _VERSION, "shard": stamp, "count": str(found.count), "cut": str(int(found.cut))}
    # Renamed when whole: several processes, of several machines, may index one shard at once.
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(save({name: np.ascontiguousarray(x) for name, x in found.arrays.items()}, header))
        aside.replace(path)
    except OSError as error:
        if aside.exists():
            aside.unlink()
        return ShardIndex(found.count, found.cut, found.arrays), error
    return ShardIndex(found.count, found.cut, _Kept.at(str(path))), None


def place(shard: str, folder: str | None) -> Path:
    """The path of a shard's index file. Shards of one name and other folders have files of their own."""
    if folder is None:
        return Path(shard + ".idx")
    origin = hashlib.blake2b(os.path.dirname(os.path.abspath(shard)).encode(), digest_size=4).hexdigest()
    return Path(folder) / f"{os.path.basename(shard)}.{origin}.idx"


def _stamp(shard: str) -> str:
    status = os.stat(shard)
    return f"{status.st_size} bytes, changed at {status.st_mtime_ns} ns"


def _read(shard: str, folder: str | None) -> ShardIndex | None:
    stamp, path = _stamp(shard), str(place(shard, folder))
    try:
        header = _File(path).metadata
        if (header["version"], header["shard"]) != (_VERSION, stamp):
            return None
        return ShardIndex(int(header["count"]), header["cut"] == "1", _Kept.at(path))
    except (OSError, KeyError, ValueError, AttributeError):
        return None  # none yet, of an older version, or half written
