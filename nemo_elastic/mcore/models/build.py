"""Plain and elastic Megatron models from an `Architecture`, and whole weights in and out of them, without NeMo.

What a rank holds follows from the process groups that Megatron has initialised: its pipeline stage's layers and its
tensor-parallel shard, by the parameter table.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from ...config.function_fields import arithmetic_of, beyond_stock
from ...config.model_fields import architecture_of
from ...kinds import flags, kinds_of, sizes
from ...kinds.axis import Groups
from ...space.architecture import Architecture
from ...space.dims import DEFAULT_FFN_GROUPS
from ...space.layout import ParamLayout
from ...space.slicing import shard, unshard
from ..elastic.model import ElasticMambaModel
from ..elastic.spec import elastic_stack_spec
from ..kernels.hybrid_config import HybridConfig
from ..kernels.kind_modules import megatron_pattern
from ..kernels.layer_specs import attention_backend, hybrid_stack_spec, local_stack_spec
from ..kernels.plain_model import PlainModel
from ..kernels.positions import position_arguments
from ..versions import HybridModel, layer_pattern, parameter_name, squared_relu

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "squared_relu": squared_relu,
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
}


def transformer_config(model: Architecture | Mapping[str, Any], **more: Any) -> HybridConfig:
    """Megatron's config of a model, for the layout that is initialised.

    Args:
        model: a `model` section, of which all that decides the function is taken; an `Architecture` is one of sizes.
        more: any field, stronger than what follows from `model`.
    """
    architecture = sizes_of(model)
    settings: dict[str, Any] = {
        "num_layers": architecture.num_layers,
        "hidden_size": architecture.hidden_size,
        **{name: value or None for name, value in _sizes(architecture).items()},
        "is_hybrid_model": True,
        "normalization": "RMSNorm",
        **{flag: getattr(architecture, flag) for flag in flags()},
        **arithmetic(model),
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "context_parallel_size": parallel_state.get_context_parallel_world_size(),
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
        # Stages exchange [s, b, k] of any k; Megatron refuses that beside its default MoE dispatcher even without MoE.
        "variable_seq_lengths": True,
        "moe_token_dispatcher_type": "alltoall",
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": False,
        "bias_activation_fusion": False,
        "apply_rope_fusion": False,
        "attention_backend": attention_backend(),
    }
    dtype = more.get("params_dtype", torch.float32)
    return HybridConfig(**(settings | {"pipeline_dtype": dtype} | more))


def _sizes(architecture: Architecture) -> dict[str, int]:
    """Sizes that Megatron has a field for, and is told."""
    there = {size for kind in kinds_of(architecture.hybrid_override_pattern) for size in kind.sizes}
    told = (size for size in sizes() if not size.fixed and (size in there or not size.none_if_absent))
    return {size.name: getattr(architecture, size.name) for size in told}


def sizes_of(model: Architecture | Mapping[str, Any]) -> Architecture:
    """The architecture of a model section."""
    return model if isinstance(model, Architecture) else architecture_of(model)


def arithmetic(model: Architecture | Mapping[str, Any]) -> dict[str, Any]:
    """Fields of Megatron's config for what a model section says of the function beside its sizes."""
    said = arithmetic_of({} if isinstance(model, Architecture) else model)
    return said | {"activation_func": ACTIVATIONS[said["activation_func"]]}


def build_plain_model(
    model: Architecture | Mapping[str, Any],
    config: TransformerConfig | None = None,
    *,
    local: bool = False,
    **more: Any,
) -> HybridModel:
    """The stock Megatron model of this rank (no elastic class in it); a `PlainModel` where Megatron's cannot say it.

    Args:
        local: Megatron's own linears even where Transformer Engine is installed.
        model, config, more: as of `transformer_config`.
    """
    config = config or transformer_config(model, **more)
    architecture, size = sizes_of(model), config.tensor_model_parallel_size
    pattern = architecture.hybrid_override_pattern
    spec = local_stack_spec(pattern) if local else hybrid_stack_spec(config, pattern)
    arguments = _model_arguments(architecture)
    if architecture.vocab_size % size:
        layout = ParamLayout(architecture, ffn_groups=size, tp_size=size)  # its vocabulary alone is asked for
        return PlainModel(config, spec, layout=layout, vocab_size=layout.padded_vocab_size, **arguments)
    arguments["vocab_size"] = architecture.vocab_size
    if beyond_stock(vars(config)):
        return PlainModel(config, spec, **arguments)
    return HybridModel(config, spec, **arguments, **position_arguments(config))


def build_elastic_model(
    model: Architecture | Mapping[str, Any],
    config: TransformerConfig | None = None,
    *,
    ffn_groups: int | Groups = DEFAULT_FFN_GROUPS,
    local: bool = False,
    **more: Any,
) -> ElasticMambaModel:
    """The elastic model of this rank; its parameters have the plain model's names and shapes. `local`: as above."""
    config, architecture = config or transformer_config(model, **more), sizes_of(model)
    layout = ParamLayout(
        architecture,
        ffn_groups=ffn_groups,
        tp_size=config.tensor_model_parallel_size,
        ep_size=config.expert_model_parallel_size,
    )
    spec = elastic_stack_spec(pattern=architecture.hybrid_override_pattern, local=local)
    return ElasticMambaModel(
        config, spec, layout=layout, vocab_size=layout.padded_vocab_size, **_model_arguments(architecture)
    )


def _model_arguments(architecture: Architecture) -> dict[str, Any]:
    return {
        "max_sequence_length": 1 << 20,
        **layer_pattern(megatron_pattern(architecture.hybrid_override_pattern)),
        "pre_process": parallel_state.is_pipeline_first_stage(),
        "post_process": parallel_state.is_pipeline_last_stage(),
        "share_embeddings_and_output_weights": architecture.share_embeddings_and_output_weights,
    }


def named_global_parameters(model: nn.Module, layout: ParamLayout) -> Iterator[tuple[str, nn.Parameter]]:
    """(canonical name with the GLOBAL layer number, parameter) of what this rank holds, but for a router."""
    model = unwrapped(model)
    numbers = {i: layer.layer_number - 1 for i, layer in enumerate(model.decoder.layers)}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if parts[0] == "router":
            continue
        if parts[:2] == ["decoder", "layers"]:
            parts[2] = str(numbers[int(parts[2])])
        name = ".".join(parts)
        if name == "output_layer.weight" and layout.architecture.share_embeddings_and_output_weights:
            name = "embedding.word_embeddings.weight"  # the last stage's copy of the tied weight
        yield layout.canonical_name(parameter_name(name)), parameter


def unwrapped(model: nn.Module) -> nn.Module:
    """The language model inside DDP, Float16Module or NeMo's wrapper."""
    while not hasattr(model, "decoder"):
        model = model.module
    return model


def of_this_rank(architecture: Architecture, ffn_groups: int | Groups) -> ParamLayout:
    """The table of a rank's shard at the layout that is initialised."""
    return ParamLayout(
        architecture,
        ffn_groups=ffn_groups,
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        ep_size=parallel_state.get_expert_model_parallel_world_size(),
    )


def model_parallel_ranks() -> tuple[int, int]:
    """This rank's numbers among tensor- and among expert-parallel ranks, which say what of a parameter it holds."""
    return parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_expert_model_parallel_rank()


@torch.no_grad()
def load_weights(
    model: nn.Module, whole: Any, architecture: Architecture, *, ffn_groups: int | Groups = DEFAULT_FFN_GROUPS
) -> None:
    """Copy whole tensors into this rank's shards.

    Args:
        whole: a `TensorReader` (`read(name)`) or a mapping, by canonical name.
    """
    layout, ranks = of_this_rank(architecture, ffn_groups), model_parallel_ranks()
    read = whole.__getitem__ if isinstance(whole, Mapping) else whole.read
    for name, parameter in named_global_parameters(model, layout):
        spec = layout.table[name]
        value = shard(read(name), spec, *ranks)
        if value.shape != parameter.shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, the model needs {tuple(parameter.shape)}")
        parameter.copy_(value)


def whole_tensors(
    parts: Iterable[tuple[str, Tensor]], layout: ParamLayout, *, tp_group: Any = None
) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor) from every model-parallel rank's parts (weights or gradients); collective over TP and EP."""
    for name, part in parts:
        spec, whole = layout.table[name], part
        if layout.tp_size > 1:
            whole = unshard(_gathered(part, tp_group or parallel_state.get_tensor_model_parallel_group()), spec)
        if spec.is_shared_out:
            whole = unshard(_gathered(whole, parallel_state.get_expert_model_parallel_group()), spec, experts=True)
        yield name, whole


def _gathered(part: Tensor, group: Any) -> list[Tensor]:
    shards = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(group.size())]
    torch.distributed.all_gather(shards, part.contiguous(), group=group)
    return shards
