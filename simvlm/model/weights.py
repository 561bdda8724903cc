"""A torch model in its folder (folder.py), and the way to another image size.

Resizing is bilinear with half-pixel centres, without antialiasing, in float32: the image positions as [Gh, Gw, D], each
relative table as [2Gh-1, 2Gw-1]. The same size gives the same bits.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from simvlm.model import folder as folders
from simvlm.model.config import SimVLMConfig
from simvlm.model.folder import METADATA, TOKENIZER, WEIGHTS, stored_config
from simvlm.model.torch_model import SimVLM

if TYPE_CHECKING:
    from simvlm.data.tokenizer import Tokenizer


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
    tokenizer = Tokenizer(folders.existing(folder, TOKENIZER))
    expected = folders.read_config(folder).get("tokenizer_sha256")
    if tokenizer.vocab_size != model.config.num_pieces:
        raise ValueError(
            f"load: {TOKENIZER} in {folder} must have the model's {model.config.num_pieces} pieces, "
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
            image = np.asarray(upright(image))
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            got = f"{image.dtype}{list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
            raise ValueError(f"preprocess: image must be a path, a PIL image or uint8[H, W, 3], got {got}")
        return resize(image, self.image_size)


def save_pretrained(model: SimVLM, folder: str | Path, tokenizer: Tokenizer | None = None) -> None:
    """Writes the model, and its tokenizer if given, into `folder`; each file aside first, then renamed when whole."""

    def write_weights(path: Path) -> None:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        safetensors.torch.save_file(tensors, path, metadata=METADATA)

    folders.write(folder, model.config, tokenizer, write_weights)


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
    weights = folders.existing(folder, WEIGHTS)
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


def load_tensors(model: SimVLM, tensors: dict[str, Tensor], source: str) -> None:
    """Copies the tensors into the model.

    Raises:
        ValueError: the tensors are not exactly the model's; every difference is named.
    """
    own = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    folders.check_tensors(own, {name: tuple(x.shape) for name, x in tensors.items()}, source)
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
