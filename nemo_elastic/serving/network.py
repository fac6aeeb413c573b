"""One budget of a family, ready to run: its layers over the parent's weights.

Projections and embeddings are views (`linear.py`) or, `compact`, copies; vectors and the convolution (under one
percent of a model) are cut by `slicing.take`, which copies where a child leaves something out in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config.function_fields import arithmetic_of
from ..kinds import kind_of
from ..space.layout import ParamLayout, ParamSpec
from ..space.slicing import take
from ..space.subnet import Subnet
from .linear import Affine, Linear, compacted, linear
from .parts import Layer, Parts, build_layer, rms_norm

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
        model: the parent's model section, of which all that decides the function is followed.
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
        self._function = function = arithmetic_of(model)
        self.subnet, self.eps = subnet, float(function["layernorm_epsilon"])
        self._activation = ACTIVATIONS[function["activation_func"]]
        outer = layout.sizes(subnet, None)
        table = layout.table
        self.embedding = self._matrix("embedding.word_embeddings.weight", outer)
        self.final_norm = self._vector(table["decoder.final_norm.weight"], outer)
        self.output = self.embedding if layout.architecture.share_embeddings_and_output_weights else None
        if self.output is None:
            kept = take(self._weights["output_layer.weight"], table["output_layer.weight"], outer)
            self.output = compacted(kept) if compact else kept
        self.layers: list[Layer] = [self._layer(i) for i in subnet.layers]

    def new_caches(self, batch: int, room: int = 0, position: Tensor | None = None) -> list[Any]:
        """Empty ones for every layer, with room for so many tokens; with the `position` of a step, that never grow."""
        return [layer.cache(batch, room, position) for layer in self.layers]

    def logits(self, tokens: Tensor, caches: list[Any] | None = None, *, last_only: bool = False) -> Tensor:
        """Tokens `[b, s]` -> `[b, s, v]` (`[b, 1, v]` with `last_only`); `caches` are brought up to date."""
        x, factor = F.embedding(tokens, self.embedding), self._function["embedding_multiplier"]
        x = x if factor == 1.0 else x * factor
        for number, layer in enumerate(self.layers):
            x = layer(x, None if caches is None else caches[number])
        if last_only:
            x = x[:, -1:]
        x = rms_norm(x, self.final_norm, self.eps, scale=1.0 / self._function["logits_scaling"])
        return F.linear(x, self.output)

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

        def each(name: str) -> list[Linear]:
            spec = self._layout.table[prefix + name]
            weight, (first, *rest) = self._weights[spec.name], spec.axes
            one = replace(spec, axes=tuple(rest))
            kept = take(torch.arange(len(weight)), replace(spec, axes=(first,)), sizes)
            return [scaled(weight[unit], one) for unit in kept.tolist()]

        def matrix(name: str) -> Linear:
            spec = self._layout.table[prefix + name]
            return scaled(self._weights[spec.name], spec)

        def scaled(weight: Tensor, spec: ParamSpec) -> Linear:
            found = linear(weight, spec, sizes, compact=self._compact)
            row = self._layout.table.get(spec.name.removesuffix("weight") + "bias")
            into_stream = spec.axes[0] == self._layout.axes["hidden"]
            scale = self._function["residual_multiplier"] if into_stream else 1.0
            if row is None and scale == 1.0:
                return found
            return Affine(found, None if row is None else self._vector(row, sizes), scale)

        parts = Parts(arch, sizes, vector, matrix, each, self.eps, self._activation, self._function)
        return build_layer(kind_of(arch.hybrid_override_pattern[number]), parts)
