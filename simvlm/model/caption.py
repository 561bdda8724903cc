"""`simvlm caption`: pictures in, captions out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from simvlm.model.generate import Sampling
from simvlm.model.weights import load

_PICTURES = 64
"""captioned together"""


def caption(
    paths: Sequence[str],
    *,
    folder: str,
    prompt: str = "A picture of",
    beam: int = 4,
    sample: Sampling | None = None,
    max_len: int = 60,
    begin: str = "",
) -> tuple[list[str | None], list[str]]:
    """The caption of each picture, without the prompt, and what went wrong with the others.

    Args:
        paths: of the pictures.
        folder: of the model, as `simvlm.load` takes it.
        prompt: the words that the caption goes on from; "" for none.
        beam, sample, max_len: as for `simvlm.model.generate.generate`.
        begin: the words that the caption begins with, of another language say; it includes them.

    Returns:
        A caption per path, None where the picture cannot be read; and a line for each of those, naming it.

    Raises:
        FileNotFoundError, ValueError: there is no such model, or an option is not legal.
    """
    model, preprocess, tokenizer = load(folder)
    pictures: list[np.ndarray | None] = []
    problems = []
    for path in paths:
        try:
            pictures.append(preprocess(path))
        except (OSError, ValueError) as error:
            pictures.append(None)
            problems.append(str(error))
    readable = [picture for picture in pictures if picture is not None]
    texts: list[str] = []
    for first in range(0, len(readable), _PICTURES):
        part = readable[first : first + _PICTURES]
        prompts = [tokenizer.encode(prompt)] * len(part)
        beams = 1 if sample is not None else beam
        written = model.generate(
            part, prompts, beam=beams, sample=sample, max_len=max_len, begin=tokenizer.encode(begin)
        )
        texts += [tokenizer.decode(text.tokens) for text in written]
    rest = iter(texts)
    return [None if picture is None else next(rest) for picture in pictures], problems
