"""Device functions that every pass of the Triton kernels shares: a sequence's bounds, its rows, their products.

Scores are kept as <q, k> + bias / scale: the scale enters with the exponential, as part of a multiply-add, and is
positive and within bounds: the launcher sees to it, with a q multiplied by -1 or a power of two where it must.

A tensor reaches a kernel as (pointer, batch stride, row stride, head stride), and one head of one sequence of it is
(pointer to the first row, row stride).

A row of H numbers is a pair of tiles, W columns and W2 more, because the sides of a tile are powers of two: 80 is
64 + 16 and costs 80, not 128. WIDTHS is (H, W, W2); with W2 = 0 the second tile is a placeholder.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def locate(tiles, heads):
    """(tile, head, sequence) of this program, one of tiles × heads × batch on the first axis of the grid."""
    program = tl.program_id(0)
    return program % tiles, program // tiles % heads, program // tiles // heads


@triton.jit
def bounds_of(bounds, b, batch):
    """(q_start, q_len, k_start, k_len, prefix_len, q_offset, image_len) of sequence b."""
    return (
        tl.load(bounds + b),
        tl.load(bounds + batch + b),
        tl.load(bounds + 2 * batch + b),
        tl.load(bounds + 3 * batch + b),
        tl.load(bounds + 4 * batch + b),
        tl.load(bounds + 5 * batch + b),
        tl.load(bounds + 6 * batch + b),
    )


@triton.jit
def key_ranges(first, q_len, k_len, prefix_len, q_offset, image_len, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr):
    """(biased, full, end): the keys of tiles that hold patches, that every query of a tile sees, that any of them sees.

    All for the tile of queries that begins with query `first`; `biased` is 0 where there is no patch among them.
    """
    last = tl.minimum(first + BLOCK_T, q_len)
    end = tl.where(first < q_len, tl.minimum(k_len, tl.maximum(prefix_len, q_offset + last)), 0)
    full = tl.minimum(tl.minimum(k_len, tl.maximum(prefix_len, q_offset + first + 1)), end) // BLOCK_S * BLOCK_S
    patches = tl.where(q_offset + first < image_len, tl.minimum(image_len, end), 0)
    return tl.cdiv(patches, BLOCK_S) * BLOCK_S, full, end


@triton.jit
def rows_of(x, start, b, n, PADDED: tl.constexpr):
    """Head n of sequence b, which begins at storage row `start`; a padded tensor's batch axis has its own stride."""
    # Of an argument the compiler knows multiples of 16 alone, and would load H = 72 one number at a time.
    stride = x[2] // 8 * 8
    head = x[0] + n.to(tl.int64) * (x[3] // 8 * 8)
    if PADDED:
        return head + tl.cast(b, tl.int64) * (x[1] // 8 * 8), stride
    else:
        return head + start.to(tl.int64) * stride, stride


@triton.jit
def numbers_of(x, start, n, total):
    """The same for one number a row, contiguous [N, total rows]; padded or packed, a sequence begins at row `start`."""
    return x + n.to(tl.int64) * total + start


@triton.jit
def row_numbers(lse2, delta, offs_t, mask_t):
    """(lse in log2, delta) of a query tile; lse2 is +inf where p must be 0: no key is seen, or no query is there."""
    return tl.load(lse2 + offs_t, mask=mask_t, other=float("inf")), tl.load(delta + offs_t, mask=mask_t, other=0.0)


@triton.jit
def owned_rows(starts, start, b, batch, rows, PADDED: tl.constexpr):
    """Rows from this sequence's start up to the next one's: what its programs must write, zeros where no token is."""
    if PADDED:
        return rows
    else:
        end = rows
        if b + 1 < batch:
            end = tl.load(starts + b + 1)
        return end - start


@triton.jit
def _columns(x, start, rows, columns):
    """Pointers to `columns` of the rows `rows` from row `start` on."""
    # 64 bits for the tile's place, 32 inside it, which saves registers; the launcher sees that row strides allow it.
    return x[0] + tl.cast(start, tl.int64) * x[1] + (rows[:, None] * x[1] + columns[None, :])


@triton.jit
def _load(x, start, columns, mask, WITHIN: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr):
    pointers = _columns(x, start, tl.arange(0, BLOCK), columns)
    if WITHIN:
        return tl.load(pointers, mask=mask[:, None], other=0.0)
    else:
        return tl.load(pointers, mask=mask[:, None] & (columns < H)[None, :], other=0.0)


@triton.jit
def load_rows(x, start, mask, BLOCK: tl.constexpr, WIDTHS: tl.constexpr):
    """BLOCK rows from `start` on, a pair; zero past column H and in rows where `mask` is false."""
    H: tl.constexpr = WIDTHS[0]
    W: tl.constexpr = WIDTHS[1]
    W2: tl.constexpr = WIDTHS[2]
    low = _load(x, start, tl.arange(0, W), mask, W <= H, H, BLOCK)
    if W2 > 0:
        return low, _load(x, start, W + tl.arange(0, W2), mask, W + W2 <= H, H, BLOCK)
    else:
        return low, 0.0


@triton.jit
def rows_until(start, length, ENDS: tl.constexpr, BLOCK: tl.constexpr):
    """Row numbers of a tile, counted from `start`; if ENDS, the last row stands for those from row `length` on.

    The caller gives such rows no weight. To bound a row's number costs half the instructions of a mask.
    """
    rows = tl.arange(0, BLOCK)
    if ENDS:
        rows = tl.minimum(rows, length - 1 - start)
    return rows


@triton.jit
def _stream(x, start, rows, columns, WITHIN: tl.constexpr, H: tl.constexpr):
    pointers = _columns(x, start, rows, columns)
    if WITHIN:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(columns < H)[None, :], other=0.0)


@triton.jit
def stream_rows(x, start, rows, WIDTHS: tl.constexpr):
    """The rows `rows` from row `start` on, a pair, in a loop over tiles; zero past column H."""
    H: tl.constexpr = WIDTHS[0]
    W: tl.constexpr = WIDTHS[1]
    W2: tl.constexpr = WIDTHS[2]
    low = _stream(x, start, rows, tl.arange(0, W), W <= H, H)
    if W2 > 0:
        return low, _stream(x, start, rows, W + tl.arange(0, W2), W + W2 <= H, H)
    else:
        return low, 0.0


@triton.jit
def store_rows(x, start, tiles, mask, BLOCK: tl.constexpr, WIDTHS: tl.constexpr):
    """Writes a pair of tiles to BLOCK rows from `start` on where `mask` is true, rounded once to x's dtype."""
    H: tl.constexpr = WIDTHS[0]
    W: tl.constexpr = WIDTHS[1]
    W2: tl.constexpr = WIDTHS[2]
    columns = tl.arange(0, W)
    low = tiles[0].to(x[0].dtype.element_ty)
    tl.store(_columns(x, start, tl.arange(0, BLOCK), columns), low, mask=mask[:, None] & (columns < H)[None, :])
    if W2 > 0:
        columns = W + tl.arange(0, W2)
        high = tiles[1].to(x[0].dtype.element_ty)
        tl.store(_columns(x, start, tl.arange(0, BLOCK), columns), high, mask=mask[:, None] & (columns < H)[None, :])


@triton.jit
def zeros(BLOCK: tl.constexpr, WIDTHS: tl.constexpr):
    """A pair of float32 tiles."""
    W: tl.constexpr = WIDTHS[1]
    W2: tl.constexpr = WIDTHS[2]
    low = tl.zeros([BLOCK, W], tl.float32)
    if W2 > 0:
        return low, tl.zeros([BLOCK, W2], tl.float32)
    else:
        return low, 0.0


@triton.jit
def scaled(tiles, factor, WIDTHS: tl.constexpr):
    """The pair times `factor`."""
    if WIDTHS[2] > 0:
        return tiles[0] * factor, tiles[1] * factor
    else:
        return tiles[0] * factor, 0.0


@triton.jit
def plus(a, b, WIDTHS: tl.constexpr):
    """The sum of two pairs."""
    if WIDTHS[2] > 0:
        return a[0] + b[0], a[1] + b[1]
    else:
        return a[0] + b[0], 0.0


@triton.jit
def zero_where_not(mask, tiles, WIDTHS: tl.constexpr):
    """The pair with zeros in the rows where `mask` is false, whatever they held."""
    if WIDTHS[2] > 0:
        return tl.where(mask[:, None], tiles[0], 0.0), tl.where(mask[:, None], tiles[1], 0.0)
    else:
        return tl.where(mask[:, None], tiles[0], 0.0), 0.0


@triton.jit
def products(a, b, begin, WIDTHS: tl.constexpr, PRECISION: tl.constexpr):
    """begin (or None) + <a_i, b_j> of every row i of a and j of b, float32."""
    result = tl.dot(a[0], tl.trans(b[0]), begin, input_precision=PRECISION)
    if WIDTHS[2] > 0:
        result = tl.dot(a[1], tl.trans(b[1]), result, input_precision=PRECISION)
    return result


@triton.jit
def add_mix(sums, weights, rows, WIDTHS: tl.constexpr, PRECISION: tl.constexpr):
    """sums + weights · rows: weights rounded to the rows' dtype, sums float32."""
    weights = weights.to(rows[0].dtype)
    low = tl.dot(weights, rows[0], sums[0], input_precision=PRECISION)
    if WIDTHS[2] > 0:
        return low, tl.dot(weights, rows[1], sums[1], input_precision=PRECISION)
    else:
        return low, 0.0
