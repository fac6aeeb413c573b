"""What a layer kind's module is given to say what ranks its dims: choices, and the places to put observations.

`mcore.ranking.collect.WidthCollector` is the `Observer`; a kind's `observe` hooks its layer through it, and
`unit_scores` reads the choices again (`kind_modules`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from ...importance.scores import check_choices
from ...space.layout import ParamLayout


@dataclass(frozen=True, kw_only=True)
class WidthSettings:
    """Named choices of `RankConfig` that decide a width score; `top_channels` None: all channels of a head."""

    ffn_site: str = "linear_fc2_input"
    mamba_site: str = "out_proj_contribution"
    aggregation: str = "mean_l2"
    top_channels: int | None = None

    def __post_init__(self) -> None:
        check_choices(ffn_site=self.ffn_site, mamba_site=self.mamba_site, aggregation=self.aggregation)


class Observer(Protocol):
    """Where a kind's module hooks its layer. `local` is the table of this tensor-parallel rank."""

    settings: WidthSettings
    local: ParamLayout

    def on_output(self, module: nn.Module, what: str, layer: int, *, part: Callable[[Tensor], Tensor] = ...) -> None:
        """See (a part of) what a module puts out."""

    def on_input(self, module: nn.Module, see: Callable[[Tensor], None]) -> None:
        """Call `see` with what enters a module."""

    def watch_norm(self, layer: int, norm: nn.Module, linear: nn.Module) -> None:
        """See the layer's norm, a module of its own or fused into the linear behind it."""

    def plain_sums(self, sites: Mapping[str, int | None]) -> None:
        """Sites that are plain sums over tokens -> the axis that tensor parallelism splits."""

    def add(self, what: str, layer: int, sums: Tensor) -> None:
        """Add to the plain sums of a layer, of any shape."""

    def at_the_end(self, undo: Callable[[], None]) -> None:
        """Call `undo` when nothing is observed any more."""

    def see(self, what: str, layer: int, value: Tensor) -> None:
        """Add an observation `[s, b, n]` of a layer to the site `what`."""
