"""The generated world on disk, as real data comes: WebDataset tar shards of pairs and jsonl.gz shards of documents.

The same arguments write the same bytes with the same versions of Pillow and zlib.
"""

from __future__ import annotations

import concurrent.futures
import functools
import gzip
import hashlib
import io
import json
import multiprocessing
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from simvlm.data.captions import pretraining_caption
from simvlm.data.documents import document
from simvlm.data.draws import Draws
from simvlm.data.scenes import Scene, render, sample_scene
from simvlm.files import whole

_OBJECTS = (1, 2, 2, 3, 3)
"""how many shapes a training picture shows: relations are what is hard to learn, and one shape has none."""
_LANGUAGE_ODDS = ("en", "en", "de", "de", "en-de", "en-de")


def write_world(
    folder: str | os.PathLike[str],
    *,
    seed: int,
    pairs: int,
    documents: int,
    shard_size: int = 2_000,
    image_size: int = 64,
    sentences: bool = False,
    workers: int = 1,
) -> dict[str, Any]:
    """Writes `pairs/00000.tar` …, `documents/00000.jsonl.gz` … and `manifest.json`; returns the manifest.

    Args:
        folder: made if missing; shards of the same names are replaced, others are an error.
        seed: of everything; worlds of different seeds share no scene.
        pairs, documents: how many of each.
        shard_size: how many of them in one shard.
        image_size: of the square pictures.
        sentences: half of the captions are sentences ("The circle is red"), which teach to find what a word names.
        workers: processes; the bytes do not depend on it.

    Raises:
        ValueError: a count is out of range.
        FileExistsError: the folder holds shards of a larger world.
    """
    for name, value, least in (("pairs", pairs, 0), ("documents", documents, 0), ("shard_size", shard_size, 1)):
        if value < least:
            raise ValueError(f"write_world: {name} must be at least {least}, got {value}")
    root = Path(folder)
    jobs: dict[str, Callable[[Path], None]] = {}
    for shard, rows in enumerate(_shards(pairs, shard_size)):
        jobs[f"pairs/{shard:05d}.tar"] = functools.partial(_write_pairs, seed, shard, rows, image_size, sentences)
    for shard, rows in enumerate(_shards(documents, shard_size)):
        jobs[f"documents/{shard:05d}.jsonl.gz"] = functools.partial(_write_documents, seed, rows)
    stale = {str(path.relative_to(root)) for path in [*root.glob("pairs/*.tar"), *root.glob("documents/*.jsonl.gz")]}
    if stale - set(jobs):
        raise FileExistsError(f"write_world: {root} holds another world ({min(stale - set(jobs))}); remove it first")
    for part in ("pairs", "documents"):
        (root / part).mkdir(parents=True, exist_ok=True)
    paths = [root / name for name in jobs]
    if workers > 1:
        # Not forked: the caller may have started threads.
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
            hashes = list(pool.map(_write, jobs.values(), paths))
    else:
        hashes = list(map(_write, jobs.values(), paths))
    manifest = {
        "seed": seed,
        "image_size": image_size,
        "sentences": sentences,
        "pairs": pairs,
        "documents": documents,
        "sha256": dict(zip(jobs, hashes, strict=True)),
    }
    (root / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def _shards(count: int, size: int) -> Iterator[range]:
    for first in range(0, count, size):
        yield range(first, min(first + size, count))


def _write(job: Callable[[Path], None], path: Path) -> str:
    with whole(path) as aside:
        job(aside)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write_pairs(seed: int, shard: int, rows: range, image_size: int, sentences: bool, path: Path) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for row in rows:
            draws = Draws("pair", seed, row)
            scene = sample_scene(draws.below(2**62), objects=draws.choose(_OBJECTS))
            caption = pretraining_caption(scene, 0, sentences=sentences)
            key = f"{shard:05d}{row - rows.start:04d}"
            meta = {
                "key": key,
                "caption": caption.text,
                "grade": caption.grade,
                "scene": {"seed": scene.seed, "objects": len(scene.shapes), "split": scene.split},
                "width": image_size,
                "height": image_size,
                "status": "success",
            }
            for suffix, content in (
                ("png", _png(scene, image_size)),
                ("txt", caption.text.encode()),
                ("json", json.dumps(meta).encode()),
            ):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size, member.mode = len(content), 0o644
                archive.addfile(member, io.BytesIO(content))


def _write_documents(seed: int, rows: range, path: Path) -> None:
    with open(path, "wb") as raw, gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as file:
        for row in rows:
            draws = Draws("text", seed, row)
            text = document(draws.below(2**62), draws.choose(_LANGUAGE_ODDS))
            file.write(json.dumps({"text": text.text, "lang": text.lang}, ensure_ascii=False).encode() + b"\n")


def _png(scene: Scene, size: int) -> bytes:
    content = io.BytesIO()
    Image.fromarray(render(scene, size)).save(content, "png", compress_level=4)
    return content.getvalue()
