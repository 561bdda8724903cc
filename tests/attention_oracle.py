"""`prefix_attention` written once more, from the words of docs/contract.md §2: naive loops over b, n, i, j in float64.

It shares no code with the package and takes nothing but arrays and lists, so that an error in the reference or in the
layout cannot hide in both.
"""

from __future__ import annotations

import math

import numpy as np


def attention(q, k, v, dout, dlse, sequences, rel_bias=None, image_grid=None, scale=None):
    """Forward and every gradient over packed storage.

    Args:
        q, k, v, dout: [R, N, H] (k, v: [R', N, H]); dlse: [R, N].
        sequences: dicts of q_start, q_len, k_start, k_len, prefix_len, q_offset, image_len.
        rel_bias: [N, 2Gh-1, 2Gw-1] or None.

    Returns:
        dict of out, lse, dq, dk, dv and, with a table, drel_bias.
    """
    q, k, v, dout, dlse = (x.astype(np.float64) for x in (q, k, v, dout, dlse))
    _, heads, head_dim = q.shape
    scale = 1.0 / math.sqrt(head_dim) if scale is None else scale
    out, dq = np.zeros(q.shape), np.zeros(q.shape)
    dk, dv = np.zeros(k.shape), np.zeros(v.shape)
    lse = np.full(q.shape[:2], -math.inf)
    dtable = None if rel_bias is None else np.zeros(rel_bias.shape)
    for seq in sequences:
        for n in range(heads):
            for i in range(seq["q_len"]):
                row, p = seq["q_start"] + i, seq["q_offset"] + i
                scores, entries = [], []
                for j in range(seq["k_len"]):
                    if not (j < seq["prefix_len"] or j <= p):
                        continue
                    score = scale * float(q[row, n] @ k[seq["k_start"] + j, n])
                    entry = None
                    if rel_bias is not None and p < seq["image_len"] and j < seq["image_len"]:
                        grid_height, grid_width = image_grid
                        entry = (
                            n,
                            j // grid_width - p // grid_width + grid_height - 1,
                            j % grid_width - p % grid_width + grid_width - 1,
                        )
                        score += float(rel_bias[entry])
                    scores.append(score)
                    entries.append((seq["k_start"] + j, entry))
                if not scores:
                    continue
                top = max(scores)
                total = sum(math.exp(score - top) for score in scores)
                lse[row, n] = top + math.log(total)
                weights = [math.exp(score - lse[row, n]) for score in scores]
                for weight, (key, _) in zip(weights, entries, strict=True):
                    out[row, n] += weight * v[key, n]
                do = dout[row, n]
                delta = float(do @ out[row, n])
                for weight, (key, entry) in zip(weights, entries, strict=True):
                    dp = float(do @ v[key, n])
                    ds = weight * (dp - delta + dlse[row, n])
                    dv[key, n] += weight * do
                    dq[row, n] += scale * ds * k[key, n]
                    dk[key, n] += scale * ds * q[row, n]
                    if entry is not None:
                        dtable[entry] += ds
    result = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    return result if dtable is None else result | {"drel_bias": dtable}


def assert_same(got, want, name):
    """Two float64 results that may differ by their order of summation alone."""
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12, err_msg=name)


def on_case(case, inputs):
    """The oracle on a `spec.Case`: the layout's arguments are read again here, not taken from `PrefixLayout`."""
    batch = len(case.q_lens)
    each = lambda value: list(value) if isinstance(value, (list, tuple)) else [value] * batch  # noqa: E731
    k_lens = case.q_lens if case.k_lens is None else case.k_lens
    prefix_lens = k_lens if case.prefix_lens is None else each(case.prefix_lens)
    offsets = each(0 if case.q_offsets is None else case.q_offsets)
    has_image = each(True) if case.has_image is None else case.has_image
    patches = case.image_grid[0] * case.image_grid[1] if case.image_grid else 0
    if case.padded:
        q_starts, k_starts = ([b * length for b in range(batch)] for length in case.padded)
    else:
        q_starts = [sum(case.q_lens[:b]) for b in range(batch)]
        k_starts = case.k_starts or [sum(k_lens[:b]) for b in range(batch)]
    sequences = [
        {
            "q_start": q_starts[b],
            "q_len": case.q_lens[b],
            "k_start": k_starts[b],
            "k_len": k_lens[b],
            "prefix_len": prefix_lens[b],
            "q_offset": offsets[b],
            "image_len": patches if has_image[b] else 0,
        }
        for b in range(batch)
    ]
    packed = {
        name: x.reshape(-1, *x.shape[2:]) if case.padded and name != "rel_bias" else x for name, x in inputs.items()
    }
    result = attention(
        *(packed[name] for name in ("q", "k", "v", "dout", "dlse")),
        sequences,
        rel_bias=packed.get("rel_bias"),
        image_grid=case.image_grid,
        scale=case.scale,
    )
    shapes = {"out": "q", "lse": "dlse", "dq": "q", "dk": "k", "dv": "v", "drel_bias": "rel_bias"}
    return {name: x.reshape(inputs[shapes[name]].shape) for name, x in result.items()}
