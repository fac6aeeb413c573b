"""Scores -> orders: which unit goes where, so that a child's kept units are the most important ones.

`order[new] == old`, over all units of a dim with the groups flattened (what `slicing.permute` takes); a dim within
another one has an order `[units of that, units]`, by their old places. Units never leave
their group, except those whose groups mean nothing (FFN neurons): they are ranked over the whole layer and DEALT, rank
r to group `r mod G`, so that the first k / G of every group are exactly the best k. Ties keep the order they have, so
that sorting twice changes nothing. Depth is ranked from most to least important layer.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..space.dims import DEALT_DIMS, KIND_OF_DIM, WITHIN, dim_groups, score_shape
from ..space.layout import ParamLayout

Widths = Mapping[str, Mapping[int, Tensor]]  # dim -> layer -> score per unit; hidden_size: layer L is the final norm
Orders = dict[int | None, dict[str, Tensor]]  # layer (None: outside the stack) -> dim -> order


def group_order(scores: Tensor, groups: int) -> Tensor:
    """Order of `[units]` by falling score inside each of `groups` equal groups."""
    grid = scores.view(groups, -1)
    inside = grid.argsort(dim=1, descending=True, stable=True)
    return (inside + torch.arange(groups)[:, None] * grid.shape[1]).flatten()


def dealt_order(scores: Tensor, groups: int) -> Tensor:
    """Order of `[units]` ranked as a whole and dealt: rank r becomes unit `r // groups` of group `r mod groups`."""
    hand = torch.arange(scores.numel()).view(groups, -1).t().flatten()  # hand[r]: the position that rank r is dealt to
    ranked = hand[scores[hand].argsort(descending=True, stable=True)]
    return ranked.view(-1, groups).t().flatten()


def hidden_scores(per_norm: Mapping[int, Tensor]) -> Tensor:
    """One score per channel `[h]` from those of every norm: their sum."""
    return torch.stack([per_norm[layer] for layer in sorted(per_norm)]).sum(0)


def width_orders(widths: Widths, layout: ParamLayout) -> Orders:
    """Orders of every dim that `widths` has scores for, by layer; each layer's entry has the hidden order too."""
    arch = layout.architecture
    groups = dim_groups(arch, layout.groups)
    shared = {}
    if widths.get("hidden_size"):
        shared["hidden_size"] = group_order(hidden_scores(widths["hidden_size"]), 1)
    orders: Orders = {None: dict(shared), **{layer: dict(shared) for layer in range(arch.num_layers)}}
    for dim in KIND_OF_DIM:
        rank = dealt_order if dim in DEALT_DIMS else group_order
        for layer, scores in widths.get(dim, {}).items():
            rows = [rank(row, groups[dim]) for row in (scores if dim in WITHIN else [scores])]
            orders[layer][dim] = torch.stack(rows) if dim in WITHIN else rows[0]
    return orders


def is_identity(orders: Orders) -> bool:
    """True when the parent is sorted already."""
    return all(
        torch.equal(order, torch.arange(order.shape[-1]).expand_as(order))
        for by_dim in orders.values()
        for order in by_dim.values()
    )


def random_orders(layout: ParamLayout, dims: Iterable[str], generator: torch.Generator) -> Orders:
    """Orders of the given dims as if every score were drawn at random: the baseline that a ranking has to beat."""
    arch, widths = layout.architecture, {}
    for dim in dims:
        layers = [0] if dim == "hidden_size" else arch.layers_of(KIND_OF_DIM[dim])
        widths[dim] = {layer: torch.rand(score_shape(arch, dim), generator=generator) for layer in layers}
    return width_orders(widths, layout)


def depth_ranking(
    removed: Sequence[int], scores: Mapping[int, float], protected: Sequence[int] = ()
) -> tuple[int, ...]:
    """Layers from most to least important: survivors by falling score (protected ones first), then `removed` reversed.

    Args:
        removed: layers in the order of their removal.
        scores: the last known score of every layer that was not removed. Ties: the earlier layer is more important.
    """
    left = [layer for layer in scores if layer not in removed]
    best_first = sorted(left, key=lambda layer: (layer not in protected, -scores[layer], layer))
    return (*best_first, *reversed(removed))
