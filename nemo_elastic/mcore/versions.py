"""The one door to what differs between lines of megatron-core; all else of Megatron is imported where it is used.

| here | 0.15 | 0.16 | 0.17 | 0.18, 0.19 |
|---|---|---|---|---|
| `HybridModel` | `models.mamba.MambaModel` | same | same | `models.hybrid.hybrid_model.HybridModel` |
| `HybridStack`, `StackSubmodules` | `ssm.mamba_block` | same | same | `models.hybrid.hybrid_block` |
| `transformer_engine_spec()` | `mamba_stack_spec` | same | same | `hybrid_stack_spec` |
| `layer_pattern()`, `pattern_of()` | `hybrid_override_pattern` | same | `hybrid_layer_pattern` | same |
| `conv_parameters()`, `parameter_name()` | `conv1d.weight`, ... | same | same | 0.19: `conv1d_weight`, ... |
| `mlp_arguments()` | none | none | none | `pg_collection`, `is_mtp_layer` |
| `checkpoint_writing()` | `_get_write_results_queue` | same | another way | another way |
| `build_optimizer()` | `no_weight_decay_cond`, ... | `config_overrides` | same | same |

`kernels` is the mixer's module, whose scan and convolution are called by their names in it: the method around them is
called `ssm_training` in 0.15 and `_ssm_training` later. Checkpoint keys are the same in all of them, and `.metadata` is
written as torch's own class, which every line reads. The mixer's gated norm is marked as split over tensor-parallel
ranks by `layer_specs.Mixer`, since 0.15 leaves that out. docs/engine.md says what was run with which line. Names of
Megatron that NeMo's side of the package passes on are re-exported here, so that only `mcore` imports Megatron.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import megatron.core
from megatron.core import optimizer as optimizers
from megatron.core.activations import squared_relu
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.ssm import mamba_mixer as kernels
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import nn

from ..problems import Problem, ProblemsError

__all__ = [
    "AsyncCallsQueue",
    "AttnBackend",
    "DistributedDataParallelConfig",
    "HybridModel",
    "HybridStack",
    "OptimizerConfig",
    "StackSubmodules",
    "build_optimizer",
    "checkpoint_writing",
    "conv_parameters",
    "installed",
    "kernels",
    "layer_pattern",
    "mlp_arguments",
    "parameter_name",
    "pattern_of",
    "squared_relu",
    "transformer_engine_spec",
]

TESTED = ("0.15.3", "0.16.1")  # the last is the default
ParameterCondition = Callable[[str, nn.Parameter], bool]


def installed() -> str:
    """The version of megatron-core that is imported."""
    return megatron.core.__version__


def first_of(*places: tuple[str, str]) -> Any:
    """The first (module, name) that this line has; 0.18 keeps some old names as wrappers, so newer places go first.

    Raises:
        ImportError: none is there; or one is, and cannot be imported for a reason of its own, which is the error's.
    """
    for module, name in places:
        place = f"megatron.core.{module}"
        try:
            found = importlib.import_module(place)
        except ModuleNotFoundError as error:
            if not f"{place}.".startswith(f"{error.name}."):
                raise  # the module is there: what it imports is not
            continue
        if hasattr(found, name):
            return getattr(found, name)
    names = " nor ".join(f"{module}.{name}" for module, name in places)
    raise ImportError(f"megatron-core {installed()} has neither {names}; install megatron-core=={TESTED[-1]}")


# The hybrid language model (embedding, stack, output layer), its stack, and the stack's table of layer specs.
HybridModel: type[nn.Module] = first_of(("models.hybrid.hybrid_model", "HybridModel"), ("models.mamba", "MambaModel"))
HybridStack: type[nn.Module] = first_of(
    ("models.hybrid.hybrid_block", "HybridStack"), ("ssm.mamba_block", "MambaStack")
)
StackSubmodules: type = first_of(
    ("models.hybrid.hybrid_block", "HybridStackSubmodules"), ("ssm.mamba_block", "MambaStackSubmodules")
)
_PATTERNS = ("hybrid_layer_pattern", "hybrid_override_pattern")


def transformer_engine_spec() -> ModuleSpec:
    """Megatron's own spec of the hybrid stack, with Transformer Engine's fused norm and linear."""
    return first_of(
        ("models.hybrid.hybrid_layer_specs", "hybrid_stack_spec"),
        ("models.mamba.mamba_layer_specs", "mamba_stack_spec"),
    )


def layer_pattern(pattern: str) -> dict[str, str]:
    """The keyword argument of `HybridModel` that carries the layer pattern, such as `M-M*`."""
    accepted = inspect.signature(HybridModel.__init__).parameters
    return {next(name for name in _PATTERNS if name in accepted): pattern}


def pattern_of(model: nn.Module) -> str:
    """The layer pattern that a built model was given; empty where it has none."""
    return next((value for name in _PATTERNS if (value := getattr(model, name, None))), "")


def checkpoint_writing() -> ModuleType:
    """Megatron's module of the processes that write checkpoints, whose results come by a queue in the supported lines.

    Raises:
        ImportError: this line hands results over in another way.
    """
    module = importlib.import_module("megatron.core.dist_checkpointing.strategies.filesystem_async")
    if not hasattr(module, "_get_write_results_queue"):
        raise ImportError(f"megatron-core {installed()} writes checkpoints otherwise; install {TESTED[-1]}")
    return module


def conv_parameters(mixer: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    """Weight `[x+B+C, 1, d_conv]` and bias `[x+B+C]` of a mixer's causal convolution (per tensor-parallel rank)."""
    if hasattr(mixer, "conv1d_weight"):
        return mixer.conv1d_weight, mixer.conv1d_bias
    return mixer.conv1d.weight, mixer.conv1d.bias


def parameter_name(name: str) -> str:
    """A parameter's name in a checkpoint, which every line has, from its name in the installed line's model."""
    return re.sub(r"\bconv1d_(weight|bias)$", r"conv1d.\1", name)


def mlp_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of an MLP, from what a transformer layer hands to any class but Megatron's own MLP."""
    kept = {name: value for name, value in given.items() if name not in ("pg_collection", "is_mtp_layer")}
    return kept | ({"tp_group": given["pg_collection"].tp} if "pg_collection" in given else {})


def build_optimizer(
    config: OptimizerConfig,
    modules: Sequence[nn.Module],
    *,
    no_weight_decay_cond: ParameterCondition | None = None,
    scale_lr_cond: ParameterCondition | None = None,
    lr_mult: float = 1.0,
    use_gloo_process_groups: bool = True,
) -> Any:
    """Megatron's optimizer of DDP-wrapped modules, with the parameters that two conditions name in groups of their own.

    Args:
        no_weight_decay_cond: (name, parameter) -> whether its group has `wd_mult` 0; None: vectors and biases.
        scale_lr_cond: (name, parameter) -> whether its group has `lr_mult`; None: no parameter.

    Groups carry `wd_mult` and `lr_mult`, by which a checkpoint finds them again, and are not yet multiplied by them.

    Raises:
        ProblemsError: from `refuse_unread_settings`.
    """
    refuse_unread_settings(config, no_weight_decay_cond)
    conditions = {
        "no_weight_decay_cond": no_weight_decay_cond,
        "scale_lr_cond": scale_lr_cond,
        "lr_mult": lr_mult,
    }
    if "config_overrides" in inspect.signature(optimizers.get_megatron_optimizer).parameters:
        conditions = {"config_overrides": _overrides(config, **conditions)}
    return optimizers.get_megatron_optimizer(
        config, list(modules), use_gloo_process_groups=use_gloo_process_groups, **conditions
    )


def refuse_unread_settings(config: OptimizerConfig, no_weight_decay_cond: ParameterCondition | None) -> None:
    """Settings of single groups in `config` that no line would follow here.

    `decoupled_lr` and `decoupled_min_lr` become a group's `max_lr` and `min_lr`, which only Megatron's own scheduler
    reads: under NeMo's the embeddings would be trained at `lr`. `apply_wd_to_qk_layernorm` (since 0.16) is one choice
    of the parameters without weight decay, and a condition is another.

    Raises:
        ProblemsError: naming each such setting.
    """
    found = [
        Problem(
            f"optimizer.config.{name}",
            f"{value} is read by Megatron's scheduler only, and NeMo's are used here; give the embeddings' rate by "
            "scale_lr_cond and lr_mult, as a multiple of lr",
        )
        for name in ("decoupled_lr", "decoupled_min_lr")
        if (value := getattr(config, name, None)) is not None
    ]
    if no_weight_decay_cond is not None and getattr(config, "apply_wd_to_qk_layernorm", False):
        words = "True and no_weight_decay_cond both say which parameters have weight decay; take one of them"
        found.append(Problem("optimizer.config.apply_wd_to_qk_layernorm", words))
    if found:
        raise ProblemsError(found)


def _overrides(
    config: OptimizerConfig,
    no_weight_decay_cond: ParameterCondition | None,
    scale_lr_cond: ParameterCondition | None,
    lr_mult: float,
) -> dict[Any, dict[str, float]]:
    """What the conditions say, as `ParamKey` -> `ParamGroupOverride`; a parameter takes those of all its keys."""

    def key(name: str, condition: ParameterCondition) -> Any:
        predicate = optimizers.ParamWithNamePredicate(name, lambda parameter, name: condition(name, parameter))
        return optimizers.ParamKey(with_name_predicate=predicate)

    if no_weight_decay_cond is None:
        found = dict(optimizers.get_standard_config_overrides(config))
    else:
        found = {key("no_weight_decay", no_weight_decay_cond): {"wd_mult": 0.0}}
    if scale_lr_cond is not None and lr_mult != 1.0:
        found[key("scaled_learning_rate", scale_lr_cond)] = {"lr_mult": lr_mult}
    return found
