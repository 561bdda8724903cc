"""The stem's two ops written once more, from the words of docs/contract.md §3: naive loops in float64.

It shares no code with the package. The gradients of the normalization go the long way, through mean and variance as
Ioffe and Szegedy 2015, §3, write them, not through the two sums that the implementations use.
"""

from __future__ import annotations

import math

import numpy as np


def batch_norm_act(x, weight, bias, dy, mean=None, var=None, residual=None, branch_scale=None, eps=1e-5, act="relu"):
    """Forward and every gradient, channel by channel, pixel by pixel.

    Args:
        x, dy, residual: [B, Hh, Ww, C]; weight, bias, mean, var: [C]; branch_scale: [B].

    Returns:
        dict of y, mean, var, dx, dweight, dbias and, with a residual, dresidual.
    """
    batch, height, width, channels = x.shape
    pixels = [(b, i, j) for b in range(batch) for i in range(height) for j in range(width)]
    frozen = mean is not None
    result = {name: np.zeros(x.shape) for name in ("y", "dx", "dresidual")}
    result |= {name: np.zeros(channels) for name in ("mean", "var", "dweight", "dbias")}
    for c in range(channels):
        values = [float(x[pixel][c]) for pixel in pixels]
        count = max(len(values), 1)
        m = float(mean[c]) if frozen else sum(values) / count
        v = float(var[c]) if frozen else sum((value - m) ** 2 for value in values) / count
        result["mean"][c], result["var"][c] = m, v
        std = math.sqrt(v + eps)
        w, dnorms = float(weight[c]), []
        for pixel, value in zip(pixels, values, strict=True):
            scale = 1.0 if branch_scale is None else float(branch_scale[pixel[0]])
            norm = (value - m) / std
            z = scale * (norm * w + float(bias[c])) + (0.0 if residual is None else float(residual[pixel][c]))
            open_ = act == "none" or z > 0
            result["y"][pixel][c] = z if open_ else 0.0
            dz = float(dy[pixel][c]) if open_ else 0.0
            result["dresidual"][pixel][c] = dz
            result["dbias"][c] += scale * dz
            result["dweight"][c] += scale * dz * norm
            dnorms.append(scale * dz * w)
        dvar = dmean = 0.0
        if not frozen:
            dvar = sum(d * (value - m) for d, value in zip(dnorms, values, strict=True)) * -0.5 * (v + eps) ** -1.5
            dmean = -sum(dnorms) / std - 2.0 * dvar * sum(value - m for value in values) / count
        for pixel, value, d in zip(pixels, values, dnorms, strict=True):
            result["dx"][pixel][c] = d / std + 2.0 * dvar * (value - m) / count + dmean / count
    if residual is None:
        del result["dresidual"]
    return result


def embed_sequence(
    sequences, rows_shape, text, drows, grid=None, features=None, weight=None, bias=None, positions=None
):
    """Forward and every gradient over rows [R, D].

    Args:
        sequences: dicts of start (its first storage row), text_len and has_image.
        text: [Rt, D]; features: [Bi, Gh, Gw, C]; weight: [D, C] or None; bias: [D] or None; positions: [Gh·Gw, D].

    Returns:
        dict of rows, dtext and, with features, the gradients of what was given.
    """
    rows, dtext = np.zeros(rows_shape), np.zeros(text.shape)
    given = {"dfeatures": features, "dweight": weight, "dbias": bias, "dimage_positions": positions}
    grads = {name: np.zeros(x.shape) for name, x in given.items() if x is not None}
    images = texts = 0
    for sequence in sequences:
        row = sequence["start"]
        if sequence["has_image"]:
            for i in range(grid[0]):
                for j in range(grid[1]):
                    place, patch = i * grid[1] + j, (images, i, j)
                    pixel, d = features[patch].astype(np.float64), drows[row].astype(np.float64)
                    rows[row] = (pixel if weight is None else weight.astype(np.float64) @ pixel) + positions[place]
                    grads["dfeatures"][patch] = d if weight is None else weight.astype(np.float64).T @ d
                    grads["dimage_positions"][place] += d
                    if weight is not None:
                        grads["dweight"] += np.outer(d, pixel)
                    if bias is not None:
                        rows[row] += bias
                        grads["dbias"] += d
                    row += 1
            images += 1
        for _ in range(sequence["text_len"]):
            rows[row], dtext[texts] = text[texts], drows[row]
            row, texts = row + 1, texts + 1
    return {"rows": rows, "dtext": dtext, **grads}


def batch_norm_case(case, inputs):
    """The oracle on a case of batch_norm_spec.py."""
    return batch_norm_act(**inputs, eps=case.eps, act=case.act)


def embed_case(case, inputs):
    """The oracle on a case of embed_spec.py: where sequences start is counted here, not taken from `PrefixLayout`."""
    sequences, end = [], 0
    has_image = (case.image_grid is not None,) * len(case.text_lens) if case.has_image is None else case.has_image
    for b, (text_len, image) in enumerate(zip(case.text_lens, has_image, strict=True)):
        start = end if case.padded is None else b * case.padded
        sequences.append({"start": start, "text_len": text_len, "has_image": image})
        end = start + text_len + (case.image_grid[0] * case.image_grid[1] if image else 0)
    drows = inputs["drows"].reshape(-1, case.width)
    named = {"positions": "image_positions", "features": "features", "weight": "weight", "bias": "bias"}
    given = {argument: inputs.get(name) for argument, name in named.items()}
    result = embed_sequence(sequences, drows.shape, inputs["text"], drows, case.image_grid, **given)
    return result | {"rows": result["rows"].reshape(inputs["drows"].shape)}
