"""Multi30k: pictures with an English description and its German translation, line by line.

train.en  train.de  train.txt (names of the pictures)  val.…  test_2016_flickr.…  flickr30k_images/1000092795.jpg
"""

from __future__ import annotations

import os

from simvlm.tasks.annotations import Annotations, Missing, check_split
from simvlm.tasks.examples import Example, Split
from simvlm.tasks.text_pairs import parallel_lines

TASK = "multi30k"
IMAGES = "flickr30k_images"
OFFICIAL_COUNTS = {"train": 29_000, "val": 1_014, "test_2016_flickr": 1_000}
"""as the WMT16 multimodal task has them"""


def read(folder: str | os.PathLike[str], split: str, *, missing: Missing = "refuse") -> Split:
    """A split: pictures, English as `source`, German as the only reference.

    Args:
        folder: with the files named above.
        split: "train", "val" or "test_2016_flickr".
        missing: what becomes of pictures that are missing.

    Raises:
        FileNotFoundError: a file or picture is missing.
        ValueError: files of unequal length, another count or hash.
    """
    check_split(TASK, split, tuple(OFFICIAL_COUNTS))
    annotations = Annotations(TASK, folder)
    rows = parallel_lines(annotations, [f"{split}.en", f"{split}.de", f"{split}.txt"])
    examples = [
        Example(
            id=str(number),
            images=(annotations.folder / IMAGES / image.strip(),),
            source=english,
            references=(german,),
        )
        for number, (english, german, image) in enumerate(zip(*rows, strict=True), 1)
    ]
    return annotations.split(split, examples, official=OFFICIAL_COUNTS[split], missing=missing)
