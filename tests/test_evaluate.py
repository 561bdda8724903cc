"""Evaluation: what was saved says the same again, controls, predictions, the probe, errors by their names."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from task_cases import CONFIG, data_of, evaluating, finetuned, read

from simvlm import cli
from simvlm.data.tokenizer import train_tokenizer
from simvlm.data.transforms import resize
from simvlm.model import SimVLM
from simvlm.model.search import Generated
from simvlm.tasks import caption_metrics, probe, report
from simvlm.tasks import evaluate as evaluate_module
from simvlm.tasks.batches import shuffled_pictures
from simvlm.tasks.evaluate import evaluate, score
from simvlm.tasks.examples import Example, Split
from simvlm.tasks.table import TASKS


@pytest.fixture(scope="module")
def runs(task_world, tmp_path_factory):
    """(result, folder of the model) of a short finetuning on each of these tasks."""
    found = {}
    for task in ("nli", "vqav2", "nlvr2", "snli-ve"):
        out = tmp_path_factory.mktemp("runs") / task
        result, _, _ = finetuned(task_world, task, out, lr=(3e-3,), fraction=0.5, epochs=2)
        found[task] = result, str(out / "checkpoint")
    return found


def said(out):
    return {row["id"]: row for row in map(json.loads, (out / "items.jsonl").read_text().splitlines())}


@pytest.mark.parametrize("task", ["nli", "vqav2", "nlvr2", "snli-ve"])
def test_what_was_saved_scores_on_dev_as_it_did_in_training(task, runs, task_world):
    result, checkpoint = runs[task]
    found = evaluate(evaluating(task_world, task, checkpoint=checkpoint, split=TASKS[task].splits[1], batch=7))
    assert found["score"]["value"] == pytest.approx(result["dev"], rel=1e-6)
    assert found["score"]["n"] == found["examples"] == result["dev_examples"]


def test_what_writes_is_saved_whole(task_world, tmp_path):
    finetuned(task_world, "translation", tmp_path / "run", fraction=0.05)
    checkpoint = str(tmp_path / "run" / "checkpoint")
    options = {"checkpoint": checkpoint, "limit": 4, "out": str(tmp_path / "a"), "max_len": 5}
    found = evaluate(evaluating(task_world, "translation", **options))
    assert found["bleu"]["n"] == 4
    model, tokenizer = SimVLM.from_pretrained(checkpoint), tmp_path / "run" / "checkpoint" / "tokenizer.model"
    tokens = evaluate_module.load(checkpoint)[2]
    assert tokenizer.exists()
    for example in read(task_world, "translation", "test").examples[:4]:
        (text,) = model.generate(None, [tokens.encode(example.source)], max_len=5)
        assert said(tmp_path / "a")[example.id]["prediction"] == tokens.decode(text.tokens).strip()


def no_scores():
    """What Java's scorers, a quarter of a minute each, would fill."""
    return caption_metrics.CaptionScores(values={}, items={}, skipped={}, signatures={})


# Zero-shot transfer.


def test_a_model_of_text_alone_judges_pictures(runs, task_world, tmp_path):
    _, checkpoint = runs["nli"]
    by_picture = {}
    for pictures in ("own", "masked", "shuffled"):
        out = tmp_path / pictures
        options = {"checkpoint": checkpoint, "pictures": pictures, "out": str(out)}
        found = evaluate(evaluating(task_world, "snli-ve", **options))
        assert found["settings"]["pictures"] == pictures
        assert found["majority"] == pytest.approx(1 / 3, abs=0.02)
        by_picture[pictures] = [row["prediction"] for row in said(out).values()]
    assert set(by_picture["own"]) <= {"entailment", "neutral", "contradiction"}


@pytest.mark.parametrize(
    ("trained", "task", "message"),
    [
        ("nli", "cola", "finetuned to the labels unacceptable, acceptable, got one of nli: entailment, neutral, contr"),
        ("nli", "nlvr2", "finetuned to the labels False, True, got one of nli"),
        ("nli", "vqav2", "checkpoint must be finetuned on vqav2, got one of nli"),
        ("vqav2", "snli-ve", "finetuned to the labels entailment, neutral, contradiction, got one of vqav2: no, yes"),
        ("nlvr2", "nli", "finetuned to the labels entailment, .*, got one of nlvr2: False, True"),
    ],
)
def test_other_labels_are_refused(trained, task, message, runs, task_world):
    with pytest.raises(ValueError, match=message):
        evaluate(evaluating(task_world, task, checkpoint=runs[trained][1], split=TASKS[task].splits[1]))


# Controls.


def test_shuffled_pictures_are_never_ones_own(task_world):
    for task in ("vqav2", "nlvr2", "imagenet"):
        examples = read(task_world, task).examples
        found = shuffled_pictures(examples, seed=1)
        assert [dataclasses.replace(a, images=b.images) for a, b in zip(found, examples, strict=True)] == list(examples)
        assert all(set(a.images).isdisjoint(b.images) for a, b in zip(found, examples, strict=True))
        assert {a.images for a in found} <= {b.images for b in examples}
        assert found == shuffled_pictures(examples, seed=1) != shuffled_pictures(examples, seed=2)
    # ImageNet's folders hold one class each: the next file would be of one's own.
    labels = {example.images: example.label for example in examples}
    assert sum(labels[a.images] == a.label for a in found) < 0.4 * len(found)
    pairs = [dataclasses.replace(examples[0], images=(Path(a), Path(b))) for a, b in ("ab", "bc", "cd", "da")]
    assert [found.images for found in shuffled_pictures(pairs)] == [pairs[(i + 2) % 4].images for i in range(4)]
    with pytest.raises(ValueError, match="shuffled needs examples with different pictures, got none"):
        shuffled_pictures(examples[:1] * 3)
    with pytest.raises(ValueError, match="shuffled needs examples with different pictures, got none"):
        shuffled_pictures(read(task_world, "nli").examples)


def test_a_model_that_knows_each_picture_is_right_with_its_own_alone(task_world, tmp_path, monkeypatch):
    examples = read(task_world, "coco", "test").examples
    tokenizer = evaluate_module.load(f"{task_world}/pretrained")[2]

    def content(path):
        return resize(np.asarray(Image.open(path)), CONFIG.image_size).tobytes()

    known = {content(example.images[0]): tokenizer.encode(example.references[0]) for example in examples}

    def generate(model, images, prompts, **options):
        assert all(prompt == tokenizer.encode("A picture of") for prompt in prompts)
        return [Generated(tuple(known.get(image.tobytes(), ())), 0.0, True) for image in images]

    monkeypatch.setattr(SimVLM, "generate", generate)
    monkeypatch.setattr(evaluate_module, "caption_scores", lambda *_, **__: no_scores())
    right, captions = {}, {example.id: example.references[0] for example in examples}
    for pictures in ("own", "shuffled", "masked"):
        options = {"checkpoint": f"{task_world}/pretrained", "out": str(tmp_path / pictures), "max_len": 60}
        found = evaluate(evaluating(task_world, "coco", pictures=pictures, **options))
        right[pictures] = found["judged_right"]["value"]
        same = [row["prediction"] == captions[number] for number, row in said(tmp_path / pictures).items()]
        assert (all if pictures == "own" else any)(same) == (pictures == "own")
        assert sum(row["score"] for row in said(tmp_path / pictures).values()) == right[pictures] * len(examples)
    assert right["own"] == 1
    assert right["shuffled"] < 0.3
    assert right["masked"] == 0


def test_the_majority_is_of_each_group_and_chance_is_warned_of():
    def ask(number, group, answer):
        return Example(id=str(number), text="?", references=(answer,) * 10, group=group)

    asked = [("is", "yes"), ("is", "yes"), ("is", "no"), ("how many", "2"), ("how many", "2"), ("how many", "3")]
    split = Split(task="vqav2", name="val", examples=tuple(ask(i, *one) for i, one in enumerate(asked)), sha256={})
    task = TASKS["vqav2"]
    most = score(task, split, {str(i): "yes" if group == "is" else "2" for i, (group, _) in enumerate(asked)})
    assert most.result["majority"] == most.result["score"]["value"] == pytest.approx(4 / 6)
    assert "is not above chance" in most.result["warning"]
    assert most.result["groups"]["is"]["value"] == pytest.approx(2 / 3)
    right = score(task, split, {str(i): answer for i, (_, answer) in enumerate(asked)}, taught=frozenset({"2", "yes"}))
    assert right.result["score"]["value"] == 1
    assert "warning" not in right.result
    assert {name: entry["n"] for name, entry in right.result["answers"].items()} == {"seen": 4, "unseen": 2}
    wrong = score(task, split, {str(i): "yes" for i in range(6)}, taught=frozenset({"2", "yes"}))
    assert {name: entry["value"] for name, entry in wrong.result["answers"].items()} == {"seen": 0.5, "unseen": 0}
    told = {"task": "vqav2", "split": "val", "examples": 6, "left_out": {}, **right.result}
    assert "unseen answers 100.0% (100.0% … 100.0%), 2 questions" in report.lines(told)
    classed = score(task, split, {str(i): "yes" for i in range(6)}, classes=frozenset({"yes", "no"}))
    assert {name: (entry["n"], entry["value"]) for name, entry in classed.result["domain"].items()} == {
        "in-domain": (3, pytest.approx(2 / 3)),
        "out-of-domain": (3, 0),
    }
    assert "out-of-domain  0.0% (0.0% … 0.0%), 3 questions" in report.lines(told | classed.result)


def test_a_split_without_answers_has_predictions_and_no_score(runs, task_world):
    split = dataclasses.replace(
        read(task_world, "nlvr2", "dev"),
        examples=tuple(dataclasses.replace(e, label=None) for e in read(task_world, "nlvr2", "dev").examples),
    )
    assert "no answers: the server has them" in score(TASKS["nlvr2"], split, {}).result["note"]
    half = dataclasses.replace(split, examples=split.examples[:2] + read(task_world, "nlvr2", "dev").examples[:2])
    with pytest.raises(ValueError, match="all examples of dev must have answers, got 2 that do"):
        score(TASKS["nlvr2"], half, {})


# Texts that do not fit.


def test_what_does_not_fit_is_counted(runs, task_world, tmp_path):
    """Questions longer than the model's texts; answers longer than what it may write."""
    tokenizer = evaluate_module.load(f"{task_world}/pretrained")[2]
    examples = read(task_world, "german-captions", "test_2016_flickr").examples
    lens = [len(tokenizer.encode(example.references[0])) + 1 for example in examples]  # and its end
    longest = int(np.median(lens))
    options = {"checkpoint": f"{task_world}/pretrained", "max_len": longest}
    found = evaluate(evaluating(task_world, "german-captions", **options))
    too_long = sum(n > longest for n in lens)
    assert 0 < too_long < len(examples)
    assert found["left_out"] == {f"references all longer than max_len {longest}": too_long}
    assert f"{too_long}: references all longer than max_len {longest}" in report.lines(found)


# Predictions.


@pytest.mark.parametrize(
    ("task", "split", "name"),
    [
        ("vqav2", "test", "predictions.json"),
        ("nlvr2", "test1", "predictions.csv"),
        ("nocaps", "val", "predictions.json"),
    ],
)
def test_written_predictions_score_the_same_again(task, split, name, runs, task_world, tmp_path, monkeypatch):
    def quick(texts, references, **_):
        length = sum(len(text) + len(references[key]) for key, text in texts.items())
        return dataclasses.replace(no_scores(), values={"length": length})

    monkeypatch.setattr(evaluate_module, "caption_scores", quick)
    checkpoint = runs[task][1] if task in runs else f"{task_world}/pretrained"
    options = {"split": split, "max_len": 4}
    first = evaluate(evaluating(task_world, task, checkpoint=checkpoint, out=str(tmp_path), **options))
    again = evaluate(evaluating(task_world, task, predictions=str(tmp_path / name), **options))
    for result in (first, again):
        del result["settings"], result["left_out"]
    assert first == again
    folder = tmp_path / "annotations alone"
    shutil.copytree(data_of(task_world, task), folder, ignore=shutil.ignore_patterns("*.png", "*.jpg"))
    settings = evaluating(task_world, task, predictions=str(tmp_path / name), limit=3, **options)
    few = evaluate(dataclasses.replace(settings, data=str(folder)))
    assert few["examples"] == 3
    assert first["sha256"]
    assert len(said(tmp_path)) == first["examples"]


def test_texts_are_scored_without_sacrebleu_no_more_than_it_can(task_world, monkeypatch):
    def missing(*_, **__):
        raise ImportError("bleu: sacrebleu is not installed")

    monkeypatch.setattr(evaluate_module, "bleu", missing)
    split = read(task_world, "translation", "test")
    found = score(TASKS["translation"], split, {example.id: "ein" for example in split.examples})
    assert found.result == {"note": "bleu: sacrebleu is not installed"}


def test_what_the_model_was_given_to_begin_with_is_not_scored(task_world, monkeypatch):
    split = read(task_world, "german-captions", "test_2016_flickr")
    begin = "Ein Bild von"
    assert all(example.references[0].startswith(begin) for example in split.examples)
    monkeypatch.setattr(evaluate_module, "caption_scores", lambda *_, **__: no_scores())
    task = TASKS["german-captions"]
    alone = score(task, split, dict.fromkeys([e.id for e in split.examples], begin), begin=begin).result
    assert alone["bleu"]["value"] == 0
    assert not alone["constant"]["text"].startswith(begin)
    right = {example.id: example.references[0] for example in split.examples}
    assert score(task, split, right, begin=begin).result["bleu"]["value"] == pytest.approx(100)
    assert score(task, split, right).result["constant"]["bleu"]["value"] > alone["constant"]["bleu"]["value"] > 0


def test_german_captions_have_ciders_too(task_world, monkeypatch):
    asked = []

    def cider(texts, references, *, wanted):
        asked.append(dict(texts))
        return dataclasses.replace(no_scores(), skipped={}, items={"CIDEr": dict.fromkeys(texts, 7.0)})

    monkeypatch.setattr(evaluate_module, "caption_scores", cider)
    for name, times in (("german-captions", 2), ("multi30k", 0)):
        split = read(task_world, name, "test_2016_flickr")
        said = {example.id: "ein Kreis" for example in split.examples}
        found = score(TASKS[name], split, said).result
        assert len(asked) == times
        assert ("cider" in found) == ("cider" in found["constant"]) == bool(times)
        assert "METEOR" in found["skipped"]
        asked.clear()
    told = {"task": name, "split": "test", "examples": 1, "left_out": {}, **found}
    assert "METEOR skipped: pycocoevalcap" in report.lines(told)
    assert "of the best constant text" in report.lines(told)


# The probe.


def known_features(states):
    """features() that looks a picture up."""
    return lambda model, batches, examples, batch, **_: torch.stack([states[example.images] for example in examples])


def test_separable_features_are_told_apart_and_random_ones_are_not(task_world, monkeypatch):
    examples = [e for split in ("train", "val") for e in read(task_world, "imagenet", split).examples]
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(8, 12, generator=generator)
    apart = {e.images: centres[e.label] + 0.05 * torch.randn(12, generator=generator) for e in examples}
    random = {e.images: torch.randn(12, generator=generator) for e in examples}
    options = {"checkpoint": f"{task_world}/pretrained"}
    monkeypatch.setattr(probe, "features", known_features(apart))
    assert evaluate(evaluating(task_world, "imagenet", **options))["score"]["value"] == 1
    shuffled = evaluate(evaluating(task_world, "imagenet", pictures="shuffled", **options))
    assert shuffled["score"]["value"] < 0.4
    monkeypatch.setattr(probe, "features", known_features(random))
    chance = evaluate(evaluating(task_world, "imagenet", **options))
    assert chance["score"]["value"] < 0.4
    assert "warning" in chance


def test_features_are_the_mean_of_the_encoders_states(task_world):
    settings = evaluating(task_world, "imagenet", checkpoint=f"{task_world}/pretrained")
    model, _, tokenizer = evaluate_module.load(settings.checkpoint)
    batches = evaluate_module.Batches(TASKS["imagenet"], model.config, tokenizer)
    examples = read(task_world, "imagenet", "val").examples[:5]
    found = probe.features(model, batches, examples, 2, bfloat16=False)
    states = model.encode_image(np.stack(batches.images(examples)))
    torch.testing.assert_close(found, states.mean(1), rtol=1e-5, atol=1e-5)


def test_the_probe_is_the_minimum_of_its_loss():
    generator = torch.Generator().manual_seed(1)
    states, labels = torch.randn(40, 3, generator=generator), torch.arange(40) % 2
    weight, bias = probe.fit(states, labels, 2, 1e-2)
    weight.requires_grad_(), bias.requires_grad_()
    loss = torch.nn.functional.cross_entropy(states @ weight.T + bias, labels) + 1e-2 * weight.square().sum()
    gradients = torch.autograd.grad(loss, [weight, bias])
    assert max(gradient.abs().max() for gradient in gradients) < 1e-4
    assert weight.abs().max() > 0.05


# Errors, as the command tells them.


def refused(capsys, *arguments):
    """What the command says in one line on its way out."""
    assert cli.main([*arguments, "--device", "cpu"]) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1, error
    return error


def test_the_commands_print_what_they_did(runs, task_world, tmp_path, capsys):
    options = ["--data", data_of(task_world, "cola"), "--out", str(tmp_path / "run"), "--epochs", "1", "--lr", "1e-3"]
    arguments = ["finetune", "cola", *options, "--checkpoint", f"{task_world}/pretrained", "--fraction", "0.2"]
    assert cli.main(arguments) == 0
    assert "on dev after epoch 1 with lr 0.001" in capsys.readouterr().out
    checkpoint = ["--checkpoint", str(tmp_path / "run" / "checkpoint"), "--split", "dev"]
    assert cli.main(["eval", "cola", "--data", data_of(task_world, "cola"), *checkpoint]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("cola, dev: 48 examples\n")
    assert "\n  score " in printed
    assert "(majority 50.0%)" in printed


BAD = {
    "task": (["finetune", "vqa2", "--out", "x"], "task must be one of vqav2, .*, got 'vqa2'; did you mean 'vqav2'"),
    "eval task": (
        ["eval", "snlive", "--checkpoint", "c"],
        "task must be one of .*, got 'snlive'; did you mean 'snli-ve'",
    ),
    "neither": (["eval", "nli"], "eval: one of checkpoint and predictions must be given, got neither"),
    "no head": (
        ["eval", "snli-ve", "--checkpoint", "PRETRAINED"],
        "checkpoint must hold a classifier .head.safetensors., got .*pretrained without one; finetune it first",
    ),
    "no checkpoint": (["eval", "coco", "--checkpoint", "nowhere"], "nowhere"),
    "no checkpoint to tune": (["finetune", "coco", "--out", "x", "--checkpoint", "nowhere"], "nowhere"),
    "no format": (
        ["eval", "snli-ve", "--predictions", "p.json"],
        "eval: snli-ve has no format for predictions; give a checkpoint",
    ),
    "controlled predictions": (
        ["eval", "vqav2", "--predictions", "p.json", "--pictures", "masked"],
        "pictures must be own with predictions",
    ),
    "split": (["eval", "vqav2", "--checkpoint", "PRETRAINED", "--split", "dev"], "split must be one of train, val, te"),
    "limit": (["eval", "vqav2", "--checkpoint", "PRETRAINED", "--limit", "0"], "limit must be at least 1, got 0"),
    "batch": (["eval", "vqav2", "--checkpoint", "PRETRAINED", "--batch", "0"], "batch must be at least 1, got 0"),
    "max_len": (
        ["eval", "coco", "--checkpoint", "PRETRAINED", "--max-len", "65", "--limit", "2"],
        "max_len must be at most 64",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name, task_world, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, message = BAD[name]
    arguments = [f"{task_world}/pretrained" if value == "PRETRAINED" else value for value in arguments]
    folder = data_of(task_world, arguments[1]) if arguments[1] in TASKS else str(task_world)
    error = refused(capsys, *arguments, "--data", folder)
    assert re.search(message.replace("?", r"\?"), error), error


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "predictions must be a JSON list of .* which holds a dict"),
        ("[{", "predictions must be a JSON list of .*Expecting"),
        ('[{"question_id": "1", "answer": "yes"}]', "question_id must be an integer, got '1'"),
        ('[{"question_id": 1, "answer": "yes"}]', "got .* missing, the first"),
        ('[{"question_id": 1, "answer": "yes"}, {"question_id": 1, "answer": "no"}]', "every id once, got 1 twice"),
    ],
)
def test_predictions_in_the_wrong_format(content, message, task_world, tmp_path, capsys):
    (tmp_path / "p.json").write_text(content)
    data = data_of(task_world, "vqav2")
    error = refused(capsys, "eval", "vqav2", "--data", data, "--predictions", str(tmp_path / "p.json"))
    assert re.search(f"vqav2: .*{message}", error), error


def test_a_missing_picture_is_named_or_left_out(runs, task_world, tmp_path, capsys):
    folder = tmp_path / "snli_ve"
    shutil.copytree(data_of(task_world, "snli-ve"), folder)
    examples = TASKS["snli-ve"].read(folder, "test").examples
    gone = examples[0].images[0]
    gone.unlink()
    arguments = ["eval", "snli-ve", "--data", str(folder), "--checkpoint", runs["snli-ve"][1]]
    assert f"1 of {len({e.images for e in examples})} missing ({gone})" in refused(capsys, *arguments)
    assert cli.main([*arguments, "--skip-missing"]) == 0
    left = sum(example.images[0] == gone for example in examples)
    printed = capsys.readouterr().out
    assert f"snli-ve, test: {len(examples) - left} examples\n  {left}: image missing" in printed
    gone.write_bytes(b"no picture")
    assert f"snli-ve: {gone} must be a picture, got one that cannot be read" in refused(capsys, *arguments)
    for example in examples:
        example.images[0].unlink(missing_ok=True)
    assert "test must have examples, got none" in refused(capsys, *arguments, "--skip-missing")


def test_a_checkpoint_with_another_tokenizer_or_half_a_head(runs, task_world, tmp_path, capsys):
    folder = tmp_path / "checkpoint"
    shutil.copytree(runs["nli"][1], folder)
    arguments = ["eval", "nli", "--data", data_of(task_world, "nli"), "--checkpoint", str(folder)]
    head = (folder / "head.safetensors").read_bytes()
    (folder / "head.safetensors").write_bytes(head[: len(head) // 2])
    assert "checkpoint must hold a whole head.safetensors and task.json" in refused(capsys, *arguments)
    (folder / "head.safetensors").write_bytes(head)
    task = json.loads((folder / "task.json").read_text())
    (folder / "task.json").write_text(json.dumps(task | {"labels": task["labels"][:2]}))
    assert "checkpoint must hold a whole head.safetensors and task.json" in refused(capsys, *arguments)
    texts = [example.source for example in read(task_world, "nli").examples]
    train_tokenizer(texts, folder / "tokenizer.model", vocab_size=390)
    assert "must have the model's 400 pieces, got 390" in refused(capsys, *arguments)
    train_tokenizer([*texts, "zebra"] * 2, folder / "tokenizer.model", vocab_size=400)
    assert "must be the one the model was saved with, got another" in refused(capsys, *arguments)
    out = ["--out", str(tmp_path / "x")]
    tune = ["finetune", "nli", "--data", data_of(task_world, "nli"), "--checkpoint", str(folder), *out]
    assert "must be the one the model was saved with, got another" in refused(capsys, *tune)
