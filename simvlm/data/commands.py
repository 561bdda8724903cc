"""`simvlm data …`: each command does its work and returns what to print."""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from simvlm.data import index, report, shards, text
from simvlm.data.shards import BrokenSample, ImageTextShards, expand
from simvlm.data.text import TextShards
from simvlm.data.tokenizer import train_tokenizer
from simvlm.data.world import write_world


def data_world(
    folder: str,
    *,
    seed: int = 0,
    pairs: int = 60_000,
    documents: int = 20_000,
    image_size: int = 64,
    sentences: bool = False,
    workers: int = 0,
) -> str:
    """`simvlm data world`: writes the generated world; `workers=0` is one for each usable core."""
    began = time.perf_counter()
    write_world(
        folder,
        seed=seed,
        pairs=pairs,
        documents=documents,
        image_size=image_size,
        sentences=sentences,
        workers=workers or _cores(),
    )
    return f"{pairs} pairs and {documents} documents in {folder} after {time.perf_counter() - began:.0f} s"


def data_index(pattern: Sequence[str], *, folder: str | None = None, workers: int = 0) -> str:
    """`simvlm data index`: makes the index of every shard anew, several at a time.

    Raises:
        ValueError: some shards cannot be read, or some indices not be written; the others were made.
    """
    began = time.perf_counter()
    names = expand(pattern)
    made = list(report.each(functools.partial(_made, folder=folder), names, workers or _cores()))
    wrong = [line for line, _ in made if line]
    found = [index for _, index in made if index is not None]
    lines = [
        f"{len(found)} of {len(names)} shards indexed, {sum(one['samples'] for one in found):,} samples, "
        f"after {time.perf_counter() - began:.0f} s",
        *(f"{one['shard']} is cut short; what is whole in it is used" for one in found if one["cut"]),
        *(f"{one['shard']}: {one['broken']} samples lack their picture or text" for one in found if one["broken"]),
    ]
    if wrong:
        print("\n".join(lines))
        raise ValueError("; ".join(wrong))
    return "\n".join(lines)


def _made(shard: str, *, folder: str | None) -> tuple[str, dict[str, Any] | None]:
    """What is wrong, and what was found."""
    try:
        made, refused = index.make(shard, (shards if shard.endswith(".tar") else text).scan, folder=folder)
    except (OSError, ValueError) as error:
        return str(error), None
    if refused is not None:
        return f"{index.place(shard, folder)} cannot be written ({refused}); --folder names another place", None
    broken = 0
    if shard.endswith(".tar"):
        sizes = made.array("places")[:, :, 1]
        broken = int(((sizes[:, 0] <= 0) | (sizes[:, 1:3].max(1, initial=-1) <= 0)).sum())
    return "", {"shard": shard, "samples": made.count, "cut": made.cut, "broken": broken}


def data_report(
    pattern: Sequence[str],
    *,
    folder: str | None = None,
    tokenizer: str | None = None,
    workers: int = 0,
    max_broken: float = 0.05,
    out: str | None = None,
) -> str:
    """`simvlm data report`: reads every sample and decodes every picture; `out` gets the same as JSON.

    Raises:
        ValueError: a shard cannot be read, or more than `max_broken` of the samples are broken.
    """
    found = report.report(expand(pattern), folder=folder, tokenizer=tokenizer, workers=workers or _cores())
    if out is not None:
        Path(out).write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    wrong = [f"{shard} cannot be read" for shard in found["unreadable"]]
    if found["broken_share"] > max_broken:
        wrong.append(
            f"{100 * found['broken_share']:.1f} % of the samples are broken, more than --max-broken {max_broken}"
        )
    if wrong:
        print(report.as_text(found))
        raise ValueError("; ".join(wrong))
    return report.as_text(found)


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def data_tokenizer(
    path: str,
    *,
    pairs: str | Sequence[str] | None,
    documents: str | Sequence[str] | None,
    folder: str | None = None,
    vocab_size: int = 32_000,
) -> str:
    """`simvlm data tokenizer`: trains SentencePiece on the texts of the shards and writes the model to `path`."""
    skipped: list[BrokenSample] = []
    tokenizer = train_tokenizer(_texts(pairs, documents, folder, skipped), path, vocab_size=vocab_size)
    lines = [f"{tokenizer.vocab_size} pieces in {path}, sha256 {tokenizer.sha256}"]
    if skipped:
        lines.append(f"skipped {len(skipped)} texts, the first: {skipped[0]}")
    return "\n".join(lines)


def _texts(
    pairs: str | Sequence[str] | None,
    documents: str | Sequence[str] | None,
    folder: str | None,
    skipped: list[BrokenSample],
) -> Iterator[str]:
    if pairs:
        captions = ImageTextShards(pairs, index=folder)
        for i in range(len(captions)):
            try:
                yield captions.text(i)
            except BrokenSample as broken:
                skipped.append(broken)
    if documents:
        texts = TextShards(documents, index=folder)
        for i in range(len(texts)):
            try:
                yield texts[i].text
            except BrokenSample as broken:
                skipped.append(broken)
