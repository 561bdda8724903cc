"""What the processes of a run tell each other once a step, and its sums between two lines of the log."""

from __future__ import annotations

import operator
import time
from typing import Any, NamedTuple

import numpy as np

from simvlm.data.mixture import Mixed
from simvlm.model.batch import SOURCES
from simvlm.model.config import SimVLMConfig
from simvlm.train.cost import step_cost
from simvlm.train.step import StepLoss


class Told(NamedTuple):
    """Of one process, or summed over all.

    failed, stops: no batch came; it was asked to stop. written: its part of the checkpoint on its way is on the disk.
    skipped, samples, rows: samples left out; samples and tokens in the batch. ids: a sum of hashes of step and sample.
    flops: of the model, forward and backward.
    """

    failed: int = 0
    stops: int = 0
    written: int = 0
    skipped: int = 0
    samples: int = 0
    rows: int = 0
    image_text_tokens: int = 0
    text_only_tokens: int = 0
    ids: int = 0
    flops: int = 0

    @classmethod
    def of(cls, mixed: Mixed, config: SimVLMConfig, *, stops: bool, written: bool) -> Told:
        """What this process tells of its part of a batch."""
        batch = mixed.batch
        image_text, text_only = batch.suffix_tokens().tolist()
        cost = step_cost(config, len(batch.images), batch.encoder_text_lens, batch.decoder_lens)
        return cls(
            stops=int(stops),
            written=int(written),
            skipped=len(mixed.skipped),
            samples=len(batch.sources),
            rows=int(batch.encoder_lens(config.image_len).sum() + batch.decoder_lens.sum()),
            image_text_tokens=image_text,
            text_only_tokens=text_only,
            ids=_hash(mixed.step, batch.sources, batch.sample_ids),
            flops=cost.model_flops,
        )

    @property
    def tokens(self) -> np.ndarray:
        """int64[2], suffix tokens of each source."""
        return np.array([self.image_text_tokens, self.text_only_tokens])


class Window:
    """What is summed up between two lines of the log.

    Args:
        peak_flops: of all devices together, a second; None where unknown.

    Attributes:
        waited, stepped: seconds that went into waiting for data, and into the engine's steps.
    """

    def __init__(self, peak_flops: float | None) -> None:
        self.peak_flops = peak_flops
        self.began = time.perf_counter()
        self.waited = self.stepped = 0.0
        self.nll = np.zeros(2)
        self.sums = Told()
        self.steps = 0
        self.grad_norm = 0.0

    def add(self, told: Told, loss: StepLoss) -> None:
        # Integers of any size: a window of a large model holds more than 2**63 FLOPs.
        self.sums = Told(*map(operator.add, self.sums, told))
        self.nll += loss.nll
        self.grad_norm += loss.grad_norm
        self.steps += 1

    def summary(self) -> dict[str, Any]:
        """Losses per suffix token, in nats; rates per second, over all processes."""
        told = self.sums
        seconds = time.perf_counter() - self.began
        flops = told.flops / seconds
        utilization = {} if self.peak_flops is None else {"mfu": flops / self.peak_flops}
        return {
            **losses(self.nll, told.tokens),
            "image_text_token_share": float(told.image_text_tokens / max(told.tokens.sum(), 1)),
            "grad_norm": self.grad_norm / self.steps,
            "step_s": seconds / self.steps,
            "samples_per_s": told.samples / seconds,
            "tokens_per_s": told.rows / seconds,
            "model_tflops_per_s": flops / 1e12,
            **utilization,
            "data_wait_share": self.waited / seconds,
            "loop_share": max(0.0, 1 - (self.waited + self.stepped) / seconds),
            "sample_ids_hash": f"{told.ids % 2**64:016x}",
        }


def losses(nll: np.ndarray, tokens: np.ndarray, name: str = "loss") -> dict[str, float]:
    """Nats per suffix token: over all of them, and of each source that has any."""
    of_source = nll / np.maximum(tokens, 1)
    parts = {f"{name}_{source}": float(x) for source, x, n in zip(SOURCES, of_source, tokens, strict=True) if n}
    return {name: float(nll.sum() / max(int(tokens.sum()), 1)), **parts}


def _hash(step: int, sources: np.ndarray, sample_ids: np.ndarray) -> int:
    """A sum over the samples, so that it does not depend on who has which: of splitmix64 (Steele et al. 2014)."""
    x = sample_ids.astype(np.uint64) * np.uint64(2) + sources.astype(np.uint64)
    x = (x + np.uint64(step * 0x632BE59BD9B4E019 % 2**64)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return int((x ^ (x >> np.uint64(31))).sum(dtype=np.uint64).astype(np.int64))
