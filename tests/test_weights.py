"""One folder per model: what is written is read back to the bit, what does not fit is named, grids are resized."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from model_cases import ARCHS, TINY, packed, tiny_model

import simvlm
from simvlm.data.tokenizer import train_tokenizer
from simvlm.model import SimVLM
from simvlm.model.weights import Preprocess, resize_positions, resize_table

TEXTS = ["a red square left of a blue circle", "ein rotes Quadrat links von einem blauen Kreis"] * 3
PIECES = 300


def _hidden(model):
    batch = packed(model.config, [(True, 3, 4), (False, 5, 2)]).inputs(model.config).to("cpu")
    with torch.no_grad():
        return model.eval()(batch)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(TEXTS, tmp_path_factory.mktemp("tokenizer") / "any.model", vocab_size=PIECES)


@pytest.fixture
def folder(tmp_path):
    tiny_model(TINY).float().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("config", ARCHS.values(), ids=ARCHS)
def test_saved_and_loaded_to_the_bit(config, tmp_path):
    model = tiny_model(config).float()
    model.save_pretrained(tmp_path)
    loaded = SimVLM.from_pretrained(tmp_path)
    assert loaded.config == config
    assert not loaded.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert torch.equal(_hidden(loaded), _hidden(model))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_load_gives_model_preprocess_and_tokenizer(tokenizer, tmp_path):
    model = tiny_model(dataclasses.replace(TINY, vocab_size=PIECES)).float()
    model.save_pretrained(tmp_path, tokenizer)
    loaded, preprocess, same = simvlm.load(tmp_path, impl="reference")
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    assert preprocess(picture).shape == (16, 16, 3)
    assert same.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
    text = loaded.generate(preprocess(picture)[None], [same.encode("a")], max_len=4)[0]
    assert isinstance(same.decode(text.tokens), str)


def test_a_tokenizer_has_no_sentinels(tokenizer, tmp_path):
    """A model of span corruption has more ids than its tokenizer, by just those."""
    config = dataclasses.replace(TINY, vocab_size=PIECES + 8, num_sentinels=8)
    tiny_model(config).float().save_pretrained(tmp_path / "whole", tokenizer)
    model, _, same = simvlm.load(tmp_path / "whole")
    assert model.config == config
    assert same.vocab_size == model.config.num_pieces == PIECES
    with pytest.raises(ValueError, match=f"tokenizer must have the model's {PIECES + 4} pieces, got {PIECES}"):
        tiny_model(dataclasses.replace(config, num_sentinels=4)).save_pretrained(tmp_path / "other", tokenizer)


def test_every_difference_is_named_at_once(folder):
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    del tensors["text_positions"], tensors["decoder.norm.bias"]
    tensors["decoder.extra"] = torch.zeros(2)
    tensors["projection.bias"] = torch.zeros(31)
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(ValueError, match="must hold exactly the model's tensors") as caught:
        SimVLM.from_pretrained(folder)
    for part in (
        "missing text_positions",
        "missing decoder.norm.bias",
        "unexpected decoder.extra",
        "projection.bias of shape [31] instead of [32]",
    ):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_broken_folders_are_named(folder, tokenizer):
    with pytest.raises(FileNotFoundError, match=r"folder must hold tokenizer\.model"):
        simvlm.load(folder)
    shutil.copyfile(tokenizer.path, folder / "tokenizer.model")
    with pytest.raises(ValueError, match=r"tokenizer\.model in .* must have the model's 40 pieces, got 300"):
        simvlm.load(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"widht": 3}))
    with pytest.raises(ValueError, match="unknown widht; did you mean 'width'"):
        SimVLM.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "vit"}))
    with pytest.raises(ValueError, match='must say "model_type": "simvlm"'):
        SimVLM.from_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json must be JSON"):
        SimVLM.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors must be a whole safetensors file"):
        SimVLM.from_pretrained(folder)


def test_another_tokenizer_of_the_same_size_is_refused(tokenizer, tmp_path):
    model = tiny_model(dataclasses.replace(TINY, vocab_size=PIECES)).float()
    model.save_pretrained(tmp_path, tokenizer)
    train_tokenizer([text.upper() for text in TEXTS], tmp_path / "tokenizer.model", vocab_size=PIECES)
    with pytest.raises(ValueError, match=r"must be the one the model was saved with"):
        simvlm.load(tmp_path)


def test_a_failed_save_leaves_the_old_file(folder, monkeypatch):
    before = (folder / "model.safetensors").read_bytes()

    def full(tensors, path, **options):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        tiny_model(ARCHS["decoder_only"]).save_pretrained(folder)
    assert (folder / "model.safetensors").read_bytes() == before
    assert SimVLM.from_pretrained(folder).config == TINY


def test_the_same_grid_is_the_same_bits():
    positions, table = torch.randn(6, 5), torch.randn(2, 3, 5)
    assert torch.equal(resize_positions(positions, (2, 3), (2, 3)), positions)
    assert torch.equal(resize_table(table, (2, 3)), table)


def _bilinear(grid, sides):
    """Half-pixel bilinear of [H, W], written out for one output at a time, in float64."""
    out = np.zeros(sides)
    for i in range(sides[0]):
        for j in range(sides[1]):
            total = 0.0
            y = min(max((i + 0.5) * grid.shape[0] / sides[0] - 0.5, 0), grid.shape[0] - 1)
            x = min(max((j + 0.5) * grid.shape[1] / sides[1] - 0.5, 0), grid.shape[1] - 1)
            for r in range(grid.shape[0]):
                for c in range(grid.shape[1]):
                    total += max(0, 1 - abs(y - r)) * max(0, 1 - abs(x - c)) * grid[r, c]
            out[i, j] = total
    return out


@pytest.mark.parametrize("new", [(4, 6), (3, 7), (1, 2)], ids=str)
def test_resizing_to_other_and_non_square_grids(new):
    rng = np.random.default_rng(0)
    positions = rng.standard_normal((2, 3, 5)).astype(np.float32)
    resized = resize_positions(torch.from_numpy(positions.reshape(6, 5)), (2, 3), new).reshape(*new, 5)
    for d in range(5):
        torch.testing.assert_close(resized[..., d], torch.from_numpy(_bilinear(positions[..., d], new)).float())
    table = rng.standard_normal((2, 3, 5)).astype(np.float32)
    sides = (2 * new[0] - 1, 2 * new[1] - 1)
    for head, resized_head in zip(table, resize_table(torch.from_numpy(table), new), strict=True):
        torch.testing.assert_close(resized_head, torch.from_numpy(_bilinear(head, sides)).float())


def test_a_model_at_another_image_size(folder):
    larger = SimVLM.from_pretrained(folder, image_size=24)
    assert larger.config.image_grid == (6, 6)
    assert larger.encoder.layers[0].attention.rel_bias.shape == (2, 11, 11)
    assert torch.isfinite(_hidden(larger)).all()
    same = SimVLM.from_pretrained(folder, image_size=16)
    assert torch.equal(_hidden(same), _hidden(SimVLM.from_pretrained(folder)))


def test_preprocess_reads_what_people_have(tmp_path):
    from PIL import Image

    preprocess = Preprocess(16)
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    path = tmp_path / "a picture.png"
    Image.fromarray(picture).save(path)
    for image in (picture, path, str(path), Image.fromarray(picture)):
        assert np.array_equal(preprocess(image), picture)
    assert preprocess(Image.new("L", (30, 20))).shape == (16, 16, 3)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"image must be a readable picture, got .*a picture\.png"):
        preprocess(path)
    with pytest.raises(ValueError, match=r"image must be .* uint8\[H, W, 3\], got float64\[2, 2\]"):
        preprocess(np.zeros((2, 2)))
