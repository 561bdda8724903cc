"""The Pallas kernels as a TPU's compiler takes them, ahead of time for TPUs that need not be there, and what is their
own: which device they are for, refusals, transformations. Parity, interpreted, is asked elsewhere."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.topologies import get_topology_desc
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from simvlm.kernels import PrefixLayout, UnsupportedError, parity, prefix_attention
from simvlm.kernels.attention import pallas_tpu, pallas_tpu_tiles, spec

TOPOLOGIES = ("v3:2x2", "v4:2x2x1", "v5p:2x2x1", "v6e:2x2")
GRID = (14, 14)
CASES = {case.name: case for case in spec.CASES}


def _mesh(topology, devices):
    found = get_topology_desc(platform="tpu", topology_name=topology).devices[:devices]
    return Mesh(np.array(found), ("data",))


def _loss(layout):
    def loss(q, k, v, table, bounds):
        here = dataclasses.replace(layout, bounds=bounds)
        return prefix_attention(q, k, v, here, rel_bias=table, impl="pallas").astype(jnp.float32).sum()

    return loss


def _arguments(mesh, layout, dtype, rows, heads, head_dim, axis=None):
    """Shapes of q, k, v, table and bounds; rows and sequences are split over `axis` of the mesh."""
    parts = mesh.size if axis else 1
    split, whole = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in ((axis,), ()))
    x = jax.ShapeDtypeStruct((parts * rows, heads, head_dim), dtype, sharding=split)
    table = jax.ShapeDtypeStruct((heads, 2 * GRID[0] - 1, 2 * GRID[1] - 1), jnp.float32, sharding=whole)
    bounds = NamedSharding(mesh, PartitionSpec(None, axis))
    bounds = jax.ShapeDtypeStruct((7, parts * layout.batch), jnp.int32, sharding=bounds)
    return x, x, x, table, bounds


def _kernels(compiled):
    return compiled.as_text().count('custom_call_target="tpu_custom_call"')


_FEW = {("v3:2x2", "bfloat16", 80), ("v5p:2x2x1", "bfloat16", 80)}


@pytest.mark.parametrize(
    ("topology", "dtype", "head_dim"),
    [
        pytest.param(topology, dtype, head_dim, marks=() if (topology, dtype, head_dim) in _FEW else pytest.mark.full)
        for topology in TOPOLOGIES
        for dtype in ("float32", "bfloat16")
        for head_dim in (64, 80, 128)
    ],
)
def test_compiles_for_tpus(topology, dtype, head_dim):
    """Forward and gradient with the table, of packed sequences that begin anywhere."""
    mesh = _mesh(topology, 1)
    layout = PrefixLayout.packed([250, 220], prefix_lens=[210, 9], image_grid=GRID, max_q_len=256, max_k_len=256)
    arguments = _arguments(mesh, layout, jnp.dtype(dtype), 500, 1, head_dim)
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.value_and_grad(_loss(layout), (0, 1, 2, 3))).lower(*arguments).compile()
    assert _kernels(compiled) == 3


@pytest.mark.full
@pytest.mark.parametrize("topology", ["v3:2x2", "v5p:2x2x1"])
@pytest.mark.parametrize(("heads", "head_dim"), [(8, 80), (12, 64), (16, 64), (16, 80)])
def test_the_models_shapes_fit_vmem(topology, heads, head_dim):
    mesh = _mesh(topology, 1)
    layout = PrefixLayout.packed([256] * 9, prefix_lens=[216] * 9, image_grid=GRID)
    for dtype in (jnp.float32, jnp.bfloat16):
        if (topology, dtype, head_dim) == ("v3:2x2", jnp.float32, 80):
            continue  # refused: test_refused_calls
        arguments = _arguments(mesh, layout, dtype, 2304, heads, head_dim)
        with jax.set_mesh(mesh):
            compiled = jax.jit(jax.grad(_loss(layout), (0, 1, 2, 3))).lower(*arguments).compile()
        assert _kernels(compiled) == 3


def test_compiles_within_shard_map():
    """Every device has its own rows and sequences; the mesh says which TPU it is."""
    mesh = _mesh("v3:2x2", 4)
    layout = PrefixLayout.packed([120], prefix_lens=[100], image_grid=GRID, max_q_len=128, max_k_len=128)
    data, whole = PartitionSpec("data"), PartitionSpec()

    def local(*arguments):
        gradients = jax.grad(_loss(layout), (0, 3))(*arguments)
        return gradients[0], jax.lax.psum(gradients[1], "data")

    step = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(data, data, data, whole, PartitionSpec(None, "data")),
        out_specs=(data, whole),
        check_vma=False,
    )
    compiled = jax.jit(step).lower(*_arguments(mesh, layout, jnp.bfloat16, 120, 1, 64, "data")).compile()
    assert "all-reduce" in compiled.as_text()
    assert _kernels(compiled) >= 2


# ---- what is computed ----------------------------------------------------------------------------------------------


def test_widened_products_are_within_the_budget(monkeypatch):
    """As on a v3: operands of bfloat16 values, multiplied as float32."""
    monkeypatch.setattr(pallas_tpu, "_widens", lambda dtype: dtype == jnp.bfloat16)
    assert not parity.violations(spec, CASES["head_dim_24"], "jax", "pallas", "bfloat16")


class _Mapped:
    """The spec with a call that maps over two different queries and hands back the first's outputs."""

    def __getattr__(self, name):
        return getattr(spec, name)

    def call(self, case, layout, inputs, impl):
        if impl == "reference":
            return spec.call(case, layout, inputs, impl)
        mapped = jax.vmap(lambda q: spec.call(case, layout, inputs | {"q": q}, impl))
        return tuple(x[0] for x in mapped(jnp.stack([inputs["q"], 2 * inputs["q"]])))


@pytest.mark.full
def test_parity_under_vmap():
    assert not parity.violations(_Mapped(), CASES["head_dim_24"], "jax", "pallas", "float32")


def test_the_expanded_table_holds_every_pair():
    grid = (9, 15)
    rng = np.random.default_rng(0)
    table = rng.standard_normal((2, 17, 29), np.float32)
    p, j = np.arange(135)[:, None], np.arange(135)
    expected = table[:, j // 15 - p // 15 + 8, j % 15 - p % 15 + 14]
    for flipped in (False, True):
        tiles = np.asarray(pallas_tpu_tiles.expanded(jnp.asarray(table), grid, flipped))
        whole = tiles.transpose(2, 0, 3, 1, 4).reshape(2, 256, 256)
        np.testing.assert_array_equal(whole[:, :135, :135], expected.swapaxes(1, 2) if flipped else expected)
        assert not whole[:, 135:].any()
        assert not whole[:, :, 135:].any()


@pytest.mark.parametrize("by_keys", [False, True])
@pytest.mark.parametrize("name", ["edges_prefix_table", "keys_apart", "long_causal"])
def test_the_list_holds_each_visible_tile_once(name, by_keys):
    layout, block = CASES[name].layout(), pallas_tpu_tiles.BLOCK
    queries, keys = (
        pallas_tpu_tiles.Rows.packed(layout.batch, rows, longest, True)
        for rows, longest in ((layout.q_rows, layout.max_q_len), (layout.k_rows, layout.max_k_len))
    )
    listed, total = jax.jit(pallas_tpu_tiles.tiles, static_argnums=(0, 1, 3))(queries, keys, layout.bounds, by_keys)
    entries = np.asarray(listed)[1 : 1 + int(total)]
    owner, minor = entries >> pallas_tpu_tiles.MINOR_BITS, entries & ((1 << pallas_tpu_tiles.MINOR_BITS) - 1)
    assert len(set(entries)) == len(entries)
    assert (np.diff(owner) >= 0).all()
    assert listed[0] == listed[1 + int(total)] == pallas_tpu_tiles.END
    sequence, outer = owner % layout.batch, owner // layout.batch
    found = set(zip(sequence, minor if by_keys else outer, outer if by_keys else minor, strict=True))
    mask = layout.as_mask()
    visible = {
        (b, t, s)
        for b, t, s in np.ndindex(layout.batch, queries.most, keys.most)
        if mask[b, t * block : (t + 1) * block, s * block : (s + 1) * block].any()
    }
    assert visible <= found
    # What is listed and seen by nobody is there for the zeros that must be written.
    owned = layout.k_lens if by_keys else layout.q_lens
    for b, t, s in found - visible:
        assert (s if by_keys else t) * block < owned[b]


# ---- which device, and refusals ------------------------------------------------------------------------------------


def test_which_device_it_is_for():
    x, layout = jnp.zeros((2, 1, 8)), PrefixLayout.packed([2])
    assert "neither the default backend nor the current mesh is a TPU" in pallas_tpu.unavailable()
    with pytest.raises(UnsupportedError, match="is a TPU"):
        prefix_attention(x, x, x, layout, impl="pallas")
    with pltpu.force_tpu_interpret_mode():
        assert pallas_tpu.unavailable() is None
        assert not pallas_tpu._widens(jnp.dtype("bfloat16"))
    for topology, widens in (("v3:2x2", True), ("v4:2x2x1", False)):
        with jax.set_mesh(_mesh(topology, 1)):
            assert pallas_tpu.unavailable() is None
            assert pallas_tpu._widens(jnp.dtype("bfloat16")) == widens
            assert not pallas_tpu._widens(jnp.dtype("float32"))


def _refusal(x, layout, table=None):
    with pltpu.force_tpu_interpret_mode():
        return pallas_tpu.unsupported(x, x, x, layout, table)


def test_refused_calls():
    x = jnp.zeros((4, 1, 8))
    assert _refusal(x, PrefixLayout.packed([4])) is None
    assert "got float16" in _refusal(x.astype("float16"), PrefixLayout.packed([4]))
    offset = PrefixLayout.packed([4], q_offsets=[0], image_grid=(1, 2))
    assert "q_offsets" in _refusal(x, offset, jnp.zeros((1, 1, 3)))
    assert _refusal(x, offset) is None
    large = PrefixLayout.packed([4], image_grid=(70, 70))
    assert "image_grid (70, 70) is too large" in _refusal(x, large, jnp.zeros((1, 139, 139)))
    wide = jnp.zeros((4, 12, 80))
    assert "do not fit" in _refusal(wide, PrefixLayout.packed([4], image_grid=(30, 30)), jnp.zeros((12, 59, 59)))
    huge, pretraining = jnp.zeros((256, 8, 80)), PrefixLayout.packed([256], image_grid=GRID)
    with jax.set_mesh(_mesh("v3:2x2", 1)):
        assert "do not fit" in pallas_tpu.unsupported(huge, huge, huge, pretraining, True)
    rows = jnp.zeros((9000, 1, 8))
    with jax.set_mesh(_mesh("v3:2x2", 1)):
        many = pallas_tpu.unsupported(rows, rows, rows, PrefixLayout.packed([9] * 1000), None)
    assert "scalar memory" in many


def test_what_cannot_be_differentiated_says_so():
    q, k = jnp.ones((2, 1, 8)), jnp.ones((7, 1, 8))
    beams = PrefixLayout.packed([1, 1], [7, 7], k_starts=[0, 0], cross=True)

    def loss(q, k):
        return prefix_attention(q, k, k, beams, impl="pallas").sum()

    with pltpu.force_tpu_interpret_mode(True):
        with pytest.raises(NotImplementedError, match="double backward is not supported by impl='pallas'"):
            jax.make_jaxpr(jax.grad(lambda q: jax.grad(loss)(q, k).sum()))(q)
        with pytest.raises(ValueError, match="must not be differentiated where the layout's key ranges overlap"):
            jax.make_jaxpr(jax.grad(loss, 1))(q, k)
