"""Which part of which weight a key of a NeMo (torch_dist) checkpoint is.

    [module.]NAME                                   the whole of a canonical weight
    ... mixer.in_proj.weight.z                      a part of Mamba's fused rows, which are stored one by one
    ... mlp.experts.experts.linear_fc1.weight       all experts, `[E, f, h]`: SequentialMLP and TEGroupedMLP alike
    ... mlp.experts.experts.J.linear_fc1.weight     an expert's own, where Megatron saves with `singleton_local_shards`
    ... linear_fc1.weight_w, ... weight_v           gate and up of such a save

Two more spellings are taken, as state dicts have them that nobody put together: SequentialMLP's
`mlp.experts.local_experts.J.linear_fc1.weight` and TEGroupedMLP's `mlp.experts.linear_fc1.weightJ`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from nemo_elastic.kinds import kinds

PARTS = {row: tuple(kind.rows[row][0].split("+")) for kind in kinds() for row in kind.stored_in_parts}
HALVES = ("w", "v")  # the halves of a gated linear's rows: gate, up
_ROWS = {row for kind in kinds() for row in kind.rows}
_UNFUSED = {fused: own for own, fused in (kind.norm for kind in kinds())}
_PREFIX = re.compile(r"^(module\.|model\.)*(?=embedding\.|decoder\.|output_layer\.)")
_LAYER = re.compile(r"^(decoder\.layers\.\d+\.)(.+)$")
_HALF = re.compile(rf"^(.+)_([{''.join(HALVES)}])$")
# (an expert's number in front of its linear, or behind its weight) -> the row that holds all of them
_UNITS = (
    (re.compile(r"^mlp\.experts\.(?:experts|local_experts)\.(\d+)\.(linear_fc[12]\.weight)$"), 1, 2),
    (re.compile(r"^mlp\.experts\.(?:experts\.)?(linear_fc[12]\.weight)(\d+)$"), 2, 1),
)


@dataclass(frozen=True)
class Place:
    """Where a stored tensor belongs: in a weight, of an expert of it, in a part of the rows; None: all of them."""

    name: str
    unit: int | None = None
    part: str | None = None


def place_of(key: str) -> Place | None:
    """The place of a key; None for what is no weight (optimizer, router of budgets, multi-token prediction, ...)."""
    prefix = _PREFIX.match(key)
    if prefix is None:
        return None
    name = key[prefix.end() :]
    layer = _LAYER.match(name)
    if layer is None:
        return Place(name)
    start, suffix = layer.groups()
    for whole, parts in PARTS.items():
        if suffix.startswith(f"{whole}.") and suffix[len(whole) + 1 :] in parts:
            return Place(start + whole, part=suffix[len(whole) + 1 :])
    suffix, part = half.groups() if (half := _HALF.match(suffix)) else (suffix, None)
    for pattern, number, linear in _UNITS:
        if found := pattern.match(suffix):
            return Place(f"{start}mlp.experts.experts.{found[linear]}", int(found[number]), part)
    if part is not None and suffix not in _ROWS:
        suffix, part = f"{suffix}_{part}", None
    return Place(start + _UNFUSED.get(suffix, suffix), part=part)


def suffix_of(name: str) -> str:
    """A canonical name behind its layer's prefix."""
    match = _LAYER.match(name)
    return match.group(2) if match else name
