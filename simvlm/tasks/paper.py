"""What the paper (Wang et al. 2022) reports, in points, for the page of `simvlm reproduce`.

Figures were either seen in a text that quotes the paper or are recalled; a recalled one says so wherever it is shown,
and should be looked up before it is quoted.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Figure:
    """A number of the paper's; `recalled`: nobody has looked it up."""

    value: float
    recalled: bool = True

    def __str__(self) -> str:
        return f"{self.value:g}{' (recalled)' if self.recalled else ''}"


_SEEN = False

ABLATION = {
    "full": Figure(67.43),
    "no-pretraining": Figure(49.70),
    "span-corruption": Figure(66.23),
    "without-image-text": Figure(49.23),
    "linear-patches": Figure(63.11),
    "without-text": Figure(65.25),
    "fewer-stages": Figure(65.57),
    "one-stage-more": Figure(66.55),
    "decoder-only": Figure(65.23),
    "decoder-only-lm": Figure(64.48),
    "tenth-of-pairs": Figure(66.71),
}
"""VQA of the small model, by row; "lm", with an encoder, is not among those that are known."""

BASE = {
    "vqav2": Figure(78.14, _SEEN),  # test-std
    "nlvr2": Figure(81.77, _SEEN),  # test-P
    "snli-ve": Figure(84.15),  # test
    "coco/finetuned-own": Figure(134.8),  # CIDEr
    "coco/zero-shot-own": Figure(24.0),
    "nocaps/finetuned": Figure(94.8, _SEEN),
    "nocaps/zero-shot": Figure(83.5),
    "nocaps/zero-shot in-domain": Figure(83.2),
    "nocaps/zero-shot near-domain": Figure(84.1),
    "nocaps/zero-shot out-domain": Figure(82.5),
    "multi30k": Figure(46.6),  # BLEU-4
    "snli-ve/zero-shot": Figure(71.02),  # test
    "german-captions/zero-shot": Figure(15.0),  # BLEU-4
    "open-vqa all": Figure(71.3),  # with some answers left out of finetuning
    "open-vqa seen": Figure(77.1),
    "open-vqa unseen": Figure(27.1),
    "imagenet": Figure(80.6),
}
"""Of SimVLM Base."""
