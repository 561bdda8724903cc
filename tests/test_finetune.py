"""Finetuning: heads, targets, what stays as it was, what is chosen; and that every head learns."""

from __future__ import annotations

import collections
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from model_cases import ARCHS, tiny_model
from PIL import Image
from task_cases import (
    CONFIG,
    NO_STEP,
    WORDS,
    data_of,
    evaluating,
    few,
    finetuned,
    finetuning,
    give_karpathys_splits,
    painted,
    read,
    tensors_of,
)

from simvlm.data.rand_augment import OPERATIONS, N, rand_augment
from simvlm.data.tokenizer import Tokenizer
from simvlm.model import SimVLM
from simvlm.model.weights import resize_positions, resize_table
from simvlm.tasks import batches as batches_module
from simvlm.tasks import coco_captions, nlvr2, snli_ve, vqav2
from simvlm.tasks import finetune as finetune_module
from simvlm.tasks.batches import Batches
from simvlm.tasks.classifier import Classifier
from simvlm.tasks.evaluate import evaluate
from simvlm.tasks.examples import Example
from simvlm.tasks.finetune import Target, finetune
from simvlm.tasks.metrics import vqa_normalise
from simvlm.tasks.table import TASKS

QUIET = {"dropout": 0.0, "stochastic_depth": 0.0}


@pytest.mark.parametrize(
    ("task", "epochs", "least"),
    [
        ("vqav2", 12, 0.95),
        ("nlvr2", 6, 1.0),
        ("snli-ve", 8, 1.0),
        ("nli", 20, 0.9),
        ("cola", 20, 0.75),
        ("open-vqa", 14, -0.3),
        ("coco", 8, -0.3),
        ("multi30k", 10, -3.0),
        ("translation", 10, -3.0),
    ],
)
def test_every_head_learns(task, epochs, least, task_world, tmp_path, monkeypatch):
    """32 examples by heart. Where there are pictures, only they tell what is right (of NLVR2's two, their order)."""
    looks = TASKS[task].read in (vqav2.read, nlvr2.read, snli_ve.read, coco_captions.read)
    few(monkeypatch, task, 32, painted(tmp_path, 1 if task == "coco" else 10) if looks else list)
    options = {"epochs": epochs, "lr": (1e-2 if TASKS[task].head == "write" else 5e-3,), "batch": 8, **QUIET}
    result, lines, _ = finetuned(task_world, task, tmp_path / "run", **options)
    assert result["dev"] >= least, [line["dev"] for line in lines]
    assert lines[-1]["loss"] < 0.75 * lines[0]["loss"]


# What the classifier reads.


class Pictures:
    """A classifier in float64 with a head that matters, and examples of random pictures."""

    def __init__(self, world, folder, task, arch="encoder_decoder"):
        config = dataclasses.replace(ARCHS[arch], vocab_size=CONFIG.vocab_size, max_text_len=64)
        self.task, sequences = TASKS[task], TASKS[task].sequences
        self.model = tiny_model(config).eval()
        self.classifier = Classifier(self.model, ("a", "b", "c"), sequences, task=task).double().eval()
        torch.manual_seed(2)
        torch.nn.init.normal_(self.classifier.head.weight)
        torch.nn.init.normal_(self.classifier.head.bias)
        self.batches = Batches(self.task, config, Tokenizer(world / "tokenizer.model"))
        rng = np.random.default_rng(7)
        paths = [folder / f"{i}.png" for i in range(3 * sequences)]
        for path in paths:
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
        texts = ("is there a red star", "how many", "the large ring is left of a square")
        self.examples = [
            Example(id=str(i), images=tuple(paths[i * sequences : (i + 1) * sequences]), text=text)
            for i, text in enumerate(texts)
        ]

    def batch(self, examples):
        return self.batches.batch(examples, None, ids=range(len(examples)))

    def logits(self, batch):
        with torch.no_grad():
            return self.classifier(batch.inputs(self.model.config).to("cpu"))

    def states(self, batch):
        with torch.no_grad():
            return self.model(batch.inputs(self.model.config).to("cpu"))


@pytest.fixture(params=ARCHS)
def asked(request, task_world, tmp_path):
    return Pictures(task_world, tmp_path, "snli-ve", request.param)


def test_the_head_reads_the_state_of_the_last_token_of_the_question(asked):
    batch = asked.batch(asked.examples)
    assert (batch.decoder_lens > 2).all()
    states, last = asked.states(batch), np.cumsum(batch.decoder_lens) - 1
    head = asked.classifier.head
    expected = states[last] @ head.weight.T + head.bias
    assert torch.equal(asked.logits(batch), expected.detach())
    tokenizer = asked.batches.tokenizer
    questions = [[1, *tokenizer.encode(example.text)] for example in asked.examples]  # no end: nothing is written
    assert batch.decoder_inputs[: last[-1] + 1].tolist() == [token for row in questions for token in row]
    assert (batch.targets == -100).all()


def test_what_comes_after_a_question_changes_nothing_and_the_picture_something(asked):
    batch = asked.batch(asked.examples)
    before, used = asked.logits(batch), int(batch.decoder_lens.sum())
    assert used < len(batch.decoder_inputs)
    batch.decoder_inputs[used:] = 9
    batch.encoder_text[int(batch.encoder_text_lens.sum()) :] = 9
    assert torch.equal(asked.logits(batch), before)
    batch.decoder_inputs[batch.decoder_lens[0]] = 9  # BOS of the next question
    after = asked.logits(batch)
    assert torch.equal(after[0], before[0])
    assert not torch.equal(after[1], before[1])
    batch = asked.batch(asked.examples)
    batch.images[1] = 255 - batch.images[1]
    changed = (asked.logits(batch) - before).abs().amax(1)
    assert changed[1] > 1e-3
    assert changed[[0, 2]].max() == 0


def test_the_company_in_a_batch_changes_no_logits(asked):
    together = asked.logits(asked.batch(asked.examples))
    alone = torch.cat([asked.logits(asked.batch([example])) for example in asked.examples])
    torch.testing.assert_close(alone, together, rtol=1e-10, atol=1e-10)
    turned = asked.logits(asked.batch(asked.examples[::-1]))
    torch.testing.assert_close(turned.flip(0), together, rtol=1e-10, atol=1e-10)


def test_nlvr2_concatenates_the_states_of_its_left_and_right_picture(task_world, tmp_path):
    pair = Pictures(task_world, tmp_path, "nlvr2")
    found = pair.logits(pair.batch(pair.examples))
    assert found.shape == (3, 3)

    def state(example, side):
        batch = pair.batch([dataclasses.replace(example, images=example.images[side : side + 1])])
        return pair.states(batch)[batch.decoder_lens[0] - 1]

    head = pair.classifier.head
    for example, logits in zip(pair.examples, found, strict=True):
        both = torch.cat([state(example, 0), state(example, 1)])
        torch.testing.assert_close(logits, (head.weight @ both + head.bias).detach(), rtol=1e-10, atol=1e-10)
    swapped = [dataclasses.replace(example, images=example.images[::-1]) for example in pair.examples]
    assert (pair.logits(pair.batch(swapped)) - found).abs().amin(1).min() > 1e-3


def test_a_new_head_finds_all_labels_equally_likely(asked):
    classifier = Classifier(asked.model, ("a", "b", "c"), task="snli-ve")
    assert not any(parameter.any() for parameter in classifier.head.parameters())


# Targets and losses.


def test_vqa_is_taught_the_official_soft_scores(task_world):
    split = read(task_world, "vqav2")
    example = dataclasses.replace(
        split.examples[0], references=("yes", "Yes", "no", "no", "no", "no", "two", "2", "2", "rare")
    )
    labels = ("no", "2", "yes", "1")
    few_split = dataclasses.replace(split, examples=(example,))
    (target,) = finetune_module._targets(TASKS["vqav2"], few_split, labels)
    assert target.scores == pytest.approx({0: 1.0, 1: 0.9, 2: 0.6})
    logits = torch.tensor([[0.5, -1.0, 2.0, 0.0]])
    p, wanted = logits.sigmoid()[0], torch.tensor([1.0, 0.9, 0.6, 0.0])
    by_hand = -(wanted * p.log() + (1 - wanted) * (1 - p).log()).sum()
    assert finetune_module._class_loss(logits, [target]).item() == pytest.approx(by_hand.item(), rel=1e-6)


def test_a_picture_teaches_each_of_its_captions_and_a_question_its_commonest_answer(task_world):
    split = read(task_world, "coco")
    targets = finetune_module._targets(TASKS["coco"], split, ())
    assert [target.text for target in targets] == [text for example in split.examples for text in example.references]
    split = read(task_world, "open-vqa")
    example = dataclasses.replace(split.examples[0], references=("red", "blue", "blue"))
    (target,) = finetune_module._targets(TASKS["open-vqa"], dataclasses.replace(split, examples=(example,)), ())
    assert target.text == "blue"


@pytest.mark.parametrize("task", ["coco", "snli-ve"])
def test_label_smoothing_is_of_training_and_not_of_what_is_reported(task, task_world, tmp_path, monkeypatch):
    few(monkeypatch, task, 6)
    shown, weights = [], []
    for smoothing in (0.0, 0.3):
        options = {"label_smoothing": smoothing, "batch": 2, **QUIET}
        _, lines, _ = finetuned(task_world, task, tmp_path / f"no step {smoothing}", lr=NO_STEP, **options)
        shown.append([(line["loss"], line["dev"]) for line in lines])
        weights.append(finetuned(task_world, task, tmp_path / f"step {smoothing}", **options)[2])
    np.testing.assert_allclose(*shown, rtol=1e-6)
    assert "embedding" in differing(*weights)


def test_smoothed_losses_are_those_of_torch():
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    log_p, labels = logits.log_softmax(1), [2, 0, 3]
    by_hand = [-(0.8 * row[label] + 0.2 * row.mean()) for row, label in zip(log_p, labels, strict=True)]
    targets = [Target(Example(id=""), label=label) for label in labels]
    torch.testing.assert_close(finetune_module._class_loss(logits, targets, 0.2), torch.stack(by_hand))
    written = finetune_module._smooth_nll(torch.cat([logits, logits[:1]]), torch.tensor([*labels, -100]), 0.2)
    torch.testing.assert_close(written, torch.stack(by_hand))


# What stays as it was.


def differing(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_statistics_stay_those_of_pretraining_and_frozen_parts_stay_whole(task_world, tmp_path, monkeypatch):
    few(monkeypatch, "snli-ve", 12)
    before = tensors_of(task_world / "pretrained")
    _, _, after = finetuned(task_world, "snli-ve", tmp_path / "all", batch=4)
    moved = differing(before, after)
    still = before.keys() - moved
    statistics = {name for name in before if "running" in name}
    assert statistics
    assert statistics <= still
    # The head starts at 0: nothing below it moves in the first step.
    assert {name.partition(".")[0] for name in moved} >= {"conv", "encoder", "decoder", "embedding", "image_positions"}
    _, _, frozen = finetuned(task_world, "snli-ve", tmp_path / "frozen", batch=4, freeze=("encoder", "conv"))
    moved = differing(before, frozen)
    assert not [name for name in moved if name.startswith(("encoder", "conv"))]
    assert [name for name in moved if name.startswith("decoder")]


def test_text_alone_leaves_alone_what_pictures_pass(task_world, tmp_path, monkeypatch):
    few(monkeypatch, "nli", 12)
    before = tensors_of(task_world / "pretrained")
    _, _, after = finetuned(task_world, "nli", tmp_path / "run", batch=4)
    moved = differing(before, after)
    assert not [name for name in moved if name.startswith(("conv", "projection", "image_positions"))]
    assert not [name for name in moved if name.endswith("rel_bias")]
    assert [name for name in moved if name.startswith("encoder")]


def test_dropout_and_stochastic_depth_act_in_training_alone(task_world, tmp_path, monkeypatch):
    few(monkeypatch, "coco", 6)
    losses, devs = [], []
    for i, (dropout, depth) in enumerate(((0.0, 0.0), (0.5, 0.0), (0.0, 0.5))):
        rates = {"dropout": dropout, "stochastic_depth": depth}
        _, (line,), _ = finetuned(task_world, "coco", tmp_path / str(i), lr=NO_STEP, **rates)
        losses.append(line["loss"])
        devs.append(line["dev"])
    options = {"lr": NO_STEP, "dropout": 0.5, "pictures": "masked", "epochs": 3}
    _, lines, _ = finetuned(task_world, "coco", tmp_path / "steps", **options)
    assert np.ptp([line["loss"] for line in lines]) > 1e-3  # drawn anew each step
    assert len(set(devs)) == 1
    assert min(abs(a - b) for a, b in ((losses[0], losses[1]), (losses[0], losses[2]), (losses[1], losses[2]))) > 1e-3


def test_the_same_seed_gives_the_same_bits(task_world, tmp_path, monkeypatch):
    few(monkeypatch, "nlvr2", 8)

    def run(name, seed):
        _, lines, tensors = finetuned(task_world, "nlvr2", tmp_path / name, seed=seed, epochs=2, batch=3)
        return [{key: value for key, value in line.items() if key != "seconds"} for line in lines], tensors

    (lines, tensors), (again, same), (_, other) = run("a", 0), run("b", 0), run("c", 1)
    assert lines == again
    assert not differing(tensors, same)
    assert differing(tensors, other)


@pytest.mark.parametrize("last", range(1, 6))
def test_a_run_that_is_cut_off_goes_on_with_the_same_bits(last, task_world, tmp_path, monkeypatch):
    few(monkeypatch, "nlvr2", 8)
    settings = {"epochs": 3, "batch": 3, "lr": (1e-3, 3e-3), "dropout": 0.1, "stochastic_depth": 0.1}
    whole, lines, tensors = finetuned(task_world, "nlvr2", tmp_path / "whole", **settings)
    dev, asked = finetune_module._Run._dev, 0

    def cut_off(run):
        nonlocal asked
        asked += 1
        if asked > last:
            raise KeyboardInterrupt
        return dev(run)

    with monkeypatch.context() as patch:
        patch.setattr(finetune_module._Run, "_dev", cut_off)
        with pytest.raises(KeyboardInterrupt):
            finetuned(task_world, "nlvr2", tmp_path / "cut", **settings)
    for change, name in (({"batch": 4}, "batch"), ({"seed": 1, "epochs": 2}, "epochs, seed")):
        with pytest.raises(ValueError, match=f"out: .* holds part of a run with another {name}; with its own"):
            finetuned(task_world, "nlvr2", tmp_path / "cut", **(settings | change))
    result, again, same = finetuned(task_world, "nlvr2", tmp_path / "cut", **settings)
    assert not differing(tensors, same)
    assert result["runs"] == whole["runs"]
    assert [line | {"seconds": 0} for line in again] == [line | {"seconds": 0} for line in lines]
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == ["checkpoint", "finetune.json", "log.jsonl"]


def test_a_run_that_is_cut_off_knows_the_weights_that_it_began_from(task_world, tmp_path, monkeypatch):
    few(monkeypatch, "nlvr2", 8)
    shutil.copytree(task_world / "pretrained", tmp_path / "pretrained")
    settings = finetuning(task_world, "nlvr2", tmp_path / "run", checkpoint=str(tmp_path / "pretrained"), epochs=2)
    write = finetune_module._State.write

    def cut_off(state):
        write(state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(finetune_module._State, "write", cut_off)
        with pytest.raises(KeyboardInterrupt):
            finetune(settings)
    weights = tmp_path / "pretrained/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + bytes(4))
    with pytest.raises(ValueError, match="holds part of a run with another files"):
        finetune(settings)


def test_a_full_disk_costs_the_state_and_not_the_run(task_world, tmp_path, monkeypatch, capsys):
    few(monkeypatch, "nlvr2", 8)

    def full(values, path):
        path.write_bytes(b"PK")
        raise RuntimeError("[enforce fail at inline_container.cc:664]\nunexpected pos")

    monkeypatch.setattr(torch, "save", full)
    _, lines, _ = finetuned(task_world, "nlvr2", tmp_path, epochs=2)
    assert [line["epoch"] for line in lines] == [1, 2]
    assert (
        "unfinished.pt was not written ([enforce fail at inline_container.cc:664] unexpected pos)"
        in capsys.readouterr().err
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "finetune.json", "log.jsonl"]


def test_a_broken_state_is_named(task_world, tmp_path):
    (tmp_path / "unfinished.pt").write_bytes(b"PK\3\4")
    with pytest.raises(ValueError, match=r"unfinished\.pt cannot be read; remove it to begin anew: "):
        finetune(finetuning(task_world, "nlvr2", tmp_path))


# What is chosen.


def test_the_best_epoch_of_the_best_learning_rate_is_saved(task_world, tmp_path, monkeypatch):
    few(monkeypatch, "snli-ve", 6)
    scripted, snapshots = iter([0.1, 0.5, 0.3, 0.2, 0.7, 0.7]), []

    def dev(run):
        snapshots.append({name: x.detach().clone() for name, x in run.model.state_dict().items()})
        return next(scripted)

    monkeypatch.setattr(finetune_module._Run, "_dev", dev)
    result, lines, saved = finetuned(task_world, "snli-ve", tmp_path / "run", epochs=3, lr=(1e-3, 2e-3))
    assert [line["dev"] for line in lines] == [0.1, 0.5, 0.3, 0.2, 0.7, 0.7]
    assert (result["dev"], result["epoch"], result["lr"]) == (0.7, 2, 2e-3)
    assert [(run["lr"], run["epoch"], run["dev"]) for run in result["runs"]] == [(1e-3, 2, 0.5), (2e-3, 2, 0.7)]
    for i, snapshot in enumerate(snapshots):
        assert bool(differing(snapshot, saved)) == (i != 4), i
    assert not differing({"x": snapshots[0]["conv.stem.weight"]}, {"x": snapshots[0]["conv.stem.weight"]})


def test_each_learning_rate_starts_from_the_pretrained_model(task_world, tmp_path, monkeypatch):
    few(monkeypatch, "snli-ve", 6)
    _, lines, _ = finetuned(task_world, "snli-ve", tmp_path / "run", epochs=2, lr=(5e-3, 5e-3))
    assert lines[0]["loss"] == lines[2]["loss"] == pytest.approx(np.log(3), rel=1e-5)
    assert [line["loss"] for line in lines[:2]] == [line["loss"] for line in lines[2:]]


def test_a_fraction_takes_all_captions_of_some_pictures(task_world, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(finetune_module._Run, "train", lambda run: seen.append(run.teaching) or {"dev": 0.0})
    pictures = read(task_world, "coco").examples
    for fraction in (0.1, 0.2):
        result = finetune(finetuning(task_world, "coco", tmp_path / str(fraction), fraction=fraction))
        kept = {target.example.id for target in seen[-1]}
        assert len(kept) == round(fraction * len(pictures))
        assert result["train_examples"] == len(seen[-1]) == 5 * len(kept)
    assert {target.example.id for target in seen[0]} < kept
    assert kept != {example.id for example in pictures[: len(kept)]}


def test_vqa_on_the_splits_of_karpathy(task_world, tmp_path):
    """The paper's open-ended table: trained and chosen on splits that are named, answers in the vocabulary or not."""
    folder = Path(shutil.copytree(data_of(task_world, "open-vqa"), tmp_path / "vqav2"))
    asked = give_karpathys_splits(folder)
    options = {"data": str(folder), "splits": ("karpathy-train", "karpathy-val"), "lr": NO_STEP}
    settings = dataclasses.replace(finetuning(task_world, "open-vqa", tmp_path / "run"), **options)
    result = finetune(settings)
    counts = (result["train_examples"], result["dev_examples"])
    assert counts == (len(asked["karpathy-train"]), len(asked["karpathy-val"]))
    settings = evaluating(task_world, "open-vqa", checkpoint=str(tmp_path / "run" / "checkpoint"), max_len=2)
    found = evaluate(dataclasses.replace(settings, data=str(folder), split="karpathy-test"))
    classes = vqav2.answer_vocabulary(folder, normalise=vqa_normalise)
    answers = [vqa_normalise(vqav2.chosen_most(example.references)) for example in asked["karpathy-test"]]
    counts = collections.Counter("in-domain" if answer in classes else "out-of-domain" for answer in answers)
    assert {name: entry["n"] for name, entry in found["domain"].items()} == counts


def test_answers_that_are_left_out_are_not_taught_and_asked_apart(task_world, tmp_path):
    options = {"lr": NO_STEP, "leave_out_answers": ("Yes", "striped")}
    result, _, _ = finetuned(task_world, "open-vqa", tmp_path / "run", **options)

    def common(split):
        return [vqa_normalise(vqav2.chosen_most(e.references)) for e in read(task_world, "open-vqa", split).examples]

    counts = {split: sum(answer not in ("yes", "striped") for answer in common(split)) for split in ("train", "val")}
    assert 0 < counts["train"] < len(common("train"))
    assert (result["train_examples"], result["dev_examples"]) == (counts["train"], counts["val"])
    taught = json.loads((tmp_path / "run" / "checkpoint" / "task.json").read_text())["answers"]
    assert taught == sorted(set(common("train")) - {"yes", "striped"})
    found = evaluate(evaluating(task_world, "open-vqa", checkpoint=str(tmp_path / "run" / "checkpoint"), max_len=2))
    unseen = sum(answer not in taught for answer in common("test"))
    assert found["answers"]["unseen"]["n"] == unseen >= 8
    assert found["answers"]["seen"]["n"] == len(common("test")) - unseen
    plain = evaluate(evaluating(task_world, "open-vqa", checkpoint=f"{task_world}/pretrained", limit=2))
    assert "answers" not in plain


def test_a_blind_model_learns_the_same_from_any_pictures(task_world, tmp_path, monkeypatch):
    weights = []
    for i in range(2):
        with monkeypatch.context() as patch:
            few(patch, "snli-ve", 8, (list, others)[i])
            weights.append(finetuned(task_world, "snli-ve", tmp_path / f"masked {i}", pictures="masked")[2])
            weights.append(finetuned(task_world, "snli-ve", tmp_path / f"own {i}")[2])
    assert not differing(weights[0], weights[2])
    assert differing(weights[1], weights[3])


def others(examples):
    images = [example.images for example in examples]
    return [
        dataclasses.replace(example, images=path)
        for example, path in zip(examples, images[3:] + images[:3], strict=True)
    ]


def test_larger_pictures_resize_positions_and_tables(task_world, tmp_path, monkeypatch):
    few(monkeypatch, "snli-ve", 4)
    before = tensors_of(task_world / "pretrained")
    _, _, after = finetuned(task_world, "snli-ve", tmp_path / "run", image_size=32, lr=NO_STEP)
    small, large = CONFIG.image_grid, dataclasses.replace(CONFIG, image_size=32).image_grid
    assert small != large
    torch.testing.assert_close(
        after["image_positions"], resize_positions(before["image_positions"], small, large), rtol=0, atol=0
    )
    tables = [name for name in before if name.endswith("rel_bias")]
    assert tables
    for name in tables:
        torch.testing.assert_close(after[name], resize_table(before[name], large), rtol=0, atol=0)
    config = json.loads((tmp_path / "run" / "checkpoint" / "config.json").read_text())
    assert config["image_size"] == 32
    settings = evaluating(task_world, "snli-ve", checkpoint=str(tmp_path / "run" / "checkpoint"), limit=2)
    assert evaluate(settings)["examples"] == 2


def test_statistics_that_nothing_gathered_are_gathered(task_world, tmp_path, monkeypatch):
    """Of a model without pretraining, and of one pretrained on text alone."""
    few(monkeypatch, "snli-ve", 6)
    tokenizer = f"{task_world}/tokenizer.model"
    options = {"variant": f"{task_world}/tiny.json", "tokenizer": tokenizer}
    _, _, tensors = finetuned(task_world, "snli-ve", tmp_path / "new", **options)
    assert tensors["conv.stem_norm.running_mean"].any()
    SimVLM(CONFIG).save_pretrained(tmp_path / "text alone", Tokenizer(tokenizer))
    _, _, tensors = finetuned(task_world, "snli-ve", tmp_path / "run", checkpoint=str(tmp_path / "text alone"))
    assert tensors["conv.stem_norm.running_mean"].any()


# RandAugment.


def picture():
    """Of few shades, which every operation changes."""
    return np.random.default_rng(0).integers(40, 120, (24, 20, 3), dtype=np.uint8)


def test_rand_augment_is_keyed_keeps_sizes_and_never_flips():
    image = picture()
    found = [rand_augment(image, 0, 1, example, 0) for example in range(60)]
    assert all(x.shape == image.shape and x.dtype == np.uint8 for x in found)
    assert all(np.array_equal(x, rand_augment(image, 0, 1, i, 0)) for i, x in enumerate(found))
    assert len({x.tobytes() for x in found}) > 40
    assert not [name for name in OPERATIONS if "flip" in name]
    assert (len(OPERATIONS), N) == (14, 2)
    ramp = np.tile(np.linspace(0, 255, 20).astype(np.uint8)[None, :, None], (24, 1, 3))
    for name, operation in OPERATIONS.items():
        for strength in (-0.9, 0.9):
            changed = np.asarray(operation(Image.fromarray(image), strength))
            assert changed.shape == image.shape
            assert np.array_equal(changed, image) == (name == "identity"), name
            if name != "solarize":  # which turns bright into dark, in place
                row = np.asarray(operation(Image.fromarray(ramp), strength)).astype(int)[12, :, 0]
                row = row[np.abs(row - 128) > 5]  # what came into sight at the edges is grey
                assert row[-1] > row[0], name


def test_rand_augment_is_for_training_and_drawn_anew_each_epoch(task_world, tmp_path, monkeypatch):
    made = Pictures(task_world, tmp_path, "nlvr2")
    batches = Batches(TASKS["nlvr2"], made.model.config, made.batches.tokenizer, augment=True, seed=3)

    def images(batches, epoch, ids=(0, 1, 2)):
        return batches.batch(made.examples, None, ids=ids, epoch=epoch).images

    assert np.array_equal(images(batches, None), images(made.batches, None))
    assert np.array_equal(images(batches, 1), images(batches, 1, np.arange(3)))
    assert not np.array_equal(images(batches, 1), images(batches, 2))
    assert not np.array_equal(images(batches, 1), images(Batches(*arguments(batches), seed=3), 1))
    monkeypatch.setattr(batches_module, "random_resized_crop", lambda image, size, *key: image)
    twins = dataclasses.replace(made.examples[0], images=made.examples[0].images[:1] * 2)
    batch = batches.batch([twins] * 2, None, ids=[0, 1], epoch=1)
    left, right = batch.images[:2]
    assert not np.array_equal(left, right)
    assert len(set(batch.sample_ids.tolist())) == 4  # nor is any dropout the same


def arguments(batches):
    return batches.task, batches.config, batches.tokenizer


# What is refused.

REFUSED = {
    "probe": ("imagenet", {}, "task must be one that has a training split for finetuning, got imagenet"),
    "no training": ("german-captions", {}, "task must be one that has a training split .*, got german-captions"),
    "epochs": ("coco", {"epochs": 0}, "epochs must be at least 1, got 0"),
    "seed": ("coco", {"seed": -1}, "seed must be at least 0, got -1"),
    "lr": ("coco", {"lr": ()}, r"lr must be one or more numbers above 0, got \(\)"),
    "fraction": ("coco", {"fraction": 0.0}, "fraction must be above 0 and at most 1, got 0.0"),
    "shuffled": ("coco", {"pictures": "shuffled"}, "pictures must be own or masked in finetuning, got shuffled"),
    "both": (
        "coco",
        {"tokenizer": "t", "variant": "demo", "checkpoint": "c"},
        "one of the two must be given, got both",
    ),
    "two tokenizers": (
        "coco",
        {"tokenizer": "t.model"},
        "tokenizer must be none with checkpoint, which has its own, got",
    ),
    "no tokenizer": ("coco", {"variant": "demo"}, "tokenizer must be given with variant, got none"),
    "rand_augment": ("coco", {"rand_augment": True}, "rand_augment must be off for coco, which writes"),
    "soft": ("vqav2", {"label_smoothing": 0.1}, "label_smoothing must be 0 for vqav2, whose targets are soft already"),
    "splits": ("vqav2", {"splits": ("train", "train")}, "splits must be two that differ, .*, got train train"),
    "a third split": (
        "vqav2",
        {"splits": ("train", "val", "val")},
        "splits must be two that differ, .*, got train val val",
    ),
    "answers": ("vqav2", {"leave_out_answers": ("red",)}, "leave_out_answers must be empty .*, got some for vqav2"),
    "a typo": (
        "open-vqa",
        {"leave_out_answers": ("red", "reed")},
        "leave_out_answers must be answers of training questions, got 'reed'",
    ),
    "freeze": ("nli", {"freeze": ("encodr",)}, "freeze must name parts of the model, got 'encodr'"),
    "dropout": ("nli", {"dropout": 1.0}, "dropout must lie in 0 … 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_are_refused(name, task_world, tmp_path):
    task, changes, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        finetune(finetuning(task_world, task, tmp_path / "run", **changes))


def test_a_finished_run_is_not_overwritten(task_world, tmp_path, monkeypatch):
    few(monkeypatch, "cola", 4)
    settings = finetuning(task_world, "cola", tmp_path / "run")
    result = finetune(settings)
    assert json.loads((tmp_path / "run" / "finetune.json").read_text())["dev"] == result["dev"]
    with pytest.raises(FileExistsError, match="holds a finished run; another --out, or remove it"):
        finetune(settings)


def test_a_loss_that_is_not_finite_is_named(task_world, tmp_path, monkeypatch):
    few(monkeypatch, "coco", 4)
    with pytest.raises(ValueError, match=r"finetune: step \d+ gave a loss of nan; a smaller lr|gave nan on dev"):
        finetune(finetuning(task_world, "coco", tmp_path / "run", lr=(1e30,), epochs=3))


def test_labels_of_vqa_are_the_vocabulary(task_world):
    labels = finetune_module.labels_of(TASKS["vqav2"], read(task_world, "vqav2"), data_of(task_world, "vqav2"))
    assert set(WORDS) <= set(labels)
