"""From probabilities to what a forward needs: the chosen subnet, soft masks, straight-through gates.

    soft:  mask_u = sum_i pi_i [u < k_i]            for unit u of EVERY group, k_i = choice_i / groups
    hard:  mask of the chosen size, times a gate whose value is 1 and whose gradient is that of pi_chosen

With one-hot pi the soft mask IS the hard mask. A layer's soft gate is the probability that depth keeps it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..choices import Selection, kept_by_depth
from ..space import DEPTH, ElasticSpace


@dataclass(frozen=True)
class Gates:
    """Straight-through gates of a hard subnet: value 1, gradient of the chosen choice's probability.

    `dims[name]` is `[rows]` (1, or one per layer of the kind); `layers` is `[L]`: 1 where kept, 0 where dropped.
    """

    dims: Mapping[str, Tensor]
    layers: Tensor


@dataclass(frozen=True)
class SoftMasks:
    """`dims[name]` is `[rows, units of one group]`; `layers` is `[L]`, the probability of being kept."""

    dims: Mapping[str, Tensor]
    layers: Tensor


def argmax_selection(probabilities: Mapping[str, Tensor]) -> Selection:
    """Most probable choice per row; ties go to the larger size."""
    return {name: tuple(p.argmax(dim=-1).tolist()) for name, p in probabilities.items()}


def one_hot(selection: Selection, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A selection as probabilities of 0 and 1, shaped and typed as `like`."""
    found = {}
    for name, p in like.items():
        index = torch.tensor(selection[name], device=p.device)
        found[name] = torch.nn.functional.one_hot(index, p.shape[-1]).to(p)
    return found


def straight_through(value: Tensor, surrogate: Tensor) -> Tensor:
    """`value` in the forward, exactly; the gradient of `surrogate` in the backward."""
    return value.detach() + (surrogate - surrogate.detach())


def expected_sizes(space: ElasticSpace, probabilities: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Expected units kept per dim, `[rows]`."""
    return {
        n: p @ torch.tensor(space.dims[n].choices, dtype=p.dtype, device=p.device) for n, p in probabilities.items()
    }


def kept_layer_probabilities(space: ElasticSpace, probabilities: Mapping[str, Tensor]) -> Tensor:
    """P(layer is kept), `[L]`: the sum of the probabilities of the depths that keep it; 1 where depth is fixed."""
    count = space.architecture.num_layers
    if DEPTH not in probabilities:
        like = next(iter(probabilities.values()), None)
        return torch.ones(count) if like is None else like.new_ones(count)
    pi = probabilities[DEPTH][0]
    return pi @ depth_matrix(space, pi)


def depth_matrix(space: ElasticSpace, like: Tensor) -> Tensor:
    """`[depth choices, L]`, 1 where that depth keeps that layer."""
    matrix = like.new_zeros(len(space.dims[DEPTH].choices), space.architecture.num_layers, requires_grad=False)
    for row, kept in enumerate(kept_by_depth(space)):
        matrix[row, list(kept)] = 1
    return matrix


def prefix_masks(space: ElasticSpace, name: str, like: Tensor) -> Tensor:
    """`[choices, units of one group]`, row i is 1 on the first `choice_i / groups` units."""
    dim = space.dims[name]
    kept = torch.tensor([size // dim.groups for size in dim.choices], device=like.device)
    units = torch.arange(dim.full // dim.groups, device=like.device)
    return (units[None, :] < kept[:, None]).to(like)


def soft_masks(space: ElasticSpace, probabilities: Mapping[str, Tensor]) -> SoftMasks:
    """Differentiable masks of one group's units, in the form `slicing.unit_mask` takes: the same on every rank."""
    masks = {n: pi @ prefix_masks(space, n, pi) for n, pi in probabilities.items() if n != DEPTH}
    return SoftMasks(masks, kept_layer_probabilities(space, probabilities))


def straight_through_gates(space: ElasticSpace, probabilities: Mapping[str, Tensor], selection: Selection) -> Gates:
    """Gates for a chosen (possibly repaired) selection: exactly 1, carrying the gradient of its probabilities."""
    gates = {}
    for name, pi in probabilities.items():
        if name != DEPTH:
            index = torch.tensor(selection[name], device=pi.device)
            chosen = pi.gather(-1, index[:, None])[:, 0]
            gates[name] = straight_through(torch.ones_like(chosen), chosen)
    kept = kept_layer_probabilities(space, probabilities)
    hard = kept_layer_probabilities(space, one_hot(selection, probabilities))
    return Gates(gates, straight_through(hard, kept))


def straight_through_masks(space: ElasticSpace, probabilities: Mapping[str, Tensor], selection: Selection) -> SoftMasks:
    """Hard masks in the forward, the soft masks' gradient in the backward: more signal than gates, masked mode only."""
    hard = soft_masks(space, one_hot(selection, probabilities))
    soft = soft_masks(space, probabilities)
    dims = {name: straight_through(hard.dims[name], mask) for name, mask in soft.dims.items()}
    return SoftMasks(dims, straight_through(hard.layers, soft.layers))
