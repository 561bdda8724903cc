"""Pictures of the benchmarks of the generated world, and the folders that hold them.

Every picture can be drawn again: `scenes.json` of each folder gives its scene's split, number of objects and seed.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import io
import json
import multiprocessing
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

from simvlm.data.draws import Draws
from simvlm.data.scenes import HELD_OUT, Scene, render, sample_scene
from simvlm.tasks.annotations import MANIFEST

SCENES = "scenes.json"
UNSEEN = "unseen"
"""split of the scenes in which every shape is a held-out combination"""
_OBJECTS = (1, 2, 2, 3, 3)
_CHUNK = 250
"""pictures that a process draws at once"""


def unseen_scene(seed: int, objects: int) -> Scene:
    """A scene of the split "heldout" whose other shapes are held-out combinations too."""
    scene = sample_scene(seed, objects=objects, split="heldout")
    draws = Draws("unseen scene", objects, seed)
    shapes = []
    for shape in scene.shapes:
        kind, colour = draws.choose(sorted(HELD_OUT))
        seen = (shape.kind, shape.colour) not in HELD_OUT
        shapes.append(dataclasses.replace(shape, kind=kind, colour=colour) if seen else shape)
    return dataclasses.replace(scene, split=UNSEEN, shapes=tuple(shapes))


def scene_of(split: str, objects: int, seed: int) -> Scene:
    """The scene of an entry of `scenes.json`."""
    return unseen_scene(seed, objects) if split == UNSEEN else sample_scene(seed, objects=objects, split=split)


def sample_scenes(
    count: int, *key: int | str, split: str, objects: Sequence[int] = _OBJECTS, plain_names: bool = False
) -> list[Scene]:
    """Scenes that nothing else shows: their seeds are hashes of what they are for.

    Args:
        count: how many.
        key: what they are for.
        split: of `sample_scene`, or "unseen".
        objects: how many shapes, each as likely as it is often listed.
        plain_names: no two shapes of a scene are alike in kind and colour.
    """
    scenes: list[Scene] = []
    row = 0
    while len(scenes) < count:
        draws = Draws("benchmark picture", *key, row)
        scene = scene_of(split, draws.choose(objects), draws.below(2**62))
        row += 1
        if not plain_names or len({(shape.kind, shape.colour) for shape in scene.shapes}) == len(scene.shapes):
            scenes.append(scene)
    return scenes


class Folder:
    """A benchmark's folder in the making: texts are written at once, pictures when they are drawn, the manifest last.

    Attributes:
        path: where it is.
        counts: examples of each split, for the manifest.
    """

    def __init__(self, root: Path, name: str) -> None:
        self.path = root / name
        self.counts: dict[str, int] = {}
        self._files: dict[str, str] = {}
        self._scenes: dict[str, Scene] = {}

    def write(self, name: str, text: str) -> None:
        """An annotation file."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
        self._files[name] = hashlib.sha256(text.encode()).hexdigest()

    def write_json(self, name: str, content: object) -> None:
        self.write(name, json.dumps(content, ensure_ascii=False) + "\n")

    def write_lines(self, name: str, lines: Iterable[str]) -> None:
        self.write(name, "".join(line + "\n" for line in lines))

    def write_json_lines(self, name: str, rows: Iterable[dict[str, object]]) -> None:
        self.write_lines(name, (json.dumps(row, ensure_ascii=False) for row in rows))

    def picture(self, name: str, scene: Scene) -> None:
        """A picture to be drawn: JPEG of the highest useful quality, or PNG, by its name."""
        self._scenes[name] = scene

    def jobs(self) -> list[tuple[Path, tuple[str, int, int]]]:
        """The path and scene of every picture."""
        return [
            (self.path / name, (scene.split, len(scene.shapes), scene.seed)) for name, scene in self._scenes.items()
        ]

    def finish(self) -> None:
        """Writes `scenes.json` and the manifest."""
        scenes = {
            name: {"split": scene.split, "objects": len(scene.shapes), "seed": scene.seed}
            for name, scene in self._scenes.items()
        }
        if scenes:
            self.write_json(SCENES, scenes)
        manifest = {"files": self._files, "counts": self.counts}
        (self.path / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def draw_pictures(folders: Sequence[Folder], image_size: int, workers: int) -> int:
    """Draws the pictures of all folders; returns how many."""
    jobs = [job for folder in folders for job in folder.jobs()]
    for parent in dict.fromkeys(path.parent for path, _ in jobs):
        parent.mkdir(parents=True, exist_ok=True)
    chunks = [(jobs[first : first + _CHUNK], image_size) for first in range(0, len(jobs), _CHUNK)]
    if workers > 1 and len(chunks) > 1:
        # Not forked: the caller may have started threads.
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
            list(pool.map(_draw, chunks))
    else:
        for chunk in chunks:
            _draw(chunk)
    return len(jobs)


def _draw(chunk: tuple[Sequence[tuple[Path, tuple[str, int, int]]], int]) -> None:
    jobs, image_size = chunk
    for path, (split, objects, seed) in jobs:
        image = Image.fromarray(render(scene_of(split, objects, seed), image_size))
        content = io.BytesIO()
        if path.suffix == ".png":
            image.save(content, "png", compress_level=4)
        else:
            image.save(content, "jpeg", quality=95, subsampling=0)
        path.write_bytes(content.getvalue())
