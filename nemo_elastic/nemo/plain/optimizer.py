"""NeMo's optimizer module on every line of megatron-core that `mcore.versions` knows.

`MegatronOptimizerModule` of NeMo 2.7 hands `no_weight_decay_cond`, `scale_lr_cond` and `lr_mult` to Megatron, which has
taken `config_overrides` in their place since 0.16: there stock NeMo cannot build an optimizer. This module says the
same things through `mcore.versions.build_optimizer`, in the words of the installed line; all else is NeMo's. It has
NeMo's arguments and nothing of its own, so a checkpoint's context holds it as it holds NeMo's.
"""

from __future__ import annotations

from typing import Any

import nemo.lightning as nl
from nemo.core.optim import McoreDistributedOptimizer
from nemo.lightning.megatron_parallel import MegatronParallel
from nemo.utils import AppState

from nemo_elastic.mcore.versions import build_optimizer
from nemo_elastic.nemo.plain.optimizer_states import dealt


class NamedGroupsOptimizer(McoreDistributedOptimizer):
    """Megatron's optimizer as a torch one. Checkpoints say by `metadata` how its state is laid out in them."""

    def load_state_dict(self, state_dict: dict[Any, Any]) -> None:
        """A loaded state, whether or not experts were shared out by those who saved it."""
        chain = getattr(self.mcore_optimizer, "chained_optimizers", [self.mcore_optimizer])
        super().load_state_dict(dict(dealt(state_dict, chain)))

    def sharded_state_dict(
        self,
        model_sharded_state_dict: dict[str, Any],
        optimizer_state_dict: dict[str, Any] | None = None,
        is_loading: bool = False,
        sharding_type: str | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Megatron's own; NeMo's `sharding_type` is what `metadata` says in newer words."""
        return self.mcore_optimizer.sharded_state_dict(
            model_sharded_state_dict, is_loading=is_loading, metadata=metadata
        )


class OptimizerModule(nl.MegatronOptimizerModule):
    """`nl.MegatronOptimizerModule` whose groups are made in the words of the installed line.

    Its rate multiplies in `lr_mult` and its weight decay in `wd_mult`, as NeMo does for want of Megatron's scheduler.
    """

    def optimizers(self, model: MegatronParallel) -> list[NamedGroupsOptimizer]:
        """One optimizer of all modules.

        Raises:
            ValueError: `model` is not what `nl.MegatronStrategy` wraps a model in.
            ProblemsError: the configuration has a setting that nothing would follow.
        """
        if not isinstance(model, MegatronParallel):
            raise ValueError(f"{type(model).__name__} has no optimizer of Megatron: it must be a MegatronParallel")
        optimizer = build_optimizer(
            self.config,
            [chunk.module for chunk in model],
            no_weight_decay_cond=self.no_weight_decay_cond,
            scale_lr_cond=self.scale_lr_cond,
            lr_mult=self.lr_mult,
            use_gloo_process_groups=AppState().use_gloo_process_groups,
        )
        for group in optimizer.param_groups:
            apply_multipliers(group)
        gather_in_the_schedule(model)
        return [NamedGroupsOptimizer(optimizer)]


def gather_in_the_schedule(model: MegatronParallel) -> None:
    """Let the pipeline's schedule start the gathering of parameters where both of DDP's settings ask for it.

    Without a function to call it would start none ahead of time, and `align_param_gather` would be without effect.
    """
    ddp = model.ddp_config
    if getattr(ddp, "overlap_param_gather", False) and getattr(ddp, "align_param_gather", False):
        starts = [chunk.start_param_sync for chunk in model]
        for chunk in model:
            chunk.config.param_sync_func = starts if len(starts) > 1 else starts[0]


def apply_multipliers(group: dict[str, Any]) -> None:
    """Multiply a group's `lr` by its `lr_mult` and its `weight_decay` by its `wd_mult`, and rename both.

    The names (`pre_lr_mult`, `pre_wd_mult`) are NeMo's: Megatron finds the groups of a checkpoint again by them.
    """
    for value, multiplier in (("lr", "lr_mult"), ("weight_decay", "wd_mult")):
        if multiplier in group:
            group[f"pre_{multiplier}"] = group.pop(multiplier)
            group[value] *= group[f"pre_{multiplier}"]
