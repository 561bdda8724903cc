"""SimVLM in JAX (flax.nnx): the network of torch_model.py, the same parameters, the same files.

    inputs = jax.tree.map(jnp.asarray, units.stacked([batch], config, capacity))
    model = SimVLM(VARIANTS["base"], rngs=nnx.Rngs(0))
    hidden = model(inputs)                                    # float32[U, Rd, D]

Arrays have a leading axis of units (units.py); how the model runs, on which kernels and which mesh, is an `Execution`.
No dropout and no stochastic depth: this is pretraining's and inference's model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from simvlm.kernels import PrefixLayout, embed_sequence
from simvlm.model.batch import Inputs
from simvlm.model.config import SimVLMConfig
from simvlm.model.jax_resnet import ConvStage
from simvlm.model.jax_transformer import INIT_STD, UNITS, Array, Execution, Linear, Stack, per_unit, precision

if TYPE_CHECKING:
    from simvlm.model.search import Generated

jax.tree_util.register_dataclass(Inputs, [field.name for field in dataclasses.fields(Inputs)], [])

PLAIN = Execution()
"""float32, one device, the best kernels, nothing computed again."""


class SimVLM(nnx.Module):
    """The model of one config.

    Args:
        config: the architecture.
        rngs: of the initial weights; `nnx.eval_shape` makes a model without any.
    """

    def __init__(self, config: SimVLMConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        width = config.width
        height, breadth = config.image_grid
        table_shape = (config.num_heads, 2 * height - 1, 2 * breadth - 1)

        def table(*shape: int) -> nnx.Param:
            return nnx.Param(INIT_STD * jax.random.normal(rngs.params(), shape))

        self.conv = ConvStage(config, rngs)
        options: dict[str, Any] = {"std": config.init_std, "rngs": rngs}
        self.projection = Linear((width,), (config.patch_channels,), **options) if config.has_projection else None
        self.embedding = table(config.vocab_size, width)
        self.image_positions = table(config.image_len, width)
        self.text_positions = table(config.max_text_len, width)
        has_encoder = config.encoder_depth > 0
        sizes: tuple[int, int, int] = (width, config.mlp_dim, config.num_heads)

        def stack(depth: int, table_shape: tuple[int, ...] | None, cross: bool) -> Stack:
            return Stack(depth, *sizes, table_shape=table_shape, cross=cross, **options)

        self.encoder = stack(config.encoder_depth, table_shape, False) if has_encoder else None
        self.decoder = stack(config.decoder_depth, None if has_encoder else table_shape, has_encoder)

    def __call__(self, inputs: Inputs, execution: Execution = PLAIN, *, train: bool = False) -> Array:
        """Final decoder states, float32[U, Rd, D].

        Args:
            inputs: of `units.stacked`, as jax arrays.
            execution: how to run.
            train: BatchNorm takes the batch's statistics, and moves its running ones.
        """
        states = self.encode(inputs, execution, train=train)
        if self.encoder is None:
            return jnp.take_along_axis(states, inputs.suffix_rows[..., None], 1)
        return self.decode(states, inputs, execution)

    def encode(self, inputs: Inputs, execution: Execution = PLAIN, *, train: bool = False) -> Array:
        """Final encoder states, float32[U, R, D]; of a decoder-only model those of its only stack, suffix included."""
        rows = self.embed(inputs, execution, train=train)
        stack = self.decoder if self.encoder is None else self.encoder
        return stack(rows, inputs.layout, execution)

    def decode(self, states: Array, inputs: Inputs, execution: Execution = PLAIN) -> Array:
        """Final decoder states of an encoder-decoder, float32[U, Rd, D], from `encode`'s."""
        assert inputs.decoder_layout is not None, "a decoder-only model decodes in `__call__`"
        rows = execution.on_units(self.embed_text(inputs.decoder_inputs, inputs.decoder_positions))
        return self.decoder(rows, inputs.decoder_layout, execution, states, inputs.cross_layout)

    def embed_text(self, tokens: Array, positions: Array) -> Array:
        """float32[…, D]: embedding and position of each token."""
        return self.embedding[...][tokens] + self.text_positions[...][positions]

    def logits(self, hidden: Array, execution: Execution = PLAIN) -> Array:
        """float32[…, V]: the states against the embedding; tied, no bias."""
        return tied_logits(hidden, self.embedding[...], execution.dtype)

    def generate(
        self,
        images: Any,
        prompts: Sequence[Sequence[int]] | None = None,
        *,
        beam: int = 1,
        max_len: int = 30,
        begin: Sequence[int] = (),
        execution: Execution = PLAIN,
    ) -> list[Generated]:
        """What the model writes after each image and prompt; see `simvlm.model.jax_generate.generate`."""
        from simvlm.model.jax_generate import generate

        return generate(self, images, prompts, beam=beam, max_len=max_len, begin=begin, execution=execution)

    def save_pretrained(self, folder: str | Path, tokenizer: Any = None) -> None:
        """Weights, config and tokenizer into one folder; see `simvlm.model.jax_weights.save_pretrained`."""
        from simvlm.model.jax_weights import save_pretrained

        save_pretrained(self, folder, tokenizer)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, image_size: int | None = None) -> SimVLM:
        """The model of a folder, whichever framework wrote it; see `simvlm.model.jax_weights.from_pretrained`."""
        from simvlm.model.jax_weights import from_pretrained

        return from_pretrained(folder, image_size=image_size)

    def embed(self, inputs: Inputs, execution: Execution = PLAIN, *, train: bool = False) -> Array:
        """The first rows, float32[U, R, D]: patches, projected, and text, each with its position."""
        dtype = execution.dtype
        features = self.conv(inputs.images, execution, train).astype(dtype)
        text = self.embed_text(inputs.text, inputs.text_positions).astype(dtype)
        weight, bias = (
            (None, None) if self.projection is None else (self.projection.weight[...], self.projection.bias[...])
        )
        layout, impl = inputs.layout, execution.impl_of("embed_sequence")

        def one(features: Array, positions: Array, text: Array, bounds: Array, *projection: Array) -> Array:
            own: PrefixLayout = dataclasses.replace(layout, bounds=bounds)
            weight, bias = projection or (None, None)
            return embed_sequence(features, weight, bias, positions, text, own, impl=impl)

        # Each device of the tensor axis makes its columns of the rows.
        of_features = P(UNITS, None, None, None, "tensor" if weight is None else None)
        columns = P(UNITS, None, "tensor")
        specs: list[Any] = [of_features, P(None, "tensor"), columns, P(UNITS, None, None)]
        arrays = [features, self.image_positions[...], text, layout.bounds]
        if weight is not None:
            specs += [P("tensor", None), P("tensor")]
            arrays += [weight, bias]
        rows = per_unit(execution, one, tuple(specs), columns, *arrays)
        return execution.on_units(rows.astype(jnp.float32))


def tied_logits(hidden: Array, embedding: Array, dtype: Any) -> Array:
    """float32[…, V]."""
    return jnp.einsum(
        "...d,vd->...v",
        hidden.astype(dtype),
        embedding.astype(dtype),
        precision=precision(dtype),
        preferred_element_type=jnp.float32,
    )
