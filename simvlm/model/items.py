"""Images, prompts and texts as people hand them over, as one packed batch. numpy alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from simvlm.model.batch import IMAGE_TEXT, TEXT_ONLY, Batch
from simvlm.model.config import SimVLMConfig

PAD, BOS, EOS = 0, 1, 2

Images = Sequence[np.ndarray | None] | np.ndarray | None


def batch_of(
    op: str,
    config: SimVLMConfig,
    images: Images,
    prompts: Sequence[Sequence[int]] | None,
    texts: Sequence[Sequence[int]] | None,
) -> Batch:
    """The packed batch of some items; without texts its decoder part is empty.

    Args:
        op: whose arguments these are, for its errors.
        config: of the model that reads them.
        images: uint8[n, S, S, 3], or n of uint8[S, S, 3] and None, or None for prompts alone.
        prompts, texts: n of token ids each, without BOS or EOS; None: none.

    Raises:
        ValueError: an argument is not what is written here.
    """
    given = {"images": images, "prompts": prompts, "texts": texts}
    counts = {name: len(value) for name, value in given.items() if value is not None}
    if len(set(counts.values())) != 1:
        raise ValueError(f"{op}: images, prompts and texts must be equally many, got {counts or 'none of them'}")
    (count,) = set(counts.values())
    side, vocabulary = config.image_size, config.vocab_size
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


def check_begin(begin: Sequence[int], max_len: int, config: SimVLMConfig) -> None:
    """
    Raises:
        ValueError: these tokens cannot begin a text of at most `max_len` tokens.
    """
    if not all(0 <= token < config.num_pieces and token not in (PAD, BOS, EOS) for token in begin):
        raise ValueError(f"generate: begin must be ids of words, below {config.num_pieces}, got {list(begin)}")
    if len(begin) >= max_len:
        raise ValueError(f"generate: max_len must be above begin's {len(begin)} tokens, got {max_len}")
