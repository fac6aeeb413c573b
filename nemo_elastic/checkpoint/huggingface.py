"""Hugging Face's NemotronH: names, configuration, and folders in both directions, without `transformers`.

Names come from one table per kind of layer; all tensors are the same bytes on both sides except attention's fused
rows, which per query group are `[Q .. Q, K, V]` in Megatron and three tensors in Hugging Face.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..architecture import ATTENTION, MAMBA, MLP, Architecture
from ..config.model_fields import architecture_of, model_problems
from ..layout import ParamLayout
from ..problems import Problem, ProblemsError, raise_if_any
from .reader import LazyTensor, SafetensorsReader, TensorReader

PREFIXES = ("backbone.", "model.")
OUTER_NAMES = {
    "embedding.word_embeddings.weight": "backbone.embeddings.weight",
    "decoder.final_norm.weight": "backbone.norm_f.weight",
    "output_layer.weight": "lm_head.weight",
}
LAYER_NAMES: dict[str, dict[str, tuple[str, ...]]] = {
    MAMBA: {
        "norm.weight": ("norm.weight",),
        "mixer.in_proj.weight": ("mixer.in_proj.weight",),
        "mixer.conv1d.weight": ("mixer.conv1d.weight",),
        "mixer.conv1d.bias": ("mixer.conv1d.bias",),
        "mixer.dt_bias": ("mixer.dt_bias",),
        "mixer.A_log": ("mixer.A_log",),
        "mixer.D": ("mixer.D",),
        "mixer.norm.weight": ("mixer.norm.weight",),
        "mixer.out_proj.weight": ("mixer.out_proj.weight",),
    },
    ATTENTION: {
        "input_layernorm.weight": ("norm.weight",),
        "self_attention.linear_qkv.weight": ("mixer.q_proj.weight", "mixer.k_proj.weight", "mixer.v_proj.weight"),
        "self_attention.linear_proj.weight": ("mixer.o_proj.weight",),
    },
    MLP: {
        "pre_mlp_layernorm.weight": ("norm.weight",),
        "mlp.linear_fc1.weight": ("mixer.up_proj.weight",),
        "mlp.linear_fc2.weight": ("mixer.down_proj.weight",),
    },
}
BLOCK_TYPES = {MAMBA: "linear_attention", ATTENTION: "full_attention", MLP: "mlp"}
# Older spellings of the list that transformers has written.
KIND_OF_BLOCK = {name: kind for kind, name in BLOCK_TYPES.items()} | {"mamba": MAMBA, "attention": ATTENTION}
# model section <- config.json, where the value is the same.
CONFIG_FIELDS = {
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "mamba_num_heads": "mamba_num_heads",
    "mamba_head_dim": "mamba_head_dim",
    "mamba_num_groups": "n_groups",
    "mamba_state_dim": "ssm_state_size",
    "vocab_size": "vocab_size",
    "share_embeddings_and_output_weights": "tie_word_embeddings",
    "layernorm_epsilon": "layer_norm_epsilon",
    "seq_length": "max_position_embeddings",
    "init_method_std": "initializer_range",
    "hidden_dropout": "hidden_dropout",
    "attention_dropout": "attention_dropout",
}
# What NemotronH can only be: (model field, value that it must have, if given).
ONLY = {
    "normalization": "RMSNorm",
    "layernorm_zero_centered_gamma": False,
    "position_embedding_type": "none",
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "gated_linear_unit": False,
    "qk_layernorm": False,
    "softmax_scale": None,
}
ACTIVATIONS = {"squared_relu": "relu2", "relu": "relu", "gelu": "gelu", "silu": "silu"}


def hf_names(layout: ParamLayout, name: str) -> tuple[str, ...]:
    """Names on disk of one canonical tensor (three for attention's fused rows)."""
    spec = layout.table[name]
    if spec.layer is None:
        return (OUTER_NAMES[name],)
    suffix = name.split(".", 3)[3]
    return tuple(f"backbone.layers.{spec.layer}.{new}" for new in LAYER_NAMES[spec.kind][suffix])


def split_qkv(qkv: Tensor, architecture: Architecture) -> tuple[Tensor, Tensor, Tensor]:
    """Megatron's `[groups x (Q.. + K + V) x d, h]` to `[q d, h]`, `[kv d, h]`, `[kv d, h]`; q is the tensor's own."""
    grid = qkv.view(architecture.num_query_groups, -1, architecture.kv_channels, qkv.shape[1])
    return tuple(part.reshape(-1, qkv.shape[1]) for part in (grid[:, :-2], grid[:, -2], grid[:, -1]))


def merge_qkv(q: Tensor, k: Tensor, v: Tensor, architecture: Architecture) -> Tensor:
    """Inverse of `split_qkv`."""
    groups, d = architecture.num_query_groups, architecture.kv_channels
    grid = [part.reshape(groups, -1, d, q.shape[1]) for part in (q, k, v)]
    return torch.cat(grid, dim=1).reshape(-1, q.shape[1])


def hf_tensors(tensors: list[LazyTensor], layout: ParamLayout) -> Iterator[LazyTensor]:
    """The tensors of a plain model, described by its own `layout`, under Hugging Face's names."""
    arch = layout.architecture
    for tensor in tensors:
        names = hf_names(layout, tensor.name)
        if len(names) == 1:
            yield LazyTensor(names[0], tensor.dtype, tensor.shape, tensor.read)
            continue
        keys = arch.num_query_groups * arch.kv_channels
        rows = tensor.shape[0] - 2 * keys, keys, keys
        split = _SplitOnce(tensor, arch)
        for number, (name, count) in enumerate(zip(names, rows, strict=True)):
            yield LazyTensor(name, tensor.dtype, (count, tensor.shape[1]), lambda n=number, split=split: split.part(n))


class _SplitOnce:
    """Reads the fused tensor at the first part and drops it with the last."""

    def __init__(self, tensor: LazyTensor, architecture: Architecture) -> None:
        self._tensor, self._architecture = tensor, architecture
        self._parts: tuple[Tensor, ...] | None = None

    def part(self, number: int) -> Tensor:
        parts = self._parts or split_qkv(self._tensor.read(), self._architecture)
        self._parts = None if number == 2 else parts
        return parts[number]


def hf_config(model: Mapping[str, Any], dtype: torch.dtype, token_ids: Mapping[str, int | None]) -> dict[str, Any]:
    """config.json of a plain model section, for old and new readers alike.

    Raises:
        ProblemsError: the model has something that NemotronH cannot say.
    """
    arch = architecture_of(model)
    found = [
        Problem(f"model.{name}", f"{model[name]!r} cannot be said in Hugging Face's NemotronH, which has {value!r}")
        for name, value in ONLY.items()
        if model.get(name, value) != value
    ]
    activation = model.get("activation_func", "squared_relu")
    if activation not in ACTIVATIONS:
        found.append(Problem("model.activation_func", f"{activation!r} must be one of {', '.join(ACTIVATIONS)}"))
    raise_if_any(found)
    values = {**vars(arch), **{n: model[n] for n in CONFIG_FIELDS if n in model and n not in vars(arch)}}
    return {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "dtype": str(dtype).removeprefix("torch."),
        "torch_dtype": str(dtype).removeprefix("torch."),
        "hybrid_override_pattern": arch.hybrid_override_pattern,
        "layers_block_type": [BLOCK_TYPES[kind] for kind in arch.hybrid_override_pattern],
        "num_hidden_layers": arch.num_layers,
        **{theirs: values[ours] for ours, theirs in CONFIG_FIELDS.items() if ours in values},
        "mlp_hidden_act": ACTIVATIONS[activation],
        "mamba_hidden_act": "silu",
        "conv_kernel": arch.mamba_conv_kernel,
        "chunk_size": 128,
        "use_conv_bias": True,
        "use_bias": False,
        "mlp_bias": False,
        "attention_bias": False,
        "mamba_proj_bias": False,
        "residual_in_fp32": False,
        "use_cache": True,
        **token_ids,
    }


def model_from_hf(config: Mapping[str, Any]) -> dict[str, Any]:
    """The model section that a NemotronH config.json describes.

    Raises:
        ProblemsError: another kind of model, or one with parts that cannot be elastic here.
    """
    if config.get("model_type") != "nemotron_h":
        words = f"{config.get('model_type')!r} must be 'nemotron_h': no hybrid Mamba-attention model of this family"
        raise ProblemsError([Problem("config.json: model_type", words)])
    pattern = config.get("hybrid_override_pattern")
    blocks = config.get("layers_block_type") or config.get("layer_types")
    if blocks is not None:
        listed = "".join(KIND_OF_BLOCK.get(block, "E") for block in blocks)
        if pattern is not None and pattern != listed:
            words = f"{pattern} says other layers than layers_block_type, {listed}; one of them is stale"
            raise ProblemsError([Problem("config.json: hybrid_override_pattern", words)])
        pattern = listed
    model = {ours: config[theirs] for ours, theirs in CONFIG_FIELDS.items() if config.get(theirs) is not None}
    model["hybrid_override_pattern"] = pattern
    activation = {theirs: ours for ours, theirs in ACTIVATIONS.items()}.get(config.get("mlp_hidden_act", "relu2"))
    model["activation_func"] = activation
    switches = ("use_bias", "mlp_bias", "attention_bias", "mamba_proj_bias")
    found = [
        Problem(f"config.json: {n}", "true: parameters that no row of the table has") for n in switches if config.get(n)
    ]
    if activation is None:
        found.append(Problem("config.json: mlp_hidden_act", f"{config['mlp_hidden_act']!r} is not supported"))
    if config.get("conv_kernel", 4) != 4:
        found.append(Problem("config.json: conv_kernel", f"{config['conv_kernel']} must be 4, as Megatron has it"))
    if isinstance(model.get("ffn_hidden_size"), list):
        words = "is a list: a parent needs one size for all MLP layers"
        raise ProblemsError([*found, Problem("config.json: intermediate_size", words)])
    raise_if_any([*found, *model_problems(model)])
    return model


class HuggingFaceReader:
    """`TensorReader` over a NemotronH folder (config.json and safetensors), by canonical names.

    Args:
        folder: where it is; nothing is looked up on the hub.
        architecture: what the run's `model` section says; refused where config.json says otherwise.

    Raises:
        ProblemsError: no such folder, another kind of model, or tensors that no row of the table has.
    """

    def __init__(self, folder: str | Path, architecture: Architecture | None = None) -> None:
        self.folder = Path(folder)
        file = self.folder / "config.json"
        if not file.is_file():
            raise ProblemsError([Problem(str(self.folder), "has no config.json: no Hugging Face model folder")])
        try:
            self.config: dict[str, Any] = json.loads(file.read_text())
        except ValueError as error:
            raise ProblemsError([Problem(str(file), f"is no JSON ({error})")]) from error
        self.model = model_from_hf(self.config)
        self._architecture = architecture_of(self.model)
        if architecture is not None:
            raise_if_any(
                Problem(f"model.{name}", f"{wanted} is not what {file} has, {value}; use the parent's own")
                for (name, wanted), value in zip(
                    vars(architecture).items(), vars(self._architecture).values(), strict=True
                )
                if wanted != value
            )
        self._raw: TensorReader = SafetensorsReader(self.folder)
        on_disk = {_with_backbone(name): name for name in self._raw.names()}
        layout = ParamLayout(self._architecture, ffn_groups=1)
        self._sources: dict[str, tuple[str, ...]] = {}
        for name in layout.table:
            sources = tuple(on_disk.pop(theirs, "") for theirs in hf_names(layout, name))
            if all(sources):
                self._sources[name] = sources
        if self._architecture.share_embeddings_and_output_weights:
            on_disk.pop("lm_head.weight", None)
        lost = sorted(set(layout.table) - set(self._sources))
        found = [Problem(str(self.folder), f"lacks {', '.join(hf_names(layout, lost[0]))}")] if lost else []
        if on_disk:
            found.append(Problem(str(self.folder), f"has {min(on_disk)}, which config.json does not describe"))
        raise_if_any(found)

    def names(self) -> list[str]:
        """Canonical names, in the order of the forward."""
        return list(self._sources)

    def shape(self, name: str) -> tuple[int, ...]:
        """Whole shape (rows of q, k and v together)."""
        first, *rest = (self._raw.shape(source) for source in self._sources[name])
        return (first[0] + sum(shape[0] for shape in rest), *first[1:])

    def dtype(self, name: str) -> torch.dtype:
        """Dtype on disk."""
        return self._raw.dtype(self._sources[name][0])

    def read(self, name: str) -> Tensor:
        """The tensor; q, k and v are interleaved by query group."""
        parts = [self._raw.read(source) for source in self._sources[name]]
        return parts[0] if len(parts) == 1 else merge_qkv(*parts, self._architecture)


def _with_backbone(name: str) -> str:
    prefix = next((p for p in PREFIXES if name.startswith(p)), None)
    return name if prefix is None else "backbone." + name[len(prefix) :]
