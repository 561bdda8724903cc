"""A JAX model in the same folder (folder.py) as torch's: names and shapes are the canonical ones there.

In memory the layers of a stack, and the equal blocks of a stage, are stacked, and heads have an axis of their own; both
are views of the canonical arrays: nothing is transposed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

from simvlm.model import folder as folders
from simvlm.model.config import SimVLMConfig
from simvlm.model.folder import METADATA, WEIGHTS, stored_config
from simvlm.model.jax_model import SimVLM

if TYPE_CHECKING:
    from simvlm.data.tokenizer import Tokenizer

_ROWS_OF_HEADS = ("qkv.weight", "kv.weight", "q.weight")
_COLUMNS_OF_HEADS = ("attention.out.weight", "cross.out.weight")
_VECTORS_OF_HEADS = ("qkv.bias", "kv.bias", "q.bias")


def abstract(config: SimVLMConfig) -> SimVLM:
    """The model of a config with shapes in place of arrays."""
    return nnx.eval_shape(lambda: SimVLM(config, rngs=nnx.Rngs(0)))


def canonical(state: Any) -> dict[str, Any]:
    """Canonical names and arrays of a model's state, or of anything of its structure (gradients, moments), in numpy."""
    return {name: value[index].reshape(shape) for name, value, index, shape in _entries(state)}


def canonical_shapes(state: Any) -> dict[str, tuple[int, ...]]:
    """Canonical names and shapes; of shapes alone, too."""
    return {name: shape for name, _, _, shape in _entries(state)}


def from_canonical(state: Any, tensors: dict[str, np.ndarray]) -> Any:
    """`state`'s structure with the values of canonical arrays, in numpy, each in its own shape and float32."""
    flat = nnx.to_flat_state(state)
    values = []
    for path, variable in flat:
        shape = variable.shape
        names = [name for name, _ in _names(path, shape)]
        joined = np.concatenate([np.asarray(tensors[name], np.float32).ravel() for name in names])
        values.append((path, variable.replace(joined.reshape(shape))))
    return nnx.from_flat_state(values)


def save_pretrained(model: SimVLM, folder: str | Path, tokenizer: Tokenizer | None = None) -> None:
    """Writes the model, and its tokenizer if given, into `folder`; each file aside first, then renamed when whole."""

    def write_weights(path: Path) -> None:
        state = jax.device_get(nnx.state(model, (nnx.Param, nnx.BatchStat)))
        tensors = {name: np.ascontiguousarray(x) for name, x in canonical(state).items()}
        safetensors.numpy.save_file(tensors, path, metadata=METADATA)

    folders.write(folder, model.config, tokenizer, write_weights)


def from_pretrained(folder: str | Path, *, image_size: int | None = None) -> SimVLM:
    """The model of a folder that either framework wrote.

    Args:
        folder: the folder.
        image_size: another side of the images: positions and tables are resized to its grid.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is broken, or its tensors are not the model's; every missing, unexpected and misshapen one is
            named.
    """
    stored = stored_config(folder)
    config = stored if image_size is None else dataclasses.replace(stored, image_size=image_size)
    weights = folders.existing(folder, WEIGHTS)
    try:
        tensors = safetensors.numpy.load_file(weights)
    except safetensors.SafetensorError as error:
        raise ValueError(f"from_pretrained: {weights} must be a whole safetensors file, got {error}") from error
    tensors = {name: _resized(name, x, stored, config) for name, x in tensors.items()}
    model = abstract(config)
    load_tensors(model, tensors, str(weights))
    return model


def load_tensors(model: SimVLM, tensors: dict[str, np.ndarray], source: str) -> None:
    """Gives the model the values of canonical arrays.

    Raises:
        ValueError: they are not exactly the model's; every difference is named.
    """
    state = nnx.state(model, (nnx.Param, nnx.BatchStat))
    folders.check_tensors(canonical_shapes(state), {name: x.shape for name, x in tensors.items()}, source)
    nnx.update(model, jax.tree.map(jnp.asarray, from_canonical(state, tensors)))


def _entries(state: Any) -> Iterator[tuple[str, Any, Any, tuple[int, ...]]]:
    """(canonical name, stacked value, index in its stack or (), canonical shape) of every tensor."""
    for path, variable in nnx.to_flat_state(state):
        value = variable.get_value() if hasattr(variable, "get_value") else variable
        for name, index in _names(path, value.shape):
            yield name, value, index, _canonical_shape(name, value.shape[len(index) :])


def _names(path: tuple[Any, ...], shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """Canonical names with their index along the leading axis; one name and () where nothing is stacked."""
    parts = [str(part) for part in path]
    if "layers" in parts:
        at = parts.index("layers") + 1
        return [(".".join([*parts[:at], str(i), *parts[at:]]), (i,)) for i in range(shape[0])]
    if "first" in parts:
        return [(".".join("0" if part == "first" else part for part in parts), ())]
    if "rest" in parts:
        at = parts.index("rest")
        return [(".".join([*parts[:at], str(i + 1), *parts[at + 1 :]]), (i,)) for i in range(shape[0])]
    return [(".".join(parts), ())]


def _canonical_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if name.endswith(_ROWS_OF_HEADS):
        return int(np.prod(shape[:-1])), shape[-1]
    if name.endswith(_COLUMNS_OF_HEADS):
        return shape[0], int(np.prod(shape[1:]))
    return (int(np.prod(shape)),) if name.endswith(_VECTORS_OF_HEADS) else shape


def _resized(name: str, x: np.ndarray, stored: SimVLMConfig, config: SimVLMConfig) -> np.ndarray:
    """As weights.py resizes: bilinear, half-pixel centres, no antialias, float32; the same grid is the same bits."""
    if stored.image_grid == config.image_grid:
        return x
    (height, breadth), (new_height, new_breadth) = stored.image_grid, config.image_grid
    if name == "image_positions" and x.shape == (stored.image_len, stored.width):
        image = x.reshape(height, breadth, -1)
        return _bilinear(image, (new_height, new_breadth, stored.width)).reshape(config.image_len, -1)
    table = (stored.num_heads, 2 * height - 1, 2 * breadth - 1)
    if name.endswith(".rel_bias") and x.shape == table:
        return _bilinear(x, (stored.num_heads, 2 * new_height - 1, 2 * new_breadth - 1))
    return x


def _bilinear(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.asarray(jax.image.resize(jnp.asarray(x, jnp.float32), shape, "bilinear", antialias=False)).astype(x.dtype)
