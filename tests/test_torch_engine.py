"""The torch engine's options on one process: micro-batches, remat, average, compile, held-out samples, plans."""

from __future__ import annotations

import dataclasses
import gzip
import json
import re
import shutil
import sys
import time
import types

import numpy as np
import pytest
import safetensors.torch
import torch
from model_cases import TINY, packed
from pretrain_cases import CONFIG, log_of, make_world, model_of, settings_of, step_of
from torch import nn

from simvlm import cli
from simvlm.data.tokenizer import Tokenizer
from simvlm.model import SimVLM
from simvlm.model.init_conv import load_conv
from simvlm.model.weights import load
from simvlm.train import dry_run, loop
from simvlm.train import settings as run_settings
from simvlm.train.objectives import suffix_nll
from simvlm.train.pretrain import mixture_of, pretrain
from simvlm.train.settings import HeldOutSettings, TorchSettings
from simvlm.train.torch_engine import TorchEngine
from simvlm.train.watchdog import Watchdog

FLOAT32 = {"precision": "float32"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def engine_and_batch(world, tmp_path, **changes):
    settings = settings_of(world, tmp_path, **FLOAT32 | changes)
    mixture = mixture_of(settings, Tokenizer(settings.data.tokenizer), CONFIG)
    return TorchEngine(settings, CONFIG), mixture.batch(0)


def weights_after(engine, mixed, steps=3):
    losses = [step_of(engine, mixed) for _ in range(steps)]
    return losses, {name: x.clone() for name, x in engine.model.state_dict().items()}


@pytest.mark.parametrize("remat", ["layer", "dots"])
def test_remat_changes_no_bit(remat, world, tmp_path):
    """Nor BatchNorm's statistics, which a second forward pass must not move again."""
    losses, expected = weights_after(*engine_and_batch(world, tmp_path))
    others, weights = weights_after(*engine_and_batch(world, tmp_path, remat=remat))
    assert [loss.nll.tolist() for loss in losses] == [loss.nll.tolist() for loss in others]
    for name, x in expected.items():
        assert torch.equal(weights[name], x), name


def test_remat_keeps_less(world):
    kept = {remat: kept_bytes(world, remat) for remat in ("none", "dots", "layer")}
    assert kept["layer"] < 0.5 * kept["dots"] < 0.5 * kept["none"]


def kept_bytes(world, remat):
    sample = packed(CONFIG, [(True, 3, 6), (True, 0, 5), (False, 4, 8)])
    settings = settings_of(world, "unused", remat=remat, **FLOAT32)
    return dry_run.estimate(settings, CONFIG, sample, 1).activation_bytes


def test_an_unknown_remat_is_refused():
    with pytest.raises(ValueError, match=r"remat must be one of \['none', 'layer', 'dots'\], got 'all'"):
        SimVLM(TINY).set_remat("all")


def test_micro_batches_add_up(world, tmp_path):
    """Where statistics are frozen nothing else tells micro-batches from the whole."""
    found = {}
    for accumulate in (1, 3):
        engine, mixed = engine_and_batch(world, tmp_path, accumulate=accumulate)
        engine.model.conv.freeze_statistics()
        found[accumulate] = step_of(engine, mixed)
    np.testing.assert_allclose(found[3].nll, found[1].nll, rtol=1e-5)
    np.testing.assert_allclose(found[3].grad_norm, found[1].grad_norm, rtol=1e-5)


def test_the_average_follows_the_weights(world, tmp_path):
    engine, mixed = engine_and_batch(world, tmp_path, ema=0.75)
    expected = engine.model.embedding.detach().double()
    for _ in range(3):
        step_of(engine, mixed)
        expected = 0.75 * expected + 0.25 * engine.model.embedding.detach().double()
    torch.testing.assert_close(engine.ema["embedding"].double(), expected, rtol=1e-6, atol=1e-7)


def test_the_average_is_kept_resumed_and_exported(world, tmp_path, capsys):
    whole, run = tmp_path / "whole", tmp_path / "run"
    pretrain(settings_of(world, whole, ema=0.5, **FLOAT32))
    settings = settings_of(world, run, ema=0.5, checkpoint_every=3, **FLOAT32)
    pretrain(settings)
    shutil.rmtree(run / "checkpoints/step-00000006")
    last = pretrain(settings, resume=True)
    names = ("model.safetensors", "ema.safetensors")
    mine, theirs = ([(x / name).read_bytes() for name in names] for x in (last, whole / "checkpoints/step-00000006"))
    assert mine == theirs
    assert cli.main(["export", str(run), str(tmp_path / "model"), "--ema"]) == 0
    model, _, _ = load(tmp_path / "model")
    average = safetensors.torch.load_file(last / "ema.safetensors")
    assert not torch.equal(average["embedding"], torch.from_numpy(model_of(run)[1]["embedding"]))
    for name, x in model.state_dict().items():
        assert torch.equal(x, average[name]), name
    assert cli.main(["export", str(run), str(tmp_path / "model")]) == 1
    assert "holds a model already" in capsys.readouterr().err
    with pytest.raises(ValueError, match="ema must be None, as in the run that wrote"):
        pretrain(settings_of(world, _without_average(world, tmp_path), ema=0.5, steps=9, **FLOAT32), resume=True)


def _without_average(world, tmp_path):
    pretrain(settings_of(world, tmp_path / "plain", **FLOAT32))
    return tmp_path / "plain"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nowhere", "model"], "export: nowhere holds no checkpoint"),
        (["RUN", "model", "--step", "5"], r"holds the checkpoints of steps \[2\], got 5"),
        (["RUN", "model", "--ema"], r"holds no ema.safetensors: the run was without --ema"),
    ],
)
def test_what_cannot_be_exported_is_named(options, message, world, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pretrain(settings_of(world, tmp_path / "run", steps=2, **FLOAT32))
    assert cli.main(["export", *(str(tmp_path / "run") if x == "RUN" else x for x in options)]) == 1
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_layers_give_the_same_losses(world, tmp_path):
    engine, mixed = engine_and_batch(world, tmp_path)
    compiled, _ = engine_and_batch(world, tmp_path, torch=TorchSettings(compile=True))
    expected, found = step_of(engine, mixed), step_of(compiled, mixed)
    np.testing.assert_allclose(found.nll, expected.nll, rtol=1e-4)
    assert engine.model.state_dict().keys() == compiled.model.state_dict().keys()


def test_held_out_samples_are_told_and_move_nothing(world, tmp_path):
    looks = HeldOutSettings(
        pairs=(f"{world}/pairs/*.tar",), documents=(f"{world}/documents/*.jsonl.gz",), every=3, batches=2, captions=2
    )
    pretrain(settings_of(world, tmp_path / "plain", **FLOAT32))
    pretrain(settings_of(world, tmp_path / "run", held_out=looks, **FLOAT32))
    lines = [json.loads(line) for line in (tmp_path / "run" / loop.HELD_OUT).read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6]
    assert lines[1]["held_out_loss"] < lines[0]["held_out_loss"]
    assert {"held_out_loss_image_text", "held_out_loss_text_only"} < set(lines[0])
    assert [len(line["captions"]) for line in lines] == [2, 2]
    assert log_of(tmp_path / "run") == log_of(tmp_path / "plain")
    (_, mine), (_, theirs) = model_of(tmp_path / "run"), model_of(tmp_path / "plain")
    assert all(np.array_equal(mine[name], theirs[name]) for name in theirs)


def test_the_held_out_loss_is_the_models(world, tmp_path):
    engine, mixed = engine_and_batch(world, tmp_path)
    step_of(engine, mixed)
    model = SimVLM(CONFIG)
    model.load_state_dict(engine.model.state_dict())
    model.eval()
    with torch.no_grad():
        inputs = mixed.batch.inputs(CONFIG).to("cpu")
        expected = suffix_nll(model(inputs), model.embedding, inputs.targets).sum()
    np.testing.assert_allclose(engine.held_out(mixed).sum(), expected, rtol=1e-6)


def test_a_trace_of_some_steps_is_written(world, tmp_path):
    pretrain(settings_of(world, tmp_path / "run", profile=(2, 2), **FLOAT32))
    with gzip.open(tmp_path / "run/profile/process-0.json.gz") as file:
        names = [event["name"] for event in json.load(file)["traceEvents"] if "name" in event]
    assert sum("AdamW.step" in name for name in names) == 2


def test_a_stalled_run_tells_what_it_waits_for(capfd):
    said = []
    with Watchdog(0.2, said.append, lambda: ["worker 0: sample 7 of a.tar"]) as watchdog:
        watchdog.now("data")
        deadline = time.monotonic() + 20
        while len(said) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
    assert said[0].startswith("nothing has happened for 0 s: waiting for data")
    assert said[1] == "  worker 0: sample 7 of a.tar"
    assert "test_a_stalled_run_tells_what_it_waits_for" in capfd.readouterr().err  # the stack


def test_a_run_that_goes_on_is_left_alone():
    said = []
    with Watchdog(0.5, said.append, list) as watchdog:
        for _ in range(12):
            watchdog.now("data")
            time.sleep(0.1)
    assert not said


# --- the plan ---


def test_a_dry_run_tells_and_writes_nothing(world, tmp_path, capsys):
    run_settings.save(settings_of(world, tmp_path / "run"), tmp_path)
    command = ["pretrain", "--config", str(tmp_path / "run.yaml"), "--dry-run", "8", "--on", "H100"]
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    for part in ("60, 4 a step: 0.40 epochs in 6 steps", "on each of 8 processes", "989 TFLOP/s of H100"):
        assert part in said
    assert not (tmp_path / "run").exists()
    assert cli.main([*command[:-1], "Abacus"]) == 1
    assert "on must be a GPU whose peak is known, got 'Abacus'" in capsys.readouterr().err


def test_what_a_dry_run_counts_is_what_training_keeps(world, tmp_path):
    """The bytes of the tensors that a real forward pass saves."""
    sample = packed(CONFIG, [(True, 3, 6), (True, 0, 5), (False, 4, 8), (False, 2, 9)], spare=0)
    settings = settings_of(world, tmp_path, **FLOAT32)
    settings = dataclasses.replace(
        settings, data=dataclasses.replace(settings.data, pairs_per_step=2, documents_per_step=2)
    )
    told = dry_run.estimate(settings, CONFIG, sample, 1)
    model = SimVLM(CONFIG).train()
    own = {x.untyped_storage().data_ptr() for x in [*model.parameters(), *model.buffers()]}
    sizes, alive = {}, []

    def pack(x):
        alive.append(x)
        if x.untyped_storage().data_ptr() not in own:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    inputs = sample.inputs(CONFIG).to("cpu")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        suffix_nll(model(inputs), model.embedding, inputs.targets)
    assert told.activation_bytes == pytest.approx(sum(sizes.values()), rel=0.02)
    assert told.state_bytes == 16 * sum(x.numel() for x in model.parameters())


# --- convolutions from a ResNet ---


class Bottleneck(nn.Module):
    """torchvision's ResNet v1.5 block, under its names."""

    def __init__(self, channels, inner, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, inner, 3, stride, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = nn.Conv2d(inner, 4 * inner, 1, bias=False), nn.BatchNorm2d(4 * inner)
        self.downsample = None
        if channels != 4 * inner or stride != 1:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, 4 * inner, 1, stride, bias=False), nn.BatchNorm2d(4 * inner)
            )

    def forward(self, x):
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y)).relu()
        return (self.bn3(self.conv3(y)) + (x if self.downsample is None else self.downsample(x))).relu()


class ResNet(nn.Module):
    def __init__(self, depths=(1, 2, 1)):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8)
        self.maxpool, channels = nn.MaxPool2d(3, 2, 1), 8
        for i, depth in enumerate(depths):
            blocks = []
            for block in range(depth):
                blocks.append(Bottleneck(channels, 4 * 2**i, 2 if i and not block else 1))
                channels = 16 * 2**i
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(channels, 5)

    def features(self, x):
        return self.layer2(self.layer1(self.maxpool(self.bn1(self.conv1(x)).relu())))


RESNET = dataclasses.replace(
    TINY,
    conv_stem="resnet",
    conv_stem_width=8,
    conv_depths=(1, 2),
    conv_widths=(4, 8),
    conv_strides=(1, 2),
    image_size=32,
)


@pytest.fixture
def timm(monkeypatch):
    """A timm that knows one ResNet, whose third stage the model does not have."""
    torch.manual_seed(3)
    resnet = ResNet().eval()
    for x in resnet.state_dict().values():
        if x.is_floating_point():
            nn.init.uniform_(x, 0.2, 0.6)

    def create_model(name, pretrained):
        assert pretrained
        if name != "resnet11":
            raise RuntimeError(f"Unknown model ({name})")
        return resnet

    module = types.ModuleType("timm")
    module.create_model, module.__spec__ = create_model, types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "timm", module)
    return resnet


def test_convolutions_of_a_resnet_give_its_features(timm):
    model = SimVLM(RESNET).eval()
    load_conv(model, "timm:resnet11")
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8))
    mean, std = (torch.tensor(x) for x in (RESNET.image_mean, RESNET.image_std))
    with torch.no_grad():
        expected = timm.features(((pixels / 255 - mean) / std).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        found = model.conv(pixels)
    side = RESNET.patch_size
    assert found.shape[1] * side == expected.shape[1]
    if side == 1:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    else:
        torch.testing.assert_close(found.sum(), expected.sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("source", "config", "message"),
    [
        ("resnet11", RESNET, "init_conv must be timm: and the name of a ResNet"),
        ("timm:resnet12", RESNET, r"timm cannot give 'resnet12': Unknown model \(resnet12\)"),
        ("timm:resnet11", dataclasses.replace(RESNET, conv_depths=(1, 1)), r"unexpected stages\.1\.1"),
        ("timm:resnet11", dataclasses.replace(RESNET, conv_widths=(4, 12)), "of shape .* instead of"),
    ],
)
def test_another_resnet_is_refused(source, config, message, timm):
    with pytest.raises(ValueError, match=message):
        load_conv(SimVLM(config), source)


def test_without_timm_it_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"init_conv: timm:resnet101 needs timm, not installed here"):
        load_conv(SimVLM(RESNET), "timm:resnet101")
