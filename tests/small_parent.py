"""A small parent with every kind of layer, and random children of it, for tests of the elastic core (no torch)."""

import random
from dataclasses import replace
from typing import Any

from nemo_elastic.space.architecture import Architecture
from nemo_elastic.space.dims import KIND_OF_DIM, PER_LAYER_DIMS, WIDTH_DIMS, dim_groups, least_size, present_dims
from nemo_elastic.space.elastic_space import ElasticSpace
from nemo_elastic.space.subnet import Subnet

FFN_GROUPS = 4
PATTERN = "M-M*M-*-"
SMALL = {
    "hidden_size": 48,
    "ffn_hidden_size": 64,
    "num_attention_heads": 12,
    "num_query_groups": 4,
    "kv_channels": 8,
    "mamba_num_heads": 12,
    "mamba_head_dim": 8,
    "mamba_num_groups": 4,
    "mamba_state_dim": 8,
    "vocab_size": 64,
}


def architecture(pattern: str = PATTERN, **more: Any) -> Architecture:
    return Architecture(hybrid_override_pattern=pattern, **(SMALL | more))


def space_of(arch: Architecture, ffn_groups: int = FFN_GROUPS) -> ElasticSpace:
    return ElasticSpace(architecture=arch, ffn_groups=ffn_groups)


def child_architecture(arch: Architecture, subnet: Subnet) -> Architecture:
    """The plain architecture of a child with uniform widths."""
    widths = {n: getattr(subnet, n) for n in WIDTH_DIMS}
    assert all(subnet.is_uniform(n) for n in WIDTH_DIMS)
    sizes = {n: (w[0] if w else getattr(arch, n)) if isinstance(w, tuple) else w for n, w in widths.items()}
    return replace(arch, **sizes, hybrid_override_pattern=child_pattern(arch, subnet))


def child_pattern(arch: Architecture, subnet: Subnet) -> str:
    return "".join(arch.hybrid_override_pattern[i] for i in subnet.layers)


def random_subnet(space: ElasticSpace, rng: random.Random, *, per_layer: bool = False) -> Subnet:
    """A legal subnet, any size of any dim and any kept layers."""
    arch, groups = space.architecture, dim_groups(space.architecture, space.ffn_groups)
    sizes: dict[str, Any] = {}
    for name in present_dims(arch):
        rows = len(arch.layers_of(KIND_OF_DIM[name])) if per_layer and name in PER_LAYER_DIMS else 1
        step, least = groups[name], -(-least_size(arch, name) // groups[name])
        row = [step * rng.randint(least, getattr(arch, name) // step) for _ in range(rows)]
        sizes[name] = row if per_layer and name in PER_LAYER_DIMS else row[0]
    layers = sorted(rng.sample(range(arch.num_layers), rng.randint(1, arch.num_layers)))
    return space.subnet(**sizes, layers=layers)
