"""Readers of the benchmarks' official files: what is right is read, what is wrong is named."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil

import pytest
from task_cases import give_karpathys_splits

from simvlm.data.scenes import KINDS
from simvlm.tasks import (
    coco_captions,
    glue,
    imagenet,
    multi30k,
    nli,
    nlvr2,
    nocaps,
    snli_ve,
    text_pairs,
    vqav2,
)
from simvlm.tasks.world import write_benchmarks

READ = {
    "vqav2": (vqav2.read, ("train", "val", "test-dev", "test")),
    "coco": (coco_captions.read, ("train", "val", "test", "train2014", "val2014")),
    "nlvr2": (nlvr2.read, ("train", "dev", "test1")),
    "snli_ve": (snli_ve.read, ("train", "dev", "test")),
    "nocaps": (nocaps.read, ("val",)),
    "multi30k": (multi30k.read, ("train", "val", "test_2016_flickr")),
    "imagenet": (imagenet.read, ("train", "val")),
    "nli": (nli.read, ("train", "dev", "test")),
    "translation": (text_pairs.read, ("train", "val", "test")),
    "glue/CoLA": (functools.partial(glue.read, task="CoLA"), ("train", "dev")),
    "glue/RTE": (functools.partial(glue.read, task="RTE"), ("train", "dev")),
}
SPLITS = [(name, split) for name, (_, splits) in READ.items() for split in splits]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmarks")
    write_benchmarks(folder, scale=0.001, image_size=8)
    return folder


@pytest.fixture
def copy(world, tmp_path):
    """A benchmark of the world that may be spoilt; links to pictures become copies."""

    def make(name):
        return shutil.copytree(world / name, tmp_path / name)

    return make


def manifest(folder, **counts):
    """Writes the manifest anew for the files as they are; some counts are changed."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text()) if path.exists() else {"files": {}, "counts": {}}
    names = [
        one.relative_to(folder)
        for one in folder.rglob("*")
        if one.suffix in (".json", ".jsonl", ".tsv", ".en", ".de", ".txt")
    ]
    files = {str(name): hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    counts = content["counts"] | {name.replace("_", "-"): count for name, count in counts.items()}
    path.write_text(json.dumps({"files": files, "counts": counts}))


def edit(path, change):
    """Changes the JSON of a file."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_line(path, number, **changes):
    """Changes the JSON of one line; None takes the field out."""
    lines = path.read_text().splitlines()
    row = json.loads(lines[number - 1]) | changes
    lines[number - 1] = json.dumps({key: value for key, value in row.items() if value is not None})
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(("name", "split"), SPLITS)
def test_every_split_is_read_counted_and_hashed(world, name, split):
    read = READ[name][0](world / name, split)
    expected = json.loads((world / name / "manifest.json").read_text())
    assert len(read.examples) == expected["counts"][split] > 0
    assert read.name == split
    assert {file: expected["files"][file] for file in read.sha256} == read.sha256
    assert bool(read.sha256) == (name != "imagenet")
    assert len({example.id for example in read.examples}) == len(read.examples)
    for example in read.examples:
        assert all(path.is_file() for path in example.images)
        assert (example.label is not None) == bool(read.labels)
        assert bool(example.references) == (not read.labels)
        assert example.source or example.text or example.images


def test_vqav2(world):
    example = vqav2.read(world / "vqav2", "train").examples[0]
    assert example.id == "1000"
    assert example.images == (world / "vqav2/train2014/COCO_train2014_000000000001.jpg",)
    assert example.text.endswith("?")
    assert len(example.references) == 10


def test_a_test_split_without_annotations(copy):
    folder = copy("vqav2")
    (folder / "v2_mscoco_test2015_annotations.json").unlink()
    example = vqav2.read(folder, "test").examples[0]
    assert "test2015/COCO_test2015_0000004" in str(example.images[0])
    assert (example.references, example.group) == ((), "")


def test_vqav2_by_the_splits_of_karpathy(copy):
    folder = copy("vqav2")
    expected = give_karpathys_splits(folder)
    for split, examples in expected.items():
        assert examples
        assert vqav2.read(folder, split).examples == tuple(examples)
    assert {e.images[0].parent.name for e in expected["karpathy-train"]} == {"train2014", "val2014"}
    assert sum(vqav2.OFFICIAL_COUNTS[split] for split in expected) == 443_757 + 214_354  # each question in one of them
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"vqav2: karpathy-test must have 26280 examples officially, got \d+"):
        vqav2.read(folder, "karpathy-test")
    (folder / "dataset_coco.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"dataset_coco.json must be there, got no such file; download it"):
        vqav2.read(folder, "karpathy-val")


def test_answer_vocabulary_and_soft_scores(copy):
    folder = copy("vqav2")
    for split, answers in (("train", ["Yes"] * 5 + ["rare"] * 8), ("val", ["yes"] * 4 + ["No"] * 10)):
        rows = [{"multiple_choice_answer": answer} for answer in answers]
        (folder / f"v2_mscoco_{split}2014_annotations.json").write_text(json.dumps({"annotations": rows}))
    manifest(folder)
    assert vqav2.answer_vocabulary(folder, normalise=str.lower) == ("no", "yes")
    assert vqav2.answer_vocabulary(folder, normalise=str.lower, least=8) == ("no", "yes", "rare")
    with pytest.raises(ValueError, match=r"least must leave at least one answer, got 11; the most frequent: .*no"):
        vqav2.answer_vocabulary(folder, normalise=str.lower, least=11)
    scores = vqav2.soft_scores(
        ["Yes"] * 7 + ["no", "maybe", "none"],
        {"yes": 0, "no": 1, "none": 2},
        normalise=str.lower,
        soft_score=lambda answer, answers: {"yes": 1.0, "no": 0.3, "none": 0.0}[answer],
    )
    assert scores == {0: 1.0, 1: 0.3}


def test_nlvr2(world):
    train, dev = (nlvr2.read(world / "nlvr2", split) for split in ("train", "dev"))
    assert train.labels == ("False", "True")
    assert train.examples[0].id == "train-0-0-0"
    assert train.examples[0].images[0] == world / "nlvr2/images/train/0/train-0-0-img0.png"
    assert dev.examples[5].images[1] == world / "nlvr2/dev/dev-1-1-img1.png"


def test_entailment(world):
    seen, told = snli_ve.read(world / "snli_ve", "dev"), nli.read(world / "nli", "dev")
    assert seen.labels == told.labels == ("entailment", "neutral", "contradiction")
    assert not any(example.source for example in seen.examples)
    assert all(example.source and not example.images for example in told.examples)


def test_pairs_without_a_gold_label_are_left_out_and_counted(copy):
    folder = copy("nli")
    edit_line(folder / "snli_1.0_dev.jsonl", 2, gold_label="-")
    whole = len((folder / "snli_1.0_dev.jsonl").read_text().splitlines())
    manifest(folder, dev=whole - 1)
    read = nli.read(folder, "dev")
    assert len(read.examples) == whole - 1
    assert read.left_out == {"no gold label": 1}


def test_restval_counts_as_train(copy):
    folder = copy("coco")
    before = len(coco_captions.read(folder, "train").examples)
    edit(folder / "dataset_coco.json", lambda content: content["images"][-1].update(split="restval"))
    manifest(folder, train=before + 1)
    assert len(coco_captions.read(folder, "train").examples) == before + 1


def test_imagenet(world):
    read = imagenet.read(world / "imagenet", "val")
    assert read.labels == tuple(sorted(KINDS))
    assert all(example.images[0].parent.name == read.labels[example.label] for example in read.examples)


def test_nocaps_test_has_no_captions(copy):
    folder = copy("nocaps")
    images = [{"id": 4, "file_name": "0000000000000000.jpg"}]
    (folder / "nocaps_test_image_info.json").write_text(json.dumps({"images": images}))
    manifest(folder, test=1)
    (example,) = nocaps.read(folder, "test").examples
    assert (example.id, example.references, example.group) == ("4", (), "")


GLUE_FILES = {
    ("MRPC", "train"): (
        '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tHe said "no" .\tHe refused .\n',
        ('He said "no" .', "He refused .", 1),
    ),
    ("MRPC", "test"): ("index\t#1 ID\t#2 ID\t#1 String\t#2 String\n0\t7\t8\tA .\tB .\n", ("A .", "B .", None)),
    ("SST-2", "dev"): ("sentence\tlabel\na fine film \t1\n", ("a fine film", "", 1)),
    ("SST-2", "test"): ("index\tsentence\n0\ta fine film\n", ("a fine film", "", None)),
    ("CoLA", "dev"): ("gj04\t0\t*\tThe book sings it .\n", ("The book sings it .", "", 0)),
    ("CoLA", "test"): ("index\tsentence\n0\tBill sang .\n", ("Bill sang .", "", None)),
    ("RTE", "dev"): ("index\tsentence1\tsentence2\tlabel\n0\tA .\tB .\tnot_entailment\n", ("A .", "B .", 1)),
    ("RTE", "test"): ("index\tsentence1\tsentence2\n0\tA .\tB .\n", ("A .", "B .", None)),
}


@pytest.mark.parametrize(("task", "split"), GLUE_FILES)
def test_columns_of_glue(tmp_path, task, split):
    text, expected = GLUE_FILES[task, split]
    (tmp_path / task).mkdir()
    (tmp_path / task / f"{split}.tsv").write_text(text)
    manifest(tmp_path / task, **{split: 1})
    (example,) = glue.read(tmp_path / task, split, task=task).examples
    assert (example.source, example.text, example.label) == expected
    assert example.id == "0"


# Bad input: what a case does to a benchmark, and what the reader must say.

QUESTIONS, ANSWERS = "v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"


def drop_manifest(folder):
    (folder / "manifest.json").unlink()


def cut(name):
    """Half a file, as a download that broke off leaves it."""

    def spoil(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return spoil


def lines(name, change):
    """Changes the lines of a text file and writes the manifest for it."""

    def spoil(folder):
        rows = (folder / name).read_text().splitlines()
        change(rows)
        (folder / name).write_text("\n".join(rows) + "\n")
        manifest(folder)

    return spoil


def changed(name, change):
    """Changes the JSON of a file and writes the manifest for it."""

    def spoil(folder):
        edit(folder / name, change)
        manifest(folder)

    return spoil


def line_changed(name, number, **changes):
    def spoil(folder):
        edit_line(folder / name, number, **changes)
        manifest(folder)

    return spoil


def move_out_of_class(folder):
    shutil.move(next((folder / "val/circle").iterdir()), folder / "val/one.JPEG")


BAD = {
    "no folder": ("nli", "dev", shutil.rmtree, "nli: folder must be a folder of the benchmark's files, got"),
    "no such split": ("nli", "val", lambda folder: None, "nli: split must be one of train, dev, test, got 'val'"),
    "no file": (
        "nli",
        "dev",
        lambda folder: (folder / "snli_1.0_dev.jsonl").unlink(),
        r"nli: .*snli_1.0_dev.jsonl must be there, got no such file; download it",
    ),
    "half a file": (
        "vqav2",
        "val",
        cut(QUESTIONS),
        r"vqav2: .*val2014_questions.json must have the sha256 of manifest.json, \w{64}, got \w{64}; download it again",
    ),
    "half a file, no manifest": (
        "vqav2",
        "val",
        lambda folder: (drop_manifest(folder), cut(QUESTIONS)(folder)),
        "vqav2: v2_OpenEnded_mscoco_val2014_questions.json must be JSON, got .*; download it again",
    ),
    "not the official count": (
        "vqav2",
        "val",
        drop_manifest,
        r"vqav2: val must have 214354 examples officially, got \d+; download it again, or write the count",
    ),
    "not the official count of lines": ("snli_ve", "test", drop_manifest, "snli_ve: test must have 17901 examples"),
    "not the official count of pictures": ("imagenet", "val", drop_manifest, "imagenet: val must have 50000 examples"),
    "not the manifest's count": (
        "multi30k",
        "val",
        lambda folder: manifest(folder, val=999),
        r"multi30k: val must have 999 examples by manifest.json, got \d+",
    ),
    "a file that the manifest does not list": (
        "nli",
        "dev",
        lambda folder: edit(folder / "manifest.json", lambda content: content["files"].clear()),
        "must have the sha256 of manifest.json, which does not list it, got",
    ),
    "a split that the manifest does not count": (
        "nli",
        "dev",
        lambda folder: edit(folder / "manifest.json", lambda content: content["counts"].clear()),
        "nli: manifest.json must give the count of dev, got none",
    ),
    "a manifest of another kind": (
        "nli",
        "dev",
        lambda folder: (folder / "manifest.json").write_text("[]"),
        "manifest.json must be {'files': …, 'counts': …}, got \\[\\]",
    ),
    "a question without answers": (
        "vqav2",
        "val",
        changed(ANSWERS, lambda content: content["annotations"].pop(0)),
        "vqav2: question 200001000 must have answers in v2_mscoco_val2014_annotations.json, got none",
    ),
    "nine answers": (
        "vqav2",
        "val",
        changed(ANSWERS, lambda content: content["annotations"][0]["answers"].pop()),
        "vqav2: answers of question 200001000 must be 10, got 9",
    ),
    "a field of another type": (
        "vqav2",
        "val",
        changed(QUESTIONS, lambda content: content["questions"][1].update(image_id="7")),
        r"vqav2: image_id must be an integer, got '7' \(v2_OpenEnded_mscoco_val2014_questions.json, questions\[1\]\)",
    ),
    "a question twice": (
        "vqav2",
        "val",
        changed(QUESTIONS, lambda content: content["questions"][1].update(question_id=200001000)),
        "vqav2: ids of val must be unique, got 200001000 2 times",
    ),
    "no list of questions": (
        "vqav2",
        "val",
        changed(QUESTIONS, lambda content: content.pop("questions")),
        r"vqav2: questions must be a list, got no such field",
    ),
    "a missing picture": (
        "vqav2",
        "val",
        lambda folder: (folder / "val2014/COCO_val2014_000000200001.jpg").unlink(),
        r"vqav2: images of val must be files that are not empty, got 1 of \d+ missing \(.*000000200001.jpg\); .*"
        "--skip-missing",
    ),
    "many missing pictures": (
        "nlvr2",
        "dev",
        lambda folder: shutil.rmtree(folder / "dev"),
        r"got (\d+) of \1 missing \(.*dev-0-0-img0.png, .*dev-0-0-img1.png, .*dev-0-1-img0.png, …\)",
    ),
    "an empty picture": (
        "imagenet",
        "val",
        lambda folder: (folder / "val/ring/ring_0.JPEG").write_bytes(b""),
        "imagenet: images of val .* 1 of .*ring_0.JPEG",
    ),
    "a line that is no JSON": (
        "nlvr2",
        "dev",
        lines("dev.json", lambda rows: rows.__setitem__(2, "{")),
        "nlvr2: dev.json, line 3 must be JSON",
    ),
    "a line that is no object": (
        "nlvr2",
        "dev",
        lines("dev.json", lambda rows: rows.__setitem__(2, "7")),
        "nlvr2: dev.json, line 3 must be a JSON object, got 7",
    ),
    "a line without its sentence": (
        "nlvr2",
        "dev",
        line_changed("dev.json", 2, sentence=None),
        r"nlvr2: sentence must be a text, got no such field \(dev.json, line 2\)",
    ),
    "an identifier of another split": (
        "nlvr2",
        "dev",
        line_changed("dev.json", 1, identifier="test1-0-0-0"),
        "nlvr2: identifier must be dev-SET-PAIR-SENTENCE, got 'test1-0-0-0'",
    ),
    "an unknown label": (
        "snli_ve",
        "dev",
        line_changed("snli_ve_dev.jsonl", 1, gold_label="-"),
        r"snli_ve: gold_label must be one of entailment, neutral, contradiction, got '-' \(snli_ve_dev.jsonl, line 1\)",
    ),
    "an image without a caption": (
        "nocaps",
        "val",
        changed("nocaps_val_4500_captions.json", lambda content: content["images"].append({"id": 99})),
        "nocaps: every image id of nocaps_val_4500_captions.json must have a caption, got none for 99",
    ),
    "a caption without its image": (
        "coco",
        "val2014",
        changed("annotations/captions_val2014.json", lambda content: content["images"].pop(0)),
        "coco_captions: every image id of annotations/captions_val2014.json must have an image, got none for 200001",
    ),
    "no sentences": (
        "coco",
        "val",
        changed("dataset_coco.json", lambda content: [image["sentences"].clear() for image in content["images"]]),
        r"coco_captions: sentences of image \d+ must be at least one, got none",
    ),
    "an unknown domain": (
        "nocaps",
        "val",
        changed("nocaps_val_4500_captions.json", lambda content: content["images"][0].update(domain="far")),
        "nocaps: domain must be one of in-domain, near-domain, out-domain, got 'far'",
    ),
    "a line too few": (
        "multi30k",
        "val",
        lines("val.de", lambda rows: rows.pop()),
        "multi30k: parallel files must have equally many lines, got 12 of val.en, 11 of val.de, 12 of val.txt",
    ),
    "a blank line": (
        "translation",
        "val",
        lines("val.de", lambda rows: rows.__setitem__(4, " ")),
        "text_pairs: val.de, line 5 must be a text, got a blank line",
    ),
    "not UTF-8": (
        "translation",
        "val",
        lambda folder: ((folder / "val.de").write_bytes("ein Stück".encode("latin-1")), manifest(folder)),
        "text_pairs: .*val.de must be UTF-8",
    ),
    "pictures of no class": ("imagenet", "val", move_out_of_class, "imagenet: .*val must hold a folder for each class"),
    "a class that is not trained": (
        "imagenet",
        "val",
        lambda folder: (folder / "val/cube").mkdir(),
        "imagenet: every class of val must be one of train, got cube",
    ),
    "no classes": ("imagenet", "val", lambda folder: shutil.rmtree(folder / "val"), "imagenet: .*val must be a folder"),
    "another header": (
        "glue/RTE",
        "dev",
        lines("dev.tsv", lambda rows: rows.__setitem__(0, "a\tb")),
        "RTE: header of dev.tsv must be index, sentence1, sentence2, label, got a, b",
    ),
    "a column too few": (
        "glue/CoLA",
        "dev",
        lines("dev.tsv", lambda rows: rows.__setitem__(1, "a\tb")),
        "CoLA: dev.tsv, line 2 must have 4 columns, got 2",
    ),
    "a label of another task": (
        "glue/CoLA",
        "dev",
        lines("dev.tsv", lambda rows: rows.__setitem__(1, "a\tyes\t\tA ring.")),
        r"CoLA: label must be one of 0, 1, got 'yes' \(dev.tsv, line 2\)",
    ),
    "an empty sentence": (
        "glue/CoLA",
        "dev",
        lines("dev.tsv", lambda rows: rows.__setitem__(1, "a\t1\t\t")),
        "CoLA: dev.tsv, line 2 must have its sentences, got an empty one",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(copy, case):
    name, split, spoil, message = BAD[case]
    folder = copy(name)
    spoil(folder)
    read = READ[name][0]
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        read(folder, split)
    assert "\n" not in str(caught.value)


def test_the_folder_of_another_task_of_glue_is_not_taken_for_its_own(world):
    with pytest.raises(ValueError, match="CoLA: folder must be named CoLA, got RTE"):
        glue.read(world / "glue/RTE", "dev", task="CoLA")


def test_skip_missing_leaves_examples_out_and_counts_them(copy):
    folder = copy("nlvr2")
    whole = nlvr2.read(folder, "dev")
    (folder / "dev/dev-0-1-img0.png").unlink()
    read = nlvr2.read(folder, "dev", missing="leave out")
    assert [example for example in whole.examples if example.id != "dev-0-1-0"] == list(read.examples)
    assert read.left_out == {"image missing": 1}
