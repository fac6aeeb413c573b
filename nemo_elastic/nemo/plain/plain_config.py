"""From the user's `model` fields to NeMo's configuration of a plain hybrid model.

The vocabulary of a model has one size, `model.vocab_size`, in every layout, but for what TP adds to divide it
(`mcore.kernels.padded_vocabulary`). NeMo pads the tokenizer's to

    ceil(v / (d TP)) d TP,    d = make_vocab_size_divisible_by

so d is set to `ceil(vocab_size / TP)`, which gives those rows whatever the tokenizer has.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal

import nemo.lightning as nl
import torch
from nemo.collections import llm

from nemo_elastic.mcore.kernels.layer_specs import attention_backend, have_transformer_engine, hybrid_stack_spec
from nemo_elastic.mcore.models.build import ACTIVATIONS
from nemo_elastic.nemo.plain import cpu, hybrid_config

Precision = Literal["32", "bf16-mixed"]

DTYPES: dict[str, torch.dtype] = {"32": torch.float32, "bf16-mixed": torch.bfloat16}
# Fused kernels of Transformer Engine and Apex; Megatron's own defaults assume them.
WITHOUT_GPU: dict[str, Any] = {
    "bias_dropout_fusion": False,
    "masked_softmax_fusion": False,
    "gradient_accumulation_fusion": False,
    "persist_layer_norm": False,
    "apply_rope_fusion": False,
    "cross_entropy_loss_fusion": False,
}


def plain_model_config(
    model: Mapping[str, Any],
    *,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    context_parallel_size: int = 1,
    expert_model_parallel_size: int = 1,
    sequence_parallel: bool = False,
    precision: Precision = "32",
    config_class: type[llm.SSMConfig] | None = None,
    **more: Any,
) -> llm.SSMConfig:
    """NeMo's config of a plain hybrid model on this machine.

    Args:
        model: `SSMConfig` fields by their own names, and `vocab_size`, the padded size of the embedding.
            `num_layers` follows from `hybrid_override_pattern`; `activation_func` may be a name of `ACTIVATIONS`.
        sequence_parallel: takes effect where `tensor_model_parallel_size` is above one, as it divides that axis.
        precision: of parameters and of what pipeline stages exchange.
        config_class: a subclass of `SSMConfig` to build instead (the elastic model's); None: what the model needs.
        more: further fields, stronger than `model` and than what a CPU needs.

    Raises:
        ValueError: for a field that `config_class` does not have, an unknown activation, and whatever Megatron itself
            refuses.
    """
    cpu.install()
    of_class = config_class or hybrid_config.config_class(model)
    given = hybrid_config.fields_of(model, of_class)
    vocab_size = given.pop("vocab_size")
    activation = given.get("activation_func", "squared_relu")
    if isinstance(activation, str) and activation not in ACTIVATIONS:
        raise ValueError(f"model.activation_func={activation!r} must be one of {', '.join(ACTIVATIONS)}")
    given["activation_func"] = ACTIVATIONS.get(activation, activation)
    dtype = DTYPES[precision]
    settings: dict[str, Any] = {
        "num_layers": len(given["hybrid_override_pattern"]),
        "is_hybrid_model": True,
        "make_vocab_size_divisible_by": -(-vocab_size // tensor_model_parallel_size),
        "tensor_model_parallel_size": tensor_model_parallel_size,
        "pipeline_model_parallel_size": pipeline_model_parallel_size,
        "context_parallel_size": context_parallel_size,
        "expert_model_parallel_size": expert_model_parallel_size,
        "sequence_parallel": sequence_parallel and tensor_model_parallel_size > 1,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "mamba_stack_spec": hybrid_stack_spec,
        "attention_backend": attention_backend(),
        "bias_activation_fusion": False,  # of an MLP that is not ours, for two activations only
    }
    settings |= given
    settings |= {} if have_transformer_engine() else WITHOUT_GPU
    settings |= more
    _refuse_unknown(settings, of_class)
    return of_class(**settings)


def _refuse_unknown(settings: Mapping[str, Any], config_class: type) -> None:
    known = [field.name for field in fields(config_class) if field.init]
    problems = []
    for name in settings.keys() - set(known):
        near = difflib.get_close_matches(name, known, n=1)
        problems.append(f"model.{name} is not a field of {config_class.__name__}" + (f"; {near[0]}?" if near else ""))
    if problems:
        raise ValueError("; ".join(sorted(problems)))


def check_vocabulary(config: llm.SSMConfig, tokenizer_vocab_size: int) -> int:
    """The padded vocabulary that NeMo will build for `config`: `model.vocab_size` and what TP adds to divide it.

    Raises:
        ValueError: when the tokenizer has more tokens than the model has rows.
    """
    padded = config.make_vocab_size_divisible_by * config.tensor_model_parallel_size
    built = nl.get_vocab_size(config, tokenizer_vocab_size, config.make_vocab_size_divisible_by)
    if built != padded:
        raise ValueError(
            f"the tokenizer has {tokenizer_vocab_size} tokens, more than model.vocab_size={padded}; "
            f"set model.vocab_size to {tokenizer_vocab_size} or more"
        )
    return padded
