"""A model in one folder: `model.safetensors`, `config.json`, `tokenizer.model`; and the way to another image size.

Resizing is bilinear with half-pixel centres, without antialiasing, in float32: the image positions as [Gh, Gw, D], each
relative table as [2Gh-1, 2Gw-1]. The same size gives the same bits.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from simvlm.model.config import SimVLMConfig
from simvlm.model.torch_model import SimVLM

if TYPE_CHECKING:
    from simvlm.data.tokenizer import Tokenizer

WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.model"
_MODEL_TYPE = "simvlm"


def load(folder: str | Path, **options: Any) -> tuple[SimVLM, Preprocess, Tokenizer]:
    """(model, preprocess, tokenizer) of a folder that `save_pretrained` wrote; the model in eval mode.

    Args:
        folder: the folder.
        options: as for `from_pretrained`.

    Raises:
        FileNotFoundError, ValueError: a file is missing, broken, or does not fit the others; it is named.
    """
    from simvlm.data.tokenizer import Tokenizer

    model = from_pretrained(folder, **options)
    tokenizer = Tokenizer(_existing(folder, TOKENIZER))
    expected = _read_config(folder).get("tokenizer_sha256")
    if tokenizer.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"load: {TOKENIZER} in {folder} must have the model's {model.config.vocab_size} pieces, "
            f"got {tokenizer.vocab_size}"
        )
    if expected is not None and tokenizer.sha256 != expected:
        raise ValueError(f"load: {TOKENIZER} in {folder} must be the one the model was saved with, got another")
    return model, Preprocess(model.config.image_size), tokenizer


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """A picture as the model reads it, uint8[S, S, 3]: all of it, resized to the square (a crop could lose a side)."""

    image_size: int

    def __call__(self, image: Any) -> np.ndarray:
        """
        Args:
            image: a path, a PIL image, or uint8[H, W, 3].

        Raises:
            ValueError: the file is no image that can be read; it is named.
        """
        from PIL import Image

        from simvlm.data.shards import BrokenSample, decode
        from simvlm.data.transforms import resize, upright

        if isinstance(image, (str, os.PathLike)):
            try:
                return resize(decode(Path(image).read_bytes(), shard=str(image)), self.image_size)
            except BrokenSample as broken:
                why = f" ({broken.__cause__})" if broken.__cause__ else ""
                raise ValueError(f"preprocess: image must be a readable picture, got {image}{why}") from broken
        if isinstance(image, Image.Image):
            image = upright(image)
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            got = f"{image.dtype}{list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
            raise ValueError(f"preprocess: image must be a path, a PIL image or uint8[H, W, 3], got {got}")
        return resize(image, self.image_size)


def save_pretrained(model: SimVLM, folder: str | Path, tokenizer: Tokenizer | None = None) -> None:
    """Writes the model, and its tokenizer if given, into `folder`; each file aside first, then renamed when whole."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {"model_type": _MODEL_TYPE, **model.config.to_dict()}
    if tokenizer is not None:
        if tokenizer.vocab_size != model.config.vocab_size:
            raise ValueError(
                f"save_pretrained: tokenizer must have the model's {model.config.vocab_size} pieces, "
                f"got {tokenizer.vocab_size}"
            )
        config["tokenizer_sha256"] = tokenizer.sha256
        with _Aside(folder / TOKENIZER) as aside:
            shutil.copyfile(tokenizer.path, aside)
    with _Aside(folder / WEIGHTS) as aside:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        safetensors.torch.save_file(tensors, aside, metadata={"format": "pt"})
    with _Aside(folder / CONFIG) as aside:
        aside.write_text(json.dumps(config, indent=2) + "\n")


def from_pretrained(folder: str | Path, *, image_size: int | None = None, **options: Any) -> SimVLM:
    """The model that `save_pretrained` wrote, in eval mode.

    Args:
        folder: the folder.
        image_size: another side of the images: positions and tables are resized to its grid.
        options: `SimVLM`'s own (impl, dropout, stochastic_depth).

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is broken, or its tensors are not the model's; every missing, unexpected and misshapen one is
            named.
    """
    stored = stored_config(folder)
    config = stored if image_size is None else dataclasses.replace(stored, image_size=image_size)
    weights = _existing(folder, WEIGHTS)
    try:
        tensors = safetensors.torch.load_file(weights)
    except safetensors.SafetensorError as error:
        raise ValueError(f"from_pretrained: {weights} must be a whole safetensors file, got {error}") from error
    tensors = {name: _resized(name, tensor, stored, config) for name, tensor in tensors.items()}
    with torch.device("meta"):  # no time for an initialization that is overwritten
        model = SimVLM(config, **options)
    model.to_empty(device="cpu")
    model.conv.set_constants()
    load_tensors(model, tensors, str(weights))
    return model.eval()


def stored_config(folder: str | Path) -> SimVLMConfig:
    """The architecture of a folder's model.

    Raises:
        FileNotFoundError, ValueError: there is none, or it is broken; the fields at fault are named.
    """
    values = _read_config(folder)
    values.pop("tokenizer_sha256", None)
    if values.pop("model_type", None) != _MODEL_TYPE:
        raise ValueError(f'from_pretrained: {CONFIG} in {folder} must say "model_type": "{_MODEL_TYPE}"')
    return SimVLMConfig.from_dict(values)


def load_tensors(model: SimVLM, tensors: dict[str, Tensor], source: str) -> None:
    """Copies the tensors into the model.

    Raises:
        ValueError: the tensors are not exactly the model's; every difference is named.
    """
    own = model.state_dict()
    wrong = [f"missing {name}" for name in own if name not in tensors]
    wrong += [f"unexpected {name}" for name in tensors if name not in own]
    wrong += [
        f"{name} of shape {list(tensor.shape)} instead of {list(own[name].shape)}"
        for name, tensor in tensors.items()
        if name in own and tensor.shape != own[name].shape
    ]
    if wrong:
        raise ValueError(f"from_pretrained: {source} must hold exactly the model's tensors, got {'; '.join(wrong)}")
    model.load_state_dict(tensors)


def resize_positions(positions: Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """float[Gh·Gw, D] → float[Gh'·Gw', D]."""
    if grid == new_grid:
        return positions
    image = positions.T.unflatten(1, grid)
    return _bilinear(image, new_grid).flatten(1).T.contiguous()


def resize_table(table: Tensor, new_grid: tuple[int, int]) -> Tensor:
    """float[N, 2Gh-1, 2Gw-1] → float[N, 2Gh'-1, 2Gw'-1]."""
    sides = (2 * new_grid[0] - 1, 2 * new_grid[1] - 1)
    return table if tuple(table.shape[1:]) == sides else _bilinear(table, sides)


def _bilinear(x: Tensor, sides: tuple[int, int]) -> Tensor:
    resized = F.interpolate(x.float()[None], sides, mode="bilinear", align_corners=False, antialias=False)
    return resized[0].to(x.dtype)


def _resized(name: str, tensor: Tensor, stored: SimVLMConfig, config: SimVLMConfig) -> Tensor:
    if name == "image_positions" and tensor.shape == (stored.image_len, stored.width):
        return resize_positions(tensor, stored.image_grid, config.image_grid)
    height, breadth = stored.image_grid
    if name.endswith(".rel_bias") and tensor.shape == (stored.num_heads, 2 * height - 1, 2 * breadth - 1):
        return resize_table(tensor, config.image_grid)
    return tensor


def _read_config(folder: str | Path) -> dict[str, Any]:
    path = _existing(folder, CONFIG)
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"from_pretrained: {path} must be JSON, got {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"from_pretrained: {path} must hold an object, got {type(values).__name__}")
    return values


def _existing(folder: str | Path, name: str) -> Path:
    path = Path(folder) / name
    if not path.is_file():
        raise FileNotFoundError(f"from_pretrained: folder must hold {name}, got {folder} without it")
    return path


class _Aside:
    """A path to write to, which takes the target's place when all went well: an old file survives a full disk."""

    def __init__(self, target: Path) -> None:
        self.target, self.aside = target, target.with_name(target.name + ".part")

    def __enter__(self) -> Path:
        return self.aside

    def __exit__(self, kind: Any, *rest: Any) -> None:
        if kind is None:
            self.aside.replace(self.target)
        else:
            self.aside.unlink(missing_ok=True)
