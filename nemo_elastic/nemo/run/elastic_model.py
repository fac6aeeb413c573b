"""The elastic family as a NeMo model: its config builds student, router and teacher, its losses distil.

    loss of a micro-batch = sum over its budgets of share (KD(student, teacher) + budget loss of the router)

(the whole network's own loss is `DistillConfig.of_full`).

The plan of a micro-batch is put into the batch by `ElasticCallback` and handed to the forward; nothing is global.
Everything the config holds is plain data, so that NeMo can write it into a checkpoint's `context/`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from nemo.collections import llm
from nemo.lightning.megatron_parallel import MegatronLossReduction
from torch import Tensor

from nemo_elastic.config import load_values
from nemo_elastic.config.sections import DistillConfig, RunConfig
from nemo_elastic.family import Family, family_of
from nemo_elastic.mcore.elastic.spec import elastic_stack_spec
from nemo_elastic.mcore.family.family_model import FamilyModel
from nemo_elastic.mcore.family.heads import Heads, head_loss, no_hidden
from nemo_elastic.mcore.family.planner import Planned
from nemo_elastic.mcore.models.build import build_plain_model, load_weights
from nemo_elastic.mcore.models.parents import sorted_parent
from nemo_elastic.mcore.runtime import process_groups
from nemo_elastic.mcore.runtime.parallel import data_parallel_group, over_context
from nemo_elastic.nemo.plain.hybrid_config import HybridSSMConfig, model_arguments
from nemo_elastic.nemo.run.start_weights import start_reader
from nemo_elastic.router.model import Router
from nemo_elastic.space.layout import ParamLayout


def elastic_forward_step(model: llm.MambaModel, batch: Mapping[str, Any]) -> Any:
    """Students and teacher on one micro-batch, by the plans in `batch["elastic"]`.

    The wrapped Megatron model is called directly: the signature of NeMo's own forward is closed.
    """
    planned: Sequence[Planned] = batch["elastic"]
    return model.module(
        input_ids=batch["tokens"],
        position_ids=batch["position_ids"],
        attention_mask=None,
        elastic=[p.plan for p in planned],
        distill=True,
        cached=batch.get("teacher"),
        budgets=[p.budget for p in planned],
    )


@dataclass
class ElasticSSMConfig(HybridSSMConfig):
    """NeMo's hybrid config plus what makes it a family.

    `run` are the plain values of a `RunConfig`; `sorted_parent` is the folder that `sort` wrote (weights, ranking).
    """

    run: dict = field(default_factory=dict)
    sorted_parent: str = ""
    forward_step_fn: Callable = elastic_forward_step
    # Megatron then sums gradients of parameters marked `pipeline_parallel` (the router's) over the stages.
    has_cond_embedder: bool = True

    def configure_model(
        self, tokenizer: Any, pre_process: bool | None = None, post_process: bool | None = None, vp_stage: Any = None
    ) -> FamilyModel:
        """Student of the parent's size with the sorted weights, its router, and the teacher if the loss has one."""
        run = self.run_config()
        parent = sorted_parent(self.sorted_parent)
        family = self.family()
        layout = ParamLayout(
            family.architecture,
            ffn_groups=family.space.groups,
            tp_size=self.tensor_model_parallel_size,
            ep_size=self.expert_model_parallel_size,
        )
        spec = elastic_stack_spec(self.hybrid_override_pattern)
        arguments = model_arguments(self, tokenizer, pre_process, post_process)
        model = FamilyModel(self, spec, layout=layout, **arguments)
        teacher = build_plain_model(family.architecture, config=self) if run.distill.builds_parent else None
        readers = {model: start_reader(run, parent)} | ({} if teacher is None else {teacher: parent.reader})
        for module, reader in readers.items():
            load_weights(module, reader, family.architecture, ffn_groups=family.space.groups)
            module.to(dtype=self.params_dtype)
        process_groups.barrier()  # ranks read a large parent at their own pace
        names = family.learned
        router = Router(family.space, names, run.router, seed=run.train.seed) if names else None
        model.attach(router, teacher, self_taught=run.distill.self_taught)
        return model

    def run_config(self) -> RunConfig:
        """The run as a configuration."""
        return load_values(self.run)

    def family(self) -> Family:
        """The family, with the ranking that the sorted parent carries."""
        return family_of(self.run_config(), sorted_parent(self.sorted_parent).depth_ranking)


@dataclass(frozen=True)
class BudgetStats:
    """What one step saw of a budget, over all data-parallel ranks: means per token, and tokens.

    `micro_batches` are counted on every context-parallel rank of a replica.
    """

    kd: float
    ce: float
    tokens: int
    budget_loss: float
    hidden: float = 0.0
    micro_batches: int = 0


class ElasticLossReduction(MegatronLossReduction):
    """Distillation losses of a micro-batch's students plus their budget losses; per-budget sums for the log."""

    FIELDS = ("total", "share", "kd", "ce", "hidden", "tokens", "budget_loss", "micro_batches")

    def __init__(
        self, config: DistillConfig, budgets: tuple[str, ...], budget_loss: Callable[[Planned], Tensor | None]
    ) -> None:
        super().__init__()
        self.config, self.budgets, self.budget_loss = config, budgets, budget_loss
        self.stats: dict[str, BudgetStats] = {}

    def forward(self, batch: Mapping[str, Any], forward_out: Heads) -> tuple[Tensor, dict[str, Tensor]]:
        """(this rank's part of the mean loss per token, per-budget sums).

        Two results: Megatron multiplies such a loss by the context-parallel size, so that its mean over ranks is the
        sum of their parts. Of three, sum and tokens, it would take each rank's own mean: a mask makes them unequal.
        """
        labels, mask = batch["labels"], batch["loss_mask"]
        sums = mask.new_zeros(len(self.budgets), len(self.FIELDS), dtype=torch.float32)
        whole, tokens = mask.new_zeros((), dtype=torch.float32), mask.float().sum()
        for planned, student, teacher in zip(batch["elastic"], forward_out.students, forward_out.teachers, strict=True):
            config = self.config.of_full if planned.plan is None else self.config
            loss = head_loss(student, teacher, config, labels=labels, mask=mask)
            extra = self.budget_loss(planned)
            total = loss.total if extra is None else loss.total + extra.to(loss.total) * tokens
            total = planned.weight * total
            whole = whole + total
            none = tokens.new_zeros(())
            budget = none if extra is None else extra
            row = (total, planned.weight * tokens, loss.kd, loss.ce, no_hidden(loss), tokens, budget, none + 1)
            stacked = torch.stack([v.detach().float().reshape(()).to(sums) for v in row])
            sums[self.budgets.index(planned.budget)] += stacked
        return whole / over_context(tokens).clamp(min=1), {"sums": sums}

    def reduce(self, losses_reduced_per_micro_batch: list[dict[str, Tensor]]) -> Tensor:
        """Mean loss per token of the step; per-budget numbers stay in `stats`."""
        sums = torch.stack([x["sums"] for x in losses_reduced_per_micro_batch]).sum(0)
        torch.distributed.all_reduce(sums, group=data_parallel_group())
        rows = zip(self.budgets, sums.tolist(), strict=True)
        named = {name: dict(zip(self.FIELDS, row, strict=True)) for name, row in rows}
        self.stats = {
            name: BudgetStats(
                kd=row["kd"] / row["tokens"],
                ce=row["ce"] / row["tokens"],
                tokens=int(row["tokens"]),
                budget_loss=row["budget_loss"] / row["micro_batches"],
                hidden=row["hidden"] / row["tokens"],
                micro_batches=int(row["micro_batches"]),
            )
            for name, row in named.items()
            if row["tokens"]  # a micro-batch of masked samples may have none
        }
        return sums[:, 0].sum() / sums[:, 1].sum().clamp(min=1e-6)


class ElasticMambaModel(llm.MambaModel):
    """NeMo's hybrid model whose training loss distils a family. `budget_loss` is set by `ElasticCallback`."""

    budget_loss: Callable[[Planned], Tensor | None] = staticmethod(lambda planned: None)

    @property
    def training_loss_reduction(self) -> ElasticLossReduction:
        """One object per run, so that callbacks can read the last step's per-budget numbers."""
        if not hasattr(self, "_training_reduction"):
            run = self.config.run_config()
            self._training_reduction = ElasticLossReduction(
                run.distill, tuple(run.elastic.budgets), lambda planned: self.budget_loss(planned)
            )
        return self._training_reduction
