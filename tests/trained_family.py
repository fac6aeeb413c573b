"""The shipped trained parent as a family of two budgets, as it is and driven to extremes, and real text for it.

Random weights are tame: their steps dt lie around 0.7, while half of a trained parent's are below 0.012, where one
engine clamps and another does not. `extreme_weights` spreads what a trained parent may hold over its whole range.
"""

import json
import pydoc
from functools import lru_cache
from pathlib import Path

import torch
from checkpoint_family import TOKENIZER
from safetensors.torch import load_file

from nemo_elastic.checkpoint.manifest import Manifest
from nemo_elastic.config.model_fields import architecture_of
from nemo_elastic.data.tokenizer import BPETokenizer
from nemo_elastic.serving import ElasticFamily
from nemo_elastic.space.budget import Budget
from nemo_elastic.space.dims import ElasticDim
from nemo_elastic.space.elastic_space import ElasticSpace

MODEL = json.loads((TOKENIZER.parent / "config.json").read_text())
WEIGHTS = ("trained", "extreme")
BUDGETS = ("full", "small")


def manifest(model: dict = MODEL) -> Manifest:
    """Budgets full and small; small drops layers and cuts every width."""
    arch = architecture_of(model)
    dims = {"hidden_size": ElasticDim(name="hidden_size", full=arch.hidden_size, groups=1, choices=(112, 96))}
    ranking = (0, 15, 1, 14, 2, 13, 5, 3, 12, 4, 11, 6, 10, 7, 9, 8)
    space = ElasticSpace(architecture=arch, dims=dims, ffn_groups=8, depth_ranking=ranking)
    sizes = {"hidden_size": 96, "ffn_hidden_size": 256, "mamba_num_heads": 8, "num_attention_heads": 8}
    subnets = {"full": space.full_subnet(), "small": space.subnet(num_layers=13, mamba_head_dim=12, **sizes)}
    budgets = {n: Budget(name=n, kind="fraction", value=v) for n, v in (("full", 1.0), ("small", 0.5))}
    return Manifest(model=model, space=space, budgets=budgets, subnets=subnets, provenance={"seed": 0})


def weights(kind: str) -> dict[str, torch.Tensor]:
    """Whole tensors by canonical name, fp32."""
    found = {name: value.float() for name, value in load_file(TOKENIZER.parent / "model.safetensors").items()}
    return extreme_weights(found) if kind == "extreme" else found


def extreme_weights(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Per Mamba layer: bare steps softplus(dt_bias) from 1e-6 to 10, decays A from 1e-3 to 60, D from -4 to 4, each in
    an order of its own over the heads; a quarter of every norm's weights ten times smaller, a quarter negative."""
    generator, changed = torch.Generator().manual_seed(3), dict(found)
    heads = MODEL["mamba_num_heads"]
    spread = {
        "dt_bias": torch.logspace(-6, 1, heads, dtype=torch.float64).expm1().log().float(),
        "A_log": torch.logspace(-3, 1.778, heads).log(),
        "D": torch.linspace(-4, 4, heads),
    }
    for name, value in found.items():
        last = name.rsplit(".", 1)[-1]
        if last in spread:
            changed[name] = spread[last][torch.randperm(heads, generator=generator)]
        elif name.endswith(("norm.weight", "layernorm.weight")):
            draw = torch.rand(value.shape, generator=generator)
            changed[name] = torch.where(draw < 0.25, value / 10, torch.where(draw > 0.75, -value, value))
    return changed


@lru_cache(maxsize=1)
def text(length: int = 1000) -> torch.Tensor:
    """The first tokens of a real file, `[1, length]`."""
    return torch.tensor([BPETokenizer().encode(Path(pydoc.__file__).read_text())[:length]])


def served(kind: str, budget: str, dtype: torch.dtype = torch.float64) -> ElasticFamily:
    """The family in memory, at a budget; in fp64 the reference that every engine's fp32 is held against."""
    found = manifest()
    family = ElasticFamily({n: w.to(dtype) for n, w in weights(kind).items()}, found.layout, MODEL, found.subnets)
    family.switch(budget)
    return family


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference over the largest value."""
    return float((got - wanted).abs().max() / wanted.abs().max())
