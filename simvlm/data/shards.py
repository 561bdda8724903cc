"""Random access to image-text pairs in WebDataset tar shards, as img2dataset and `simvlm data world` write them.

A shard is scanned once; the places of its members are kept in its index file (index.py).
"""

from __future__ import annotations

import dataclasses
import glob
import io
import json
import os
import re
import tarfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from simvlm.data.index import Say, Scan, ShardIndex, indices
from simvlm.data.transforms import upright

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
_BLOCK = 512


class BrokenSample(Exception):
    """A sample that cannot be used; a loader counts it and goes on.

    Attributes:
        kind: what is wrong: "no image", "broken image", "no text", "empty text", "broken json".
        shard, key: where.
    """

    def __init__(self, kind: str, shard: str, key: str) -> None:
        super().__init__(kind, shard, key)
        self.kind, self.shard, self.key = kind, shard, key

    def __str__(self) -> str:
        return f"{self.kind}: sample {self.key} of {self.shard}"


@dataclasses.dataclass(frozen=True)
class Sample:
    """An image-text pair, the image still compressed."""

    key: str
    shard: str
    image_bytes: bytes
    text: str


class IndexedShards:
    """Some shards, one after the other, whose samples are found by their indices; `scan` makes that of one shard."""

    def __init__(
        self,
        pattern: str | os.PathLike[str] | Sequence[str],
        scan: Callable[[str], Scan],
        index: str | None,
        say: Say | None,
    ) -> None:
        self.shards = expand(pattern)
        self._indices = indices(self.shards, scan, folder=index, say=say)
        self._ends = np.cumsum([found.count for found in self._indices])
        self.cut = [shard for shard, found in zip(self.shards, self._indices, strict=True) if found.cut]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _locate(self, i: int) -> tuple[int, int]:
        """The shard of sample i, and its row there."""
        if not 0 <= i < len(self):
            raise IndexError(f"{type(self).__name__}: index must be in 0 … {len(self) - 1}, got {i}")
        which = int(np.searchsorted(self._ends, i, side="right"))
        return which, i - (int(self._ends[which]) - self._indices[which].count)


class ImageTextShards(IndexedShards):
    """The pairs of some tar shards, in the order of the shards.

    Args:
        pattern: a path, a glob, braces as in `{00000..00012}.tar` or `{a,b}.tar`, or several of these.
        index: the folder of the index files; None: they lie beside their shards.
        say: is told of indices that must be made first, or cannot be kept.

    Attributes:
        shards: the paths.
        cut: those that end too early; their pairs before the cut are there.
    """

    def __init__(
        self,
        pattern: str | os.PathLike[str] | Sequence[str],
        *,
        index: str | None = None,
        say: Say | None = None,
    ) -> None:
        super().__init__(pattern, scan, index, say)

    def __getitem__(self, i: int) -> Sample:
        """Pair i.

        Raises:
            BrokenSample: it has no image, no text or an empty one.
        """
        shard, index, row = self._found(i)
        image, text, meta, name = index.rows("places", row, row + 1)[0].tolist()
        key = _key(index, name)
        if image[1] <= 0:
            raise BrokenSample("no image", shard, key)
        with open(shard, "rb") as file:
            return Sample(key, shard, _read(file, image), _text(file, text, meta, shard, key))

    def where(self, i: int) -> tuple[str, str]:
        """(shard, key) of pair i."""
        shard, index, row = self._found(i)
        return shard, _key(index, index.rows("places", row, row + 1)[0, 3].tolist())

    def text(self, i: int) -> str:
        """The text of pair i alone."""
        shard, index, row = self._found(i)
        _, text, meta, name = index.rows("places", row, row + 1)[0].tolist()
        with open(shard, "rb") as file:
            return _text(file, text, meta, shard, _key(index, name))

    def metadata(self, i: int) -> dict[str, Any]:
        """The json of pair i; {} where it has none."""
        shard, index, row = self._found(i)
        _, _, meta, name = index.rows("places", row, row + 1)[0].tolist()
        with open(shard, "rb") as file:
            return _json(file, meta, shard, _key(index, name)) if meta[1] > 0 else {}

    def _found(self, i: int) -> tuple[str, ShardIndex, int]:
        which, row = self._locate(i)
        return self.shards[which], self._indices[which], row


def expand(pattern: str | os.PathLike[str] | Sequence[str]) -> list[str]:
    """The files of a pattern: braces first, then globs; each glob's files sorted.

    Raises:
        FileNotFoundError: some part of it names no file.
    """
    patterns = [os.fspath(pattern)] if isinstance(pattern, str | os.PathLike) else list(pattern)
    paths: list[str] = []
    for one in (expanded for each in patterns for expanded in _braces(each)):
        # A file whose name holds a bracket is no glob.
        # What lies beside the shards is none.
        found = [one] if os.path.exists(one) else sorted(x for x in glob.glob(one) if not x.endswith(".idx"))
        if not found:
            raise FileNotFoundError(f"shards: no file matches {one}")
        paths += found
    if not paths:
        raise FileNotFoundError("shards: pattern must name at least one file, got none")
    return paths


def decode(image_bytes: bytes, *, shard: str = "", key: str = "", least: int | None = None) -> np.ndarray:
    """The picture as uint8[H, W, 3]: upright by its EXIF tag, transparency over white.

    Args:
        shard, key: named by the exception.
        least: if given, a JPEG may be decoded at a half, quarter or eighth of its size, both sides at least this long.

    Raises:
        BrokenSample: it is no image, or is cut short.
    """
    return np.asarray(picture(image_bytes, shard=shard, key=key, least=least))


def picture(image_bytes: bytes, *, shard: str = "", key: str = "", least: int | None = None) -> Image.Image:
    """As `decode`, in RGB as Pillow has it."""
    try:
        with Image.open(io.BytesIO(image_bytes)) as image:
            if least is not None:
                image.draft("RGB", (least, least))
            image.load()
            return upright(image)
    except Exception as error:  # Pillow's plug-ins raise whatever they stumble over.
        raise BrokenSample("broken image", shard, key) from error


def _read(file: io.BufferedReader, place: Sequence[int]) -> bytes:
    file.seek(place[0])
    return file.read(place[1])


def _text(file: io.BufferedReader, text: Sequence[int], meta: Sequence[int], shard: str, key: str) -> str:
    if text[1] >= 0:
        caption: Any = _read(file, text).decode(errors="replace")
    elif meta[1] >= 0:
        caption = _json(file, meta, shard, key).get("caption")
    else:
        raise BrokenSample("no text", shard, key)
    if not isinstance(caption, str) or not caption.strip():
        raise BrokenSample("empty text", shard, key)
    return caption.strip()


def _json(file: io.BufferedReader, place: Sequence[int], shard: str, key: str) -> dict[str, Any]:
    try:
        found = json.loads(_read(file, place))
    except ValueError as error:
        raise BrokenSample("broken json", shard, key) from error
    if not isinstance(found, dict):
        raise BrokenSample("broken json", shard, key)
    return found


def _braces(pattern: str) -> Iterator[str]:
    """`{00000..00012}` and `{a,b}` written out; a number keeps its width."""
    found = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if found is None:
        yield pattern
        return
    first, last, names = found.groups()
    if names is None:
        if int(last) < int(first):
            raise ValueError(f"shards: a range must not run backwards, got {found[0]}")
        parts = [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]
    else:
        parts = names.split(",")
    for part in parts:
        yield from _braces(pattern[: found.start()] + part + pattern[found.end() :])


def scan(shard: str) -> Scan:
    """Of each sample: (offset, size) of image, txt and json in the shard, size -1 where it has none, and of its key in
    `keys`. A sample is a run of members with one name before the dot.
    """
    size, end, last = os.path.getsize(shard), 0, None
    keys, places = bytearray(), array("q")
    with open(shard, "rb") as file:
        for member in _members(file):
            end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
            if not member.isfile() or member.offset_data + member.size > size:
                continue
            folder, _, name = member.name.rpartition("/")
            stem, _, suffix = name.partition(".")
            key = f"{folder}/{stem}" if folder else stem
            suffix = suffix.lower()
            which = 0 if suffix in IMAGE_SUFFIXES else {"txt": 1, "json": 2}.get(suffix)
            if which is None:
                continue
            if last != key:
                last, encoded = key, key.encode(errors="surrogateescape")
                places.extend([0, -1] * 3 + [len(keys), len(encoded)])
                keys += encoded
            row = len(places) - 8 + 2 * which
            places[row], places[row + 1] = member.offset_data, member.size
        # A whole archive ends with two blocks of zeros.
        file.seek(end)
        cut = file.read(2 * _BLOCK) != bytes(2 * _BLOCK)
    if cut and places and (places[-7] < 0 or max(places[-5], places[-3]) < 0):
        # What the cut took from its last sample is the shard's fault, not the sample's.
        del places[-8:]
    rows = np.array(places, np.int64).reshape(-1, 4, 2)
    return Scan(count=len(rows), cut=cut, arrays={"places": rows, "keys": np.frombuffer(keys, np.uint8)})


def _key(index: ShardIndex, name: Sequence[int]) -> str:
    start, size = name
    return index.rows("keys", start, start + size).tobytes().decode(errors="surrogateescape")


def _members(file: io.BufferedReader) -> Iterator[tarfile.TarInfo]:
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            yield from archive
    except (tarfile.ReadError, EOFError):
        return  # the end came too early, which the missing end mark shows
