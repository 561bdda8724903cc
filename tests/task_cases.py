"""The generated world's benchmarks, tiny, with a tiny model; settings of runs on them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from model_cases import TINY
from PIL import Image

from simvlm.data.tokenizer import train_tokenizer
from simvlm.model import SimVLM
from simvlm.tasks import vqav2
from simvlm.tasks.finetune import finetune
from simvlm.tasks.settings import EvalSettings, FinetuneSettings
from simvlm.tasks.table import TASKS
from simvlm.tasks.world import write_benchmarks

CONFIG = dataclasses.replace(TINY, vocab_size=400, max_text_len=64)
WORDS = ("no", "large", "striped")
"""answers of the world's questions"""
NO_STEP = (1e-30,)
"""a learning rate that leaves float32 weights as they are"""


def make_task_world(folder):
    """The benchmarks, tokenizer.model, and pretrained/, a model whose statistics are not those of a new one."""
    write_benchmarks(folder, seed=4, scale=0.01, image_size=TINY.image_size)
    lines = [line for path in sorted(folder.rglob("train.??")) for line in path.read_text().splitlines()]
    for task in ("vqav2", "nlvr2", "snli-ve", "nli", "cola"):
        lines += [example.text or example.source for example in read(folder, task).examples]
    tokenizer = train_tokenizer(lines, folder / "tokenizer.model", vocab_size=CONFIG.vocab_size)
    torch.manual_seed(5)
    model = SimVLM(dataclasses.replace(CONFIG, init_std=0.15, conv_last_weight=1.0))
    with torch.no_grad():  # tokens and places that are told apart at once
        for table in (model.embedding, model.image_positions, model.text_positions):
            table.mul_(10)
        rng = np.random.default_rng(6)
        for _ in range(40):  # statistics of pictures of all shades
            shades = rng.integers(20, 236, (16, 1, 1, 3)) + rng.integers(-20, 21, (16, 16, 16, 3))
            model.conv(torch.from_numpy(shades))
    model.save_pretrained(folder / "pretrained", tokenizer)
    (folder / "tiny.json").write_text(json.dumps(CONFIG.to_dict()))
    return folder


def read(world, task, split=None):
    return TASKS[task].read(data_of(world, task), split or TASKS[task].splits[0])


def data_of(world, task):
    return str(Path(world, TASKS[task].folder))


def finetuning(world, task, out, **changes):
    values = {"checkpoint": f"{world}/pretrained", "epochs": 1, "lr": (1e-3,), "device": "cpu", "precision": "float32"}
    if "variant" in changes:
        del values["checkpoint"]
    return FinetuneSettings(task=task, data=data_of(world, task), out=str(out), **values | changes)


def finetuned(world, task, out, **changes):
    """(what finetune.json holds, the lines of the log, the tensors of the model that was kept)."""
    result = finetune(finetuning(world, task, out, **changes))
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return result, lines, tensors_of(Path(out) / "checkpoint")


def tensors_of(checkpoint):
    tensors = safetensors.torch.load_file(Path(checkpoint) / "model.safetensors")
    head = Path(checkpoint) / "head.safetensors"
    return tensors | (safetensors.torch.load_file(head) if head.exists() else {})


def evaluating(world, task, **changes):
    values = {"device": "cpu", "precision": "float32", "beam": 1, "max_len": 8}
    return EvalSettings(task=task, data=data_of(world, task), **values | changes)


def few(monkeypatch, task, count, change=lambda examples: examples):
    """From now on the task's train and dev splits are both the first `count` training examples, changed."""
    real = TASKS[task]

    def first(folder, split, *, missing="refuse"):
        whole = real.read(folder, split, missing=missing)
        return dataclasses.replace(whole, examples=tuple(change(whole.examples[:count])))

    splits = (real.splits[0], real.splits[0], real.splits[2])
    monkeypatch.setitem(TASKS, task, dataclasses.replace(real, read=first, splits=splits))


def painted(folder, answers=10):
    """Changes examples so that pictures alone tell the class: by their brightness; of two, by their order."""
    rng = np.random.default_rng(0)
    shades = []
    for i, shade in enumerate((30, 215, 120)):
        noise = rng.integers(-25, 26, (TINY.image_size, TINY.image_size, 3))
        Image.fromarray((shade + noise).astype(np.uint8)).save(folder / f"{i}.png")
        shades.append(folder / f"{i}.png")

    def change(examples):
        found = []
        for place, example in enumerate(examples):
            kind = place % (2 if len(example.images) == 2 else 3)
            images = (shades[kind],) if len(example.images) == 1 else (shades[kind], shades[1 - kind])
            changes = {"label": kind} if example.label is not None else {"references": (WORDS[kind],) * answers}
            found.append(dataclasses.replace(example, text="what is it", source="", images=images, **changes))
        return found

    return change


def give_karpathys_splits(folder):
    """Writes `dataset_coco.json` beside VQA's files: every third picture of train is of val, and of val of test."""
    asked = {split: vqav2.read(folder, split).examples for split in ("train", "val")}
    places = {}
    for split, names in (("train", ("val", "train", "train")), ("val", ("test", "restval", "restval"))):
        numbers = sorted({_number(example) for example in asked[split]})
        places |= {number: names[i % 3] for i, number in enumerate(numbers)}
    content = json.dumps({"images": [{"cocoid": number, "split": place} for number, place in places.items()]})
    (folder / "dataset_coco.json").write_text(content)
    found = {split: [] for split in vqav2.KARPATHY}
    for example in (*asked["train"], *asked["val"]):
        found["karpathy-" + places[_number(example)].replace("restval", "train")].append(example)
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["dataset_coco.json"] = hashlib.sha256(content.encode()).hexdigest()
    manifest["counts"] |= {split: len(examples) for split, examples in found.items()}
    path.write_text(json.dumps(manifest))
    return found


def _number(example):
    return int(example.images[0].stem[-12:])
