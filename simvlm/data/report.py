"""What shards hold and what is broken in them, from a look at every sample: `simvlm data report`."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import hashlib
import io
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from simvlm.data.shards import BrokenSample, ImageTextShards, picture
from simvlm.data.text import TextShards
from simvlm.data.tokenizer import Tokenizer

_EXAMPLES = 5
"""of each kind of broken sample, and of texts"""
_QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)


@dataclasses.dataclass
class ShardReport:
    """What one shard holds.

    Attributes:
        unreadable: why nothing in it can be read; "" otherwise.
        widths, heights: of the pictures, in pixels.
        broken: (kind, key) of each broken sample.
    """

    shard: str
    num_bytes: int = 0
    sha256: str = ""
    unreadable: str = ""
    cut: bool = False
    samples: int = 0
    formats: Counter[str] = dataclasses.field(default_factory=Counter)
    widths: list[int] = dataclasses.field(default_factory=list)
    heights: list[int] = dataclasses.field(default_factory=list)
    characters: list[int] = dataclasses.field(default_factory=list)
    tokens: list[int] = dataclasses.field(default_factory=list)
    broken: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    texts: list[str] = dataclasses.field(default_factory=list)


def report(
    shards: Sequence[str], *, folder: str | None = None, tokenizer: str | None = None, workers: int = 1
) -> dict[str, Any]:
    """Reads every sample of the shards and decodes every picture.

    Args:
        shards: paths of tar shards, of documents, or both.
        folder: of the index files; None: beside the shards.
        tokenizer: path of a SentencePiece model, for lengths in tokens.
        workers: processes.

    Returns:
        What JSON can hold; `broken_share` is of all samples, and 1 if nothing could be read.
    """
    look = functools.partial(_look, folder=folder, tokenizer=tokenizer)
    return _summary(list(each(look, shards, workers)))


def each(job: Any, shards: Sequence[str], workers: int) -> Iterator[Any]:
    """The job's result for each shard, in order, from so many processes."""
    if workers <= 1 or len(shards) <= 1:
        yield from map(job, shards)
        return
    # Not forked: the caller may have started threads.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(workers, len(shards)), mp_context=context) as pool:
        yield from pool.map(job, shards)


def _look(shard: str, *, folder: str | None, tokenizer: str | None) -> ShardReport:
    found = ShardReport(shard)
    try:
        found.num_bytes = os.path.getsize(shard)
        with open(shard, "rb") as file:
            found.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        source = (ImageTextShards if shard.endswith(".tar") else TextShards)(shard, index=folder)
    except (OSError, ValueError) as error:
        found.unreadable = str(error)
        return found
    found.cut, found.samples = bool(source.cut), len(source)
    model = Tokenizer(tokenizer) if tokenizer else None
    for i in range(len(source)):
        try:
            text = _sample(source, i, found)
        except BrokenSample as broken:
            found.broken.append((broken.kind, broken.key))
            continue
        except (OSError, ValueError) as error:  # a row group that cannot be decoded: nor what comes after it
            found.unreadable = f"sample {i}: {error}"
            break
        found.characters.append(len(text))
        if model is not None:
            found.tokens.append(len(model.encode(text)))
        if len(found.texts) < _EXAMPLES:
            found.texts.append(text)
    return found


def _sample(source: ImageTextShards | TextShards, i: int, found: ShardReport) -> str:
    """Its text; its picture is noted."""
    if isinstance(source, ImageTextShards):
        sample = source[i]
        width, height = picture(sample.image_bytes, shard=sample.shard, key=sample.key).size
        with Image.open(io.BytesIO(sample.image_bytes)) as image:
            found.formats[str(image.format)] += 1
        found.widths.append(width)
        found.heights.append(height)
        return sample.text
    return source[i].text


def _summary(found: Sequence[ShardReport]) -> dict[str, Any]:
    kinds = Counter(kind for one in found for kind, _ in one.broken)
    samples = sum(one.samples for one in found)
    examples = {
        kind: [
            {"shard": one.shard, "key": key} for one in found for broken_kind, key in one.broken if broken_kind == kind
        ][:_EXAMPLES]
        for kind in kinds
    }
    return {
        "shards": len(found),
        "samples": samples,
        "bytes": sum(one.num_bytes for one in found),
        "broken": dict(kinds.most_common()),
        "broken_share": sum(kinds.values()) / samples if samples else 1.0,
        "broken_examples": examples,
        "cut": [one.shard for one in found if one.cut],
        "unreadable": {one.shard: one.unreadable for one in found if one.unreadable},
        "formats": dict(sum((one.formats for one in found), Counter[str]()).most_common()),
        "widths": _quantiles(one.widths for one in found),
        "heights": _quantiles(one.heights for one in found),
        "characters": _quantiles(one.characters for one in found),
        "tokens": _quantiles(one.tokens for one in found),
        "texts": [text for one in found for text in one.texts][:_EXAMPLES],
        "sha256": {one.shard: one.sha256 for one in found},
        "samples_of_shard": {one.shard: one.samples for one in found},
    }


def _quantiles(values: Iterable[list[int]]) -> dict[str, float]:
    """min, p5, p50, p95, max, mean and sum; {} of nothing."""
    joined = np.array([x for part in values for x in part], np.int64)
    if not joined.size:
        return {}
    names = ("min", "p5", "p50", "p95", "max")
    quantiles = np.quantile(joined, _QUANTILES, method="nearest").tolist()
    return {**dict(zip(names, quantiles, strict=True)), "mean": float(joined.mean()), "sum": int(joined.sum())}


def as_text(summary: dict[str, Any]) -> str:
    """For a terminal."""
    lines = [
        f"{summary['samples']:,} samples in {summary['shards']:,} shards, {summary['bytes'] / 1e6:,.1f} MB",
        *(f"{shard} cannot be read: {why}" for shard, why in summary["unreadable"].items()),
        *(f"{shard} is cut short; what is whole in it is used" for shard in summary["cut"]),
        f"broken: {sum(summary['broken'].values()):,} ({100 * summary['broken_share']:.2f} %)",
    ]
    for kind, count in summary["broken"].items():
        places = ", ".join(f"{place['key']} of {place['shard']}" for place in summary["broken_examples"][kind])
        lines.append(f"  {kind} {count:,}: {places}{' …' if count > _EXAMPLES else ''}")
    if summary["formats"]:
        lines.append("pictures: " + ", ".join(f"{name} {count:,}" for name, count in summary["formats"].items()))
    for name in ("widths", "heights", "characters", "tokens"):
        if found := summary[name]:
            shown = ", ".join(f"{what} {found[what]:,}" for what in ("min", "p5", "p50", "p95", "max"))
            total = f", sum {found['sum']:,}" if name in ("characters", "tokens") else ""
            lines.append(f"{name}: {shown}, mean {found['mean']:.1f}{total}")
    lines += [f"text: {' '.join(text.split())[:200]}" for text in summary["texts"]]
    lines += [
        f"sha256 {digest or '-' * 64}  {summary['samples_of_shard'][shard]:>8,} samples  {shard}"
        for shard, digest in summary["sha256"].items()
    ]
    return "\n".join(lines)
