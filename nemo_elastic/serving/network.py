"""One budget of a family, ready to run: its layers over the parent's weights.

Projections and embeddings are views (`linear.py`) or, `compact`, copies; vectors and the convolution (under one
percent of a model) are cut by `slicing.take`, which copies where a child leaves something out in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..architecture import ATTENTION, MAMBA
from ..layout import ParamLayout, ParamSpec
from ..slicing import take
from ..space import Subnet
from .layers import MLP, Attention, Layer, LayerCache, Mamba, rms_norm
from .linear import Linear, linear

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "squared_relu": lambda x: F.relu(x).square(),
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
}


class Network:
    """A child: `logits(tokens, caches)`.

    Args:
        weights: the parent's whole tensors by canonical name, on the device and in the dtype to run in.
        model: the parent's model section (`layernorm_epsilon`, `activation_func`, `softmax_scale` are read).
        compact: copy the kept parts of the projections instead of viewing them.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        layout: ParamLayout,
        subnet: Subnet,
        model: Mapping[str, Any],
        *,
        compact: bool,
    ) -> None:
        self._weights, self._layout, self._compact = weights, layout, compact
        self.subnet, self.eps = subnet, float(model.get("layernorm_epsilon", 1e-5))
        self._scale = model.get("softmax_scale")
        self._activation = ACTIVATIONS[model.get("activation_func", "squared_relu")]
        outer = layout.sizes(subnet, None)
        table = layout.table
        self.embedding = self._matrix("embedding.word_embeddings.weight", outer)
        self.final_norm = self._vector(table["decoder.final_norm.weight"], outer)
        self.output = self.embedding if layout.architecture.share_embeddings_and_output_weights else None
        if self.output is None:
            self.output = self._matrix("output_layer.weight", outer)
        self.layers: list[Layer] = [self._layer(i) for i in subnet.layers]

    def new_caches(self, batch: int, room: int = 0, position: Tensor | None = None) -> list[LayerCache]:
        """Empty ones for every layer, with room for so many tokens; with the `position` of a step, that never grow."""
        return [layer.cache(batch, room, position) for layer in self.layers]

    def logits(self, tokens: Tensor, caches: list[LayerCache] | None = None, *, last_only: bool = False) -> Tensor:
        """Tokens `[b, s]` -> `[b, s, v]` (`[b, 1, v]` with `last_only`); `caches` are brought up to date."""
        x = F.embedding(tokens, self.embedding)
        for number, layer in enumerate(self.layers):
            x = layer(x, None if caches is None else caches[number])
        if last_only:
            x = x[:, -1:]
        return F.linear(rms_norm(x, self.final_norm, self.eps), self.output)

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that this network holds, views included."""
        yield from (self.embedding, self.final_norm, self.output)
        pending: list[Any] = list(self.layers)
        while pending:
            for value in vars(pending.pop()).values():
                if isinstance(value, Tensor):
                    yield value
                elif isinstance(value, list):
                    pending += value
                elif type(value).__module__ == linear.__module__:
                    pending.append(value)

    def _matrix(self, name: str, sizes: Mapping[str, int]) -> Tensor:
        kept = take(self._weights[name], self._layout.table[name], sizes)
        return kept.contiguous() if self._compact else kept

    def _vector(self, spec: ParamSpec, sizes: Mapping[str, int]) -> Tensor:
        return take(self._weights[spec.name], spec, sizes)

    def _layer(self, number: int) -> Layer:
        arch, sizes = self._layout.architecture, self._layout.sizes(self.subnet, number)
        prefix = f"decoder.layers.{number}."

        def vector(name: str) -> Tensor:
            return self._vector(self._layout.table[prefix + name], sizes)

        def matrix(name: str) -> Linear:
            spec = self._layout.table[prefix + name]
            return linear(self._weights[spec.name], spec, sizes, compact=self._compact)

        kind = arch.hybrid_override_pattern[number]
        if kind == MAMBA:
            log = vector("mixer.A_log")
            wide = log.dtype if log.dtype == torch.float64 else torch.float32
            return Mamba(
                norm=vector("norm.weight"),
                eps=self.eps,
                in_proj=matrix("mixer.in_proj.weight"),
                conv_weight=vector("mixer.conv1d.weight"),
                conv_bias=vector("mixer.conv1d.bias"),
                dt_bias=vector("mixer.dt_bias").to(wide),
                a=-torch.exp(log.to(wide)),
                d=vector("mixer.D"),
                inner_norm=vector("mixer.norm.weight"),
                out_proj=matrix("mixer.out_proj.weight"),
                head_dim=sizes["mamba_head_dim"],
                groups=arch.mamba_num_groups,
                state_dim=arch.mamba_state_dim,
            )
        if kind == ATTENTION:
            return Attention(
                norm=vector("input_layernorm.weight"),
                eps=self.eps,
                qkv=matrix("self_attention.linear_qkv.weight"),
                proj=matrix("self_attention.linear_proj.weight"),
                groups=arch.num_query_groups,
                channels=arch.kv_channels,
                scale=self._scale,
            )
        return MLP(
            norm=vector("pre_mlp_layernorm.weight"),
            eps=self.eps,
            up=matrix("mlp.linear_fc1.weight"),
            down=matrix("mlp.linear_fc2.weight"),
            activation=self._activation,
        )
