"""The generated world: the same everywhere, its captions true or false as they should be, German without pictures."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from simvlm.data.captions import PROMPT, benchmark_captions, pretraining_caption, prompted_caption
from simvlm.data.documents import (
    GERMAN_PROMPT,
    GERMAN_WORDS,
    LANGUAGES,
    document,
    german_prompted_caption,
)
from simvlm.data.draws import Draws
from simvlm.data.judge import judge, parse
from simvlm.data.scenes import (
    COLOURS,
    EDGE,
    HELD_OUT,
    KINDS,
    OPPOSITE,
    TEXTURES,
    Shape,
    fixed_scenes,
    relation,
    render,
    sample_scene,
)
from simvlm.data.shards import ImageTextShards
from simvlm.data.world import write_world

GOLDEN = "7407456abd44eedc4367e223eb58abe316fdd8d552c80ff6965fb3df8fe7e129"


def fingerprint() -> str:
    """Of scenes, pictures, captions and documents of a few seeds."""
    digest = hashlib.sha256()
    for seed in range(12):
        for split in ("train", "test", "heldout"):
            scene = sample_scene(seed, split=split)
            digest.update(repr(scene).encode() + render(scene).tobytes() + render(scene, 100).tobytes())
            digest.update(repr([pretraining_caption(scene, 0), benchmark_captions(scene)]).encode())
            digest.update(repr(pretraining_caption(scene, 0, sentences=True)).encode())
        digest.update(repr([document(seed, lang) for lang in LANGUAGES]).encode())
    return digest.hexdigest()


def shape(kind="circle", colour="red", size="small", texture="plain", x=300, y=300):
    radius = 120 if size == "small" else 195
    return Shape(kind=kind, colour=colour, size=size, texture=texture, x=x, y=y, radius=radius, tint=0)


def scene_of(*shapes):
    return dataclasses.replace(sample_scene(0), shapes=shapes)


def combinations(scene):
    return {(shape.kind, shape.colour) for shape in scene.shapes}


def words(text):
    return set(re.findall(r"\w+", text.lower()))


def test_the_world_never_changes():
    assert fingerprint() == GOLDEN


def test_another_process_sees_the_same_world():
    code = "import test_scenes; print(test_scenes.fingerprint())"
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": os.path.dirname(__file__)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.split()[-1] == fingerprint()


def test_draws_are_uniform_and_keyed():
    draws = Draws("test", 1)
    counts = np.bincount([draws.below(7) for _ in range(7_000)], minlength=7)
    assert counts.min() > 850
    assert counts.max() < 1150
    assert sorted(draws.shuffled(range(5))) == list(range(5))
    assert Draws("a", 12).below(2**60) != Draws("a1", 2).below(2**60)


def test_scenes_are_clear():
    for seed in range(1_000):
        shapes = sample_scene(seed, objects=3).shapes
        for i, a in enumerate(shapes):
            reach = max(a.x, a.y, EDGE - a.x, EDGE - a.y) + a.radius
            assert reach <= EDGE - 48
            for b in shapes[i + 1 :]:
                near, far = sorted((abs(a.x - b.x), abs(a.y - b.y)))
                assert near**2 + far**2 > (a.radius + b.radius) ** 2
                assert far >= 1.5 * near
                assert abs(a.x - b.x) >= 64
                assert relation(b, a) == OPPOSITE[relation(a, b)]


def test_relation_goes_by_the_dominant_axis():
    middle = shape(x=500, y=500)
    for x, y, name in ((200, 400, "right of"), (800, 600, "left of"), (450, 200, "below"), (550, 800, "above")):
        assert relation(middle, shape(x=x, y=y)) == name


def test_counts():
    assert collections.Counter(len(scene.shapes) for scene in fixed_scenes("test")) == {1: 100, 2: 100, 3: 100}
    assert [len(sample_scene(5, objects=n).shapes) for n in (1, 2, 3)] == [1, 2, 3]


def test_held_out_combinations():
    assert {kind for kind, _ in HELD_OUT} == set(KINDS)
    assert {colour for _, colour in HELD_OUT} == set(COLOURS)
    seen = collections.Counter()
    for seed in range(5_000):
        train = combinations(sample_scene(seed))
        seen.update(train)
        assert not train & HELD_OUT
    assert len(seen) == len(KINDS) * len(COLOURS) - len(HELD_OUT)
    for seed in range(500):
        assert not combinations(sample_scene(seed, split="test")) & HELD_OUT
        assert len(combinations(sample_scene(seed, split="heldout")) & HELD_OUT) == 1
    assert sample_scene(3).shapes != sample_scene(3, split="test").shapes


def test_no_text_names_a_held_out_combination():
    texts = [document(seed, lang).text for seed in range(500) for lang in ("en", "en-de")]
    captions = [
        pretraining_caption(sample_scene(seed), 0, sentences=sentences).text
        for seed in range(3_000)
        for sentences in (False, True)
    ]
    for kind, colour in HELD_OUT:
        assert not [text for text in texts + captions if f"{colour} {kind}" in text.lower()]
        for words in (f"the {kind} is {colour}", f"the {colour} shape is a {kind}"):  # a quiz may: "…: false."
            assert not [text for text in captions if words in text.lower()]


def test_bad_arguments():
    with pytest.raises(ValueError, match="split must be one of train, test, heldout, got 'dev'"):
        sample_scene(0, split="dev")
    with pytest.raises(ValueError, match="objects must be 1, 2 or 3, got 4"):
        sample_scene(0, objects=4)
    with pytest.raises(ValueError, match="lang must be one of en, de, en-de, got 'fr'"):
        document(0, "fr")


def test_pictures_show_colour_kind_and_texture():
    for colour, rgb in COLOURS.items():
        picture = render(scene_of(shape("square", colour, "large", x=512, y=512))).astype(int)
        assert np.abs(picture[28:36, 28:36] - rgb).max() == 0
    masks = {}
    for kind in KINDS:
        picture = render(scene_of(shape(kind, "black", "small", x=512, y=512))).astype(int)
        masks[kind] = picture.sum(2) < 200
    for i, kind in enumerate(KINDS):
        for other in KINDS[i + 1 :]:
            assert (masks[kind] ^ masks[other]).sum() >= 20, (kind, other)
    pictures = {render(scene_of(shape("star", "red", "small", texture))).tobytes() for texture in TEXTURES}
    assert len(pictures) == len(TEXTURES)


def test_a_picture_scales():
    scene = sample_scene(2, objects=3)
    small = render(scene, 64).astype(float)
    large = render(scene, 192).astype(float).reshape(64, 3, 64, 3, 3).mean((1, 3))
    assert np.abs(small - large).mean() < 2


@pytest.mark.parametrize("sentences", [False, True])
def test_complete_captions_are_right_and_wrong_ones_wrong(sentences):
    grades = collections.Counter()
    said = 0
    for seed in range(6_000):
        scene = sample_scene(seed)
        caption = pretraining_caption(scene, 1, sentences=sentences)
        said += re.match(r"(\w+ shapes: )?the \w+( shape)? is ", caption.text.lower()) is not None
        verdict = judge(caption.text, scene)
        assert not verdict.reason.startswith("does not parse"), caption
        assert (verdict.correct, verdict.true) == (caption.grade == "complete", caption.grade != "wrong"), (
            caption,
            verdict,
        )
        assert caption.grade == "complete" or not caption.text.startswith(PROMPT)
        grades[caption.grade] += 1
    assert grades["partial"] / 6_000 == pytest.approx(0.30, abs=0.02)
    assert grades["wrong"] / 6_000 == pytest.approx(0.10, abs=0.012)
    assert said / 6_000 == pytest.approx(0.5 if sentences else 0.0, abs=0.05)


def test_every_grammar_is_right_on_its_scene_and_wrong_on_others():
    next_colour = dict(zip(COLOURS, [*list(COLOURS)[1:], "red"], strict=True))
    for seed in range(2_000):
        scene = sample_scene(seed, split=("train", "test", "heldout")[seed % 3])
        recoloured = [dataclasses.replace(shape, colour=next_colour[shape.colour]) for shape in scene.shapes]
        other = dataclasses.replace(scene, shapes=tuple(recoloured))
        for caption in (prompted_caption(scene), *benchmark_captions(scene)):
            assert judge(caption, scene).correct, caption
            assert not judge(caption, other).true, caption


def test_the_prompt_may_be_left_out():
    scene = sample_scene(5, split="test")
    assert judge(prompted_caption(scene).removeprefix(PROMPT).strip(), scene).correct


SWAPS = {
    "left": "right",
    "right": "left",
    "above": "below",
    "below": "above",
    "over": "under",
    "under": "over",
    "higher than": "under",
    "beneath": "over",
}


@pytest.mark.parametrize("grammar", [prompted_caption, lambda scene: benchmark_captions(scene)[0]])
def test_mutated_captions_are_wrong(grammar):
    tried = collections.Counter()
    for seed in range(600):
        scene = sample_scene(seed, split="test")
        caption = grammar(scene).lower()
        unique = len(combinations(scene)) == len(scene.shapes)
        swapped = re.sub("|".join(SWAPS), lambda found: SWAPS[found[0]], caption)
        if unique and swapped != caption:
            assert not judge(swapped, scene).true, swapped
            tried["swapped"] += 1
        colour = scene.shapes[0].colour
        absent = next(name for name in COLOURS if name not in {shape.colour for shape in scene.shapes})
        article = "an" if absent == "orange" else "a"
        recoloured = re.sub(rf"\ban? {colour}", f"{article} {absent}", re.sub(rf"(?<!n ){colour}", absent, caption))
        verdict = judge(recoloured, scene)
        assert not verdict.true
        assert not verdict.reason.startswith("does not parse"), recoloured
        tried["recoloured"] += 1
        fewer = dataclasses.replace(scene, shapes=scene.shapes[1:])
        more = dataclasses.replace(scene, shapes=(*scene.shapes, shape("ring", absent)))
        if fewer.shapes:
            assert not judge(caption, fewer).true
        assert judge(caption, more).true
        assert not judge(caption, more).correct
        tried["dropped"] += 1
    assert tried["swapped"] > 200
    assert tried["recoloured"] == tried["dropped"] == 600


RED, BLUE = shape(x=200, y=500), shape("star", "blue", "large", "striped", x=700, y=550)
GREEN = shape("ring", "green", x=600, y=200)
TWINS = scene_of(shape(x=200, y=500), shape(size="large", x=700, y=550))

VERDICTS = {
    "A picture of a small red circle with a large blue star to the right of it": ((RED, BLUE), "right"),
    "a red circle to the left of a blue star.": ((RED, BLUE), "right"),
    "a blue star to the right of a red circle": ((RED, BLUE), "right"),
    "red circle and striped blue star; the circle is to the left of the star": ((RED, BLUE), "right"),
    "two red circles, one to the left of the other": (TWINS.shapes, "right"),
    "a small red circle to the left of a large red circle": (TWINS.shapes, "right"),
    "a large red circle to the left of a small red circle": (
        TWINS.shapes,
        "says red circle left of red circle; it is right of it",
    ),
    "two red circles, one above the other": (TWINS.shapes, "says red circle above red circle; it is left of it"),
    "a red circle and a blue star": ((RED, BLUE), "no relation"),
    "a red circle": ((RED, BLUE), "does not name the blue star"),
    "a circle to the left of a blue star": ((RED, BLUE), "does not say the colour of the circle"),
    "a red shape to the left of a blue star": ((RED, BLUE), "does not say the kind of the red shape"),
    "a red circle above a blue star": ((RED, BLUE), "says red circle above blue star; it is left of it"),
    "a red circle to the left of a green star": ((RED, BLUE), "says green star; there is a blue star"),
    "a large red circle to the left of a blue star": (
        (RED, BLUE),
        "says large red circle; there is a small red circle",
    ),
    "a red circle to the left of a dotted blue star": (
        (RED, BLUE),
        "says dotted blue star; there is a striped blue star",
    ),
    "three shapes: a red circle to the left of a blue star": ((RED, BLUE), "says three shapes; there are two"),
    "a red circle, a red circle and a red circle": ((RED,), "names 3 shapes; there is one"),
    "a red circle with a blue star to the right of it and a green ring above that": ((RED, BLUE, GREEN), "right"),
    "a red circle with a green ring to the right of it and a blue star below that": (
        (RED, BLUE, GREEN),
        "right",
    ),
    "a red circle with a blue star to the right of it and a green ring to the right of that": (
        (RED, BLUE, GREEN),
        "says green ring right of blue star; it is above it",
    ),
    "the circle is red, the blue shape is a star and the circle is to the left of the blue shape": (
        (RED, BLUE),
        "right",
    ),
    "The star is above the circle; the star is striped; the star is blue; the circle is red.": (
        (RED, BLUE),
        "says blue star above red circle; it is right of it",
    ),
    "the circle is small, the circle is red": ((RED,), "right"),
    "the circle is plain": ((RED,), "does not say the colour of the plain circle"),
    "the circle is large": ((RED,), "says large circle; there is a small red circle"),
    "the red shape is a ring": ((RED,), "says red ring; there is a red circle"),
    "the circle is red, the circle is blue": ((RED, BLUE), "says blue circle; there is a blue star"),
}


@pytest.mark.parametrize("caption", VERDICTS)
def test_verdicts(caption):
    shapes, reason = VERDICTS[caption]
    verdict = judge(caption, scene_of(*shapes))
    assert verdict.reason == reason
    assert verdict.correct == (reason == "right")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "A picture of",
        "a picture of a",
        "red",
        "a red circle and",
        "a red circle a blue star",
        "a red circle above",
        "the circle is",
        "the circle is circle",
        "two red circles is large",
        "a red circle above of a blue star",
        "a red circle, which is",
        "two red circle",
        "a red circles",
        "red circle above it",
        "a red circle. . a blue star",
        "a red circle, one above the other",
        "a red red circle",
        "ein roter Kreis",
        "a red circle" * 2,
    ],
)
def test_what_is_no_caption_does_not_parse(text):
    assert judge(text, scene_of(RED)).reason.startswith("does not parse: ")
    with pytest.raises(ValueError):
        parse(text)


def test_documents():
    for seed in range(500):
        english, german, both = (document(seed, lang).text for lang in LANGUAGES)
        assert not words(english) & GERMAN_WORDS
        assert len(words(german) & GERMAN_WORDS) >= 3
        assert not words(german) & {"the", "is", "circle", "square"}
        one, _, other = both.removeprefix("English: ").partition(" German: ")
        assert not words(one) & GERMAN_WORDS
        assert words(other) & GERMAN_WORDS
        assert english.count(".") >= 2
    scene = scene_of(RED, shape("heart", "orange", "large", x=700, y=550))
    assert german_prompted_caption(scene) == (
        f"{GERMAN_PROMPT} einem kleinen roten Kreis mit einem großen orangefarbenen Herzen rechts davon"
    )


def test_no_picture_in_the_shards_is_paired_with_german(tmp_path):
    manifest = write_world(tmp_path, seed=3, pairs=400, documents=60, shard_size=200)
    pairs = ImageTextShards(tmp_path / "pairs" / "*.tar")
    assert len(pairs) == manifest["pairs"] == 400
    for i in range(len(pairs)):
        text = pairs[i].text + " " + json.dumps(pairs.metadata(i)["caption"])
        assert not words(text) & GERMAN_WORDS
        parse(pairs[i].text)
