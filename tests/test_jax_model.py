"""The JAX model against torch's: logits, loss, every gradient, an AdamW step, running statistics, files.

Truth is the torch model in float64. Both frameworks' float32 err against it; JAX may err as much as torch does, times a
ratio, for neither is the other's truth.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax.sharding import Mesh
from model_cases import ARCHS, TINY, packed, tiny_model

from simvlm.model import VARIANTS, SimVLM, parameter_counts, units
from simvlm.model.jax_model import SimVLM as JaxSimVLM
from simvlm.model.jax_transformer import AXES, REMAT, Execution
from simvlm.model.jax_weights import abstract, canonical, canonical_shapes
from simvlm.train.jax_step import TrainStep
from simvlm.train.objectives import suffix_nll
from simvlm.train.optim import adamw
from simvlm.train.settings import OptimizerSettings

SEQUENCES = [(True, 3, 4), (False, 5, 2), (True, 0, 6), (False, 1, 1), (True, 2, 3)]
OPTIMIZER = OptimizerSettings(lr=1e-3, weight_decay=0.1, max_grad_norm=0.5)
MODELS = {
    **ARCHS,
    "demo": VARIANTS["demo"],
    "patches": dataclasses.replace(TINY, conv_depths=(), patch_size=4),
    "continue": dataclasses.replace(TINY, decoder_positions="continue"),
    "resnet": dataclasses.replace(TINY, conv_stem="resnet", conv_depths=(2, 3), conv_strides=(1, 1)),
}
CORE = ("encoder_decoder", "decoder_only", "demo")
RATIO = 4.0
FLOOR = 2.0**-22
"""times an array's largest element: where torch happens to be exact"""


def _close(name, got, truth, yardstick):
    got, truth, yardstick = (np.asarray(x, np.float64) for x in (got, truth, yardstick))
    assert got.shape == truth.shape, name
    error, honest = np.abs(got - truth).max(initial=0), np.abs(yardstick - truth).max(initial=0)
    assert error <= RATIO * honest + FLOOR * np.abs(truth).max(initial=0), f"{name}: {error:.2e}, torch {honest:.2e}"


def _torch_step(model, batch, dtype):
    """Everything that a training step makes, by name, in numpy; on the reference implementation."""
    model = model.to(dtype).train()
    optimizer = adamw(model, OPTIMIZER)
    inputs = batch.inputs(model.config).to("cpu")
    hidden = model(inputs)
    loss = suffix_nll(hidden, model.embedding, inputs.targets).sum() / int((batch.targets >= 0).sum())
    loss.backward()
    found = {"logits": model.logits(hidden), "loss": loss}
    found |= {f"d{name}": parameter.grad.clone() for name, parameter in model.named_parameters()}
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.max_grad_norm)
    optimizer.step()
    found |= {"norm": norm} | {f"new {name}": x for name, x in model.state_dict().items()}
    return {name: x.detach().double().numpy() for name, x in found.items()}


def _mesh(*shape):
    return Mesh(np.array(jax.devices()[: math.prod(shape)]).reshape(shape), AXES)


def _inputs(batch, config):
    joined = units.stacked([batch], config, units.Capacity.of([batch], 8))
    return jax.tree.map(lambda x: jnp.asarray(x)[None], joined)


def _jax_step(folder, batch, config, **options):
    """The same of the JAX model in that folder."""
    step = TrainStep(config, Execution(mesh=_mesh(1, 1, 1), **options), OPTIMIZER)
    model, inputs = JaxSimVLM.from_pretrained(folder), _inputs(batch, config)
    params, statistics = nnx.state(model, nnx.Param), nnx.state(model, nnx.BatchStat)
    first, tokens = jax.tree.map(lambda x: x[0], inputs), np.float32((batch.targets >= 0).sum())

    def logits(params):
        model = nnx.merge(step.definition, params, statistics, copy=True)
        return model.logits(model(first, step.execution, train=True))

    def loss(params):
        return step._loss(params, statistics, first, tokens)[0]

    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    rows = int(batch.decoder_lens.sum())
    found = {"logits": jax.jit(logits)(params)[0, :rows], "loss": value}
    found |= {f"d{name}": x for name, x in canonical(jax.device_get(gradients)).items()}
    state = {"params": params, "statistics": statistics, "optimizer": step.optimizer.init(params)}
    new, sums = step.jitted(state, inputs, np.float32(OPTIMIZER.lr), tokens)
    found |= {"norm": sums.grad_norm}
    found |= {
        f"new {name}": x
        for part in ("params", "statistics")
        for name, x in canonical(jax.device_get(new[part])).items()
    }
    return {name: np.asarray(x, np.float64) for name, x in found.items()}


def _compare(model, config, batch, folder, **options):
    model.float().save_pretrained(folder)
    got = _jax_step(folder, batch, config, **options)
    states = {name: x.clone() for name, x in model.state_dict().items()}
    yardstick = _torch_step(model, batch, torch.float32)
    model.load_state_dict(states)
    truth = _torch_step(model, batch, torch.float64)
    rows = int(batch.decoder_lens.sum())
    for found in (truth, yardstick):
        found["logits"] = found["logits"][:rows]
    assert set(got) == set(truth)
    for name, expected in truth.items():
        # Adam's first step is g / (|g| + 1e-8): where g is next to nothing its sign is anyone's.
        gradient = np.abs(truth.get(name.replace("new ", "d"), np.ones(1)))
        clear = gradient > 1e-2 * gradient.max(initial=0)
        clear = clear if name.startswith("new ") else True
        parts = (np.where(clear, x, 0.0) for x in (got[name], expected, yardstick[name]))
        _close(name, *parts)


@pytest.mark.parametrize(
    "name", [name if name in CORE else pytest.param(name, marks=pytest.mark.full) for name in MODELS]
)
def test_a_training_step_equals_torchs(name, tmp_path):
    config = MODELS[name]
    _compare(tiny_model(config, impl="reference"), config, packed(config, SEQUENCES), tmp_path)


@pytest.mark.full
def test_a_training_step_of_small_equals_torchs(tmp_path):
    config = VARIANTS["small"]
    _compare(SimVLM(config, impl="reference"), config, packed(config, SEQUENCES[:2]), tmp_path)


@pytest.mark.parametrize("remat", [x if x == "layer" else pytest.param(x, marks=pytest.mark.full) for x in REMAT])
def test_how_it_runs_changes_nothing(remat, tmp_path):
    config = MODELS["resnet"]
    options = {"remat": remat, "scan": remat == "none"}
    _compare(tiny_model(config, impl="reference"), config, packed(config, SEQUENCES), tmp_path, **options)


@pytest.mark.parametrize(
    ("name", "sentinels"),
    [("encoder_decoder", 0), ("decoder_only", 16), pytest.param("continue", 0, marks=pytest.mark.full)],
)
def test_captions_equal_torchs(name, sentinels, tmp_path):
    """Greedy and by beams, with and without pictures and prompts; sentinels are never written."""
    config = dataclasses.replace(MODELS[name], num_sentinels=sentinels)
    tiny_model(config).float().save_pretrained(tmp_path)
    theirs, ours = SimVLM.from_pretrained(tmp_path), JaxSimVLM.from_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    side = config.image_size
    images = [rng.integers(0, 256, (side, side, 3), dtype=np.uint8) if i != 1 else None for i in range(4)]
    prompts = [[5, 6, 7], [9, 8], [], [11]]
    for options in ({}, {"beam": 3}, {"beam": 3, "begin": [7, 9]}):
        expected = theirs.generate(images, prompts, max_len=8, **options)
        got = ours.generate(images, prompts, max_len=8, **options)
        assert [text.tokens for text in got] == [text.tokens for text in expected]
        assert all(token < config.num_pieces for text in got for token in text.tokens)
        np.testing.assert_allclose([x.score for x in got], [x.score for x in expected], rtol=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_has_torchs_tensors(name):
    """Names and shapes of all parameters and statistics, and how many they are, without any array."""
    config = VARIANTS[name]
    with torch.device("meta"):
        own = {name: tuple(x.shape) for name, x in SimVLM(config).state_dict().items()}
    model = abstract(config)
    assert canonical_shapes(nnx.state(model)) == own
    total = sum(math.prod(shape) for shape in canonical_shapes(nnx.state(model, nnx.Param)).values())
    assert total == parameter_counts(config)["total"]


@pytest.mark.parametrize("name", ["base", "huge"])
def test_hidden_states_of_the_large_variants(name):
    config = VARIANTS[name]
    inputs = jax.tree.map(lambda x: x[0], _inputs(packed(config, SEQUENCES), config))
    hidden = jax.eval_shape(
        lambda model, inputs: model(inputs, Execution(remat="layer"), train=True), abstract(config), inputs
    )
    assert hidden.shape == (1, inputs.targets.shape[1], config.width)


def test_folders_go_both_ways(tmp_path):
    config = MODELS["resnet"]
    model = tiny_model(config).float()
    model.save_pretrained(tmp_path / "torch")
    JaxSimVLM.from_pretrained(tmp_path / "torch").save_pretrained(tmp_path / "jax")
    back = SimVLM.from_pretrained(tmp_path / "jax").state_dict()
    assert all(torch.equal(x, back[name]) for name, x in model.state_dict().items())


def test_another_image_size_resizes_as_torch_does(tmp_path):
    tiny_model(TINY).float().save_pretrained(tmp_path)
    for size in (8, 24):
        theirs = SimVLM.from_pretrained(tmp_path, image_size=size).state_dict()
        ours = canonical(nnx.state(JaxSimVLM.from_pretrained(tmp_path, image_size=size)))
        for name, x in theirs.items():
            np.testing.assert_allclose(ours[name], x.numpy(), rtol=0, atol=2e-6 * float(x.abs().max()))


def test_a_file_that_is_not_the_models_is_named(tmp_path):
    tiny_model(TINY).float().save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"mlp_dim": 64', '"mlp_dim": 72'))
    with pytest.raises(ValueError, match=r"mlp\.up\.weight of shape \[64, 32\] instead of \[72, 32\]"):
        JaxSimVLM.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        JaxSimVLM.from_pretrained(tmp_path)


# ---- units ---------------------------------------------------------------------------------------------------------


def test_units_hold_every_sequence_once():
    batch = packed(TINY, SEQUENCES * 3)
    parts = units.split(batch, 4)
    assert sorted(np.concatenate(parts)) == list(range(15))
    pictures = [int(batch.has_image[part].sum()) for part in parts]
    assert max(pictures) - min(pictures) <= 1
    taken = [units.taken(batch, part) for part in parts]
    assert sum(int(part.targets[part.targets >= 0].sum()) for part in taken) == int(
        batch.targets[batch.targets >= 0].sum()
    )
    inputs = units.stacked(taken, TINY, units.Capacity.of(taken, 8))
    assert (inputs.targets >= 0).sum() == (batch.targets >= 0).sum()


def test_units_are_even():
    """8 captions and a document each, prefixes uniform: the fullest of 64 has hardly more rows than the mean."""
    rng = np.random.default_rng(0)
    has_image = np.arange(9 * 64) < 8 * 64
    lens = np.where(has_image, 64, 256)
    prefix = rng.integers(0, lens)
    owner = units.dealt(prefix, lens - prefix, has_image, 64)
    for rows in (prefix, lens - prefix):
        per_unit = np.bincount(owner, rows, 64)
        assert per_unit.max() < 1.1 * per_unit.mean()


def test_a_unit_that_is_too_small_is_refused():
    batch = packed(TINY, SEQUENCES)
    capacity = dataclasses.replace(units.Capacity.of([batch], 8), decoder_rows=8)
    with pytest.raises(ValueError, match="capacity must hold the 16 rows of decoder_inputs, got 8"):
        units.stacked([batch], TINY, capacity)
