"""`simvlm eval TASK`: a model, or a file of predictions, on one split; scores with intervals, and the files behind.

result.json          scores, counts, hashes of the annotation files, the first examples with their predictions
items.jsonl          of every example: id, group, prediction, score
predictions.json     as the benchmark's server takes it (NLVR2: predictions.csv)
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from simvlm.data.judge import judge
from simvlm.data.scenes import Scene
from simvlm.model.torch_model import SimVLM
from simvlm.model.weights import load
from simvlm.tasks import probe, vqav2
from simvlm.tasks.annotations import Missing
from simvlm.tasks.batches import Batches, shuffled_pictures
from simvlm.tasks.caption_metrics import best_constant, bleu, caption_scores
from simvlm.tasks.classifier import TASK, Classifier
from simvlm.tasks.examples import Example, Split
from simvlm.tasks.metrics import bootstrap, by_group, chance_warning, vqa_normalise, vqa_soft_score
from simvlm.tasks.predictions import check_complete
from simvlm.tasks.settings import EvalSettings, check_eval
from simvlm.tasks.table import Task, task_of
from simvlm.tasks.world_pictures import SCENES, scene_of
from simvlm.train.torch_device import device_of, precision_of

RESULT, ITEMS = "result.json", "items.jsonl"
SAMPLES = 12
"""examples, the first of the split, whose predictions stand in the result"""


def evaluate(settings: EvalSettings) -> dict[str, Any]:
    """What `result.json` holds; written, with the items and predictions, where `settings.out` is given.

    Raises:
        ValueError, OSError: a setting, a file, the checkpoint or the predictions are at fault; it is named.
    """
    check_eval(settings)
    task = task_of(settings.task)
    name = settings.split or task.splits[2]
    missing: Missing = "leave out" if settings.skip_missing else "refuse"
    split = task.read(settings.data, name, missing="keep" if settings.predictions else missing)
    few = dataclasses.replace(split, examples=split.examples[: settings.limit])
    if settings.predictions:
        if task.read_predictions is None:
            raise ValueError(f"eval: {task.name} has no format for predictions; give a checkpoint")
        predictions = task.read_predictions(Path(settings.predictions))
        check_complete(predictions, split)
        predicted = Predicted({example.id: predictions[example.id] for example in few.examples})
    else:
        predicted = predict(task, few, settings)
    split = few
    classes = None
    if name in vqav2.KARPATHY:
        classes = frozenset(vqav2.answer_vocabulary(settings.data, normalise=vqa_normalise))
    scored = score(
        task,
        split,
        predicted.answers,
        begin=settings.begin,
        taught=predicted.taught,
        classes=classes,
        seed=settings.seed,
    )
    result = {
        "task": task.name,
        "split": name,
        "examples": len(split.examples),
        "left_out": split.left_out | predicted.shortened,
        "sha256": split.sha256,
        "settings": dataclasses.asdict(settings),
        **scored.result,
        "samples": samples(task, split, Path(settings.data), predicted.answers, scored),
    }
    if settings.out:
        _write(Path(settings.out), task, split, predicted.answers, scored, result)
    return result


@dataclasses.dataclass(frozen=True)
class Predicted:
    """What a model said.

    Attributes:
        answers: by example id: a label's name, or what it wrote.
        shortened: how many examples it could not read or answer whole, by reason.
        taught: open-vqa: the answers that finetuning showed it, normalised; None where nothing tells.
    """

    answers: dict[str, str]
    shortened: dict[str, int] = dataclasses.field(default_factory=dict)
    taught: frozenset[str] | None = None


def predict(task: Task, split: Split, settings: EvalSettings) -> Predicted:
    """The model's answers to a split's examples.

    Raises:
        ValueError: the checkpoint has no head of these labels.
    """
    if settings.pictures == "shuffled":
        split = dataclasses.replace(split, examples=tuple(shuffled_pictures(split.examples, settings.seed)))
    examples = split.examples
    device = device_of(settings.device)
    model, _, tokenizer = load(settings.checkpoint, image_size=settings.image_size, impl=settings.impl)
    model.to(device)
    batches = Batches(task, model.config, tokenizer, pictures="masked" if settings.pictures == "masked" else "own")
    bfloat16 = precision_of(settings.precision, device) == "bfloat16"
    if task.head == "probe":
        return Predicted(probe.predict(task, split, model, batches, settings, bfloat16=bfloat16))
    classifier = None if task.head == "write" else _classifier(task, split, Path(settings.checkpoint), model)
    begin = tokenizer.encode(settings.begin)
    found: dict[str, str] = {}
    for first in range(0, len(examples), settings.batch):
        part = examples[first : first + settings.batch]
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            if classifier is None:
                prompts = [batches.prompt(example) for example in part]
                texts = model.generate(
                    batches.images(part), prompts, beam=settings.beam, max_len=settings.max_len, begin=begin
                )
                answers = [tokenizer.decode(text.tokens).strip() for text in texts]
            else:
                batch = batches.batch(part, None, ids=range(first, first + len(part)))
                chosen = classifier(batch.inputs(model.config).to(device)).argmax(1).tolist()
                answers = [classifier.labels[i] for i in chosen]
        found.update((example.id, answer) for example, answer in zip(part, answers, strict=True))
    shortened = {"texts cut to the model's length": len(batches.cut)}
    if classifier is None:
        shortened[f"references all longer than max_len {settings.max_len}"] = sum(
            bool(example.references)
            and min(len(tokenizer.encode(text)) for text in _truths(task, example)) >= settings.max_len
            for example in examples
        )
    return Predicted(found, {why: many for why, many in shortened.items() if many}, _taught(settings.checkpoint))


def _classifier(task: Task, split: Split, checkpoint: Path, model: SimVLM) -> Classifier:
    """The checkpoint's classifier, finetuned on this task or, where labels are told by a split, on one of the same."""
    classifier = Classifier.load(checkpoint, model).eval()
    if task.head == "answers":
        if classifier.task != task.name:
            raise ValueError(f"eval: checkpoint must be finetuned on {task.name}, got one of {classifier.task}")
    elif (classifier.labels, classifier.sequences) != (split.labels, task.sequences):
        raise ValueError(
            f"eval: checkpoint must be finetuned to the labels {', '.join(split.labels)}, "
            f"got one of {classifier.task}: {', '.join(classifier.labels[:5])}"
        )
    return classifier


def _taught(checkpoint: str) -> frozenset[str] | None:
    path = Path(checkpoint, TASK)
    answers = json.loads(path.read_text()).get("answers") if path.is_file() else None
    return None if answers is None else frozenset(answers)


def _truths(task: Task, example: Example) -> tuple[str, ...]:
    """What the model could have written: of VQA's ten answers the one that most gave."""
    return (vqav2.chosen_most(example.references),) if task.metric == "vqa" else example.references


@dataclasses.dataclass(frozen=True)
class Scored:
    """`result`: what is reported; `items`: a score for each example, by id, where there is one."""

    result: dict[str, Any]
    items: dict[str, float]


def score(
    task: Task,
    split: Split,
    predictions: Mapping[str, str],
    *,
    begin: str = "",
    taught: frozenset[str] | None = None,
    classes: frozenset[str] | None = None,
    seed: int = 0,
) -> Scored:
    """Scores of predictions by id; {} where the split has no answers or the task no metric.

    Args:
        begin: what the model was given to begin with: not its own, so not scored, nor where references begin so.
        taught: the answers that finetuning had, normalised: VQA's score is then told apart by whether it had the
            question's.
        classes: VQA's vocabulary: its score is told apart by whether a classifier could give the question's answer
            (the paper's in-domain and out-of-domain).

    Raises:
        ValueError: some examples have answers and some have none.
    """
    examples = split.examples
    if task.metric == "none":
        return Scored({"note": "nothing is scored: the texts are to be read"}, {})
    answered = [example.label is not None if split.labels else bool(example.references) for example in examples]
    if not examples:
        raise ValueError(f"{task.name}: {split.name} must have examples, got none")
    if not any(answered):
        return Scored({"note": "this split has no answers: the server has them"}, {})
    if not all(answered):
        raise ValueError(f"{task.name}: all examples of {split.name} must have answers, got {sum(answered)} that do")
    if task.metric in ("accuracy", "vqa"):
        return _score_each(task, split, predictions, taught, classes, seed)
    said = {example.id: _after(begin, predictions[example.id]) for example in examples}
    if task.metric == "bleu":
        truths = {example.id: [_after(begin, text) or text for text in example.references] for example in examples}
        return Scored(_score_texts(task, said, truths, seed), {})
    result: dict[str, Any] = {}
    items: dict[str, float] = {}
    groups = sorted({example.group for example in examples} - {""})
    for group in ["", *groups]:
        part = [example for example in examples if not group or example.group == group]
        texts = {example.id: said[example.id] for example in part}
        scores = caption_scores(texts, {example.id: example.references for example in part})
        entry = {"values": scores.values, "skipped": scores.skipped, "signatures": scores.signatures}
        if "CIDEr" in scores.items:
            entry["cider"] = dataclasses.asdict(bootstrap(list(scores.items["CIDEr"].values()), seed=seed))
        result.setdefault("captions", {})[group or "all"] = entry
        items = items or scores.items.get("CIDEr", {})
    scenes = scenes_of(examples)
    if scenes is not None:
        right = {example.id: float(judge(predictions[example.id], scenes[example.id]).correct) for example in examples}
        result["judged_right"] = dataclasses.asdict(bootstrap(list(right.values()), seed=seed))
        items = right
    return Scored(result, items)


def _after(begin: str, text: str) -> str:
    return text.removeprefix(begin).strip()


def _score_texts(task: Task, said: Mapping[str, str], truths: Mapping[str, Sequence[str]], seed: int) -> dict[str, Any]:
    """BLEU, and where a picture is all that is read CIDEr; the same of the best constant text, as a control."""
    try:
        own = _measured(task, said, truths, seed)
    except ImportError as missing:  # what was written is not lost for it
        return {"note": str(missing)}
    constant = best_constant(list(truths.values()))
    return own | {"constant": {"text": constant} | _measured(task, dict.fromkeys(said, constant), truths, seed)}


def _measured(task: Task, said: Mapping[str, str], truths: Mapping[str, Sequence[str]], seed: int) -> dict[str, Any]:
    found = bleu(list(said.values()), list(truths.values()), seed=seed)
    result: dict[str, Any] = {
        "bleu": {**dataclasses.asdict(found.interval), "signature": found.signature},
        "skipped": {"METEOR": "pycocoevalcap calls it for English alone"},
    }
    if not task.reads_source:  # captions; CIDEr weighs least what all of them say
        scores = caption_scores(said, truths, wanted=("CIDEr",))
        result["skipped"] |= scores.skipped
        if "CIDEr" in scores.items:
            result["cider"] = dataclasses.asdict(bootstrap(list(scores.items["CIDEr"].values()), seed=seed))
    return result


def samples(
    task: Task, split: Split, data: Path, predictions: Mapping[str, str], scored: Scored
) -> list[dict[str, Any]]:
    """The first examples, for whoever looks at a few.

    Returns:
        Of each: its own pictures' paths within `data`; `read`, all that the model read beside them; the prediction; the
        `reference`, what most annotators said or the first of the texts, "" where there is none; the `score`, None
        where examples have none of their own.
    """
    found = []
    for example in split.examples[:SAMPLES]:
        read = (task.prompt, example.source if task.reads_source else "", example.text)
        reference = max(example.references, key=example.references.count, default="")
        if example.label is not None:
            reference = split.labels[example.label]
        found.append(
            {
                "id": example.id,
                "images": [os.path.relpath(path, data) for path in example.images],
                "read": " ".join(filter(None, read)),
                "prediction": predictions[example.id],
                "reference": reference,
                "score": scored.items.get(example.id),
            }
        )
    return found


def scenes_of(examples: Sequence[Example]) -> dict[str, Scene] | None:
    """The generated world's scenes behind the pictures, by id; None for real pictures."""
    tables: dict[Path, Any] = {}
    found = {}
    for example in examples:
        path = example.images[0].resolve()  # COCO's pictures may be links to VQA's
        for folder in path.parents[:3]:
            if folder not in tables:
                tables[folder] = json.loads((folder / SCENES).read_text()) if (folder / SCENES).is_file() else {}
            entry = tables[folder].get(str(path.relative_to(folder)))
            if entry is not None:
                found[example.id] = scene_of(entry["split"], entry["objects"], entry["seed"])
                break
        else:
            return None
    return found


def _score_each(
    task: Task,
    split: Split,
    predictions: Mapping[str, str],
    taught: frozenset[str] | None,
    classes: frozenset[str] | None,
    seed: int,
) -> Scored:
    """Accuracy, or VQA's score, with the majority's beside it (of VQA, the majority of each question type)."""
    examples = split.examples
    groups = [example.group for example in examples]

    def truth(example: Example) -> str:
        if task.metric == "vqa":
            return vqav2.chosen_most(example.references)
        assert example.label is not None
        return split.labels[example.label]

    def value(example: Example, said: str) -> float:
        return vqa_soft_score(said, example.references) if task.metric == "vqa" else float(said == truth(example))

    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for example in examples:
        counts[example.group][truth(example)] += 1
    majority = [value(example, counts[example.group].most_common(1)[0][0]) for example in examples]
    values = [value(example, predictions[example.id]) for example in examples]
    mean = bootstrap(values, seed=seed)
    chance = sum(majority) / len(majority)
    result: dict[str, Any] = {"score": dataclasses.asdict(mean), "majority": chance}
    if len(set(groups)) > 1:
        result["groups"] = {
            name: dataclasses.asdict(interval) for name, interval in by_group(values, groups, seed=seed).items()
        }
    for name, answers, (inside, outside) in (
        ("answers", taught, ("seen", "unseen")),
        ("domain", classes, ("in-domain", "out-of-domain")),
    ):
        if answers is not None:
            known = [inside if vqa_normalise(truth(example)) in answers else outside for example in examples]
            result[name] = {
                part: dataclasses.asdict(interval) for part, interval in by_group(values, known, seed=seed).items()
            }
    if (warning := chance_warning(mean, chance)) is not None:
        result["warning"] = warning
    return Scored(result, {example.id: found for example, found in zip(examples, values, strict=True)})


def _write(
    out: Path, task: Task, split: Split, predictions: Mapping[str, str], scored: Scored, result: dict[str, Any]
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / RESULT).write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    with open(out / ITEMS, "w", encoding="utf-8") as file:
        for example in split.examples:
            line: dict[str, Any] = {"id": example.id, "group": example.group, "prediction": predictions[example.id]}
            if example.id in scored.items:
                line["score"] = scored.items[example.id]
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    if task.write_predictions is not None:
        suffix = "csv" if task.name == "nlvr2" else "json"
        task.write_predictions(out / f"predictions.{suffix}", predictions)
