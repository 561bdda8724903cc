"""Pretraining in JAX: torch's samples and losses, meshes, accumulation, two processes, exact resume, refusals."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from model_cases import tiny_model
from pretrain_cases import CONFIG, log_of, make_world, model_of, settings_of, step_of

from simvlm.data.tokenizer import Tokenizer
from simvlm.train import loop
from simvlm.train.jax_engine import JaxEngine
from simvlm.train.pretrain import engine_of, mixture_of, pretrain
from simvlm.train.settings import JaxSettings
from simvlm.train.step import Diverged
from simvlm.train.torch_engine import TorchEngine

CPU_ONLY = {"engine": "jax", "precision": "float32"}
ONE = JaxSettings(mesh=(1, 1, 1))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = make_world(tmp_path_factory.mktemp("world"))
    tiny_model(CONFIG).float().save_pretrained(folder / "start")
    return folder


def _mixture(settings, engine):
    return mixture_of(settings, Tokenizer(settings.data.tokenizer), CONFIG, engine.processes)


def _engine(world, out, **changes):
    settings = settings_of(world, out, **CPU_ONLY | changes)
    engine = JaxEngine(settings, CONFIG)
    engine.load_weights(world / "start")
    return settings, _of_one_size(engine)


def _of_one_size(engine):
    """Every batch has the same shapes: one compilation."""
    engine._multiple = 256
    return engine


def _run(settings, engine):
    mixture = _mixture(settings, engine)
    loop.Run(engine, mixture, settings, CONFIG).all_steps()
    return log_of(settings.out)


@pytest.fixture(scope="module")
def one_device(world, tmp_path_factory):
    """The log and the weights of a run on one device."""
    settings, engine = _engine(world, tmp_path_factory.mktemp("one") / "run", jax=ONE)
    return _run(settings, engine), model_of(settings.out)[1]


def _same_curve(log, other, places=4):
    assert [line["sample_ids_hash"] for line in log] == [line["sample_ids_hash"] for line in other]
    for name in ("loss", "loss_image_text", "loss_text_only", "grad_norm", "lr"):
        np.testing.assert_allclose(*([line[name] for line in lines] for lines in (log, other)), rtol=10.0**-places)


def test_the_samples_and_the_losses_are_torchs(world, one_device, tmp_path):
    settings = settings_of(world, tmp_path / "run", precision="float32")
    engine = TorchEngine(settings, CONFIG)
    from simvlm.model.weights import from_pretrained

    engine.model.load_state_dict(from_pretrained(world / "start").state_dict())
    engine.model.train()
    _same_curve(_run(settings, engine), one_device[0])


@pytest.mark.parametrize(
    "mesh",
    [pytest.param((2, 1, 1), marks=pytest.mark.full), (1, 2, 2), pytest.param((2, 1, 2), marks=pytest.mark.full)],
)
def test_a_mesh_changes_nothing(mesh, world, one_device, tmp_path):
    """BatchNorm's statistics among it: they are the global batch's."""
    settings, engine = _engine(world, tmp_path / "run", jax=JaxSettings(mesh=mesh))
    log = _run(settings, engine)
    _same_curve(log, one_device[0])
    for name, x in model_of(settings.out)[1].items():
        if "running" in name:
            np.testing.assert_allclose(x, one_device[1][name], rtol=1e-4, atol=1e-5)


def test_accumulation_adds_up(world, one_device, tmp_path):
    """But for BatchNorm's statistics, which are each micro-batch's: losses are near, not equal."""
    settings, engine = _engine(world, tmp_path / "run", jax=ONE, accumulate=2)
    log = _run(settings, engine)
    assert [line["sample_ids_hash"] for line in log] == [line["sample_ids_hash"] for line in one_device[0]]
    np.testing.assert_allclose(log[0]["loss_text_only"], one_device[0][0]["loss_text_only"], rtol=1e-5)


def test_a_run_that_stops_goes_on_with_the_same_bits(world, one_device, tmp_path):
    settings, engine = _engine(world, tmp_path / "run", jax=ONE, checkpoint_every=3)

    class Stopped(Exception):
        pass

    step = engine.step

    def until_the_fourth(mixed, lr, tokens):
        if mixed.step == 3:
            raise Stopped
        return step(mixed, lr, tokens)

    engine.step = until_the_fourth
    run = loop.Run(engine, _mixture(settings, engine), settings, CONFIG)
    with pytest.raises(Stopped):
        run.all_steps()
    again = _of_one_size(JaxEngine(settings, CONFIG))  # other weights, until the checkpoint's are loaded
    assert _run(settings, again) == one_device[0]
    for name, x in model_of(settings.out)[1].items():
        assert np.array_equal(x, one_device[1][name]), name


@pytest.mark.full
def test_a_checkpoint_goes_to_another_mesh(world, one_device, tmp_path):
    settings, engine = _engine(world, tmp_path / "run", jax=ONE, steps=3)
    _run(settings, engine)
    settings = dataclasses.replace(settings, steps=6, jax=JaxSettings(mesh=(2, 1, 2)))
    log = _run(settings, _of_one_size(JaxEngine(settings, CONFIG)))
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5, 6]
    # The schedule of a run of 3 steps is another, so only the samples are compared.
    assert [x["sample_ids_hash"] for x in log] == [x["sample_ids_hash"] for x in one_device[0]]


def test_two_processes_are_one(world, one_device, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = (
        "import sys, pathlib; sys.path.insert(0, 'tests')\n"
        "from test_jax_engine import *\n"
        "from test_jax_engine import _engine, _mixture\n"
        "from simvlm.train.jax_engine import connect\n"
        "index, port, (world, out) = int(sys.argv[1]), sys.argv[2], map(pathlib.Path, sys.argv[3:])\n"
        "chosen = JaxSettings(mesh=(2, 1, 1), coordinator=f'127.0.0.1:{port}', process=(index, 2))\n"
        "connect(chosen)\n"
        "settings, engine = _engine(world, out / 'run', jax=chosen)\n"
        "loop.Run(engine, _mixture(settings, engine), settings, CONFIG).all_steps()\n"
    )
    both = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(index), str(port), str(world), str(tmp_path)],
            env={**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    for process in both:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    log = log_of(tmp_path / "run")
    for name in ("loss", "loss_image_text", "loss_text_only", "grad_norm"):
        np.testing.assert_allclose(*([line[name] for line in x] for x in (log, one_device[0])), rtol=1e-4)


def test_a_step_that_diverges_changes_nothing_and_names_its_samples(world, tmp_path):
    settings, engine = _engine(world, tmp_path / "run", jax=JaxSettings(mesh=(2, 1, 1)))
    mixed = _mixture(settings, engine).batch(0)
    before = jax.tree.map(np.asarray, engine.state)
    batch = mixed.batch
    poisoned = np.array(engine.state["params"]["text_positions"])
    engine.state["params"]["text_positions"].set_value(jax.numpy.full(poisoned.shape, np.nan))
    with pytest.raises(Diverged) as caught:
        step_of(engine, mixed)
    assert caught.value.rows == list(range(len(batch.sources)))
    after = jax.tree.map(np.asarray, engine.state)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True):
        if "text_positions" not in jax.tree_util.keystr(path):
            assert np.array_equal(x, y), path


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"jax": JaxSettings(mesh=(3, 3, 1))}, r"jax.mesh must be of the 8 devices, got \(3, 3, 1\)"),
        ({"jax": JaxSettings(mesh=(0, 1, 3))}, "fsdp · tensor must divide the 8 devices, got 3"),
        ({"jax": JaxSettings(mesh=(2, 1, 4))}, "tensor must divide num_heads = 2, got 4"),
        ({"jax": JaxSettings(mesh=(8, 1, 1))}, "pairs_per_step must be a multiple of .* 8 of the mesh, got 4"),
        ({"impl": "xl", "jax": ONE}, "impl must be one of .*, got 'xl'; did you mean 'xla'"),
        ({"device": "tpu"}, "device must be one of jax's, got 'tpu'"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message, world, tmp_path):
    with pytest.raises(ValueError, match=message):
        JaxEngine(settings_of(world, tmp_path, **CPU_ONLY | changes), CONFIG)


def test_without_jax_the_extra_is_named(world, tmp_path, monkeypatch):
    monkeypatch.setattr("simvlm.train.pretrain._installed", lambda name: name != "flax")
    with pytest.raises(ValueError, match=r"engine: jax needs flax, not installed here \(pip install 'simvlm\[jax"):
        engine_of(settings_of(world, tmp_path, engine="jax"), CONFIG)


def test_a_run_keeps_its_engine(world, tmp_path):
    settings = settings_of(world, tmp_path / "run", steps=1)
    pretrain(settings)
    with pytest.raises(ValueError, match=r"engine must be the one that wrote .*, got jax"):
        pretrain(dataclasses.replace(settings, engine="jax", jax=ONE), resume=True)
