"""Every wrong argument of `prefix_attention` is refused before anything runs, with a message that names it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from simvlm.kernels import (
    PrefixLayout,
    UnsupportedError,
    batch_norm_act,
    embed_sequence,
    implementations,
    prefix_attention,
)

PACKED = PrefixLayout.packed([4, 2], prefix_lens=0)
PADDED = PrefixLayout.padded(2, 3)
IMAGE = PrefixLayout.packed([6], image_grid=(2, 3))
CROSS = PrefixLayout.packed([6], [6], cross=True)


def rows(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype)


def attend(layout=PACKED, q=None, k=None, v=None, **options):
    q = rows(6, 2, 16) if q is None else q
    k = rows(6, 2, 16) if k is None else k
    return lambda: prefix_attention(q, k, k if v is None else v, layout, **options)


OVERLAP = PrefixLayout.packed([1, 1], [3, 3], k_starts=[0, 0], cross=True)

REFUSED = {
    "no layout": (attend(layout=None), TypeError, "layout must be a PrefixLayout, got NoneType"),
    "a list": (attend(q=[1.0]), TypeError, "q must be a torch tensor, a jax array or a numpy array, got list"),
    "two libraries": (
        attend(k=np.zeros((6, 2, 16), np.float32)),
        TypeError,
        "all arrays must come from one library.*q is torch, k is numpy",
    ),
    "rank, packed": (attend(q=rows(2, 3, 2, 16)), ValueError, r"q must have 3 axes \[R, N, H\] with a packed layout"),
    "rank, padded": (attend(layout=PADDED), ValueError, r"q must have 4 axes \[B, T, N, H\] with a padded layout"),
    "integers": (
        attend(q=rows(6, 2, 16, dtype=torch.int32)),
        TypeError,
        "q must be float32, bfloat16, float16.*got int32",
    ),
    "mixed dtypes": (
        attend(k=rows(6, 2, 16, dtype=torch.float16)),
        TypeError,
        "one dtype, got float32 for q and float16 for k",
    ),
    "last axis strided": (
        attend(q=rows(6, 16, 2).transpose(1, 2)),
        ValueError,
        r"q must be contiguous in its last axis, got strides \(32, 1, 2\)",
    ),
    "no heads": (attend(q=rows(6, 0, 16), k=rows(6, 0, 16)), ValueError, "q must have at least one head"),
    "head_dim 12": (
        attend(q=rows(6, 2, 12), k=rows(6, 2, 12)),
        ValueError,
        "head_dim.*multiple of 8 from 8 to 128, got 12",
    ),
    "head_dim 136": (attend(q=rows(6, 2, 136), k=rows(6, 2, 136)), ValueError, "from 8 to 128, got 136"),
    "k unlike v": (
        attend(v=rows(7, 2, 16)),
        ValueError,
        r"k and v must have one shape, got \(6, 2, 16\) and \(7, 2, 16\)",
    ),
    "other heads": (
        attend(k=rows(6, 3, 16)),
        ValueError,
        r"k must have q's heads and head_dim \(2, 16\), got \(3, 16\)",
    ),
    "too few rows": (attend(q=rows(5, 2, 16)), ValueError, "q must have at least the layout's 6 rows, got 5"),
    "too few key rows": (attend(k=rows(5, 2, 16)), ValueError, "k must have at least the layout's 6 rows, got 5"),
    "other batch": (
        attend(layout=PADDED, q=rows(3, 3, 2, 16), k=rows(2, 3, 2, 16)),
        ValueError,
        r"q must begin with the layout's batch and length \(2, 3\), got \(3, 3\)",
    ),
    "other length": (
        attend(layout=PADDED, q=rows(2, 3, 2, 16), k=rows(2, 4, 2, 16)),
        ValueError,
        r"k must begin with the layout's batch and length \(2, 3\), got \(2, 4\)",
    ),
    "device": (attend(k=torch.empty(6, 2, 16, device="meta")), ValueError, "k must be on q's device cpu, got meta"),
    "layout elsewhere": (
        lambda: prefix_attention(*(torch.empty(6, 2, 16, device="meta") for _ in range(3)), PACKED),
        ValueError,
        r"layout must be on q's device meta, got cpu: call layout.to\(q.device\)",
    ),
    "table size": (
        attend(layout=IMAGE, rel_bias=rows(2, 3, 4)),
        ValueError,
        r"rel_bias must have shape \[N, 2Gh-1, 2Gw-1\] = \(2, 3, 5\), got \(2, 3, 4\)",
    ),
    "table heads": (attend(layout=IMAGE, rel_bias=rows(1, 3, 5)), ValueError, r"= \(2, 3, 5\), got \(1, 3, 5\)"),
    "table of integers": (
        attend(layout=IMAGE, rel_bias=rows(2, 3, 5, dtype=torch.int64)),
        TypeError,
        "rel_bias must be floating point, got int64",
    ),
    "table without grid": (attend(rel_bias=rows(2, 3, 5)), ValueError, "rel_bias must be None.*no image_grid"),
    "table with cross": (
        attend(layout=CROSS, rel_bias=rows(2, 3, 5)),
        ValueError,
        "rel_bias must be None with a cross",
    ),
    "scale as tensor": (attend(scale=torch.tensor(1.0)), TypeError, "scale must be a Python float, got Tensor"),
    "scale infinite": (attend(scale=float("inf")), ValueError, "scale must be finite, got inf"),
    "overlapping keys with gradient": (
        attend(layout=OVERLAP, q=rows(2, 2, 16), k=rows(3, 2, 16).requires_grad_()),
        ValueError,
        "k and v must not require a gradient where.*overlap",
    ),
    "unknown impl": (
        attend(impl="tritn"),
        ValueError,
        r"impl must be one of \['cpp', 'triton', 'xla', 'reference'\] for torch arrays, got 'tritn'; did you mean "
        r"'triton'\?",
    ),
    "impl of another family": (
        attend(impl="pallas"),
        ValueError,
        "impl must be one of .* for torch arrays, got 'pallas'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    call, error, message = REFUSED[name]
    with pytest.raises(
        error, match=f"^prefix_attention: .*{message}" if not message.startswith("q must be a") else message
    ):
        call()


def test_a_named_implementation_that_cannot_says_why():
    x = rows(6, 2, 16, dtype=torch.float64)
    with pytest.raises(
        UnsupportedError, match=r"prefix_attention: no implementation takes this call.*cpp: takes float32"
    ):
        prefix_attention(x, x, x, PACKED, impl="cpp")


def test_numpy_has_no_implementation_for_float64():
    x = np.zeros((6, 2, 16))
    with pytest.raises(UnsupportedError, match="cpp: takes float32, bfloat16, float16, got float64"):
        prefix_attention(x, x, x, PACKED)


def test_the_environment_chooses_and_is_checked(monkeypatch):
    monkeypatch.setenv("SIMVLM_IMPL", "cp")
    with pytest.raises(ValueError, match=r"SIMVLM_IMPL must be one of .*got 'cp'; did you mean 'cpp'\?"):
        attend()()
    monkeypatch.setenv("SIMVLM_IMPL", "reference")
    x = rows(6, 2, 16).requires_grad_()
    out = prefix_attention(x, x, x, PACKED)
    assert "PrefixAttention" not in type(out.grad_fn).__name__, "the reference is plain PyTorch, not the registered op"
    assert "simvlm" not in type(out.grad_fn).__name__


def test_lengths_on_the_host_are_checked_again_at_the_door():
    """A layout whose integers were changed by hand never becomes an address."""
    for row, value in ((0, -1), (1, 50), (2, 100), (3, -2), (5, -7), (6, 99)):
        layout = PrefixLayout.packed([4, 2], prefix_lens=0)
        layout.bounds[row, 1] = value
        with pytest.raises(
            ValueError, match=r"prefix_attention: layout must stay within the storage, got .* for sequence 1"
        ):
            prefix_attention(rows(6, 2, 16), rows(6, 2, 16), rows(6, 2, 16), layout, impl="cpp")


def by_hand(bounds, grid=None):
    return PrefixLayout(bounds, None, grid, 8, 8)


BY_HAND = {
    "rows": (PACKED.bounds[:3].copy(), None, r"layout must hold bounds of shape \[7, B\], got \[3, 2\]"),
    "rank": (PACKED.bounds[0].copy(), None, r"layout must hold bounds of shape \[7, B\], got \[2\]"),
    "grid": (PACKED.bounds, (2**33, 2**33), r"image_grid must have fewer than 2\*\*31 patches"),
}


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize("library", ["numpy", "torch", "torch bounds"])
def test_a_layout_made_by_hand_is_checked(name, library):
    bounds, grid, message = BY_HAND[name]
    x = rows(6, 2, 16)
    layout = by_hand(torch.from_numpy(bounds) if library == "torch bounds" else bounds, grid)
    x = x.numpy() if library == "numpy" else x
    with pytest.raises(ValueError, match=f"^prefix_attention: {message}"):
        prefix_attention(x, x, x, layout, impl="cpp")
    if name != "grid":  # which must be the features' there
        text = x[:, 0]
        with pytest.raises(ValueError, match=f"^embed_sequence: {message}"):
            embed_sequence(None, None, None, None, text, layout, impl="cpp")


def test_integers_of_another_width_are_converted():
    x, text = torch.randn(6, 2, 16), torch.randn(6, 16)
    wide = by_hand(torch.from_numpy(PACKED.bounds).long())
    with torch.no_grad():
        assert torch.equal(prefix_attention(x, x, x, wide, impl="cpp"), prefix_attention(x, x, x, PACKED, impl="cpp"))
    for layout in (wide, wide.numpy(), by_hand(wide.bounds.numpy())):
        assert torch.equal(embed_sequence(None, None, None, None, text, layout, impl="cpp"), text)


def test_a_large_grid_without_a_table_takes_no_memory():
    x = np.ones((6, 2, 16), np.float32)
    layout = PrefixLayout.packed([4, 2], image_grid=(40_000, 40_000))  # a table of 6.4 · 10^9 entries
    assert np.all(prefix_attention(x, x, x, layout, impl="cpp") == 1.0)


def test_a_storage_that_was_taken_away_is_refused():
    for name, message in (("q", "q must have memory"), ("k", "k and v must have memory")):
        tensors = {other: rows(6, 2, 16) for other in "qkv"}
        tensors[name].untyped_storage().resize_(0)
        with pytest.raises(ValueError, match=f"^prefix_attention: {message}"):
            prefix_attention(*tensors.values(), PACKED, impl="cpp")


def halved(x):
    return x.half() if x.is_floating_point() else x


def shortened(x):
    return x[: max(len(x) - 1, 0)].clone()


@pytest.mark.parametrize("unpack", [halved, shortened])
@pytest.mark.parametrize("op", ["prefix_attention", "batch_norm_act", "embed_sequence"])
def test_what_comes_back_for_the_backward_is_checked(op, unpack):
    """saved_tensors_hooks may hand anything to it."""
    weight, text = torch.ones(16, requires_grad=True), rows(2, 16).requires_grad_()
    x, images = rows(6, 2, 16).requires_grad_(), rows(2, 3, 4, 16).requires_grad_()
    calls = {
        "prefix_attention": lambda: prefix_attention(x, x, x, PACKED, impl="cpp"),
        "batch_norm_act": lambda: batch_norm_act(images, weight, weight, impl="cpp")[0],
        "embed_sequence": lambda: embed_sequence(
            None, None, None, None, text, by_hand(PACKED.bounds[:, 1:]), impl="cpp"
        ),
    }
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, unpack):
        out = calls[op]()
    if op == "embed_sequence" and unpack is halved:
        out.sum().backward()  # saves nothing but integers
        return
    with pytest.raises(ValueError, match=r"^(batch_norm_act|embed_sequence|prefix_attention): .* must .*, got"):
        out.sum().backward()


def test_what_comes_back_may_lie_otherwise_in_memory():
    def scattered(x):
        return x.transpose(0, -1).contiguous().transpose(0, -1) if x.is_floating_point() else x

    x = torch.randn(6, 2, 16, requires_grad=True)
    images, weight = torch.randn(2, 3, 4, 16, requires_grad=True), torch.randn(16, requires_grad=True)

    def outputs():
        out = prefix_attention(x, x, x, PACKED, impl="cpp")
        y = batch_norm_act(images, weight, weight, residual=images, impl="cpp")[0]
        return out, y

    want = torch.autograd.grad([z.square().sum() for z in outputs()], [x, images, weight])
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, scattered):
        saved = outputs()
    got = torch.autograd.grad([z.square().sum() for z in saved], [x, images, weight])
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_implementations_of_an_unknown_op():
    with pytest.raises(ValueError, match=r"op must be one of .*'prefix_attention'.*, got 'attention'"):
        implementations("attention")
