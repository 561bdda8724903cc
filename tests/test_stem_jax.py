"""The stem's two ops in JAX beyond parity: transformations, compilation, meshes, refusals."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from stem_cases import SPECS, named

from simvlm.kernels import PrefixLayout, UnsupportedError, batch_norm_act, embed_sequence, parity
from simvlm.kernels.stem import batch_norm_spec, embed_spec, reference, xla_batch_norm, xla_embed
from simvlm.kernels.stem.places import places

CASES = {
    "batch_norm_act": named(batch_norm_spec, "branch_residual"),
    "embed_sequence": named(embed_spec, "mixed"),
}
BOTH = pytest.mark.parametrize("op", SPECS)


@pytest.fixture(autouse=True)
def _xla(monkeypatch):
    """Where no kernel is named XLA's is meant; on a CPU the C++ ones come first."""
    monkeypatch.setenv("SIMVLM_IMPL", "xla")


def _arrays(spec, case, dtype="float32"):
    return {
        name: jnp.asarray(x, "float32" if name in parity.PARAMETERS else dtype)
        for name, x in spec.make_inputs(case).items()
    }


def _names(spec, arrays):
    return [name for name in spec.DIFFERENTIABLE if name in arrays]


def _pulled(spec, case, arrays, names, wrap=lambda function: function):
    """The first output and the gradients of `names`, jitted."""

    @jax.jit
    def both(arrays):
        call = wrap(lambda leaves: spec.call(case, case.layout(), arrays | leaves, "xla")[0])
        output, pull = jax.vjp(call, {name: arrays[name] for name in names})
        return output, pull(arrays[f"d{spec.OUTPUTS[0]}"])[0]

    return both(arrays)


def _equal(a, b):
    return all(
        np.array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32), equal_nan=True)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


# ---- numbers that the shared cases do not ask for --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "name"),
    [("batch_norm_act", name) for name in ("branch_residual", "large_mean_residual", "frozen", "no_image")]
    + [("embed_sequence", name) for name in ("mixed", "mixed_padded", "mixed_identity")],
)
def test_float16_meets_the_budget(op, name):
    assert not parity.violations(SPECS[op], named(SPECS[op], name), "jax", "xla", "float16")


class _Changed:
    """A spec with other functions."""

    def __init__(self, spec, **changed):
        self.spec = spec
        self.__dict__.update(changed)

    def __getattr__(self, name):
        return getattr(self.spec, name)


@pytest.mark.parametrize("shape", [(2, 3, 64, 8), (2, 64, 3, 8), (1, 1, 64, 8), (1, 64, 1, 8)])
def test_an_outlier_where_the_sums_are_taken_about_costs_no_digits(shape):
    case = batch_norm_spec.Case(name="outlier", shape=shape, act="none")

    def make_inputs(case, seed=0):
        inputs = batch_norm_spec.make_inputs(case, seed)
        inputs["x"][0, shape[1] // 2, shape[2] // 2] = 1e3
        return inputs

    assert not parity.violations(_Changed(batch_norm_spec, make_inputs=make_inputs), case, "jax", "xla", "float32")


@pytest.mark.parametrize("channels", [24, None])
def test_images_and_rows_that_do_not_exist_reach_nothing(channels):
    """What a traced layout may ask for unchecked: fewer images than there are, patches and text that miss."""
    case = embed_spec.Case(
        name="one_image_too_many", text_lens=(4, 3), has_image=(False, True), channels=channels, tail=0
    )
    inputs = {name: x for name, x in embed_spec.make_inputs(case).items() if name != "drows"}
    inputs["features"] = np.concatenate([inputs["features"], np.full_like(inputs["features"], np.nan)])
    drows = np.concatenate([embed_spec.make_inputs(case)["drows"], np.full((6, 16), np.nan, np.float32)])
    placed = places(case.layout().bounds, np.stack)
    names = embed_spec.DIFFERENTIABLE
    given = [inputs.get(name) for name in names]
    wanted = tuple(x is not None for x in given)

    expected = {}
    for wide in (torch.float64, torch.float32):
        t = [None if x is None else torch.from_numpy(x).to(wide) for x in given]
        rows = reference.embed_sequence(*t, torch.from_numpy(placed), None)
        grads = reference.embed_sequence_backward(
            torch.from_numpy(drows).to(wide),
            None if t[1] is None else t[0],
            t[1],
            torch.from_numpy(placed),
            tuple(t[0].shape),
            7,
            None,
            wanted,
        )
        expected[wide] = [x.double().numpy() for x in (rows, *grads) if x is not None]

    arrays = [None if x is None else jnp.asarray(x) for x in given]
    rows, pull = jax.vjp(lambda *arrays: xla_embed.embed_sequence(*arrays, jnp.asarray(placed), None), *arrays)
    got = [np.asarray(x, np.float64) for x in (rows, *pull(jnp.asarray(drows))) if x is not None]
    assert not got[0][13:].any()
    assert not got[1][1:].any()
    for value, truth, yardstick in zip(got, *expected.values(), strict=True):
        assert not parity.compare(embed_spec, "", "float32", value, truth, yardstick, (0.0, 0.0))

    both = places(PrefixLayout.packed([10, 9], image_grid=(2, 3)).bounds, np.stack)
    fewer = xla_embed.embed_sequence(arrays[0][:1], *arrays[1:], both, 19)
    assert fewer[0, :10].all()
    assert not fewer[0, 10:16].any(), "the second sequence's image is not there"
    none = xla_embed.embed_sequence(arrays[0][:0], *arrays[1:4], arrays[4][:2], placed, 20)
    assert _equal(none[0, :2], arrays[4][:2])
    assert not none.reshape(-1, 16)[2:].any()


def test_layouts_of_no_sequences_and_of_no_rows():
    text = jnp.ones((3, 4))
    grad = jax.grad(lambda text: embed_sequence(None, None, None, None, text, PrefixLayout.packed([])).sum())(text)
    assert _equal((embed_sequence(None, None, None, None, text, PrefixLayout.packed([])), grad), (0 * text, 0 * text))
    assert embed_sequence(None, None, None, None, text[:0], PrefixLayout.padded(2, 0)).shape == (2, 0, 4)


def test_nothing_flows_to_statistics_and_branch_scales():
    case = CASES["batch_norm_act"]
    arrays = _arrays(batch_norm_spec, case)

    def statistics(x):
        _, mean, var = batch_norm_spec.call(case, None, arrays | {"x": x}, "xla")
        return (mean + var).sum()

    assert not jax.grad(statistics)(arrays["x"]).any()
    frozen = named(batch_norm_spec, "frozen_branch_residual")
    arrays = _arrays(batch_norm_spec, frozen)

    def output(leaves):
        return batch_norm_spec.call(frozen, None, arrays | leaves, "xla")[0].sum()

    constants = {name: arrays[name] for name in ("mean", "var", "branch_scale")}
    assert not any(x.any() for x in jax.tree.leaves(jax.grad(output)(constants)))


# ---- transformations -------------------------------------------------------------------------------------------------


def test_one_program_serves_every_length_of_a_bucket():
    traces = []
    case = embed_spec.Case(name="bucket", text_lens=(20, 12), has_image=(True, True), tail=0)
    arrays = _arrays(embed_spec, case)

    @jax.jit
    def step(arrays, layout):
        traces.append(layout)
        rows, pull = jax.vjp(
            lambda text: embed_spec.call(case, layout, arrays | {"text": text}, "xla")[0], arrays["text"]
        )
        return rows, pull(jnp.ones_like(rows))[0]

    for lens in ([26, 18], [7, 29], [6, 32]):
        layout = PrefixLayout.packed(lens, image_grid=(2, 3), max_q_len=32, max_k_len=32)
        rows, dtext = step(arrays, layout)
        assert _equal(rows[: lens[0]][6:], arrays["text"][: lens[0] - 6])
        assert _equal(rows[lens[0] + 6 : sum(lens)], arrays["text"][lens[0] - 6 : sum(lens) - 12])
        assert not rows[sum(lens) :].any()
        assert _equal(dtext.sum(1), 16.0 * (jnp.arange(32) < sum(lens) - 12))
    assert len(traces) == 1


@pytest.mark.parametrize("name", ["mixed", "mixed_padded", "text_only"])
def test_layouts_built_under_jit_equal_those_built_outside(name):
    case = named(embed_spec, name)
    arrays = _arrays(embed_spec, case)
    both = jax.jit(lambda arrays, layout: embed_spec.call(case, layout, arrays, "xla"))
    inside = both(arrays, jax.tree.map(jnp.asarray, case.layout()))
    assert _equal(inside, jax.jit(lambda arrays: embed_spec.call(case, case.layout(), arrays, "xla"))(arrays))


@BOTH
def test_parity_under_vmap(op):
    spec, mapped = SPECS[op], SPECS[op].DIFFERENTIABLE[0]

    def call(case, layout, inputs, impl):
        if impl == "reference":
            return spec.call(case, layout, inputs, impl)
        outputs = jax.vmap(lambda x: spec.call(case, layout, inputs | {mapped: x}, impl))
        return tuple(x[0] for x in outputs(jnp.stack([inputs[mapped], 2 * inputs[mapped]])))

    assert not parity.violations(_Changed(spec, call=call), CASES[op], "jax", "xla", "float32")


@BOTH
def test_checkpoint_recomputes_the_same_bits(op):
    spec, case = SPECS[op], CASES[op]
    arrays = _arrays(spec, case)
    names = _names(spec, arrays)
    assert _equal(_pulled(spec, case, arrays, names, jax.checkpoint), _pulled(spec, case, arrays, names))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("op", "name"), [("batch_norm_act", "many_channels"), ("embed_sequence", "large_grid"), ("embed_sequence", "mixed")]
)
def test_the_same_call_is_bit_equal(op, name, dtype):
    spec, case = SPECS[op], named(SPECS[op], name)
    arrays = _arrays(spec, case, dtype)
    names = _names(spec, arrays)
    both = jax.jit(lambda arrays: _pulled(spec, case, arrays, names))
    assert _equal(both(arrays), both(arrays))


@BOTH
def test_each_gradient_alone_has_the_same_bits(op):
    spec, case = SPECS[op], CASES[op]
    arrays = _arrays(spec, case)
    names = _names(spec, arrays)
    _, together = _pulled(spec, case, arrays, names)
    for name in names:
        assert _equal(_pulled(spec, case, arrays, [name])[1], {name: together[name]}), name


@BOTH
def test_16_bit_parameters_get_their_own_dtype_back(op):
    """Rounded once: the bits are those of the float32 gradient, rounded."""
    spec, case = SPECS[op], CASES[op]
    low = {name: x.astype(jnp.bfloat16) for name, x in _arrays(spec, case).items()}
    names = [name for name in spec.DIFFERENTIABLE if name in parity.PARAMETERS]
    wide = low | {name: low[name].astype(jnp.float32) for name in names}
    (_, got), (_, want) = (_pulled(spec, case, arrays, names) for arrays in (low, wide))
    assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype(jnp.bfloat16)}
    assert _equal(got, jax.tree.map(lambda x: x.astype(jnp.bfloat16), want))


@pytest.mark.parametrize("name", ["mixed", "mixed_padded", "mixed_identity"])
def test_embed_sequence_compiles_to_no_scatter(name):
    case = named(embed_spec, name)
    arrays = _arrays(embed_spec, case)
    layout = jax.tree.map(jnp.asarray, case.layout())

    def step(arrays, layout):
        leaves = {name: arrays[name] for name in _names(embed_spec, arrays)}
        rows, pull = jax.vjp(lambda leaves: embed_spec.call(case, layout, arrays | leaves, "xla")[0], leaves)
        return rows, pull(arrays["drows"])

    program = jax.jit(step).lower(arrays, layout).compile().as_text()
    operations = set(re.findall(r" = \S+ ([a-z-]+)\(", program))
    assert "gather" in operations
    assert not operations & {"scatter", "while", "sort"}


# ---- many replicas ---------------------------------------------------------------------------------------------------

REPLICATED = batch_norm_spec.Case(
    name="replicated",
    shape=(16, 4, 5, 24),
    residual=True,
    branch_scale=(1.25, 0.0, 1.25, 1.25) * 4,
    centre=3.0,
)


def replicated(how, axis_name="replica", replicas=8):
    """The spec with a call on a batch that is cut into `replicas` parts."""

    def call(case, layout, inputs, impl):
        if impl == "reference":
            return batch_norm_spec.call(case, layout, inputs, impl)
        x, residual, scale, weight, bias = (
            inputs[name] for name in ("x", "residual", "branch_scale", "weight", "bias")
        )

        def part(x, residual, scale, weight, bias):
            return xla_batch_norm.batch_norm_act(
                x, weight, bias, None, None, residual, scale, case.eps, case.act, axis_name
            )

        return how(part, (x, residual, scale), (weight, bias), replicas)

    return _Changed(batch_norm_spec, call=call)


def by_vmap(part, images, parameters, replicas):
    cut = [x.reshape(replicas, -1, *x.shape[1:]) for x in images]
    in_axes = (0,) * len(cut) + (None,) * len(parameters)
    y, mean, var = jax.vmap(part, in_axes=in_axes, axis_name="replica")(*cut, *parameters)
    return y.reshape(images[0].shape), mean.mean(0), var.mean(0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_replicas_under_vmap_are_one_batch(dtype):
    assert not parity.violations(replicated(by_vmap), REPLICATED, "jax", "xla", dtype)


def test_replicas_that_are_not_named_are_batches_of_their_own():
    """The control: the case notices."""
    found = parity.violations(replicated(by_vmap, None), REPLICATED, "jax", "xla", "float32")
    assert {"y", "var", "dx", "dweight"} <= {violation.array for violation in found}


EMBEDDED = embed_spec.Case(name="embedded", text_lens=(4,) * 8, padded=13, tail=0)


def embedded(how):
    """The spec with a call on a batch that is cut into parts of one sequence."""

    def call(case, layout, inputs, impl):
        if impl == "reference":
            return embed_spec.call(case, layout, inputs, impl)

        def part(features, text, lens, weight, bias, image_positions):
            layout = PrefixLayout.padded(1, case.padded, q_lens=lens, image_grid=case.image_grid)
            return embed_sequence(features, weight, bias, image_positions, text, layout)

        parameters = [inputs[name] for name in ("weight", "bias", "image_positions")]
        return (how(part, (inputs["features"], inputs["text"], layout.q_lens), parameters),)

    return _Changed(embed_spec, call=call)


_MESH = """
import functools, re, sys
sys.path.insert(0, "tests")
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import test_stem_jax as tests
from simvlm.kernels import batch_norm_act, parity

mesh = Mesh(np.array(jax.devices()), ("replica",))
assert mesh.size == 8
over, whole = PartitionSpec("replica"), PartitionSpec()

def embed_by_shard_map(part, cut, parameters, check_vma):
    specs = (over,) * 3 + (whole,) * 3
    return jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=over, check_vma=check_vma)(*cut, *parameters)

def by_shard_map(part, images, parameters, replicas, check_vma):
    specs = (over,) * 3 + (whole,) * 2
    return jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=(over, whole, whole), check_vma=check_vma)(
        *images, *parameters
    )

def by_sharding(part, images, parameters, replicas):
    cut = [jax.lax.with_sharding_constraint(x, NamedSharding(mesh, over)) for x in images]
    return part(*cut, *parameters)

ways = {
    "shard_map": tests.replicated(functools.partial(by_shard_map, check_vma=True)),
    "shard_map without check_vma": tests.replicated(functools.partial(by_shard_map, check_vma=False)),
    "sharding": tests.replicated(by_sharding, None),
}
for dtype in ("float32", "bfloat16"):
    for name, spec in ways.items():
        found = parity.violations(spec, tests.REPLICATED, "jax", "xla", dtype)
        assert not found, f"{name}: " + "; ".join(map(str, found))
    for check_vma in (True, False):
        spec = tests.embedded(functools.partial(embed_by_shard_map, check_vma=check_vma))
        found = parity.violations(spec, tests.EMBEDDED, "jax", "xla", dtype)
        assert not found, f"embed_sequence, {check_vma}: " + "; ".join(map(str, found))

arrays = tests._arrays(tests.batch_norm_spec, tests.REPLICATED)
kinds = {"x": over, "residual": over, "dy": over, "branch_scale": over}
arrays = {name: jax.device_put(x, NamedSharding(mesh, kinds.get(name, whole))) for name, x in arrays.items()}

def step(arrays):
    leaves = {name: arrays[name] for name in tests.batch_norm_spec.DIFFERENTIABLE}
    call = lambda leaves: tests.batch_norm_spec.call(tests.REPLICATED, None, arrays | leaves, "xla")
    y, pull, rest = jax.vjp(lambda leaves: (call(leaves)[0], call(leaves)[1:]), leaves, has_aux=True)
    return y, rest, pull(arrays["dy"])

program = jax.jit(step).lower(arrays).compile().as_text()
moved = re.findall(r" = (\\S.*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)\\(", program)
shapes = [shape for result, _ in moved for shape in re.findall(r"\\w+\\[[\\d,]*\\]", result)]
assert {kind for _, kind in moved} == {"all-reduce"}, moved
# Vectors: mean and var forward, the two sums backward, which are dweight and dbias too.
assert set(shapes) == {"f32[24]"}, moved
"""


def test_a_batch_on_a_mesh_is_one_batch():
    """By jit's own partitioning and by shard_map; and what batch_norm_act sends between devices are [C] vectors."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run([sys.executable, "-c", _MESH], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- refusals --------------------------------------------------------------------------------------------------------


@BOTH
def test_what_cannot_be_differentiated_says_so(op):
    spec, case = SPECS[op], CASES[op]
    arrays = _arrays(spec, case)
    name = spec.DIFFERENTIABLE[0]

    def loss(x):
        return (spec.call(case, case.layout(), arrays | {name: x}, "xla")[0] ** 2).sum()

    with pytest.raises(NotImplementedError, match=f"{op}: double backward is not supported"):
        jax.grad(lambda x: jax.grad(loss)(x).sum())(arrays[name])
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(loss, (arrays[name],), (arrays[name],))


def test_refused_calls():
    assert xla_batch_norm.unavailable() is None
    assert xla_embed.unavailable() is None
    with pytest.raises(ValueError, match=r"^batch_norm_act: weight must have shape \[C\] = \(4,\), got \(5,\)"):
        jax.jit(batch_norm_act)(jnp.ones((1, 2, 2, 4)), jnp.ones(5), jnp.ones(4))
    with pytest.raises(ValueError, match=r"^embed_sequence: text must have at least the layout's 6 text rows, got 5"):
        embed_sequence(None, None, None, None, jnp.ones((5, 4)), PrefixLayout.packed([6]))
    with jax.enable_x64(True):
        vector = jnp.ones(4, jnp.float64)
        with pytest.raises(UnsupportedError, match="xla: x must be float32, bfloat16 or float16, got float64"):
            batch_norm_act(jnp.ones((1, 2, 2, 4), jnp.float64), vector, vector)
        with pytest.raises(UnsupportedError, match="xla: text must be float32, bfloat16 or float16, got float64"):
            embed_sequence(None, None, None, None, jnp.ones((6, 4), jnp.float64), PrefixLayout.packed([6]))
