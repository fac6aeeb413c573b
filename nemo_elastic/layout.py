"""The one table: which axis of which parameter is made of which segments of elastic units.

A `Factor` is `groups` groups of `count` units (plus `fixed` units at the end of every group that no child loses); a
`Segment` is a product of factors (Mamba's z rows are group, head, channel); an axis is a sum of segments
(`[z+x+B+C+dt]`). Masks, slices, sorting, counting, extraction and name conversion all read this table; nothing else
in the package knows where z, x, B, C and dt lie. A name that no row matches is an error, never a pass-through.

Tensor parallelism splits an axis by whole groups: a factor with `tp=True` holds `groups / tp_size` groups on a rank,
so a rank's shard is described by the same table (`ParamLayout(..., tp_size=n)`). The vocabulary alone need not be a
multiple: it is padded to the next one, as Megatron does, and the padding is `mcore.padded_vocabulary`'s. No torch here.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import gcd
from typing import Any

from .architecture import ATTENTION, MAMBA, MLP, Architecture
from .problems import Problem, ProblemsError
from .space import DEFAULT_FFN_GROUPS, Subnet, layer_sizes


@dataclass(frozen=True)
class Factor:
    """`groups` x (`count` elastic units + `fixed` units always kept). `dim=None`: nothing of it is ever cut.

    `padding`: how many of the groups, the last ones, are zeros that whole tensors do not have.
    """

    dim: str | None
    groups: int
    count: int
    fixed: int = 0
    tp: bool = False
    ranks: int = 1
    padding: int = 0

    @property
    def local_groups(self) -> int:
        return self.groups // self.ranks

    def kept(self, sizes: Mapping[str, Any]) -> Any:
        """Units kept of every group for `sizes` (dim -> units kept over all groups and ranks); ints or tensors."""
        size = None if self.dim is None else sizes.get(self.dim)
        if size is None:
            return self.count
        return size // self.groups if isinstance(size, int) else size / self.groups

    def length(self, sizes: Mapping[str, Any]) -> Any:
        """Extent on one rank for `sizes`."""
        return self.local_groups * (self.kept(sizes) + self.fixed)


@dataclass(frozen=True)
class Segment:
    """A named product of factors, outermost first."""

    name: str
    factors: tuple[Factor, ...]

    def length(self, sizes: Mapping[str, Any]) -> Any:
        product: Any = 1
        for factor in self.factors:
            product = product * factor.length(sizes)
        return product


Axis = tuple[Segment, ...]


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
    def dims(self) -> frozenset[str]:
        """Elastic dims that cut this parameter."""
        return frozenset(f.dim for axis in self.axes for s in axis for f in s.factors if f.dim)


# Parameter name behind its layer's prefix -> names of its axes.
ROWS: dict[str | None, dict[str, tuple[str, ...]]] = {
    None: {
        "embedding.word_embeddings.weight": ("vocab", "hidden"),
        "decoder.final_norm.weight": ("hidden",),
        "output_layer.weight": ("vocab", "hidden"),
    },
    MAMBA: {
        "norm.weight": ("hidden",),
        "mixer.in_proj.weight": ("z+x+B+C+dt", "hidden"),
        "mixer.conv1d.weight": ("x+B+C", "one", "kernel"),
        "mixer.conv1d.bias": ("x+B+C",),
        "mixer.dt_bias": ("mamba_heads",),
        "mixer.A_log": ("mamba_heads",),
        "mixer.D": ("mamba_heads",),
        "mixer.norm.weight": ("x",),
        "mixer.out_proj.weight": ("hidden", "x"),
    },
    ATTENTION: {
        "input_layernorm.weight": ("hidden",),
        "self_attention.linear_qkv.weight": ("qkv", "hidden"),
        "self_attention.linear_proj.weight": ("hidden", "q"),
    },
    MLP: {
        "pre_mlp_layernorm.weight": ("hidden",),
        "mlp.linear_fc1.weight": ("ffn", "hidden"),
        "mlp.linear_fc2.weight": ("hidden", "ffn"),
    },
}

# Transformer Engine fuses a layer's norm into the linear behind it; checkpoints carry those names.
FUSED_NORM_NAMES = {
    MAMBA: ("norm.weight", "mixer.in_proj.layer_norm_weight"),
    ATTENTION: ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
    MLP: ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
}
_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.(.+)$")


class ParamLayout:
    """The table for one parent; `tp_size` > 1 gives the table of one tensor-parallel shard."""

    def __init__(self, architecture: Architecture, *, ffn_groups: int = DEFAULT_FFN_GROUPS, tp_size: int = 1) -> None:
        self.architecture = architecture
        self.ffn_groups = ffn_groups
        self.tp_size = tp_size
        self._check_tp()

    def _check_tp(self) -> None:
        arch, key = self.architecture, "train.tensor_model_parallel_size"
        whole = {
            "elastic.ffn_groups": self.ffn_groups,
            "model.mamba_num_groups": arch.mamba_num_groups,
            "model.num_query_groups": arch.num_query_groups,
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

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding over all ranks: the vocabulary, up to the next multiple of `tp_size`."""
        return -(-self.architecture.vocab_size // self.tp_size) * self.tp_size

    def vocab_padding(self, rank: int) -> int:
        """How many of a rank's rows, the last ones, stand for no token."""
        rows = self.padded_vocab_size // self.tp_size
        return min(rows, max(0, (rank + 1) * rows - self.architecture.vocab_size))

    def _factor(self, dim: str | None, groups: int, count: int, *, fixed: int = 0, tp: bool = False) -> Factor:
        return Factor(dim, groups, count, fixed, tp, self.tp_size if tp else 1)

    def _vocabulary(self) -> Factor:
        rows = self.padded_vocab_size
        padding = rows - self.architecture.vocab_size
        return Factor(None, rows, 1, tp=True, ranks=self.tp_size, padding=padding)

    @cached_property
    def axes(self) -> dict[str, Axis]:
        """Every kind of axis, by name."""
        a, factor = self.architecture, self._factor
        heads = factor("mamba_num_heads", a.mamba_num_groups, a.mamba_num_heads // a.mamba_num_groups, tp=True)
        channel = factor("mamba_head_dim", 1, a.mamba_head_dim)
        state = factor(None, a.mamba_num_groups, a.mamba_state_dim, tp=True)
        per_group = a.num_attention_heads // a.num_query_groups
        queries = factor("num_attention_heads", a.num_query_groups, per_group, tp=True)
        queries_keys_values = factor("num_attention_heads", a.num_query_groups, per_group, fixed=2, tp=True)
        channels = factor(None, 1, a.kv_channels)
        z, x = Segment("z", (heads, channel)), Segment("x", (heads, channel))
        b, c, dt = Segment("B", (state,)), Segment("C", (state,)), Segment("dt", (heads,))
        return {
            "hidden": (Segment("hidden", (factor("hidden_size", 1, a.hidden_size),)),),
            "vocab": (Segment("vocab", (self._vocabulary(),)),),
            "ffn": (
                Segment(
                    "ffn", (factor("ffn_hidden_size", self.ffn_groups, a.ffn_hidden_size // self.ffn_groups, tp=True),)
                ),
            ),
            "z+x+B+C+dt": (z, x, b, c, dt),
            "x+B+C": (x, b, c),
            "x": (x,),
            "mamba_heads": (dt,),
            "qkv": (Segment("qkv", (queries_keys_values, channels)),),
            "q": (Segment("q", (queries, channels)),),
            "one": (Segment("one", (factor(None, 1, 1),)),),
            "kernel": (Segment("kernel", (factor(None, 1, a.mamba_conv_kernel),)),),
        }

    @cached_property
    def table(self) -> dict[str, ParamSpec]:
        """Canonical name -> row, in the order of the forward."""
        rows = [("embedding.word_embeddings.weight", None, "embedding")]
        for layer, kind in enumerate(self.architecture.hybrid_override_pattern):
            rows += [(f"decoder.layers.{layer}.{suffix}", layer, kind) for suffix in ROWS[kind]]
        rows.append(("decoder.final_norm.weight", None, "norm"))
        if not self.architecture.share_embeddings_and_output_weights:
            rows.append(("output_layer.weight", None, "output"))
        return {name: self._row(name, layer, kind) for name, layer, kind in rows}

    def _row(self, name: str, layer: int | None, kind: str) -> ParamSpec:
        suffix = name if layer is None else _LAYER.match(name).group(2)
        axes = ROWS[None if layer is None else kind][suffix]
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
            own, fused = FUSED_NORM_NAMES[kind]
            if match.group(2) == fused:
                bare = f"decoder.layers.{match.group(1)}.{own}"
        if bare not in self.table:
            raise ValueError(
                f"parameter {name!r} has no row in ParamLayout for this pattern; "
                "a new kind of parameter needs a row in nemo_elastic/layout.py before it can be elastic"
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
            return {"hidden_size": subnet.hidden_size}
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


def fused_name(name: str, kind: str) -> str:
    """A layer's canonical parameter name as stock checkpoints (Transformer Engine spec) write it."""
    own, fused = FUSED_NORM_NAMES.get(kind, (None, None))
    match = _LAYER.match(name)
    if match and match.group(2) == own:
        return f"decoder.layers.{match.group(1)}.{fused}"
    return name
