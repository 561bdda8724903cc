"""`PrefixLayout`: what it holds, what it refuses, and how torch and jax carry it."""

from __future__ import annotations

import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.utils import _pytree

from simvlm.kernels import PrefixLayout
from simvlm.kernels.attention.layout import BOUNDS, bucket


def test_buckets_are_powers_of_two_and_one_and_a_half_times_those():
    assert [bucket(n) for n in (0, 1, 2, 3, 4, 5, 7, 9, 13, 17, 25, 33, 49, 452, 900, 1024)] == (
        [1, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 512, 1024, 1024]
    )


def test_padded_rows_start_at_multiples_of_the_length():
    layout = PrefixLayout.padded(3, 10, 12, q_lens=[4, 0, 10], k_lens=[5, 12, 0])
    assert layout.q_starts.tolist() == [0, 10, 20]
    assert layout.k_starts.tolist() == [0, 12, 24]
    assert layout.prefix_lens.tolist() == [5, 12, 0], "None is bidirectional"
    assert (layout.max_q_len, layout.max_k_len) == (12, 12)


def test_packed_sequences_lie_end_to_end():
    layout = PrefixLayout.packed([3, 0, 5], prefix_lens=0, image_grid=(1, 2), has_image=[True, False, True])
    assert layout.q_starts.tolist() == layout.k_starts.tolist() == [0, 3, 3]
    assert layout.image_lens.tolist() == [2, 0, 2]
    assert (layout.q_rows, layout.k_rows) == (8, 8)
    assert layout.bounds.dtype == np.int32
    assert layout.bounds.shape == (len(BOUNDS), 3)


@pytest.mark.parametrize(
    "lengths",
    [[3, 1, 4], (3, 1, 4), np.array([3, 1, 4], np.int64), torch.tensor([3, 1, 4]), jnp.array([3, 1, 4])],
    ids=["list", "tuple", "numpy", "torch", "jax"],
)
def test_lengths_of_every_kind(lengths):
    assert PrefixLayout.packed(lengths, prefix_lens=2).bounds.tolist() == (
        PrefixLayout.packed([3, 1, 4], prefix_lens=[2, 2, 2]).bounds.tolist()
    )


def test_the_mask_is_the_contracts_words():
    layout = PrefixLayout.padded(2, 4, 6, q_lens=[4, 2], k_lens=[6, 3], prefix_lens=[1, 3], q_offsets=[2, 0])
    want = np.zeros((2, 4, 6), bool)
    for b, (q_len, k_len, prefix, offset) in enumerate([(4, 6, 1, 2), (2, 3, 3, 0)]):
        for i in range(q_len):
            for j in range(k_len):
                want[b, i, j] = j < prefix or j <= offset + i
    assert np.array_equal(layout.as_mask(), want)


@pytest.mark.parametrize("packed", [False, True])
def test_the_flex_block_mask_is_the_same_mask(packed):
    lens, prefixes = [5, 3, 6], [2, 0, 6]
    if packed:
        layout = PrefixLayout.packed(lens, prefix_lens=prefixes)
        dense = np.zeros((1, 16, 16), bool)
        for start, length, mask in zip(layout.q_starts, lens, layout.as_mask(), strict=True):
            dense[0, start : start + length, start : start + length] = mask[:length, :length]
    else:
        layout = PrefixLayout.padded(3, 8, q_lens=lens, prefix_lens=prefixes)
        dense = layout.as_mask()
    block_mask = layout.as_flex_block_mask(16, 16)
    rows = torch.arange(dense.shape[1])[:, None]
    for b in range(dense.shape[0]):
        got = block_mask.mask_mod(torch.tensor(b), torch.tensor(0), rows, torch.arange(dense.shape[2])[None, :])
        assert np.array_equal(got.numpy(), dense[b])


def test_an_unpickled_layout_is_a_pytree_in_a_fresh_process():
    layout = PrefixLayout.packed([3, 5], prefix_lens=0)
    code = f"import jax, pickle; print(len(jax.tree_util.tree_leaves(pickle.loads({pickle.dumps(layout)!r}))[0]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == f"{len(BOUNDS)}\n", done.stderr


def test_bidirectional_may_be_written_out():
    written = PrefixLayout.packed([2, 1], [5, 7], prefix_lens=[5, 7])
    assert np.array_equal(written.bounds, PrefixLayout.packed([2, 1], [5, 7]).bounds)


def test_pickle_and_pytrees():
    layout = PrefixLayout.packed([3, 5], prefix_lens=0, image_grid=(1, 3))
    assert np.array_equal(pickle.loads(pickle.dumps(layout)).bounds, layout.bounds)
    for flatten, unflatten in (
        (jax.tree_util.tree_flatten, lambda leaves, spec: jax.tree_util.tree_unflatten(spec, leaves)),
        (_pytree.tree_flatten, _pytree.tree_unflatten),
    ):
        leaves, spec = flatten(layout)
        back = unflatten(leaves, spec)
        assert len(leaves) == 1
        assert (back.image_grid, back.max_q_len, back.at_origin) == (layout.image_grid, layout.max_q_len, True)
        # The rows in use change with every batch: as a static part they would compile every program anew.
        assert (back.q_rows, back.k_rows) == (0, 0)


def test_traced_lengths_under_jit_compile_once():
    traces = []

    @jax.jit
    def build(lens):
        traces.append(lens)
        return PrefixLayout.packed(lens, prefix_lens=lens // 2, max_q_len=8, max_k_len=8)

    assert build(jnp.array([3, 5])).prefix_lens.tolist() == [1, 2]
    assert build(jnp.array([8, 1])).q_starts.tolist() == [0, 8]
    assert len(traces) == 1


def test_to_keeps_everything_but_the_place():
    layout = PrefixLayout.packed([3, 5], image_grid=(1, 3))
    moved = layout.to("cpu")
    assert isinstance(moved.bounds, torch.Tensor)
    assert moved.image_grid == layout.image_grid
    assert np.array_equal(moved.numpy().bounds, layout.bounds)


REFUSED = {
    "length above T": (
        lambda: PrefixLayout.padded(2, 4, q_lens=[1, 5]),
        ValueError,
        r"q_lens.*0 … 4, got 5 for seq.* 1",
    ),
    "negative length": (lambda: PrefixLayout.packed([3, -1]), ValueError, r"q_lens must lie in 0 … \d+, got -1"),
    "float length": (lambda: PrefixLayout.packed([1.0]), TypeError, "q_lens must be integers, got float64"),
    "wrong count": (
        lambda: PrefixLayout.padded(2, 4, q_lens=[1, 2, 3]),
        ValueError,
        r"q_lens.*shape \(2,\), got \(3,\)",
    ),
    "length of rank 2": (lambda: PrefixLayout.packed([[1, 2]]), ValueError, r"q_lens.*rank 1, got shape \(1, 2\)"),
    "prefix above S": (
        lambda: PrefixLayout.padded(1, 4, prefix_lens=5),
        ValueError,
        "prefix_lens must lie in 0 … 4, got 5",
    ),
    "causal, unequal": (
        lambda: PrefixLayout.packed([1, 1], [7, 9], prefix_lens=0),
        ValueError,
        "q_offsets must be given.*cache length",
    ),
    "causal, T and S differ": (
        lambda: PrefixLayout.padded(2, 1, 9, prefix_lens=0),
        ValueError,
        "q_offsets must be given",
    ),
    "cross with a prefix": (
        lambda: PrefixLayout.packed([2], [3], prefix_lens=0, cross=True),
        ValueError,
        "prefix_lens, q_offsets and image_grid must be None when cross=True",
    ),
    "cross without keys": (
        lambda: PrefixLayout.packed([2], cross=True),
        ValueError,
        "k_lens must be given when cross=True",
    ),
    "image without grid": (lambda: PrefixLayout.packed([2], has_image=True), ValueError, "image_grid must be given"),
    "has_image of integers": (
        lambda: PrefixLayout.packed([2], has_image=[1], image_grid=(1, 1)),
        TypeError,
        "has_image must be bool, got int64",
    ),
    "grid of one side": (
        lambda: PrefixLayout.packed([2], image_grid=(3,)),
        ValueError,
        r"image_grid must be \(Gh, Gw\)",
    ),
    "grid beyond int32": (
        lambda: PrefixLayout.packed([2], image_grid=(2**16, 2**16)),
        ValueError,
        "fewer than 2.*patches",
    ),
    "maximum negative": (lambda: PrefixLayout.packed([2], max_q_len=-1), ValueError, "max_q_len must be an integer of"),
    "grid with zero": (
        lambda: PrefixLayout.packed([2], image_grid=(0, 3)),
        ValueError,
        r"image_grid must be \(Gh, Gw\)",
    ),
    "too many rows": (lambda: PrefixLayout.padded(2**20, 2**12), ValueError, r"fewer than 2\*\*31 rows"),
    "maximum too small": (lambda: PrefixLayout.packed([9], max_q_len=8), ValueError, "q_lens must lie in 0 … 8, got 9"),
    "batch negative": (
        lambda: PrefixLayout.padded(-1, 4),
        ValueError,
        "batch must be an integer of at least 0, got -1",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    call, error, message = REFUSED[name]
    with pytest.raises(error, match=f"PrefixLayout: .*{message}" if not message.startswith("q_lens") else message):
        call()


def test_traced_lengths_need_the_maxima():
    with pytest.raises(ValueError, match="max_q_len and max_k_len must be given for traced lengths"):
        jax.jit(lambda lens: PrefixLayout.packed(lens).bounds)(jnp.array([1, 2]))
