"""What the ablation changes in pretraining: the objective, the architecture, which data and how much of it."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import io
import itertools
import json
import re

import numpy as np
import pytest
from model_cases import ONE_STACK
from PIL import Image
from pretrain_cases import CONFIG, VOCABULARY, log_of, make_world, model_of, settings_of, step_of

import simvlm
from simvlm import cli
from simvlm.data import spans
from simvlm.data.mixture import Mixture
from simvlm.data.prefixes import BOS, EOS
from simvlm.data.shards import Sample
from simvlm.data.text import Document
from simvlm.data.tokenizer import Tokenizer
from simvlm.model.batch import IMAGE_TEXT, TEXT_ONLY
from simvlm.model.config import as_decoder_only, with_conv_stages
from simvlm.train import settings as run_settings
from simvlm.train.jax_engine import JaxEngine
from simvlm.train.pretrain import mixture_of, model_config, pretrain
from simvlm.train.settings import DataSettings, JaxSettings, PretrainSettings
from simvlm.train.torch_engine import TorchEngine

LETTERS = 40
"""ids of the tokenizer below"""


class Letters:
    """A tokenizer that no library's version changes."""

    vocab_size = LETTERS

    def encode(self, text):
        return [4 + ord(letter) % 36 for letter in text]


class Pairs:
    texts: tuple[str, ...]

    def __init__(self, count=30):
        self.texts = tuple(_text(i) for i in range(count))

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, i):
        picture = io.BytesIO()
        pixels = np.random.default_rng(i).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(picture, "PNG")
        return Sample(str(i), "pairs", picture.getvalue(), self.texts[i])


class Documents:
    def __len__(self):
        return 12

    def __getitem__(self, i):
        return Document(str(i), "documents", _text(3 * i + 5), None)


def _text(i):
    """1 … 37 letters."""
    return "".join(chr(97 + (7 * i + j * j) % 26) for j in range(1 + (11 * i) % 37))


def mixture(pairs=None, documents=None, **options):
    settings = {"pairs_per_step": 8, "documents_per_step": 3, "image_size": 16, "max_text_len": 24, "seed": 5}
    return Mixture(pairs or Pairs(), documents or Documents(), Letters(), **settings | options)


def rows(batch):
    """(source, encoder text, decoder inputs, targets) of each sequence."""
    encoder = np.split(batch.encoder_text, batch.encoder_text_lens.cumsum())
    inputs, targets = (np.split(x, batch.decoder_lens.cumsum()) for x in (batch.decoder_inputs, batch.targets))
    count = len(batch.sources)
    parts = (encoder[:count], inputs[:count], targets[:count])
    return [(int(source), *map(np.ndarray.tolist, row)) for source, *row in zip(batch.sources, *parts, strict=True)]


# --- objectives ---


def test_prefix_lm_is_what_it_was():
    """Of nine batches, all but the pixels, which are the image library's; from before there were other objectives."""
    digest = hashlib.sha256()
    own = mixture()
    names = ("encoder_text", "encoder_text_lens", "decoder_inputs", "targets", "decoder_lens", "sources", "sample_ids")
    for step in range(9):
        batch = own.batch(step).batch
        for name in names:
            x = getattr(batch, name)
            digest.update(f"{name}{x.dtype}{x.shape}".encode() + x.tobytes())
    assert digest.hexdigest() == "c1d065aad69fe8ada83539b4079a5475fdb4a12b54a09e7861cbf51b8a44f9a0"


def test_lm_reads_as_little_as_can_be():
    """The same samples and windows as PrefixLM."""
    for step in range(5):
        lm, prefix_lm = (mixture(objective=name).batch(step).batch for name in ("lm", "prefix_lm"))
        assert np.array_equal(lm.sample_ids, prefix_lm.sample_ids)
        assert np.array_equal(lm.encoder_text_lens, lm.sources == TEXT_ONLY)
        for (_, prefix, inputs, targets), (_, other, _, suffix) in zip(rows(lm), rows(prefix_lm), strict=True):
            assert prefix + targets == other + suffix
            assert inputs == [BOS, *targets[:-1]]


def _restored(encoder_text, targets, first):
    """The text again, and the lengths of its spans."""
    assert targets[-1] == EOS
    sentinels = [token for token in targets if token >= first]
    assert sentinels == [token for token in encoder_text if token >= first] == [*range(first, first + len(sentinels))]
    starts = [targets.index(sentinel) for sentinel in sentinels] + [len(targets) - 1]
    found = {s: targets[a + 1 : b] for s, a, b in zip(sentinels, starts[:-1], starts[1:], strict=True)}
    assert all(found.values())
    text = [token for part in encoder_text for token in found.get(part, [part])]
    return text, [len(span) for span in found.values()]


@pytest.mark.parametrize("length", [2, 3, 9, 10, 24, 57, 231])
def test_every_token_is_in_the_encoder_or_the_targets(length):
    tokens = [100 + i for i in range(length)]
    corrupted, count = spans.extent(length)
    for key in range(40):
        split = spans.corrupt(tokens, 1000, key)
        text, lengths = _restored(split.encoder_text, split.targets, 1000)
        assert text == tokens
        assert (sum(lengths), len(lengths)) == (corrupted, count)
        assert split.decoder_inputs == [BOS, *split.targets[:-1]]
        marks = [token >= 1000 for token in split.encoder_text]
        assert not any(a and b for a, b in itertools.pairwise(marks)), "spans that touch are one"


def test_how_much_is_corrupted():
    """15 % in spans of 3."""
    assert [spans.extent(m) for m in (2, 9, 10, 16, 17, 30, 57, 100, 231)] == [
        (1, 1),
        (1, 1),
        (2, 1),
        (2, 1),
        (3, 1),
        (5, 2),
        (9, 3),
        (15, 5),
        (35, 12),
    ]


def test_spans_are_uniform():
    """Where one is, both ends of the text included; and how the tokens fall to two."""
    starts = collections.Counter(
        spans.corrupt(range(100, 110), 1000, key).encoder_text.index(1000) for key in range(3600)
    )
    firsts = collections.Counter(
        spans.corrupt(range(100, 130), 1000, key).targets.index(1001) - 1 for key in range(3600)
    )
    for counts, places, quantile in ((starts, range(9), 26.1), (firsts, range(1, 5), 16.3)):  # of chi², 0.1 %
        expected = 3600 / len(places)
        assert set(counts) == set(places)
        assert sum((count - expected) ** 2 / expected for count in counts.values()) < quantile


def test_the_longest_text_fits_and_the_next_does_not():
    for most in range(5, 300):
        longest = spans.longest_text(most)
        totals = []
        for length in (longest, longest + 1):
            split = spans.corrupt(range(100, 100 + length), 1000, most)
            totals.append(len(split.encoder_text) + len(split.targets))
        assert totals[0] <= most < totals[1]
        assert spans.extent(longest)[1] <= spans.num_sentinels(most)
    assert (spans.longest_text(256), spans.num_sentinels(256)) == (231, 64)
    with pytest.raises(ValueError, match="max_text_len must be at least 5, got 4"):
        spans.longest_text(4)
    with pytest.raises(ValueError, match="corrupt: tokens must be at least 2, got 1"):
        spans.corrupt([7], 1000)


def test_span_corruption_of_a_mixture():
    """Whole texts where they fit, also of a model of one stack; those of one token are skipped and counted."""
    pairs, own = Pairs(), mixture(objective="span_corruption")
    one_stack = dataclasses.replace(ONE_STACK, vocab_size=LETTERS + 64, num_sentinels=64)
    skipped = []
    for step in range(8):
        mixed = own.batch(step)
        skipped += [(sample.kind, sample.shard, sample.key) for sample in mixed.skipped]
        assert mixed.batch.inputs(one_stack).text.max() >= LETTERS
        for (source, encoder_text, inputs, targets), i in zip(
            rows(mixed.batch), mixed.batch.sample_ids.tolist(), strict=True
        ):
            text, _ = _restored(encoder_text, targets, LETTERS)
            whole = Letters().encode(pairs.texts[i] if source == IMAGE_TEXT else Documents()[i].text)
            assert text == whole if len(whole) < 21 else len(text) >= 20
            assert "".join(map(chr, text)) in "".join(map(chr, whole))
            assert inputs == [BOS, *targets[:-1]]
    assert {len(text) for text in pairs.texts} >= {1, 2}
    assert set(skipped) == {("text too short", "pairs", str(i)) for i in range(30) if len(pairs.texts[i]) == 1}


def test_an_objective_that_is_none():
    with pytest.raises(
        ValueError, match=r"objective must be one of \['prefix_lm', 'lm', 'span_corruption'\], got 'mlm'"
    ):
        mixture(objective="mlm")


# --- a fraction of the pairs ---


def _epochs(own, pairs, epochs=2):
    """The pairs of each epoch, in order."""
    ids = []
    for step in range(-(-epochs * pairs // own.pairs_per_step)):
        batch = own.batch(step).batch
        ids += batch.sample_ids[batch.sources == IMAGE_TEXT].tolist()
    return [ids[epoch * pairs : (epoch + 1) * pairs] for epoch in range(epochs)]


def test_a_fraction_is_the_first_pairs_of_the_whole():
    first, _ = _epochs(mixture(), 30)
    for fraction, count in ((0.1, 3), (0.5, 15), (0.99, 30), (1.0, 30)):
        own = mixture(pairs_fraction=fraction)
        assert own.num_pairs == count
        epochs = _epochs(own, count)
        assert all(sorted(epoch) == sorted(first[:count]) for epoch in epochs)
        assert epochs[0] != epochs[1] or count < 4
        documents = [
            x.sample_ids[x.sources == TEXT_ONLY].tolist() for x in (own.batch(0).batch, mixture().batch(0).batch)
        ]
        assert documents[0] == documents[1]
    other, _ = _epochs(mixture(pairs_fraction=0.5, seed=6), 15)
    assert sorted(other) != sorted(first[:15])


def test_a_fraction_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"pairs_fraction must leave at least one of the 30 pairs, got 0\.01"):
        mixture(pairs_fraction=0.01)


# --- runs ---


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def _changed(world, out, data, **changes):
    settings = settings_of(world, out, **changes)
    return dataclasses.replace(settings, data=dataclasses.replace(settings.data, **data))


def test_settings_survive_yaml(tmp_path):
    settings = PretrainSettings(
        out=str(tmp_path),
        arch="decoder_only",
        conv_stages=0,
        objective="span_corruption",
        data=DataSettings(fraction=0.1),
    )
    run_settings.save(settings, tmp_path)
    assert run_settings.load(tmp_path / run_settings.FILE) == settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--conv-stages", "4"], "conv_stages must be from 0 to 3 for a model of 2 stages, got 4"),
        (
            ["--arch", "encoder_decoder", "--variant", "ONE"],
            "arch must be decoder_only for .*one.json.*got encoder_dec",
        ),
        (["--data.fraction", "0"], "data.fraction must be above 0 and at most 1, got 0.0"),
        (["--data.fraction", "0.001"], "pairs_fraction must leave at least one of the 60 pairs, got 0.001"),
        (
            ["--data.pairs-per-step", "0", "--data.documents-per-step", "0"],
            "data.pairs_per_step, data.documents_per_step must be above 0 .* got 0 and 0, with shards of pairs and",
        ),
        (["--data.pairs-per-step", "0", "--data.documents"], "got 0 and 2, with shards of pairs$"),
        (
            ["--data.documents-per-step", "0", "--loss-weights", "0", "1"],
            "loss_weights must be at least 0, one above it",
        ),
    ],
)
def test_bad_options_are_one_line(options, message, world, tmp_path, capsys):
    (tmp_path / "one.json").write_text(json.dumps(as_decoder_only(CONFIG).to_dict()))
    run_settings.save(settings_of(world, tmp_path / "run"), tmp_path)
    options = [option.replace("ONE", f"{tmp_path}/one.json") for option in options]
    assert cli.main(["pretrain", "--config", str(tmp_path / "run.yaml"), *options]) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert re.search(message, error.strip()), error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, CONFIG),
        ({"objective": "lm"}, CONFIG),
        ({"arch": "encoder_decoder"}, CONFIG),
        ({"arch": "decoder_only", "conv_stages": 0}, with_conv_stages(as_decoder_only(CONFIG), 0)),
        ({"objective": "span_corruption"}, dataclasses.replace(CONFIG, vocab_size=VOCABULARY + 64, num_sentinels=64)),
    ],
)
def test_the_model_of_the_settings(changes, expected, world, tmp_path):
    assert model_config(settings_of(world, tmp_path, **changes), VOCABULARY) == expected


def test_a_model_of_span_corruption_is_loaded_and_goes_on(world, tmp_path):
    """Its folder is a variant too: without the objective it has no sentinels."""
    settings = settings_of(world, tmp_path / "run", objective="span_corruption", arch="decoder_only", steps=3)
    folder = pretrain(settings)
    model, _, tokenizer = simvlm.load(folder)
    assert (tokenizer.vocab_size, model.config.vocab_size) == (VOCABULARY, VOCABULARY + 64)
    texts = model.generate([np.zeros((16, 16, 3), np.uint8)], [tokenizer.encode("A")], beam=3, max_len=6)
    tokenizer.decode(texts[0].tokens)
    pretrain(dataclasses.replace(settings, steps=4), resume=True)
    assert [line["step"] for line in log_of(settings.out)] == [1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"objective must be span_corruption, as in .*, got prefix_lm"):
        pretrain(dataclasses.replace(settings, objective="prefix_lm"), resume=True)
    again = settings_of(world, tmp_path / "again", variant=str(folder / "config.json"))
    assert model_config(again, VOCABULARY) == as_decoder_only(CONFIG)


@pytest.mark.parametrize(("without", "left"), [("pairs", "text_only"), ("documents", "image_text")])
def test_without_one_kind_of_data(without, left, world, tmp_path):
    """As many of the other in every step; such a run is resumed as any."""
    whole = _changed(world, tmp_path / "whole", {f"{without}_per_step": 0}, steps=4, precision="float32")
    parts = dataclasses.replace(whole, out=str(tmp_path / "parts"), checkpoint_every=2)
    pretrain(whole)
    pretrain(dataclasses.replace(parts, steps=2))
    pretrain(dataclasses.replace(parts, steps=4), resume=True)
    log = log_of(whole.out)
    for line in log:
        assert line["loss"] == line[f"loss_{left}"]
        assert line["image_text_token_share"] == (left == "image_text")
    assert [line["sample_ids_hash"] for line in log_of(parts.out)] == [line["sample_ids_hash"] for line in log]
    if without == "pairs":
        statistics = {name: x for name, x in model_of(whole.out)[1].items() if "running" in name}
        assert all((x == ("var" in name)).all() for name, x in statistics.items()), "no picture moved them"


def test_a_fraction_is_told_and_stays(world, tmp_path, capsys):
    settings = _changed(world, tmp_path / "run", {"fraction": 0.1}, steps=1)
    pretrain(settings)
    assert "data.fraction 0.1: 6 of the 60 pairs are used" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"data\.pairs must be 6 pairs, as in .*, got 60 pairs"):
        pretrain(_changed(world, tmp_path / "run", {"fraction": 1.0}, steps=2), resume=True)


def test_jax_is_torch_on_corrupted_documents_alone(world, tmp_path):
    """One step on two devices, without a picture, from the same weights."""
    changes = {"objective": "span_corruption", "precision": "float32", "jax": JaxSettings(mesh=(2, 1, 1))}
    settings = _changed(world, tmp_path, {"pairs_per_step": 0}, **changes)
    config, tokenizer = model_config(settings, VOCABULARY), Tokenizer(settings.data.tokenizer)
    of_torch = TorchEngine(settings, config)
    of_torch.save(tmp_path, tokenizer)
    of_jax = JaxEngine(dataclasses.replace(settings, engine="jax"), config)
    of_jax.load_weights(tmp_path)
    mixed = mixture_of(settings, tokenizer, config).batch(0)
    expected, got = (step_of(engine, mixed) for engine in (of_torch, of_jax))
    np.testing.assert_allclose(got.nll, expected.nll, rtol=1e-4)
    np.testing.assert_allclose(got.grad_norm, expected.grad_norm, rtol=1e-4)
