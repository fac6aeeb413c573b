"""Stops a run before an optimizer step that would spoil it, and says where the numbers broke.

Looked at after every backward: the step's loss (on the last stage) and the norms of all gradients. Every rank comes to
the same verdict (one small all-reduce), so none is left waiting; the error leaves `trainer.fit`, nothing is saved.
"""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import torch

from nemo_elastic.mcore.family.gradients import gradient_norms, hand_norm, last_bad_gradient
from nemo_elastic.mcore.family.not_finite import first_bad_output
from nemo_elastic.mcore.models.build import unwrapped
from nemo_elastic.mcore.runtime.parallel import data_parallel_rank_and_size
from nemo_elastic.nemo.plain.open_saves import finish_open_saves
from nemo_elastic.problems import Problem, ProblemsError

REMEDY = "lower train.optimizer.lr or router.lr, or train in fp32, and go on with --resume"


class FiniteGuard(pl.Callback):
    """Measures gradient norms before every optimizer step; a NaN or Inf ends the run.

    Attributes:
        norms: (model, router) of the last step.
    """

    def __init__(self) -> None:
        self.norms = [0.0, 0.0]
        self.batches: list[dict[str, Any]] = []
        self.loss, self.shape = 0.0, (0, 0)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """A new step."""
        self.batches, self.loss = [], 0.0

    def on_megatron_microbatches_start(self, step: Any) -> None:
        """The shape of the step's micro-batches."""
        self.shape = (step.micro_batch_size, step.seq_length)

    def on_megatron_microbatch_start(self, step: Any, batch: dict[str, Any], forward_callback: Any) -> None:
        """Keep the micro-batches of the step: token ids and plans, to look at again if need be."""
        if "elastic" in batch:
            self.batches.append(batch)

    def on_megatron_reduce_microbatches_end(self, step: Any, reduced: torch.Tensor, **_: Any) -> None:
        """The step's loss; the last stage alone has one."""
        self.loss = float(reduced["loss"] if isinstance(reduced, dict) else reduced)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """Gradients are complete and nothing has been changed by them. The optimizer clips by what is measured here.

        Raises:
            ProblemsError: on every rank, with step, budget and layer.
        """
        norms = gradient_norms(pl_module.module, optimizer.mcore_optimizer)
        fine = (norms.isfinite().all() & math.isfinite(self.loss)).to(norms)
        torch.distributed.all_reduce(fine, op=torch.distributed.ReduceOp.MIN)
        *self.norms, all_fine = torch.cat([norms, fine[None]]).tolist()  # the one wait
        if not all_fine:
            finish_open_saves(trainer)  # every rank is here
            raise ProblemsError([Problem(f"step {trainer.global_step + 1}", self._words(pl_module))])
        hand_norm(optimizer.mcore_optimizer, math.hypot(*self.norms))

    def _words(self, pl_module: pl.LightningModule) -> str:
        rank, size = data_parallel_rank_and_size()
        cases = []
        for i, batch in enumerate(self.batches):
            cases += [(i * size + rank, one.budget, batch, one.plan) for one in batch["elastic"]]
        bad = first_bad_output(pl_module.module, cases, self.shape)
        if bad is not None:
            weights = f"; its {', '.join(bad.weights)} is not finite" if bad.weights else ""
            where = f"budget {bad.budget} (micro-batch {bad.micro_batch}): the output of {bad.module}"
            return f"{where} has a NaN or Inf{weights}. Nothing was changed or saved by this step; {REMEDY}"
        gradients: list[str | None] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(gradients, last_bad_gradient(unwrapped(pl_module.module)))
        named = next((g for g in reversed(gradients) if g), None)
        budgets = ", ".join(sorted({budget for _, budget, _, _ in cases}))
        where = f"the gradient of {named}" if named else "the distillation loss (all outputs are finite)"
        return f"budgets {budgets}: {where} has a NaN or Inf. Nothing was changed or saved by this step; {REMEDY}"
