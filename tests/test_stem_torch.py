"""How torch sees the stem's two ops: opcheck, compile, autocast, vmap, what is saved, what is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from attention_oracle import assert_same
from stem_cases import CORE, SPECS, everything, named, tensors_of
from torch.autograd import forward_ad

from simvlm.kernels import batch_norm_act, embed_sequence, parity
from simvlm.kernels.stem import batch_norm_spec, embed_spec, torch_op


def test_embed_sequence_waits_for_no_device():
    """On the meta device, where a look at a value raises."""
    case = named(embed_spec, "mixed")
    tensors = {
        name: x.detach().to("meta").requires_grad_(x.requires_grad) for name, x in tensors_of(embed_spec, case).items()
    }
    rows, *grads = everything(embed_spec, case, tensors, layout=case.layout().to("meta"))
    assert (rows.shape, rows.device.type) == ((52, 16), "meta")
    assert [tuple(grad.shape) for grad in grads] == [(3, 2, 3, 24), (16, 24), (16,), (6, 16), (34, 16)]


def _op_arguments(op, case, dtype=torch.float32):
    """Positional arguments of every registered op of one public op, by name."""
    t = tensors_of(SPECS[op], case, dtype)
    if op == "embed_sequence":
        placed = torch_op.places(torch.from_numpy(case.layout().bounds), torch.stack)
        of_images = [t.get(name) for name in ("features", "weight", "bias", "image_positions")]
        features, weight = (None if x is None else x.detach() for x in of_images[:2])
        shape, rows, wanted = (
            list(features.shape),
            t["text"].shape[0],
            [True, weight is not None, case.bias, True, True],
        )
        return {
            "embed_sequence": (*of_images, t["text"], placed, case.padded, ""),
            "embed_sequence_backward": (t["drows"], features, weight, placed, shape, rows, case.padded, wanted, ""),
        }
    mean, var = (t[name] for name in ("mean", "var"))
    x, w, b, y = t["x"].detach(), t["weight"].detach(), t["bias"].detach(), t["dy"] + 1
    residual, scale, rest = t.get("residual"), t.get("branch_scale"), (case.eps, case.act, "")
    return {
        "batch_norm_statistics": (x, ""),
        "batch_norm_apply": (
            t["x"],
            mean,
            var,
            t["weight"],
            t["bias"],
            residual,
            scale,
            case.eps,
            case.act,
            False,
            "",
            "",
        ),
        "batch_norm_backward_reductions": (t["dy"], x, y if case.residual else None, mean, var, w, b, scale, *rest),
        "batch_norm_backward_apply": (t["dy"], x, mean, var, w, b, scale, None, None, *rest),
    }


@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("batch_norm_act", "frozen"),
        ("batch_norm_act", "frozen_branch_residual"),
        ("embed_sequence", "mixed"),
        ("embed_sequence", "mixed_identity_padded"),
    ],
)
def test_opcheck(op, name):
    case = dataclasses.replace(named(SPECS[op], name), **({} if op == "batch_norm_act" else {"tail": 0}))
    for registered, arguments in _op_arguments(op, case).items():
        if case.name == "mixed_identity_padded":  # opcheck compares with itself, and NaN is not equal to NaN
            arguments = tuple(
                x.detach().nan_to_num() if torch.is_tensor(x) and x.is_floating_point() else x for x in arguments
            )
        torch.library.opcheck(getattr(torch.ops.simvlm, registered), arguments)


@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize("name", ["branch_residual", "branch", "frozen_branch_residual"])
def test_batch_norm_act_compiles_whole(name, impl):
    case = named(batch_norm_spec, name)
    tensors = tensors_of(batch_norm_spec, case)

    def results(call):
        leaves = [tensors[name] for name in batch_norm_spec.DIFFERENTIABLE if name in tensors]
        y, mean, var = call(tensors)
        return [y.detach(), mean, var, *torch.autograd.grad(y, leaves, tensors["dy"])]

    def call(tensors):
        return batch_norm_spec.call(case, None, tensors, impl)

    compiled = results(torch.compile(call, fullgraph=True, backend="aot_eager"))
    for got, want in zip(compiled, results(call), strict=True):
        assert_same(got, want, name)


@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize("on_tensor", [False, True], ids=["numpy layout", "torch layout"])
def test_embed_sequence_compiles_whole(impl, on_tensor):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def compiled(case, tensors, layout):
        return embed_spec.call(case, layout, tensors, impl)[0]

    for text_lens in ((4, 9, 0), (3, 3, 7), (13, 0, 0)):
        case = embed_spec.Case(name="compiled", text_lens=text_lens, has_image=(True, False, True), tail=0)
        tensors = tensors_of(embed_spec, case)
        layout = case.layout().to("cpu") if on_tensor else case.layout()
        rows = compiled(case, tensors, layout)
        leaves = [tensors[name] for name in embed_spec.DIFFERENTIABLE]
        got = [rows.detach(), *torch.autograd.grad(rows, leaves, tensors["drows"])]
        for a, b in zip(got, everything(embed_spec, case, tensors, impl), strict=True):
            assert_same(a, b, str(text_lens))
    assert counter.frame_count <= 2, "a change of lengths compiles once more at the most"


def test_autocast_casts_images_and_text_and_no_parameter():
    case = dataclasses.replace(named(batch_norm_spec, "branch_residual"), frozen=True)
    tensors = tensors_of(batch_norm_spec, case, torch.float32)
    low = tensors | {name: tensors[name].detach().bfloat16().requires_grad_() for name in ("x", "residual")}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = everything(batch_norm_spec, case, tensors)
    want = everything(batch_norm_spec, case, low)
    assert [x.dtype for x in got] == [torch.bfloat16, *(torch.float32,) * 6]
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(got, want, strict=True))

    case = named(embed_spec, "mixed")
    tensors = tensors_of(embed_spec, case, torch.float32)
    low = tensors | {name: tensors[name].detach().bfloat16().requires_grad_() for name in ("features", "text")}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = everything(embed_spec, case, tensors)
    want = everything(embed_spec, case, low)
    assert [x.dtype for x in got] == [torch.bfloat16, *(torch.float32,) * 5]
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(got, want, strict=True))
    dweight = got[2]
    assert not torch.equal(dweight, dweight.bfloat16().float()), "a float32 weight's gradient is not rounded to 16 bits"


@pytest.mark.parametrize("op", SPECS)
def test_16_bit_parameters_get_their_own_dtype_back(op):
    spec = SPECS[op]
    case = named(spec, {"batch_norm_act": "residual", "embed_sequence": "mixed"}[op])
    tensors = {name: x.detach().bfloat16() for name, x in tensors_of(spec, case, torch.float32).items()}
    for name in spec.DIFFERENTIABLE:
        tensors[name].requires_grad_()
    outputs = spec.call(case, case.layout(), tensors, None)
    outputs[0].sum().backward()
    assert {tensors[name].grad.dtype for name in spec.DIFFERENTIABLE} == {torch.bfloat16}


@pytest.mark.parametrize("op", SPECS)
def test_gradients_only_where_asked(op):
    spec = SPECS[op]
    for case in (case for owner, case in CORE if owner is spec and case.name in ("branch_residual", "frozen", "mixed")):
        tensors = tensors_of(spec, case)
        names = [name for name in spec.DIFFERENTIABLE if name in tensors]
        whole = dict(zip(names, everything(spec, case, tensors)[len(spec.OUTPUTS) :], strict=True))
        for name in names:
            alone = {other: x.detach().requires_grad_(other == name) for other, x in tensors.items()}
            spec.call(case, case.layout(), alone, None)[0].backward(tensors[f"d{spec.OUTPUTS[0]}"])
            assert [other for other in names if alone[other].grad is not None] == [name]
            assert torch.equal(alone[name].grad, whole[name])


@pytest.mark.parametrize(
    ("name", "images"), [("plain", 1), ("branch", 1), ("residual_without_act", 1), ("residual", 2)]
)
def test_what_is_saved_for_backward(name, images):
    """x, and y only where a residual went into a relu; of which x is an input and y the next layer's."""
    case = named(batch_norm_spec, name)
    tensors, saved = tensors_of(batch_norm_spec, case), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        y, _, _ = batch_norm_spec.call(case, None, tensors, None)
    large = [x for x in saved if x.numel() == y.numel()]
    assert [x.data_ptr() for x in large] == [x.data_ptr() for x in (tensors["x"], y)][:images]


@pytest.mark.parametrize("op", SPECS)
def test_vmap_is_a_loop(op):
    spec = SPECS[op]
    case = named(spec, {"batch_norm_act": "branch_residual", "embed_sequence": "mixed"}[op])
    tensors = {name: x.detach().nan_to_num() for name, x in tensors_of(spec, case).items()}
    name, parameter = spec.DIFFERENTIABLE[:2]
    many = [torch.stack([tensors[n], 2 * tensors[n], -tensors[n]]).requires_grad_() for n in (name, parameter)]

    def call(x, p):
        return spec.call(case, case.layout(), tensors | {name: x, parameter: p}, None)[0]

    results = []
    for out in (torch.vmap(call)(*many), torch.stack([call(*each) for each in zip(*many, strict=True)])):
        results.append([out.detach(), *torch.autograd.grad((out**2).sum(), many)])
    for got, want in zip(*results, strict=True):
        assert_same(got, want, op)


@pytest.mark.parametrize("op", SPECS)
def test_what_kernels_do_not_differentiate_names_itself(op):
    spec = SPECS[op]
    case = named(spec, {"batch_norm_act": "residual", "embed_sequence": "mixed"}[op])
    tensors, name = tensors_of(spec, case), spec.DIFFERENTIABLE[0]
    call = lambda x: spec.call(case, case.layout(), tensors | {name: x}, None)[0]  # noqa: E731
    (grad,) = torch.autograd.grad((call(tensors[name]) ** 2).sum(), tensors[name], create_graph=True)
    with pytest.raises(NotImplementedError, match=rf"{op}: double backward.*impl='reference'"):
        grad.sum().backward()
    x = tensors[name].detach()
    with pytest.raises(NotImplementedError, match=rf"{op}: torch.func.grad"):
        torch.func.grad(lambda x: call(x).sum())(x)
    with pytest.raises(NotImplementedError, match=rf"{op}: torch.func.jvp"):
        torch.func.jvp(call, (x,), (x,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=rf"{op}: forward-mode"):
        call(forward_ad.make_dual(x, x))


@pytest.mark.parametrize("frozen", [False, True])
def test_reference_of_batch_norm_act_differentiates_twice(frozen):
    torch.manual_seed(0)
    x, r = (torch.randn(2, 2, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    w, b = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    given = {"mean": torch.zeros(3), "var": torch.ones(3)} if frozen else {}

    def op(x, w, b, r):
        scale = torch.tensor([1.25, 0.0], dtype=torch.float64)
        return batch_norm_act(x, w, b, residual=r, branch_scale=scale, eps=0.1, impl="reference", **given)[0]

    assert torch.autograd.gradcheck(op, (x, w, b, r))
    assert torch.autograd.gradgradcheck(op, (x, w, b, r))


def test_reference_of_embed_sequence_differentiates_twice():
    case = embed_spec.Case(
        name="twice", text_lens=(2, 1), has_image=(True, False), channels=3, width=2, image_grid=(1, 2), tail=0
    )
    tensors = tensors_of(embed_spec, case)
    leaves = [tensors[name] for name in embed_spec.DIFFERENTIABLE]
    op = lambda *leaves: embed_sequence(*leaves, case.layout(), impl="reference")  # noqa: E731
    assert torch.autograd.gradcheck(op, leaves)
    assert torch.autograd.gradgradcheck(op, leaves)


@pytest.mark.parametrize(
    ("impl", "dtype"),
    [("cpp", dtype) for dtype in batch_norm_spec.DTYPES] + [("triton", "float32"), ("triton", "float16")],
)
@pytest.mark.parametrize("op", SPECS)
def test_the_same_call_is_bit_equal(op, impl, dtype):
    spec = SPECS[op]
    case = named(spec, {"batch_norm_act": "many_channels", "embed_sequence": "large_grid"}[op])
    tensors = tensors_of(spec, case, parity.DTYPES[dtype])
    first, second = (everything(spec, case, tensors, impl) for _ in range(2))
    assert all(
        np.array_equal(a.double().numpy(), b.double().numpy(), equal_nan=True)
        for a, b in zip(first, second, strict=True)
    )


CHUNKED = {
    "batch_norm_act": batch_norm_spec.Case(
        name="chunked", shape=(3, 20, 33, 80), residual=True, branch_scale=(1.25, 0.0, 1.0)
    ),
    "embed_sequence": embed_spec.Case(
        name="chunked", text_lens=(64,) * 8, image_grid=(14, 14), channels=64, width=96, tail=0
    ),
}
"""Calls large enough for the C++ kernels to wake more threads than one."""


@pytest.mark.parametrize("dtype", batch_norm_spec.DTYPES)
@pytest.mark.parametrize("op", CHUNKED)
def test_the_number_of_threads_changes_nothing(op, dtype):
    spec, case, before = SPECS[op], CHUNKED[op], torch.get_num_threads()
    tensors = tensors_of(spec, case, parity.DTYPES[dtype])
    if op == "embed_sequence":  # its gradient is a product of torch's, whose library may cut the sum by threads
        tensors["weight"].requires_grad_(False)
    try:
        torch.set_num_threads(1)
        alone = everything(spec, case, tensors, "cpp")
        for threads in (2, 3, 8):
            torch.set_num_threads(threads)
            assert all(map(torch.equal, everything(spec, case, tensors, "cpp"), alone))
    finally:
        torch.set_num_threads(before)
