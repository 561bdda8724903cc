"""New lengths, prefixes, images and batch sizes compile nothing anew."""

from __future__ import annotations

from uninterpreted import python

PROGRAM = """
import functools, numpy as np
from benchmarks import gpu_compile

def kernels(lens, padded):
    call = functools.partial(gpu_compile.attention, lens, dtype="bfloat16", head_dim=64, table=True, padded=padded)
    return set(gpu_compile.recorded("sm_90", call))

rng = np.random.default_rng(0)
one_bucket = [[200, *rng.integers(1, 256, rng.integers(0, 40)).tolist()] for _ in range(12)]
several = [[200, *rng.integers(1, longest, 3).tolist()] for longest in (30, 90, 300, 480)]
for padded in (False, True):
    first = kernels([230, 60], padded)
    assert len(first) >= 6, first
    for lens in one_bucket + several:
        found = kernels(lens, padded)
        assert found == first, (padded, lens, found ^ first)
print("same")
"""


def test_batches_of_every_kind_launch_the_same_kernels():
    assert python("-c", PROGRAM).strip() == "same"
