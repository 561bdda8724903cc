"""The C++ kernels behind XLA's door: what is JAX's own in them. Parity is asked of every implementation elsewhere."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from simvlm import _cpp
from simvlm.kernels import (
    PrefixLayout,
    UnsupportedError,
    cpp_module,
    cpp_xla,
    parity,
    prefix_attention,
)
from simvlm.kernels.attention import spec
from simvlm.kernels.attention.layout import BOUNDS
from simvlm.kernels.stem import batch_norm_spec, embed_spec

CASES = {of: {case.name: case for case in of.CASES} for of in (spec, batch_norm_spec, embed_spec)}
TABLE = CASES[spec]["decode_chunk_table"]
SOME = [
    (spec, CASES[spec]["decode_chunk_table"]),
    (spec, CASES[spec]["padded_ragged"]),
    (batch_norm_spec, CASES[batch_norm_spec]["branch_residual"]),
    (embed_spec, CASES[embed_spec]["mixed_identity"]),
]
some = pytest.mark.parametrize(("of", "case"), SOME, ids=[case.name for _, case in SOME])


def _arrays(of, case, dtype="float32"):
    return {
        name: jnp.asarray(x, "float32" if name in parity.PARAMETERS else dtype)
        for name, x in of.make_inputs(case).items()
    }


def _leaves(of, arrays):
    return {name: arrays[name] for name in of.DIFFERENTIABLE if name in arrays}


def _loss(of, case, arrays, layout=None):
    """A function of the differentiable inputs: Σ output² · cotangent."""
    layout = case.layout() if layout is None else layout

    def loss(leaves):
        outputs = dict(zip(of.OUTPUTS, of.call(case, layout, arrays | leaves, "cpp"), strict=True))
        total = 0.0
        for name, output in outputs.items():
            if f"d{name}" in arrays:
                cotangent = jnp.broadcast_to(jnp.nan_to_num(arrays[f"d{name}"]), output.shape)
                total += jnp.where(jnp.isfinite(output) & (cotangent != 0), output**2 * cotangent, 0).sum()
        return total

    return loss


def _equal(a, b):
    return all(
        np.array_equal(np.asarray(x), np.asarray(y), equal_nan=True)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def _gradients(of, case, arrays, names=None):
    leaves = _leaves(of, arrays)
    return jax.jit(jax.grad(_loss(of, case, arrays)))({name: leaves[name] for name in names or leaves})


# ---- the same bits, however the call is made -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_torch_and_jax_get_the_same_bits(dtype):
    case = CASES[spec]["edges_prefix_table"]
    inputs = {name: torch.from_numpy(x) for name, x in parity.rounded_inputs(spec, case, dtype).items()}
    tensors = {name: x if name in parity.PARAMETERS else x.to(parity.DTYPES[dtype]) for name, x in inputs.items()}
    want = spec.call(case, case.layout(), tensors, "cpp")
    got = spec.call(case, case.layout(), _arrays(spec, case, dtype), "cpp")
    for a, b in zip(got, want, strict=True):
        assert np.asarray(a).astype(np.float32).tobytes() == b.float().numpy().tobytes()


@some
def test_each_gradient_alone_has_the_same_bits_and_no_other_is_computed(of, case):
    arrays = _arrays(of, case)
    together = _gradients(of, case, arrays)
    for name in together:
        assert _equal(_gradients(of, case, arrays, [name]), {name: together[name]})


def test_a_gradient_that_nobody_asks_for_is_no_result_of_the_call():
    arrays, layout = _arrays(spec, TABLE), TABLE.layout()

    def calls(*names):
        leaves = {name: arrays[name] for name in names}
        program = jax.jit(jax.grad(_loss(spec, TABLE, arrays, layout))).lower(leaves).as_text()
        (line,) = [line for line in program.splitlines() if "simvlm.attention_backward" in line]
        return re.findall(r"tensor<([\dx]+)x\w+>", line.rpartition("->")[2])

    shape = ["x".join(map(str, arrays[name].shape)) for name in spec.DIFFERENTIABLE]
    assert calls(*spec.DIFFERENTIABLE) == shape
    assert calls("rel_bias") == ["0", "0", "0", shape[3]]
    assert calls("k", "v") == ["0", shape[1], shape[2], "0"]


@some
def test_checkpoint_recomputes_the_same_bits(of, case):
    arrays = _arrays(of, case)
    loss = _loss(of, case, arrays)
    leaves = _leaves(of, arrays)
    assert _equal(jax.jit(jax.grad(jax.checkpoint(loss)))(leaves), jax.jit(jax.grad(loss))(leaves))


@some
def test_vmap_is_a_loop(of, case):
    """Twice, and with arrays that are not mapped: to the same bits as one call after the other."""
    arrays = _arrays(of, case)
    leaves = _leaves(of, arrays)
    first, *_ = leaves
    for mapped in ([first], list(leaves), [name for name in leaves if name != first]):
        fixed = {name: x for name, x in leaves.items() if name not in mapped}
        batch = {
            name: jnp.stack([x, 2 * x, -x, x / 3]).reshape(2, 2, *x.shape)
            for name, x in leaves.items()
            if name in mapped
        }
        run = jax.grad(_loss(of, case, arrays | fixed))
        got = jax.jit(jax.vmap(jax.vmap(run)))(batch)
        one = jax.jit(run)
        for i in range(2):
            for j in range(2):
                element = {name: x[i, j] for name, x in batch.items()}
                assert _equal({name: x[i, j] for name, x in got.items()}, one(element))


def test_vmap_over_layouts():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((24, 2, 16)), jnp.float32) for _ in range(3))
    layouts = [
        PrefixLayout.packed(lens, prefix_lens=4, max_q_len=16, max_k_len=16) for lens in ([9, 15], [16, 8], [4, 5])
    ]
    stacked = dataclasses.replace(layouts[0], bounds=jnp.stack([layout.bounds for layout in layouts]))
    got = jax.vmap(lambda layout: prefix_attention(q, k, v, layout, impl="cpp"))(stacked)
    assert _equal(list(got), [prefix_attention(q, k, v, layout, impl="cpp") for layout in layouts])


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, PartitionSpec as P
from simvlm.kernels import PrefixLayout, prefix_attention
assert jax.device_count() == 8
mesh = Mesh(np.array(jax.devices()), ("data",))
rng = np.random.default_rng(0)
q, k, v = (jnp.asarray(rng.standard_normal((16, 130, 2, 32)), jnp.float32) for _ in range(3))
table = jnp.asarray(rng.standard_normal((2, 11, 13)), jnp.float32)
lens = jnp.asarray(rng.integers(60, 131, 16), jnp.int32)

def loss(q, k, v, table, lens):
    layout = PrefixLayout.padded(len(lens), 130, q_lens=lens, prefix_lens=lens // 2, image_grid=(6, 7))
    return (prefix_attention(q, k, v, layout, rel_bias=table, impl="cpp") ** 2).sum()

def grads(q, k, v, table, lens):
    return jax.grad(loss, (0, 1, 2, 3))(q, k, v, table, lens)

def shard(q, k, v, table, lens):
    *own, dtable = grads(q, k, v, jax.lax.pcast(table, "data", to="varying"), lens)
    return *own, jax.lax.psum(dtable, "data")

data = P("data")
specs = dict(in_specs=(data, data, data, P(), data), out_specs=(data, data, data, P()))
parts = jax.jit(jax.shard_map(shard, mesh=mesh, **specs))(q, k, v, table, lens)
whole = jax.jit(grads)(q, k, v, table, lens)
for got, want in zip(parts[:3], whole[:3]):
    assert np.array_equal(got, want)  # a sequence's gradients do not depend on its batch
print(float(jnp.abs(parts[3] - whole[3]).max() / jnp.abs(whole[3]).max()) < 1e-5)
"""


def _python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True)


def test_shard_map_on_eight_devices():
    done = _python(SHARDED, XLA_FLAGS="--xla_force_host_platform_device_count=8", SIMVLM_NUM_THREADS="2")
    assert done.stdout == "True\n", done.stderr


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "value", "message"),
    [
        ("q_lens", 40, r"layout must stay within the storage, got query rows 0 to 40 of 6 for sequence 0"),
        ("k_starts", -1, r"got key rows -1 to 3 of 6 for sequence 0"),
        ("prefix_lens", -5, r"got prefix_lens -5 for sequence 0"),
        ("image_lens", 9, r"got image_lens 9 for sequence 0"),
    ],
)
def test_a_layout_that_leaves_the_storage_is_an_error_at_run_time(row, value, message):
    """As numpy callers get it, and the process lives on."""
    layout = PrefixLayout.packed([4, 2], prefix_lens=0)
    bounds = layout.bounds.copy()
    bounds[BOUNDS.index(row), 0] = value
    x = np.ones((6, 2, 16), np.float32)
    with pytest.raises(ValueError, match=message):
        prefix_attention(x, x, x, dataclasses.replace(layout, bounds=bounds))
    attend = jax.jit(lambda x, layout: prefix_attention(x, x, x, layout, impl="cpp"))
    with pytest.raises(Exception, match=f"INVALID_ARGUMENT.*prefix_attention: .*{message[message.index('got') :]}"):
        attend(jnp.asarray(x), dataclasses.replace(layout, bounds=jnp.asarray(bounds))).block_until_ready()
    assert np.array_equal(attend(x, layout), x)


def test_what_cannot_be_differentiated_says_so():
    for of, case in SOME:
        arrays = _arrays(of, case)
        name = next(iter(_leaves(of, arrays)))
        gradient = jax.grad(_loss(of, case, arrays))
        op = {spec: "prefix_attention", batch_norm_spec: "batch_norm_act", embed_spec: "embed_sequence"}[of]
        with pytest.raises(NotImplementedError, match=f"{op}: double backward is not supported by impl='cpp'"):
            jax.grad(lambda leaf: gradient({name: leaf})[name].sum())(arrays[name])  # noqa: B023
        with pytest.raises(TypeError, match="custom_vjp"):
            jax.jvp(lambda leaf: _loss(of, case, arrays)({name: leaf}), (arrays[name],), (arrays[name],))  # noqa: B023


def test_overlapping_keys_take_no_gradient():
    beams = PrefixLayout.packed([1, 1], [7, 7], k_starts=[0, 0], cross=True)
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((rows, 1, 8)), jnp.float32) for rows in (2, 7))
    assert jax.jit(jax.grad(lambda q: prefix_attention(q, k, k, beams, impl="cpp").sum()))(q).any()
    for argument in (1, 2):
        with pytest.raises(ValueError, match="must not be differentiated where the layout's key ranges overlap"):
            jax.grad(lambda *qkv: prefix_attention(*qkv, beams, impl="cpp").sum(), argument)(q, k, k)


def test_refused_calls(monkeypatch):
    layout = PrefixLayout.packed([2])
    with jax.enable_x64(True):
        wide = jnp.zeros((2, 1, 8), jnp.float64)
        with pytest.raises(UnsupportedError, match="cpp: takes float32, bfloat16, float16, got float64"):
            prefix_attention(wide, wide, wide, layout, impl="cpp")
    x = jnp.zeros((2, 1, 8))
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    with pytest.raises(UnsupportedError, match="cpp: runs on the CPU, jax's default backend is tpu"):
        prefix_attention(x, x, x, layout, impl="cpp")
    assert prefix_attention(x, x, x, layout).shape == x.shape  # by another


def test_a_module_without_the_door_or_with_one_too_new_says_so(monkeypatch):
    ask = cpp_xla.unavailable.__wrapped__
    monkeypatch.setattr(cpp_module, "compiled", object)
    assert ask() == "built without jax's headers: install jax, then reinstall"
    newer = types.SimpleNamespace(xla_targets=dict, xla_interface=(0, 99))
    monkeypatch.setattr(cpp_module, "compiled", lambda: newer)
    assert re.match(r"built for version 0\.99 of XLA's foreign function interface, jax [\d.]+ has 0\.\d+:", ask())
    assert _cpp.xla_interface <= cpp_xla._interface()


# ---- in one process with others --------------------------------------------------------------------------------------


def test_denormals_are_kept_at_every_level():
    """XLA's threads flush them to zero; the kernels must not, nor the pool's threads after them."""
    tiny = np.float16(6e-8)
    x = np.zeros((2000, 4, 8), np.float16)
    v = np.full_like(x, tiny)
    layout = PrefixLayout.packed([2000])
    want = prefix_attention(x, x, v, layout)
    assert want.min() == tiny
    try:
        for name, runs in _cpp.levels():
            if runs:
                _cpp.select_level(name)
                got = jax.jit(lambda x, v: prefix_attention(x, x, v, layout, impl="cpp"))(x, v)
                assert np.array_equal(np.asarray(got), want)
    finally:
        _cpp.select_level(None)


def test_the_pool_serves_jax_where_torch_is_loaded():
    code = """
import os, torch
import jax, jax.numpy as jnp
from simvlm.kernels import PrefixLayout, prefix_attention
x = jnp.ones((2000, 4, 64))
layout = PrefixLayout.packed([2000])
attend = jax.jit(lambda x: prefix_attention(x, x, x, layout, impl="cpp"))
before = None
for _ in range(20):
    attend(x).block_until_ready()
    before = before or len(os.listdir("/proc/self/task"))
print(len(os.listdir("/proc/self/task")) - before)
"""
    done = _python(code, SIMVLM_NUM_THREADS="3", OMP_NUM_THREADS="3")
    assert done.stdout == "0\n", done.stderr


def _resident_kib() -> int:
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1])


@pytest.mark.parametrize("name", [case.name for _, case in SOME])
def test_thousands_of_calls_leave_memory_where_it_was(name):
    ((of, case),) = [(of, case) for of, case in SOME if case.name == name]
    arrays = _arrays(of, case)
    step = jax.jit(jax.grad(_loss(of, case, arrays)))
    leaves = _leaves(of, arrays)
    for _ in range(1_000):
        jax.block_until_ready(step(leaves))
    growths = []
    for _ in range(4):  # what leaks grows each time; the allocator settles now and then
        before = _resident_kib()
        for _ in range(2_000):
            jax.block_until_ready(step(leaves))
        growths.append(_resident_kib() - before)
    assert min(growths) < 512, growths
