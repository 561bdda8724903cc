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


def test_the_table_gradient_in_parts_of_the_batch(monkeypatch):
    """Parts of three sequences: one without any image, others with sequences that have no queries or no keys."""
    case = spec.Case(
        name="parts",
        q_lens=(13, 0, 20, 9, 0, 15, 12, 14),
        prefix_lens=(12, 0, 5, 9, 0, 3, 12, 14),
        image_grid=(3, 4),
        has_image=(True, True, False, False, True, False, False, True),
    )
    monkeypatch.setattr(triton_gpu, "_PART", 3)
    assert triton_gpu._parts(8, case.heads, case.image_grid) == (3, 3)
    assert not parity.violations(spec, case, "torch", "triton", "float32")
    monkeypatch.setattr(triton_gpu, "_SCRATCH_BYTES", 2 * 4 * case.heads * 12 * 12)
    assert triton_gpu._parts(8, case.heads, case.image_grid) == (2, 4)
    assert not parity.violations(spec, case, "torch", "triton", "float32")


def test_queries_far_past_the_image():
    """Their rows times the row stride would pass 2^31 if they were counted from the image's tiles."""
    case = spec.Case(
        name="far", q_lens=(3, 14), k_lens=(20, 14), q_offsets=(2**27, 0), prefix_lens=(20, 12), image_grid=(3, 4)
    )
    assert not parity.violations(spec, case, "torch", "triton", "float32")


SPLIT = spec.Case(
    name="split",
    q_lens=(1, 16, 17, 0, 3, 2),
    k_lens=(1100, 513, 600, 700, 1024, 40),
    q_offsets=(1099, 300, 583, 0, 600, 10),
    prefix_lens=(0, 513, 100, 700, 0, 0),
    image_grid=(4, 6),
    heads=1,
    head_dim=24,
)


@pytest.mark.parametrize(("dtype", "padded"), [("float32", None), ("float16", (18, 1105))])
def test_a_few_queries_over_chunks_of_many_keys(dtype, padded):
    """Split and not split in one batch, and queries that do not see all of the chunks."""
    assert not parity.violations(spec, dataclasses.replace(SPLIT, padded=padded), "torch", "triton", dtype)


def test_a_split_sequence_has_the_same_bits_alone():
    inputs = spec.make_inputs(SPLIT)
    whole, lse = spec.call(SPLIT, SPLIT.layout(), {n: torch.from_numpy(x) for n, x in inputs.items()}, "triton")
    layout = SPLIT.layout()
    for b in (0, 4):
        case = dataclasses.replace(
            SPLIT,
            q_lens=SPLIT.q_lens[b : b + 1],
            k_lens=SPLIT.k_lens[b : b + 1],
            q_offsets=SPLIT.q_offsets[b : b + 1],
            prefix_lens=SPLIT.prefix_lens[b : b + 1],
        )
        queries = slice(layout.q_starts[b], layout.q_starts[b] + layout.q_lens[b])
        keys = slice(layout.k_starts[b], layout.k_starts[b] + layout.k_lens[b])
        own = {name: torch.from_numpy(x[keys if name in "kv" else queries]) for name, x in inputs.items()}
        own["rel_bias"] = torch.from_numpy(inputs["rel_bias"])
        alone, lse_alone = spec.call(case, case.layout(), own, "triton")
        assert torch.equal(alone, whole[queries])
        assert torch.equal(lse_alone, lse[queries])


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
        table, form, options = choose(*args, **kwargs)
        forms.append(form)
        return table, form, options

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
