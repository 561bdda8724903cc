"""Captions of fixed, unseen pictures, and how many of them are right.

A prediction is a line of `predictions.jsonl`: the picture's split and seed, from which the scene comes back, and the
caption. So anyone can judge the captions again without the model: `simvlm demo score`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from simvlm.data.captions import PROMPT
from simvlm.data.judge import Verdict, judge
from simvlm.data.scenes import Scene, fixed_scenes, render, sample_scene
from simvlm.data.tokenizer import Tokenizer
from simvlm.model.torch_model import SimVLM

FILE = "predictions.jsonl"
SPLITS = ("test", "heldout")
PICTURES = 300
"""of each split"""
MAX_LEN = 60
_ITEMS = 100
"""decoded together"""


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The caption of one picture, and the verdict on it."""

    scene: Scene
    caption: str

    @property
    def verdict(self) -> Verdict:
        return judge(self.caption, self.scene)


def predict(model: SimVLM, tokenizer: Tokenizer, *, beam: int, pictures: int = PICTURES) -> list[Prediction]:
    """Captions of the fixed pictures of both splits, `pictures` of each."""
    prompt = tokenizer.encode(PROMPT)
    predictions = []
    for split in SPLITS:
        scenes = fixed_scenes(split, pictures)
        for first in range(0, len(scenes), _ITEMS):
            part = scenes[first : first + _ITEMS]
            images = np.stack([render(scene, model.config.image_size) for scene in part])
            texts = model.generate(images, [prompt] * len(part), beam=beam, max_len=MAX_LEN)
            predictions += [
                Prediction(scene, tokenizer.decode(text.tokens)) for scene, text in zip(part, texts, strict=True)
            ]
    return predictions


def write(predictions: Sequence[Prediction], path: Path) -> None:
    """One line each."""
    with open(path, "w") as file:
        for prediction in predictions:
            scene, verdict = prediction.scene, prediction.verdict
            line = {
                "split": scene.split,
                "seed": scene.seed,
                "objects": len(scene.shapes),
                "caption": prediction.caption,
                "correct": verdict.correct,
                "reason": verdict.reason,
            }
            file.write(json.dumps(line) + "\n")


def read(path: Path) -> list[Prediction]:
    """The predictions of a file, their scenes made anew from their seeds.

    Raises:
        ValueError: a line is not what `write` writes; it is named.
    """
    predictions = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            values = json.loads(line)
            scene = sample_scene(values["seed"], objects=values["objects"], split=values["split"])
            predictions.append(Prediction(scene, values["caption"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number} must be a prediction of `simvlm demo`, got {line[:80]!r}"
            ) from error
    return predictions


def check_complete(predictions: Sequence[Prediction], source: str) -> None:
    """
    Raises:
        ValueError: these are not one prediction for each of the fixed pictures.
    """
    wanted = sorted(_identity(scene) for split in SPLITS for scene in fixed_scenes(split, PICTURES))
    got = sorted(_identity(prediction.scene) for prediction in predictions)
    if got != wanted:
        missing, extra = set(wanted) - set(got), set(got) - set(wanted)
        what = f"{len(got)} lines, {len(missing)} pictures missing, {len(extra)} others"
        raise ValueError(f"{source} must hold each of the {len(wanted)} fixed pictures once, got {what}")


def _identity(scene: Scene) -> tuple[str, int, int]:
    return scene.split, scene.seed, len(scene.shapes)


def metrics(predictions: Sequence[Prediction]) -> dict[str, float]:
    """Shares of right captions: of all test pictures, by number of objects, of held-out combinations, and the control.

    The control `caption_correct_shuffled` judges every test caption by the next picture with as many objects: how often
    these captions are right of a picture that they were not written for.
    """
    test = [prediction for prediction in predictions if prediction.scene.split == "test"]
    heldout = [prediction for prediction in predictions if prediction.scene.split == "heldout"]
    by_count = {
        count: [prediction for prediction in test if len(prediction.scene.shapes) == count] for count in (1, 2, 3)
    }
    shuffled = [
        judge(prediction.caption, other.scene).correct
        for alike in by_count.values()
        for prediction, other in zip(alike, [*alike[1:], *alike[:1]], strict=True)
    ]
    return {
        "caption_correct": _share([prediction.verdict.correct for prediction in test]),
        **{
            f"caption_correct_{count}": _share([prediction.verdict.correct for prediction in alike])
            for count, alike in by_count.items()
        },
        "caption_correct_heldout": _share([prediction.verdict.correct for prediction in heldout]),
        "caption_correct_shuffled": _share(shuffled),
    }


def _share(correct: Sequence[bool]) -> float:
    return sum(correct) / len(correct) if correct else 0.0
