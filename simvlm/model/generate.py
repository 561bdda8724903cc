"""Writing and judging texts: beam search, greedy, sampling, log-probabilities, for a batch of images and prompts.

Texts are token ids; a tokenizer stands before and after. Beam search keeps K live hypotheses per item, with the score

    Σ ln p / ((5 + len) / 6)^0.6        (Wu et al. 2016, eq. 14), the end counted in len

A hypothesis is finished when its end is among the K best continuations. An item is done when K have finished, or when
no live one can still win: Σ ln p only falls, so its score is at most Σ ln p / ((5 + max_len) / 6)^0.6. At the length
limit the live ones stand as they are. Ties go to the lowest id. A beam of one is greedy search.
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

from simvlm.model.batch import IGNORED, IMAGE_TEXT, TEXT_ONLY, Batch
from simvlm.model.decoding import Decoding
from simvlm.model.noise import mix, uniform
from simvlm.model.torch_model import SimVLM

PAD, BOS, EOS = 0, 1, 2
ALPHA = 0.6
_ROWS = 4096  # of logits at once

Images = Sequence[np.ndarray | None] | np.ndarray | None
Step = Callable[[Tensor, int, Tensor | None], Tensor]
"""`Decoding.step`: last tokens, how many came before, parents → logits [n·K, V]."""


@dataclasses.dataclass(frozen=True)
class Generated:
    """One text: its ids without the end, its normalized log-probability, and whether it ended before the limit."""

    tokens: tuple[int, ...]
    score: float
    finished: bool


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
) -> list[Generated]:
    """The text that the model writes after each image and prompt.

    Args:
        model: any SimVLM; runs in eval mode.
        images: uint8[n, S, S, 3], or n of uint8[S, S, 3] and None, or None for prompts alone.
        prompts: n prefixes as token ids; None: none. An item without an image needs one.
        beam: K; 1 is greedy.
        sample: draw instead of searching.
        max_len: tokens at the most, the end included.

    Raises:
        ValueError: an argument is not what is written here.
    """
    _at_least_one("generate", "beam", beam)
    _at_least_one("generate", "max_len", max_len)
    if sample is not None and beam != 1:
        raise ValueError(f"generate: beam must be 1 with sample, got {beam}")
    if 2 * beam > model.config.vocab_size:
        raise ValueError(f"generate: beam must be at most half the vocabulary, {model.config.vocab_size}, got {beam}")
    batch = _batch("generate", model, images, prompts, None)
    count = len(batch.has_image)
    if not count:
        return []
    with _evaluating(model):
        step = Decoding(model, batch, beam, max_len).step
        if sample is not None:
            return sample_search(step, count, sample, max_len, model.device)
        return beam_search(step, count, beam, max_len, model.device)


def score(
    model: SimVLM, images: Images, texts: Sequence[Sequence[int]], prompts: Sequence[Sequence[int]] | None = None
) -> Tensor:
    """ln P of each text, its end included, after its image and prompt: float[n].

    Args:
        model, images, prompts: as for `generate`.
        texts: n texts as token ids, without BOS or EOS.
    """
    batch = _batch("score", model, images, prompts, texts)
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
    batch = _batch(
        "encode_image", model, np.asarray(images.cpu() if isinstance(images, Tensor) else images), None, None
    )
    with _evaluating(model):
        states = model.encode(batch.inputs(model.config).to(model.device))
    return states.unflatten(0, (len(batch.images), model.config.image_len))


def beam_search(step: Step, count: int, beam: int, max_len: int, device: torch.device) -> list[Generated]:
    """The best hypothesis of each item; see the module's docstring."""
    searches = [_Search(beam, max_len) for _ in range(count)]
    tokens = torch.full((count * beam,), BOS, device=device)
    parents = None
    for time in range(max_len):
        log_p = _log_p(step(tokens, time, parents))
        vocabulary = log_p.shape[1]
        live = log_p.new_tensor([score for search in searches for score in search.scores])
        totals = (live[:, None] + log_p).reshape(count, beam * vocabulary)
        values, ids = _first_best(totals, 2 * beam)
        for search, row, flat in zip(searches, values.tolist(), ids.tolist(), strict=True):
            search.advance([(value, *divmod(i, vocabulary)) for value, i in zip(row, flat, strict=True)])
        if all(search.done for search in searches):
            break
        tokens = torch.tensor([token for search in searches for token in search.last], device=device)
        if beam == 1:
            continue
        parents = torch.tensor(
            [item * beam + parent for item, search in enumerate(searches) for parent in search.parents], device=device
        )
    return [search.best() for search in searches]


def sample_search(step: Step, count: int, sampling: Sampling, max_len: int, device: torch.device) -> list[Generated]:
    """One drawn text per item, by the Gumbel-max trick."""
    texts: list[list[int]] = [[] for _ in range(count)]
    totals, finished = [0.0] * count, [False] * count
    tokens = torch.full((count,), BOS, device=device)
    item_keys = mix(torch.arange(count, device=device)[:, None] + mix(torch.full((1,), sampling.seed, device=device)))
    for time in range(max_len):
        log_p = _log_p(step(tokens, time, None))
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
        Generated(tuple(text), total / _norm(len(text) + ended), ended)
        for text, total, ended in zip(texts, totals, finished, strict=True)
    ]


class _Search:
    """One item's hypotheses, on the host."""

    def __init__(self, beam: int, max_len: int) -> None:
        self.beam, self.max_len = beam, max_len
        self.done = False
        self.finished: list[Generated] = []
        # At first all beams are the same: one of them may go on.
        self.scores = [0.0] + [-math.inf] * (beam - 1)
        self.texts: list[tuple[int, ...]] = [()] * beam
        self.parents = list(range(beam))

    @property
    def last(self) -> list[int]:
        return [text[-1] if text else PAD for text in self.texts]

    def advance(self, candidates: list[tuple[float, int, int]]) -> None:
        """Takes the 2K best (Σ ln p, parent, token), best first."""
        if self.done:
            self.parents = list(range(self.beam))
            return
        live: list[tuple[float, int, tuple[int, ...]]] = []
        for rank, (value, parent, token) in enumerate(candidates):
            text = self.texts[parent]
            if token == EOS:
                if rank < self.beam and len(self.finished) < self.beam and value > -math.inf:
                    self.finished.append(Generated(text, value / _norm(len(text) + 1), True))
            elif len(live) < self.beam:
                live.append((value, parent, (*text, token)))
        self.scores = [value for value, _, _ in live]
        self.parents = [parent for _, parent, _ in live]
        self.texts = [text for _, _, text in live]
        best_possible = max(self.scores) / _norm(self.max_len)
        self.done = len(self.finished) >= self.beam or any(text.score >= best_possible for text in self.finished)

    def best(self) -> Generated:
        texts = list(self.finished)
        if not self.done:
            texts += [
                Generated(text, value / _norm(len(text)), False)
                for value, text in zip(self.scores, self.texts, strict=True)
            ]
        return max(texts, key=lambda text: text.score)  # the first of equals


def _norm(length: int) -> float:
    return ((5 + length) / 6) ** ALPHA


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _log_p(logits: Tensor) -> Tensor:
    """ln p of the next token; pad and BOS, which are never targets, are never written."""
    log_p = F.log_softmax(_wide(logits), -1)
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


def _batch(
    op: str,
    model: SimVLM,
    images: Images,
    prompts: Sequence[Sequence[int]] | None,
    texts: Sequence[Sequence[int]] | None,
) -> Batch:
    """The packed batch of some items; without texts its decoder part is empty."""
    given = {"images": images, "prompts": prompts, "texts": texts}
    counts = {name: len(value) for name, value in given.items() if value is not None}
    if len(set(counts.values())) != 1:
        raise ValueError(f"{op}: images, prompts and texts must be equally many, got {counts or 'none of them'}")
    (count,) = set(counts.values())
    side, vocabulary = model.config.image_size, model.config.vocab_size
    pictures = [None] * count if images is None else list(images)
    for i, picture in enumerate(pictures):
        shape = (side, side, 3)
        if picture is not None and (picture.dtype != np.uint8 or picture.shape != shape):
            raise ValueError(
                f"{op}: images must be uint8{list(shape)}, got {picture.dtype}{list(picture.shape)} at {i}"
            )
    prompts = [[]] * count if prompts is None else prompts
    for name, many in (("prompts", prompts), ("texts", texts or [])):
        for i, ids in enumerate(many):
            if not all(0 <= token < vocabulary for token in ids):
                raise ValueError(f"{op}: {name} must be token ids below {vocabulary}, got {list(ids)} at {i}")
            if name == "prompts" and not len(ids) and pictures[i] is None:
                raise ValueError(f"{op}: prompts must not be empty where there is no image, got an empty one at {i}")
    real = [picture for picture in pictures if picture is not None]
    prompt_lens = np.array([len(ids) for ids in prompts], np.int32)
    text_lens = np.array([len(ids) + 1 for ids in texts] if texts is not None else [0] * count, np.int32)
    return Batch(
        images=np.stack(real) if real else np.zeros((0, side, side, 3), np.uint8),
        has_image=np.array([picture is not None for picture in pictures], bool),
        encoder_text=np.array([token for ids in prompts for token in ids], np.int32),
        encoder_text_lens=prompt_lens,
        decoder_inputs=np.array([token for ids in texts or [] for token in (BOS, *ids)], np.int32),
        targets=np.array([token for ids in texts or [] for token in (*ids, EOS)], np.int32),
        decoder_lens=text_lens,
        sources=np.array([TEXT_ONLY if picture is None else IMAGE_TEXT for picture in pictures], np.int8),
        sample_ids=np.arange(count),
    )


def _at_least_one(op: str, name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{op}: {name} must be at least 1, got {value}")
