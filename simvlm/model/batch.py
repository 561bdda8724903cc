"""The packed batch: real tokens only, image-text pairs and text-only documents end to end. numpy alone.

`Batch` is what the data gives; `Batch.inputs` adds what follows from it for one architecture (positions, layouts, which
rows are the suffix), all of it on the host and once a batch, so that a step computes no integers and waits for nothing.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from simvlm.kernels.attention.layout import PrefixLayout
from simvlm.model.config import SimVLMConfig

IMAGE_TEXT, TEXT_ONLY = 0, 1
"""Values of `Batch.sources`."""
SOURCES = ("image_text", "text_only")
"""Their names, in order."""
IGNORED = -100
"""A target without loss."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """B sequences. Rows of the packed arrays past the sum of the lengths belong to nobody (static capacity).

    Attributes:
        images: uint8[Bi, S, S, 3], of the sequences that have one, in order.
        has_image: bool[B].
        encoder_text: int32[Re], every sequence's prefix; `encoder_text_lens`, int32[B].
        decoder_inputs: int32[Rd], BOS and the suffix less its last token; `decoder_lens`, int32[B].
        targets: int32[Rd], the suffix; -100 where there is no loss.
        sources: int8[B], 0 image-text, 1 text-only.
        sample_ids: int64[B]; with seed and step they key all randomness of a sample.
    """

    images: np.ndarray
    has_image: np.ndarray
    encoder_text: np.ndarray
    encoder_text_lens: np.ndarray
    decoder_inputs: np.ndarray
    targets: np.ndarray
    decoder_lens: np.ndarray
    sources: np.ndarray
    sample_ids: np.ndarray

    def __post_init__(self) -> None:
        batch = self.has_image.shape
        for name in ("encoder_text_lens", "decoder_lens", "sources", "sample_ids"):
            shape = getattr(self, name).shape
            if shape != batch:
                raise ValueError(f"Batch: {name} must have has_image's shape {batch}, got {shape}")
        if self.images.dtype != np.uint8 or self.images.ndim != 4 or self.images.shape[3] != 3:
            got = f"{self.images.dtype}{list(self.images.shape)}"
            raise ValueError(f"Batch: images must be uint8[Bi, S, S, 3], got {got}")
        if len(self.images) != self.has_image.sum():
            raise ValueError(f"Batch: images must be {self.has_image.sum()} by has_image, got {len(self.images)}")
        if self.targets.shape != self.decoder_inputs.shape:
            wanted = self.decoder_inputs.shape
            raise ValueError(f"Batch: targets must have decoder_inputs' shape {wanted}, got {self.targets.shape}")
        for name, lens in (("encoder_text", "encoder_text_lens"), ("decoder_inputs", "decoder_lens")):
            room, used = len(getattr(self, name)), int(getattr(self, lens).sum())
            if room < used:
                raise ValueError(f"Batch: {name} must have at least the {used} rows of {lens}, got {room}")

    def suffix_tokens(self) -> np.ndarray:
        """int64[2]: tokens to be predicted, of each source."""
        return np.bincount(self.sources, self.decoder_lens, minlength=len(SOURCES)).astype(np.int64)

    def encoder_lens(self, image_len: int) -> np.ndarray:
        """int64[B]: image tokens and text."""
        return self.has_image * image_len + self.encoder_text_lens.astype(np.int64)

    def encoder_layout(self, image_grid: tuple[int, int]) -> PrefixLayout:
        """Bidirectional self-attention over image and prefix."""
        lens = self.encoder_lens(image_grid[0] * image_grid[1])
        return PrefixLayout.packed(lens, image_grid=image_grid, has_image=self.has_image)

    def decoder_layout(self) -> PrefixLayout:
        """Causal self-attention over the suffix."""
        return PrefixLayout.packed(self.decoder_lens, prefix_lens=0)

    def cross_layout(self, image_grid: tuple[int, int]) -> PrefixLayout:
        """The suffix looks at image and prefix."""
        lens = self.encoder_lens(image_grid[0] * image_grid[1])
        return PrefixLayout.packed(self.decoder_lens, lens, cross=True)

    def decoder_only_layout(self, image_grid: tuple[int, int]) -> PrefixLayout:
        """One stack: image and prefix see each other, the suffix sees them and its own past."""
        prefix = self.encoder_lens(image_grid[0] * image_grid[1])
        lens = prefix + self.decoder_lens
        return PrefixLayout.packed(lens, prefix_lens=prefix, image_grid=image_grid, has_image=self.has_image)

    def inputs(self, config: SimVLMConfig) -> Inputs:
        """This batch as a model of that config reads it, still in numpy: `.to(device)` before the step.

        Raises:
            ValueError: images of another size, a text that is too long, a sequence with neither image nor prefix.
        """
        self._check(config)
        _, encoder_positions = _owners_and_positions(self.encoder_text_lens, len(self.encoder_text))
        owners, decoder_positions = _owners_and_positions(self.decoder_lens, len(self.decoder_inputs))
        continued = decoder_positions.copy()
        used = int(self.decoder_lens.sum())
        continued[:used] += self.encoder_text_lens[owners]
        common = {
            "images": self.images,
            "image_sample_ids": self.sample_ids[self.has_image],
            "targets": self.targets,
            "decoder_lens": self.decoder_lens,
            "sources": self.sources,
            "sample_ids": self.sample_ids,
            "decoder_inputs": self.decoder_inputs,
        }
        rows = len(self.images) * config.image_len + len(self.encoder_text)
        decoder_rows = len(self.decoder_inputs)
        if config.arch == "encoder_decoder":
            return Inputs(
                text=self.encoder_text,
                text_positions=encoder_positions,
                layout=_with_room(self.encoder_layout(config.image_grid), rows, rows),
                decoder_positions=continued if config.decoder_positions == "continue" else decoder_positions,
                decoder_layout=_with_room(self.decoder_layout(), decoder_rows, decoder_rows),
                cross_layout=_with_room(self.cross_layout(config.image_grid), decoder_rows, rows),
                suffix_rows=None,
                **common,
            )
        # Prefix and suffix of each sequence side by side: where each decoder token stands among text, then among rows.
        text_lens = self.encoder_text_lens + self.decoder_lens
        total = int(text_lens.sum())
        text = np.zeros(len(self.encoder_text) + len(self.decoder_inputs), np.int32)
        text_owners, text_positions = _owners_and_positions(text_lens, len(text))
        in_prefix = text_positions[:total] < self.encoder_text_lens[text_owners]
        text[:total][in_prefix] = self.encoder_text[: int(self.encoder_text_lens.sum())]
        text[:total][~in_prefix] = self.decoder_inputs[:used]
        layout = _with_room(self.decoder_only_layout(config.image_grid), rows + decoder_rows, rows + decoder_rows)
        suffix_rows = np.zeros(len(self.decoder_inputs), np.int32)
        first = layout.q_starts + layout.prefix_lens
        suffix_rows[:used] = first[owners] + decoder_positions[:used]
        return Inputs(
            text=text,
            text_positions=text_positions,
            layout=layout,
            decoder_positions=continued,
            decoder_layout=None,
            cross_layout=None,
            suffix_rows=suffix_rows,
            **common,
        )

    def _check(self, config: SimVLMConfig) -> None:
        side = config.image_size
        if self.images.shape[1:3] != (side, side):
            raise ValueError(f"Batch: images must be {side}×{side} pixels, got {self.images.shape[1:3]}")
        lens = {"encoder_text_lens": self.encoder_text_lens, "decoder_lens": self.decoder_lens}
        if config.arch == "decoder_only" or config.decoder_positions == "continue":
            lens = {"encoder_text_lens + decoder_lens": self.encoder_text_lens + self.decoder_lens}
        for name, value in lens.items():
            if value.max(initial=0) > config.max_text_len:
                raise ValueError(
                    f"Batch: {name} must be at most the model's max_text_len {config.max_text_len}, got {value.max()}"
                )
        empty = np.flatnonzero(~self.has_image & (self.encoder_text_lens == 0))
        if empty.size:
            raise ValueError(f"Batch: every sequence must have an image or a prefix, got neither for {empty[0]}")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Inputs:
    """One batch as one architecture reads it; arrays in numpy, or in torch after `.to`.

    Attributes:
        images, targets, decoder_inputs, decoder_lens, sources, sample_ids: as in `Batch`.
        image_sample_ids: int64[Bi], the sample of each image.
        text, text_positions: int32[Rt], what stands after the patches (decoder-only: prefix and suffix).
        layout: of the stack that reads images: the encoder, or the only one.
        decoder_positions: int32[Rd].
        decoder_layout, cross_layout: of the decoder; None in a decoder-only model.
        suffix_rows: int32[Rd], the row of each decoder token in the only stack; None in an encoder-decoder.
    """

    images: Any
    image_sample_ids: Any
    text: Any
    text_positions: Any
    layout: PrefixLayout
    decoder_inputs: Any
    decoder_positions: Any
    decoder_layout: PrefixLayout | None
    cross_layout: PrefixLayout | None
    suffix_rows: Any
    targets: Any
    decoder_lens: Any
    sources: Any
    sample_ids: Any

    def to(self, device: Any) -> Inputs:
        """The same in torch, on `device`; copies from pinned memory where the device is a GPU, and waits for none."""
        import torch

        pinned = torch.device(device).type == "cuda"

        def move(value: Any) -> Any:
            if value is None:
                return None
            if isinstance(value, PrefixLayout):
                return dataclasses.replace(value, bounds=move(value.bounds))
            tensor = value if isinstance(value, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(value))
            if pinned and tensor.device.type == "cpu":
                tensor = tensor.pin_memory()
            return tensor.to(device, non_blocking=True)

        fields = {field.name: move(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return Inputs(**fields)


def _with_room(layout: PrefixLayout, q_rows: int, k_rows: int) -> PrefixLayout:
    """The layout for storage of just so many rows: a compiled step must not depend on how many of them are used."""
    return dataclasses.replace(layout, q_rows=q_rows, k_rows=k_rows)


def _owners_and_positions(lens: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """The sequence of every token, int64[Σ lens], and its place there, int32[room], 0 for spare rows."""
    lens = lens.astype(np.int64)
    owners = np.repeat(np.arange(len(lens)), lens)
    positions = np.zeros(room, np.int32)
    positions[: len(owners)] = np.arange(len(owners)) - (lens.cumsum() - lens)[owners]
    return owners, positions
