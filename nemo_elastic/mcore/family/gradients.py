"""Gradient norms of model and router before an optimizer step, as Megatron counts: over all ranks, each element once.

    norm of everything = sqrt(model^2 + router^2) = the norm that Megatron clips by

Megatron takes that norm from here (`hand_norm`): gradients are read once a step. Under the distributed optimizer a
rank's reduced gradients are those of its own shard only, so that part is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor, nn

from ..models.build import unwrapped

LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
WRAPPERS = re.compile(r"^(module\.)+")  # DDP, Float16Module, NeMo's


def of_router(name: str) -> bool:
    """Whether a parameter, by its name behind any wrappers, is of the router that chooses subnets.

    A mixture of experts has a router of its own, `decoder.layers.N.mlp.router`: that is a part of the model.
    """
    return WRAPPERS.sub("", name).startswith("router.")


@torch.no_grad()
def gradient_norms(model: nn.Module, optimizer: Any) -> Tensor:
    """(model, router) L2 norms `[2]` of the finished gradients, on the device; not finite when any element is not.

    One pass and one all-reduce for both (one more where ranks share out experts), and nothing waits: the caller reads
    the numbers when it must.

    Args:
        model: this rank's model; parameters under `router.` are the router's.
        optimizer: Megatron's optimizer of it.
    """
    parts = list(getattr(optimizer, "chained_optimizers", [optimizer]))
    found: dict[str, list[Tensor]] = {"model": [], "router": [], "shared_out": []}
    for name, parameter, grad in _local_gradients(model, parts):
        everywhere = getattr(parameter, "allreduce", True)
        found["router" if of_router(name) else "model" if everywhere else "shared_out"].append(grad)
    device = next(model.parameters()).device
    squares = torch.stack([_sum_of_squares(grads, device) for grads in found.values()])
    shared = parts[0].get_grad_stats_parallel_group()
    if isinstance(parts[0], DistributedOptimizer) or parallel_state.get_expert_model_parallel_world_size() == 1:
        torch.distributed.all_reduce(squares, group=shared)
    else:  # whole gradients: expert-parallel ranks have other experts, and the same of all else
        torch.distributed.all_reduce(squares[:2], group=shared)
        experts = parallel_state.get_expert_tensor_model_pipeline_parallel_group()
        torch.distributed.all_reduce(squares[2:], group=experts)
    of_model, of_router_, of_experts = squares
    return torch.stack([of_model + of_experts, of_router_]).sqrt()


def hand_norm(optimizer: Any, norm: float) -> None:
    """Megatron's next step clips by `norm` (of everything) instead of reading all gradients and waiting once more.

    Its chained optimizer, which is what it makes of any groups, asks itself for the norm once a step: here is the
    answer, for one question. Any other optimizer measures for itself.
    """
    if not hasattr(optimizer, "chained_optimizers"):
        return

    def answer() -> float:
        del optimizer.get_grad_norm
        return norm

    optimizer.get_grad_norm = answer


def _sum_of_squares(grads: list[Tensor], device: torch.device) -> Tensor:
    if not grads:
        return torch.zeros((), device=device)
    return torch.stack(torch._foreach_norm(grads)).square().sum()


def _local_gradients(model: nn.Module, optimizers: list[Any]) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
    shards: dict[nn.Parameter, Any] = {}
    sharded = [o for o in optimizers if isinstance(o, DistributedOptimizer)]
    for optimizer in sharded:
        shards |= {p: optimizer._get_model_param_range_map(p)["param"] for p in optimizer.model_param_gbuf_map}
    for name, p in model.named_parameters():
        grad = getattr(p, "main_grad", p.grad)
        if grad is None or not p.requires_grad:
            continue
        if not (param_is_not_shared(p) and param_is_not_tensor_parallel_duplicate(p)):
            continue
        if sharded:
            if p not in shards:
                continue
            grad = grad.view(-1)[shards[p].start : shards[p].end]
        yield name, p, grad.float()


def last_bad_gradient(model: nn.Module) -> str | None:
    """The last parameter, in the order of the model, whose gradient is not finite: where the backward broke.

    Its name has the layer's number in the whole network.
    """
    core, found = unwrapped(model), None
    for name, p in core.named_parameters():
        grad = getattr(p, "main_grad", p.grad)
        if grad is not None and not bool(torch.isfinite(grad).all()):
            found = name
    numbers = [layer.layer_number - 1 for layer in core.decoder.layers]
    return found and LAYER.sub(lambda m: f"decoder.layers.{numbers[int(m[1])]}.", found).removeprefix("module.")
