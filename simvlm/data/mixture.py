"""The order of samples, the mixture of every batch, and packing; a batch is a pure function of its step.

Step s takes the pairs s·P … (s+1)·P - 1 and the documents s·D … (s+1)·D - 1 of two endless shuffled streams (P : D is
the paper's 4,096 : 512). The state of the data is therefore one number, and a run that was killed goes on with the same
samples, windows, crops and prefix lengths. A sample that is broken or too short is left out and reported in its batch;
nothing is drawn in its place, so that no other sample moves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, get_args

import grain
import numpy as np

from simvlm.data import prefixes, spans
from simvlm.data.prefixes import EOS, Objective
from simvlm.data.progress import Progress
from simvlm.data.shards import BrokenSample, ImageTextShards, Sample, picture
from simvlm.data.text import Document, TextShards
from simvlm.data.tokenizer import Tokenizer
from simvlm.data.transforms import least_side, random_resized_crop
from simvlm.data.workers import Batches, Pool, Thread
from simvlm.model.batch import IGNORED, IMAGE_TEXT, TEXT_ONLY, Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Skipped:
    """A sample that was left out of its batch."""

    kind: str
    shard: str
    key: str


@dataclasses.dataclass(frozen=True)
class Mixed:
    """One step's data: the packed batch, and what is missing from it."""

    step: int
    batch: Batch
    skipped: tuple[Skipped, ...]


class Mixture:
    """Assembles the batch of any step.

    Args:
        pairs, documents: the two sources; None for a run without one.
        tokenizer: of the texts.
        pairs_per_step, documents_per_step: composition of every batch.
        image_size: side of the square pictures.
        max_text_len: tokens of a text at the most; longer ones are cut to a window.
        row_multiple: packed rows are padded to a multiple of it, so that few sizes occur.
        seed: of the order and of everything drawn for a sample.
        part: (index, count): this mixture assembles the index-th of `count` parts of every batch. Parts differ by one
            sample at the most, in pairs, in documents and in all.
        objective: how a text is divided between encoder and decoder. "prefix_lm": at a place that is drawn; "lm": as
            early as can be, after 0 tokens with an image and 1 without; "span_corruption": see spans.py.
        pairs_fraction: the share of the pairs that is used: those that a run over all of them meets first.

    Attributes:
        num_pairs: how many that are.
    """

    def __init__(
        self,
        pairs: ImageTextShards | None,
        documents: TextShards | None,
        tokenizer: Tokenizer,
        *,
        pairs_per_step: int,
        documents_per_step: int,
        image_size: int,
        max_text_len: int = 256,
        row_multiple: int = 64,
        seed: int = 0,
        part: tuple[int, int] = (0, 1),
        objective: Objective = "prefix_lm",
        pairs_fraction: float = 1.0,
    ) -> None:
        self.pairs, self.documents, self.tokenizer = pairs, documents, tokenizer
        self.pairs_per_step = pairs_per_step if pairs is not None else 0
        self.documents_per_step = documents_per_step if documents is not None else 0
        if not self.pairs_per_step + self.documents_per_step:
            raise ValueError("Mixture: a batch must hold at least one pair or document, got none of either")
        if objective not in get_args(Objective):
            raise ValueError(f"Mixture: objective must be one of {list(get_args(Objective))}, got {objective!r}")
        self.num_pairs = 0 if pairs is None else round(pairs_fraction * len(pairs))
        if pairs is not None and len(pairs) and not self.num_pairs:
            raise ValueError(
                f"Mixture: pairs_fraction must leave at least one of the {len(pairs)} pairs, got {pairs_fraction}"
            )
        self.objective = objective
        self.image_size, self.row_multiple = image_size, row_multiple
        self.max_text_len = spans.longest_text(max_text_len) if objective == "span_corruption" else max_text_len
        if self.pairs_per_step + self.documents_per_step < part[1]:
            got = self.pairs_per_step + self.documents_per_step
            raise ValueError(f"Mixture: a batch must hold a sample for each of its {part[1]} parts, got {got}")
        self.seed, self.part = seed, part
        self._pair_order = _order(pairs, seed, self.num_pairs) if self.pairs_per_step else None
        self._document_order = _order(documents, seed + 1) if self.documents_per_step else None

    def batch(self, step: int, progress: Progress | None = None) -> Mixed:
        """The batch of step `step`, counted from 0.

        Args:
            progress: is told the sample that is being read.
        """
        progress = progress or Progress("")
        progress.begin(step)
        rows: list[Row] = []
        skipped: list[Skipped] = []
        for source, index, epoch in self.samples(step):
            progress.read(source, index)
            read = self._pair if source == IMAGE_TEXT else self._document
            try:
                rows.append(read(index, (self.seed, epoch, source, index)))
            except BrokenSample as broken:
                skipped.append(Skipped(kind=broken.kind, shard=broken.shard, key=broken.key))
        return Mixed(step, pack(rows, self.image_size, self.row_multiple), tuple(skipped))

    def samples(self, step: int) -> Iterator[tuple[int, int, int]]:
        """(source, sample id, epoch) of each sample of this part of a step's batch."""
        spare_pairs = self.pairs_per_step % self.part[1]
        for source, order, per_step, first_spare in (
            (IMAGE_TEXT, self._pair_order, self.pairs_per_step, 0),
            (TEXT_ONLY, self._document_order, self.documents_per_step, spare_pairs),
        ):
            for place in _share(per_step, self.part, first_spare):
                assert order is not None
                position = step * per_step + place
                yield source, int(order[position]), position // len(order)

    def iterate(self, first_step: int, steps: int, *, workers: int = 0, prefetch: int = 2) -> Batches:
        """The batches of steps first_step … steps-1, assembled ahead; the same whatever the number of workers.

        Args:
            workers: processes that each assemble whole batches; 0: a thread does.
            prefetch: batches ahead; with processes, beside those that they are assembling.
        """
        if workers:
            return Pool(self, first_step, steps, workers, prefetch)
        return Thread(self, first_step, steps, prefetch)

    def where(self, source: int, index: int) -> tuple[str, str]:
        """(shard, key) of a sample, by its entry in a batch's `sources` and `sample_ids`."""
        shards = self.pairs if source == IMAGE_TEXT else self.documents
        assert shards is not None
        return shards.where(index)

    def _pair(self, index: int, key: tuple[int, ...]) -> Row:
        assert self.pairs is not None
        sample = self.pairs[index]
        text = self._divided(sample, True, key)
        least = least_side(self.image_size)
        image = picture(sample.image_bytes, shard=sample.shard, key=sample.key, least=least)
        return Row(IMAGE_TEXT, index, text, random_resized_crop(image, self.image_size, *key))

    def _document(self, index: int, key: tuple[int, ...]) -> Row:
        assert self.documents is not None
        return Row(TEXT_ONLY, index, self._divided(self.documents[index], False, key), None)

    def _divided(self, sample: Sample | Document, has_image: bool, key: tuple[int, ...]) -> prefixes.Split:
        tokens = prefixes.window(self.tokenizer.encode(sample.text), self.max_text_len, *key)
        corrupts = self.objective == "span_corruption"
        if corrupts and tokens[-1] == EOS:
            tokens.pop()  # its targets have an end of their own
        if len(tokens) < 2:
            raise BrokenSample("text too short", sample.shard, sample.key)
        if corrupts:
            return spans.corrupt(tokens, self.tokenizer.vocab_size, *key)
        shortest = 0 if has_image else 1
        drawn = self.objective == "prefix_lm"
        prefix = prefixes.prefix_length(len(tokens), has_image, *key) if drawn else shortest
        return prefixes.split(tokens, prefix)


def _share(total: int, part: tuple[int, int], first_spare: int) -> range:
    """The places of `total` that a part takes. What the parts do not divide goes to those from `first_spare` on."""
    index, count = part
    each, spare = divmod(total, count)
    sizes = [each + ((other - first_spare) % count < spare) for other in range(index + 1)]
    return range(sum(sizes[:-1]), sum(sizes))


FINE, COARSE = 1024, 64
"""Sizes of a batch, up to that of texts which are all as long as can be. Captions are a tenth of that: fine steps leave
2 % of their rows empty. Coarse ones are for what is compiled for each size that occurs."""


def capacity_step(most: int, sizes: int) -> int:
    """Steps of a batch's capacity, a power of 2: so large that at most `sizes` sizes up to `most` rows occur, at the
    least 64."""
    return max(64, 1 << max(most // sizes, 1).bit_length())


@dataclasses.dataclass(frozen=True)
class Row:
    """One sequence of a batch."""

    source: int
    sample_id: int
    text: prefixes.Split
    image: np.ndarray | None


def _order(source: Any, seed: int, count: int | None = None) -> Any:
    """An endless stream of indices: a fresh permutation of the source every epoch; or of the first `count` indices of
    that stream alone."""
    if not len(source):
        raise ValueError("Mixture: a source must hold at least one sample, got an empty one")
    whole = grain.MapDataset.range(len(source)).seed(seed).shuffle()
    if count is None or count == len(source):
        return _Stream(whole.repeat(), len(source))
    return _Stream(grain.MapDataset.range(count).seed(seed).shuffle().repeat(), count, whole)


class _Stream:
    def __init__(self, indices: Any, epoch_len: int, chosen: Any = None) -> None:
        self._indices, self._epoch_len, self._chosen = indices, epoch_len, chosen

    def __getitem__(self, position: int) -> int:
        index = self._indices[position]
        return index if self._chosen is None else self._chosen[index]

    def __len__(self) -> int:
        return self._epoch_len


def pack(rows: Sequence[Row], image_size: int, multiple: int) -> Batch:
    """The packed batch of some rows, padded with rows that no sequence owns."""

    def joined(part: Callable[[Row], Sequence[int]], fill: int) -> tuple[np.ndarray, np.ndarray]:
        lens = np.array([len(part(row)) for row in rows], np.int32)
        total = int(lens.sum())
        room = np.full(max(-(-total // multiple), 1) * multiple, fill, np.int32)
        room[:total] = [token for row in rows for token in part(row)]
        return room, lens

    encoder_text, encoder_text_lens = joined(lambda row: row.text.encoder_text, 0)
    decoder_inputs, decoder_lens = joined(lambda row: row.text.decoder_inputs, 0)
    targets, _ = joined(lambda row: row.text.targets, IGNORED)
    images = [row.image for row in rows if row.image is not None]
    return Batch(
        images=np.stack(images) if images else np.zeros((0, image_size, image_size, 3), np.uint8),
        has_image=np.array([row.image is not None for row in rows], bool),
        encoder_text=encoder_text,
        encoder_text_lens=encoder_text_lens,
        decoder_inputs=decoder_inputs,
        targets=targets,
        decoder_lens=decoder_lens,
        sources=np.array([row.source for row in rows], np.int8),
        sample_ids=np.array([row.sample_id for row in rows], np.int64),
    )
