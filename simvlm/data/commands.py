"""`simvlm data …`: each command does its work and returns what to print."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence

from simvlm.data.shards import BrokenSample, ImageTextShards
from simvlm.data.text import TextShards
from simvlm.data.tokenizer import train_tokenizer
from simvlm.data.world import write_world


def data_world(
    folder: str, *, seed: int = 0, pairs: int = 60_000, documents: int = 20_000, image_size: int = 64, workers: int = 0
) -> str:
    """`simvlm data world`: writes the generated world; `workers=0` is one for each usable core."""
    began = time.perf_counter()
    write_world(
        folder,
        seed=seed,
        pairs=pairs,
        documents=documents,
        image_size=image_size,
        workers=workers or len(os.sched_getaffinity(0)),
    )
    return f"{pairs} pairs and {documents} documents in {folder} after {time.perf_counter() - began:.0f} s"


def data_tokenizer(
    path: str, *, pairs: str | Sequence[str] | None, documents: str | Sequence[str] | None, vocab_size: int = 32_000
) -> str:
    """`simvlm data tokenizer`: trains SentencePiece on the texts of the shards and writes the model to `path`."""
    skipped: list[BrokenSample] = []
    tokenizer = train_tokenizer(_texts(pairs, documents, skipped), path, vocab_size=vocab_size)
    lines = [f"{tokenizer.vocab_size} pieces in {path}, sha256 {tokenizer.sha256}"]
    if skipped:
        lines.append(f"skipped {len(skipped)} texts, the first: {skipped[0]}")
    return "\n".join(lines)


def _texts(
    pairs: str | Sequence[str] | None, documents: str | Sequence[str] | None, skipped: list[BrokenSample]
) -> Iterator[str]:
    if pairs:
        captions = ImageTextShards(pairs)
        for i in range(len(captions)):
            try:
                yield captions.text(i)
            except BrokenSample as broken:
                skipped.append(broken)
    if documents:
        texts = TextShards(documents)
        for i in range(len(texts)):
            try:
                yield texts[i].text
            except BrokenSample as broken:
                skipped.append(broken)
