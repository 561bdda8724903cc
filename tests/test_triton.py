"""What is Triton's own: larger cases in its interpreter, refusals.

Parity over the small cases, bit-equality and batch invariance are asked of every implementation elsewhere.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from uninterpreted import python

from simvlm.kernels import PrefixLayout, UnsupportedError, implementations, parity, prefix_attention
from simvlm.kernels.attention import spec, triton_gpu

CASES = {case.name: case for case in spec.CASES}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("edges_bidirectional", "float16"),
        ("edges_causal", "float16"),
        ("edges_prefix_table", "float16"),
        ("edges_prefix_table", "float32"),
        ("base_encoder", "float16"),
        ("decoder_only", "float16"),
    ],
)
def test_parity_over_many_tiles(name, dtype):
    """One head of the cases that are too large for the parity test's interpreter budget: every kind of tile range."""
    case = dataclasses.replace(CASES[name], heads=1)
    assert not parity.violations(spec, case, "torch", "triton", dtype)


@pytest.mark.parametrize("rows", [1, 2])
def test_the_table_gradient_in_bands_of_image_rows(rows, monkeypatch):
    case = CASES["decode_chunk_table"]
    height, width = case.image_grid
    monkeypatch.setattr(triton_gpu, "_SCRATCH_BYTES", 4 * case.heads * rows * width * height * width)
    assert triton_gpu._rows_at_once(case.heads, case.image_grid) == rows < height
    assert not parity.violations(spec, case, "torch", "triton", "float32")


def test_cotangents_of_stride_zero():
    layout = PrefixLayout.padded(2, 9, q_lens=[9, 4], prefix_lens=[3, 0])
    leaves = [torch.randn(2, 9, 2, 24, requires_grad=True) for _ in range(3)]
    out, lse = prefix_attention(*leaves, layout, return_lse=True, impl="triton")
    lse = lse[:, :4]
    expanded = torch.autograd.grad(out.sum() + lse.sum(), leaves, retain_graph=True)
    dense = torch.autograd.grad([out, lse], leaves, [torch.ones_like(out), torch.ones_like(lse)])
    assert all(torch.equal(a, b) for a, b in zip(expanded, dense, strict=True))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (0, 3)], ids=str)
def test_each_gradient_alone_has_the_same_bits(wanted):
    case = CASES["decode_chunk_table"]
    tensors = {name: torch.from_numpy(x) for name, x in spec.make_inputs(case).items()}

    def gradients(names):
        leaves = {name: x.detach().requires_grad_(name in names) for name, x in tensors.items()}
        outputs = spec.call(case, case.layout(), leaves, "triton")
        return torch.autograd.grad(outputs, [leaves[name] for name in names], [tensors["dout"], tensors["dlse"]])

    together = gradients(spec.DIFFERENTIABLE)
    for got, index in zip(gradients([spec.DIFFERENTIABLE[i] for i in wanted]), wanted, strict=True):
        assert torch.equal(got, together[index])


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "reason"), [(torch.bfloat16, "interpreter computes bfloat16 wrongly"), (torch.float64, "got float64")]
)
def test_refused_dtypes(dtype, reason):
    x = torch.zeros(4, 1, 8, dtype=dtype)
    with pytest.raises(UnsupportedError, match=reason):
        prefix_attention(x, x, x, PrefixLayout.packed([4]), impl="triton")


def test_refused_shapes():
    far = torch.empty_strided((2, 1, 8), (2**24 + 1, 8, 1), device="meta")
    assert "q's row stride must be at most" in triton_gpu.unsupported(far, far, far, PrefixLayout.packed([2]), None)
    grid = (300, 300)
    layout, table = PrefixLayout.packed([2], image_grid=grid), torch.zeros(()).expand(1, 599, 599)
    x = torch.zeros(2, 1, 8)
    assert "image_grid (300, 300) is too large" in triton_gpu.unsupported(x, x, x, layout, table)


def test_without_gpu_or_interpreter_it_refuses_and_leaves_triton_alone():
    program = (
        "import sys, torch; from simvlm.kernels import PrefixLayout, implementations, prefix_attention\n"
        "x = torch.zeros(4, 1, 8); prefix_attention(x, x, x, PrefixLayout.packed([4]))\n"
        "print([s.reason for s in implementations('prefix_attention') if s.name == 'triton'][0])\n"
        "assert 'triton' not in sys.modules"
    )
    printed = python("-c", program)
    assert "no NVIDIA GPU" in printed or torch.cuda.is_available()


def test_it_is_available_in_the_interpreter():
    assert [status.reason for status in implementations("prefix_attention") if status.name == "triton"] == [None]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_both_forms_of_the_table_give_the_same_bits(dtype, monkeypatch):
    """Offsets of 0 are no offsets: the table is then gathered instead of expanded, and nobody may see it."""
    forms = []
    choose = triton_gpu._table

    def spied(*args, **kwargs):
        table, form = choose(*args, **kwargs)
        forms.append(form)
        return table, form

    monkeypatch.setattr(triton_gpu, "_table", spied)
    found = []
    for q_offsets in (None, 0):
        case = spec.Case(name="forms", q_lens=(70, 33), prefix_lens=(60, 10), image_grid=(5, 7), q_offsets=q_offsets)
        inputs = parity.rounded_inputs(spec, case, dtype)
        forms.clear()
        found.append(parity.run(spec, case, inputs, "torch", "triton", dtype))
        assert set(forms) == {"expanded" if q_offsets is None else "gathered"}
        assert len(forms) == 3  # forward, and both passes of backward
    for name, expanded in found[0].items():
        assert (expanded == found[1][name]).all(), name
