"""What is the stem's own in Triton: reductions over several chunks, refusals, kernels compiled for a GPU not there.

Parity over the cases of the specs and bit-equality are asked of every implementation elsewhere.
"""

from __future__ import annotations

import pytest
import torch
from stem_cases import everything, named, tensors_of
from uninterpreted import python

from simvlm.kernels import UnsupportedError, batch_norm_act, implementations, parity
from simvlm.kernels.stem import batch_norm_spec, embed_spec, triton_gpu


def test_it_is_available_in_the_interpreter():
    for op in ("batch_norm_act", "embed_sequence"):
        assert [status.reason for status in implementations(op) if status.name == "triton"] == [None]


@pytest.mark.parametrize("name", ["pixels_513", "large_mean", "large_mean_residual"])
@pytest.mark.parametrize("programs", [1, 3])
def test_chunks_of_other_sizes_meet_the_budget(name, programs, monkeypatch):
    """One chunk of many tiles, and several of which the last is short."""
    monkeypatch.setattr(triton_gpu, "_PROGRAMS", programs)
    case = named(batch_norm_spec, name)
    pixels, channels = case.shape[0] * case.shape[1] * case.shape[2], case.shape[3]
    blocks = triton_gpu._blocks(channels, 64)
    assert triton_gpu._parts(pixels, channels, blocks)[0] == programs
    monkeypatch.setattr(triton_gpu, "_blocks", lambda channels, elements: blocks)
    assert not parity.violations(batch_norm_spec, case, "torch", "triton", "float32")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_weight_gradient_over_several_chunks(dtype, monkeypatch):
    monkeypatch.setattr(triton_gpu, "_CHUNK", 96)
    assert not parity.violations(embed_spec, named(embed_spec, "large_grid"), "torch", "triton", dtype)


@pytest.mark.parametrize("name", ["mixed", "mixed_identity_padded"])
def test_each_gradient_alone_has_the_same_bits(name):
    case = named(embed_spec, name)
    together = tensors_of(embed_spec, case, torch.float32)
    names = [name for name in embed_spec.DIFFERENTIABLE if name in together]
    grads = dict(zip(names, everything(embed_spec, case, together, "triton")[1:], strict=True))
    for name in names:
        tensors = {key: x.detach().requires_grad_(key == name) for key, x in together.items()}
        (rows,) = embed_spec.call(case, case.layout(), tensors, "triton")
        (alone,) = torch.autograd.grad(rows, [tensors[name]], [tensors["drows"]])
        assert torch.equal(alone, grads[name]), name


def test_lengths_on_a_device_that_do_not_fit_stay_inside():
    """Which no one checks there: sequences longer than their rows, patches and text that are not there."""
    text, features, positions = torch.ones(3, 16), torch.ones(1, 1, 2, 16), torch.ones(2, 16)
    #                       q_starts  q_lens  image_lens  image_index  text_starts
    places = torch.tensor([[0, 4], [9, 9], [2, 2], [0, 1], [0, 7]], dtype=torch.int32)
    for weight in (None, torch.eye(16)):
        rows = triton_gpu.embed_sequence(features, weight, None, positions, text, places, 4)
        assert rows[..., 0].tolist() == [[2, 2, 1, 1], [0, 0, 0, 0]]
        saved = None if weight is None else features
        wanted = (True, weight is not None, True, True, True)
        grads = triton_gpu.embed_sequence_backward(
            torch.ones_like(rows), saved, weight, places, (1, 1, 2, 16), 3, 4, wanted
        )
        dfeatures, dweight, dbias, dpositions, dtext = (None if x is None else x[..., 0].tolist() for x in grads)
        assert (dfeatures, dpositions, dtext) == ([[[1, 1]]], [1, 1], [1, 1, 0])
        assert grads[2].tolist() == [2] * 16
        assert weight is None or dweight == [2] * 16


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "reason"), [(torch.bfloat16, "interpreter computes bfloat16 wrongly"), (torch.float64, "got float64")]
)
def test_refused_dtypes(dtype, reason):
    x = torch.zeros(1, 2, 2, 8, dtype=dtype)
    with pytest.raises(UnsupportedError, match=reason):
        batch_norm_act(x, x[0, 0, 0], x[0, 0, 0], impl="triton")
    assert reason in triton_gpu.embed_unsupported(x[0, 0], None)


def test_refused_sizes():
    assert "at most 1073741824 pixels" in triton_gpu.batch_norm_unsupported(torch.zeros(()).expand(2**15, 256, 256, 1))
    assert "at most 1073741824 rows" in triton_gpu.embed_unsupported(torch.zeros(()).expand(2**30 + 1, 1), None)


def test_without_gpu_or_interpreter_it_refuses_and_leaves_triton_alone():
    program = (
        "import sys, torch; from simvlm.kernels import batch_norm_act, implementations\n"
        "from simvlm.kernels.stem import triton_gpu\n"
        "x = torch.zeros(1, 2, 2, 8); batch_norm_act(x, x[0, 0, 0], x[0, 0, 0])\n"
        "print([s.reason for s in implementations('batch_norm_act') if s.name == 'triton'][0])\n"
        "print(triton_gpu.batch_norm_unsupported(x), triton_gpu.embed_unsupported(x[0, 0], None))\n"
        "assert 'triton' not in sys.modules"
    )
    printed = python("-c", program)
    assert "no NVIDIA GPU" in printed or torch.cuda.is_available()
    assert printed.count("tensors must be on an NVIDIA GPU, got cpu") == 2
