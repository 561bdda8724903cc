"""Writing and judging texts: beam search, greedy, sampling, log-probabilities, for a batch of images and prompts.

Texts are token ids; a tokenizer stands before and after. How beam search chooses is search.py's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from simvlm.model import search
from simvlm.model.batch import IGNORED
from simvlm.model.decoding import Decoding
from simvlm.model.items import BOS, EOS, PAD, Images, batch_of, check_begin
from simvlm.model.noise import mix, uniform
from simvlm.model.search import Generated
from simvlm.model.torch_model import SimVLM

_ROWS = 4096  # of logits at once

Step = Callable[[Tensor, int, Tensor | None], Tensor]
"""`Decoding.step`: last tokens, how many came before, parents → logits [n·K, V]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """Drawing each token from softmax(logits / temperature), less all but the `top_k` likeliest tokens, less all past
    the first that together reach probability `top_p`. Draws are keyed by (seed, item, step)."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, fine, what in (
            ("temperature", self.temperature > 0, "above 0"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1, or None"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
        ):
            if not fine:
                raise ValueError(f"Sampling: {name} must be {what}, got {getattr(self, name)}")


def generate(
    model: SimVLM,
    images: Images,
    prompts: Sequence[Sequence[int]] | None = None,
    *,
    beam: int = 1,
    sample: Sampling | None = None,
    max_len: int = 30,
    begin: Sequence[int] = (),
) -> list[Generated]:
    """The text that the model writes after each image and prompt.

    Args:
        model: any SimVLM; runs in eval mode.
        images: uint8[n, S, S, 3], or n of uint8[S, S, 3] and None, or None for prompts alone.
        prompts: n prefixes as token ids; None: none. An item without an image needs one.
        beam: K; 1 is greedy.
        sample: draw instead of searching.
        max_len: tokens at the most, the end included.
        begin: token ids that every text begins with, those of "Ein Bild von" for captions in German say. (The prompt
            is read by the encoder; this is written.)

    Raises:
        ValueError: an argument is not what is written here.
    """
    _at_least_one("generate", "beam", beam)
    _at_least_one("generate", "max_len", max_len)
    check_begin(begin, max_len, model.config)
    if sample is not None and beam != 1:
        raise ValueError(f"generate: beam must be 1 with sample, got {beam}")
    pieces = model.config.num_pieces
    if 2 * beam > pieces:
        raise ValueError(f"generate: beam must be at most half the vocabulary, {pieces}, got {beam}")
    batch = batch_of("generate", model.config, images, prompts, None)
    count = len(batch.has_image)
    if not count:
        return []
    with _evaluating(model):
        step = Decoding(model, batch, beam, max_len).step
        if sample is not None:
            return sample_search(step, count, sample, max_len, model.device, pieces, begin)
        return beam_search(step, count, beam, max_len, model.device, pieces, begin)


def score(
    model: SimVLM, images: Images, texts: Sequence[Sequence[int]], prompts: Sequence[Sequence[int]] | None = None
) -> Tensor:
    """ln P of each text, its end included, after its image and prompt: float[n].

    Args:
        model, images, prompts: as for `generate`.
        texts: n texts as token ids, without BOS or EOS.
    """
    batch = batch_of("score", model.config, images, prompts, texts)
    with _evaluating(model):
        inputs = batch.inputs(model.config).to(model.device)
        hidden = model(inputs)
        parts = zip(hidden.split(_ROWS), inputs.targets.long().split(_ROWS), strict=True)
        rows = [
            -F.cross_entropy(_wide(model.logits(part)), targets, reduction="none", ignore_index=IGNORED)
            for part, targets in parts
        ]
        owners = torch.from_numpy(np.repeat(np.arange(len(texts)), batch.decoder_lens)).to(model.device)
        log_p = torch.cat(rows)
        return log_p.new_zeros(len(texts)).index_add(0, owners, log_p)


def encode_image(model: SimVLM, images: np.ndarray | Tensor) -> Tensor:
    """Final states of images alone, float[Bi, I, D], from uint8[Bi, S, S, 3]; in eval mode, without gradients."""
    batch = batch_of(
        "encode_image", model.config, np.asarray(images.cpu() if isinstance(images, Tensor) else images), None, None
    )
    with _evaluating(model):
        states = model.encode(batch.inputs(model.config).to(model.device))
    return states.unflatten(0, (len(batch.images), model.config.image_len))


def beam_search(
    step: Step,
    count: int,
    beam: int,
    max_len: int,
    device: torch.device,
    pieces: int | None = None,
    begin: Sequence[int] = (),
) -> list[Generated]:
    """The best hypothesis of each item; see search.py. Of the vocabulary only the first `pieces` are written."""

    def best(tokens: list[int], time: int, parents: list[int] | None, scores: list[float]) -> search.Continuations:
        of_parents = None if parents is None else torch.tensor(parents, device=device)
        log_p = _log_p(step(torch.tensor(tokens, device=device), time, of_parents), pieces)
        totals = (log_p.new_tensor(scores)[:, None] + log_p).reshape(count, -1)
        values, ids = (x.cpu().numpy() for x in _first_best(totals, 2 * beam))
        return values, *divmod(ids, log_p.shape[1])

    return search.beam_search(best, count, beam, max_len, begin)


def sample_search(
    step: Step,
    count: int,
    sampling: Sampling,
    max_len: int,
    device: torch.device,
    pieces: int | None = None,
    begin: Sequence[int] = (),
) -> list[Generated]:
    """One drawn text per item, by the Gumbel-max trick; of the first `pieces` of the vocabulary."""
    texts: list[list[int]] = [[] for _ in range(count)]
    totals, finished = [0.0] * count, [False] * count
    tokens = torch.full((count,), BOS, device=device)
    item_keys = mix(torch.arange(count, device=device)[:, None] + mix(torch.full((1,), sampling.seed, device=device)))
    for time in range(max_len):
        log_p = _log_p(step(tokens, time, None), pieces)
        if time < len(begin):
            tokens = torch.full_like(tokens, begin[time])
            texts = [[*text, begin[time]] for text in texts]
            continue
        channels = torch.arange(log_p.shape[1], device=device)
        gumbel = -torch.log(-torch.log(uniform(mix(item_keys + time) + channels)))
        tokens = (_restricted(log_p, sampling).double() + gumbel).argmax(1)
        picked = log_p.gather(1, tokens[:, None])[:, 0]
        for item, (token, value) in enumerate(zip(tokens.tolist(), picked.tolist(), strict=True)):
            if finished[item]:
                continue
            totals[item] += value
            finished[item] = token == EOS
            if token != EOS:
                texts[item].append(token)
        if all(finished):
            break
    return [
        Generated(tuple(text), total / search.norm(len(text) + ended), ended)
        for text, total, ended in zip(texts, totals, finished, strict=True)
    ]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _log_p(logits: Tensor, pieces: int | None) -> Tensor:
    """ln p of the next token; pad and BOS, which are never targets, are never written, nor what no tokenizer knows."""
    log_p = F.log_softmax(_wide(logits), -1)[:, :pieces]
    log_p[:, [PAD, BOS]] = -math.inf
    return log_p


def _first_best(totals: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row with their ids, equal ones by lowest id (topk's order of equals is anyone's)."""
    totals = totals.clone()
    values, ids = [], []
    for _ in range(count):
        best = totals.argmax(1, keepdim=True)  # the first of equals, as documented
        values.append(totals.gather(1, best))
        ids.append(best)
        totals.scatter_(1, best, -math.inf)
    return torch.cat(values, 1), torch.cat(ids, 1)


def _restricted(log_p: Tensor, sampling: Sampling) -> Tensor:
    """Unnormalized log-probabilities to draw from; -inf for what the sampling leaves out."""
    log_p = log_p / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < log_p.shape[1]:
        least = log_p.topk(sampling.top_k).values[:, -1:]
        log_p = log_p.masked_fill(log_p < least, -math.inf)
    if sampling.top_p < 1:
        ordered, ids = log_p.sort(stable=True, dim=-1, descending=True)
        p = ordered.softmax(-1)
        beyond = p.cumsum(-1) - p >= sampling.top_p
        log_p = log_p.masked_fill(torch.zeros_like(beyond).scatter(1, ids, beyond), -math.inf)
    return log_p


@contextlib.contextmanager
def _evaluating(model: SimVLM) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def _at_least_one(op: str, name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{op}: {name} must be at least 1, got {value}")
