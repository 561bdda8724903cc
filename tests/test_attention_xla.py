"""`prefix_attention` in plain JAX as XLA compiles it, here and ahead of time for TPU v3: which operations the program
holds, how its memory grows, what it moves; large grids, shard_map, vmap."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.topologies import get_topology_desc

from benchmarks.hbm_bytes import hbm_bytes
from simvlm.kernels import PrefixLayout, parity, prefix_attention
from simvlm.kernels.attention import spec
from simvlm.kernels.attention.spec import Case

DEVICES = ("cpu", "v3:2x2")


def _device(name):
    if name == "cpu":
        return jax.devices("cpu")[0]
    return get_topology_desc(platform="tpu", topology_name=name).devices[0]


def _compiled(device, layout, shape, key_shape=None, grid=None, dtype="bfloat16"):
    """out, lse and all gradients in one program, the layout an argument."""

    def step(q, k, v, table, layout, cotangents):
        def call(q, k, v, table):
            return prefix_attention(q, k, v, layout, rel_bias=table, return_lse=True, impl="xla")

        outputs, pull = jax.vjp(call, q, k, v, table)
        return outputs, pull(cotangents)

    sharding = jax.sharding.SingleDeviceSharding(_device(device))

    def struct(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    q, k = struct(shape, dtype), struct(key_shape or shape, dtype)
    table = None if grid is None else struct((shape[-2], 2 * grid[0] - 1, 2 * grid[1] - 1), "float32")
    layout = jax.tree.map(lambda x: struct(x.shape, "int32"), layout)
    cotangents = q, struct(shape[:-1], "float32")
    return jax.jit(step).lower(q, k, k, table, layout, cotangents).compile()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", ["padded", "packed", "decode"])
def test_no_gather_scatter_or_sort(form, device):
    grid = (6, 7)
    layout, shape, key_shape = {
        "padded": (PrefixLayout.padded(3, 100, image_grid=grid, prefix_lens=50), (3, 100, 2, 16), None),
        "packed": (PrefixLayout.packed([100, 70], image_grid=grid, prefix_lens=[50, 60]), (200, 2, 16), None),
        "decode": (
            PrefixLayout.packed([1, 5], [30, 60], q_offsets=[29, 20], prefix_lens=0, image_grid=grid),
            (6, 2, 16),
            (90, 2, 16),
        ),
    }[form]
    text = _compiled(device, layout, shape, key_shape, grid).as_text()
    opcodes = set(re.findall(r" ([a-z][a-z\-]*)\(", text))
    assert {"while", "dynamic-slice", "dynamic-update-slice"} <= opcodes
    assert not {name for name in opcodes if re.search("gather|scatter|sort", name)}


@pytest.mark.parametrize("device", ["cpu", pytest.param("v3:2x2", marks=pytest.mark.full)])
def test_memory_grows_with_the_rows(device):
    """Forward and backward with a table: eight times the length, at most eight times the memory (2D scores: 64)."""
    sizes = []
    for rows in (1024, 2048, 4096, 8192):
        layout = PrefixLayout.packed([rows], prefix_lens=900, image_grid=(30, 30))
        compiled = _compiled(device, layout, (rows, 2, 16), grid=(30, 30))
        sizes.append(compiled.memory_analysis().temp_size_in_bytes)
    for small, large in itertools.pairwise(sizes):
        assert large <= 2 * small
    assert sizes[-1] < 4 * 8192 * 8192


def test_memory_grows_with_storage_not_with_the_longest_sequence():
    """One sequence of 4096 rows and 255 of 16, of which unpacked arrays would hold 256 · 4096 rows."""
    layout = PrefixLayout.packed([4096] + [16] * 255)
    storage = 8192 * 2 * 16 * 4
    assert _compiled("cpu", layout, (8192, 2, 16), dtype="float32").memory_analysis().temp_size_in_bytes < 64 * storage


LARGE = (
    Case(name="grid_128", q_lens=(530,), image_grid=(128, 128), prefix_lens=0, heads=1, head_dim=8),
    Case(
        name="grid_70_offset",
        q_lens=(300, 20),
        k_lens=(640, 50),
        q_offsets=(333, 7),
        prefix_lens=(100, 50),
        image_grid=(70, 70),
        has_image=(True, False),
        heads=1,
        head_dim=8,
    ),
    Case(name="grid_tall", q_lens=(400,), image_grid=(390, 1), heads=1, head_dim=8),
)


@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_parity_with_large_grids(case):
    assert not parity.violations(spec, case, "jax", "xla", "float32")


def test_vmap_over_lengths():
    """Each mapped call has a layout of its own."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, 20, 2, 8)), jnp.float32) for _ in range(3))
    layouts = [
        PrefixLayout.packed(lens, prefix_lens=4, image_grid=(2, 2), max_q_len=16, max_k_len=16)
        for lens in ([9, 11], [13, 5])
    ]
    table = jnp.asarray(rng.standard_normal((2, 3, 3)), jnp.float32)

    def both(q, k, v, layout):
        def loss(q, table):
            out = prefix_attention(q, k, v, layout, rel_bias=table, impl="xla")
            return (out**2).sum(), out

        return jax.grad(loss, (0, 1), has_aux=True)(q, table)

    stacked = jax.tree.map(lambda *bounds: jnp.stack(bounds), *layouts)
    found = jax.jit(jax.vmap(both))(q, k, v, stacked)
    for index, layout in enumerate(layouts):
        alone = jax.jit(both)(q[index], k[index], v[index], layout)
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(alone), strict=True):
            np.testing.assert_array_equal(x[index], y)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, PartitionSpec as P
from simvlm.kernels import PrefixLayout, prefix_attention

rng = np.random.default_rng(0)
q, k, v = (jnp.asarray(rng.standard_normal((40, 2, 8)), jnp.float32) for _ in range(3))
table = jnp.asarray(rng.standard_normal((2, 3, 5)), jnp.float32)
layouts = [
    PrefixLayout.packed(lens, prefix_lens=7, image_grid=(2, 3), max_q_len=16, max_k_len=16)
    for lens in ([12, 8], [9, 10])
]
bounds = jnp.concatenate([layout.bounds for layout in layouts], 1)

def local(q, k, v, table, layout):
    return prefix_attention(q, k, v, layout, rel_bias=table, impl="xla")

mesh, rows = Mesh(np.array(jax.devices()), ("data",)), P("data")
layout_spec = jax.tree.map(lambda _: P(None, "data"), layouts[0])
sharded = jax.shard_map(local, mesh=mesh, in_specs=(rows, rows, rows, P(), layout_spec), out_specs=rows)
whole = jax.tree.map(lambda _: bounds, layouts[0])

def apart(q, k, v, table, _):
    parts = [local(*(x[20 * i : 20 * i + 20] for x in (q, k, v)), table, layout) for i, layout in enumerate(layouts)]
    return jnp.concatenate(parts)

def gradients(call):
    def loss(q, k, v, table):
        return (call(q, k, v, table, whole) ** 2).sum()
    return jax.jit(jax.value_and_grad(jax.checkpoint(loss), (0, 1, 2, 3)))(q, k, v, table)

(value, (dq, dk, dv, dtable)), (value_, (dq_, dk_, dv_, dtable_)) = gradients(sharded), gradients(apart)
for x, y in ((dq, dq_), (dk, dk_), (dv, dv_), (dtable, dtable_)):
    assert x.any() and np.array_equal(x, y), abs(x - y).max()
"""


def test_shard_map_runs_each_devices_sequences():
    """Two devices with two sequences each, under checkpoint; the table's gradient is summed over the devices."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    subprocess.run([sys.executable, "-c", SHARDED], check=True, env=environment, timeout=300)


# ---- the counter of HBM bytes ----------------------------------------------------------------------------------------

PROGRAM = """
%body (p: (s32[], f32[256,128])) -> (s32[], f32[256,128]) {
  %p = (s32[]{:T(128)}, f32[256,128]{1,0:T(8,128)}) parameter(0)
  %x = f32[256,128]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %near = f32[256,128]{1,0:T(8,128)S(1)} exponential(%x)
  %y = f32[256,128]{1,0:T(8,128)} negate(%near)
  %n = s32[]{:T(128)S(6)} get-tuple-element(%p), index=0
  ROOT %t = (s32[]{:T(128)}, f32[256,128]{1,0:T(8,128)}) tuple(%n, %y)
}

%sliced (big: f32[256,128], at: s32[]) -> f32[8,128] {
  %big = f32[256,128]{1,0:T(8,128)} parameter(0)
  %at = s32[]{:T(128)S(6)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %ds = f32[8,128]{1,0:T(8,128)} dynamic-slice(%big, %at, %zero), dynamic_slice_sizes={8,128}
}

ENTRY %main (a: f32[256,128], n: s32[]) -> f32[8,3] {
  %a = f32[256,128]{1,0:T(8,128)} parameter(0)
  %n.1 = s32[]{:T(128)S(6)} parameter(1)
  %init = (s32[]{:T(128)}, f32[256,128]{1,0:T(8,128)}) tuple(%n.1, %a)
  %loop = (s32[]{:T(128)}, f32[256,128]{1,0:T(8,128)}) while(%init), condition=%cond, body=%body
  %out = f32[256,128]{1,0:T(8,128)} get-tuple-element(%loop), index=1
  %part = f32[8,128]{1,0:T(8,128)} fusion(%out, %n.1), kind=kLoop, calls=%sliced
  ROOT %narrow = bf16[8,3]{1,0:T(8,128)(2,1)} convert(%part)
}
"""


def test_hbm_bytes_counts_loops_slices_and_tiles():
    """A round reads and writes 128 KiB; then 4 KiB are sliced, read and written, and 4 read and 2 written."""
    kib = 1024
    assert hbm_bytes(PROGRAM, [5]) == (5 * 256 + 4 + 4 + 4 + 2) * kib
    with pytest.raises(ValueError, match="got none for loop"):
        hbm_bytes(PROGRAM)
    with pytest.raises(ValueError, match="got more"):
        hbm_bytes(PROGRAM, [5, 6])
