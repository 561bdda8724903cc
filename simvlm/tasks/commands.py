"""Commands about the benchmarks: each does its work and returns what to print."""

from __future__ import annotations

import os
import time

from simvlm.tasks.world import write_benchmarks


def data_benchmarks(folder: str, *, seed: int = 0, scale: float = 1.0, image_size: int = 64, workers: int = 0) -> str:
    """`simvlm data benchmarks`: writes the generated world's; `workers=0` is one for each usable core."""
    began = time.perf_counter()
    pictures = write_benchmarks(
        folder,
        seed=seed,
        scale=scale,
        image_size=image_size,
        workers=workers or len(os.sched_getaffinity(0)),
    )
    return f"benchmarks with {pictures} pictures in {folder} after {time.perf_counter() - began:.0f} s"
