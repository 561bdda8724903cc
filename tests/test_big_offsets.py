"""Elements that lie more than 2^31 elements apart: offsets are 64 bits wide all the way, with the bits of a dense call.

The arrays are views of a mapping of many gibibytes of which only the pages in use exist. Not reached so: lse and the
rows of an output, which are written whole and so would need the memory."""

from __future__ import annotations

import math
import mmap

import ml_dtypes
import numpy as np
import pytest

from simvlm import _cpp
from simvlm.kernels import PrefixLayout, batch_norm_act, embed_sequence, prefix_attention
from simvlm.kernels.attention import cpp_cpu
from simvlm.kernels.cpp_module import address, compiled
from simvlm.kernels.stem import cpp_cpu as stem_cpu

BEYOND = 2**31 + 40
DTYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])


@pytest.fixture(params=["baseline", "avx2", "avx512", "avx512_bf16"], autouse=True)
def level(request):
    compiled()
    if not dict(_cpp.levels())[request.param]:
        pytest.skip(f"this processor does not run {request.param}")
    _cpp.select_level(request.param)
    yield
    _cpp.select_level(None)


def sparse(size: int, dtype: np.dtype) -> np.ndarray:
    """[size], of which only the pages that are touched exist."""
    no_reserve = 0x4000  # Linux's MAP_NORESERVE, which not every Python's mmap names
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    return np.frombuffer(mmap.mmap(-1, size * dtype.itemsize, flags=flags), np.uint8).view(dtype)


def spread(x: np.ndarray, axis: int, backwards: bool = False) -> np.ndarray:
    """x with its last index along `axis` more than 2^31 elements after (or before) the first."""
    steps = x.shape[axis] - 1
    strides = [stride // x.itemsize for stride in np.empty(x.shape, x.dtype).strides]
    strides[axis] = -(-BEYOND // steps) + 1
    room = sparse(strides[axis] * steps + x.size, x.dtype)
    offset = 0
    if backwards:
        offset, strides[axis] = strides[axis] * steps * x.itemsize, -strides[axis]
    far = np.ndarray(x.shape, x.dtype, room, offset, [stride * x.itemsize for stride in strides])
    far[...] = x
    return far


def numbers(*shape: int, dtype: str = "float32", seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return x.astype(np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else dtype)


def assert_same_bits(got, want):
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert a.tobytes() == b.tobytes()


# Many queries, then few: two kernels. The image makes both read the table.
LAYOUTS = {
    "many": PrefixLayout.padded(2, 70, prefix_lens=[40, 9], q_lens=[70, 33], image_grid=(4, 6)),
    "few": PrefixLayout.padded(2, 5, 70, k_lens=[70, 44], q_offsets=[20, 3], prefix_lens=[0, 30], image_grid=(4, 6)),
}
AXES = pytest.mark.parametrize("axis", [0, 1, 2], ids=["sequences", "rows", "heads"])


@DTYPES
@AXES
@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("backwards", [False, True], ids=["forwards", "backwards"])
def test_attention(kind, axis, dtype, backwards):
    layout, table = LAYOUTS[kind], numbers(2, 7, 11)
    q, k, v = (numbers(2, length, 2, 24, dtype=dtype, seed=i) for i, length in enumerate(lengths(layout)))
    want = prefix_attention(q, k, v, layout, rel_bias=table, return_lse=True)
    far = [spread(x, axis, backwards) for x in (q, k, v)]
    assert_same_bits(prefix_attention(*far, layout, rel_bias=table, return_lse=True), want)


def lengths(layout: PrefixLayout) -> tuple[int, int, int]:
    query_len, key_len = layout.padded_shape
    return query_len, key_len, key_len


def backward(layout, q, k, v, out, dout, grads, lse, dlse, table, dtable):
    """Through the door, which takes outputs of any strides; autograd's are dense."""
    compiled().attention_backward(
        *(cpp_cpu._strided(x) for x in (q, k, v, out, dout, *grads)),
        *(address(x) for x in (lse, dlse, table, dtable, np.ascontiguousarray(layout.bounds))),
        *cpp_cpu._statics(q, k, layout, 0.25, 1),
    )


@DTYPES
@AXES
@pytest.mark.parametrize("kind", LAYOUTS)
def test_attention_backward(kind, axis, dtype):
    layout, table = LAYOUTS[kind], numbers(2, 7, 11)
    q_len, k_len, _ = lengths(layout)
    q, k, v, dout = (numbers(2, n, 2, 24, dtype=dtype, seed=i) for i, n in enumerate((q_len, k_len, k_len, q_len)))
    out, lse = prefix_attention(q, k, v, layout, rel_bias=table, scale=0.25, return_lse=True)
    dlse, dtable, far_dtable = numbers(*lse.shape), np.empty_like(table), np.empty_like(table)
    want = [np.empty_like(x) for x in (q, k, v)]
    backward(layout, q, k, v, out, dout, want, lse, dlse, table, dtable)
    grads = [spread(np.full_like(x, np.nan), axis) for x in (q, k, v)]
    far = [spread(x, axis) for x in (q, k, v, out, dout)]
    backward(layout, *far, grads, lse, dlse, table, far_dtable)
    assert_same_bits((*grads, far_dtable), (*want, dtable))


@DTYPES
def test_attention_of_a_packed_row_beyond(dtype):
    """Packed storage of more than 2^31 elements, where the layout's own start is what makes the offset."""
    q, k, v = (numbers(n, 2, 32, dtype=dtype, seed=i) for i, n in enumerate((30, 31, 31)))
    near = PrefixLayout.packed([20, 10], [20, 11], q_offsets=[0, 1], prefix_lens=[5, 2])
    start = 2**25 + 20  # rows of 64 elements
    far = PrefixLayout.packed([20, 10], [20, 11], k_starts=[0, start], q_offsets=[0, 1], prefix_lens=[5, 2])
    want = prefix_attention(q, k, v, near, return_lse=True)
    assert_same_bits(prefix_attention(q, apart(k, 20, start), apart(v, 20, start), far, return_lse=True), want)


def apart(x: np.ndarray, cut: int, start: int) -> np.ndarray:
    """x with its rows from `cut` on moved to row `start`, more than 2^31 elements on."""
    shape = (start + len(x) - cut, *x.shape[1:])
    assert math.prod(shape) > 2**31
    rows = sparse(math.prod(shape), x.dtype).reshape(shape)
    rows[:cut], rows[start:] = x[:cut], x[cut:]
    return rows


def test_lse_of_a_packed_row_beyond():
    """lse and dlse of [R, N] with R·N > 2^31, read by the keys' gradients: queries far along write nothing there."""
    heads, start = 64, 2**25 + 3  # rows of 512 elements, and of 64 in lse
    q, dout = (numbers(20, heads, 8, seed=i) for i in range(2))
    k, v = (numbers(20, heads, 8, seed=i) for i in (2, 3))
    near = PrefixLayout.packed([10, 10], prefix_lens=[3, 10])
    out, lse = prefix_attention(q, k, v, near, scale=0.25, return_lse=True)
    dlse = numbers(*lse.shape, seed=4)
    want = [None, np.empty_like(k), np.empty_like(v)]
    backward(near, q, k, v, out, dout, want, lse, dlse, None, None)
    bounds = near.bounds.copy()
    bounds[0, 1] = start
    far = PrefixLayout(bounds, None, None, 16, 16)
    q, *apart_too = (apart(x, 10, start) for x in (q, out, dout, lse, dlse))
    grads = [None, np.full_like(k, np.nan), np.full_like(v, np.nan)]
    backward(far, q, k, v, *apart_too[:2], grads, *apart_too[2:], None, None)
    assert_same_bits(grads[1:], want[1:])


@DTYPES
@pytest.mark.parametrize("axis", [0, 1, 2], ids=["images", "rows", "columns"])
def test_batch_norm_act(axis, dtype):
    x, residual, dy = (numbers(3, 4, 5, 24, dtype=dtype, seed=i) for i in range(3))
    weight, bias = numbers(2, 24)
    want = batch_norm_act(x, weight, bias, residual=residual)
    far_x, far_residual = spread(x, axis), spread(residual, axis)
    assert_same_bits(batch_norm_act(far_x, weight, bias, residual=far_residual), want)
    y, *vectors = *want, weight, bias, None
    sums = stem_cpu.batch_norm_backward_reductions(dy, x, y, *vectors, 1e-5, "relu")
    assert_same_bits(stem_cpu.batch_norm_backward_reductions(dy, far_x, y, *vectors, 1e-5, "relu"), sums)
    dx, far_dx = (
        stem_cpu.batch_norm_backward_apply(dy, images, *vectors, *sums[:2], 1e-5, "relu") for images in (x, far_x)
    )
    assert_same_bits([far_dx], [dx])


@DTYPES
@pytest.mark.parametrize("axis", [0, 1, 2], ids=["images", "rows", "columns"])
def test_embed_sequence(axis, dtype):
    layout = PrefixLayout.padded(3, 26, image_grid=(4, 5))
    features, text = numbers(3, 4, 5, 24, dtype=dtype), numbers(18, 24, dtype=dtype)
    bias, positions = numbers(24), numbers(20, 24)
    want = embed_sequence(features, None, bias, positions, text, layout)
    far = embed_sequence(spread(features, axis), None, bias, positions, spread(text, 0), layout)
    assert_same_bits([far], [want])
