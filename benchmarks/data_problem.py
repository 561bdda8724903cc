"""What the data benchmark reads: photographs in a tar shard, and the index of a million pairs."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from simvlm.data import index

SHARDS, PAIRS_A_SHARD = 100, 10_000
_WORDS = ("a", "the", "red", "small", "old", "boat", "house", "on", "near", "tree", "with", "river", "man", "dog")


def write_photographs(path: Path, count: int, seed: int = 0) -> None:
    """A shard of JPEGs of 400 to 500 pixels a side at quality 90, each with a caption of 4 to 30 words.

    Shapes on a gradient under noise: some 1.3 bits a pixel, as photographs have.
    """
    rng = np.random.default_rng(seed)
    with tarfile.open(path, "w") as archive:
        for number in range(count):
            caption = " ".join(rng.choice(_WORDS, rng.integers(4, 31)))
            for suffix, content in (("jpg", _photograph(rng)), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def _photograph(rng: np.random.Generator) -> bytes:
    width, height = (int(side) for side in rng.integers(400, 501, 2))
    corners = rng.integers(0, 256, (2, 2, 3), dtype=np.uint8)
    image = Image.fromarray(corners).resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(40):
        x, y, wide, tall = rng.integers((0, 0, 5, 5), (width, height, 120, 120)).tolist()
        shape = draw.ellipse if rng.integers(2) else draw.rectangle
        shape((x, y, x + wide, y + tall), fill=tuple(rng.integers(0, 256, 3).tolist()))
    noise = rng.normal(0, 5, (height, width, 1))
    pixels = (np.asarray(image) + noise).clip(0, 255).astype(np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "jpeg", quality=90)
    return content.getvalue()


def write_million(folder: Path) -> None:
    """Sparse files `00000.tar` … with the indices of a million pairs, as img2dataset numbers them."""
    places = np.zeros((PAIRS_A_SHARD, 4, 2), np.int64)
    places[:, 0] = [[1024 * row, 500] for row in range(PAIRS_A_SHARD)]
    places[:, 3] = [[9 * row, 9] for row in range(PAIRS_A_SHARD)]
    for shard in range(SHARDS):
        path = folder / f"{shard:05d}.tar"
        with open(path, "wb") as file:
            os.truncate(file.fileno(), 10**9)
        keys = "".join(f"{shard:05d}{row:04d}" for row in range(PAIRS_A_SHARD)).encode()
        arrays: dict[str, np.ndarray] = {"places": places, "keys": np.frombuffer(keys, np.uint8)}
        found = index.Scan(count=PAIRS_A_SHARD, cut=False, arrays=arrays)
        index.make(str(path), lambda _, found=found: found)  # type: ignore[misc]
