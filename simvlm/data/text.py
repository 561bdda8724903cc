"""Random access to text documents: jsonl files, plain or gzipped, one {"text": …} a line, as C4 has them."""

from __future__ import annotations

import collections
import dataclasses
import io
import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from simvlm.data.shards import BrokenSample, expand

_OPEN_SHARDS = 4
"""gzipped shards held in memory, decompressed: gzip cannot start reading in the middle."""


@dataclasses.dataclass(frozen=True)
class Document:
    """A text; `key` is its number in the shard, counted from 0."""

    key: str
    shard: str
    text: str
    lang: str | None


class TextShards:
    """The documents of some jsonl or jsonl.gz shards, in the order of the shards.

    Reading in an order that jumps between many gzipped shards decompresses them over and over; plain jsonl is the
    format for that.

    Args:
        pattern: as for `ImageTextShards`.

    Attributes:
        shards: the paths.
        cut: gzipped shards that end too early; their whole lines before the cut are there.
    """

    def __init__(self, pattern: str | os.PathLike[str] | Sequence[str]) -> None:
        self.shards = expand(pattern)
        self.cut: list[str] = []
        self._open: collections.OrderedDict[str, bytes] = collections.OrderedDict()
        self._lines = [self._index(shard) for shard in self.shards]
        self._ends = np.cumsum([len(lines) for lines in self._lines])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, i: int) -> Document:
        """Document i.

        Raises:
            BrokenSample: its line is no JSON object, or has no text.
        """
        which, row = self._locate(i)
        shard, key = self.shards[which], str(row)
        try:
            found: Any = json.loads(self._read(shard, *self._lines[which][row].tolist()))
            text, lang = found["text"], found.get("lang")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BrokenSample("broken json", shard, key) from error
        if not isinstance(text, str) or not text.strip():
            raise BrokenSample("empty text", shard, key)
        return Document(key, shard, text, lang)

    def where(self, i: int) -> tuple[str, str]:
        """(shard, key) of document i."""
        which, row = self._locate(i)
        return self.shards[which], str(row)

    def _locate(self, i: int) -> tuple[int, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"TextShards: index must be in 0 … {len(self) - 1}, got {i}")
        which = int(np.searchsorted(self._ends, i, side="right"))
        return which, i - (int(self._ends[which]) - len(self._lines[which]))

    def __getstate__(self) -> dict[str, Any]:
        # A worker opens its own shards.
        return self.__dict__ | {"_open": collections.OrderedDict()}

    def _read(self, shard: str, offset: int, size: int) -> bytes:
        if shard.endswith(".gz"):
            return self._decompressed(shard)[offset : offset + size]
        with open(shard, "rb") as file:
            file.seek(offset)
            return file.read(size)

    def _decompressed(self, shard: str) -> bytes:
        if shard not in self._open:
            self._open[shard] = _gunzip(shard)[0]
        self._open.move_to_end(shard)
        while len(self._open) > _OPEN_SHARDS:
            self._open.popitem(last=False)
        return self._open[shard]

    def _index(self, shard: str) -> np.ndarray:
        """int64[documents, 2]: offset and size of each line that is not blank."""
        if not shard.endswith(".gz"):
            with open(shard, "rb") as file:
                return _lines(file)
        content, cut = _gunzip(shard)
        if cut:
            self.cut.append(shard)
            content = content[: content.rfind(b"\n") + 1]
        return _lines(io.BytesIO(content))


def _lines(file: io.BufferedIOBase) -> np.ndarray:
    places, offset = [], 0
    for line in file:
        if line.strip():
            places.append((offset, len(line)))
        offset += len(line)
    return np.array(places, np.int64).reshape(-1, 2)


def _gunzip(shard: str) -> tuple[bytes, bool]:
    """The content up to its end or to the cut, and whether it is cut. (`gzip` gives nothing of a cut last block.)"""
    rest = Path(shard).read_bytes()
    parts: list[bytes] = []
    while rest:
        member = zlib.decompressobj(wbits=31)
        try:
            parts.append(member.decompress(rest))
        except zlib.error:
            return b"".join(parts), True
        if not member.eof:
            return b"".join(parts), True
        rest = member.unused_data.lstrip(b"\0")
    return b"".join(parts), False
