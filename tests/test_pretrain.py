"""Pretraining: settings, schedule, the loop with its refusals, and runs that are killed and go on bit for bit."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future

import numpy as np
import pytest
import torch
from pretrain_cases import CONFIG, VOCABULARY, log_of, make_world, model_of, settings_of, step_of

from simvlm import cli
from simvlm.data.mixture import Mixture, Skipped
from simvlm.data.shards import ImageTextShards
from simvlm.data.text import TextShards
from simvlm.data.tokenizer import Tokenizer, train_tokenizer
from simvlm.model import SimVLM
from simvlm.model.batch import IMAGE_TEXT, TEXT_ONLY
from simvlm.train import checkpoint, loop, objectives, optim
from simvlm.train import settings as run_settings
from simvlm.train.pretrain import pretrain
from simvlm.train.processes import ALONE
from simvlm.train.settings import DataSettings, OptimizerSettings, PretrainSettings
from simvlm.train.step import Diverged, StepLoss
from simvlm.train.torch_engine import TorchEngine


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


# --- settings ---


def test_settings_survive_yaml(tmp_path):
    settings = PretrainSettings(
        out=str(tmp_path),
        data=DataSettings(pairs=("a.tar", "b.tar"), tokenizer="t.model"),
        optimizer=OptimizerSettings(lr=3e-4, max_grad_norm=1.0),
        loss_weights=(1.0, 0.5),
        precision="float32",
    )
    run_settings.save(settings, tmp_path)
    assert run_settings.load(tmp_path / run_settings.FILE) == settings


def test_yaml_numbers_that_yaml_reads_as_text(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("optimizer: {lr: 1e-3, max_grad_norm: 1}\n")
    settings = run_settings.load(file)
    assert (settings.optimizer.lr, settings.optimizer.max_grad_norm) == (1e-3, 1.0)
    with pytest.raises(ValueError, match="out must be a folder, got none"):
        run_settings.check(settings)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 3", "no setting is called 'stepz'; did you mean 'steps'"),
        ("optimizer: {learning: 3}", "optimizer: no setting is called 'learning'"),
        ("steps: many", "steps must be int, got 'many'"),
        ("steps: 1.5", "steps must be int, got 1.5"),
        ("steps: true", "steps must be int, got True"),
        ("loss_weights: [1]", r"loss_weights must be a list of 2, got \[1\]"),
        ("precision: float16", r"precision must be one of \['auto', 'float32', 'bfloat16'\], got 'float16'"),
        ("data: 3", "data must hold names and values, got 3"),
        ("- 3", "must hold names and values"),
        ("a: [", "must be YAML"),
    ],
)
def test_yaml_that_is_no_run(text, message, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        run_settings.load(file)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "steps must be at least 1, got 0"),
        (["--optimizer.lr", "0"], "optimizer.lr must be above 0, got 0.0"),
        (["--loss-weights", "0", "0"], "loss_weights must be at least 0, one above it"),
        (["--variant", "dmo"], "variant: name must be one of .*, got 'dmo'; did you mean 'demo'"),
        (["--data.tokenizer", "nowhere.model"], "nowhere.model"),
        (["--data.pairs", "nowhere/*.tar"], "no file matches nowhere"),
        (["--device", "gpu"], "device must be one of this machine's, got 'gpu'"),
        (["--jax.mesh", "1", "2", "1"], r"jax.mesh must be left out with engine torch, got \(1, 2, 1\)"),
        (["--engine", "jax", "--torch.compile"], "torch.compile must be left out with engine jax, got True"),
        (["--accumulate", "7"], "accumulate must be at most the 6 samples of a step, got 7"),
        (["--impl", "cp"], "impl must be one of .*, got 'cp'; did you mean 'cpp'"),
    ],
)
def test_bad_options_are_one_line(options, message, world, tmp_path, capsys):
    run_settings.save(settings_of(world, tmp_path / "run"), tmp_path)
    assert cli.main(["pretrain", "--config", str(tmp_path / "run.yaml"), *options]) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert re.search(message, error), error
    assert not (tmp_path / "run").exists()


def test_an_unknown_option_names_the_nearest(world, tmp_path, capsys):
    run_settings.save(settings_of(world, tmp_path / "run"), tmp_path)
    with pytest.raises(SystemExit):
        cli.main(["pretrain", "--config", str(tmp_path / "run.yaml"), "--optimizer.warmpu", "0.1"])
    assert "--optimizer.warmup" in capsys.readouterr().err


# --- the optimizer ---


def test_the_learning_rate_rises_and_falls_in_lines():
    settings = OptimizerSettings(lr=1.0, warmup=0.1)
    rates = [optim.learning_rate(step, 100, settings) for step in range(100)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10)
    np.testing.assert_allclose(np.diff(rates[10:]), -1 / 90)
    assert optim.learning_rate(0, 1, settings) == 1.0


def test_only_products_and_convolutions_decay():
    model = SimVLM(CONFIG)
    names = {parameter: name for name, parameter in model.named_parameters()}
    decaying, others = (
        [names[p] for p in group["params"]] for group in optim.adamw(model, OptimizerSettings()).param_groups
    )
    assert len(decaying) + len(others) == len(names)
    assert all(name.endswith(".weight") or name == "embedding" for name in decaying)
    assert {"conv.stem.weight", "embedding", "encoder.layers.0.attention.qkv.weight"} <= set(decaying)
    assert {"image_positions", "text_positions", "encoder.layers.0.attention.rel_bias", "encoder.norm.weight"} <= set(
        others
    )


# --- the engine ---


def engine_and_data(world, tmp_path, **changes):
    settings = settings_of(world, tmp_path, precision="float32", **changes)
    data = settings.data
    pairs, documents = ImageTextShards(data.pairs), TextShards(data.documents)
    options = {"pairs_per_step": 4, "documents_per_step": 2, "image_size": CONFIG.image_size, "max_text_len": 24}
    return TorchEngine(settings, CONFIG), Mixture(pairs, documents, Tokenizer(data.tokenizer), **options)


def test_a_step_reports_each_source(world, tmp_path):
    engine, mixture = engine_and_data(world, tmp_path)
    mixed = mixture.batch(0)
    batch = mixed.batch
    model = SimVLM(CONFIG).train()
    model.load_state_dict(engine.model.state_dict())
    with torch.no_grad():
        inputs = batch.inputs(CONFIG).to("cpu")
        nll = objectives.suffix_nll(model(inputs), model.embedding, inputs.targets).numpy()
    owners = np.repeat(batch.sources, batch.decoder_lens)
    result = step_of(engine, mixed)
    for source in (IMAGE_TEXT, TEXT_ONLY):
        assert (owners == source).sum() > 0
        np.testing.assert_allclose(result.nll[source], nll[: len(owners)][owners == source].sum(), rtol=1e-5)


def test_a_source_of_weight_0_moves_nothing(world, tmp_path):
    engine, mixture = engine_and_data(world, tmp_path, loss_weights=(1.0, 0.0))
    mixed = mixture.batch(0)
    is_document = np.repeat(mixed.batch.sources == TEXT_ONLY, mixed.batch.decoder_lens)
    other = dataclasses.replace(mixed.batch, targets=mixed.batch.targets.copy())
    other.targets[: len(is_document)][is_document] = 7
    twin, _ = engine_and_data(world, tmp_path, loss_weights=(1.0, 0.0))
    step_of(engine, mixed)
    step_of(twin, dataclasses.replace(mixed, batch=other))
    for a, b in zip(engine.model.parameters(), twin.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_it_learns_a_batch_by_heart(world, tmp_path):
    engine, mixture = engine_and_data(world, tmp_path)
    mixed = mixture.batch(0)
    losses = [step_of(engine, mixed, 3e-3) for _ in range(60)]
    first, last = (loss.nll.sum() / mixed.batch.suffix_tokens().sum() for loss in (losses[0], losses[-1]))
    assert first > 5
    assert last < 1


def test_gradients_are_clipped_to_the_norm(world, tmp_path):
    settings = OptimizerSettings(max_grad_norm=1e-3)
    engine, mixture = engine_and_data(world, tmp_path, optimizer=settings)
    inputs = mixture.batch(0).batch.inputs(CONFIG).to("cpu")
    objectives.suffix_nll(engine.model(inputs), engine.model.embedding, inputs.targets).sum().backward()
    assert engine._clipped() > 1
    gradients = [parameter.grad for parameter in engine.model.parameters() if parameter.grad is not None]
    assert float(torch.nn.utils.get_total_norm(gradients)) == pytest.approx(1e-3, rel=1e-3)


def test_a_step_that_diverges_leaves_everything_as_it_was(world, tmp_path):
    engine, mixture = engine_and_data(world, tmp_path)
    step_of(engine, mixture.batch(0))
    mixed = mixture.batch(1)
    # One caption's word is poisoned: only the sequences that hold it are to blame.
    batch = mixed.batch
    ends = batch.decoder_lens.cumsum()
    word = int(batch.decoder_inputs[ends[1] - 1])
    kept = engine.model.embedding.detach()[word].clone()
    with torch.no_grad():
        engine.model.embedding[word] = float("nan")
    before = {name: tensor.clone() for name, tensor in engine.model.state_dict().items()}
    with pytest.raises(Diverged) as caught:
        step_of(engine, mixed)
    assert caught.value.rows
    for name, tensor in engine.model.state_dict().items():
        assert torch.equal(tensor.nan_to_num(), before[name].nan_to_num()), name
    with torch.no_grad():
        engine.model.embedding[word] = kept
    assert np.isfinite(step_of(engine, mixed).grad_norm)


def test_a_checkpoint_with_other_moments_is_refused(world, tmp_path):
    engine, mixture = engine_and_data(world, tmp_path)
    step_of(engine, mixture.batch(0))
    engine.optimizer.state[engine.model.embedding].pop("exp_avg")
    engine.save(tmp_path, mixture.tokenizer).result()
    other, _ = engine_and_data(world, tmp_path)
    with pytest.raises(ValueError, match=r"missing exp_avg\.embedding"):
        other.load(tmp_path)


# --- the loop, with an engine that only counts ---


class Counting:
    """Its state is how many steps it took; `on_step` may act up."""

    processes, peak_flops = ALONE, None

    def __init__(self, on_step=lambda step: None, on_save=lambda: None):
        self.steps, self.on_step, self.on_save = 0, on_step, on_save

    def step(self, mixed, lr, tokens):
        self.on_step(mixed.step)
        self.steps += 1
        return StepLoss(nll=np.array([2.0, 1.0]), grad_norm=1.0)

    def save(self, folder, tokenizer):
        (folder / "steps").write_text(str(self.steps))
        self.on_save()
        written = Future()
        written.set_result(None)
        return written

    def peak_memory(self):
        return 0

    def load(self, folder):
        self.steps = int((folder / "steps").read_text())


@pytest.fixture
def small_mixture(world):
    pairs = ImageTextShards(f"{world}/pairs/*.tar")
    options = {"pairs_per_step": 4, "documents_per_step": 0, "image_size": CONFIG.image_size, "max_text_len": 24}
    return Mixture(pairs, None, Tokenizer(world / "tokenizer.model"), **options)


def train(engine, mixture, world, tmp_path, **changes):
    return loop.Run(engine, mixture, settings_of(world, tmp_path, **changes), CONFIG).all_steps()


def test_ctrl_c_saves_and_the_run_goes_on(world, small_mixture, tmp_path):
    before = signal.getsignal(signal.SIGINT)
    whole = Counting()
    (tmp_path / "whole").mkdir()
    train(whole, small_mixture, world, tmp_path / "whole")

    def interrupt(step):
        if step == 3:
            signal.raise_signal(signal.SIGINT)

    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(loop.Interrupted, match=r"stopped after step 4, saved; .*--resume .*run` goes on"):
        train(Counting(interrupt), small_mixture, world, run)
    assert checkpoint.newest(run)[0] == 4
    again = Counting()
    train(again, small_mixture, world, run)
    assert again.steps == 6
    assert log_of(run) == log_of(tmp_path / "whole")
    assert signal.getsignal(signal.SIGINT) is before


def test_only_the_newest_checkpoints_are_kept(world, small_mixture, tmp_path):
    last = train(Counting(), small_mixture, world, tmp_path, checkpoint_every=1, keep=2)
    assert sorted(path.name for path in last.parent.iterdir()) == ["step-00000005", "step-00000006"]


def test_what_a_killed_save_left_behind_is_no_checkpoint(world, small_mixture, tmp_path):
    aside = tmp_path / "checkpoints/step-00000005.part"
    aside.mkdir(parents=True)
    (aside / "steps").write_text("garbage")
    train(Counting(), small_mixture, world, tmp_path, checkpoint_every=5)
    assert checkpoint.newest(tmp_path)[0] == 6
    assert not aside.exists()


def test_a_full_disk_costs_no_checkpoint_that_is_there(world, small_mixture, tmp_path, capsys):
    saves = []

    def full():
        saves.append(1)
        if len(saves) == 2:
            raise OSError(28, "No space left on device")

    train(Counting(on_save=full), small_mixture, world, tmp_path, checkpoint_every=2)
    assert "step 4: no checkpoint written" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000002", "step-00000006"]


def test_a_full_disk_at_the_end_is_an_error(world, small_mixture, tmp_path):
    saves = []

    def full():
        saves.append(1)
        if len(saves) > 1:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        train(Counting(on_save=full), small_mixture, world, tmp_path, checkpoint_every=3)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]


def test_a_loss_that_diverges_names_step_samples_and_checkpoint(world, small_mixture, tmp_path):
    def diverge(step):
        if step == 2:
            raise Diverged(float("nan"), [1])

    row = small_mixture.batch(2).batch.sample_ids[1]
    shard, key = small_mixture.pairs.where(int(row))
    with pytest.raises(ValueError, match=rf"step 3 gave nan, in samples {key} of {shard}; .*step-00000002"):
        train(Counting(diverge), small_mixture, world, tmp_path)
    assert checkpoint.newest(tmp_path)[0] == 2


def test_too_many_broken_samples_stop_the_run(world, small_mixture, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "_ENOUGH_SAMPLES", 8)
    batch = small_mixture.batch

    def broken(step, progress):
        skipped = (Skipped(kind="broken image", shard="a.tar", key=str(step)),)
        return dataclasses.replace(batch(step), skipped=skipped)

    monkeypatch.setattr(small_mixture, "batch", broken)
    with pytest.raises(
        ValueError, match=r"2 of 10 samples are broken \(broken image 2\), more than data.max_skipped_share 0.05"
    ):
        train(Counting(), small_mixture, world, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / loop.SKIPPED).read_text().splitlines()]
    assert lines[0] == {"step": 1, "kind": "broken image", "shard": "a.tar", "key": "0"}


# --- whole runs ---


def test_a_run_writes_what_describes_it(world, tmp_path):
    last = pretrain(settings_of(world, tmp_path / "run", log_every=4))
    assert [entry["step"] for entry in log_of(tmp_path / "run")] == [4, 6]
    entry = log_of(tmp_path / "run")[-1]
    assert entry["loss"] == pytest.approx(
        entry["image_text_token_share"] * entry["loss_image_text"]
        + (1 - entry["image_text_token_share"]) * entry["loss_text_only"]
    )
    assert list((tmp_path / "run/tensorboard").iterdir())
    assert run_settings.load(tmp_path / "run/run.yaml").precision in ("float32", "bfloat16")
    from simvlm.model.weights import load

    model, _, tokenizer = load(last)
    assert model.config == CONFIG
    assert tokenizer.vocab_size == VOCABULARY
    with pytest.raises(FileExistsError, match="holds a run already; --resume"):
        pretrain(settings_of(world, tmp_path / "run"))


def test_worker_processes_change_nothing(world, tmp_path, capsys):
    settings = settings_of(world, tmp_path / "thread", steps=3)
    pretrain(settings)
    data = dataclasses.replace(settings.data, workers=2, index=str(tmp_path / "index"))
    pretrain(dataclasses.replace(settings, out=str(tmp_path / "workers"), data=data))
    assert "2 of 2 shards have no index: scanning them" in capsys.readouterr().err
    assert log_of(tmp_path / "workers") == log_of(tmp_path / "thread")
    assert not multiprocessing.active_children()


def test_remat_of_products_in_a_fresh_process(world, tmp_path):
    run_settings.save(settings_of(world, tmp_path / "run", steps=1), tmp_path)
    command = [
        sys.executable,
        "-m",
        "simvlm.cli",
        "pretrain",
        "--config",
        str(tmp_path / "run.yaml"),
        "--remat",
        "dots",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed must be 0, as in .*step-00000002, got 1"),
        ({"objective": "lm"}, "objective must be prefix_lm, as in .*, got lm"),
        ({"data": {"pairs_per_step": 2}}, "data.pairs_per_step must be 4, as in .*, got 2"),
        ({"data": {"documents_per_step": 1}}, "data.documents_per_step must be 2, as in .*, got 1"),
    ],
)
def test_a_run_goes_on_with_the_same_samples_or_not_at_all(changes, message, world, tmp_path):
    settings = settings_of(world, tmp_path / "run", steps=2)
    pretrain(settings)
    data = dataclasses.replace(settings.data, **changes.get("data", {}))
    wrong = dataclasses.replace(settings, steps=4, **changes | {"data": data})
    with pytest.raises(ValueError, match=message):
        pretrain(wrong, resume=True)


@pytest.mark.parametrize("change", ["tokenizer", "model", "data"])
def test_a_refused_resume_spoils_nothing(change, world, tmp_path):
    run = tmp_path / "run"
    settings = settings_of(world, run)
    pretrain(dataclasses.replace(settings, steps=2))
    before = (run / "run.yaml").read_text()
    if change == "tokenizer":
        other = tmp_path / "other.model"
        pairs = ImageTextShards(settings.data.pairs)
        train_tokenizer([pairs.text(i) for i in range(len(pairs))] * 2 + ["äöü" * 9], other, vocab_size=VOCABULARY)
        wrong = dataclasses.replace(settings, data=dataclasses.replace(settings.data, tokenizer=str(other)))
        message = r"data.tokenizer must be of sha256 \w+, as in .*step-00000002, got of sha256"
    elif change == "model":
        other = tmp_path / "other.json"
        other.write_text(json.dumps(CONFIG.to_dict() | {"decoder_positions": "continue"}))
        wrong = dataclasses.replace(settings, variant=str(other))
        message = "variant must be the model of .*, got another: decoder_positions continue"
    else:
        shard = sorted((world / "pairs").glob("*.tar"))[0]
        wrong = dataclasses.replace(settings, data=dataclasses.replace(settings.data, pairs=(str(shard),)))
        message = "data.pairs must be 60 pairs, as in .*, got 32 pairs"
    with pytest.raises(ValueError, match=message):
        pretrain(wrong, resume=True)
    assert (run / "run.yaml").read_text() == before
    pretrain(settings, resume=True)
    assert checkpoint.newest(run)[0] == 6


def test_a_run_killed_before_its_first_checkpoint_begins_anew(world, tmp_path):
    pretrain(settings_of(world, tmp_path / "whole"))
    run = tmp_path / "run"
    settings = settings_of(world, run)
    pretrain(settings)
    shutil.rmtree(run / "checkpoints")
    lines = (run / loop.LOG).read_text().splitlines()[:3]
    (run / loop.LOG).write_text("\n".join(lines) + '\n{"step": 4, "lo')
    pretrain(settings, resume=True)
    assert log_of(run) == log_of(tmp_path / "whole")


def test_documents_alone_train_in_a_fresh_process(world, tmp_path):
    settings = settings_of(world, tmp_path / "run", steps=2)
    settings = dataclasses.replace(settings, data=dataclasses.replace(settings.data, pairs=()))
    run_settings.save(settings, tmp_path)
    command = [sys.executable, "-m", "simvlm.cli", "pretrain", "--config", str(tmp_path / "run.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "loss_image_text" not in log_of(tmp_path / "run")[-1]


def test_a_run_stopped_at_once_keeps_the_checkpoint_it_came_from(world, small_mixture, tmp_path):
    first = train(Counting(), small_mixture, world, tmp_path, steps=2)
    (first / "mark").write_text("the same folder")

    def diverge(step):
        raise Diverged(float("nan"), [0])

    with pytest.raises(ValueError, match="step 3 gave nan"):
        train(Counting(diverge), small_mixture, world, tmp_path)
    assert (first / "mark").exists()


def test_a_full_disk_takes_the_log_and_not_the_run(world, small_mixture, tmp_path, monkeypatch, capsys):
    real = open

    def full(path, mode="r", *rest, **options):
        if str(path).endswith(loop.LOG) and mode == "a":
            raise OSError(28, "No space left on device")
        return real(path, mode, *rest, **options)

    monkeypatch.setattr(loop, "open", full, raising=False)
    engine = Counting()
    train(engine, small_mixture, world, tmp_path)
    assert engine.steps == 6
    assert "log.jsonl not written: [Errno 28] No space left" in capsys.readouterr().err


def test_broken_images_are_skipped_and_counted(world, tmp_path):
    import io
    import tarfile

    good = sorted((world / "pairs").glob("*.tar"))[0]
    shard = tmp_path / "00000.tar"
    with tarfile.open(good) as source, tarfile.open(shard, "w") as target:
        for number, member in enumerate(source):
            content = source.extractfile(member).read()
            if member.name.endswith(".png") and number // 3 % 8 == 0:
                content = content[: len(content) // 2]
                member.size = len(content)
            target.addfile(member, io.BytesIO(content))
    settings = settings_of(world, tmp_path / "run", steps=8)
    settings = dataclasses.replace(settings, data=dataclasses.replace(settings.data, pairs=(str(shard),)))
    pretrain(settings)
    skipped = [json.loads(line) for line in (tmp_path / "run/skipped.jsonl").read_text().splitlines()]
    assert {line["kind"] for line in skipped} == {"broken image"}
    assert log_of(tmp_path / "run")[-1]["skipped"] == len(skipped) == 4


def test_a_shard_cut_short_is_named_and_used(world, tmp_path, capsys):
    whole = sorted((world / "pairs").glob("*.tar"))[0].read_bytes()
    shard = tmp_path / "00000.tar"
    shard.write_bytes(whole[: len(whole) // 2])
    settings = settings_of(world, tmp_path / "run", steps=2)
    pretrain(dataclasses.replace(settings, data=dataclasses.replace(settings.data, pairs=(str(shard),))))
    assert f"{shard} is cut short; what is whole in it is used" in capsys.readouterr().err


def killed_after(lines, command, log):
    """Runs a command until its log has so many lines, then SIGKILLs it."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not log.exists() or log.read_bytes().count(b"\n") < lines:
            assert process.poll() is None, "it ended before it was killed"
            assert time.monotonic() < deadline, "no progress"
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL


def test_a_run_killed_twice_gives_the_same_bits(world, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    command = [sys.executable, "-m", "simvlm.cli", "pretrain"]
    for name in ("whole", "run"):
        (tmp_path / f"{name}-start").mkdir()
        run_settings.save(settings_of(world, tmp_path / name, steps=60, checkpoint_every=7), tmp_path / f"{name}-start")
    whole, run = tmp_path / "whole", tmp_path / "run"
    subprocess.run([*command, "--config", f"{whole}-start/run.yaml"], check=True, capture_output=True)
    killed_after(10, [*command, "--config", f"{run}-start/run.yaml"], run / loop.LOG)
    assert (checkpoint.newest(run) or (0,))[0] < 60
    killed_after(30, [*command, "--resume", str(run)], run / loop.LOG)
    assert checkpoint.newest(run)[0] < 60
    subprocess.run([*command, "--resume", str(run)], check=True, capture_output=True)
    assert log_of(run) == log_of(whole)
    (step, tensors), (whole_step, expected) = model_of(run), model_of(whole)
    assert step == whole_step == 60
    assert all(np.array_equal(tensors[name], expected[name]) for name in expected)
