"""SentencePiece: special ids, round trips, limits of the vocabulary, and one model per process."""

from __future__ import annotations

import multiprocessing
import pickle

import numpy as np
import pytest
import sentencepiece

from simvlm.data.captions import PROMPT, prompted_caption
from simvlm.data.commands import data_tokenizer, data_world
from simvlm.data.documents import LANGUAGES, document
from simvlm.data.scenes import sample_scene
from simvlm.data.tokenizer import Tokenizer, train_tokenizer

TEXTS = [document(seed, lang).text for seed in range(150) for lang in LANGUAGES]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(TEXTS, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", vocab_size=600)


def test_special_ids_and_size(tokenizer):
    model = sentencepiece.SentencePieceProcessor(model_file=tokenizer.path)
    assert (model.pad_id(), model.bos_id(), model.eos_id(), model.unk_id()) == (0, 1, 2, 3)
    assert tokenizer.vocab_size == 600
    assert min(min(ids) for ids in tokenizer.encode_batch(TEXTS)) > 3


def test_round_trips(tokenizer):
    for text in (*TEXTS[:30], "Zażółć gęślą 中文 🙂 ß", "a.b,c"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode_batch(tokenizer.encode_batch(TEXTS[:5])) == TEXTS[:5]
    assert tokenizer.encode_batch(TEXTS[:5]) == [tokenizer.encode(text) for text in TEXTS[:5]]
    assert tokenizer.decode(np.array([1, *tokenizer.encode("a red Circle"), 2, 0, 0])) == "a red Circle"
    assert tokenizer.encode("") == []
    # nmt_nfkc: a full-width letter is the letter.
    assert tokenizer.encode("ａ") == tokenizer.encode("a")


def test_the_prompt_is_a_prefix_of_what_it_begins(tokenizer):
    prompt = tokenizer.encode(PROMPT)
    for seed in range(50):
        assert tokenizer.encode(prompted_caption(sample_scene(seed)))[: len(prompt)] == prompt


def test_the_same_texts_give_the_same_model(tokenizer, tmp_path):
    again = train_tokenizer(iter(TEXTS), tmp_path / "again.model", vocab_size=600)
    assert again.sha256 == tokenizer.sha256
    assert train_tokenizer(TEXTS, tmp_path / "other.model", vocab_size=500).sha256 != tokenizer.sha256


def test_limits_of_the_vocabulary(tmp_path):
    path = tmp_path / "t.model"
    with pytest.raises(ValueError, match=r"vocab_size must be at most \d+ for so little text, got 32000") as caught:
        train_tokenizer(TEXTS, path)
    largest = int(str(caught.value).split("at most ")[1].split()[0])
    assert train_tokenizer(TEXTS, path, vocab_size=largest).vocab_size == largest
    with pytest.raises(ValueError, match=f"at most {largest} "):
        train_tokenizer(TEXTS, path, vocab_size=largest + 1)
    with pytest.raises(ValueError, match=r"vocab_size must be at least \d+ \(bytes and characters alone\), got 100"):
        train_tokenizer(TEXTS, path, vocab_size=100)
    with pytest.raises(ValueError, match="texts must hold at least one line, got none"):
        train_tokenizer([" ", ""], path)
    assert Tokenizer(path).vocab_size == largest


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"path must name a file, got .*none\.model"):
        Tokenizer(tmp_path / "none.model")
    (tmp_path / "bad.model").write_bytes(b"no model")
    with pytest.raises(ValueError, match=r"bad\.model is no SentencePiece model"):
        Tokenizer(tmp_path / "bad.model").encode("a")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=str(tmp_path / "other"), vocab_size=120, minloglevel=2
    )
    with pytest.raises(ValueError, match=r"must be 0, 1, 2, 3, got \(-1, 1, 2, 0\)"):
        Tokenizer(tmp_path / "other.model").encode("a")


def test_each_process_loads_its_own(tokenizer):
    tokenizer.encode("loaded here")
    assert "_model" not in pickle.loads(pickle.dumps(tokenizer)).__dict__
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(tokenizer.encode, ("a red circle",)) == tokenizer.encode("a red circle")


def test_commands(tmp_path):
    assert "60 pairs and 40 documents" in data_world(str(tmp_path), pairs=60, documents=40, workers=1)
    report = data_tokenizer(
        str(tmp_path / "t.model"),
        pairs=f"{tmp_path}/pairs/*.tar",
        documents=f"{tmp_path}/documents/*.gz",
        vocab_size=400,
    )
    assert report == f"400 pieces in {tmp_path}/t.model, sha256 {Tokenizer(tmp_path / 't.model').sha256}"
