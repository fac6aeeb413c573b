"""What the last pipeline stage hands to the loss: final hidden states and the output layer, not logits.

At 49k tokens and 131k vocabulary one fp32 copy of the logits is 25.8 GB; the loss works output layer and KL off in
token chunks (`distill.fused`). Under sequence parallelism the hidden states are gathered here, and the gather's
backward reduces their gradient; else the loss does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor, nn

from ...config.sections import DistillConfig
from ...distill.fused import fused_kd_loss
from ...distill.hidden_loss import hidden_loss
from ...distill.losses import KDLoss, kd_loss
from ..elastic.linear import taken_view
from ..elastic.model import ElasticMambaModel, run_stack
from ..elastic.plan import Plan
from ..kernels.padded_vocabulary import masked, padding_of
from ..runtime.parallel import tensor_parallel_group


@dataclass(frozen=True)
class Head:
    """One lane's end.

    Attributes:
        hidden: `[s, b, k]`, after the final norm, all tokens.
        weight: `[v/tp, k]`.
        kept: channels that the lane keeps, or a weight per channel (soft).
        gathered: sequence parallelism gathered `hidden`: its gradient is reduced there.
        padding: how many of the rows of `weight`, the last ones, stand for no token.
    """

    hidden: Tensor
    weight: Tensor
    kept: int | Tensor
    gathered: bool
    padding: int = 0

    def logits(self) -> Tensor:
        """`[s, b, v/tp]`."""
        x = self.hidden if self.gathered else copy_to_tensor_model_parallel_region(self.hidden)
        return masked(F.linear(x, self.weight), self.padding)

    def detached(self) -> Head:
        """The same as a teacher."""
        return replace(self, hidden=self.hidden.detach(), weight=self.weight.detach())


@dataclass(frozen=True)
class Heads:
    """Students (one per budget of the micro-batch), and the teacher of each, where its loss has one."""

    students: tuple[Head, ...]
    teachers: tuple[Head | None, ...]


def student_head(model: ElasticMambaModel, hidden: Tensor, plan: Plan | None) -> Head:
    """The head of an elastic model's final hidden states `[s, b, k]` (`[s/tp, b, k]`)."""
    sliced = plan is not None and plan.mode == "sliced"
    weight = taken_view(model.output_weight(), model.layout.output_spec, plan.outer.sizes if sliced else {})
    kept: int | Tensor = model.config.hidden_size
    if plan is not None and plan.soft:
        mask = plan.outer.value(plan.values, "hidden_size")
        kept = kept if mask is None else mask
    elif plan is not None:
        kept = plan.subnet.hidden_size
    return _head(model, hidden, weight, kept)


def teacher_head(model: nn.Module, ids: Tensor, position_ids: Tensor | None) -> Head | Tensor:
    """Head of a plain model on its last stage; the hidden states for the next stage elsewhere."""
    x = model.embedding(input_ids=ids, position_ids=position_ids) if model.pre_process else None
    hidden = run_stack(model, x)
    if not model.post_process:
        return hidden
    return _head(model, hidden, _output_weight(model), model.config.hidden_size)


def cached_head(model: nn.Module, hidden: Tensor) -> Head:
    """Head of hidden states `[s, b, h]` that a cache has kept; of all tokens whatever the layout."""
    weight = _output_weight(model)
    return Head(
        hidden.to(weight.device, non_blocking=True),
        weight,
        model.config.hidden_size,
        bool(model.config.sequence_parallel),
        padding_of(model),
    )


def _output_weight(model: nn.Module) -> Tensor:
    tied = model.share_embeddings_and_output_weights
    return model.shared_embedding_or_output_weight() if tied else model.output_layer.weight


def _head(model: nn.Module, hidden: Tensor, weight: Tensor, kept: int | Tensor) -> Head:
    gathered = bool(model.config.sequence_parallel)
    if gathered:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
    return Head(hidden, weight, kept, gathered, padding_of(model))


def head_loss(student: Head, teacher: Head | None, config: DistillConfig, *, labels: Tensor, mask: Tensor) -> KDLoss:
    """The distillation loss of one lane; sums over tokens.

    Args:
        labels, mask: `[b, s]`.
    """
    group, labels, mask = tensor_parallel_group(), labels.t(), mask.t()
    if config.fuse_output_layer:
        loss = fused_kd_loss(
            student.hidden,
            student.weight,
            None if teacher is None else teacher.hidden,
            None if teacher is None else teacher.weight,
            config,
            labels=labels,
            mask=mask,
            group=group,
            reduce_hidden_gradient=not student.gathered,
            padding=student.padding,
        )
    else:
        logits = None if teacher is None else teacher.logits()
        loss = kd_loss(student.logits(), logits, config, labels=labels, mask=mask, group=group)
    if not config.hidden_weight:
        return loss
    own = student.hidden
    if student.gathered and group is not None:  # every rank has this loss, and the gather's backward sums over ranks
        share = own / group.size()
        own = share + (own - share).detach()
    distance = hidden_loss(own, teacher.hidden, student.kept, mask)
    return replace(loss, total=loss.total + config.hidden_weight * distance, hidden=distance.detach())


def no_hidden(loss: KDLoss) -> Tensor:
    """The hidden-state loss for the log; zero when there is none."""
    return torch.zeros_like(loss.kd) if loss.hidden is None else loss.hidden
