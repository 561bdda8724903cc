"""`simvlm caption`: pictures in, captions out, and what it says of pictures and models that it cannot read."""

from __future__ import annotations

import dataclasses

import pytest
from model_cases import TINY
from PIL import Image

from simvlm import cli
from simvlm.data.captions import PROMPT, prompted_caption
from simvlm.data.scenes import fixed_scenes, render
from simvlm.data.tokenizer import train_tokenizer
from simvlm.model import SimVLM
from simvlm.model.caption import caption
from simvlm.model.weights import load


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and two pictures; the third is cut short, the fourth is none."""
    folder = tmp_path_factory.mktemp("model")
    texts = [prompted_caption(scene) for scene in fixed_scenes("train", 300)]
    tokenizer = train_tokenizer(texts, folder / "tokens.model", vocab_size=360)
    SimVLM(dataclasses.replace(TINY, vocab_size=360)).save_pretrained(folder / "model", tokenizer)
    for i, scene in enumerate(fixed_scenes("test", 2)):
        Image.fromarray(render(scene)).save(folder / f"{i}.png")
    whole = (folder / "0.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("no picture")
    return folder


def test_captions_are_what_the_model_generates(folder):
    model, preprocess, tokenizer = load(folder / "model")
    paths = [str(folder / f"{i}.png") for i in range(2)]
    texts, problems = caption(paths, folder=str(folder / "model"), beam=2, max_len=8)
    want = model.generate([preprocess(path) for path in paths], [tokenizer.encode(PROMPT)] * 2, beam=2, max_len=8)
    assert texts == [tokenizer.decode(text.tokens) for text in want]
    assert problems == []


def test_one_line_a_picture(folder, capsys):
    paths = [str(folder / f"{i}.png") for i in range(2)]
    options = ["--model", str(folder / "model"), "--max-len", "6"]
    assert cli.main(["caption", *paths, *options, "--sample", "--seed", "3"]) == 0
    drawn = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[0] for line in drawn] == paths
    assert cli.main(["caption", *paths, *options, "--sample", "--seed", "4"]) == 0
    assert capsys.readouterr().out.splitlines() != drawn
    assert cli.main(["caption", *paths, *options, "--prompt", ""]) == 0


def test_unreadable_pictures_are_named_and_the_others_captioned(folder, capsys):
    names = ("0.png", "cut.png", "text.png", "nowhere.png", "1.png")
    paths = [str(folder / name) for name in names]
    assert cli.main(["caption", *paths, "--model", str(folder / "model"), "--max-len", "6"]) == 1
    printed = capsys.readouterr()
    assert [line.partition(": ")[0] for line in printed.out.splitlines()] == [paths[0], paths[4]]
    assert len(printed.err.splitlines()) == 1
    assert all(path in printed.err for path in paths[1:4])


def test_pictures_are_read_as_in_training(folder, tmp_path):
    """Upright by their EXIF tag, transparency over white."""
    _, preprocess, _ = load(folder / "model")
    see_through = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    see_through.save(tmp_path / "a.png")
    assert (preprocess(tmp_path / "a.png") == 255).all()
    assert (preprocess(see_through) == 255).all()
    halves = Image.new("RGB", (16, 16))
    halves.paste((255, 255, 255), (0, 0, 8, 16))
    exif = halves.getexif()
    exif[274] = 6  # turn by 90° to see it
    halves.save(tmp_path / "b.jpg", exif=exif, quality=95)
    seen = preprocess(tmp_path / "b.jpg")
    assert seen[:6].mean() > 200
    assert seen[-6:].mean() < 50


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "nowhere"], "folder must hold config.json, got nowhere without it"),
        (["--beam", "0"], "beam must be at least 1, got 0"),
        (["--max-len", "0"], "max_len must be at least 1, got 0"),
        (["--sample", "--temperature", "0"], "temperature must be above 0, got 0.0"),
    ],
)
def test_bad_options_are_one_line(options, message, folder, capsys):
    assert cli.main(["caption", str(folder / "0.png"), "--model", str(folder / "model"), *options]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
