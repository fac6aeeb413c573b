"""What an axis of a parameter is made of: segments of elastic units.

A `Factor` is `groups` groups of `count` units (plus `fixed` units at the end of every group that no child loses); a
`Segment` is a product of factors (Mamba's z rows are group, head, channel); an axis is a sum of segments
(`[z+x+B+C+dt]`). Tensor and expert parallelism split an axis by whole groups. No torch here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Factor:
    """`groups` x (`count` elastic units + `fixed` units always kept). `dim=None`: nothing of it is ever cut.

    `tp`, `ep`: who splits the groups, tensor- or expert-parallel ranks, of which there are `ranks`.
    `padding`: how many of the groups, the last ones, are zeros that whole tensors do not have.
    """

    dim: str | None
    groups: int
    count: int
    fixed: int = 0
    tp: bool = False
    ep: bool = False
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


@dataclass(frozen=True)
class Groups:
    """How many groups are made of units that belong to none by nature."""

    ffn: int  # neurons: elastic.ffn_groups
    experts: int  # elastic.expert_groups

    @classmethod
    def of(cls, groups: "int | Groups") -> "Groups":
        """A number is that of both."""
        return cls(groups, groups) if isinstance(groups, int) else groups


Axis = tuple[Segment, ...]
# (dim or None, groups, units of a group, *, fixed=0, tp=False, ep=False) -> a factor of the table at hand.
MakeFactor = Callable[..., Factor]
