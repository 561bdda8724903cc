"""The generated world's benchmarks: reproducible, true, and of no use to a model that does not look."""

from __future__ import annotations

import collections
import hashlib
import io
import itertools
import json
import math
import re

import numpy as np
import pytest
from PIL import Image

from simvlm.data.captions import NUMBERS, PHRASES, plural
from simvlm.data.documents import GERMAN_WORDS
from simvlm.data.draws import Draws
from simvlm.data.judge import judge, parse
from simvlm.data.scenes import COLOURS, HELD_OUT, KINDS, OPPOSITE, SIZES, TEXTURES, relation, render
from simvlm.tasks import coco_captions, glue, imagenet, multi30k, nli, nlvr2, nocaps, snli_ve, text_pairs, vqav2
from simvlm.tasks.world import BENCHMARKS, write_benchmarks
from simvlm.tasks.world_pictures import scene_of

SIZE = 12
PLACES = "|".join(PHRASES.values())
NAMES = {phrase: place for place, phrase in PHRASES.items()}
VALUES = {"kind": KINDS, "colour": tuple(COLOURS), "size": tuple(SIZES), "texture": TEXTURES}
ATTRIBUTE = {value: name for name, values in VALUES.items() for value in values}
SPLITS = {"vqav2": ("train", "val"), "nlvr2": ("train", "dev"), "snli_ve": ("train", "dev"), "nli": ("train", "dev")}
READ = {"vqav2": vqav2.read, "nlvr2": nlvr2.read, "snli_ve": snli_ve.read, "nli": nli.read}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmarks")
    write_benchmarks(folder, seed=3, scale=0.02, image_size=SIZE)
    return folder


def scenes_of(folder):
    """The scene of every picture by its path."""
    entries = json.loads((folder / "scenes.json").read_text())
    return {folder / name: scene_of(entry["split"], entry["objects"], entry["seed"]) for name, entry in entries.items()}


def digests(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_the_same_arguments_write_the_same_bytes(world, tmp_path):
    for workers in (1, 2):
        write_benchmarks(tmp_path / str(workers), scale=0.001, image_size=8, workers=workers)
    assert digests(tmp_path / "1") == digests(tmp_path / "2")
    for benchmark in ("vqav2", "nlvr2", "snli_ve", "nocaps", "multi30k", "imagenet"):
        seeds = [{scene.seed for scene in scenes_of(root / benchmark).values()} for root in (world, tmp_path / "1")]
        assert seeds[0].isdisjoint(seeds[1])


def test_what_is_there_is_not_overwritten(world):
    with pytest.raises(FileExistsError, match="vqav2 is there already; remove it first"):
        write_benchmarks(world)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"scale": 0}, "scale must be more than 0, got 0"), ({"image_size": 0}, "image_size must be at least 1, got 0")],
)
def test_bad_arguments(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_benchmarks(tmp_path, **options)


def test_pictures_show_their_scenes(world):
    for benchmark in BENCHMARKS:
        if not (world / benchmark / "scenes.json").exists():
            continue
        for path, scene in itertools.islice(scenes_of(world / benchmark).items(), 0, None, 10):
            pixels, drawn = np.asarray(Image.open(path)).astype(int), render(scene, SIZE)
            assert pixels.shape == (SIZE, SIZE, 3)
            assert np.abs(pixels - drawn).mean() < (1e-9 if path.suffix == ".png" else 8)
            if path.suffix != ".png":
                # 4:4:4 at quality 95, as Pillow itself writes it.
                content = io.BytesIO()
                Image.fromarray(drawn).save(content, "jpeg", quality=95, subsampling=0)
                assert path.read_bytes() == content.getvalue()


def test_splits_share_no_scene_and_only_nocaps_shows_what_is_held_out(world):
    seen = collections.Counter()
    for benchmark in ("vqav2", "nlvr2", "snli_ve", "nocaps", "multi30k", "imagenet"):
        for path, scene in scenes_of(world / benchmark).items():
            seen[scene.seed] += 1
            is_train = "train" in str(path.relative_to(world / benchmark))
            if benchmark in ("vqav2", "nlvr2", "imagenet"):
                assert scene.split == ("train" if is_train else "test")
            if benchmark != "nocaps":
                assert not {(shape.kind, shape.colour) for shape in scene.shapes} & HELD_OUT
    assert set(seen.values()) == {1}
    # Pretraining draws its seeds so: another key, other seeds.
    assert not seen.keys() & {Draws("pair", 3, row).below(2**62) for row in range(1_000)}
    for benchmark, splits in {"snli_ve": ("train", "dev", "test"), "multi30k": tuple(multi30k.OFFICIAL_COUNTS)}.items():
        scenes = scenes_of(world / benchmark)
        read = snli_ve.read if benchmark == "snli_ve" else multi30k.read
        for split in splits:
            used = {
                scenes[path].split for example in read(world / benchmark, split).examples for path in example.images
            }
            assert used == {"train" if split == "train" else "test"}


def test_no_text_names_a_held_out_combination_outside_nocaps(world):
    for path in world.rglob("*"):
        if path.suffix in (".json", ".jsonl", ".tsv", ".en") and "nocaps" not in path.parts:
            text = path.read_text().lower()
            for kind, colour in HELD_OUT:
                for phrase in (f"{colour} {kind}", f"the {kind} is {colour}.", f"the {colour} shape is a {kind}."):
                    assert phrase not in text, (path, phrase)


def test_domains_of_nocaps(world):
    scenes = scenes_of(world / "nocaps")
    groups = collections.Counter()
    for example in nocaps.read(world / "nocaps", "val").examples:
        shapes = scenes[example.images[0]].shapes
        held_out = sum((shape.kind, shape.colour) in HELD_OUT for shape in shapes)
        groups[example.group] += 1
        assert example.group == (
            "in-domain" if not held_out else "out-domain" if held_out == len(shapes) else "near-domain"
        )
        assert example.group != "near-domain" or held_out == 1
    assert set(groups.values()) == {12}


def test_captions_are_right(world):
    for read, folder, splits in (
        (coco_captions.read, "coco", ("train", "val", "test")),
        (nocaps.read, "nocaps", ("val",)),
    ):
        scenes = {
            path.name: scene for path, scene in scenes_of(world / ("vqav2" if folder == "coco" else folder)).items()
        }
        for split in splits:
            for example in read(world / folder, split).examples:
                assert len(set(example.references)) == 5
                for caption in example.references:
                    assert judge(caption, scenes[example.images[0].name]).correct, caption


def test_one_object_of_its_class(world):
    scenes = scenes_of(world / "imagenet")
    for split in ("train", "val"):
        read = imagenet.read(world / "imagenet", split)
        counts = collections.Counter()
        for example in read.examples:
            (shape,) = scenes[example.images[0]].shapes
            assert read.labels[example.label] == shape.kind
            counts[shape.kind] += 1
        assert len(set(counts.values())) == 1
        assert set(counts) == set(KINDS)


# What is true of a scene, read off the words of a question, hypothesis or statement: not by the code that wrote them.


def fitting(scene, word):
    """The shapes of a kind, or of a colour ("red shape")."""
    word = word.removesuffix(" shape")
    return [shape for shape in scene.shapes if getattr(shape, ATTRIBUTE[word]) == word]


def is_shown(scene, phrase):
    colour, kind = phrase.split()
    return any((shape.colour, shape.kind) == (colour, kind) for shape in scene.shapes)


def true_answer(question, scene):
    if found := re.fullmatch(r"Is there an? (\w+ \w+)\?", question):
        return "yes" if is_shown(scene, found[1]) else "no"
    if found := re.fullmatch(r"How many (\w+) are there\?", question):
        return str(sum(found[1] in ("shapes", plural(shape.kind)) for shape in scene.shapes))
    if found := re.fullmatch(rf"Is the (\w+) ({PLACES}) the (\w+)\?", question):
        ((a,), (b,)) = fitting(scene, found[1]), fitting(scene, found[3])
        assert relation(a, b) in (NAMES[found[2]], OPPOSITE[NAMES[found[2]]])
        return "yes" if relation(a, b) == NAMES[found[2]] else "no"
    if found := re.fullmatch(rf"What is ({PLACES}) the (\w+(?: shape)?)\?", question):
        (there,) = fitting(scene, found[2])
        (answer,) = [s.kind for s in scene.shapes if s is not there and relation(s, there) == NAMES[found[1]]]
        return answer
    for pattern, attribute in (
        (r"What colour is the (\w+)\?", "colour"),
        (r"What shape is (\w+)\?", "kind"),
        (r"Is the (\w+) small or large\?", "size"),
        (r"What pattern has the (\w+)\?", "texture"),
    ):
        if found := re.fullmatch(pattern, question):
            (shape,) = fitting(scene, found[1])
            return getattr(shape, attribute)
    raise AssertionError(question)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_answers_are_true(world, split):
    scenes = scenes_of(world / "vqav2")
    examples = vqav2.read(world / "vqav2", split).examples
    groups = {example.group for example in examples}
    noisy = 0
    for example in examples:
        answer = true_answer(example.text, scenes[example.images[0]])
        assert example.references.count(answer) >= 7, example
        noisy += example.references.count(answer) < 10
    assert 0.1 < noisy / len(examples) < 0.9
    if split == "train":
        assert groups == {
            "is there", "what colour", "what shape", "how many", "is the", "what is", "small or large", "what pattern",
        }  # fmt: skip
    of_picture = collections.Counter(example.images for example in examples)
    assert sum(count == 3 for count in of_picture.values()) >= len(of_picture) - 4
    assert len({(example.images, example.text) for example in examples}) == len(examples)


def true_label(hypothesis, shapes, places):
    """Of a list of attributes of shapes, and the relations of pairs of them by index."""
    if found := re.fullmatch(rf"The (\w+) is ({PLACES}) the (\w+)\.", hypothesis):
        a, b = ([i for i, shape in enumerate(shapes) if shape["kind"] == kind] for kind in (found[1], found[3]))
        if not a or not b:
            return "neutral"
        ((a,), (b,)) = a, b
        return {NAMES[found[2]]: "entailment", OPPOSITE[NAMES[found[2]]]: "contradiction"}[places[a, b]]
    found = re.fullmatch(r"The (\w+)(?: shape)? is (?:an? )?(\w+)\.", hypothesis)
    there = [shape for shape in shapes if shape[ATTRIBUTE[found[1]]] == found[1]]
    if not there:
        return "neutral"
    (shape,) = there
    return "entailment" if shape[ATTRIBUTE[found[2]]] == found[2] else "contradiction"


def facts_of(scene):
    shapes = [{name: getattr(shape, name) for name in VALUES} for shape in scene.shapes]
    pairs = itertools.permutations(range(len(shapes)), 2)
    return shapes, {(i, j): relation(scene.shapes[i], scene.shapes[j]) for i, j in pairs}


def facts_in(text):
    """The same, from a premise: every shape with everything about it must be there."""
    first, *rest = text.removesuffix(".").split(". ")
    noun = rf"an? (?P<size>{'|'.join(SIZES)}) (?P<colour>\w+) (?P<kind>{'|'.join(KINDS)})(?: (?P<place>{PLACES}))?"
    found = [match.groupdict() for match in re.finditer(noun, first)]
    named = {f"{shape['colour']} {shape['kind']}": i for i, shape in enumerate(found)}
    assert len(named) == len(found)
    places = {}

    def relate(i, j, place):
        places[i, j], places[j, i] = place, OPPOSITE[place]

    for i, shape in enumerate(found[1:], 1):
        relate(i, i - 1, NAMES[shape["place"]])
    for sentence in rest:
        if match := re.fullmatch(rf"The (\w+ \w+) is ({PLACES}) the (\w+ \w+)", sentence):
            relate(named[match[1]], named[match[3]], NAMES[match[2]])
        else:
            match = re.fullmatch(r"The (\w+ \w+) is (\w+)", sentence)
            found[named[match[1]]]["texture"] = match[2]
    assert len(places) == len(found) * (len(found) - 1)
    assert all(set(VALUES) <= shape.keys() for shape in found)
    return found, places


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_hypotheses_are_true_false_or_neither(world, split):
    scenes = scenes_of(world / "snli_ve")
    seen = snli_ve.read(world / "snli_ve", split)
    told = nli.read(world / "nli", split)
    for example in seen.examples:
        assert seen.labels[example.label] == true_label(example.text, *facts_of(scenes[example.images[0]])), example
    for example in told.examples:
        assert told.labels[example.label] == true_label(example.text, *facts_in(example.source)), example
    # Text for transfer must read like the text that it is to stand in for.
    assert seen.labels == told.labels


@pytest.mark.parametrize("split", ["train", "dev"])
def test_entailment_of_glue(world, split):
    read = glue.read(world / "glue" / "RTE", split, task="RTE")
    reasons = collections.Counter()
    for example in read.examples:
        label = true_label(example.text, *facts_in(example.source))
        reasons[label] += 1
        assert read.labels[example.label] == ("entailment" if label == "entailment" else "not_entailment")
    assert reasons["entailment"] == 2 * reasons["neutral"] == 2 * reasons["contradiction"]


@pytest.mark.parametrize("split", ["train", "dev"])
def test_acceptability_of_glue(world, split):
    words = collections.defaultdict(collections.Counter)
    for example in glue.read(world / "glue" / "CoLA", split, task="CoLA").examples:
        words[tuple(sorted(example.source.lower().removesuffix(".").split()))][example.label] += 1
        if example.label:
            parse(example.source)
        else:
            with pytest.raises(ValueError):
                parse(example.source)
    # Whoever counts words learns nothing.
    assert all(counts[0] == counts[1] for counts in words.values())


def is_true(statement, left, right):
    if found := re.fullmatch(r"There is an? (\w+ \w+) in (both|at least one of the) pictures\.", statement):
        shown = [is_shown(scene, found[1]) for scene in (left, right)]
        return all(shown) if found[2] == "both" else any(shown)
    if found := re.fullmatch(r"Neither picture shows a (\w+)\.", statement):
        return not fitting(left, found[1]) + fitting(right, found[1])
    if found := re.fullmatch(r"The left picture shows an? (\w+ \w+) and the right one an? (\w+ \w+)\.", statement):
        return is_shown(left, found[1]) and is_shown(right, found[2])
    if found := re.fullmatch(r"The left picture shows (more|fewer) shapes than the right one\.", statement):
        difference = len(left.shapes) - len(right.shapes)
        return difference > 0 if found[1] == "more" else difference < 0
    if found := re.fullmatch(r"There are at least (\w+) shapes in the two pictures\.", statement):
        return len(left.shapes) + len(right.shapes) >= (*NUMBERS, "four", "five").index(found[1])
    found = re.fullmatch(rf"In the (left|right) picture the (\w+) is ({PLACES}) the (\w+)\.", statement)
    scene = left if found[1] == "left" else right
    ((a,), (b,)) = fitting(scene, found[2]), fitting(scene, found[4])
    return relation(a, b) == NAMES[found[3]]


@pytest.mark.parametrize("split", ["train", "dev", "test1"])
def test_statements_are_true_or_false(world, split):
    scenes = scenes_of(world / "nlvr2")
    read = nlvr2.read(world / "nlvr2", split)
    for example in read.examples:
        left, right = (scenes[path] for path in example.images)
        assert is_true(example.text, left, right) == (read.labels[example.label] == "True"), example


# Balance: what a model could learn from the text alone.


def texts_and_answers(world, task, split):
    """(group, text, answer) of every example."""
    read = READ[task](world / task, split)
    if task != "vqav2":
        return [(task, example.text, read.labels[example.label]) for example in read.examples]
    most = [collections.Counter(example.references).most_common(1)[0][0] for example in read.examples]
    return [(example.group, example.text, answer) for example, answer in zip(read.examples, most, strict=True)]


@pytest.mark.parametrize("task", READ)
def test_every_text_has_all_its_answers_equally_often(world, task):
    for split in SPLITS[task]:
        answers = collections.defaultdict(collections.Counter)
        for group, text, answer in texts_and_answers(world, task, split):
            answers[group, text][answer] += 1
        assert all(len(counts) > 1 and len(set(counts.values())) == 1 for counts in answers.values())


def by_lookup(train):
    """The most frequent answer of the very text, else of the group."""
    of_text, of_group = collections.defaultdict(collections.Counter), collections.defaultdict(collections.Counter)
    for group, text, answer in train:
        of_text[text][answer] += 1
        of_group[group][answer] += 1
    return lambda group, text: (of_text.get(text) or of_group[group]).most_common(1)[0][0]


def by_words(train):
    """Naive Bayes on the words, among the answers of the group."""
    prior, words = collections.defaultdict(collections.Counter), collections.defaultdict(collections.Counter)
    for group, text, answer in train:
        prior[group][answer] += 1
        words[group, answer].update(set(text.split()))

    def predict(group, text):
        def score(answer):
            count = prior[group][answer]
            seen = sum(math.log((words[group, answer][word] + 0.5) / (count + 1)) for word in set(text.split()))
            return math.log(count) + seen

        return max(prior[group], key=score)

    return predict


@pytest.mark.parametrize("learn", [by_lookup, by_words])
@pytest.mark.parametrize("task", READ)
def test_a_blind_model_is_no_better_than_the_majority(world, task, learn):
    train, dev = (texts_and_answers(world, task, split) for split in SPLITS[task])
    predict = learn(train)
    of_group = collections.defaultdict(collections.Counter)
    for group, _, answer in dev:
        of_group[group][answer] += 1
    right = sum(predict(group, text) == answer for group, text, answer in dev)
    majority = sum(max(counts.values()) for counts in of_group.values())
    assert right / len(dev) <= majority / len(dev) + 0.05
    assert majority / len(dev) <= 0.51


def test_german_stands_beside_pictures_only_in_multi30k(world):
    for task, read, splits in (
        ("vqav2", vqav2.read, ("train", "val", "test")),
        ("coco", coco_captions.read, ("train", "val", "test")),
        ("nlvr2", nlvr2.read, ("train", "dev", "test1")),
        ("snli_ve", snli_ve.read, ("train", "dev", "test")),
        ("nocaps", nocaps.read, ("val",)),
    ):
        for split in splits:
            for example in read(world / task, split).examples:
                assert example.images
                said = " ".join((example.source, example.text, *example.references)).lower()
                assert not GERMAN_WORDS & set(re.findall(r"\w+", said))
    for read, folder in ((multi30k.read, "multi30k"), (text_pairs.read, "translation")):
        for example in read(world / folder, "train").examples:
            assert GERMAN_WORDS & set(re.findall(r"\w+", example.references[0].lower()))
            assert not GERMAN_WORDS & set(re.findall(r"\w+", example.source.lower()))
            assert bool(example.images) == (folder == "multi30k")


def test_descriptions_of_multi30k_are_of_their_pictures(world):
    scenes = scenes_of(world / "multi30k")
    for example in multi30k.read(world / "multi30k", "test_2016_flickr").examples:
        assert judge(example.source, scenes[example.images[0]]).correct
