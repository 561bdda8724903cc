"""What a model makes of samples that it never learns from, while it trains: their loss, captions of some pictures."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import numpy as np

from simvlm.data.mixture import Mixture
from simvlm.data.shards import BrokenSample, ImageTextShards, decode
from simvlm.data.text import TextShards
from simvlm.data.tokenizer import Tokenizer
from simvlm.data.transforms import resize
from simvlm.model.batch import SOURCES
from simvlm.model.config import SimVLMConfig
from simvlm.train.processes import Processes
from simvlm.train.settings import PretrainSettings
from simvlm.train.step import row_multiple
from simvlm.train.window import losses

PROMPT = "A picture of"
_SEED = 0  # the same samples, whatever the run's own


class Caption(NamedTuple):
    """A picture uint8[S, S, 3], what the model wrote of it, and the text that came with it."""

    picture: np.ndarray
    text: str
    reference: str


class HeldOut:
    """The first batches of the held-out shards, always the same.

    Args:
        settings: of the run; `settings.held_out` names the shards.
        config: of the model.
        tokenizer: of the run.
        processes: of the run; each reads its part.

    Raises:
        FileNotFoundError, ValueError: the shards are not there, or hold nothing.
    """

    def __init__(
        self, settings: PretrainSettings, config: SimVLMConfig, tokenizer: Tokenizer, processes: Processes
    ) -> None:
        own, data = settings.held_out, settings.data
        self.settings, self.config, self.tokenizer, self.processes = own, config, tokenizer, processes
        self.mixture = Mixture(
            ImageTextShards(own.pairs, index=data.index) if own.pairs else None,
            TextShards(own.documents, index=data.index) if own.documents else None,
            tokenizer,
            pairs_per_step=data.pairs_per_step or data.documents_per_step,
            documents_per_step=data.documents_per_step or data.pairs_per_step,
            image_size=config.image_size,
            max_text_len=config.max_text_len,
            row_multiple=row_multiple(settings, config.max_text_len, processes.count),
            seed=_SEED,
            part=(processes.index, processes.count),
            objective=settings.objective,
        )

    def loss(self, engine: Any) -> dict[str, float]:
        """Nats per suffix token, of the running statistics and without anything moved; every process calls it."""
        nll, tokens = np.zeros(len(SOURCES)), np.zeros(len(SOURCES), np.int64)
        for step in range(self.settings.batches):
            mixed = self.processes.together(lambda step=step: self.mixture.batch(step))  # type: ignore[misc]
            nll += engine.held_out(mixed)
            tokens += mixed.batch.suffix_tokens()
        nlls = self.processes.share(nll.view(np.int64)).view(np.float64)
        return losses(nlls.sum(0), self.processes.share(tokens).sum(0), "held_out_loss")

    def captions(self, engine: Any) -> list[Caption]:
        """Of the first pictures; [] on all processes but the first, which call it too."""
        pairs = self.mixture.pairs
        if pairs is None or not self.settings.captions:
            return []
        model = engine.usable_model()
        if model is None:
            return []
        pictures: list[np.ndarray | None] = []
        references: list[str] = []
        for i in range(len(pairs)):
            if len(pictures) == self.settings.captions:
                break
            with contextlib.suppress(BrokenSample):
                sample = pairs[i]
                pictures.append(resize(decode(sample.image_bytes), self.config.image_size))
                references.append(sample.text)
        prompts = [self.tokenizer.encode(PROMPT)] * len(pictures)
        most = min(30, self.config.max_text_len - len(self.tokenizer.encode(PROMPT)))
        generated = model.generate(pictures, prompts, max_len=most)
        texts = [self.tokenizer.decode(written.tokens) for written in generated]
        return [
            Caption(picture, f"{PROMPT} {text}", reference)
            for picture, text, reference in zip(pictures, texts, references, strict=True)
            if picture is not None
        ]
