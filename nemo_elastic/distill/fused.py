"""Output layer and distillation loss in one, in token chunks: no `[s, b, v]` tensor of logits ever exists.

    total = sum mask (kd_weight KD(h_s W_s^T, h_t W_t^T) + ce_weight CE(h_s W_s^T))

At 49k tokens and 131k vocabulary one fp32 copy of the logits is 25.8 GB; here a chunk's logits are made, turned into
their gradient in place (`token_losses`), multiplied back onto hidden states and weight, and forgotten. Student and
teacher heads may have different hidden sizes. The heads are split over the vocabulary (`group`), hidden states are
whole on every rank.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from ..config.sections import DistillConfig
from .losses import KDLoss, check_no_teacher, token_inputs, wanted_chunk
from .token_losses import check, chunk_loss
from .vocab_parallel import sum_over


def fused_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    config: DistillConfig,
    *,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    reduce_hidden_gradient: bool = True,
    padding: int = 0,
) -> KDLoss:
    """`kd_loss` of the two output layers' logits.

    Args:
        student_hidden: `[..., k]`, after the final norm; every rank of `group` has all tokens.
        student_weight: `[v/tp, k]` (a prefix view of the parent's for a sliced child).
        teacher_hidden, teacher_weight: `[..., h]` and `[v/tp, h]`; no gradient. Both None with a `kd_weight` of 0.
        labels, mask, group: as in `kd_loss`.
        reduce_hidden_gradient: sum the hidden states' gradient over `group`, as a column-parallel layer does. False
            under sequence parallelism, where the gather before this loss reduces and scatters it.
        padding: rows at the end of this rank's weights that stand for no token: no probability, no gradient.

    Raises:
        ValueError: shapes that do not fit.
    """
    check(config)
    tokens = student_hidden.shape[:-1]
    _check_fit("student", student_hidden, student_weight)
    if teacher_hidden is None:
        check_no_teacher(config)
    else:
        _check_teacher(teacher_hidden, teacher_weight, tokens, student_weight.shape[0])
        teacher_hidden = teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1])
        teacher_weight = teacher_weight.detach()
    weights, labels = token_inputs(config, tokens, labels, mask, student_hidden.device)
    total, kd, ce = _FusedLoss.apply(
        student_hidden.reshape(-1, student_hidden.shape[-1]),
        student_weight,
        teacher_hidden,
        teacher_weight,
        labels,
        weights,
        config,
        group,
        reduce_hidden_gradient,
        padding,
    )
    return KDLoss(total, kd, ce, weights.sum())


def _check_fit(name: str, hidden: Tensor, weight: Tensor) -> None:
    if hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"{name} head {tuple(weight.shape)} does not fit hidden size {hidden.shape[-1]}")


def _check_teacher(hidden: Tensor, weight: Tensor, tokens: torch.Size, vocabulary: int) -> None:
    if hidden.shape[:-1] != tokens:
        raise ValueError(f"teacher hidden states {tuple(hidden.shape)} must be of the tokens {tuple(tokens)}")
    _check_fit("teacher", hidden, weight)
    if vocabulary != weight.shape[0]:
        raise ValueError(f"vocabularies differ: student {vocabulary}, teacher {weight.shape[0]}")


def _logits(hidden: Tensor, weight: Tensor, into: Tensor, padding: int) -> Tensor:
    """`hidden weight^T` in fp32; what goes in is in the weights' dtype, as the output layer's is."""
    _product(hidden, weight.t(), into)
    if padding:
        into[:, into.shape[1] - padding :] = NO_TOKEN
    return into


def _product(left: Tensor, right: Tensor, into: Tensor, *, add: bool = False) -> None:
    """`into = left right` (`add`: added to it), in fp32; what goes in is in the dtype of `right`, as in the layers.

    16-bit factors lie in tensor cores that sum in fp32. Where torch hands that sum out (CUDA, since 2.8) it goes
    straight to `into`; elsewhere it is rounded to 16 bits on the way and copied.
    """
    left = left.to(right.dtype)
    if right.dtype == into.dtype:
        torch.addmm(into, left, right, out=into) if add else torch.mm(left, right, out=into)
    elif _has_wide_products(right):
        wide = {"out_dtype": into.dtype, "out": into}
        torch.addmm(into, left, right, **wide) if add else torch.mm(left, right, **wide)
    else:
        product = torch.mm(left, right)
        into.add_(product) if add else into.copy_(product)


def _has_wide_products(factor: Tensor) -> bool:
    """Whether torch multiplies such factors with an fp32 result: CUDA's do (and `meta`, where this is tested)."""
    small, there = factor.dtype in (torch.bfloat16, torch.float16), factor.device.type in ("cuda", "meta")
    return small and there and "dtype_out" in torch.ops.aten.addmm.overloads()


NO_TOKEN = -1e30  # logit of a padded row; finite, so that a student's and a teacher's differ by 0
CPU_CHUNK_ELEMENTS = 1 << 22  # three fp32 buffers of 16 MB


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, teacher_hidden, teacher_weight, labels, weights, config, group, reduce, padding):
        count, vocabulary = hidden.shape[0], weight.shape[0]
        length = min(count, fused_chunk_length(config, vocabulary, hidden.device))
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden, dtype=torch.float32) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        needed = 2 if teacher_hidden is None else 3
        buffers = [hidden.new_empty(length, vocabulary, dtype=torch.float32) for _ in range(needed)]
        kd, ce = hidden.new_zeros((), dtype=torch.float64), hidden.new_zeros((), dtype=torch.float64)
        for begin in range(0, count, length):
            rows = slice(begin, min(begin + length, count))
            student, scratch, *others = (b[: rows.stop - begin] for b in buffers)
            _logits(hidden[rows], weight, student, padding)
            teacher = _logits(teacher_hidden[rows], teacher_weight, others[0], padding) if others else None
            own_labels = None if labels is None else labels[rows]
            kd_rows, ce_rows = chunk_loss(student, teacher, own_labels, weights[rows], config, group, scratch)
            # `student` now holds the logits' gradient
            gradient = student.to(weight.dtype) if weight.dtype == hidden.dtype else student  # rounded once for both
            if wants_hidden:
                _product(gradient, weight, grad_hidden[rows])
            if wants_weight:
                _product(gradient.t(), hidden[rows], grad_weight, add=True)
            kd += (kd_rows * weights[rows]).sum(dtype=torch.float64)
            ce += (ce_rows * weights[rows]).sum(dtype=torch.float64)
        if wants_hidden and reduce:
            sum_over(grad_hidden, group)
        ctx.gradients = (
            grad_hidden.to(hidden.dtype) if wants_hidden else None,
            grad_weight.to(weight.dtype) if wants_weight else None,
        )
        ctx.ran = False
        total = (config.kd_weight * kd + config.ce_weight * ce).float()
        kd, ce = kd.float(), ce.float()
        ctx.mark_non_differentiable(kd, ce)
        return total, kd, ce

    @staticmethod
    def backward(ctx, grad_total, grad_kd, grad_ce):
        if ctx.ran:
            raise RuntimeError("the fused distillation loss frees its gradients in the backward: it cannot run twice")
        ctx.ran, gradients, ctx.gradients = True, ctx.gradients, None
        scaled = [None if g is None else g.mul_(grad_total.to(g.dtype)) for g in gradients]
        return (*scaled, *(None,) * 8)


def fused_chunk_length(config: DistillConfig, vocabulary: int, device: torch.device) -> int:
    """Tokens per chunk. Matrix products want more rows than the element-wise passes alone, also on a CPU."""
    wanted = wanted_chunk(config, device)
    return wanted if device.type != "cpu" else max(1, min(wanted, CPU_CHUNK_ELEMENTS // vocabulary))
