"""NeMo's hybrid configuration for models that its own `SSMConfig` cannot say, or says and does not build.

Scaled rotary positions and multipliers have no field there, `qk_layernorm` has one that the stock stack ignores, and a
tied output layer one that the stock `configure_model` does not hand on. A context that names this class is opened by a
NeMo with this package, and by no other: never silently as another function.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemo.collections import llm
from nemo.lightning import get_vocab_size

from nemo_elastic.config.function_fields import OWN, beyond_stock
from nemo_elastic.mcore.kernels.hybrid_config import BeyondStock
from nemo_elastic.mcore.kernels.kind_modules import megatron_pattern
from nemo_elastic.mcore.kernels.layer_specs import hybrid_stack_spec
from nemo_elastic.mcore.kernels.plain_model import PlainModel
from nemo_elastic.mcore.runtime.parallel import stage_ends
from nemo_elastic.mcore.versions import layer_pattern


@dataclass
class HybridSSMConfig(BeyondStock, llm.SSMConfig):
    """`SSMConfig` and `BeyondStock`; its model is a `PlainModel`."""

    def configure_model(
        self, tokenizer: Any, pre_process: bool | None = None, post_process: bool | None = None, vp_stage: Any = None
    ) -> PlainModel:
        """The plain model of this rank."""
        spec = hybrid_stack_spec(self, self.hybrid_override_pattern)
        return PlainModel(self, spec, **model_arguments(self, tokenizer, pre_process, post_process))


def model_arguments(
    config: llm.SSMConfig, tokenizer: Any, pre_process: bool | None, post_process: bool | None
) -> dict[str, Any]:
    """What a hybrid model of NeMo's is built with on this rank, beside its configuration and spec."""
    first, last = stage_ends()
    return {
        "vocab_size": get_vocab_size(config, tokenizer.vocab_size, config.make_vocab_size_divisible_by),
        "max_sequence_length": config.seq_length,
        **layer_pattern(megatron_pattern(config.hybrid_override_pattern)),
        "share_embeddings_and_output_weights": config.share_embeddings_and_output_weights,
        "pre_process": first if pre_process is None else pre_process,
        "post_process": last if post_process is None else post_process,
    }


def config_class(model: Mapping[str, Any]) -> type[llm.SSMConfig]:
    """The class of a plain model section: NeMo's own wherever that builds the same function."""
    tied = bool(model.get("share_embeddings_and_output_weights"))
    return HybridSSMConfig if tied or beyond_stock(model) else llm.SSMConfig


def fields_of(model: Mapping[str, Any], of_class: type[llm.SSMConfig]) -> dict[str, Any]:
    """The section's fields that the class has; what is left out has its default (`beyond_stock`)."""
    return {n: v for n, v in model.items() if n not in OWN or issubclass(of_class, BeyondStock)}
