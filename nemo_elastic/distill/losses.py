"""Distillation from logits: KL of teacher and student, cross entropy mixed in, a loss mask, a split vocabulary.

    total = sum over tokens of mask (kd_weight KD + ce_weight CE)

Hand-written autograd: tokens are worked off in chunks in fp32, the gradient is made in the forward and is the only
tensor of the logits' size that exists besides the logits (the plain formula keeps about five). Nothing is gathered over
the vocabulary. The formulas are in `token_losses`.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..config.sections import AUTO, DistillConfig
from .token_losses import TopTokens, check, chunk_loss

CHUNK_TOKENS = {"cpu": 256, "gpu": 2048}  # below 2048 the output layer's products do not fill a GPU
CPU_CHUNK_ELEMENTS = 1 << 18  # three fp32 buffers of 1 MB stay in a core's cache
SPLIT_CHUNK_ELEMENTS = 1 << 20  # over several ranks, fewer and longer chunks: each costs two small all-reduces


@dataclass(frozen=True)
class KDLoss:
    """Sums over the unmasked tokens, fp32 scalars. Only `total` carries a gradient; the parts are for the log."""

    total: Tensor
    kd: Tensor
    ce: Tensor
    tokens: Tensor
    hidden: Tensor | None = None  # distance of the final hidden states, where it is part of the loss

    @property
    def mean(self) -> Tensor:
        """`total` per unmasked token."""
        return self.total / self.tokens.clamp_min(1)


def kd_loss(
    student: Tensor,
    teacher: Tensor | TopTokens | None,
    config: DistillConfig,
    *,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> KDLoss:
    """Loss of a batch of logits.

    Args:
        student: `[..., v/tp]`, any floating dtype; its leading axes are the tokens, in any order.
        teacher: `[..., v/tp]`, or its `TopTokens` `[tokens, k]` (`distill.loss=topk_kl` only), or None with a
            `kd_weight` of 0: cross entropy alone.
        labels: global token ids over the same tokens; needed when `ce_weight` is not 0.
        mask: weight per token, same shape; None counts every token.
        group: the tensor-parallel group that the vocabulary is split over.

    Raises:
        ValueError: shapes that do not match, a missing label, a teacher that does not fit the loss.
    """
    check(config)
    tokens = student.shape[:-1]
    flat = student.reshape(-1, student.shape[-1])
    if isinstance(teacher, Tensor):
        if teacher.shape != student.shape:
            raise ValueError(f"teacher logits {tuple(teacher.shape)} must have the student's {tuple(student.shape)}")
        teacher = teacher.detach().reshape(-1, teacher.shape[-1])
    elif teacher is None:
        check_no_teacher(config)
    elif config.loss != "topk_kl":
        raise ValueError(f"distill.loss={config.loss} needs the teacher's logits; its top tokens do for topk_kl only")
    weights, labels = token_inputs(config, tokens, labels, mask, student.device)
    total, kd, ce = _ChunkedLoss.apply(flat, teacher, labels, weights, config, group)
    return KDLoss(total, kd, ce, weights.sum())


def check_no_teacher(config: DistillConfig) -> None:
    """Refuse a loss that compares with a teacher which is not there."""
    if config.kd_weight:
        raise ValueError(f"distill.kd_weight={config.kd_weight} needs a teacher")


def token_inputs(
    config: DistillConfig, tokens: torch.Size, labels: Tensor | None, mask: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Flat fp32 weights and labels `[tokens]`, their shapes checked."""
    for name, given in (("labels", labels), ("mask", mask)):
        if given is not None and given.shape != tokens:
            raise ValueError(f"{name} {tuple(given.shape)} must have the logits' leading axes {tuple(tokens)}")
    if config.ce_weight and labels is None:
        raise ValueError(f"distill.ce_weight={config.ce_weight} needs labels")
    weights = torch.ones(tokens, device=device) if mask is None else mask
    return weights.reshape(-1).float(), None if labels is None else labels.reshape(-1)


def chunk_length(config: DistillConfig, vocabulary: int, device: torch.device, *, split: bool) -> int:
    """Tokens per chunk: `chunk_tokens` at most, on a CPU fewer, so that the buffers stay in cache."""
    wanted = wanted_chunk(config, device)
    if device.type != "cpu":
        return wanted
    elements = SPLIT_CHUNK_ELEMENTS if split else CPU_CHUNK_ELEMENTS
    return max(1, min(wanted, elements // vocabulary))


def wanted_chunk(config: DistillConfig, device: torch.device) -> int:
    """`distill.chunk_tokens`, by device where it is `auto`."""
    if config.chunk_tokens != AUTO:
        return int(config.chunk_tokens)
    return CHUNK_TOKENS["cpu" if device.type == "cpu" else "gpu"]


def part(teacher: Tensor | TopTokens | None, rows: slice, buffer: Tensor) -> Tensor | TopTokens | None:
    """A chunk of the teacher that may be destroyed."""
    if teacher is None:
        return None
    if isinstance(teacher, TopTokens):
        return TopTokens(teacher.log_probabilities[rows].float(), teacher.index[rows])
    return buffer[: rows.stop - rows.start].copy_(teacher[rows])


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, labels, weights, config, group):
        count, vocabulary = student.shape
        length = chunk_length(config, vocabulary, student.device, split=group is not None)
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(student, memory_format=torch.contiguous_format) if wanted else None
        in_place = wanted and gradient.dtype == torch.float32
        buffers = [
            student.new_empty(min(length, count), vocabulary, dtype=torch.float32) for _ in range(2 if in_place else 3)
        ]
        kd, ce = student.new_zeros((), dtype=torch.float64), student.new_zeros((), dtype=torch.float64)
        for begin in range(0, count, length):
            rows = slice(begin, min(begin + length, count))
            size = rows.stop - begin
            own = gradient[rows] if in_place else buffers[2][:size]
            own.copy_(student[rows])
            chunk_labels = None if labels is None else labels[rows]
            chunk_teacher = part(teacher, rows, buffers[0])
            kd_rows, ce_rows = chunk_loss(
                own, chunk_teacher, chunk_labels, weights[rows], config, group, buffers[1][:size]
            )
            if wanted and not in_place:
                gradient[rows] = own
            kd += (kd_rows * weights[rows]).sum(dtype=torch.float64)
            ce += (ce_rows * weights[rows]).sum(dtype=torch.float64)
        ctx.gradient = gradient
        total = (config.kd_weight * kd + config.ce_weight * ce).float()
        kd, ce = kd.float(), ce.float()
        ctx.mark_non_differentiable(kd, ce)
        return total, kd, ce

    @staticmethod
    def backward(ctx, grad_total, grad_kd, grad_ce):
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise RuntimeError("the distillation loss frees its gradient in the backward: it cannot run twice")
        return gradient.mul_(grad_total.to(gradient.dtype)), None, None, None, None, None
