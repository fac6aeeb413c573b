"""Sizes that GPU kernels like: what ratios round to, and which widths of a space no kernel likes.

Tensor cores read rows of 16 bytes: a product is fast when its widths are multiples of 8 in bf16, and of 16 in FP8 and
in the blocks of NVFP4. What counts is the width on ONE tensor-parallel rank, and of packed axes the sum: `in_proj`
has z+x+B+C+dt = 2 heads x head_dim + 2 groups x state + heads rows. Heads in multiples of 8 a rank keep that sum a
multiple of 8 whatever the head_dim.

A family must not depend on the layout of a run, so the default for heads counts ranks at the largest tensor-parallel
size that the parent's groups allow. No torch here.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from math import gcd, lcm

from ..kinds import dims, kind_of, kinds_by_dim, kinds_of
from ..problems import ProblemsError
from .architecture import Architecture
from .dims import HIDDEN, resolve_choices
from .elastic_space import ElasticSpace
from .layout import ParamLayout
from .subnet import Subnet

BF16_MULTIPLE, FP8_MULTIPLE, CONVOLUTION_MULTIPLE = 8, 16, 8
LARGE_HIDDEN_SIZE = 1024  # parents from here on are rounded to what large GEMM tiles like
AXES = {  # axis of a linear -> (how it is called, kind of its layers; None: every layer)
    "hidden": ("hidden channels", None),
    **{axis: (what, kind.letter) for kind in kinds_by_dim() for axis, what in kind.aligned.items()},
}
LONGEST_LIST = 8


def default_multiples(architecture: Architecture) -> dict[str, int]:
    """What ratios of a dim round to where `elastic.multiple_of` says nothing, before the dim's groups are asked."""
    large = architecture.hidden_size >= LARGE_HIDDEN_SIZE
    present = kinds_of(architecture.hybrid_override_pattern)
    widest = gcd(*(getattr(architecture, name) for kind in present for name in kind.split_by))
    return {HIDDEN: 64 if large else BF16_MULTIPLE, **{dim.name: dim.multiple(large, widest) for dim in dims()}}


def rounding_step(
    name: str,
    wanted: Sequence[int | float],
    full: int,
    groups: int,
    architecture: Architecture,
    given: Mapping[str, int],
) -> int:
    """The multiple that the ratios among `wanted` round to, itself a multiple of `groups`.

    A multiple that the user gave holds. A default is halved while it makes two of the sizes one (or exceeds the
    parent's): choices that somebody wrote down are not taken away for speed.
    """
    if name in given:
        return lcm(groups, given[name])
    multiple = default_multiples(architecture).get(name, 1)
    apart = len({full, *resolve_choices(name, wanted, full, groups)[0]})
    while multiple > 1:
        step = lcm(groups, multiple)
        if step <= full and len({full, *resolve_choices(name, wanted, full, step)[0]}) == apart:
            return step
        multiple //= 2
    return groups


def unaligned_widths(space: ElasticSpace, tp_size: int) -> Iterator[tuple[str, int, dict[str, int]]]:
    """(what, width on one rank, sizes it follows from) of every choice whose width is no multiple of 16.

    Nothing where `tp_size` is not legal: that is a problem of its own.
    """
    for axis, (what, kind) in AXES.items():
        if kind is None or kind in space.architecture.hybrid_override_pattern:
            for width, sizes in _widths(space, tp_size, axis):
                if width % FP8_MULTIPLE:
                    yield what, width, sizes


def convolution_notes(space: ElasticSpace, tp_size: int, cp_size: int = 1) -> list[str]:
    """Choices that causal-conv1d refuses: it wants the channels on a rank, x+B+C, to be a multiple of 8.

    (Its other rule, a width of 2 to 4, always holds: Megatron's is 4.) Only a GPU has that kernel.
    """
    arch, wrong = space.architecture, []
    for kind in map(kind_of, dict.fromkeys(arch.hybrid_override_pattern)):
        for _, sizes in _widths(space, tp_size, kind.conv_axis) if kind.conv_axis else ():
            if (width := kind.conv_width(arch, sizes, tp_size, cp_size)) % CONVOLUTION_MULTIPLE:
                wrong.append((width, sizes))
    if not wrong:
        return []
    named = " x ".join(f"{name} {size}" for name, size in (("TP", tp_size), ("CP", cp_size)) if size > 1)
    rank = f"a rank of {named}" if named else "a GPU"
    words = f"causal-conv1d wants multiples of {CONVOLUTION_MULTIPLE} channels x+B+C on {rank}, not"
    listed = _listed({"": [_described(width, sizes) for width, sizes in wrong]}).strip()
    return [f"{words} {listed}; choose other sizes before you train on a GPU"]


def padding_notes(architecture: Architecture, tp_size: int) -> list[str]:
    """That the vocabulary gets rows of zeros, where tensor parallelism does not divide it."""
    rows = -(-architecture.vocab_size // tp_size) * tp_size
    if rows == architecture.vocab_size:
        return []
    words = f"model.vocab_size={architecture.vocab_size} is padded to {rows} rows in training"
    return [f"at TP {tp_size}, {words}; losses, the nested checkpoint and children have none of the padding"]


def _widths(space: ElasticSpace, tp_size: int, axis: str) -> Iterator[tuple[int, dict[str, int]]]:
    """(width of an axis on one rank, sizes it follows from) of every choice; nothing where `tp_size` is not legal."""
    try:
        layout = ParamLayout(space.architecture, ffn_groups=space.groups, tp_size=tp_size)
    except ProblemsError:
        return
    segments = layout.axes[axis]
    cut = list(dict.fromkeys(f.dim for s in segments for f in s.factors if f.dim))
    for sizes in product(*(space.dims[name].choices for name in cut)):
        named = dict(zip(cut, sizes, strict=True))
        width = sum(segment.length(named) for segment in segments)
        yield width, {n: v for n, v in named.items() if len(space.dims[n].choices) > 1} or named


def alignment_notes(space: ElasticSpace, tp_size: int) -> list[str]:
    """What `plan` says of `unaligned_widths`: at most one note for bf16 and one for FP8 and NVFP4."""
    slow, no_fp8 = {}, {}
    for what, width, sizes in unaligned_widths(space, tp_size):
        of = slow if width % BF16_MULTIPLE else no_fp8
        of.setdefault(what, []).append(_described(width, sizes))
    rank = f"on a rank of TP {tp_size}" if tp_size > 1 else "without TP"
    notes = []
    if slow:
        words = f"no multiples of {BF16_MULTIPLE}, so bf16 products are slow and copied"
        notes.append(f"{rank}, {words}: {_listed(slow)}")
    if no_fp8:
        notes.append(f"{rank}, no multiples of {FP8_MULTIPLE}, so no FP8 or NVFP4: {_listed(no_fp8)}")
    return notes


def subnet_notes(layout: ParamLayout, subnet: Subnet, neighbours: Iterable[Subnet]) -> list[str]:
    """Widths of a subnet between `neighbours` that kernels do not like, of axes whose widths in all of these they do.

    Args:
        layout: without tensor parallelism.
    """
    mine, theirs = _subnet_widths(layout, subnet), [_subnet_widths(layout, other) for other in neighbours]
    for multiple, words in ((BF16_MULTIPLE, "bf16 products are slow and copied"), (FP8_MULTIPLE, "no FP8 or NVFP4")):
        wrong = {}
        for what, widths in mine.items():
            if any(width % multiple for other in theirs for width in other.get(what, ())):
                continue
            found = [_described(width, sizes) for width, sizes in widths.items() if width % multiple]
            wrong |= {what: found} if found else {}
        if wrong:
            limit = f"no sizes in multiples of {multiple} were found that meet the budget, so {words}"
            return [f"{limit}: {_listed(wrong)}"]
    return []


def _subnet_widths(layout: ParamLayout, subnet: Subnet) -> dict[str, dict[int, dict[str, int]]]:
    """Axis, as it is called -> widths -> the sizes that they follow from."""
    pattern, found = layout.architecture.hybrid_override_pattern, {}
    for axis, (what, kind) in AXES.items():
        layers = [layer for layer in subnet.layers if kind in (None, pattern[layer])]
        for layer in layers[:1] if kind is None else layers:
            sizes, segments = layout.sizes(subnet, layer), layout.axes[axis]
            cut = {f.dim for s in segments for f in s.factors if f.dim}
            width = sum(segment.length(sizes) for segment in segments)
            found.setdefault(what, {})[width] = {n: v for n, v in sizes.items() if n in cut}
    return found


def _described(width: int, sizes: Mapping[str, int]) -> str:
    return f"{width} ({', '.join(f'{n} {v}' for n, v in sizes.items())})"


def _listed(found: Mapping[str, Sequence[str]]) -> str:
    parts = []
    for what, widths in found.items():
        more = f" and {len(widths) - LONGEST_LIST} more" if len(widths) > LONGEST_LIST else ""
        parts.append(f"{what} {', '.join(widths[:LONGEST_LIST])}{more}")
    return "; ".join(parts)
