"""Examples as the model's packed batches: pictures, what the encoder reads, what the decoder reads and writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from simvlm.data.mixture import Row, pack
from simvlm.data.prefixes import BOS, EOS, Split
from simvlm.data.rand_augment import rand_augment
from simvlm.data.shards import BrokenSample, decode
from simvlm.data.tokenizer import Tokenizer
from simvlm.data.transforms import random_resized_crop, resize
from simvlm.model.batch import IGNORED, IMAGE_TEXT, TEXT_ONLY, Batch
from simvlm.model.config import SimVLMConfig
from simvlm.tasks.examples import Example
from simvlm.tasks.table import Task

Pictures = Literal["own", "masked", "shuffled"]
"""An example's own pictures; one flat colour in their place; those of another example."""
_GREY = 128
_ROW_MULTIPLE = 64


class Batches:
    """Makes batches of one task's examples for one model.

    Args:
        task: the benchmark.
        config: of the model.
        tokenizer: of the model.
        pictures: "masked": one flat colour stands in their place. ("shuffled": give `shuffled_pictures`.)
        augment: RandAugment after the crop.
        seed: of the crops and of RandAugment.

    Attributes:
        cut: ids of the examples whose texts were longer than the model's `max_text_len` and lost their end.
    """

    def __init__(
        self,
        task: Task,
        config: SimVLMConfig,
        tokenizer: Tokenizer,
        *,
        pictures: Pictures = "own",
        augment: bool = False,
        seed: int = 0,
    ) -> None:
        self.task, self.config, self.tokenizer = task, config, tokenizer
        self.pictures, self.augment, self.seed = pictures, augment, seed
        self.cut: set[str] = set()
        self._prompt = tokenizer.encode(task.prompt) if task.prompt else []

    def batch(
        self,
        examples: Sequence[Example],
        targets: Sequence[str] | None,
        *,
        ids: Sequence[int],
        epoch: int | None = None,
    ) -> Batch:
        """The packed batch of some examples; `task.sequences` sequences each, side by side.

        Args:
            examples: of the task.
            targets: what the decoder writes, one text each; None: it reads `Example.text`, and there is no loss.
            ids: of the examples; they key crops, dropout and stochastic depth.
            epoch: pictures are cropped at random, anew each epoch; None: they are whole, as they are for evaluation.

        Raises:
            ValueError: a picture cannot be read.
        """
        rows = []
        for place, (example, number) in enumerate(zip(examples, ids, strict=True)):
            text = self._text(example, None if targets is None else targets[place])
            images: Sequence[Path | None] = example.images or [None]
            for turn, path in enumerate(images):
                key = None if epoch is None else (self.seed, epoch, int(number), turn)
                image = None if path is None else self._image(path, key)
                source = TEXT_ONLY if image is None else IMAGE_TEXT
                own = int(number) * self.task.sequences + turn  # two pictures of one example have noise of their own
                rows.append(Row(source, own, text, image))
        return pack(rows, self.config.image_size, _ROW_MULTIPLE)

    def prompt(self, example: Example) -> list[int]:
        """What the encoder reads beside the picture, in tokens."""
        parts = [example.source if self.task.reads_source else ""]
        if self.task.head == "write":
            parts.append(example.text)  # a question that is answered in words
        tokens = [token for part in parts if part for token in self.tokenizer.encode(part)]
        return self._fitting([*self._prompt, *tokens], example)

    def images(self, examples: Sequence[Example]) -> list[np.ndarray | None]:
        """The first picture of each example, whole."""
        return [self._image(example.images[0], None) if example.images else None for example in examples]

    def _text(self, example: Example, target: str | None) -> Split:
        prompt = self.prompt(example)
        if target is None:
            read = self._fitting([BOS, *self.tokenizer.encode(example.text)] if example.text else [BOS], example)
            return Split(prompt, read, [IGNORED] * len(read))
        tokens = self._fitting([*self.tokenizer.encode(target), EOS], example)
        return Split(prompt, [BOS, *tokens[:-1]], tokens)

    def _fitting(self, tokens: list[int], example: Example) -> list[int]:
        """As many of the tokens as the model can place."""
        if len(tokens) > self.config.max_text_len:
            self.cut.add(example.id)
        return tokens[: self.config.max_text_len]

    def _image(self, path: Path, key: tuple[int, ...] | None) -> np.ndarray:
        """The square picture; cropped and augmented by the key's draws, or whole."""
        size = self.config.image_size
        if self.pictures == "masked":
            return np.full((size, size, 3), _GREY, np.uint8)
        try:
            image = decode(path.read_bytes(), shard=str(path))
        except BrokenSample as broken:
            raise ValueError(f"{self.task.name}: {path} must be a picture, got one that cannot be read") from broken
        if key is None:
            return resize(image, size)
        image = random_resized_crop(image, size, *key)
        return rand_augment(image, *key) if self.augment else image


def shuffled_pictures(examples: Sequence[Example], seed: int = 0) -> list[Example]:
    """Every example with another one's pictures, none of which is its own: the control of a model that looks.

    Raises:
        ValueError: there are no pictures, or the same for all.
    """
    # Neighbours may be of one class, as in ImageNet's folders: the next one of a shuffled order is anybody.
    order = np.random.default_rng(seed).permutation(len(examples)).tolist()
    found = list(examples)
    for place, own in enumerate(order):
        others = (examples[order[(place + step) % len(order)]].images for step in range(1, len(order)))
        images = next((images for images in others if images and set(images).isdisjoint(examples[own].images)), None)
        if images is None:
            raise ValueError("pictures: shuffled needs examples with different pictures, got none")
        found[own] = dataclasses.replace(examples[own], images=images)
    return found
