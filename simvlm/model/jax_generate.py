"""Writing and judging texts in JAX: the searches of search.py over a model of jax_model.py.

One token at a time for many hypotheses, as decoding.py does it: each has a cache of its own, the prefix of an item is
there once. A step is one compiled program for all steps of a decoding.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from simvlm.kernels import PrefixLayout, prefix_attention
from simvlm.model import search, units
from simvlm.model.items import BOS, PAD, Images, batch_of, check_begin
from simvlm.model.jax_model import PLAIN, SimVLM
from simvlm.model.jax_transformer import Array, Execution, Layer
from simvlm.model.search import Generated

Memory = tuple[Array, Array]
"""Keys and values of every layer, each [L, R, N, H]."""


def generate(
    model: SimVLM,
    images: Images,
    prompts: Sequence[Sequence[int]] | None = None,
    *,
    beam: int = 1,
    max_len: int = 30,
    begin: Sequence[int] = (),
    execution: Execution = PLAIN,
) -> list[Generated]:
    """The text that the model writes after each image and prompt, on one device.

    Args:
        model: any SimVLM.
        images: uint8[n, S, S, 3], or n of uint8[S, S, 3] and None, or None for prompts alone.
        prompts: n prefixes as token ids; None: none. An item without an image needs one.
        beam: K; 1 is greedy.
        max_len: tokens at the most, the end included.
        begin: token ids that every text begins with.
        execution: without a mesh.

    Raises:
        ValueError: an argument is not what is written here.
    """
    config = model.config
    for name, value in (("beam", beam), ("max_len", max_len)):
        if value < 1:
            raise ValueError(f"generate: {name} must be at least 1, got {value}")
    check_begin(begin, max_len, config)
    if 2 * beam > config.num_pieces:
        raise ValueError(f"generate: beam must be at most half the vocabulary, {config.num_pieces}, got {beam}")
    batch = batch_of("generate", config, images, prompts, None)
    count = len(batch.has_image)
    if not count:
        return []
    inputs = batch.inputs(config)
    continues = config.arch == "decoder_only" or config.decoder_positions == "continue"
    first = np.repeat(batch.encoder_text_lens * continues, beam)
    if first.max(initial=0) + max_len > config.max_text_len:
        raise ValueError(
            f"generate: max_len must be at most {config.max_text_len - first.max(initial=0)}, what the model's "
            f"max_text_len {config.max_text_len} leaves after the longest prompt, got {max_len}"
        )
    lens, starts = (np.repeat(x, beam) for x in (inputs.layout.q_lens, inputs.layout.q_starts))
    prefix_layout = PrefixLayout.packed(np.ones_like(lens), lens, k_starts=starts, cross=True)
    definition, state = nnx.split(model)
    joined = units.stacked([batch], config, units.Capacity.of([batch], 1))
    prefix = _prefix_memory(definition, execution, state, jax.tree.map(jnp.asarray, joined))
    heads = (config.num_heads, config.head_dim)
    shape = (config.decoder_depth, count * beam, max_len, *heads)
    cache = jnp.zeros(shape, execution.dtype), jnp.zeros(shape, execution.dtype)
    step = functools.partial(_step, definition, execution, beam)

    def best(tokens: list[int], time: int, parents: list[int] | None, scores: list[float]) -> search.Continuations:
        nonlocal cache
        chosen = np.arange(count * beam) if parents is None else np.array(parents)
        given = (np.array(tokens), np.int32(time), chosen, np.array(scores, np.float32))
        cache, values, ids = step(state, cache, prefix, prefix_layout, first, *given)
        return np.asarray(values), *divmod(np.asarray(ids), config.num_pieces)

    return search.beam_search(best, count, beam, max_len, begin)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _prefix_memory(definition: Any, execution: Execution, state: Any, inputs: Any) -> Memory:
    """What a suffix looks at: cross-attention's keys and values, or the only stack's own; of one unit."""
    model = nnx.merge(definition, state)
    if model.encoder is None:
        keys, values = model.decoder.memory(model.embed(inputs, execution), inputs.layout, execution)
        return keys[:, 0], values[:, 0]
    states = model.encode(inputs, execution)
    layers, stacked = nnx.split(model.decoder.layers)

    def project(_: None, own: Any) -> tuple[None, Array]:
        return None, nnx.merge(layers, own).cross.kv(states, execution.dtype)[0]

    _, kv = jax.lax.scan(project, None, stacked)
    return kv[:, :, 0], kv[:, :, 1]


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _step(
    definition: Any,
    execution: Execution,
    beam: int,
    state: Any,
    cache: Memory,
    prefix: Memory,
    prefix_layout: PrefixLayout,
    first: Array,
    tokens: Array,
    time: Array,
    parents: Array,
    scores: Array,
) -> tuple[Memory, Array, Array]:
    """(cache, Σ ln p [n, 2K], ids [n, 2K]) of the best continuations of every item."""
    model = nnx.merge(definition, state)
    count, max_len = cache[0].shape[1:3]
    own = PrefixLayout.padded(count, 1, max_len, k_lens=time + 1, prefix_lens=0, q_offsets=time)
    layers, stacked = nnx.split(model.decoder.layers)

    def layer(x: Array, given: Any) -> tuple[Array, Memory]:
        parameters, (keys, values), memory = given
        of_layer = keys[parents], values[parents]
        return _layer(nnx.merge(layers, parameters), execution, x, time, own, of_layer, memory, prefix_layout)

    x = model.embed_text(tokens, first + time)
    x, cache = jax.lax.scan(layer, x, (stacked, cache, prefix))
    log_p = jax.nn.log_softmax(model.logits(model.decoder.norm(x), execution))[:, : model.config.num_pieces]
    log_p = log_p.at[:, jnp.array([PAD, BOS])].set(-jnp.inf)  # pad and BOS, which are never targets
    totals = (scores[:, None] + log_p).reshape(-1, beam * log_p.shape[1])
    return cache, *jax.lax.top_k(totals, 2 * beam)  # of equals the lowest id first, as documented


def _layer(
    layer: Layer,
    execution: Execution,
    x: Array,
    time: Array,
    own: PrefixLayout,
    cache: Memory,
    prefix: Memory,
    prefix_layout: PrefixLayout,
) -> tuple[Array, Memory]:
    dtype, impl = execution.dtype, execution.impl_of("prefix_attention")
    qkv = layer.attention.qkv(layer.attention_norm(x), dtype)
    q, *new = (qkv[:, part] for part in range(3))
    keys, values = (
        jax.lax.dynamic_update_slice_in_dim(old, x[:, None], time, 1) for old, x in zip(cache, new, strict=True)
    )
    out, lse = prefix_attention(q[:, None], keys, values, own, return_lse=True, impl=impl)
    out, lse = out[:, 0], lse[:, 0]
    if layer.cross is None:
        seen, seen_lse = prefix_attention(q, *prefix, prefix_layout, return_lse=True, impl=impl)
        share = jax.nn.sigmoid(lse - seen_lse)[..., None]
        out = (share * out + (1 - share) * seen).astype(dtype)
    x = x + layer.attention.out(out, dtype)
    if layer.cross is not None and layer.cross_norm is not None:
        q = layer.cross.q(layer.cross_norm(x), dtype)
        x = x + layer.cross.out(prefix_attention(q, *prefix, prefix_layout, impl=impl), dtype)
    return x + layer.mlp(layer.mlp_norm(x), execution), (keys, values)
