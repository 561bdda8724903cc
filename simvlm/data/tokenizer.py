"""SentencePiece: training on local texts, and a wrapper that every process loads for itself."""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import sentencepiece

PAD, BOS, EOS, UNK = 0, 1, 2, 3


def train_tokenizer(texts: Iterable[str], path: str | os.PathLike[str], *, vocab_size: int = 32_000) -> Tokenizer:
    """Trains BPE with byte fallback on the texts and writes the model to `path`; the same texts give the same bytes.

    Raises:
        ValueError: there is no text, or too little for so large a vocabulary; the message names the largest.
    """
    import sentencepiece

    lines = (line for text in texts for line in text.splitlines() if line.strip())
    first = next(lines, None)
    if first is None:
        raise ValueError("train_tokenizer: texts must hold at least one line, got none")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.chain([first], lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="nmt_nfkc",
            character_coverage=0.9995,
            max_sentence_length=1 << 20,  # longer ones would be left out silently
            pad_id=PAD,
            bos_id=BOS,
            eos_id=EOS,
            unk_id=UNK,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(_explained(str(error), vocab_size)) from error
    target = Path(path)
    aside = target.with_name(target.name + ".part")
    aside.write_bytes(model.getvalue())
    aside.replace(target)
    return Tokenizer(target)


def _explained(message: str, vocab_size: int) -> str:
    if largest := re.search(r"size too high .*<= (\d+)", message):
        return f"train_tokenizer: vocab_size must be at most {largest[1]} for so little text, got {vocab_size}"
    if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return f"train_tokenizer: vocab_size must be at least {least[1]} (bytes and characters alone), got {vocab_size}"
    return f"train_tokenizer: {message}"


class Tokenizer:
    """A trained SentencePiece model: ids pad 0, bos 1, eos 2, unk 3. Encoding adds none of them.

    Pickling keeps the path alone, and the model is loaded at first use: each worker has its own.

    Raises:
        ValueError: the file is no SentencePiece model, or one with other special ids.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        if not os.path.isfile(self.path):
            raise FileNotFoundError(f"Tokenizer: path must name a file, got {self.path}")

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        # One thread: the default spends more on starting threads than short texts cost.
        return self._model.encode(list(texts), num_threads=1)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, numpy's too; special ids leave nothing behind."""
        return self._model.decode([int(i) for i in ids])

    def decode_batch(self, ids: Sequence[Sequence[int]]) -> list[str]:
        return [self.decode(row) for row in ids]

    def piece(self, token: int) -> str:
        """How one id is written; a "▁" begins a word."""
        return self._model.id_to_piece(token)

    @property
    def vocab_size(self) -> int:
        return self._model.get_piece_size()

    @functools.cached_property
    def sha256(self) -> str:
        """Of the model file: what a checkpoint remembers of its tokenizer."""
        return hashlib.sha256(Path(self.path).read_bytes()).hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    @functools.cached_property
    def _model(self) -> sentencepiece.SentencePieceProcessor:
        import sentencepiece

        model = sentencepiece.SentencePieceProcessor()
        try:
            model.load(self.path)
        except (RuntimeError, OSError) as error:
            raise ValueError(f"Tokenizer: {self.path} is no SentencePiece model") from error
        ids = (model.pad_id(), model.bos_id(), model.eos_id(), model.unk_id())
        if ids != (PAD, BOS, EOS, UNK):
            raise ValueError(f"Tokenizer: pad, bos, eos, unk of {self.path} must be 0, 1, 2, 3, got {ids}")
        return model
