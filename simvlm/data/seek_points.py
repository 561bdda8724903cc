"""Random access into gzip files: places from which decompression can start, found once by `indexed_gzip`.

A seek point is a place between two blocks of the compressed data with the 32 KiB of text before it, which the
decompressor must know. One every 512 KiB of text, the 32 KiB compressed, take about 7 % of the shard's own size; a
chunk, from one point to the next, is decompressed in 2 to 3 ms (docs/data.md). `indexed_gzip` imports an index whole
before it reads; here it is given the one point that a chunk needs, in the same format.
"""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from simvlm.data.index import ShardIndex

SPACING = 1 << 19
"""bytes of text between two points"""
_WINDOW = 1 << 15
_BLOCK = 1 << 16
"""of compressed data: what is lost before a damaged place"""
_MAGIC = b"GZIDX"
# The format of IndexedGzipFile.export_index, version 1: identifier, version, flags, compressed and uncompressed size,
# spacing, window size, number of points; then compressed and uncompressed offset, bits and "has a window" of each
# point; then the windows.
_HEADER, _POINT = struct.Struct("<5sBBQQIII"), struct.Struct("<QQBB")


def unzipped(file: BinaryIO) -> Iterator[bytes]:
    """The content in blocks, all members, up to the end or the place where it breaks off: `gzip` stops a block before.

    Raises:
        EOFError: the file ends too early, after the last block that was given.
        zlib.error: it is damaged there.
    """
    member = zlib.decompressobj(wbits=31)
    begun = False
    while block := file.read(_BLOCK):
        while block:
            if not begun and not (block := block.lstrip(b"\0")):
                break  # padding after a member
            begun = True
            yield member.decompress(block)
            block = member.unused_data
            if member.eof:
                member, begun = zlib.decompressobj(wbits=31), False
    if begun:
        raise EOFError("gzip: the file ends inside a member")


def find(path: str, length: int) -> dict[str, np.ndarray]:
    """The seek points of a file.

    Args:
        length: of the text that is used; points past it are left out.

    Returns:
        points: int64[points, 3], compressed offset, offset in the text, bits.
        windows: uint8, the windows, each compressed with zlib; window_ends: int64[points + 1] their places in it.
    """
    content = _exported(path) if length else b""
    offset, points, ends, windows = _HEADER.size, [], [0], bytearray()
    count = _HEADER.unpack_from(content)[-1] if content else 0
    found = [_POINT.unpack_from(content, offset + i * _POINT.size) for i in range(count)]
    offset += count * _POINT.size
    for compressed, start, bits, has_window in found:
        window = content[offset : offset + _WINDOW] if has_window else b""
        offset += len(window)
        if start < length:
            points.append((compressed, start, bits))
            windows += zlib.compress(window) if has_window else b""
            ends.append(len(windows))
    return {
        "points": np.array(points, np.int64).reshape(-1, 3),
        "windows": np.frombuffer(windows, np.uint8),
        "window_ends": np.array(ends, np.int64),
    }


def _exported(path: str) -> bytes:
    gzip_file = library()
    content = io.BytesIO()
    # `unzipped` has checked what can be used; of a file that is cut or damaged the points up to there are wanted.
    with gzip_file.IndexedGzipFile(path, spacing=SPACING, skip_crc_check=True) as file:
        with contextlib.suppress(gzip_file.ZranError):
            file.build_full_index()
        file.export_index(fileobj=content)
    found = content.getvalue()
    if _HEADER.unpack_from(found)[:2] != (_MAGIC, 1):
        raise ValueError(f"indexed_gzip must write version 1 of its format, got {found[:6]!r}; 1.10 does")
    return found


def chunk(path: str, index: ShardIndex, number: int, length: int) -> tuple[int, bytes]:
    """(offset in the text, content) of what lies between seek point `number` and the next, or `length`.

    Args:
        index: holds what `find` returned.

    Raises:
        OSError: the file is gone, or is not the one that was indexed.
    """
    gzip_file = library()
    points = index.array("points")[number : number + 2].tolist()
    compressed, start, bits = points[0]
    end = min(points[1][1], length) if len(points) > 1 else length
    first, last = index.rows("window_ends", number, number + 2).tolist()
    window = zlib.decompress(index.rows("windows", first, last).tobytes()) if last > first else b""
    try:
        with open(path, "rb") as raw:
            size = raw.seek(0, io.SEEK_END)
            head = _HEADER.pack(_MAGIC, 1, 0, size, 0, SPACING, _WINDOW, 2)
            # Its reader expects a first point without a window, as at the beginning of every file.
            own = _POINT.pack(0, 0, 0, 0) + _POINT.pack(compressed, start, bits, int(bool(window))) + window
            # A buffer of another size would be filled from what lies behind the chunk.
            options = {"spacing": SPACING, "skip_crc_check": True, "buffer_size": end - start}
            with gzip_file.IndexedGzipFile(raw, **options) as file:
                file.import_index(fileobj=io.BytesIO(head + own))
                file.seek(start)
                content = file.read(end - start)
    except gzip_file.ZranError as error:
        raise OSError(f"{path} cannot be read from byte {compressed} on: {error}") from error
    if len(content) < end - start:
        raise OSError(f"{path} cannot be read from byte {compressed} on: it has changed since it was indexed")
    return start, content


def library() -> Any:
    """indexed_gzip.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import indexed_gzip
    except ImportError as error:
        raise ValueError(
            "gzipped documents need indexed_gzip, not installed here (pip install 'simvlm[data]')"
        ) from error
    return indexed_gzip
