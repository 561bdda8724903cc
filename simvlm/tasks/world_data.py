"""All that `simvlm reproduce --scale demo` reads: the generated world, its benchmarks, a tokenizer of their words."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from simvlm.data.shards import ImageTextShards
from simvlm.data.text import TextShards
from simvlm.data.tokenizer import train_tokenizer
from simvlm.data.world import write_world
from simvlm.tasks.rows import Data
from simvlm.tasks.table import TASKS
from simvlm.tasks.world import write_benchmarks

PAIRS, DOCUMENTS = 60_000, 20_000
VOCAB_SIZE = 768
_TEXTS = 10_000
"""of pairs and of documents that the tokenizer learns from"""


def paths(folder: Path) -> Data:
    """Where everything lies in the folder, once it is written."""
    return Data(
        pairs=str(folder / "world/pairs/*.tar"),
        documents=str(folder / "world/documents/*.jsonl.gz"),
        tokenizer=str(folder / "tokenizer.model"),
        benchmarks=str(folder / "benchmarks"),
    )


def prepare(folder: Path, *, seed: int = 0, share: float = 1.0, workers: int = 1) -> Data:
    """Writes what is not there yet, and returns `paths(folder)`.

    Args:
        folder: of all of it.
        seed: of the world.
        share: of all sizes.
        workers: processes that draw.
    """
    data = paths(folder)
    if not (folder / "world/manifest.json").exists():
        shutil.rmtree(folder / "world", ignore_errors=True)
        write_world(
            folder / "world",
            seed=seed,
            pairs=round(share * PAIRS),
            documents=round(share * DOCUMENTS),
            sentences=True,
            workers=workers,
        )
    if not Path(data.tokenizer).exists():
        shutil.rmtree(data.benchmarks, ignore_errors=True)
        write_benchmarks(data.benchmarks, seed=seed, scale=share, workers=workers)
        # As a vocabulary of 32,000 pieces knows the words of all benchmarks, so does this one: of the training splits.
        train_tokenizer(_texts(data), data.tokenizer, vocab_size=VOCAB_SIZE)
    return data


def _texts(data: Data) -> Iterator[str]:
    captions, documents = ImageTextShards(data.pairs), TextShards(data.documents)
    yield from (captions.text(i) for i in range(min(len(captions), _TEXTS)))
    yield from (documents[i].text for i in range(min(len(documents), _TEXTS)))
    for task in TASKS.values():
        folder = Path(data.benchmarks) / task.folder
        if task.splits[0] and folder.exists():
            for example in task.read(folder, task.splits[0]).examples:
                yield from filter(None, (example.source, example.text, *example.references))
