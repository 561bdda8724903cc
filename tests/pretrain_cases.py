"""A small world and the settings of runs in it, for the tests of pretraining."""

from __future__ import annotations

import dataclasses
import io
import json
import tarfile
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
TIMES = ("step_s", "samples_per_s", "tokens_per_s", "data_wait_share", "model_tflops_per_s", "memory_gib", "loop_share")


def make_world(folder):
    """Shards, tokenizer.model and the tiny model's config.json."""
    write_world(folder, seed=4, pairs=60, documents=16, shard_size=32, image_size=TINY.image_size)
    pairs, documents = ImageTextShards(f"{folder}/pairs/*.tar"), TextShards(f"{folder}/documents/*.jsonl.gz")
    texts = [pairs.text(i) for i in range(len(pairs))] + [documents[i].text for i in range(len(documents))]
    train_tokenizer(texts, folder / "tokenizer.model", vocab_size=VOCABULARY)
    (folder / "tiny.json").write_text(json.dumps(CONFIG.to_dict()))
    return folder


def break_pictures(shard, every):
    """Cuts the pictures of every so many samples of a shard in half."""
    content = io.BytesIO()
    with tarfile.open(shard) as source, tarfile.open(fileobj=content, mode="w") as target:
        names = list(dict.fromkeys(member.name.partition(".")[0] for member in source))
        for member in source:
            data = source.extractfile(member).read()
            if member.name.endswith(".png") and names.index(member.name.partition(".")[0]) % every == 0:
                data = data[: len(data) // 2]
                member.size = len(data)
            target.addfile(member, io.BytesIO(data))
    shard.write_bytes(content.getvalue())


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


def step_of(engine, mixed, lr=1e-3):
    """A step of an engine that has the whole batch."""
    return engine.step(mixed, lr, mixed.batch.suffix_tokens())


def log_of(run):
    """The lines of a run's log, without what a clock says."""
    lines = [json.loads(line) for line in (Path(run) / loop.LOG).read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def model_of(run):
    found = checkpoint.newest(Path(run))
    assert found is not None
    return found[0], safetensors.numpy.load_file(found[1] / "model.safetensors")
