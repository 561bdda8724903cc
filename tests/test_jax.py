"""What is JAX's own in plain JAX: transformations, compilation, gradients asked one by one. Parity is asked of every
implementation elsewhere."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simvlm.kernels import PrefixLayout, UnsupportedError, parity, prefix_attention
from simvlm.kernels.attention import spec, xla

CASES = {case.name: case for case in spec.CASES}
TABLE = CASES["decode_chunk_table"]


@pytest.fixture(autouse=True)
def plain_jax(monkeypatch):
    """Not the first that takes the call, which on a CPU is another."""
    monkeypatch.setenv("SIMVLM_IMPL", "xla")


def _arrays(case, dtype="float32"):
    return {
        name: jnp.asarray(x, "float32" if name in parity.PARAMETERS else dtype)
        for name, x in spec.make_inputs(case).items()
    }


def _outputs(case, arrays, layout=None):
    layout = case.layout() if layout is None else layout
    return jax.jit(lambda arrays: spec.call(case, layout, arrays, "xla"))(arrays)


def _gradients(case, arrays, names, layout=None):
    """Of <out, dout> + <lse, dlse> over the rows that somebody owns."""
    owned, _ = spec.owned_rows(case)

    def loss(leaves):
        out, lse = _outputs(case, arrays | leaves, layout)
        seen = owned[..., None] & jnp.isfinite(lse)
        return (
            jnp.where(owned[..., None, None], out * arrays["dout"], 0).sum()
            + jnp.where(seen, lse * arrays["dlse"], 0).sum()
        )

    return jax.jit(jax.grad(loss))({name: arrays[name] for name in names})


def _equal(a, b):
    return all(
        np.array_equal(np.asarray(x), np.asarray(y), equal_nan=True)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def test_importing_the_kernels_imports_no_jax():
    program = "import sys, simvlm.kernels; assert not {'jax', 'torch', 'triton'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_one_program_serves_every_length_of_a_bucket():
    """The layout is an argument under jit; neither its lengths nor the rows in use are compiled in."""
    traces = []

    @jax.jit
    def step(q, k, v, table, layout):
        traces.append(layout)
        return jax.value_and_grad(lambda q: prefix_attention(q, k, v, layout, rel_bias=table).sum())(q)

    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((64, 2, 16)), jnp.float32) for _ in range(3))
    table = jnp.asarray(rng.standard_normal((2, 3, 5)), jnp.float32)
    for lens, prefixes in (([31, 20], [6, 9]), ([7, 29], [6, 0]), ([25, 32], [25, 32])):
        layout = PrefixLayout.packed(lens, prefix_lens=prefixes, image_grid=(2, 3), max_q_len=32, max_k_len=32)
        _, dq = step(q, k, v, table, layout)
        assert not dq[sum(lens) :].any()
        assert dq[: sum(lens)].any()
    assert len(traces) == 1


@pytest.mark.parametrize("name", ["decode_chunk_table", "padded_ragged"])
def test_layouts_built_under_jit_equal_those_built_outside(name):
    case = CASES[name]
    arrays = _arrays(case)
    layout = jax.tree.map(jnp.asarray, case.layout())
    inside = jax.jit(lambda arrays, layout: _outputs(case, arrays, layout))(arrays, layout)
    assert _equal(inside, jax.jit(lambda arrays: _outputs(case, arrays))(arrays))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["base_encoder", "edges_prefix_table"])
def test_the_same_call_is_bit_equal(name, dtype):
    case = dataclasses.replace(CASES[name], heads=1)
    arrays = _arrays(case, dtype)
    both = jax.jit(lambda arrays: (_outputs(case, arrays), _gradients(case, arrays, spec.DIFFERENTIABLE)))
    first = both(arrays)
    assert _equal(both(arrays), first)


def test_known_and_unknown_offsets_agree():
    """Where no sequence has an offset all share one slice of the table; else each takes its own."""
    case = dataclasses.replace(CASES["base_encoder"], q_lens=(230,), has_image=None, heads=1)
    arrays, known = _arrays(case), case.layout()
    unknown = dataclasses.replace(known, at_origin=False)
    assert known.at_origin
    assert not TABLE.layout().at_origin
    assert _equal(_outputs(case, arrays, known), _outputs(case, arrays, unknown))
    one, other = (_gradients(case, arrays, spec.DIFFERENTIABLE, layout) for layout in (known, unknown))
    assert _equal(one, other)


def test_each_gradient_alone_has_the_same_bits():
    arrays = _arrays(TABLE)
    together = _gradients(TABLE, arrays, spec.DIFFERENTIABLE)
    for name in spec.DIFFERENTIABLE:
        assert _equal(_gradients(TABLE, arrays, [name]), {name: together[name]})


def test_a_cotangent_that_is_absent_is_zero():
    arrays, layout = _arrays(TABLE), TABLE.layout()
    names = spec.DIFFERENTIABLE
    outputs, pull = jax.vjp(
        lambda leaves: _outputs(TABLE, arrays | leaves, layout), {name: arrays[name] for name in names}
    )
    out, lse = outputs
    dout = jnp.where(jnp.isnan(arrays["dout"]), 0, arrays["dout"])
    (explicit,) = jax.jit(pull)((dout, jnp.zeros_like(lse)))

    def loss(leaves):
        return (prefix_attention(*(leaves[n] for n in "qkv"), layout, rel_bias=leaves["rel_bias"]) * dout).sum()

    assert _equal(jax.jit(jax.grad(loss))({name: arrays[name] for name in names}), explicit)


class _Mapped:
    """The spec with a call that maps over two different queries and hands back the first's outputs."""

    def __getattr__(self, name):
        return getattr(spec, name)

    def call(self, case, layout, inputs, impl):
        if impl == "reference":
            return spec.call(case, layout, inputs, impl)
        mapped = jax.vmap(lambda q: spec.call(case, layout, inputs | {"q": q}, impl))
        return tuple(x[0] for x in mapped(jnp.stack([inputs["q"], 2 * inputs["q"]])))


def test_parity_under_vmap():
    assert not parity.violations(_Mapped(), TABLE, "jax", "xla", "float32")


def test_checkpoint_recomputes_the_same_bits():
    arrays = _arrays(TABLE)

    def loss(q):
        return prefix_attention(q, arrays["k"], arrays["v"], TABLE.layout(), rel_bias=arrays["rel_bias"]).sum()

    assert _equal(jax.jit(jax.grad(jax.checkpoint(loss)))(arrays["q"]), jax.jit(jax.grad(loss))(arrays["q"]))


# ---- refusals ------------------------------------------------------------------------------------------------------


def test_what_cannot_be_differentiated_says_so():
    arrays = _arrays(TABLE)

    def loss(q):
        return prefix_attention(q, arrays["k"], arrays["v"], TABLE.layout()).sum()

    with pytest.raises(NotImplementedError, match="prefix_attention: double backward is not supported"):
        jax.grad(lambda q: jax.grad(loss)(q).sum())(arrays["q"])
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(loss, (arrays["q"],), (arrays["q"],))


def test_overlapping_keys_take_no_gradient():
    beams = PrefixLayout.packed([1, 1], [7, 7], k_starts=[0, 0], cross=True)
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((rows, 1, 8)), jnp.float32) for rows in (2, 7))
    assert jax.jit(jax.grad(lambda q: prefix_attention(q, k, k, beams).sum()))(q).any()
    for argument in (1, 2):
        with pytest.raises(ValueError, match="must not be differentiated where the layout's key ranges overlap"):
            jax.grad(lambda *qkv: prefix_attention(*qkv, beams).sum(), argument)(q, k, k)


def test_refused_calls():
    x, grid = jnp.zeros((2, 1, 8)), (300, 300)
    with pytest.raises(UnsupportedError, match=r"image_grid \(300, 300\) is too large"):
        prefix_attention(x, x, x, PrefixLayout.packed([2], image_grid=grid), rel_bias=jnp.zeros((1, 599, 599)))
    with jax.enable_x64(True):
        wide = jnp.zeros((2, 1, 8), jnp.float64)
        with pytest.raises(UnsupportedError, match="got float64"):
            prefix_attention(wide, wide, wide, PrefixLayout.packed([2]))
    assert xla.unavailable() is None
