"""VQAv2: questions and annotations as JSON, COCO's pictures.

    v2_OpenEnded_mscoco_train2014_questions.json    v2_mscoco_train2014_annotations.json
    train2014/COCO_train2014_000000000009.jpg       val2014/…  test2015/…

The official test splits have no annotations; where an annotations file lies there all the same (the generated world's
does), it is read. With Karpathy's `dataset_coco.json` in the folder, train and val can be split as VL-T5 does
(Cho et al. 2021), by the split that their pictures have there: answers are known for all of its test split.
"""

from __future__ import annotations

import collections
import os
from collections.abc import Callable, Iterator, Mapping, Sequence

from simvlm.tasks import predictions as files
from simvlm.tasks.annotations import Annotations, Missing, check_split
from simvlm.tasks.examples import Example, Split

TASK = "vqav2"
ANSWERS = 10
"""of every question"""
_FILES = {
    "train": ("train2014", "train2014"),
    "val": ("val2014", "val2014"),
    "test-dev": ("test-dev2015", "test2015"),
    "test": ("test2015", "test2015"),
}
"""how file names say the split, and its pictures' folder"""
KARPATHY = {"karpathy-train": ("train", "restval"), "karpathy-val": ("val",), "karpathy-test": ("test",)}
"""what `dataset_coco.json` calls the split of their pictures"""
OFFICIAL_COUNTS = {
    "train": 443_757,
    "val": 214_354,
    "test-dev": 107_394,
    "test": 447_793,
    "karpathy-train": 605_102,
    "karpathy-val": 26_729,
    "karpathy-test": 26_280,
}
"""questions: visualqa.org/download.html; of Karpathy's splits: VL-T5's files, github.com/j-min/VL-T5/issues/6"""


def read(folder: str | os.PathLike[str], split: str, *, missing: Missing = "refuse") -> Split:
    """A split: pictures, questions as `text`, ten answers as `references`, question types as `group`.

    Args:
        folder: with the files named above.
        split: "train", "val", "test-dev" or "test"; "karpathy-train", "karpathy-val" or "karpathy-test".
        missing: what becomes of questions whose picture is.

    Raises:
        FileNotFoundError: a file or picture is missing.
        ValueError: a record is not as it should be, a question has no answers, another count or hash.
    """
    check_split(TASK, split, (*_FILES, *KARPATHY))
    annotations = Annotations(TASK, folder)
    if split in KARPATHY:
        places = _karpathy(annotations)
        asked = (question for part in ("train", "val") for question in _questions(annotations, part))
        examples = [example for image, example in asked if places.get(image) in KARPATHY[split]]
    else:
        examples = [example for _, example in _questions(annotations, split)]
    return annotations.split(split, examples, official=OFFICIAL_COUNTS[split], missing=missing, unique=True)


def answer_vocabulary(
    folder: str | os.PathLike[str], *, normalise: Callable[[str], str], least: int = 9
) -> tuple[str, ...]:
    """The classes of the classifier: the answers often chosen (`multiple_choice_answer`) in train and val.

    Args:
        folder: as for `read`.
        normalise: `vqa_normalise` of simvlm.tasks.metrics.
        least: how often.

    Returns:
        Normalised answers, the most frequent first, equals by the alphabet.

    Raises:
        ValueError: no answer is that frequent.
    """
    annotations = Annotations(TASK, folder)
    counts: collections.Counter[str] = collections.Counter()
    for split in ("train", "val"):
        for record in annotations.json(_annotations_file(split)).records("annotations"):
            counts[normalise(record.string("multiple_choice_answer"))] += 1
    kept = [answer for answer, count in counts.items() if count >= least]
    if not kept:
        raise ValueError(
            f"{TASK}: least must leave at least one answer, got {least}; the most frequent: {counts.most_common(1)}"
        )
    return tuple(sorted(kept, key=lambda answer: (-counts[answer], answer)))


def chosen_most(answers: Sequence[str]) -> str:
    """The answer of most annotators, the first of equals: what the decoder is taught to write."""
    return max(answers, key=answers.count)


def soft_scores(
    answers: Sequence[str],
    classes: Mapping[str, int],
    *,
    normalise: Callable[[str], str],
    soft_score: Callable[[str, Sequence[str]], float],
) -> dict[int, float]:
    """The official scores of all classes that score at all: the classifier's targets.

    Args:
        answers: the ten of a question.
        classes: index of each answer of the vocabulary.
        normalise, soft_score: `vqa_normalise` and `vqa_soft_score` of simvlm.tasks.metrics.
    """
    distinct = dict.fromkeys(map(normalise, answers))
    scores = {classes[answer]: soft_score(answer, answers) for answer in distinct if answer in classes}
    return {index: score for index, score in scores.items() if score > 0}


def write_predictions(path: str | os.PathLike[str], predictions: Mapping[str, str]) -> None:
    """The server's format, `[{"question_id": 17, "answer": "yes"}, …]`, of answers by question id."""
    files.write_list(path, predictions, "question_id", "answer")


def read_predictions(path: str | os.PathLike[str]) -> dict[str, str]:
    """Answers by question id.

    Raises:
        ValueError: the file is in another format.
    """
    return files.read_list(path, TASK, "question_id", "answer")


def _karpathy(annotations: Annotations) -> dict[int, str]:
    """The split of each picture, by COCO's number."""
    names = [name for names in KARPATHY.values() for name in names]
    images = annotations.json("dataset_coco.json").records("images")
    return {image.integer("cocoid"): image.choice("split", names) for image in images}


def _questions(annotations: Annotations, split: str) -> Iterator[tuple[int, Example]]:
    """(COCO's number of the picture, question) of one of the official splits."""
    name, pictures = _FILES[split]
    answers: dict[int, tuple[str, tuple[str, ...]]] | None = None
    if split in ("train", "val") or (annotations.folder / _annotations_file(split)).exists():
        answers = _answers(annotations, split)
    for record in annotations.json(f"v2_OpenEnded_mscoco_{name}_questions.json").records("questions"):
        number, picture = record.integer("question_id"), record.integer("image_id")
        kind, references = "", tuple[str, ...]()
        if answers is not None:
            if number not in answers:
                raise ValueError(
                    f"{TASK}: question {number} must have answers in {_annotations_file(split)}, got none; "
                    "download both files again"
                )
            kind, references = answers[number]
        yield (
            picture,
            Example(
                id=str(number),
                images=(annotations.folder / pictures / f"COCO_{pictures}_{picture:012d}.jpg",),
                text=record.text("question"),
                references=references,
                group=kind,
            ),
        )


def _annotations_file(split: str) -> str:
    return f"v2_mscoco_{_FILES[split][0]}_annotations.json"


def _answers(annotations: Annotations, split: str) -> dict[int, tuple[str, tuple[str, ...]]]:
    """Type and answers of each question."""
    found = {}
    for record in annotations.json(_annotations_file(split)).records("annotations"):
        number = record.integer("question_id")
        answers = tuple(answer.string("answer") for answer in record.records("answers"))
        if len(answers) != ANSWERS:
            raise ValueError(f"{TASK}: answers of question {number} must be {ANSWERS}, got {len(answers)}")
        found[number] = (record.text("question_type"), answers)
    return found
