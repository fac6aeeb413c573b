"""Small spaces that the router's and the budgets' tests share."""

import torch

from nemo_elastic.space.architecture import Architecture
from nemo_elastic.space.choices import choice_shapes
from nemo_elastic.space.dims import ElasticDim, dim_groups, parent_size
from nemo_elastic.space.elastic_space import ElasticSpace
from nemo_elastic.space.layout import ParamLayout

ARCHITECTURE = Architecture(
    hybrid_override_pattern="M-M*-M-M*-M-",
    hidden_size=96,
    ffn_hidden_size=256,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=16,
    mamba_num_heads=16,
    mamba_head_dim=12,
    mamba_num_groups=4,
    mamba_state_dim=16,
    vocab_size=256,
)
CHOICES = {
    "hidden_size": (96, 80, 64, 48),
    "ffn_hidden_size": (256, 192, 128, 64),
    "mamba_num_heads": (16, 12, 8),
    "mamba_head_dim": (12, 8),
    "num_attention_heads": (8, 4),
    "num_layers": (12, 10, 8),
}
RANKING = (0, 11, 3, 9, 5, 1, 7, 2, 10, 4, 8, 6)


def make_space(*, per_layer: bool = False, choices=None) -> ElasticSpace:
    groups = dim_groups(ARCHITECTURE)
    layered = ("ffn_hidden_size", "mamba_num_heads", "num_attention_heads") if per_layer else ()
    dims = {
        name: ElasticDim(
            name=name,
            full=parent_size(ARCHITECTURE, name),
            groups=groups[name],
            choices=sizes,
            per_layer=name in layered,
        )
        for name, sizes in (choices or CHOICES).items()
    }
    return ElasticSpace(architecture=ARCHITECTURE, dims=dims, depth_ranking=RANKING)


def make_layout(tp_size: int = 1) -> ParamLayout:
    return ParamLayout(ARCHITECTURE, tp_size=tp_size)


def random_probabilities(space: ElasticSpace, seed: int, sharpness: float = 1.0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        name: torch.softmax(sharpness * torch.randn(shape, generator=g, dtype=torch.float64), -1)
        for name, shape in choice_shapes(space).items()
    }


def draw(probabilities: dict[str, torch.Tensor], g: torch.Generator) -> dict[str, tuple[int, ...]]:
    return {n: tuple(torch.multinomial(p, 1, generator=g)[:, 0].tolist()) for n, p in probabilities.items()}
