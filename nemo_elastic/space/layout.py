"""The one table: which axis of which parameter is made of which segments of elastic units (`kinds.axis`).

Its rows and axes are those of the layer kinds and what lies outside the stack. Masks, slices, sorting, counting,
extraction and name conversion all read this table; nothing else in the package knows where z, x, B, C and dt lie. A
name that no row matches is an error, never a pass-through.

Tensor parallelism splits an axis by whole groups: a factor with `tp=True` holds `groups / tp_size` groups on a rank,
so a rank's shard is described by the same table (`ParamLayout(..., tp_size=n)`); expert parallelism likewise splits the
axis of experts (`ep=True`, `ep_size`). The vocabulary alone need not be a
multiple: it is padded to the next one, as Megatron does, and the padding is `mcore.kernels.padded_vocabulary`'s. No
torch here.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import gcd
from typing import Any

from ..kinds import kind_of, kinds, kinds_of
from ..kinds.axis import Axis, Factor, Groups, Segment
from ..problems import Problem, ProblemsError
from .architecture import Architecture
from .dims import DEFAULT_FFN_GROUPS, HIDDEN
from .subnet import Subnet, layer_sizes


@dataclass(frozen=True)
class ParamSpec:
    """One parameter: canonical name, the layer it belongs to (None outside the stack) and its axes."""

    name: str
    layer: int | None
    kind: str
    axes: tuple[Axis, ...]

    def shape(self, sizes: Mapping[str, Any]) -> tuple[Any, ...]:
        """Shape on one rank for `sizes`; `{}` gives the parent's."""
        return tuple(sum(segment.length(sizes) for segment in axis) for axis in self.axes)

    def numel(self, sizes: Mapping[str, Any]) -> Any:
        """Element count for `sizes`: exact on integers, differentiable on expected sizes."""
        product: Any = 1
        for extent in self.shape(sizes):
            product = product * extent
        return product

    @property
    def is_shared_out(self) -> bool:
        """Whether expert-parallel ranks hold a part each."""
        return any(f.ep and f.ranks > 1 for axis in self.axes for s in axis for f in s.factors)

    @property
    def dims(self) -> frozenset[str]:
        """Elastic dims that cut this parameter."""
        return frozenset(f.dim for axis in self.axes for s in axis for f in s.factors if f.dim)


# Outside the stack: parameter name -> names of its axes.
OUTER_ROWS: dict[str, tuple[str, ...]] = {
    "embedding.word_embeddings.weight": ("vocab", "hidden"),
    "decoder.final_norm.weight": ("hidden",),
    "output_layer.weight": ("vocab", "hidden"),
}
_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.(.+)$")


class ParamLayout:
    """The table for one parent, or of the shard of one rank, where `tp_size` or `ep_size` > 1.

    Args:
        ffn_groups: groups of neurons and, if it is one number, of experts.
    """

    def __init__(
        self,
        architecture: Architecture,
        *,
        ffn_groups: int | Groups = DEFAULT_FFN_GROUPS,
        tp_size: int = 1,
        ep_size: int = 1,
    ) -> None:
        self.architecture = architecture
        self.groups = Groups.of(ffn_groups)
        self.tp_size, self.ep_size = tp_size, ep_size
        self._check_tp()
        self._check_ep()

    def _check_tp(self) -> None:
        arch, key = self.architecture, "train.tensor_model_parallel_size"
        pattern = arch.hybrid_override_pattern
        whole = {
            "elastic.ffn_groups": self.groups.ffn,
            **{f"model.{name}": getattr(arch, name) for kind in kinds_of(pattern) for name in kind.split_by},
        }
        size = gcd(*whole.values())
        near = ", ".join(str(n) for n in range(1, min(size, 64) + 1) if size % n == 0)
        bad = [
            Problem(key, f"{self.tp_size} must divide {k}={v}; possible: {near}")
            for k, v in whole.items()
            if v % self.tp_size
        ]
        if bad:
            raise ProblemsError(bad)

    def _check_ep(self) -> None:
        if self.ep_size == 1:
            return
        key, groups = "train.expert_model_parallel_size", self.groups.experts
        if not any(f.ep for axis in self._held_axes() for s in axis for f in s.factors):
            words = f"{self.ep_size} needs a model with experts, and this one has no layer of them; set 1"
            raise ProblemsError([Problem(key, words)])
        if groups % self.ep_size:
            near = ", ".join(str(n) for n in range(1, groups + 1) if groups % n == 0)
            words = f"{self.ep_size} must divide elastic.expert_groups={groups}; possible: {near}, or other groups"
            raise ProblemsError([Problem(key, words)])

    def _held_axes(self) -> Iterator[Axis]:
        for spec in self.table.values():
            yield from spec.axes

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding over all ranks: the vocabulary, up to the next multiple of `tp_size`."""
        return -(-self.architecture.vocab_size // self.tp_size) * self.tp_size

    def vocab_padding(self, rank: int) -> int:
        """How many of a rank's rows, the last ones, stand for no token."""
        rows = self.padded_vocab_size // self.tp_size
        return min(rows, max(0, (rank + 1) * rows - self.architecture.vocab_size))

    def _factor(
        self, dim: str | None, groups: int, count: int, *, fixed: int = 0, tp: bool = False, ep: bool = False
    ) -> Factor:
        ranks = self.tp_size if tp else self.ep_size if ep else 1
        return Factor(dim, groups, count, fixed, tp, ep, ranks)

    def _vocabulary(self) -> Factor:
        rows = self.padded_vocab_size
        padding = rows - self.architecture.vocab_size
        return Factor(None, rows, 1, tp=True, ranks=self.tp_size, padding=padding)

    @cached_property
    def axes(self) -> dict[str, Axis]:
        """Every kind of axis, by name."""
        a, factor = self.architecture, self._factor
        found = {
            "hidden": (Segment("hidden", (factor(HIDDEN, 1, a.hidden_size),)),),
            "vocab": (Segment("vocab", (self._vocabulary(),)),),
            "one": (Segment("one", (factor(None, 1, 1),)),),
        }
        for kind in kinds():
            found |= kind.axes(a, self.groups, factor)
        return found

    @cached_property
    def table(self) -> dict[str, ParamSpec]:
        """Canonical name -> row, in the order of the forward."""
        rows = [("embedding.word_embeddings.weight", None, "embedding")]
        for layer, kind in enumerate(self.architecture.hybrid_override_pattern):
            rows += [
                (f"decoder.layers.{layer}.{suffix}", layer, kind) for suffix in kind_of(kind).rows_of(self.architecture)
            ]
        rows.append(("decoder.final_norm.weight", None, "norm"))
        if not self.architecture.share_embeddings_and_output_weights:
            rows.append(("output_layer.weight", None, "output"))
        return {name: self._row(name, layer, kind) for name, layer, kind in rows}

    def _row(self, name: str, layer: int | None, kind: str) -> ParamSpec:
        axes = OUTER_ROWS[name] if layer is None else kind_of(kind).rows[_LAYER.match(name).group(2)]
        return ParamSpec(name, layer, kind, tuple(self.axes[a] for a in axes))

    def canonical_name(self, name: str) -> str:
        """The table's name of a Megatron parameter: wrapper prefixes dropped, fused norm names resolved.

        Raises:
            ValueError: when no row matches; the message names the parameter.
        """
        bare = re.sub(r"^(module\.)+", "", name)
        match = _LAYER.match(bare)
        if match and int(match.group(1)) < self.architecture.num_layers:
            kind = self.architecture.hybrid_override_pattern[int(match.group(1))]
            own, fused = kind_of(kind).norm
            if match.group(2) == fused:
                bare = f"decoder.layers.{match.group(1)}.{own}"
        if bare not in self.table:
            raise ValueError(
                f"parameter {name!r} has no row in ParamLayout for this pattern; "
                "a new kind of parameter needs a row in its file of nemo_elastic/kinds before it can be elastic"
            )
        return bare

    def spec(self, name: str) -> ParamSpec:
        """The row of a parameter, by any of its names."""
        return self.table[self.canonical_name(name)]

    @property
    def output_spec(self) -> ParamSpec:
        """The row of the output layer's weight; tied, it is the embedding's."""
        return self.table.get("output_layer.weight") or self.table["embedding.word_embeddings.weight"]

    def sizes(self, subnet: Subnet, layer: int | None) -> dict[str, int]:
        """Sizes of a subnet that rule a layer's parameters (None: outside the stack)."""
        if layer is None:
            return {HIDDEN: subnet.hidden_size}
        return layer_sizes(self.architecture, subnet, layer)

    def child_params(self, subnet: Subnet) -> Iterator[tuple[str, ParamSpec, dict[str, int]]]:
        """(name in the child, row of the parent, sizes) of every parameter the child has: layers are renumbered."""
        position = {layer: i for i, layer in enumerate(subnet.layers)}
        for name, spec in self.table.items():
            if spec.layer is None:
                yield name, spec, self.sizes(subnet, None)
            elif spec.layer in position:
                suffix = _LAYER.match(name).group(2)
                yield f"decoder.layers.{position[spec.layer]}.{suffix}", spec, self.sizes(subnet, spec.layer)


def is_uncast(spec: ParamSpec) -> bool:
    """Whether a parameter keeps its dtype where a model is cast to another one."""
    return spec.layer is not None and _LAYER.match(spec.name).group(2) in kind_of(spec.kind).uncast


def fused_name(name: str, kind: str) -> str:
    """A layer's canonical parameter name as stock checkpoints (Transformer Engine spec) write it."""
    match = _LAYER.match(name)
    own, fused = kind_of(kind).norm if match else (None, None)
    if match and match.group(2) == own:
        return f"decoder.layers.{match.group(1)}.{fused}"
    return name
