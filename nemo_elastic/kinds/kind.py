"""What the package has to know of a layer kind. Everybody else walks these facts and compares no letter.

A kind is a file beside this one that fills in a `Kind`, and the module that computes it (`Kind.module`, which
`mcore.kernels.kind_modules` describes). Functions of a kind take the parent's `Architecture`, or anything with its
fields, and the sizes of one layer: dim -> kept units, integers or tensors, what is missing being the parent's. No torch
here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .axis import Axis, Groups, MakeFactor

Sizes = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Size:
    """A number of a plain model that one kind of layer has: a field of Megatron's `TransformerConfig`.

    Attributes:
        required: a model section has to give it.
        default: of `Architecture`; None: none. 0: what the size is of may not be there at all.
        none_if_absent: Megatron reads any value as that there are such layers: it is told none where there are none.
        fixed: Megatron has no field for it: it always is the default, and no model section says it.
        huggingface: keys of config.json with the same value, today's first.
    """

    name: str
    required: bool = True
    default: int | None = None
    none_if_absent: bool = False
    fixed: bool = False
    huggingface: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Dim:
    """An elastic dim: a size that children have less of.

    Attributes:
        name: of the size that it cuts.
        place: where it is listed among all dims; the seeds of a router and the columns of tables follow this order.
        groups: (architecture, groups of neurons and experts) -> number of groups whose first units a child keeps.
        per_layer: layers of a child may differ in it; else it has one value per net.
        within: the dim whose units have an order of this one's each: neurons, within experts.
        dealt: units belong to no group by nature: they are ranked over the whole layer and dealt to the groups, whose
            number is this field of `elastic`.
        multiple: (large parent?, widest tensor-parallel size) -> what ratios round to by default.
        least: architecture -> the smallest size of a child.
        ratios: choices that `config --from` offers; none: the dim is left alone.
        words, short: in figures and notes; a column's heading (at most two lines).
        schemas: Hugging Face schemas (`checkpoint.schemas`) that can say it per layer.
        gguf_key: the one key of GGUF that says it for all layers, where that is all there is.
    """

    name: str
    place: int = 1000
    groups: Callable[[Any, Groups], int] = lambda arch, groups: 1
    per_layer: bool = True
    within: str | None = None
    dealt: str | None = None
    multiple: Callable[[bool, int], int] = lambda large, ranks: 1
    least: Callable[[Any], int] = lambda arch: 1
    ratios: tuple[float, ...] = ()
    words: str
    short: str
    schemas: tuple[str, ...] = ()
    gguf_key: str | None = None


@dataclass(frozen=True, kw_only=True)
class Ran:
    """How a layer is trained, as far as it decides which tensors are kept for the backward.

    Attributes:
        element: bytes of an activation: 2, or 4 in fp32.
        ranks: the tensor-parallel size.
        length: tokens of a sequence.
        context: the context-parallel size.
        sequences: of a micro-batch; they share what depends on the position alone.
        turned: channels of a head that rotary positions turn; 0 without positions.
        soft, gates: soft masks; the straight-through gates of a hard choice that is being learned.
        cut: masked mode, and a subnet without all of the kind's units.
        selective: what `recompute_granularity: selective` computes again is not kept.
        kernels: `cuda` (mamba-ssm, causal-conv1d, flash attention) or `torch` (the ones of this package).
    """

    element: int
    ranks: int
    length: int
    context: int = 1
    sequences: int = 1
    turned: int = 0
    soft: bool = False
    gates: bool = False
    cut: bool = False
    selective: bool = False
    kernels: str = "cuda"


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A fused parameter that others store in parts: per group of `groups` the rows `[rest, 1, 1, ...] x channels`.

    `groups` and `channels` are sizes of the architecture. Attention's rows are `[Q .. Q, K, V]` per query group.
    """

    groups: str
    channels: str


@dataclass(frozen=True, kw_only=True)
class HuggingFace:
    """How NemotronH says a kind.

    Attributes:
        blocks: its words in `layers_block_type`, today's first.
        names: parameter behind its layer's prefix -> the names it has there (several: `packed` says how it is split;
            with a `#`: one for each unit of the parameter's first axis).
    """

    blocks: tuple[str, ...]
    names: Mapping[str, tuple[str, ...]]
    packed: Mapping[str, Packed] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PerLayer:
    """A key of GGUF with a number per layer: the kind's own `size`, in other layers 0 or (`elsewhere`) the child's.

    `list_always`: a list even where all layers say the same.
    """

    key: str
    size: str
    elsewhere: bool = False
    list_always: bool = True


@dataclass(frozen=True, kw_only=True)
class Gguf:
    """How llama.cpp's nemotron_h says a kind.

    Attributes:
        names: NemotronH's name behind the layer's prefix -> llama.cpp's.
        matrices: those that have the file's dtype; all others are fp32.
        per_layer, keys: keys with a number per layer; child architecture -> keys with one number.
        shape: (llama.cpp's name, shape, architecture) -> shape in the file.
        values: llama.cpp's name -> what is done to the tensor.
    """

    names: Mapping[str, str]
    matrices: frozenset[str]
    per_layer: tuple[PerLayer, ...] = ()
    keys: Callable[[Any], dict[str, Any]] = lambda arch: {}
    shape: Callable[[str, tuple[int, ...], Any], tuple[int, ...]] = lambda name, shape, arch: shape
    values: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class Kind:
    """A layer kind.

    Attributes:
        letter: in `hybrid_override_pattern`.
        name, words, heading: in files and JSON; in sentences and legends; of the column with its sizes.
        colours: on light and on dark paper; each is one of its own in `report.palette`.
        sizes: the numbers that decide its tensors; `multiples_of`: (size, size that must divide it).
        dims: its elastic dims; `split_by`: sizes that every tensor-parallel size must divide.
        flags: true or false of a plain model (fields of `TransformerConfig`) on which its rows depend.
        rows: parameter behind the layer's prefix -> names of its axes; `hidden`, `one` are everybody's.
        only_with: row -> the flags (or sizes) of which one must be true (not 0) for it to be there; others always are.
        axes: (architecture, groups of neurons and experts, make a factor) -> its axes by name.
        norm: (row of its norm, the name of that row where Transformer Engine fuses it into the linear behind).
        uncast: rows that keep their dtype where a model is cast to another one.
        stored_in_parts: rows that stock checkpoints hold segment by segment (of the first axis).
        extra_states: modules of it that have a Transformer Engine state of their own in stock checkpoints.
        flops: (architecture, sizes, sequence length, chunk) -> forward FLOPs of one layer for one sequence.
        met: (architecture, sizes) -> for rows of which one token meets a part: (units met, units).
        broken: architecture -> (field, words) for each of its own rules that a model with such layers breaks.
        recomputed: the same arguments -> those that selective recomputation does again.
        caches: (architecture, sizes, sequence length) -> cached elements of one layer for one sequence, by
            `cost.CACHES`.
        saved: (architecture, sizes, how it ran) -> what its layers keep for the backward, behind their first linear and
            to the input of the last one: bytes a token on one rank, by what it is.
        exchanged: (architecture, sizes, context-parallel size) -> elements of a token that its forward gets from, and
            gives to, other context-parallel ranks, over all tensor-parallel ones.
        shares_context: (architecture, sizes, tensor-parallel size, context-parallel size) -> whether so many ranks can
            share out what a layer of these sizes computes over whole sequences.
        dispatched: (architecture, sizes) -> elements of a token that its forward sends to the ranks that hold its
            experts and gets back, if all of them are elsewhere.
        context_dim: the dim that these ranks share out, if there is one.
        aligned: axis of a linear -> how notes call it; `conv_axis`: the axis that the causal convolution runs over;
            `conv_width`: (architecture, sizes, tensor-parallel size, context-parallel size) -> its channels on a rank.
        fp8: axis that FP8 wants in multiples of 16 -> words, in which `{width}` and dims are put.
        ranking: field of `RankConfig` -> its choices and their meanings: which activation ranks its dims.
        ends_block: a feed-forward layer, with which a block of models that know only whole blocks ends.
        fewest: the field of `RankConfig` with the number of its layers that depth ranking keeps, if there is one.
        huggingface, gguf, serving: None where it cannot be said, or run, there. `serving` is a module.
        module: computes it. `slot`: the letter of Megatron's own stack in whose place it is built.
    """

    letter: str
    name: str
    words: str
    heading: str
    colours: tuple[str, str]
    sizes: tuple[Size, ...]
    multiples_of: tuple[tuple[str, str], ...] = ()
    dims: tuple[Dim, ...]
    split_by: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    rows: Mapping[str, tuple[str, ...]]
    only_with: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    axes: Callable[[Any, Groups, MakeFactor], dict[str, Axis]]
    norm: tuple[str, str]
    uncast: tuple[str, ...] = ()
    stored_in_parts: tuple[str, ...] = ()
    extra_states: tuple[str, ...] = ()
    flops: Callable[[Any, Sizes, int, int], Any]
    met: Callable[[Any, Sizes], Mapping[str, tuple[int, Any]]] = lambda arch, sizes: {}
    broken: Callable[[Any], Iterable[tuple[str, str]]] = lambda arch: ()
    recomputed: Callable[[Any, Sizes, int, int], Any] = lambda arch, sizes, length, chunk: 0
    caches: Callable[[Any, Sizes, int], dict[str, Any]] = lambda arch, sizes, length: {}
    saved: Callable[[Any, Sizes, Ran], dict[str, float]]
    exchanged: Callable[[Any, Sizes, int], float] = lambda arch, sizes, context: 0.0
    shares_context: Callable[[Any, Sizes, int, int], bool] = lambda arch, sizes, ranks, context: True
    context_dim: str | None = None
    dispatched: Callable[[Any, Sizes], float] = lambda arch, sizes: 0.0
    aligned: Mapping[str, str] = field(default_factory=dict)
    conv_axis: str | None = None
    conv_width: Callable[[Any, Sizes, int, int], int] = lambda arch, sizes, ranks, context: 0
    fp8: Mapping[str, str] = field(default_factory=dict)
    ranking: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    ends_block: bool = False
    fewest: str | None = None
    huggingface: HuggingFace | None = None
    gguf: Gguf | None = None
    serving: str | None = None
    module: str
    slot: str

    def rows_of(self, architecture: Any) -> tuple[str, ...]:
        """The rows that its layers have in a model, in the order of the forward."""
        return tuple(
            row
            for row in self.rows
            if row not in self.only_with or any(getattr(architecture, flag) for flag in self.only_with[row])
        )


def size_of(architecture: Any, sizes: Sizes, name: str) -> Any:
    """A layer's size: what it keeps, or the parent's."""
    return sizes.get(name, getattr(architecture, name))
