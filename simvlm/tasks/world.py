"""The benchmarks of the generated world, in the official formats: `write_benchmarks`.

    vqav2/ coco/ (the same pictures) nlvr2/ snli_ve/ nocaps/ multi30k/ imagenet/ nli/ translation/ glue/{CoLA,RTE}/

Pictures for training come from the split "train" of the scenes, all others from "test" (NoCaps also from "heldout"),
with seeds that neither pretraining nor another benchmark uses. The test questions of VQA have answers here, in files
that the official dataset keeps to itself. The same arguments write the same bytes with the same version of Pillow.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from simvlm.data.captions import benchmark_captions, prompted_caption
from simvlm.data.documents import german_prompted_caption
from simvlm.data.draws import Draws
from simvlm.data.scenes import KINDS, Scene
from simvlm.tasks import imagenet, multi30k, nli, nlvr2, nocaps, snli_ve
from simvlm.tasks.world_balance import Asked
from simvlm.tasks.world_glue import write_acceptability, write_entailment
from simvlm.tasks.world_hypotheses import ask_hypotheses, premise
from simvlm.tasks.world_pictures import UNSEEN, Folder, draw_pictures, sample_scenes
from simvlm.tasks.world_questions import answer_type, ask_questions, ten_answers
from simvlm.tasks.world_statements import PAIRS, state

BENCHMARKS = (
    "vqav2",
    "coco",
    "nlvr2",
    "snli_ve",
    "nocaps",
    "multi30k",
    "imagenet",
    "nli",
    "translation",
    "glue/CoLA",
    "glue/RTE",
)
VQA_PICTURES = {"train": 8_000, "val": 1_000, "test": 1_000}
NLVR2_PAIRS = {"train": 24_000, "dev": 1_000, "test1": 1_000}
HYPOTHESES = {"train": 40_000, "dev": 1_500, "test": 1_500}
TEXT_HYPOTHESES = {"train": 20_000, "dev": 1_500, "test": 1_500}
NOCAPS_PICTURES = 600
MULTI30K_PICTURES = {"train": 6_000, "val": 500, "test_2016_flickr": 500}
TRANSLATIONS = {"train": 20_000, "val": 500, "test": 500}
IMAGENET_PICTURES = {"train": 4_000, "val": 800}
GLUE_SENTENCES = {"train": 8_000, "dev": 800}
"""Sizes at scale 1."""

_POOL = 250
"""scenes to choose from at the least: those that no text needs are not drawn"""
_TRAIN_DIRECTORY = 1_000
"""NLVR2: sets in one of the numbered folders"""
_COCO = {"train": ("train2014", 1), "val": ("val2014", 200_001), "test": ("test2015", 400_001)}
"""folder, and the number of the first picture"""
_FLICKR = {"train": 1_000_000_001, "dev": 2_000_000_001, "test": 3_000_000_001}


def write_benchmarks(
    folder: str | os.PathLike[str], *, seed: int = 0, scale: float = 1.0, image_size: int = 64, workers: int = 1
) -> int:
    """Writes all benchmarks, each with its `manifest.json`; returns the number of pictures.

    Args:
        folder: made if missing; a benchmark that is there already is an error.
        seed: of everything.
        scale: of all sizes.
        image_size: of the square pictures, pixels.
        workers: processes that draw; the bytes do not depend on it.

    Raises:
        ValueError: a size is out of range.
        FileExistsError: the folder holds benchmarks.
    """
    if not scale > 0:
        raise ValueError(f"write_benchmarks: scale must be more than 0, got {scale}")
    for name, value in (("image_size", image_size), ("workers", workers)):
        if value < 1:
            raise ValueError(f"write_benchmarks: {name} must be at least 1, got {value}")
    root = Path(folder)
    there = [name for name in BENCHMARKS if (root / name).exists()]
    if there:
        raise FileExistsError(f"write_benchmarks: {root / there[0]} is there already; remove it first")
    folders = {name: Folder(root, name) for name in BENCHMARKS}
    _write_vqav2(folders["vqav2"], folders["coco"], seed, scale)
    _write_nlvr2(folders["nlvr2"], seed, scale)
    _write_snli_ve(folders["snli_ve"], seed, scale)
    _write_nocaps(folders["nocaps"], seed, scale)
    _write_multi30k(folders["multi30k"], seed, scale)
    _write_imagenet(folders["imagenet"], seed, scale)
    _write_nli(folders["nli"], seed, scale)
    _write_translation(folders["translation"], seed, scale)
    for split, full in GLUE_SENTENCES.items():
        count, pool = scaled(full, scale, 4), max(_POOL, scaled(full, scale))
        scenes = sample_scenes(pool, "glue", split, seed, split=_scene_split(split), plain_names=True)
        write_acceptability(folders["glue/CoLA"], split, scenes[: count // 2], Draws("CoLA", split, seed))
        write_entailment(folders["glue/RTE"], split, scenes, count, Draws("RTE", split, seed))
    pictures = draw_pictures(list(folders.values()), image_size, workers)
    for made in folders.values():
        made.finish()
    return pictures


def scaled(full: int, scale: float, multiple: int = 1) -> int:
    """A size at a scale, rounded to a multiple; never less than 12 of them."""
    return max(12, round(full * scale / multiple)) * multiple


def _scene_split(split: str) -> str:
    return "train" if split == "train" else "test"


def _write_vqav2(vqa: Folder, coco: Folder, seed: int, scale: float) -> None:
    karpathy: list[dict[str, object]] = []
    for split, full in VQA_PICTURES.items():
        scenes = sample_scenes(scaled(full, scale), "vqav2", split, seed, split=_scene_split(split))
        place, first = _COCO[split]
        names = [f"COCO_{place}_{first + i:012d}.jpg" for i in range(len(scenes))]
        for name, scene in zip(names, scenes, strict=True):
            vqa.picture(f"{place}/{name}", scene)
        _write_questions(vqa, split, ask_questions(scenes, Draws("vqav2", split, seed)), first, seed)
        captions = [benchmark_captions(scene) for scene in scenes]
        karpathy += [
            {
                "filepath": place,
                "filename": name,
                "cocoid": first + i,
                "imgid": len(karpathy) + i,
                "split": split,
                "sentences": [{"raw": caption} for caption in said],
            }
            for i, (name, said) in enumerate(zip(names, captions, strict=True))
        ]
        coco.counts[split] = len(scenes)
        if split != "test":
            coco.write_json(f"annotations/captions_{place}.json", _coco_json(first, names, captions))
            coco.counts[place] = len(scenes)
        # COCO's pictures are VQA's, as they officially are.
        coco.path.mkdir(parents=True, exist_ok=True)
        (coco.path / place).symlink_to(Path("..", vqa.path.name, place), target_is_directory=True)
    coco.write_json("dataset_coco.json", {"dataset": "coco", "images": karpathy})


def _write_questions(vqa: Folder, split: str, asked: Sequence[Asked], first: int, seed: int) -> None:
    questions: list[dict[str, object]] = []
    annotations: list[dict[str, object]] = []
    for i, queries in enumerate(asked):
        for number, (query, answer) in enumerate(queries):
            key = {"image_id": first + i, "question_id": (first + i) * 1000 + number}
            said = ten_answers(query, answer, Draws("answers", split, seed, key["question_id"]))
            questions.append(key | {"question": query.text})
            annotations.append(
                key
                | {
                    "question_type": query.group,
                    "answer_type": answer_type(query),
                    "multiple_choice_answer": answer,
                    "answers": [
                        {"answer_id": place, "answer": word, "answer_confidence": "yes"}
                        for place, word in enumerate(said, 1)
                    ],
                }
            )
    # All test questions are test-dev's too.
    names = {"test": ("test2015", "test-dev2015")}.get(split, (_COCO[split][0],))
    for name in names:
        subtype = {"task_type": "Open-Ended", "data_type": "mscoco", "data_subtype": name}
        vqa.write_json(f"v2_OpenEnded_mscoco_{name}_questions.json", subtype | {"questions": questions})
        vqa.write_json(f"v2_mscoco_{name}_annotations.json", subtype | {"annotations": annotations})
    for counted in (split, "test-dev") if split == "test" else (split,):
        vqa.counts[counted] = len(questions)


def _coco_json(
    first: int, names: Sequence[str], captions: Sequence[Sequence[str]]
) -> dict[str, list[dict[str, object]]]:
    return {
        "images": [{"id": first + i, "file_name": name} for i, name in enumerate(names)],
        "annotations": [
            {"id": len(said) * i + j, "image_id": first + i, "caption": caption}
            for i, said in enumerate(captions)
            for j, caption in enumerate(said)
        ],
    }


def _write_nlvr2(folder: Folder, seed: int, scale: float) -> None:
    for split, full in NLVR2_PAIRS.items():
        count = scaled(full, scale, PAIRS)
        scenes = sample_scenes(max(_POOL, 3 * count), "nlvr2", split, seed, split=_scene_split(split))
        lines: list[dict[str, object]] = []
        for number, judged in enumerate(state(scenes, count // PAIRS, Draws("nlvr2", split, seed))):
            directory = number // _TRAIN_DIRECTORY
            place = f"images/train/{directory}" if split == "train" else split
            for pair, one in enumerate(judged):
                stem = f"{split}-{number}-{pair}"
                for side, scene in enumerate((one.left, one.right)):
                    folder.picture(f"{place}/{stem}-img{side}.png", scenes[scene])
                line: dict[str, object] = {
                    "identifier": f"{stem}-0",
                    "sentence": one.text,
                    "label": nlvr2.LABELS[one.true],
                }
                lines.append(line | ({"directory": directory} if split == "train" else {}))
        folder.write_json_lines(f"{split}.json", lines)
        folder.counts[split] = len(lines)


def _write_snli_ve(folder: Folder, seed: int, scale: float) -> None:
    for split, full in HYPOTHESES.items():
        count = scaled(full, scale, len(nli.LABELS))
        scenes = sample_scenes(max(_POOL, count), "snli_ve", split, seed, split=_scene_split(split))
        lines: list[dict[str, object]] = []
        for i, asked in enumerate(ask_hypotheses(scenes, count, Draws("snli_ve", split, seed))):
            name = str(_FLICKR[split] + i)
            if asked:
                folder.picture(f"{snli_ve.IMAGES}/{name}.jpg", scenes[i])
            lines += [
                {
                    "Flickr30K_ID": name,
                    "gold_label": label,
                    "sentence1": benchmark_captions(scenes[i])[0],
                    "sentence2": query.text,
                    "pairID": f"{name}.jpg#{number}",
                }
                for number, (query, label) in enumerate(asked)
            ]
        folder.write_json_lines(f"snli_ve_{split}.jsonl", lines)
        folder.counts[split] = len(lines)


def _write_nli(folder: Folder, seed: int, scale: float) -> None:
    for split, full in TEXT_HYPOTHESES.items():
        count = scaled(full, scale, len(nli.LABELS))
        scenes = sample_scenes(max(_POOL, count), "nli", split, seed, split=_scene_split(split), plain_names=True)
        lines: list[dict[str, object]] = []
        for i, asked in enumerate(ask_hypotheses(scenes, count, Draws("nli", split, seed))):
            text = premise(scenes[i], Draws("nli premise", split, seed, i))
            lines += [
                {"gold_label": label, "sentence1": text, "sentence2": query.text, "pairID": f"{split}{i}#{number}"}
                for number, (query, label) in enumerate(asked)
            ]
        folder.write_json_lines(f"snli_1.0_{split}.jsonl", lines)
        folder.counts[split] = len(lines)


def _write_nocaps(folder: Folder, seed: int, scale: float) -> None:
    count = scaled(NOCAPS_PICTURES, scale, len(nocaps.DOMAINS)) // len(nocaps.DOMAINS)
    scenes: list[tuple[str, Scene]] = []
    for domain, split, objects in zip(
        nocaps.DOMAINS, ("test", "heldout", UNSEEN), ((1, 2, 3), (2, 3), (1, 2, 3)), strict=True
    ):
        # Near-domain: seen combinations beside the held-out one.
        found = sample_scenes(count, "nocaps", domain, seed, split=split, objects=objects)
        scenes += [(domain, scene) for scene in found]
    scenes = Draws("nocaps", seed).shuffled(scenes)
    names = [f"{i:016x}.jpg" for i in range(len(scenes))]
    content = _coco_json(0, names, [benchmark_captions(scene) for _, scene in scenes])
    for image, name, (domain, scene) in zip(content["images"], names, scenes, strict=True):
        image["domain"] = domain
        folder.picture(f"images/{name}", scene)
    folder.write_json("nocaps_val_4500_captions.json", content)
    folder.counts["val"] = len(scenes)


def _write_multi30k(folder: Folder, seed: int, scale: float) -> None:
    for split, full in MULTI30K_PICTURES.items():
        scenes = sample_scenes(scaled(full, scale), "multi30k", split, seed, split=_scene_split(split))
        first = _FLICKR[{"train": "train", "val": "dev"}.get(split, "test")]
        names = [f"{first + i}.jpg" for i in range(len(scenes))]
        for name, scene in zip(names, scenes, strict=True):
            folder.picture(f"{multi30k.IMAGES}/{name}", scene)
        _write_parallel(folder, split, scenes)
        folder.write_lines(f"{split}.txt", names)


def _write_translation(folder: Folder, seed: int, scale: float) -> None:
    for split, full in TRANSLATIONS.items():
        scenes = sample_scenes(scaled(full, scale), "translation", split, seed, split=_scene_split(split))
        _write_parallel(folder, split, scenes)


def _write_parallel(folder: Folder, split: str, scenes: Sequence[Scene]) -> None:
    folder.write_lines(f"{split}.en", (prompted_caption(scene) for scene in scenes))
    folder.write_lines(f"{split}.de", (german_prompted_caption(scene) for scene in scenes))
    folder.counts[split] = len(scenes)


def _write_imagenet(folder: Folder, seed: int, scale: float) -> None:
    for split, full in IMAGENET_PICTURES.items():
        each = scaled(full, scale, len(KINDS)) // len(KINDS)
        found = dict.fromkeys(KINDS, 0)
        row = 0
        while min(found.values()) < each:
            (scene,) = sample_scenes(1, imagenet.TASK, split, seed, row, split=_scene_split(split), objects=(1,))
            row += 1
            kind = scene.shapes[0].kind
            if found[kind] < each:
                folder.picture(f"{split}/{kind}/{kind}_{found[kind]}.JPEG", scene)
                found[kind] += 1
        folder.counts[split] = sum(found.values())
