"""What only an NVIDIA GPU can show: graphs, synchronisation, large offsets, inductor, compilations, memory, bfloat16.

Needs torch, Triton, numpy and pytest alone.
"""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch

from simvlm.kernels import PrefixLayout, UnsupportedError, batch_norm_act, embed_sequence, parity, prefix_attention
from simvlm.kernels.attention import spec as attention_spec
from simvlm.kernels.stem import batch_norm_spec, embed_spec

pytestmark = pytest.mark.skipif(not torch.cuda.is_available() or torch.version.hip is not None, reason="no NVIDIA GPU")

DEVICE = "cuda"
GRID = (14, 14)
SPECS = {"prefix_attention": attention_spec, "batch_norm_act": batch_norm_spec, "embed_sequence": embed_spec}
PARITY = [
    ("prefix_attention", "head_dim_64"),
    ("prefix_attention", "head_dim_80"),
    ("prefix_attention", "edges_prefix_table"),
    ("prefix_attention", "base_encoder"),
    ("prefix_attention", "decode_long"),
    ("batch_norm_act", "branch_residual"),
    ("batch_norm_act", "large_mean"),
    ("embed_sequence", embed_spec.CASES[0].name),
]


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=DEVICE).to(dtype)


def layout_of(padded: bool, lens: tuple[int, ...] = (230, 60)) -> PrefixLayout:
    shared = {"prefix_lens": [n // 2 for n in lens], "image_grid": GRID, "has_image": [n >= 196 for n in lens]}
    if padded:
        return PrefixLayout.padded(len(lens), max(lens), q_lens=list(lens), **shared).to(DEVICE)
    return PrefixLayout.packed(list(lens), **shared).to(DEVICE)


def attention_step(layout, storage, heads=2, head_dim=64):
    """(make inputs from a seed, step from inputs to outputs and gradients) of attention with a table."""

    def inputs(seed: int) -> list[torch.Tensor]:
        qkv = [normal(*storage, heads, head_dim, seed=10 * seed + i) for i in range(4)]
        return [*qkv, normal(heads, 27, 27, dtype=torch.float32, seed=10 * seed + 4)]

    def step(q, k, v, dout, table):
        leaves = [x.detach().requires_grad_() for x in (q, k, v, table)]
        out = prefix_attention(*leaves[:3], layout, rel_bias=leaves[3], impl="triton")
        return (out.detach(), *torch.autograd.grad(out, leaves, dout))

    return inputs, step


def batch_norm_step():
    def inputs(seed: int) -> list[torch.Tensor]:
        images = [normal(3, 9, 8, 48, seed=10 * seed + i) for i in range(3)]
        return [*images, *(normal(48, dtype=torch.float32, seed=10 * seed + i) for i in (3, 4))]

    def step(x, residual, dy, weight, bias):
        leaves = [leaf.detach().requires_grad_() for leaf in (x, weight, bias, residual)]
        y, mean, var = batch_norm_act(*leaves[:3], residual=leaves[3], impl="triton")
        return (y.detach(), mean, var, *torch.autograd.grad(y, leaves, dy))

    return inputs, step


def embed_step():
    layout = layout_of(False)

    def inputs(seed: int) -> list[torch.Tensor]:
        shapes = [(1, *GRID, 32), (64, 32), (64,), (196, 64), (94, 64), (290, 64)]
        return [normal(*shape, seed=10 * seed + i) for i, shape in enumerate(shapes)]

    def step(features, weight, bias, positions, text, drows):
        leaves = [x.detach().requires_grad_() for x in (features, weight, bias, positions, text)]
        rows = embed_sequence(*leaves, layout, impl="triton")
        return (rows.detach(), *torch.autograd.grad(rows, leaves, drows))

    return inputs, step


STEPS = {
    "packed": lambda: attention_step(layout_of(False), (290,)),
    "padded": lambda: attention_step(layout_of(True), (2, 230)),
    "batch_norm": batch_norm_step,
    "embed": embed_step,
}


@pytest.fixture(params=STEPS)
def step_of(request):
    return STEPS[request.param]()


def test_a_captured_graph_replays_new_values(step_of):
    inputs, step = step_of
    static = inputs(0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step(*static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*static)
    for seed in (1, 2):
        new = inputs(seed)
        for x, value in zip(static, new, strict=True):
            x.copy_(value)
        graph.replay()
        for got, wanted in zip(captured, step(*new), strict=True):
            assert torch.equal(got, wanted)


def test_nothing_waits_for_the_device(step_of):
    inputs, step = step_of
    values = inputs(0)
    step(*values)  # compiles, and loads kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*values)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextlib.contextmanager
def plain_empty():
    """Without NaN in fresh memory and without torch's own deterministic detours."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def test_offsets_past_2_31_elements():
    """Two sequences at the end of storage of more than 2^31 elements, and the same two at its front."""
    heads, head_dim, lens = 16, 128, (230, 60)
    total = sum(lens)
    skipped = 2**31 // (heads * head_dim) + 64  # rows before them, which nobody owns
    if torch.cuda.mem_get_info()[0] < 45 * 2**30:
        pytest.skip("needs 45 GiB of GPU memory")
    inputs, step = attention_step(layout_of(False, lens), (total,), heads, head_dim)
    near = inputs(0)
    wanted = step(*near)
    bounds = layout_of(False, lens).bounds.clone()
    bounds[0] += skipped
    bounds[2] += skipped
    front = layout_of(False, lens)
    layout = PrefixLayout(
        bounds=bounds,
        padded_shape=None,
        image_grid=GRID,
        max_q_len=front.max_q_len,
        max_k_len=front.max_k_len,
        q_rows=skipped + total,
        k_rows=skipped + total,
        at_origin=True,
    )
    with plain_empty():
        far = []
        for x in near[:4]:
            room = torch.zeros(skipped + total, heads, head_dim, dtype=x.dtype, device=DEVICE)
            room[skipped:] = x
            far.append(room)
        _, step = attention_step(layout, (skipped + total,), heads, head_dim)
        got = step(*far, near[4])
    for name, a, b in zip(("out", "dq", "dk", "dv", "dtable"), got, wanted, strict=True):
        assert torch.equal(a[-total:] if name != "dtable" else a, b), name


def test_batch_norm_past_2_31_elements():
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GiB of GPU memory")
    channels, image = 64, 1024 * 1024 * 64
    weight, bias = normal(channels, dtype=torch.float32), normal(channels, dtype=torch.float32, seed=1)
    mean, var = torch.zeros(channels, device=DEVICE), torch.ones(channels, device=DEVICE)
    with plain_empty():
        x = torch.zeros(2**31 // image + 1, 1024, 1024, channels, dtype=torch.bfloat16, device=DEVICE)
        x[-1] = normal(1024, 1024, channels)
        y, _, _ = batch_norm_act(x, weight, bias, mean=mean, var=var, impl="triton")
        last, _, _ = batch_norm_act(x[-1:].clone(), weight, bias, mean=mean, var=var, impl="triton")
    assert torch.equal(y[-1:], last)


@pytest.mark.filterwarnings("ignore")
def test_inductor_computes_what_eager_does():
    layout = layout_of(False)
    inputs, _ = attention_step(layout, (290,))
    q, k, v, dout, table = inputs(0)

    def loss(q, k, v, table, layout):
        out = prefix_attention(q, k, v, layout, rel_bias=table, impl="triton")
        return (out.float() * dout.float()).sum()

    found = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        leaves = [x.detach().requires_grad_() for x in (q, k, v, table)]
        value = function(*leaves, layout)
        found.append((value.detach(), *torch.autograd.grad(value, leaves)))
    # The sum is another kernel's; what goes into the op and comes out of it is the same.
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-4, atol=1e-2)
    for a, b in zip(found[1][1:], found[0][1:], strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore")
def test_a_model_step():
    """Loss and gradients on the GPU, finite, and the same bits twice."""
    from model_cases import TINY, packed

    from simvlm.model import SimVLM

    torch.manual_seed(0)
    model = SimVLM(TINY).to(DEVICE)
    inputs = packed(TINY, [(True, 3, 5), (False, 7, 4), (True, 0, 6)]).inputs(TINY).to(DEVICE)

    def step() -> list[torch.Tensor]:
        with torch.autocast("cuda", torch.bfloat16):
            logits = model.logits(model(inputs))
        loss = logits.float().logsumexp(-1).mean()
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)]

    for a, b in zip(step(), step(), strict=True):
        assert (a is None) == (b is None)
        assert a is None or (bool(a.isfinite().all()) and torch.equal(a, b))


def test_new_lengths_compile_nothing():
    from triton import knobs

    compiled: list[str] = []

    def hook(*_args: object, **kwargs: object) -> bool:
        compiled.append(str(kwargs.get("repr")))
        return False

    def run(lens: tuple[int, ...]) -> None:
        for padded in (False, True):
            storage = (len(lens), max(lens)) if padded else (sum(lens),)
            inputs, step = attention_step(layout_of(padded, lens), storage, head_dim=40)  # no other test's: all is new
            step(*inputs(0))

    before, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, hook
    try:
        for lens in ((230, 60), (600, 230)):  # from 513 keys on, few queries may be split
            run(lens)
        assert compiled  # else the hook would see nothing below either
        compiled.clear()
        rng = np.random.default_rng(0)
        for batch in (1, 2, 3, 7):
            run(tuple(int(n) for n in (200, *rng.integers(1, 700, batch - 1))))
    finally:
        knobs.runtime.jit_cache_hook = before
    assert not compiled


def test_memory_is_linear_at_16k_tokens():
    """Beyond inputs and outputs: at most four arrays of q's size in bytes."""
    length, heads, head_dim = 16384, 2, 64
    layout = PrefixLayout.packed([length], prefix_lens=[length // 2]).to(DEVICE)
    q, k, v, dout = (normal(length, heads, head_dim, seed=i).requires_grad_(i < 3) for i in range(4))

    def step():
        out = prefix_attention(q, k, v, layout, impl="triton")
        return out, torch.autograd.grad(out, (q, k, v), dout)

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, grads = step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    results = sum(x.numel() * x.element_size() for x in (out, *grads))
    assert all(bool(x.isfinite().all()) for x in (out, *grads))
    assert peak - results <= 4 * q.numel() * q.element_size()


@pytest.mark.parametrize(("op", "name"), PARITY)
def test_parity_in_bfloat16(op, name):
    spec = SPECS[op]
    case = next(case for case in spec.CASES if case.name == name)
    found = parity.violations(spec, case, "torch", "triton", "bfloat16")
    assert not found, "\n".join(map(str, found))


def test_refusals():
    layout = PrefixLayout.packed([4])
    x = torch.zeros(4, 1, 8)
    with pytest.raises(UnsupportedError, match="tensors must be on an NVIDIA GPU, got cpu"):
        prefix_attention(x, x, x, layout, impl="triton")
    x = x.double().to(DEVICE)
    with pytest.raises(UnsupportedError, match="q must be float32, bfloat16 or float16, got float64"):
        prefix_attention(x, x, x, layout.to(DEVICE), impl="triton")
