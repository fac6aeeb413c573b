"""A vocabulary split over ranks changes neither a loss nor a gradient."""

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_elastic.config.sections import DistillConfig
from nemo_elastic.distill.fused import fused_kd_loss
from nemo_elastic.distill.losses import kd_loss
from nemo_elastic.distill.token_losses import TopTokens

TOKENS, VOCAB, WIDE, NARROW = 19, 96, 24, 16


def tensors():
    g = torch.Generator().manual_seed(11)
    student_hidden = torch.randn(TOKENS, NARROW, generator=g)
    student_weight = torch.randn(VOCAB, NARROW, generator=g) / 4
    teacher_hidden = torch.randn(TOKENS, WIDE, generator=g)
    teacher_weight = torch.randn(VOCAB, WIDE, generator=g) / 4
    labels = torch.randint(0, VOCAB, (TOKENS,), generator=g)
    mask = (torch.rand(TOKENS, generator=g) > 0.25).float()
    return student_hidden, student_weight, teacher_hidden, teacher_weight, labels, mask


def shard(weight, group):
    if group is None:
        return weight
    size = VOCAB // dist.get_world_size(group)
    rank = dist.get_rank(group)
    return weight[rank * size : (rank + 1) * size].contiguous()


def run(config: DistillConfig, parallel: bool = True):
    """Losses and gradients of both ways to compute them; gradients of what is split come back as this rank's part."""
    group = dist.group.WORLD if parallel else None
    sh, sw, th, tw, labels, mask = tensors()
    student = shard((sh @ sw.t()).t(), group).t().contiguous().requires_grad_()
    teacher = shard((th @ tw.t()).t(), group).t().contiguous()
    plain = kd_loss(student, teacher, config, labels=labels, mask=mask, group=group)
    plain.total.backward()
    hidden, weight = sh.clone().requires_grad_(), shard(sw, group).clone().requires_grad_()
    fused = fused_kd_loss(hidden, weight, th, shard(tw, group), config, labels=labels, mask=mask, group=group)
    fused.total.backward()
    stored = None
    if config.loss == "topk_kl":
        top = TopTokens(*torch.log_softmax(th @ tw.t(), -1).topk(config.top_k, -1))
        stored = kd_loss(student.detach(), top, config, labels=labels, mask=mask, group=group).total
    return plain.total.detach(), plain.ce, student.grad, fused.total.detach(), hidden.grad, weight.grad, stored


def compare(per_rank, config):
    one = run(config, parallel=False)
    close = {"rtol": 1e-5, "atol": 2e-6}
    for rank in per_rank:
        for i in (0, 1, 3, 4):  # both totals, CE, the hidden states' gradient: whole on every rank
            torch.testing.assert_close(rank[i], one[i], **close)
        if one[6] is not None:
            torch.testing.assert_close(rank[6], one[6], **close)
    torch.testing.assert_close(torch.cat([r[2] for r in per_rank], 1), one[2], **close)
    torch.testing.assert_close(torch.cat([r[5] for r in per_rank], 0), one[5], **close)


CASES = [
    DistillConfig(chunk_tokens=8),
    DistillConfig(loss="reverse_kl", ce_weight=0.4, chunk_tokens=8),
    DistillConfig(loss="topk_kl", top_k=7, ce_weight=0.4, chunk_tokens=8),
    DistillConfig(loss="topk_kl", top_k=40, chunk_tokens=8),  # more than a rank of four holds
    DistillConfig(temperature=2.0, ce_weight=0.4, chunk_tokens=8),
]


@pytest.mark.parametrize("config", CASES, ids=lambda c: f"{c.loss}-{c.top_k}-{c.temperature}")
def test_two_ranks(pool2, config):
    compare(pool2.run(run, config, tp=2), config)


@pytest.mark.parametrize("config", CASES, ids=lambda c: f"{c.loss}-{c.top_k}-{c.temperature}")
def test_four_ranks(pool4, config):
    compare(pool4.run(run, config, tp=4), config)


@pytest.mark.parametrize("config", CASES, ids=lambda c: f"{c.loss}-{c.top_k}-{c.temperature}")
def test_fused_with_the_heads_equals_autograd_through_them(config):
    sh, sw, th, tw, labels, mask = tensors()
    hidden, weight = sh.clone().requires_grad_(), sw.clone().requires_grad_()
    unfused = kd_loss(hidden @ weight.t(), th @ tw.t(), config, labels=labels, mask=mask)
    (unfused.total * 0.5).backward()
    other_hidden, other_weight = sh.clone().requires_grad_(), sw.clone().requires_grad_()
    fused = fused_kd_loss(other_hidden, other_weight, th, tw, config, labels=labels, mask=mask)
    (fused.total * 0.5).backward()
    torch.testing.assert_close(fused.total, unfused.total, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(other_hidden.grad, hidden.grad, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(other_weight.grad, weight.grad, rtol=1e-5, atol=2e-6)


def test_fused_without_a_teacher_equals_autograd_of_cross_entropy():
    sh, sw, _, _, labels, mask = tensors()
    config = DistillConfig(kd_weight=0.0, ce_weight=1.0, chunk_tokens=8)
    hidden, weight = sh.clone().requires_grad_(), sw.clone().requires_grad_()
    plain = torch.nn.functional.cross_entropy((hidden @ weight.t()).flatten(0, -2), labels.flatten(), reduction="none")
    (plain * mask.flatten()).sum().backward()
    other_hidden, other_weight = sh.clone().requires_grad_(), sw.clone().requires_grad_()
    fused_kd_loss(other_hidden, other_weight, None, None, config, labels=labels, mask=mask).total.backward()
    torch.testing.assert_close(other_hidden.grad, hidden.grad, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(other_weight.grad, weight.grad, rtol=1e-5, atol=2e-6)
    with pytest.raises(ValueError, match="needs a teacher"):
        fused_kd_loss(sh, sw, None, None, DistillConfig())


def test_a_prefix_view_of_the_parents_head_gets_its_gradient():
    sh, _, th, tw, _, _ = tensors()
    parent = tw.clone().requires_grad_()
    fused_kd_loss(sh, parent[:, :NARROW], th, tw, DistillConfig()).total.backward()
    assert parent.grad[:, NARROW:].abs().max() == 0
    assert parent.grad[:, :NARROW].abs().min(dim=1).values.gt(0).all()


class Calls(TorchDispatchMode):
    """Names of the operations that ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_a_gpu_products_of_16_bits_write_their_fp32_sums(dtype):
    """On the meta device, which has these products as CUDA has; no result is rounded and copied."""
    config = DistillConfig(chunk_tokens=8)
    given = [t.to("meta", dtype) for t in tensors()[:4]]
    for leaf in given[:2]:
        leaf.requires_grad_()
    with Calls() as calls:
        fused_kd_loss(*given, config).total.backward()
    products = {name: calls.names.count(name) for name in calls.names if "mm." in name and "bmm" not in name}
    wide = "dtype_out" if dtype is torch.bfloat16 else "out"
    chunks = -(-TOKENS // 8)
    assert products == {f"aten.mm.{wide}": 3 * chunks, f"aten.addmm.{wide}": chunks}
    assert [leaf.grad.dtype for leaf in given[:2]] == [dtype] * 2


def test_16_bit_heads_on_a_cpu_equal_those_of_fp32_up_to_their_rounding():
    sh, sw, th, tw, _, _ = (t.bfloat16() if t.is_floating_point() else t for t in tensors())
    found = []
    for cast in (torch.bfloat16, torch.float32):
        hidden, weight = (t.to(cast, copy=True).requires_grad_() for t in (sh, sw))
        total = fused_kd_loss(hidden, weight, th.to(cast), tw.to(cast), DistillConfig(chunk_tokens=8)).total
        total.backward()
        found.append([t.float() for t in (total, hidden.grad, weight.grad)])
    for rounded, exact in zip(*found, strict=True):
        assert (rounded - exact).norm() < 2e-2 * exact.norm()
