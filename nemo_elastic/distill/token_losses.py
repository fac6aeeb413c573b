"""The mathematics of one chunk of tokens: per-token losses, and the gradient left in the student's buffer.

With z_s, z_t the logits, T the temperature, p = softmax(z / T), l = logsumexp(z / T), every sum over the vocabulary:

    forward KL   T^2 sum p_t (log p_t - log p_s)                   dz_s = T (p_s - p_t)
    reverse KL   T^2 sum p_s (log p_s - log p_t)                   dz_s = T p_s (log p_s - log p_t - KL)
    top-k KL     forward KL over the teacher's k most likely tokens and ONE class for all others, Q = 1 - sum_k p:
                 T^2 [sum_k p_t (log p_t - log p_s) + Q_t (log Q_t - log Q_s)]
                                                                   dz_s = T (p_s - p_t) there,
                                                                   T p_s (1 - Q_t / Q_s) elsewhere
    CE           l_s - z_s[label] at T = 1                         dz_s = p_s - onehot(label)

The class for the rest keeps top-k a true KL: a lower bound of the full one, equal to it at k = v. Buffers are fp32 and
overwritten; the vocabulary may be split over `group` (`vocab_parallel`).
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..config.sections import DistillConfig
from .vocab_parallel import max_over, sum_over, top_k_over, world

KINDS = ("forward_kl", "reverse_kl", "topk_kl")


@dataclass(frozen=True)
class TopTokens:
    """A teacher's most likely tokens: log-probabilities (at the loss temperature) and global ids, `[n, k]`."""

    log_probabilities: Tensor
    index: Tensor


def check(config: DistillConfig) -> None:
    """Refuse a loss that is none of KINDS or a temperature that is not positive."""
    if config.loss not in KINDS:
        raise ValueError(f"distill.loss={config.loss!r} must be one of {', '.join(KINDS)}")
    if not config.temperature > 0:
        raise ValueError(f"distill.temperature={config.temperature} must be above 0")


def chunk_loss(
    student: Tensor,
    teacher: Tensor | TopTokens | None,
    labels: Tensor | None,
    weights: Tensor,
    config: DistillConfig,
    group: dist.ProcessGroup | None,
    scratch: Tensor,
) -> tuple[Tensor, Tensor]:
    """Per-token KD and CE (`[n]`, not weighted), and the weighted gradient of `kd_weight KD + ce_weight CE`.

    Args:
        student: logits `[n, v/tp]`, fp32; on return `weights x d(loss)/d(logits)`.
        teacher: logits `[n, v/tp]`, fp32, destroyed; or its top tokens; or None, when `kd_weight` is 0: KD is then 0.
        labels: global token ids `[n]`; needed when `ce_weight` is not 0.
        weights: `[n]`, multiplies the gradient (the loss mask).
        scratch: `[n, v/tp]`, fp32, destroyed.
    """
    temperature, mixed = config.temperature, config.ce_weight != 0
    apart = mixed and temperature != 1.0  # CE is at temperature 1, so its softmax is then another one
    separate = student.clone() if apart else None
    picked, owned, column = _label_logits(student, labels, group) if mixed else (None, None, None)
    if temperature != 1.0:
        student.div_(temperature)
        if isinstance(teacher, Tensor):
            teacher.div_(temperature)
    kd_scale = config.kd_weight * temperature
    ce_scale = config.ce_weight if mixed and not apart else 0.0
    terms = {"forward_kl": _forward_kl, "reverse_kl": _reverse_kl, "topk_kl": _top_k_kl}[config.loss]
    terms = _no_teacher if teacher is None else terms
    kd, lse = terms(student, teacher, weights, kd_scale, ce_scale, group, scratch, config)
    kd = kd * temperature**2
    if not mixed:
        return kd, torch.zeros_like(kd)
    if apart:
        lse, local_max, _ = _log_sum_exp(separate, group)
        separate.mul_((weights * config.ce_weight * torch.exp(local_max - lse))[:, None])
        student.add_(separate)
    student.scatter_add_(1, column[:, None], -(weights * config.ce_weight * owned)[:, None])
    return kd, lse - picked


def _label_logits(student: Tensor, labels: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
    """The label's logit `[n]` from whichever rank holds it; whether it is this one; its local column."""
    local = student.shape[-1]
    column = labels - world(group)[1] * local
    owned = ((column >= 0) & (column < local)).to(student.dtype)
    column = column.clamp(0, local - 1)
    picked = student.gather(1, column[:, None])[:, 0] * owned
    return sum_over(picked, group), owned, column


def _log_sum_exp(logits: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
    """`logits` becomes `exp(logits - local max)`; returns the global lse, the local maximum and the local sum."""
    local_max = logits.amax(dim=-1)
    total = logits.sub_(local_max[:, None]).exp_().sum(dim=-1)
    return _combine(local_max + total.log(), group), local_max, total


def _combine(local: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Global logsumexp from the ranks' local ones."""
    if group is None:
        return local
    highest = max_over(local.clone(), group)
    return highest + sum_over(torch.exp(local - highest), group).log()


def _row_dot(a: Tensor, b: Tensor) -> Tensor:
    """`sum_v a b` per row, without a temporary of the size of a."""
    return torch.bmm(a[:, None, :], b[:, :, None])[:, 0, 0]


def _exponentials(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both become `exp(z - local max)`; local maxima and sums, `[2, n]`, student first. Returns (maxima, sums, lse)."""
    maxima = torch.stack([student.amax(dim=-1), teacher.amax(dim=-1)])
    sums = torch.stack([z.sub_(m[:, None]).exp_().sum(dim=-1) for z, m in zip((student, teacher), maxima, strict=True)])
    return maxima, sums, maxima + sums.log()


def _combine_mean(local_lse: Tensor, local_mean: Tensor, under: int, group: dist.ProcessGroup | None) -> tuple:
    """Global lse `[2, n]`, and the mean over all ranks of what `local_mean` is under p_s (0) or p_t (1)."""
    if group is None:
        return local_lse, local_mean
    highest = max_over(local_lse.clone(), group)
    shares = torch.exp(local_lse - highest)
    sums = sum_over(torch.cat([shares, (shares[under] * local_mean)[None]]), group)
    return highest + sums[:2].log(), sums[2] / sums[under]


def _no_teacher(student, teacher, weights, kd_scale, ce_scale, group, scratch, config):
    lse, local_max, _ = _log_sum_exp(student, group)
    student.mul_((weights * ce_scale * torch.exp(local_max - lse))[:, None])
    return torch.zeros_like(lse), lse


def _forward_kl(student, teacher, weights, kd_scale, ce_scale, group, gap, config):
    torch.sub(teacher, student, out=gap)
    maxima, sums, local = _exponentials(student, teacher)
    lse, mean_gap = _combine_mean(local, _row_dot(teacher, gap) / sums[1], 1, group)
    unit = torch.exp(maxima - lse)
    student.mul_((weights * (kd_scale + ce_scale) * unit[0])[:, None])
    student.addcmul_(teacher, (weights * kd_scale * unit[1])[:, None], value=-1)
    return mean_gap - (lse[1] - lse[0]), lse[0]


def _reverse_kl(student, teacher, weights, kd_scale, ce_scale, group, gap, config):
    torch.sub(student, teacher, out=gap)
    maxima, sums, local = _exponentials(student, teacher)
    lse, mean_gap = _combine_mean(local, _row_dot(student, gap) / sums[0], 0, group)
    # T p_s (gap - mean gap): the shift by l_s - l_t cancels between log p_s - log p_t and KL
    gap.sub_(mean_gap[:, None]).mul_(kd_scale)
    if ce_scale:
        gap.add_(ce_scale)
    student.mul_(gap).mul_((weights * torch.exp(maxima[0] - lse[0]))[:, None])
    return mean_gap - (lse[0] - lse[1]), lse[0]


def top_tokens(teacher: Tensor, k: int, group: dist.ProcessGroup | None) -> TopTokens:
    """The k most likely tokens of temperature-scaled logits `[n, v/tp]`, which are destroyed."""
    values, index = top_k_over(teacher, k, group)
    lse, _, _ = _log_sum_exp(teacher, group)
    return TopTokens(values - lse[:, None], index)


def _top_k_kl(student, teacher, weights, kd_scale, ce_scale, group, scratch, config):
    if isinstance(teacher, Tensor):
        teacher = top_tokens(teacher, config.top_k, group)
    local = student.shape[-1]
    column = teacher.index - world(group)[1] * local
    owned = ((column >= 0) & (column < local)).to(student.dtype)
    column = column.clamp(0, local - 1)  # what other ranks hold adds an exact 0 to some column
    logits = student.gather(1, column)
    local_max = student.amax(dim=-1)
    student.sub_(local_max[:, None]).exp_()
    kept = student.gather(1, column) * owned
    student.scatter_add_(1, column, -kept)  # the rest alone, so that its sum does not cancel
    tail_sum = student.sum(dim=-1)
    lse = _combine(local_max + (tail_sum + kept.sum(dim=-1)).log(), group)
    unit = torch.exp(local_max - lse)
    sums = sum_over(torch.cat([logits * owned, (tail_sum * unit)[:, None]], dim=1), group)
    log_p_s, tail_s = sums[:, :-1] - lse[:, None], sums[:, -1].clamp_min(torch.finfo(student.dtype).tiny)
    p_t = teacher.log_probabilities.exp()
    tail_t = (1 - p_t.sum(dim=-1)).clamp_min(0.0)
    kd = (p_t * (teacher.log_probabilities - log_p_s)).sum(dim=-1)
    kd = kd + torch.xlogy(tail_t, tail_t) - torch.xlogy(tail_t, tail_s)
    student.mul_((weights * unit * (kd_scale * (1 - tail_t / tail_s) + ce_scale))[:, None])
    top = kept * unit[:, None] * (kd_scale + ce_scale) - kd_scale * p_t * owned
    student.scatter_add_(1, column, top * weights[:, None])
    return kd, lse
