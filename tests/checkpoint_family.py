"""A small random nested family for the checkpoint tests: odd sizes, random norms, three budgets, no training."""

import json
from pathlib import Path

import torch

from nemo_elastic.checkpoint.manifest import Manifest
from nemo_elastic.config.model_fields import architecture_of
from nemo_elastic.space.budget import Budget
from nemo_elastic.space.dims import ElasticDim
from nemo_elastic.space.elastic_space import ElasticSpace
from nemo_elastic.space.layout import ParamLayout

TOKENIZER = Path(__file__).parent.parent / "nemo_elastic" / "assets" / "tiny_parent" / "tokenizer.json"
MODEL = {
    "hybrid_override_pattern": "M-M*-M*-",
    "hidden_size": 48,
    "ffn_hidden_size": 80,
    "num_attention_heads": 12,
    "num_query_groups": 4,
    "kv_channels": 8,
    "mamba_num_heads": 12,
    "mamba_head_dim": 8,
    "mamba_num_groups": 4,
    "mamba_state_dim": 16,
    "vocab_size": 2048,
    "seq_length": 64,
    "layernorm_epsilon": 1e-5,
}
RANKING = (0, 7, 3, 2, 1, 5, 6, 4)


def space(model: dict = MODEL) -> ElasticSpace:
    """The space with a measured-looking depth ranking."""
    arch = architecture_of(model)
    dims = {"hidden_size": ElasticDim(name="hidden_size", full=arch.hidden_size, groups=1, choices=(40, 32))}
    return ElasticSpace(architecture=arch, dims=dims, ffn_groups=8, depth_ranking=RANKING)


def manifest(model: dict = MODEL) -> Manifest:
    """Budgets full, large and small; small drops layers and cuts every width."""
    whole = space(model)
    subnets = {
        "full": whole.full_subnet(),
        "large": whole.subnet(hidden_size=40, ffn_hidden_size=56, mamba_num_heads=8, num_attention_heads=8),
        "small": whole.subnet(
            hidden_size=32,
            ffn_hidden_size=40,
            mamba_num_heads=8,
            mamba_head_dim=6,
            num_attention_heads=4,
            num_layers=6,
        ),
    }
    values = {"full": 1.0, "large": 0.75, "small": 0.5}
    budgets = {name: Budget(name=name, kind="fraction", value=value) for name, value in values.items()}
    return Manifest(model=model, space=whole, budgets=budgets, subnets=subnets, provenance={"seed": 7})


def random_weights(model: dict = MODEL, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Random tensors of every row, norms away from one, `A_log` as a model has it."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, spec in ParamLayout(architecture_of(model)).table.items():
        value = torch.randn(spec.shape({}), generator=generator) * 0.2
        if name.endswith(("norm.weight", "layernorm.weight")):
            value = 1 + value
        if name.endswith("A_log"):
            value = value.abs()
        weights[name] = value.to(dtype)
    return weights


def write_hf_parent(folder: Path, weights: dict[str, torch.Tensor], model: dict = MODEL) -> Path:
    """A Hugging Face folder made with safetensors' own library and hand-written names, for reading back."""
    from safetensors.torch import save_file

    heads, groups, d = model["num_attention_heads"], model["num_query_groups"], model["kv_channels"]
    per_group = heads // groups
    found = {}
    for name, value in weights.items():
        new = name.replace("decoder.layers.", "backbone.layers.").replace(
            "embedding.word_embeddings", "backbone.embeddings"
        )
        new = new.replace("decoder.final_norm", "backbone.norm_f").replace("output_layer", "lm_head")
        new = new.replace("input_layernorm", "norm").replace("pre_mlp_layernorm", "norm")
        new = new.replace("self_attention.linear_proj", "mixer.o_proj")
        new = new.replace("mlp.linear_fc1", "mixer.up_proj").replace("mlp.linear_fc2", "mixer.down_proj")
        if "linear_qkv" not in name:
            found[new] = value.clone()
            continue
        q, k, v = [], [], []
        for group in range(groups):
            start = group * (per_group + 2) * d
            q.append(value[start : start + per_group * d])
            k.append(value[start + per_group * d : start + (per_group + 1) * d])
            v.append(value[start + (per_group + 1) * d : start + (per_group + 2) * d])
        for letter, rows in (("q", q), ("k", k), ("v", v)):
            found[new.replace("self_attention.linear_qkv", f"mixer.{letter}_proj")] = torch.cat(rows)
    folder.mkdir(parents=True)
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": "nemotron_h",
        "hybrid_override_pattern": model["hybrid_override_pattern"],
        "num_hidden_layers": len(model["hybrid_override_pattern"]),
        "hidden_size": model["hidden_size"],
        "intermediate_size": model["ffn_hidden_size"],
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": d,
        "mamba_num_heads": model["mamba_num_heads"],
        "mamba_head_dim": model["mamba_head_dim"],
        "n_groups": model["mamba_num_groups"],
        "ssm_state_size": model["mamba_state_dim"],
        "conv_kernel": 4,
        "vocab_size": model["vocab_size"],
        "layer_norm_epsilon": 1e-5,
        "mlp_hidden_act": "relu2",
        "max_position_embeddings": model["seq_length"],
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder
