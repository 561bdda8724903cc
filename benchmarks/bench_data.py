"""From a tar shard to a packed batch: pictures a second on one core, how long a start takes, how full batches are.

The limit is what Pillow needs to decode and resize the same bytes, already in memory. Ours does that, and the rest:
order, reading, the caption's tokens, prefix, crop, packing.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from PIL import Image

from benchmarks import data_problem
from benchmarks.contest import Contestant, Stopwatch
from benchmarks.record import Settings, Subject, record
from simvlm.data import prefixes
from simvlm.data.mixture import FINE, Mixture, Row, capacity_step, pack
from simvlm.data.shards import ImageTextShards
from simvlm.data.tokenizer import train_tokenizer
from simvlm.data.transforms import least_side, random_resized_crop
from simvlm.model.batch import IMAGE_TEXT, TEXT_ONLY
from simvlm.model.config import variant

OP = "data"
CASE = "photographs"
PICTURES, A_CALL, SIZE = 512, 64, 224
REPEATS = 200
BATCHES = ((64, 8), (512, 64), (4096, 512))
"""pairs and documents of the batches whose fill is told; the last is the paper's"""


def bench_data(stopwatch: Stopwatch, benchmark: Any, settings: Settings, case: str, dtype: str, direction: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        problem = Problem(Path(folder))
        subject = Subject(
            op=OP,
            case=case,
            shape=f"{A_CALL} of {PICTURES} JPEGs of 400 to 500 pixels a side, to {SIZE} pixels, with captions",
            dtype=dtype,
            direction=direction,
            flops=0,
            bytes_moved=None,
            flops_formula="Nobody counts operations here.",
            bytes_formula=None,
            checked="Tests hold its crops against Pillow's own.",
            samples=A_CALL,
        )
        # Nothing here is repeated within a call, as kernels' small shapes are: more rounds than theirs.
        longer = settings if settings.quick else dataclasses.replace(settings, budget_s=40)
        record(benchmark, stopwatch, longer, subject, problem.contestants())
        benchmark.extra_info["facts"] = {**start(Path(folder) / "million"), **fills()}


def selection(cases: list[str], dtypes: list[str], quick: bool) -> list[tuple[str, str, str]]:
    if set(cases) - {CASE}:
        raise ValueError(f"{OP}: case must be {CASE!r}, got {cases}")
    return [(CASE, "float32", "step")]


class Problem:
    """The shard, and what reads it."""

    def __init__(self, folder: Path, pictures: int = PICTURES) -> None:
        self.path = folder / "photographs.tar"
        data_problem.write_photographs(self.path, pictures)
        # Time and again, as many pairs as a real set has: shuffling a few hundred indices costs more than a million.
        pairs = ImageTextShards([str(self.path)] * REPEATS)
        captions = [pairs.text(i) for i in range(pictures)]
        tokenizer = train_tokenizer(captions, folder / "tokenizer.model", vocab_size=300)
        self.mixture = Mixture(
            pairs, None, tokenizer, pairs_per_step=A_CALL, documents_per_step=0, image_size=SIZE, row_multiple=64
        )
        self.images = [pairs[i].image_bytes for i in range(pictures)]

    def contestants(self) -> list[Contestant]:
        return [
            Contestant(name="simvlm", what="Mixture.batch: tar shard to packed batch", kind="ours", call=self.ours()),
            Contestant(
                name="webdataset",
                what="WebDataset, decode('pilrgb'), the same crop, pictures stacked; neither tokens nor order",
                kind="peer",
                call=self.webdataset(),
            ),
            Contestant(
                name="Pillow alone",
                what="draft, decode and resize of bytes in memory: the limit",
                kind="bound",
                call=self.pillow(),
            ),
        ]

    def ours(self) -> Callable[[], Any]:
        steps = itertools.count()
        return lambda: self.mixture.batch(next(steps))

    def webdataset(self) -> Callable[[], Any]:
        def crops() -> Iterator[np.ndarray]:
            for number in itertools.count():
                for place, sample in enumerate(
                    webdataset.WebDataset(str(self.path), shardshuffle=False).decode("pilrgb")
                ):
                    yield random_resized_crop(sample["jpg"], SIZE, number, place)

        stream = crops()
        return lambda: np.stack(list(itertools.islice(stream, A_CALL)))

    def pillow(self) -> Callable[[], Any]:
        images, least = itertools.cycle(self.images), least_side(SIZE)

        def resized(content: bytes) -> np.ndarray:
            with Image.open(io.BytesIO(content)) as image:
                image.draft("RGB", (least, least))
                width, height = image.size
                # The middle crop by size: of sides from 0.9487 to 1.
                box = (0.0128 * width, 0.0128 * height, 0.9872 * width, 0.9872 * height)
                return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box))

        return lambda: [resized(content) for content in itertools.islice(images, A_CALL)]


_START = """
import json, sys, time
began = time.perf_counter()
from simvlm.data.mixture import Mixture
from simvlm.data.shards import ImageTextShards
imported = time.perf_counter()
pairs = ImageTextShards(sys.argv[1] + "/*.tar")
mixture = Mixture(pairs, None, None, pairs_per_step=4096, documents_per_step=0, image_size=224)
places = [mixture.where(source, sample) for source, sample, _ in mixture.samples(0)]
ended = time.perf_counter()
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"start_s": ended - began, "start_index_s": ended - imported, "start_mib": peak / 1024}))
"""


def start(folder: Path) -> dict[str, float]:
    """Of a fresh process over a million indexed pairs, until it knows the shards and keys of the first 4,096: seconds
    (imports included, and without), and the resident memory at its peak."""
    folder.mkdir()
    data_problem.write_million(folder)
    done = subprocess.run([sys.executable, "-c", _START, str(folder)], capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def fills() -> dict[str, float]:
    """Rows that hold something over rows that there are, encoder (image tokens among them) and decoder together, by the
    batch's pairs; and of text alone."""
    found = {}
    for pairs, documents in BATCHES:
        real, room, images = _rows(pairs, documents)
        found[f"fill_{pairs}"] = (real + images) / (room + images)
        found[f"text_fill_{pairs}"] = real / room
    return found


def _rows(pairs: int, documents: int) -> tuple[int, int, int]:
    """(real, all) rows of text in encoder and decoder, and image tokens, of a batch as pretraining packs it.

    Captions have 5 to 60 tokens, half of them fewer than 16; documents fill their windows of 256.
    """
    base, rng = variant("base"), np.random.default_rng(0)
    lengths = np.concatenate([rng.lognormal(np.log(16), 0.6, pairs).clip(5, 60), np.full(documents, 256)]).astype(int)
    rows = []
    for place, length in enumerate(lengths.tolist()):
        source = IMAGE_TEXT if place < pairs else TEXT_ONLY
        prefix = prefixes.prefix_length(length, source == IMAGE_TEXT, place)
        rows.append(Row(source, place, prefixes.split([7] * length, prefix), None))
    batch = pack(rows, SIZE, capacity_step((pairs + documents) * base.max_text_len, FINE))
    real = int(batch.encoder_text_lens.sum() + batch.decoder_lens.sum())
    return real, batch.encoder_text.size + batch.targets.size, pairs * base.image_len
