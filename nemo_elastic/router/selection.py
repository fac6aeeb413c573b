"""From probabilities to what a forward needs: the chosen subnet, soft masks, straight-through gates.

    soft:  mask_u = sum_i pi_i [u < k_i]            for unit u of EVERY group, k_i = choice_i / groups
    hard:  mask of the chosen size, times a gate whose value is 1 and whose gradient is that of pi_chosen

With one-hot pi the soft mask IS the hard mask. A layer's soft gate is the probability that depth keeps it.

Nothing here waits for a GPU: what a space's choices mean is made once per device, and a choice goes there unpinned and
`non_blocking`, which CUDA stages before it returns.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..space.choices import Selection, kept_by_depth
from ..space.dims import DEPTH
from ..space.elastic_space import ElasticSpace


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
        index = indices_on(selection[name], p.device)
        found[name] = torch.zeros_like(p).scatter_(-1, index[:, None], 1.0)
    return found


def indices_on(values: Sequence[int], device: torch.device) -> Tensor:
    """A few integers on `device`, without waiting for it."""
    return torch.tensor(values).to(device, non_blocking=True)


def straight_through(value: Tensor, surrogate: Tensor) -> Tensor:
    """`value` in the forward, exactly; the gradient of `surrogate` in the backward."""
    return value.detach() + (surrogate - surrogate.detach())


def expected_sizes(space: ElasticSpace, probabilities: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Expected units kept per dim, `[rows]`."""
    return {n: p @ _constant(_row, tuple(space.dims[n].choices), like=p) for n, p in probabilities.items()}


def kept_layer_probabilities(space: ElasticSpace, probabilities: Mapping[str, Tensor]) -> Tensor:
    """P(layer is kept), `[L]`: the sum of the probabilities of the depths that keep it; 1 where depth is fixed."""
    count = space.architecture.num_layers
    if DEPTH not in probabilities:
        like = next(iter(probabilities.values()), None)
        return torch.ones(count) if like is None else like.new_ones(count)
    pi = probabilities[DEPTH][0]
    return pi @ depth_matrix(space, pi)


def depth_matrix(space: ElasticSpace, like: Tensor) -> Tensor:
    """`[depth choices, L]`, 1 where that depth keeps that layer; in the dtype and on the device of `like`."""
    kept = tuple(map(tuple, kept_by_depth(space)))
    return _constant(_kept_layers, kept, space.architecture.num_layers, like=like)


def prefix_masks(space: ElasticSpace, name: str, like: Tensor) -> Tensor:
    """`[choices, units of one group]`, row i is 1 on the first `choice_i / groups` units."""
    dim = space.dims[name]
    kept = tuple(size // dim.groups for size in dim.choices)
    return _constant(_prefixes, kept, dim.full // dim.groups, like=like)


def _row(values: tuple[int, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _kept_layers(kept: tuple[tuple[int, ...], ...], layers: int) -> Tensor:
    return torch.tensor([[float(layer in row) for layer in range(layers)] for row in kept])


def _prefixes(kept: tuple[int, ...], units: int) -> Tensor:
    return torch.arange(units) < torch.tensor(kept)[:, None]


def _constant(make: Callable[..., Tensor], *arguments: object, like: Tensor) -> Tensor:
    return _made_once(make, arguments, like.dtype, like.device)


@lru_cache(maxsize=256)
def _made_once(make: Callable[..., Tensor], arguments: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    # A tensor made in inference mode could not take part in a later training step.
    with torch.inference_mode(False), torch.no_grad():
        return make(*arguments).to(device, dtype)


def soft_masks(space: ElasticSpace, probabilities: Mapping[str, Tensor]) -> SoftMasks:
    """Differentiable masks of one group's units, in the form `slicing.unit_mask` takes: the same on every rank."""
    masks = {n: pi @ prefix_masks(space, n, pi) for n, pi in probabilities.items() if n != DEPTH}
    return SoftMasks(masks, kept_layer_probabilities(space, probabilities))


def straight_through_gates(space: ElasticSpace, probabilities: Mapping[str, Tensor], selection: Selection) -> Gates:
    """Gates for a chosen (possibly repaired) selection: exactly 1, carrying the gradient of its probabilities."""
    gates = {}
    for name, pi in probabilities.items():
        if name != DEPTH:
            chosen = pi.gather(-1, indices_on(selection[name], pi.device)[:, None])[:, 0]
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
