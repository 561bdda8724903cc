"""The two stacks: pre-LayerNorm transformer layers over packed rows, attention by `prefix_attention`."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simvlm.kernels import PrefixLayout, prefix_attention
from simvlm.model.noise import Noise
from simvlm.model.remat import rematerialized

EPS = 1e-6
INIT_STD = 0.02
SITES = 4
"""Places per layer where something may be dropped: attention, cross-attention, MLP, branch."""

Memory = list[tuple[Tensor, Tensor]]
"""Keys and values of every layer, each [R, N, H]."""


class Linear(nn.Linear):
    """Weights N(0, std), bias 0."""

    def reset_parameters(self, std: float = INIT_STD) -> None:
        nn.init.normal_(self.weight, std=std)
        nn.init.zeros_(self.bias)


class Attention(nn.Module):
    """Self-attention with one projection for q, k and v, and a 2D relative table where `table_shape` is given."""

    def __init__(self, width: int, num_heads: int, table_shape: tuple[int, ...] | None, impl: str | None) -> None:
        super().__init__()
        self.num_heads, self.impl = num_heads, impl
        self.qkv, self.out = Linear(width, 3 * width), Linear(width, width)
        self.rel_bias = nn.Parameter(torch.empty(table_shape)) if table_shape else None

    def reset_parameters(self) -> None:
        if self.rel_bias is not None:
            nn.init.normal_(self.rel_bias, std=INIT_STD)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v, each [R, N, H]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        return q, k, v

    def forward(self, x: Tensor, layout: PrefixLayout, memory: Memory | None = None) -> Tensor:
        q, k, v = self.project(x)
        if memory is not None:
            memory.append((k, v))
        return self.out(prefix_attention(q, k, v, layout, rel_bias=self.rel_bias, impl=self.impl).flatten(-2))


class CrossAttention(nn.Module):
    """Attention of decoder rows over encoder rows."""

    def __init__(self, width: int, num_heads: int, impl: str | None) -> None:
        super().__init__()
        self.num_heads, self.impl = num_heads, impl
        self.q, self.kv, self.out = Linear(width, width), Linear(width, 2 * width), Linear(width, width)

    def project_query(self, x: Tensor) -> Tensor:
        return self.q(x).unflatten(-1, (self.num_heads, -1))

    def project_memory(self, states: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self.kv(states).unflatten(-1, (2, self.num_heads, -1)).unbind(-3)
        return k, v

    def forward(self, x: Tensor, states: Tensor, layout: PrefixLayout) -> Tensor:
        k, v = self.project_memory(states)
        return self.out(prefix_attention(self.project_query(x), k, v, layout, impl=self.impl).flatten(-2))


class MLP(nn.Module):
    def __init__(self, width: int, mlp_dim: int) -> None:
        super().__init__()
        self.up, self.down = Linear(width, mlp_dim), Linear(mlp_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Layer(nn.Module):
    """x + attention(norm(x)), then + cross(norm(x)) in a decoder that has an encoder, then + mlp(norm(x))."""

    def __init__(
        self,
        width: int,
        mlp_dim: int,
        num_heads: int,
        *,
        table_shape: tuple[int, ...] | None,
        cross: bool,
        impl: str | None,
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, EPS)
        self.attention = Attention(width, num_heads, table_shape, impl)
        self.cross_norm = nn.LayerNorm(width, EPS) if cross else None
        self.cross = CrossAttention(width, num_heads, impl) if cross else None
        self.mlp_norm = nn.LayerNorm(width, EPS)
        self.mlp = MLP(width, mlp_dim)
        self.remat = "none"

    def forward(
        self,
        x: Tensor,
        layout: PrefixLayout,
        *,
        states: Tensor | None = None,
        cross_layout: PrefixLayout | None = None,
        memory: Memory | None = None,
        noise: Noise | None = None,
        site: int = 0,
    ) -> Tensor:
        return rematerialized(self.remat, self._forward, x, layout, states, cross_layout, memory, noise, site)

    def _forward(
        self,
        x: Tensor,
        layout: PrefixLayout,
        states: Tensor | None,
        cross_layout: PrefixLayout | None,
        memory: Memory | None,
        noise: Noise | None,
        site: int,
    ) -> Tensor:
        def branch(y: Tensor, place: int) -> Tensor:
            return y if noise is None else noise.branch(noise.dropout(y, site + place), site + SITES - 1)

        x = x + branch(self.attention(self.attention_norm(x), layout, memory), 0)
        if self.cross is not None and self.cross_norm is not None:
            assert states is not None
            assert cross_layout is not None
            x = x + branch(self.cross(self.cross_norm(x), states, cross_layout), 1)
        return x + branch(self.mlp(self.mlp_norm(x)), 2)


class Stack(nn.Module):
    """Layers and the final LayerNorm."""

    def __init__(
        self,
        depth: int,
        width: int,
        mlp_dim: int,
        num_heads: int,
        *,
        table_shape: tuple[int, ...] | None,
        cross: bool,
        impl: str | None,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            Layer(width, mlp_dim, num_heads, table_shape=table_shape, cross=cross, impl=impl) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, EPS)

    def each_layer(self) -> list[Layer]:
        return [cast(Layer, layer) for layer in self.layers]

    def cross_memory(self, states: Tensor) -> Memory:
        """Keys and values of the encoder's states, for every layer of a decoder."""
        return [layer.cross.project_memory(states) for layer in self.each_layer() if layer.cross is not None]

    def forward(
        self,
        x: Tensor,
        layout: PrefixLayout,
        *,
        states: Tensor | None = None,
        cross_layout: PrefixLayout | None = None,
        memory: Memory | None = None,
        noise: Noise | None = None,
    ) -> Tensor:
        """Final states of every row; `memory` collects the self-attention's keys and values, layer by layer."""
        if noise is not None:
            x = noise.dropout(x, 0)
        for i, layer in enumerate(self.each_layer()):
            x = layer(
                x,
                layout,
                states=states,
                cross_layout=cross_layout,
                memory=memory,
                noise=noise,
                site=1 + SITES * i,
            )
        return self.norm(x)
