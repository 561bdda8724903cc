"""What the data benchmark reads: photographs in a tar shard, and the index of a million pairs."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from simvlm.data import index

SHARDS, PAIRS_A_SHARD = 100, 10_000


def write_million(folder: Path) -> None:
    """Sparse files `00000.tar` … with the indices of a million pairs, as img2dataset numbers them."""
    places = np.zeros((PAIRS_A_SHARD, 3, 2), np.int64)
    places[:, 0] = [[1024 * row, 500] for row in range(PAIRS_A_SHARD)]
    for shard in range(SHARDS):
        path = folder / f"{shard:05d}.tar"
        with open(path, "wb") as file:
            os.truncate(file.fileno(), 10**9)
        keys = "".join(f"{shard:05d}{row:04d}" for row in range(PAIRS_A_SHARD)).encode()
        arrays: dict[str, np.ndarray] = {
            "places": places,
            "key_ends": 9 * np.arange(PAIRS_A_SHARD + 1, dtype=np.int64),
            "keys": np.frombuffer(keys, np.uint8),
        }
        found = index.Scan(count=PAIRS_A_SHARD, cut=False, arrays=arrays)
        index.make(str(path), lambda _, found=found: found)  # type: ignore[misc]
