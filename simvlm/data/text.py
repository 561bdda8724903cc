"""Random access to text documents: jsonl, plain or gzipped, one {"text": …} a line, as C4 has them, or parquet."""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import os
import zlib
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from simvlm.data import seek_points
from simvlm.data.index import Say, Scan
from simvlm.data.shards import BrokenSample, IndexedShards

_CHUNKS = 8
"""decompressed parts of gzipped shards, half a MiB each, and row groups of parquet shards that are held"""
_BLOCK = 1 << 20


@dataclasses.dataclass(frozen=True)
class Document:
    """A text; `key` is its number in the shard, counted from 0."""

    key: str
    shard: str
    text: str
    lang: str | None


class TextShards(IndexedShards):
    """The documents of some shards, in the order of the shards: .parquet, .gz, and everything else plain jsonl.

    A document of a gzipped shard costs the decompression of some 512 KiB, and one of a parquet shard of its row group;
    those that follow it come without.

    Args:
        pattern, index, say: as for `ImageTextShards`.

    Attributes:
        shards: the paths.
        cut: gzipped shards that end too early or are damaged; their whole lines before that are there.

    Raises:
        ValueError: a parquet shard has no footer, which it is written with last, or no column "text".
    """

    def __init__(
        self,
        pattern: str | os.PathLike[str] | Sequence[str],
        *,
        index: str | None = None,
        say: Say | None = None,
    ) -> None:
        super().__init__(pattern, scan, index, say)
        self._held: collections.OrderedDict[tuple[int, int], Any] = collections.OrderedDict()

    def __getitem__(self, i: int) -> Document:
        """Document i.

        Raises:
            BrokenSample: its line is no JSON object, or has no text.
            OSError: the shard cannot be read any more.
        """
        which, row = self._locate(i)
        shard, key = self.shards[which], str(row)
        if shard.endswith(".parquet"):
            text, lang = self._row(which, row)
        else:
            try:
                found: Any = json.loads(self._line(which, row))
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

    def __getstate__(self) -> dict[str, Any]:
        # A worker holds parts of its own.
        return self.__dict__ | {"_held": collections.OrderedDict()}

    def _line(self, which: int, row: int) -> bytes:
        shard, index = self.shards[which], self._indices[which]
        start, end = index.rows("starts", row, row + 2).tolist()
        if shard.endswith(".gz"):
            return self._unzipped(which, start, end)
        with open(shard, "rb") as file:
            file.seek(start)
            return file.read(end - start)

    def _unzipped(self, which: int, start: int, end: int) -> bytes:
        """Bytes start … end-1 of a gzipped shard's content."""
        parts = []
        number = int(np.searchsorted(self._indices[which].array("points")[:, 1], start, side="right")) - 1
        while start < end:
            first, content = self._holding(which, number)
            parts.append(content[start - first : end - first])
            start, number = first + len(content), number + 1
        return b"".join(parts)

    def _holding(self, which: int, number: int) -> Any:
        """Chunk or row group `number` of a shard."""
        place = (which, number)
        if place not in self._held:
            shard, index = self.shards[which], self._indices[which]
            if shard.endswith(".parquet"):
                self._held[place] = _row_group(shard, number)
            else:
                length = int(index.rows("starts", index.count, index.count + 1)[0])
                self._held[place] = seek_points.chunk(shard, index, number, length)
        self._held.move_to_end(place)
        while len(self._held) > _CHUNKS:
            self._held.popitem(last=False)
        return self._held[place]

    def _row(self, which: int, row: int) -> tuple[Any, Any]:
        starts = self._indices[which].array("starts")
        group = int(np.searchsorted(starts, row, side="right")) - 1
        columns = self._holding(which, group)
        text, lang = (None if column is None else column[row - int(starts[group])].as_py() for column in columns)
        return text, lang


def scan(shard: str) -> Scan:
    """Of each line that is not blank, where it starts; of each row group, its first row; and the seek points of .gz."""
    if shard.endswith(".parquet"):
        return _scan_parquet(shard)
    with open(shard, "rb") as file:
        if not shard.endswith(".gz"):
            starts, length, _ = _lines(iter(functools.partial(file.read, _BLOCK), b""))
            return Scan(count=len(starts), cut=False, arrays={"starts": _with_end(starts, length)})
        starts, length, cut = _lines(seek_points.unzipped(file))
    arrays = {"starts": _with_end(starts, length), **seek_points.find(shard, length)}
    return Scan(count=len(starts), cut=cut, arrays=arrays)


def _lines(blocks: Iterable[bytes]) -> tuple[array[int], int, bool]:
    """Where each line starts that is not blank; where the last one ends; and whether the blocks broke off, in which
    case only whole lines count."""
    starts, offset, rest = array("q"), 0, b""
    try:
        for block in blocks:
            lines = (rest + block).split(b"\n")
            rest = lines.pop()
            for line in lines:
                if line and not line.isspace():
                    starts.append(offset)
                offset += len(line) + 1
    except (EOFError, zlib.error):
        return starts, offset, True
    if rest and not rest.isspace():
        starts.append(offset)
    return starts, offset + len(rest), False


def _with_end(starts: Sequence[int], end: int) -> np.ndarray:
    return np.array([*starts, end], np.int64)


def _scan_parquet(shard: str) -> Scan:
    metadata, columns = _opened(shard)[1:]
    if "text" not in columns:
        raise ValueError(f"documents: {shard} must have a column text, got {', '.join(columns)}")
    rows = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    return Scan(count=sum(rows), cut=False, arrays={"starts": np.cumsum([0, *rows], dtype=np.int64)})


def _row_group(shard: str, number: int) -> tuple[Any, Any]:
    """Its columns text and, if there is one, lang."""
    file, _, columns = _opened(shard)
    chosen = [name for name in ("text", "lang") if name in columns]
    with file:
        found = file.read_row_group(number, columns=chosen)
    return found.column("text"), found.column("lang") if "lang" in chosen else None


def _opened(shard: str) -> tuple[Any, Any, list[str]]:
    """(file, its metadata, names of its columns)."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError("parquet documents need pyarrow, not installed here (pip install 'simvlm[data]')") from error
    try:
        file = pyarrow.parquet.ParquetFile(shard)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(
            f"documents: {shard} has no footer, so nothing in it can be read (it is cut short, or no parquet file): "
            "get it anew, or leave it out"
        ) from error
    return file, file.metadata, file.schema_arrow.names
