"""Distillation losses and their gradients against torch's own functions in fp64."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from nemo_elastic.config.sections import DistillConfig
from nemo_elastic.distill.losses import kd_loss
from nemo_elastic.distill.token_losses import TopTokens

TOKENS, BATCH, VOCAB = 7, 3, 61


def case(seed: int, dtype=torch.float32, spread: float = 3.0):
    g = torch.Generator().manual_seed(seed)
    student = (torch.randn(TOKENS, BATCH, VOCAB, generator=g) * spread).to(dtype)
    teacher = (torch.randn(TOKENS, BATCH, VOCAB, generator=g) * spread).to(dtype)
    labels = torch.randint(0, VOCAB, (TOKENS, BATCH), generator=g)
    mask = (torch.rand(TOKENS, BATCH, generator=g) > 0.3).float()
    return student, teacher, labels, mask


def reference(student, teacher, labels, mask, config):
    """Loss in fp64 by torch.nn.functional, summed over unmasked tokens."""
    s, t = student.double(), teacher.double()
    log_s, log_t = F.log_softmax(s / config.temperature, -1), F.log_softmax(t / config.temperature, -1)
    if config.loss == "forward_kl":
        kd = F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1)
    elif config.loss == "reverse_kl":
        kd = F.kl_div(log_t, log_s, reduction="none", log_target=True).sum(-1)
    else:
        top, index = log_t.topk(config.top_k, -1)
        outside = torch.ones_like(log_t).scatter(-1, index, 0.0).bool()
        rest_t = log_t.masked_fill(~outside, -torch.inf).logsumexp(-1, keepdim=True)
        rest_s = log_s.masked_fill(~outside, -torch.inf).logsumexp(-1, keepdim=True)
        coarse_t, coarse_s = torch.cat([top, rest_t], -1), torch.cat([log_s.gather(-1, index), rest_s], -1)
        kd = F.kl_div(coarse_s, coarse_t, reduction="none", log_target=True).sum(-1)
    kd = kd * config.temperature**2
    ce = F.cross_entropy(s.flatten(0, 1), labels.flatten(), reduction="none").view_as(kd)
    return ((config.kd_weight * kd + config.ce_weight * ce) * mask).sum(), (kd * mask).sum(), (ce * mask).sum()


@pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl", "topk_kl"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("ce_weight", [0.0, 0.3])
def test_loss_and_gradient_equal_torch_in_fp64(loss, temperature, ce_weight):
    config = DistillConfig(
        loss=loss, temperature=temperature, ce_weight=ce_weight, kd_weight=0.7, top_k=5, chunk_tokens=4
    )
    student, teacher, labels, mask = case(1)
    ours, plain = student.clone().requires_grad_(), student.clone().requires_grad_()
    found = kd_loss(ours, teacher, config, labels=labels, mask=mask)
    expected = reference(plain, teacher, labels, mask, config)
    (found.total * 0.25).backward()
    (expected[0] * 0.25).backward()
    torch.testing.assert_close(found.total.double(), expected[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.kd.double(), expected[1], rtol=1e-6, atol=1e-6)
    if ce_weight:
        torch.testing.assert_close(found.ce.double(), expected[2], rtol=1e-6, atol=1e-6)
    assert found.tokens == mask.sum()
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-5, atol=2e-7)


@pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl"])
def test_teacher_against_itself_is_zero(loss):
    student, _, _, _ = case(2)
    student.requires_grad_()
    found = kd_loss(student, student.detach(), DistillConfig(loss=loss))
    found.total.backward()
    assert abs(found.total.item()) < 1e-5
    assert student.grad.abs().max() < 1e-6


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_without_a_teacher_it_is_cross_entropy(temperature):
    config = DistillConfig(kd_weight=0.0, ce_weight=0.6, temperature=temperature, chunk_tokens=4)
    student, _, labels, mask = case(6)
    ours, plain = student.clone().requires_grad_(), student.clone().requires_grad_()
    found = kd_loss(ours, None, config, labels=labels, mask=mask)
    expected = (F.cross_entropy(plain.flatten(0, 1), labels.flatten(), reduction="none") * mask.flatten()).sum()
    found.total.backward()
    (0.6 * expected).backward()
    torch.testing.assert_close(found.ce, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.total, 0.6 * expected, rtol=1e-6, atol=1e-6)
    assert found.kd == 0
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-5, atol=2e-7)
    with pytest.raises(ValueError, match=r"kd_weight=1.0 needs a teacher"):
        kd_loss(student, None, DistillConfig(), labels=labels)


def test_top_k_with_every_token_is_the_whole_kl():
    student, teacher, _, mask = case(3)
    whole = kd_loss(student, teacher, DistillConfig(), mask=mask)
    top = kd_loss(student, teacher, DistillConfig(loss="topk_kl", top_k=VOCAB), mask=mask)
    torch.testing.assert_close(top.total, whole.total, rtol=1e-5, atol=1e-6)
    few = kd_loss(student, teacher, DistillConfig(loss="topk_kl", top_k=3), mask=mask)
    assert 0 < few.total < whole.total


def test_stored_top_tokens_equal_the_teachers_logits():
    student, teacher, _, mask = case(4)
    top, index = F.log_softmax(teacher.flatten(0, 1), -1).topk(6, -1)
    config = DistillConfig(loss="topk_kl", top_k=6)
    a, b = student.clone().requires_grad_(), student.clone().requires_grad_()
    from_logits = kd_loss(a, teacher, config, mask=mask)
    from_store = kd_loss(b, TopTokens(top, index), config, mask=mask)
    from_logits.total.backward()
    from_store.total.backward()
    torch.testing.assert_close(from_store.total, from_logits.total, rtol=1e-6, atol=0)
    torch.testing.assert_close(b.grad, a.grad, rtol=1e-5, atol=1e-7)


def test_extreme_logits_stay_finite():
    student, teacher, labels, _ = case(5, spread=2000.0)
    for loss in ("forward_kl", "reverse_kl", "topk_kl"):
        s = student.clone().requires_grad_()
        found = kd_loss(s, teacher, DistillConfig(loss=loss, ce_weight=0.5, top_k=4), labels=labels)
        found.total.backward()
        assert torch.isfinite(found.total) and torch.isfinite(s.grad).all()


def test_bf16_logits_are_worked_in_fp32():
    student, teacher, _, _ = case(6, torch.bfloat16)
    s = student.clone().requires_grad_()
    found = kd_loss(s, teacher, DistillConfig())
    found.total.backward()
    expected = reference(
        student, teacher, torch.zeros(TOKENS, BATCH, dtype=torch.long), torch.ones(TOKENS, BATCH), DistillConfig()
    )
    torch.testing.assert_close(found.total.double(), expected[0], rtol=1e-6, atol=0)
    assert s.grad.dtype == torch.bfloat16


def test_chunks_do_not_matter():
    student, teacher, labels, mask = case(7)
    base = DistillConfig(ce_weight=0.5, chunk_tokens=1000)
    totals = []
    for chunk in (1, 5, 1000):
        config = dataclasses.replace(base, chunk_tokens=chunk)
        totals.append(kd_loss(student, teacher, config, labels=labels, mask=mask).total.item())
    assert max(totals) - min(totals) < 1e-5 * abs(totals[0])


def test_a_wrong_call_says_what_is_wrong():
    student, teacher, labels, _ = case(8)
    with pytest.raises(ValueError, match="forward_kl, reverse_kl, topk_kl"):
        kd_loss(student, teacher, DistillConfig(loss="kl"))
    with pytest.raises(ValueError, match="needs labels"):
        kd_loss(student, teacher, DistillConfig(ce_weight=1.0))
    with pytest.raises(ValueError, match="leading axes"):
        kd_loss(student, teacher, DistillConfig(ce_weight=1.0), labels=labels.t())
