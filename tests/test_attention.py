"""`prefix_attention` beyond parity: reference against oracle, mutants, invariance, and how torch sees the op."""

from __future__ import annotations

import dataclasses
import itertools

import attention_oracle
import pytest
import torch
import torch._dynamo.testing
from torch.autograd import forward_ad

from simvlm.kernels import PrefixLayout, parity, prefix_attention
from simvlm.kernels.attention import reference, spec
from simvlm.kernels.attention import torch_op as _registered  # noqa: F401  opcheck looks the ops up by name

CORE = [case for case in spec.CASES if case.tier == "core"]
SMALL = [case for case in CORE if sum(case.q_lens) <= 140]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_reference_equals_the_oracle(case):
    """In float64, where the two may differ by their order of summation alone."""
    inputs = spec.make_inputs(case)
    want = attention_oracle.on_case(case, inputs)
    got = parity.run(spec, case, inputs, "torch", "reference", "float64")
    for name, value in got.items():
        attention_oracle.assert_same(value, want[name], name)


# ---- mutants: each must turn parity red on at least one core case --------------------------------------------------


def _mutant(name):
    """A `forward` that differs from the reference's by one planted error."""
    base = reference.forward

    def with_layout(change):
        def forward(q, k, v, layout, rel_bias, scale):
            return base(q, k, v, dataclasses.replace(layout, bounds=change(layout.bounds.clone())), rel_bias, scale)

        return forward

    def row(index, delta):
        def change(bounds):
            bounds[index] = (bounds[index] + delta).clamp(min=0)
            return bounds

        return change

    def nan_leak(q, k, v, layout, rel_bias, scale):
        out, lse = base(q, k, v, layout, rel_bias, scale)
        return out + 0.0 * q, lse  # padding's NaN reaches out

    def unwritten_row(q, k, v, layout, rel_bias, scale):
        out, lse = base(q, k, v, layout, rel_bias, scale)
        keep = torch.ones_like(lse)
        keep.reshape(-1)[-1] = float("nan")
        return out * keep[..., None], lse

    table = lambda change: lambda q, k, v, layout, t, scale: base(q, k, v, layout, t if t is None else change(t), scale)  # noqa: E731
    scaled = lambda factor: lambda q, k, v, layout, t, scale: base(q, k, v, layout, t, scale * factor)  # noqa: E731
    return {
        "prefix_one_short": with_layout(row(4, -1)),
        "causal_one_ahead": with_layout(row(5, 1)),
        "image_one_short": with_layout(row(6, -1)),
        "keys_one_short": with_layout(row(3, -1)),
        "table_flipped": table(lambda t: t.flip(1, 2)),
        "table_heads_swapped": table(lambda t: t.flip(0)),
        "table_without_gradient": table(lambda t: t.detach() + 0.0 * t),
        "scale_forgotten": scaled(1.01),
        "lse_in_base_2": lambda *call: (lambda out, lse: (out, lse * 1.4426950408889634))(*base(*call)),
        "nan_leak": nan_leak,
        "unwritten_row": unwritten_row,
        "out_in_bfloat16": lambda q, k, v, *rest: (lambda out, lse: (out.bfloat16().to(out.dtype), lse))(
            *base(q, k, v, *rest)
        ),
    }[name]


MUTANTS = (
    "prefix_one_short",
    "causal_one_ahead",
    "image_one_short",
    "keys_one_short",
    "table_flipped",
    "table_heads_swapped",
    "table_without_gradient",
    "scale_forgotten",
    "lse_in_base_2",
    "nan_leak",
    "unwritten_row",
    "out_in_bfloat16",
)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_red(name, monkeypatch):
    """The mutant stands in for the C++ kernel; truth and yardstick stay the reference's."""
    from simvlm.kernels.attention import cpp_cpu

    forward = _mutant(name)

    def backward(dout, dlse, q, k, v, out, lse, layout, rel_bias, scale, wanted):
        leaves = (q, k, v) if rel_bias is None else (q, k, v, rel_bias)
        call = lambda q, k, v, table=None: forward(q, k, v, layout, table, scale)  # noqa: E731
        return (*torch.func.vjp(call, *leaves)[1]((dout, dlse)), *(() if rel_bias is not None else (None,)))

    monkeypatch.setattr(cpp_cpu, "forward", forward)
    monkeypatch.setattr(cpp_cpu, "backward", backward)
    red = any(parity.violations(spec, case, "torch", "cpp", "float32") for case in SMALL)
    assert red, f"no core case notices {name}"


def _no_dlse(dout, dlse, *rest):
    return reference.backward(dout, torch.zeros_like(dlse), *rest)


def _one_gradient(index, change):
    def backward(*call):
        grads = list(reference.backward(*call))
        if grads[index] is not None:
            grads[index] = change(grads[index])
        return tuple(grads)

    return backward


def _without_last_row(x):
    x = x.clone()
    x.reshape(-1, *x.shape[-2:])[-1] = float("nan")
    return x


BACKWARD_MUTANTS = {
    "dlse_ignored": _no_dlse,
    "dq_without_scale": _one_gradient(0, lambda x: x * 8.0),
    "dk_unwritten_row": _one_gradient(1, _without_last_row),
    "dv_halved": _one_gradient(2, lambda x: x / 2),
    "dtable_flipped": _one_gradient(3, lambda x: x.flip(1, 2)),
    "dq_and_dk_swapped": lambda *call: (lambda dq, dk, dv, dt: (dk, dq, dv, dt))(*reference.backward(*call)),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", BACKWARD_MUTANTS)
def test_a_mutant_of_the_backward_is_red(name, dtype, monkeypatch):
    from simvlm.kernels.attention import cpp_cpu

    monkeypatch.setattr(cpp_cpu, "backward", BACKWARD_MUTANTS[name])
    square = [case for case in SMALL if case.k_lens is None and case.gradients]
    assert any(parity.violations(spec, case, "torch", "cpp", dtype) for case in square)


def test_an_unmutated_stand_in_is_green(monkeypatch):
    """The control: what turns red above is the planted error, not the way it was planted."""
    from simvlm.kernels.attention import cpp_cpu

    monkeypatch.setattr(cpp_cpu, "forward", reference.forward)
    monkeypatch.setattr(cpp_cpu, "backward", reference.backward)
    assert not [case.name for case in SMALL if parity.violations(spec, case, "torch", "cpp", "float32")]


# ---- bit-equality --------------------------------------------------------------------------------------------------

BATCH_INVARIANT = [
    *(("cpp", dtype) for dtype in spec.DTYPES),
    ("triton", "float16"),  # interpreted: slow, and without bfloat16
]


def _leaves(case, dtype, seed=0):
    tensors = {
        name: torch.from_numpy(x).to(torch.float32 if name in parity.PARAMETERS else parity.DTYPES[dtype])
        for name, x in spec.make_inputs(case, seed).items()
    }
    return {name: x.requires_grad_(name in spec.DIFFERENTIABLE) for name, x in tensors.items()}


def _everything(case, tensors, impl, layout=None):
    """out, lse and all gradients."""
    outputs = spec.call(case, case.layout() if layout is None else layout, tensors, impl)
    leaves = [tensors[name] for name in spec.DIFFERENTIABLE if name in tensors]
    grads = torch.autograd.grad(outputs, leaves, [tensors["dout"], tensors["dlse"]])
    return [x.detach() for x in (*outputs, *grads)]


def _assert_equal_bits(got, want):
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize(
    ("impl", "name", "dtype"),
    [
        *itertools.product(["cpp", "reference"], ["base_encoder", "edges_prefix_table", "padded_ragged"], spec.DTYPES),
        ("triton", "padded_ragged", "float16"),
    ],
)
def test_the_same_call_is_bit_equal(impl, name, dtype):
    case = next(case for case in CORE if case.name == name)
    tensors = _leaves(case, dtype)
    first = _everything(case, tensors, impl)
    for _ in range(3 if impl != "triton" else 1):
        _assert_equal_bits(_everything(case, tensors, impl), first)


@pytest.mark.parametrize("dtype", spec.DTYPES)
@pytest.mark.parametrize("name", ["base_encoder", "edges_prefix_table", "one_head", "decode_long"])
def test_the_number_of_threads_changes_nothing(name, dtype):
    case = next(case for case in CORE if case.name == name)
    tensors, before = _leaves(case, dtype), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = _everything(case, tensors, "cpp")
        for threads in (2, 3, 8):
            torch.set_num_threads(threads)
            _assert_equal_bits(_everything(case, tensors, "cpp"), alone)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("impl", "dtype"), BATCH_INVARIANT)
def test_batch_invariance(impl, dtype):
    """A sequence's out, lse, dq, dk and dv are the same bits alone, in a batch, padded and packed."""
    lens, prefixes, images = [70, 1, 129, 33], [20, 0, 129, 12], [True, False, True, True]
    batch = spec.Case(
        name="batch",
        q_lens=tuple(lens),
        prefix_lens=tuple(prefixes),
        image_grid=(3, 4),
        has_image=tuple(images),
        tail=5,
        head_dim=40,
    )
    tensors = _leaves(batch, dtype)
    packed = _everything(batch, tensors, impl)[:5]
    padded = dataclasses.replace(batch, padded=(140, 140))
    inside = torch.arange(140)[None, :] < torch.tensor(lens)[:, None]
    spread = {"rel_bias": tensors["rel_bias"].detach().requires_grad_()}
    for name in ("q", "k", "v", "dout", "dlse"):
        x = tensors[name].detach()
        room = torch.full((4, 140, *x.shape[1:]), float("nan"), dtype=x.dtype)
        room[inside] = x[: sum(lens)]
        spread[name] = room.requires_grad_(name in spec.DIFFERENTIABLE)
    _assert_equal_bits([x[inside] for x in _everything(padded, spread, impl)[:5]], [x[: sum(lens)] for x in packed])
    start = 0
    for length, prefix, image in zip(lens, prefixes, images, strict=True):
        alone = dataclasses.replace(batch, q_lens=(length,), prefix_lens=(prefix,), has_image=(image,), tail=0)
        rows = slice(start, start + length)
        own = {name: (x if name == "rel_bias" else x[rows]).detach() for name, x in tensors.items()}
        own = {name: x.requires_grad_(name in spec.DIFFERENTIABLE) for name, x in own.items()}
        _assert_equal_bits(_everything(alone, own, impl)[:5], [x[rows] for x in packed])
        start += length


@pytest.mark.parametrize("impl", ["triton", "cpp", "reference"])
def test_a_token_that_must_not_be_seen_changes_nothing(impl):
    case = spec.Case(name="hidden", q_lens=(40, 30), prefix_lens=(10, 0), image_grid=(2, 4))
    tensors = _leaves(case, "float32")
    with torch.no_grad():
        before = spec.call(case, case.layout(), tensors, impl)
        changed = dict(tensors)
        for name in ("k", "v"):
            changed[name] = tensors[name].clone()
            changed[name][25] += 3.0  # key 25 of sequence 0: seen by its queries 25 … 39 alone
        after = spec.call(case, case.layout(), changed, impl)
    unseen = torch.ones(73, dtype=torch.bool)
    unseen[25:40] = False
    for a, b in zip(after, before, strict=True):
        assert torch.equal(a[unseen], b[unseen])
        assert not torch.isclose(a[25:40], b[25:40]).any()


@pytest.mark.parametrize("head_dim", [8, 64, 112])
def test_one_key_has_a_probability_of_exactly_one(head_dim):
    """Forward and backward find the very same float32 score, however many queries chose which path."""
    for lens in ([1] * 200, [12] * 20):
        layout = PrefixLayout.packed(lens, prefix_lens=0)
        q, k, v, dout = (torch.randn(sum(lens), 2, head_dim) for _ in range(4))
        first = torch.tensor([sum(lens[:i]) for i in range(len(lens))])
        only = torch.zeros(sum(lens), 1, 1)
        only[first] = 1.0
        v.requires_grad_()
        out = prefix_attention(q, k, v, layout, scale=0.5, impl="cpp")
        (dv,) = torch.autograd.grad(out, v, dout * only)
        assert torch.equal(out[first], v[first])
        assert torch.equal(dv[first], dout[first])


def test_overlapping_keys_are_read_by_every_owner():
    """Beams share one encoder output without a copy."""
    q, k, v = (torch.randn(rows, 2, 16) for rows in (3, 9, 9))
    shared = prefix_attention(q, k, v, PrefixLayout.packed([1, 1, 1], [9, 9, 9], k_starts=[0, 0, 0], cross=True))
    whole = prefix_attention(q, k, v, PrefixLayout.packed([3], [9], cross=True))
    torch.testing.assert_close(shared, whole)


# ---- torch's view of the op ----------------------------------------------------------------------------------------


def _op_arguments(case):
    tensors, layout = _leaves(case, "float32"), case.layout().to("cpu")
    arguments = [tensors["q"], tensors["k"], tensors["v"], layout.bounds, tensors.get("rel_bias"), 0.125]
    statics = [layout.is_padded, layout.cross, layout.at_origin, list(layout.image_grid or ())]
    statics += [layout.max_q_len, layout.max_k_len]
    return tensors, arguments, statics


@pytest.mark.parametrize("impl", ["", "cpp"])
def test_opcheck(impl):
    for case in (
        spec.Case(name="packed", q_lens=(9, 20), prefix_lens=(4, 8), image_grid=(2, 3), head_dim=16, tail=0),
        spec.Case(name="padded", q_lens=(12, 12), padded=(12, 12), prefix_lens=0, head_dim=16),
    ):
        tensors, arguments, statics = _op_arguments(case)
        torch.library.opcheck(torch.ops.simvlm.prefix_attention, (*arguments, *statics, impl))
        q, k, v, bounds, table, scale = arguments
        out, lse = torch.ops.simvlm.prefix_attention(*arguments, *statics, impl)
        plain = [
            x if x is None else x.detach() for x in (tensors["dout"], tensors["dlse"], q, k, v, out, lse, bounds, table)
        ]
        wanted = [True, True, True, table is not None]
        torch.library.opcheck(torch.ops.simvlm.prefix_attention_backward, (*plain, scale, *statics, impl, wanted))


@pytest.mark.parametrize("impl", [None, "cpp", "reference"])
@pytest.mark.parametrize("on_tensor", [False, True], ids=["numpy layout", "torch layout"])
def test_compile_fullgraph(impl, on_tensor):
    case = spec.Case(name="compiled", q_lens=(9, 20), prefix_lens=(4, 8), image_grid=(2, 3), head_dim=16, tail=0)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def loss(q, k, v, table, layout):
        out, lse = prefix_attention(q * 2, k, v, layout, rel_bias=table, return_lse=True, impl=impl)
        return (out**2).sum() + lse.sum()

    for q_lens in ((9, 20), (13, 16), (20, 9)):
        now = dataclasses.replace(case, q_lens=q_lens)
        layout = now.layout().to("cpu") if on_tensor else now.layout()
        grads = []
        for function in (loss, loss.__wrapped__):
            leaves = [
                x.detach().requires_grad_()
                for name, x in _leaves(now, "float32").items()
                if name in spec.DIFFERENTIABLE
            ]
            function(*leaves, layout).backward()
            grads.append([leaf.grad for leaf in leaves])
        torch.testing.assert_close(*grads)
    assert counter.frame_count <= 2, "a change of lengths compiles once more at the most"


def test_autocast_casts_qkv_and_not_the_table():
    case = spec.Case(name="autocast", q_lens=(9,), image_grid=(2, 3), head_dim=16, tail=0)
    tensors = _leaves(case, "float32")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = spec.call(case, case.layout(), tensors, "cpp")
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    (out.float().sum() + lse.sum()).backward()
    assert tensors["q"].grad.dtype == torch.float32
    half = {name: x.detach().bfloat16() if name in ("q", "k", "v") else x.detach() for name, x in tensors.items()}
    assert torch.equal(out, spec.call(case, case.layout(), half, "cpp")[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        from_reference = spec.call(case, case.layout(), half, "reference")
    torch.testing.assert_close(from_reference[1], spec.call(case, case.layout(), half, "reference")[1])
    rounded = half | {"rel_bias": half["rel_bias"].bfloat16().float()}
    assert not torch.equal(lse, spec.call(case, case.layout(), rounded, "cpp")[1])


@pytest.mark.parametrize("padded", [False, True])
def test_vmap(padded):
    """A vmapped dimension runs as more heads; gradients of the vmapped table come back per entry."""
    layout = (
        PrefixLayout.padded(2, 9, prefix_lens=5, image_grid=(2, 2))
        if padded
        else PrefixLayout.packed([4, 9], prefix_lens=[2, 5], image_grid=(2, 2))
    )
    shape = (2, 9, 2, 8) if padded else (13, 2, 8)
    q, k, v = torch.randn(3, *shape), torch.randn(3, *shape), torch.randn(*shape)
    table = torch.randn(3, 2, 3, 3)

    def op(q, k, table):
        return prefix_attention(q, k, v, layout, rel_bias=table, impl="cpp")

    got = torch.vmap(op)(q, k, table)
    want = torch.stack([op(*item) for item in zip(q, k, table, strict=True)])
    torch.testing.assert_close(got, want)
    grads = []
    for call in (torch.vmap(op), lambda *leaves: torch.stack([op(*item) for item in zip(*leaves, strict=True)])):
        leaves = [x.clone().requires_grad_() for x in (q, k, table)]
        (call(*leaves) ** 2).sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(*grads)

    x = q[0].clone().requires_grad_()
    out = op(x, k[0], table[0])
    cotangents = torch.randn(4, *out.shape)
    batched = torch.vmap(lambda c: torch.autograd.grad(out, x, c, retain_graph=True)[0])(cotangents)
    single = torch.stack([torch.autograd.grad(out, x, c, retain_graph=True)[0] for c in cotangents])
    torch.testing.assert_close(batched, single)


def test_double_backward_and_jvp_name_what_is_missing():
    layout = PrefixLayout.packed([6], prefix_lens=2)
    q, k, v = (torch.randn(6, 1, 8, requires_grad=True) for _ in range(3))
    out = prefix_attention(q, k, v, layout, impl="cpp")
    (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"prefix_attention: double backward.*impl='reference'"):
        dq.sum().backward()
    op = lambda q: prefix_attention(q, k.detach(), v.detach(), layout, impl="cpp")  # noqa: E731
    q = q.detach()
    with pytest.raises(NotImplementedError, match=r"prefix_attention: torch.func.jvp.*impl='reference'"):
        torch.func.jvp(op, (q,), (q,))
    with pytest.raises(NotImplementedError, match=r"prefix_attention: torch.func.grad"):
        torch.func.grad(lambda q: op(q).sum())(q)
    with pytest.raises(NotImplementedError, match=r"prefix_attention: torch.func.grad"):
        torch.func.grad(lambda q: torch.vmap(op)(q[None]).sum())(q)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="prefix_attention: forward-mode"):
        op(forward_ad.make_dual(q, q))


def test_reference_differentiates_twice():
    layout = PrefixLayout.packed([5, 3], prefix_lens=[2, 0], image_grid=(2, 2), has_image=[True, False])
    q, k, v = (torch.randn(9, 1, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    table = torch.randn(1, 3, 3, dtype=torch.float64, requires_grad=True)

    def op(q, k, v, table):
        out, lse = prefix_attention(q, k, v, layout, rel_bias=table, return_lse=True, impl="reference")
        return out, lse[:8]  # the ninth row belongs to nobody: its lse is -inf

    assert torch.autograd.gradcheck(op, (q, k, v, table))
    assert torch.autograd.gradgradcheck(op, (q, k, v, table))


def test_what_no_kernel_takes_falls_to_the_reference():
    """float64, through the registered op, whose backward differentiates the reference again."""
    layout = PrefixLayout.packed([5, 3], prefix_lens=[2, 0], image_grid=(2, 2), has_image=[True, False])
    grads = []
    for impl in (None, "reference"):
        torch.manual_seed(0)
        leaves = [torch.randn(9, 1, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
        out = prefix_attention(*leaves, layout, impl=impl)
        assert out.dtype == torch.float64
        (out**2).sum().backward()
        grads.append([out, *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_gradients_only_where_asked():
    layout = PrefixLayout.packed([6], image_grid=(2, 2))
    tensors = [torch.randn(6, 1, 8) for _ in range(3)]
    table = torch.randn(1, 3, 3)
    whole = [x.clone().requires_grad_() for x in (*tensors, table)]
    prefix_attention(*whole[:3], layout, rel_bias=whole[3], impl="cpp").sum().backward()
    for index in range(4):
        leaves = [x.clone().requires_grad_(i == index) for i, x in enumerate((*tensors, table))]
        prefix_attention(*leaves[:3], layout, rel_bias=leaves[3], impl="cpp").sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == [i == index for i in range(4)]
        assert torch.equal(leaves[index].grad, whole[index].grad)


def test_a_low_precision_table_gets_its_own_dtype_back():
    layout = PrefixLayout.packed([6], image_grid=(2, 2))
    q, k, v = (torch.randn(6, 1, 8) for _ in range(3))
    table = torch.randn(1, 3, 3).bfloat16().requires_grad_()
    prefix_attention(q, k, v, layout, rel_bias=table).sum().backward()
    assert table.grad.dtype == torch.bfloat16


# ---- the cost model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("q_lens", "k_lens", "direction", "itemsize", "expected"),
    [
        ((4096,), (4096,), "forward", 2, 1e3 * (4 * 4096 * 4096 * 2 * 64) / 790e12),
        ((4096,), (4096,), "both", 2, 1e3 * (14 * 4096 * 4096 * 2 * 64) / 790e12),
        # One query a sequence: q, out (2), k, v (2), lse in float32.
        ((1,), (4096,), "forward", 2, 1e3 * (2 * (2 * 128 + 2 * 4096 * 128) + 2 * 4) / 4.3e12),
        ((1,), (4096,), "forward", 4, 1e3 * (4 * (2 * 128 + 2 * 4096 * 128) + 2 * 4) / 4.3e12),
    ],
)
def test_least_time_is_the_products_or_the_traffics(q_lens, k_lens, direction, itemsize, expected):
    case = spec.Case(name="", q_lens=q_lens, k_lens=k_lens, cross=True, tail=0, heads=2, head_dim=64)
    assert spec.least_ms(case, direction, itemsize) == pytest.approx(expected, rel=1e-12)
