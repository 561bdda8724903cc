"""One training step of PrefixLM in JAX, as a pure function over a mesh, and where every array of it lives.

The mesh has three axes: "data" and "fsdp" spread the units (units.py), "tensor" spreads each unit's heads, hidden width
and pictures. Parameters and AdamW's moments are float32, cut over "fsdp" and "tensor", whole over "data". The
compiler puts all reductions in.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from simvlm.model.batch import IGNORED, SOURCES, Inputs
from simvlm.model.config import SimVLMConfig
from simvlm.model.jax_model import tied_logits
from simvlm.model.jax_transformer import UNITS, Array, Execution
from simvlm.model.jax_weights import abstract
from simvlm.train.settings import OptimizerSettings

_CHUNK_ROWS = 4096
# Axis from the end, the depth of a stack aside, that "tensor" cuts and that "fsdp" cuts.
_CUTS = {
    "qkv.weight": (-3, -1),
    "kv.weight": (-3, -1),
    "q.weight": (-3, -1),
    "qkv.bias": (-2, None),
    "kv.bias": (-2, None),
    "q.bias": (-2, None),
    "attention.out.weight": (-2, -3),
    "cross.out.weight": (-2, -3),
    "up.weight": (-2, -1),
    "up.bias": (-1, None),
    "down.weight": (-1, -2),
    "rel_bias": (-3, None),
    "projection.weight": (None, -1),
    "embedding": (-2, -1),
}
_CONVOLUTION = (None, -4)


@dataclasses.dataclass(frozen=True)
class Sums:
    """What a step hands back, float32: nll[2] by source, the gradients' norm, and every row's nll[A, U, Rd]."""

    nll: Array
    grad_norm: Array
    row_nll: Array


jax.tree_util.register_dataclass(Sums, ["nll", "grad_norm", "row_nll"], [])


class TrainStep:
    """The step of one model on one mesh; holds no array.

    Args:
        config: of the model.
        execution: how it runs; has a mesh.
        optimizer: AdamW's settings.
        loss_weights: of a token of each source.
    """

    def __init__(
        self,
        config: SimVLMConfig,
        execution: Execution,
        optimizer: OptimizerSettings,
        loss_weights: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        assert execution.mesh is not None
        self.config, self.execution, self.mesh = config, execution, execution.mesh
        parts: tuple[Any, ...] = nnx.split(abstract(config), nnx.Param, nnx.BatchStat)
        self.definition, params, statistics = parts
        self.loss_weights, self.max_grad_norm = loss_weights, optimizer.max_grad_norm
        decays = nnx.map_state(lambda path, _: _decays(path), params)
        self.optimizer = optax.chain(
            optax.scale_by_adam(b1=optimizer.beta1, b2=optimizer.beta2, eps=1e-8),
            optax.add_decayed_weights(optimizer.weight_decay, mask=decays),
        )
        self.abstract_state = {
            "params": params,
            "statistics": statistics,
            "optimizer": jax.eval_shape(self.optimizer.init, params),
        }
        whole = NamedSharding(self.mesh, P())
        cut = nnx.map_state(lambda path, x: x.replace(NamedSharding(self.mesh, cuts(path, x.shape, self.mesh))), params)
        self.shardings = {
            "params": cut,
            "statistics": jax.tree.map(lambda _: whole, statistics),
            "optimizer": optax.tree.map_params(
                self.optimizer,
                lambda _, own: own,
                self.abstract_state["optimizer"],
                cut,
                transform_non_params=lambda _: whole,
            ),
        }
        self.of_inputs = NamedSharding(self.mesh, P(None, UNITS))
        """Of the inputs' arrays, [A, U, …]: A micro-batches, whose gradients are added up."""
        self.jitted = jax.jit(
            self._step,
            donate_argnums=0,
            in_shardings=(self.shardings, self.of_inputs, whole, whole),
            out_shardings=(self.shardings, whole),
        )

    def initial(self, seed: int) -> Any:
        """The state before the first step, made where it lives."""
        from simvlm.model.jax_model import SimVLM

        def made() -> Any:
            model = SimVLM(self.config, rngs=nnx.Rngs(seed))
            params, statistics = nnx.state(model, nnx.Param), nnx.state(model, nnx.BatchStat)
            return {"params": params, "statistics": statistics, "optimizer": self.optimizer.init(params)}

        return jax.jit(made, out_shardings=self.shardings)()

    def _step(self, state: Any, inputs: Inputs, lr: Array, denominator: Array) -> tuple[Any, Sums]:
        """(next state, sums); where the loss or the gradient is not finite the next state is the one before."""
        params, statistics = state["params"], state["statistics"]

        def micro(carry: Any, inputs: Inputs) -> tuple[Any, Any]:
            statistics, gradients = carry
            of_loss = jax.value_and_grad(self._loss, has_aux=True)
            (_, (nll, rows, statistics)), more = of_loss(params, statistics, inputs, denominator)
            return (statistics, jax.tree.map(jnp.add, gradients, more)), (nll, rows)

        zeros = jax.tree.map(jnp.zeros_like, params)
        count = inputs.images.shape[0]
        if count == 1:
            (new_statistics, gradients), (nll, rows) = micro((statistics, zeros), jax.tree.map(lambda x: x[0], inputs))
            rows = rows[None]
        else:
            (new_statistics, gradients), (nll, rows) = jax.lax.scan(micro, (statistics, zeros), inputs)
            nll = nll.sum(0)
        norm = optax.global_norm(gradients)
        if self.max_grad_norm is not None:  # as torch clips
            scale = jnp.minimum(1.0, self.max_grad_norm / (norm + 1e-6))
            gradients = jax.tree.map(lambda x: x * scale, gradients)
        updates, optimizer = self.optimizer.update(gradients, state["optimizer"], params)
        new = {
            "params": jax.tree.map(lambda p, u: p - lr * u, params, updates),
            "statistics": new_statistics,
            "optimizer": optimizer,
        }
        finite = jnp.isfinite(nll).all() & jnp.isfinite(norm)
        new = jax.tree.map(lambda x, before: jnp.where(finite, x, before), new, state)
        return new, Sums(nll, norm, rows)

    def _loss(self, params: Any, statistics: Any, inputs: Inputs, denominator: Array) -> tuple[Array, Any]:
        model = nnx.merge(self.definition, params, statistics, copy=True)
        hidden = model(inputs, self.execution, train=True)
        rows = suffix_nll(hidden, model.embedding[...], inputs.targets, self.execution)
        of_source = [jnp.where(inputs.sources == source, rows, 0.0).sum() for source in range(len(SOURCES))]
        loss = sum(w * x for w, x in zip(self.loss_weights, of_source, strict=True)) / denominator
        return loss, (jnp.stack(of_source), rows, nnx.state(model, nnx.BatchStat))


def suffix_nll(hidden: Array, embedding: Array, targets: Array, execution: Execution) -> Array:
    """-ln P of every target, float32[U, R]; 0 where there is none. Logits of 4,096 rows of a unit exist at once.

    Args:
        hidden: float[U, R, D], the decoder's final states.
        embedding: float[V, D].
        targets: int[U, R], -100 where a row has no loss.
    """
    units, rows, _ = hidden.shape
    if rows <= _CHUNK_ROWS:
        return _nll(hidden, embedding, targets, execution)
    more = -rows % _CHUNK_ROWS
    hidden = jnp.pad(hidden, ((0, 0), (0, more), (0, 0))).reshape(units, -1, _CHUNK_ROWS, hidden.shape[-1])
    targets = jnp.pad(targets, ((0, 0), (0, more)), constant_values=IGNORED).reshape(units, -1, _CHUNK_ROWS)
    chunk = jax.checkpoint(lambda part: _nll(part[0], embedding, part[1], execution))
    return (
        jax.lax.map(chunk, (hidden.swapaxes(0, 1), targets.swapaxes(0, 1))).swapaxes(0, 1).reshape(units, -1)[:, :rows]
    )


def _nll(hidden: Array, embedding: Array, targets: Array, execution: Execution) -> Array:
    logits = tied_logits(hidden, embedding, execution.dtype)
    # By comparing, not by a gather: the vocabulary may lie on several devices.
    chosen = jnp.arange(logits.shape[-1]) == targets[..., None]
    nll = jax.nn.logsumexp(logits, -1) - jnp.where(chosen, logits, 0.0).sum(-1)
    return jnp.where(targets == IGNORED, 0.0, nll)


def cuts(path: tuple[Any, ...], shape: tuple[int, ...], mesh: Mesh) -> P:
    """How a parameter is cut over the mesh; an axis that does not divide stays whole."""
    name = ".".join(map(str, path))
    tensor, fsdp = next((cut for end, cut in _CUTS.items() if name.endswith(end)), (None, None))
    if name.startswith("conv.") and name.endswith("weight") and len(shape) >= 4:
        tensor, fsdp = _CONVOLUTION
    spec: list[Any] = [None] * len(shape)
    for axis, of_mesh in ((tensor, "tensor"), (fsdp, "fsdp")):
        if axis is not None and shape[axis] % mesh.shape[of_mesh] == 0:
            spec[axis] = of_mesh
    return P(*spec)


def _decays(path: tuple[Any, ...]) -> bool:
    """Only the weights of products and convolutions, and the embedding; see optim.py."""
    name, holder = str(path[-1]), str(path[-2]) if len(path) > 1 else ""
    return name == "embedding" or (name == "weight" and "norm" not in holder)
