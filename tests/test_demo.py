"""The demo's measure, its files and its page, on captions whose verdict is known."""

from __future__ import annotations

import dataclasses
import json
from html.parser import HTMLParser

import numpy as np
import pytest

from simvlm import cli
from simvlm.data.captions import PROMPT, prompted_caption
from simvlm.data.scenes import fixed_scenes, render
from simvlm.data.tokenizer import train_tokenizer
from simvlm.demo import evaluate, recipe, report
from simvlm.demo.attention_map import attention_per_word
from simvlm.demo.evaluate import Prediction
from simvlm.model import VARIANTS, SimVLM
from simvlm.train import settings as run_settings

NUMBERS = {
    "train_seconds": 720.0,
    "setup_seconds": 60.0,
    "steps": 100,
    "pictures_seen": 6400,
    "parameters": 1_000_000,
    "step_cpp_ms": 100.0,
    "step_reference_ms": 200.0,
    "seed": 0,
    "beam": 4,
    "machine": {"cores": 2, "cpu_capability": "AVX512", "python": "3", "torch": "2", "numpy": "2", "simvlm": "0"},
}


def told(scene):
    """What the world itself says of a scene, without the prompt."""
    return prompted_caption(scene).removeprefix(PROMPT).strip()


@pytest.fixture(scope="module")
def perfect():
    return [Prediction(scene, told(scene)) for split in evaluate.SPLITS for scene in fixed_scenes(split)]


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    texts = [prompted_caption(scene) for scene in fixed_scenes("train", 300)]
    tokenizer = train_tokenizer(texts, tmp_path_factory.mktemp("t") / "tokenizer.model", vocab_size=360)
    return SimVLM(dataclasses.replace(VARIANTS["demo"], vocab_size=360)).eval(), tokenizer


def test_a_perfect_captioner_is_right_and_its_control_is_not(perfect):
    numbers = evaluate.metrics(perfect)
    assert numbers["caption_correct_shuffled"] <= 0.1
    right = {name: share for name, share in numbers.items() if not name.endswith("shuffled")}
    assert set(right.values()) == {1.0}
    assert len(right) == 5


def test_each_share_counts_its_own_pictures(perfect):
    spoilt = [
        dataclasses.replace(p, caption="a thing") if p.scene.split == "test" and len(p.scene.shapes) == 2 else p
        for p in perfect
    ]
    numbers = evaluate.metrics(spoilt)
    assert numbers["caption_correct"] == pytest.approx(2 / 3)
    assert [numbers[f"caption_correct_{count}"] for count in (1, 2, 3)] == [1, 0, 1]
    assert numbers["caption_correct_heldout"] == 1


def test_one_caption_for_all_pictures_gains_nothing_by_looking(perfect):
    same = [dataclasses.replace(p, caption="a small red circle") for p in perfect]
    numbers = evaluate.metrics(same)
    assert numbers["caption_correct"] == pytest.approx(numbers["caption_correct_shuffled"])


def test_predictions_survive_their_file(perfect, tmp_path, capsys):
    evaluate.write(perfect, tmp_path / evaluate.FILE)
    assert evaluate.read(tmp_path / evaluate.FILE) == perfect
    assert cli.main(["demo", "score", "--out", str(tmp_path)]) == 0
    assert "unseen pictures" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"seed": 1}', '{"seed": 1, "objects": 7, "split": "test", "caption": ""}']
)
def test_a_line_that_is_no_prediction_is_named(line, perfect, tmp_path):
    evaluate.write(perfect[:2], tmp_path / "p.jsonl")
    with open(tmp_path / "p.jsonl", "a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match="line 3 must be a prediction"):
        evaluate.read(tmp_path / "p.jsonl")


def test_score_without_predictions(tmp_path, capsys):
    assert cli.main(["demo", "score", "--out", str(tmp_path)]) == 1
    assert "holds no predictions.jsonl" in capsys.readouterr().err


def test_score_wants_every_fixed_picture_once(perfect, tmp_path, capsys):
    evaluate.write([*perfect[1:], perfect[-1]], tmp_path / evaluate.FILE)
    assert cli.main(["demo", "score", "--out", str(tmp_path)]) == 1
    assert "must hold each of the 600 fixed pictures once, got 600 lines, 1 pictures missing" in capsys.readouterr().err


def test_a_folder_of_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    assert cli.main(["demo", "--out", str(tmp_path)]) == 1
    assert "holds something else" in capsys.readouterr().err
    assert (tmp_path / "run").exists()


def test_ctrl_c_is_one_line(tmp_path, capsys, monkeypatch):
    def interrupt(*rest, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "demo", interrupt)
    assert cli.main(["demo", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "simvlm demo: interrupted\n"


def test_a_page_of_empty_captions(perfect, untrained, tmp_path):
    model, tokenizer = untrained
    silent = [dataclasses.replace(p, caption="") for p in perfect]
    log = [{"step": step, "loss_image_text": 3 / step, "loss_text_only": 4 / step} for step in range(1, 20)]
    report.write(tmp_path, model, tokenizer, silent, NUMBERS | evaluate.metrics(silent), log)
    assert "Where it looks" not in (tmp_path / report.FILE).read_text()


def test_minutes_must_be_positive(tmp_path, capsys):
    assert cli.main(["demo", "--minutes", "0", "--out", str(tmp_path)]) == 1
    assert "minutes must be above 0" in capsys.readouterr().err


def test_the_recipe_is_a_legal_run(tmp_path):
    settings = recipe.recipe(tmp_path, seed=0, steps=10)
    run_settings.check(settings)
    assert settings.data.pairs_per_step == 8 * settings.data.documents_per_step


def test_attention_is_a_map_for_each_word(untrained):
    model, tokenizer = untrained
    scene = fixed_scenes("test", 3)[2]
    caption = told(scene)
    maps = attention_per_word(model, tokenizer, render(scene, model.config.image_size), PROMPT, caption)
    assert [word for word, _ in maps] == caption.split()
    for _, weights in maps:
        assert weights.shape == model.config.image_grid
        assert (weights > 0).all()
        assert weights.sum() < 1  # the prompt takes its share


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.links = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]


def test_the_page_stands_alone(perfect, untrained, tmp_path):
    model, tokenizer = untrained
    wrong = [dataclasses.replace(p, caption="<b>a blue & white") if i % 5 == 0 else p for i, p in enumerate(perfect)]
    numbers = NUMBERS | evaluate.metrics(wrong)
    log = [{"step": step, "loss_image_text": 3 / step, "loss_text_only": 4 / step} for step in range(1, 20)]
    report.write(tmp_path, model, tokenizer, wrong, numbers, log)
    text = (tmp_path / report.FILE).read_text()
    page = Page()
    page.feed(text)
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert "script" not in page.tags
    assert page.tags.count("img") > 24
    assert "svg" in page.tags
    assert "<b>a blue" not in text
    assert "does not parse" in text
    assert f"{numbers['caption_correct']:.1%}" in text
    from PIL import Image

    assert np.asarray(Image.open(tmp_path / report.PICTURE)).std() > 10


def test_an_untrained_model_is_wrong(untrained):
    model, tokenizer = untrained
    numbers = evaluate.metrics(evaluate.predict(model, tokenizer, beam=1, pictures=9))
    assert numbers["caption_correct"] == 0
    json.dumps(numbers)
