"""What `batch_norm_act` and `embed_sequence` refuse, and in which words."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from simvlm.kernels import PrefixLayout, UnsupportedError, batch_norm_act, embed_sequence, implementations


def _norm(**changed):
    """A legal call of batch_norm_act but for `changed`."""
    given = {"x": torch.ones(2, 3, 3, 4), "weight": torch.ones(4), "bias": torch.ones(4)} | changed
    return batch_norm_act(given.pop("x"), given.pop("weight"), given.pop("bias"), **given)


def _embed(layout=None, **changed):
    """A legal call of embed_sequence but for `changed`: two sequences of 3 text rows, the first with a 2 × 2 image."""
    given = {
        "features": torch.ones(1, 2, 2, 5),
        "weight": torch.ones(6, 5),
        "bias": torch.ones(6),
        "image_positions": torch.ones(4, 6),
        "text": torch.ones(6, 6),
    } | changed
    names = ("features", "weight", "bias", "image_positions", "text")
    if layout is None:
        layout = PrefixLayout.packed([7, 3], image_grid=(2, 2), has_image=[True, False])
    return embed_sequence(*(given.pop(name) for name in names), layout, **given)


BF16, F16, F64 = torch.bfloat16, torch.float16, torch.float64
NO_GRID = PrefixLayout.packed([6])

NORM = [
    ({"x": [1.0]}, TypeError, "x must be a torch tensor, a jax array or a numpy array, got list"),
    (
        {"weight": np.ones(4)},
        TypeError,
        "all arrays must come from one library, got a mixture: x is torch, weight is numpy",
    ),
    ({"bias": None}, TypeError, "bias must be a torch tensor, a jax array or a numpy array, got NoneType"),
    ({"x": torch.ones(3, 3, 4)}, ValueError, r"x must have 4 axes \[B, Hh, Ww, C\], got shape \(3, 3, 4\)"),
    ({"x": torch.ones(2, 3, 3, 0)}, ValueError, r"x must have at least one channel, got shape \(2, 3, 3, 0\)"),
    (
        {"x": torch.ones(2, 3, 3, 4, dtype=torch.int64)},
        TypeError,
        r"x must be float32, bfloat16, float16 \(or float64, reference only\), got int64",
    ),
    (
        {"x": torch.ones(2, 4, 3, 3).permute(0, 2, 3, 1)},
        ValueError,
        r"x must be contiguous in its last axis, got strides \(36, 3, 1, 9\): call .contiguous\(\)",
    ),
    ({"weight": torch.ones(5)}, ValueError, r"weight must have shape \[C\] = \(4,\), got \(5,\)"),
    ({"bias": torch.ones(1, 4)}, ValueError, r"bias must have shape \[C\] = \(4,\), got \(1, 4\)"),
    ({"weight": torch.ones(4, dtype=BF16)}, TypeError, "weight must be float32 where x is float32, got bfloat16"),
    (
        {"x": torch.ones(2, 3, 3, 4, dtype=F16), "bias": torch.ones(4, dtype=BF16)},
        TypeError,
        "bias must be float16 or float32 where x is float16, got bfloat16",
    ),
    ({"weight": torch.ones(4, device="meta")}, ValueError, "weight must be on x's device cpu, got meta"),
    ({"mean": torch.ones(4)}, ValueError, "var must be given with mean, got None"),
    ({"var": torch.ones(4)}, ValueError, "mean must be given with var, got None"),
    ({"mean": torch.ones(4), "var": torch.ones(3)}, ValueError, r"var must have shape \[C\] = \(4,\), got \(3,\)"),
    (
        {"residual": torch.ones(2, 3, 4, 3)[..., :1].expand(2, 3, 4, 4)},
        ValueError,
        r"residual must be contiguous in its last axis, got strides",
    ),
    (
        {"residual": torch.ones(1, 3, 3, 4)},
        ValueError,
        r"residual must have x's shape \(2, 3, 3, 4\), got \(1, 3, 3, 4\)",
    ),
    ({"residual": torch.ones(2, 3, 3, 4, dtype=F64)}, TypeError, "residual must have x's dtype float32, got float64"),
    ({"residual": torch.ones(2, 3, 3, 4, device="meta")}, ValueError, "residual must be on x's device cpu, got meta"),
    ({"branch_scale": torch.ones(4)}, ValueError, r"branch_scale must have shape \[B\] = \(2,\), got \(4,\)"),
    ({"branch_scale": 1.0}, TypeError, "branch_scale must be a torch tensor, a jax array or a numpy array, got float"),
    ({"act": "rellu"}, ValueError, r"act must be one of \['relu', 'none'\], got 'rellu'; did you mean 'relu'\?"),
    ({"act": None}, ValueError, r"act must be one of \['relu', 'none'\], got None; did you mean 'none'\?"),
    ({"eps": 0.0}, ValueError, "eps must be finite and above 0, got 0.0"),
    ({"eps": float("inf")}, ValueError, "eps must be finite and above 0, got inf"),
    ({"eps": "1e-5"}, TypeError, "eps must be a Python float, got str"),
    (
        {"impl": "refrence"},
        ValueError,
        r"impl must be one of .* for torch arrays, got 'refrence'; did you mean 'reference'\?",
    ),
]

EMBED = [
    ({"layout": 3}, TypeError, "layout must be a PrefixLayout, got int"),
    ({"text": None}, TypeError, "text must be a torch tensor, a jax array or a numpy array, got NoneType"),
    ({"features": np.ones((1, 2, 2, 5))}, TypeError, "all arrays must come from one library, got a mixture"),
    ({"text": torch.ones(1, 6, 6)}, ValueError, r"text must have 2 axes \[Rt, D\], got shape \(1, 6, 6\)"),
    ({"text": torch.ones(6, 6, dtype=torch.int32)}, TypeError, "text must be float32, .*, got int32"),
    ({"text": torch.ones(6, 6).T[:, ::2]}, ValueError, "text must be contiguous in its last axis, got strides"),
    ({"text": torch.ones(5, 6)}, ValueError, "text must have at least the layout's 6 text rows, got 5"),
    ({"features": None}, ValueError, "features must be given with a layout that has an image_grid, got None"),
    (
        {"image_positions": None},
        ValueError,
        "image_positions must be given with a layout that has an image_grid, got None",
    ),
    (
        {"layout": NO_GRID},
        ValueError,
        r"features must be None with a layout that has no image_grid, got shape \(1, 2, 2, 5\)",
    ),
    (
        {"layout": NO_GRID, "features": None, "weight": None, "bias": None},
        ValueError,
        r"image_positions must be None with a layout that has no image_grid, got shape \(4, 6\)",
    ),
    (
        {"features": torch.ones(1, 4, 5)},
        ValueError,
        r"features must have 4 axes \[Bi, Gh, Gw, C\], got shape \(1, 4, 5\)",
    ),
    (
        {"features": torch.ones(1, 2, 2, 5).bfloat16()},
        TypeError,
        "features must have text's dtype float32, got bfloat16",
    ),
    (
        {"features": torch.ones(1, 2, 5, 2).transpose(2, 3)},
        ValueError,
        r"features must be contiguous in its last axis, got strides \(20, 10, 1, 2\)",
    ),
    (
        {"features": torch.ones(1, 4, 1, 5)},
        ValueError,
        r"features must have the layout's grid \(2, 2\) as axes 1 and 2, got \(4, 1\)",
    ),
    ({"features": torch.ones(2, 2, 2, 5)}, ValueError, r"features must hold the layout's 1 images \(axis 0\), got 2"),
    ({"features": torch.ones(0, 2, 2, 5)}, ValueError, r"features must hold the layout's 1 images \(axis 0\), got 0"),
    (
        {"features": torch.ones(1, 2, 2, 5, device="meta")},
        ValueError,
        "features must be on text's device cpu, got meta",
    ),
    ({"weight": torch.ones(5, 6)}, ValueError, r"weight must have shape \[D, C\] = \(6, 5\), got \(5, 6\)"),
    ({"weight": torch.ones(6, 5).half()}, TypeError, "weight must be float32 where features is float32, got float16"),
    ({"weight": None}, ValueError, "weight must be given where C and D differ, got None with C = 5 and D = 6"),
    ({"bias": torch.ones(5)}, ValueError, r"bias must have shape \[D\] = \(6,\), got \(5,\)"),
    (
        {"image_positions": torch.ones(2, 2, 6)},
        ValueError,
        r"image_positions must have shape \[Gh·Gw, D\] = \(4, 6\), got \(2, 2, 6\)",
    ),
    (
        {"layout": PrefixLayout.packed([7, 3]).to("meta")},
        ValueError,
        "layout must be on text's device cpu, got meta: call",
    ),
    (
        {"layout": PrefixLayout.packed([7, 3], image_grid=(2, 2))},
        ValueError,
        r"layout must give every sequence with an image q_lens of at least its 4 patches, got q_lens\[1\] = 3",
    ),
    ({"impl": "cuda"}, ValueError, "impl must be one of .* for torch arrays, got 'cuda'"),
]


@pytest.mark.parametrize(("changed", "exception", "message"), NORM)
def test_batch_norm_act_refuses(changed, exception, message):
    with pytest.raises(exception, match=f"^batch_norm_act: {message}"):
        _norm(**changed)


@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize(("changed", "exception", "message"), EMBED)
def test_embed_sequence_refuses(changed, exception, message, impl):
    with pytest.raises(exception, match=f"^embed_sequence: {message}"):
        _embed(**{"impl": impl} | changed)


def test_a_legal_call_is_taken():
    """The control: what is refused above is the change."""
    assert _norm()[0].shape == (2, 3, 3, 4)
    assert _embed().shape == (10, 6)
    assert _embed(NO_GRID, features=None, weight=None, bias=None, image_positions=None).shape == (6, 6)
    assert _embed(text=torch.ones(8, 6)).shape == (12, 6), "text rows past the last sequence's are legal"


@pytest.mark.parametrize("op", ["batch_norm_act", "embed_sequence"])
def test_the_environment_names_an_implementation_too(op, monkeypatch):
    call = {"batch_norm_act": _norm, "embed_sequence": _embed}[op]
    monkeypatch.setenv("SIMVLM_IMPL", "refrence")
    with pytest.raises(ValueError, match=f"^{op}: SIMVLM_IMPL must be one of .*; did you mean 'reference'"):
        call()
    monkeypatch.setenv("SIMVLM_IMPL", "reference")
    call()
    assert "reference" in [status.name for status in implementations(op)]


def test_a_library_without_an_implementation_is_unsupported(monkeypatch):
    monkeypatch.setattr("simvlm.kernels.stem.BATCH_NORM_ACT", ())
    with pytest.raises(UnsupportedError, match=r"^batch_norm_act: no implementation takes this call"):
        batch_norm_act(np.ones((1, 2, 2, 4), np.float32), np.ones(4, np.float32), np.ones(4, np.float32))
