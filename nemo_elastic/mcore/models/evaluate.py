"""Held-out loss of any subnet at any layout: Megatron's own forward-only schedule, no noise, no dropout.

loss = sum over tokens of mask -log p(label) / sum of mask,  summed over data- and context-parallel ranks, known to all

Samples may be of groups (sources of a blend): each has its own two sums, and the loss of all is the ratio of theirs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from ..elastic.plan import Plan
from ..kernels.context import own_chunks, own_positions
from ..kernels.padded_vocabulary import real_vocab_size
from ..runtime.parallel import over_context
from .build import unwrapped

Groups = Sequence[Sequence[int]]  # of each batch, the number of every sample's group


@torch.no_grad()
def heldout_loss(model: nn.Module, batches: Sequence[tuple[Tensor, ...]], plan: Plan | None = None) -> float:
    """Mean cross entropy in nats per token.

    Args:
        model: a plain or elastic model (wrapped or not) of this rank; left in the mode (train or eval) it was in.
        batches: (tokens, labels) or (tokens, labels, mask) `[b, s]`, the same on all ranks;
            data-parallel ranks share them out.
        plan: a hard subnet for an elastic model; None: the whole model.
    """
    total = heldout_sums(model, batches, plan).sum(0)
    return float(total[0] / total[1])  # the one time that the device is waited for


@torch.no_grad()
def heldout_sums(
    model: nn.Module, batches: Sequence[tuple[Tensor, ...]], plan: Plan | None = None, groups: Groups | None = None
) -> Tensor:
    """(loss sum, weight) per group of samples, fp64 `[groups, 2]`; `heldout_loss` is the ratio of their sums.

    Args:
        groups: None: all samples are of one group.
    """
    core = unwrapped(model)
    training = core.training
    core.eval()
    groups = groups or [[0] * batch[0].shape[0] for batch in batches]
    count = 1 + max(max(part) for part in groups)
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    mine, whose = (part[rank::size] if len(batches) >= size else part for part in (batches, groups))
    if parallel_state.get_expert_model_parallel_world_size() > 1 and len(mine) * size < len(batches):
        mine = [*mine, _weightless(batches[-1])]  # expert-parallel ranks need each other in every forward
        whose = [*whose, groups[-1]]
    context = parallel_state.get_context_parallel_group()
    mine = [tuple(own_chunks(part, context) for part in batch) for batch in mine]
    pieces = list(_equal_shapes(zip(mine, whose, strict=True)))
    total = torch.stack([run_forward(core, batches, plan, of, count) for batches, of in pieces]).sum(0)
    core.train(training)
    if len(batches) >= size:
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    total = over_context(total)
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(total, src=last, group=parallel_state.get_pipeline_model_parallel_group())
    return total


def _weightless(batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    return batch[0], batch[1], torch.zeros_like(batch[1], dtype=torch.float32)


def _equal_shapes(
    batches: Iterable[tuple[tuple[Tensor, ...], Sequence[int]]],
) -> Iterable[tuple[list[tuple[Tensor, ...]], list[Sequence[int]]]]:
    """Runs of batches of one shape, and their groups: a schedule is told one shape."""
    run: list[tuple[Tensor, ...]] = []
    groups: list[Sequence[int]] = []
    for batch, group in batches:
        if run and batch[0].shape != run[0][0].shape:
            yield run, groups
            run, groups = [], []
        run.append(batch)
        groups.append(group)
    if run:
        yield run, groups


def run_forward(
    model: nn.Module,
    batches: list[tuple[Tensor, ...]],
    plan: Plan | None,
    groups: Groups | None = None,
    count: int = 1,
) -> Tensor:
    """(loss sum, weight) of batches of one shape on this rank, fp64 `[count, 2]`; zeros but on the last stage.

    Args:
        batches: `[b, s/n]`, the positions of this context-parallel rank of n.
        groups: as of `heldout_sums`; `count` of them.
    """
    keywords = {} if plan is None else {"elastic": plan}
    device = next(model.parameters()).device
    context = parallel_state.get_context_parallel_group()
    length = batches[0][0].shape[1] * context.size()
    groups = groups or [[0] * batch[0].shape[0] for batch in batches]

    def forward_step(iterator, model):
        batch, group = next(iterator)
        tokens, labels, *mask = (t.to(device) for t in batch)
        belongs = [[float(g == k) for g in group] for k in range(count)]
        positions = own_positions(length, context, device).expand_as(tokens)
        out = model(tokens, positions, None, labels=labels, **keywords)

        def loss(losses: Tensor):
            weights = mask[0].double() if mask else torch.ones_like(losses, dtype=torch.float64)
            rows = torch.stack([(losses.double() * weights).sum(1), weights.sum(1)], dim=1)
            sums = torch.tensor(belongs, dtype=rows.dtype, device=device) @ rows  # [groups, b] [b, 2]
            # The schedule divides what is returned by the number of micro-batches, in place: the record is a copy.
            return rows[:, 0].sum(), {"sums": sums}

        return out, loss

    outputs = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(list(zip(batches, groups, strict=True))),
        model=[model],
        num_microbatches=len(batches),
        seq_length=length,
        micro_batch_size=batches[0][0].shape[0],
        forward_only=True,
    )
    total = torch.zeros(count, 2, dtype=torch.float64, device=device)
    for output in outputs:
        total += output["sums"]
    return total


@torch.no_grad()
def whole_logits(model: nn.Module, tokens: Tensor, plan: Plan | None = None) -> Tensor:
    """Logits `[b, s, v]` of one batch, fp32 on the CPU, the same on every rank of the replica."""
    assert parallel_state.get_context_parallel_world_size() == 1, "logits of all positions are read without such ranks"
    core = unwrapped(model)
    training = core.training
    core.eval()
    keywords = {} if plan is None else {"elastic": plan}
    device = next(core.parameters()).device
    found: list[Tensor] = []

    def forward_step(iterator, model):
        ids = next(iterator).to(device)
        positions = torch.arange(ids.shape[1], device=device).expand_as(ids)
        out = model(ids, positions, None, **keywords)

        def keep(logits: Tensor):
            found.append(_over_vocabulary(logits, core).float().cpu())
            return logits.float().sum(), {}

        return out, keep

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter([tokens]),
        model=[core],
        num_microbatches=1,
        seq_length=tokens.shape[1],
        micro_batch_size=tokens.shape[0],
        forward_only=True,
    )
    core.train(training)
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return found[0]
    payload = [found[0] if found else None]
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    dist.broadcast_object_list(payload, src=last, group=parallel_state.get_pipeline_model_parallel_group())
    return payload[0]


def _over_vocabulary(logits: Tensor, core: nn.Module) -> Tensor:
    size = parallel_state.get_tensor_model_parallel_world_size()
    if size == 1:
        return logits
    shards = [torch.empty_like(logits) for _ in range(size)]
    dist.all_gather(shards, logits.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
    return torch.cat(shards, dim=-1)[..., : real_vocab_size(core)]
