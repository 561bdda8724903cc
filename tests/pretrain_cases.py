"""A small world and the settings of runs in it, for the tests of pretraining."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import safetensors.numpy
from model_cases import TINY

from simvlm.data.shards import ImageTextShards
from simvlm.data.text import TextShards
from simvlm.data.tokenizer import train_tokenizer
from simvlm.data.world import write_world
from simvlm.train import checkpoint, loop
from simvlm.train.settings import DataSettings, PretrainSettings

VOCABULARY = 400
CONFIG = dataclasses.replace(TINY, vocab_size=VOCABULARY)
TIMES = ("step_s", "samples_per_s", "tokens_per_s", "data_wait_share")


def make_world(folder):
    """Shards, tokenizer.model and the tiny model's config.json."""
    write_world(folder, seed=4, pairs=60, documents=16, shard_size=32, image_size=TINY.image_size)
    pairs, documents = ImageTextShards(f"{folder}/pairs/*.tar"), TextShards(f"{folder}/documents/*.jsonl.gz")
    texts = [pairs.text(i) for i in range(len(pairs))] + [documents[i].text for i in range(len(documents))]
    train_tokenizer(texts, folder / "tokenizer.model", vocab_size=VOCABULARY)
    (folder / "tiny.json").write_text(json.dumps(CONFIG.to_dict()))
    return folder


def settings_of(world, out, **changes):
    data = DataSettings(
        pairs=(f"{world}/pairs/*.tar",),
        documents=(f"{world}/documents/*.jsonl.gz",),
        tokenizer=f"{world}/tokenizer.model",
        pairs_per_step=4,
        documents_per_step=2,
    )
    values = {"variant": f"{world}/tiny.json", "steps": 6, "data": data, "device": "cpu", "log_every": 1}
    return PretrainSettings(out=str(out), **values | changes)


def log_of(run):
    """The lines of a run's log, without what a clock says."""
    lines = [json.loads(line) for line in (Path(run) / loop.LOG).read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def model_of(run):
    found = checkpoint.newest(Path(run))
    assert found is not None
    return found[0], safetensors.numpy.load_file(found[1] / "model.safetensors")
