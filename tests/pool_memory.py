"""What a rank of a small family holds and keeps, measured: buffers, optimizer states, saved tensors, hand-over."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from pool_elastic import gates, soft_masks, tokens
from pool_family import build, run_config
from torch import Tensor

from nemo_elastic.mcore.elastic.plan import Plan, hard_plan, soft_plan
from nemo_elastic.mcore.family.family_model import FamilyModel
from nemo_elastic.mcore.family.planner import Planned
from nemo_elastic.mcore.kernels.context import own_chunks
from nemo_elastic.mcore.versions import build_optimizer
from nemo_elastic.nemo.run.elastic_model import ElasticLossReduction
from nemo_elastic.nemo.run.train import decays_not, is_router
from nemo_elastic.space.layout import ParamLayout
from nemo_elastic.space.subnet import Subnet

LENGTH, MICRO_BATCH, MICRO_BATCHES = 128, 2, 4
DTYPES = {4: torch.float32, 2: torch.bfloat16}


def measured(
    cases: Sequence[tuple[str, Subnet]],
    recompute: str | None,
    *,
    element: int,
    sp: bool,
    tied: bool = False,
    feature: str = "",
    distributed: bool = True,
    distill: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What is held; and per case (mode, subnet) the most that was kept at once, and what was exchanged."""
    run, dtype = run_config(tied=tied, feature=feature, **(distill or {})), DTYPES[element]
    model, planner = build(run, dtype, sequence_parallel=sp, **_recompute(recompute),
                           variable_seq_lengths=True, moe_token_dispatcher_type="alltoall",
                           pipeline_dtype=dtype, deallocate_pipeline_outputs=True)  # fmt: skip
    model.train()
    settings = DistributedDataParallelConfig(use_distributed_optimizer=distributed, grad_reduce_in_fp32=True)
    wrapped = DistributedDataParallel(model.config, settings, model)
    model.config.finalize_model_grads_func = finalize_model_grads
    held = _held(model, wrapped, distributed, element)
    reduction = ElasticLossReduction(run.distill, tuple(run.elastic.budgets), lambda planned: None)
    runs = {}
    for mode, subnet in cases:
        plan = _plan(mode, subnet, planner.layout)
        runs[mode] = _kept(model, wrapped, reduction, plan, planner.layout)
    if model.teacher is None:
        return {"held": held, "runs": runs}
    model.retire_teacher()
    return {"held": held | {"cached": _bytes(model.teacher.parameters())}, "runs": runs}


def _recompute(kind: str | None) -> dict[str, Any]:
    if kind == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    modules = {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]}
    return modules if kind == "selective" else {}


def _plan(mode: str, subnet: Subnet, layout: ParamLayout) -> Plan | None:
    arch = layout.architecture
    if mode == "whole":
        return None
    if mode == "soft":
        return soft_plan(layout, subnet, soft_masks(arch, dtype=torch.float32))
    how, _, learned = mode.partition("-")
    return hard_plan(layout, subnet, how, gates(arch, torch.float32) if learned else None)


def _held(model: FamilyModel, wrapped: Any, distributed: bool, element: int) -> dict[str, float]:
    settings = OptimizerConfig(
        optimizer="adam",
        lr=1e-3,
        bf16=element == 2,
        use_distributed_optimizer=distributed,
        params_dtype=DTYPES[element],
    )
    optimizer = build_optimizer(
        settings, [wrapped], no_weight_decay_cond=decays_not, scale_lr_cond=is_router, lr_mult=1.0
    )
    for parameter in model.parameters():
        parameter.main_grad.fill_(1e-3)
    optimizer.step()
    states = []
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        states += [t for s in part.optimizer.state.values() for t in s.values() if torch.is_tensor(t) and t.dim()]
        for name in ("shard_fp32_from_float16_groups", "fp32_from_float16_groups"):
            states += [t for group in getattr(part, name, []) for t in group]
    buffers = wrapped.buffers
    weights = [b.param_data for b in buffers if b.param_data is not None] or list(model.parameters())
    return {
        "weights": _bytes(weights),
        "gradients": _bytes(b.grad_data for b in buffers),
        "optimizer": _bytes(states),
        "teacher": 0.0 if model.teacher is None else _bytes(model.teacher.parameters()),
        "elements": sum(p.numel() for p in model.parameters()),
    }


def _bytes(tensors: Any) -> float:
    return float(sum(t.numel() * t.element_size() for t in tensors))


class Tally:
    """Bytes of storages that somebody holds, each once, and the most there were."""

    def __init__(self, but: set[int]) -> None:
        self.but, self.holders, self.now, self.most = but, {}, 0, 0

    def hold(self, tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        where, size = storage.data_ptr(), storage.nbytes()
        if where in self.but:
            return tensor
        self.holders[where] = self.holders.get(where, 0) + 1
        if self.holders[where] == 1:
            self.now += size
            self.most = max(self.most, self.now)
        return Holder(self, tensor, where, size)

    def drop(self, where: int, size: int) -> None:
        self.holders[where] -= 1
        if not self.holders[where]:
            del self.holders[where]
            self.now -= size


class Holder:
    def __init__(self, tally: Tally, tensor: Tensor, where: int, size: int) -> None:
        self.tally, self.tensor, self.at = tally, tensor, (where, size)

    def __del__(self) -> None:
        self.tally.drop(*self.at)


@contextmanager
def _saved(but: set[int]) -> Iterator[Tally]:
    """What forwards save, not what a backward computes again."""
    tally = Tally(but)

    def pack(t: Tensor) -> Any:
        return t if torch._C._current_graph_task_id() != -1 else tally.hold(t.detach())

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: getattr(held, "tensor", held)):
        yield tally


@contextmanager
def _exchanged() -> Iterator[list[tuple[int, int]]]:
    """(bytes received from the stage before, bytes sent to the stage behind) of every exchange."""
    found, stock = [], P2PCommunicator._communicate

    def spy(self: Any, **given: Any) -> Any:
        result = stock(self, **given)
        before, sent = result[0], given["tensor_send_next"]
        found.append(tuple(0 if t is None else t.untyped_storage().nbytes() for t in (before, sent)))
        return result

    P2PCommunicator._communicate = spy
    try:
        yield found
    finally:
        P2PCommunicator._communicate = stock


def _kept(
    model: FamilyModel, wrapped: Any, reduction: ElasticLossReduction, plan: Plan | None, layout: ParamLayout
) -> dict[str, float]:
    models = (m for m in (model, model.teacher) if m is not None)
    own = {p.untyped_storage().data_ptr() for m in models for p in m.parameters()}
    own |= {p.main_grad.untyped_storage().data_ptr() for p in model.parameters()}
    wrapped.zero_grad_buffer()
    context = parallel_state.get_context_parallel_group()

    def batches() -> Iterator[dict[str, Any]]:
        for index in range(MICRO_BATCHES):
            ids = tokens(layout.architecture, seed=index, batch=MICRO_BATCH, length=LENGTH + 1)
            yield {
                "tokens": own_chunks(ids[:, :-1], context).contiguous(),
                "labels": own_chunks(ids[:, 1:], context).contiguous(),
                "loss_mask": own_chunks(torch.ones(MICRO_BATCH, LENGTH), context),
                "elastic": [Planned("full", "hard", plan)],
            }

    def forward_step(iterator: Any, module: Any) -> tuple[Any, Any]:
        batch = next(iterator)
        out = module(batch["tokens"], None, None, elastic=[plan], distill=True)
        return out, lambda heads: reduction.forward(batch, heads)

    with _saved(own) as saved, _exchanged() as exchanged:
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=batches(),
            model=[wrapped],
            num_microbatches=MICRO_BATCHES,
            seq_length=LENGTH,
            micro_batch_size=MICRO_BATCH,
            forward_only=False,
        )
    assert saved.now == 0, "everything was let go"
    one, sent = (max((pair[i] for pair in exchanged), default=0) for i in (0, 1))
    return {"saved": saved.most, "received": one, "sent": sent}
