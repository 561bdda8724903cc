"""A model's folder, whichever framework writes or reads it: `model.safetensors`, `config.json`, `tokenizer.model`."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simvlm.files import whole
from simvlm.model.config import SimVLMConfig

if TYPE_CHECKING:
    from simvlm.data.tokenizer import Tokenizer

WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.model"
METADATA = {"format": "pt"}
"""of the weights' file: what readers of safetensors files look for"""
_MODEL_TYPE = "simvlm"


def write(
    folder: str | Path, config: SimVLMConfig, tokenizer: Tokenizer | None, write_weights: Callable[[Path], None]
) -> None:
    """Writes config, tokenizer (if given) and weights; each file aside first, then renamed when whole.

    Args:
        write_weights: writes the weights' file to a path.

    Raises:
        ValueError: the tokenizer is not one of this model's size.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    values: dict[str, Any] = {"model_type": _MODEL_TYPE, **config.to_dict()}
    if tokenizer is not None:
        if tokenizer.vocab_size != config.num_pieces:
            raise ValueError(
                f"save_pretrained: tokenizer must have the model's {config.num_pieces} pieces, "
                f"got {tokenizer.vocab_size}"
            )
        values["tokenizer_sha256"] = tokenizer.sha256
        with whole(folder / TOKENIZER) as aside:
            shutil.copyfile(tokenizer.path, aside)
    with whole(folder / WEIGHTS) as aside:
        write_weights(aside)
    with whole(folder / CONFIG) as aside:
        aside.write_text(json.dumps(values, indent=2) + "\n")


def sha256_of(folder: str | Path) -> str:
    """Of a folder's weights."""
    with open(existing(folder, WEIGHTS), "rb") as weights:
        return hashlib.file_digest(weights, "sha256").hexdigest()


def stored_config(folder: str | Path) -> SimVLMConfig:
    """The architecture of a folder's model.

    Raises:
        FileNotFoundError, ValueError: there is none, or it is broken; the fields at fault are named.
    """
    values = read_config(folder)
    values.pop("tokenizer_sha256", None)
    if values.pop("model_type", None) != _MODEL_TYPE:
        raise ValueError(f'from_pretrained: {CONFIG} in {folder} must say "model_type": "{_MODEL_TYPE}"')
    return SimVLMConfig.from_dict(values)


def check_config(folder: str | Path, own: SimVLMConfig) -> None:
    """
    Raises:
        ValueError: the folder's model is of another architecture; every difference is named.
    """
    stored = stored_config(folder).to_dict()
    different = "; ".join(f"{name} {value}" for name, value in own.to_dict().items() if value != stored[name])
    if different:
        raise ValueError(f"variant must be the model of {folder}, got another: {different}")


def read_config(folder: str | Path) -> dict[str, Any]:
    """`config.json` as it is."""
    path = existing(folder, CONFIG)
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"from_pretrained: {path} must be JSON, got {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"from_pretrained: {path} must hold an object, got {type(values).__name__}")
    return values


def existing(folder: str | Path, name: str) -> Path:
    """The path of a folder's file.

    Raises:
        FileNotFoundError: it is not there.
    """
    path = Path(folder) / name
    if not path.is_file():
        raise FileNotFoundError(f"from_pretrained: folder must hold {name}, got {folder} without it")
    return path


def check_tensors(own: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], source: str) -> None:
    """
    Args:
        own, found: the shape of each tensor by name, of the model and of a file.

    Raises:
        ValueError: they are not the same; every missing, unexpected and misshapen tensor is named.
    """
    wrong = [f"missing {name}" for name in own if name not in found]
    wrong += [f"unexpected {name}" for name in found if name not in own]
    wrong += [
        f"{name} of shape {list(shape)} instead of {list(own[name])}"
        for name, shape in found.items()
        if name in own and tuple(shape) != tuple(own[name])
    ]
    if wrong:
        raise ValueError(f"from_pretrained: {source} must hold exactly the model's tensors, got {'; '.join(wrong)}")
