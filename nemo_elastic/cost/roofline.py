"""Seconds of a training step on a layout, from three ceilings: products, memory, links. All estimated.

    product     FLOPs / TP / matmul_tflops, at least the time to read the weights once
    memory      memory_passes x what a layer keeps for its backward (without recomputation), at memory_tbs
    forward     product + memory of the layers, the head's products, what tensor and context parallelism exchange
    backward    twice product and memory, and its own collectives; full recomputation: the layers' forward more,
                selective: the MLPs', and the attention cores' without exchange
    micro-batch teacher's forward + the students' forwards and backwards; stages also exchange it
    step        (micro-batches + PP - 1) x the slowest stage's micro-batch + gradients + optimizer

    collectives a reduce-scatter or all-gather of n bytes over g GPUs sends n (g - 1) / g, an all-reduce twice that

Ranks are laid out as Megatron does: tensor parallel next to each other, then context, then data, then pipeline. A group
that lies in a node has NVLink; one that leaves it shares the ports of its members in the node. Nothing is overlapped
(the elastic model refuses overlapped reduction), and all replicas take the mean over budgets. No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from ..kinds import kind_of
from ..space.layout import ParamLayout
from .activation_memory import layer_bytes
from .counts import layer_flops, layer_parameters, layer_recomputed
from .gpu_layout import GpuLayout, Running, alike
from .held_memory import stage_rows

OPTIMIZER_BYTES = 34  # read and written per element of a shard: gradient, fp32 weight, two moments, and the new weight
LOGITS = 4  # bytes of a logit in the fused loss


class Machine(Protocol):
    """`report.gpu`."""

    matmul_tflops: float
    memory_tbs: float
    memory_passes: float
    node_gpus: int
    node_gbs: float
    network_gbs: float


@dataclass(frozen=True)
class Seconds:
    """Of one pass of a micro-batch through a stage."""

    product: float = 0.0
    memory: float = 0.0
    tensor: float = 0.0
    context: float = 0.0
    experts: float = 0.0

    @property
    def total(self) -> float:
        return sum(self.parts())

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(*(a + b for a, b in zip(self.parts(), other.parts(), strict=True)))

    def backward(self, tensor: float) -> Seconds:
        """Of a forward: twice its products and memory, `tensor` times its tensor-parallel exchange, once the others."""
        return Seconds(2 * self.product, 2 * self.memory, tensor * self.tensor, self.context, self.experts)

    def times(self, factor: float) -> Seconds:
        """All of it `factor` times."""
        return Seconds(*(factor * part for part in self.parts()))

    def parts(self) -> tuple[float, ...]:
        """In the order of the fields."""
        return (self.product, self.memory, self.tensor, self.context, self.experts)


def link_gbs(machine: Machine, stride: int, size: int) -> float:
    """GB/s that a GPU sends in a group of `size` GPUs, `stride` apart."""
    if stride * size <= machine.node_gpus:
        return machine.node_gbs
    return min(machine.node_gbs, machine.network_gbs * max(1, machine.node_gpus // stride))


def gather_seconds(machine: Machine, stride: int, size: int, nbytes: float) -> float:
    """An all-gather or reduce-scatter of `nbytes` in all."""
    return nbytes * (size - 1) / size / (link_gbs(machine, stride, size) * 1e9)


@lru_cache(maxsize=1 << 14)
def layer_forward(
    layout: ParamLayout, how: GpuLayout, machine: Machine, running: Running, layer: int, seq_length: int
) -> Seconds:
    """One layer's forward of one micro-batch."""
    arch, tp, cp = layout.architecture, how.tensor_model_parallel_size, how.context_parallel_size
    letter, sizes = arch.hybrid_override_pattern[layer], running.sizes(layout, layer)
    tokens = how.tokens(seq_length)
    flops = layer_flops(layout, letter, sizes, sequence_length=seq_length) * tokens / seq_length / tp
    weights = how.element * layer_parameters(layout, letter, sizes)  # the table is a shard's
    kept = layer_bytes(layout, how, running, layer, seq_length, None) * tokens
    ep, sent = how.expert_model_parallel_size, kind_of(letter).dispatched(arch, sizes)
    exchanged = kind_of(letter).exchanged(arch, sizes, cp) if cp > 1 else 0.0
    return Seconds(
        max(flops / (machine.matmul_tflops * 1e12), weights / (machine.memory_tbs * 1e12)),
        machine.memory_passes * kept / (machine.memory_tbs * 1e12),
        2 * _between(layout, how, machine, running, seq_length),
        how.element * exchanged * tokens / tp / (link_gbs(machine, tp, cp) * 1e9),
        gather_seconds(machine, tp, ep, how.element * sent * tokens),  # whole tokens on every tensor-parallel rank
    )


def _between(layout: ParamLayout, how: GpuLayout, machine: Machine, running: Running, seq_length: int) -> float:
    """One gather of the residual stream over tensor parallel; a layer's forward has two, one all-reduce or gather and
    scatter.
    """
    stream = how.element * how.tokens(seq_length) * running.hidden_size(layout.architecture)
    return gather_seconds(machine, 1, how.tensor_model_parallel_size, stream)


def stage_forward(
    layout: ParamLayout, how: GpuLayout, machine: Machine, running: Running, stage: int, seq_length: int
) -> Seconds:
    """Forward of a stage's layers for one student, or the teacher (`whole`)."""
    total = Seconds()
    for layer, count in alike(layout, how, running, stage):
        total += layer_forward(layout, how, machine, running, layer, seq_length).times(count)
    return total


def head_product(
    layout: ParamLayout, how: GpuLayout, machine: Machine, running: Running, seq_length: int, *, student: bool
) -> Seconds:
    """Output layer and loss of a lane: one product, three with gradients; passes over logits; states gathered."""
    arch, tokens = layout.architecture, how.tokens(seq_length)
    rows = layout.padded_vocab_size / how.tensor_model_parallel_size
    flops = 2 * tokens * rows * running.hidden_size(arch) * (3 if student else 1)
    gathered = _between(layout, how, machine, running, seq_length) if how.sequence_parallel else 0.0
    return Seconds(
        flops / (machine.matmul_tflops * 1e12),
        machine.memory_passes * LOGITS * tokens * rows / (machine.memory_tbs * 1e12),
        gathered * (2 if student else 1),
    )


def again_seconds(
    layout: ParamLayout, how: GpuLayout, machine: Machine, running: Running, layer: int, seq_length: int
) -> Seconds:
    """What recomputation does again of a layer's forward."""
    forward = layer_forward(layout, how, machine, running, layer, seq_length)
    if how.recompute_granularity != "selective":
        return forward if how.recompute_granularity == "full" else Seconds()
    letter, sizes = layout.architecture.hybrid_override_pattern[layer], running.sizes(layout, layer)
    every = layer_flops(layout, letter, sizes, sequence_length=seq_length)
    share = layer_recomputed(layout, letter, sizes, sequence_length=seq_length) / every
    kept = [layer_bytes(layout, how, running, layer, seq_length, way) for way in (None, "selective")]
    memory = machine.memory_passes * (kept[0] - kept[1]) * how.tokens(seq_length) / (machine.memory_tbs * 1e12)
    return Seconds(share * forward.product, memory, forward.tensor if share == 1 else 0.0)


def student_seconds(
    layout: ParamLayout, how: GpuLayout, machine: Machine, running: Running, stage: int, seq_length: int
) -> Seconds:
    """Forward and backward of one student's micro-batch on a stage, the head's part included."""
    forward, back = stage_forward(layout, how, machine, running, stage, seq_length), _backward_share(how, running)
    total = forward + forward.backward(back)
    for layer, count in alike(layout, how, running, stage):
        total += again_seconds(layout, how, machine, running, layer, seq_length).times(count)
    if how.is_last(stage):
        total += head_product(layout, how, machine, running, seq_length, student=True)
    return total


def _backward_share(how: GpuLayout, running: Running) -> float:
    """Collectives of a layer's backward against its forward's two: under sequence parallelism a linear that keeps its
    own part of the input gathers it once more.
    """
    return 1.5 if how.sequence_parallel and running.full_width else 1.0


def teacher_seconds(
    layout: ParamLayout, how: GpuLayout, machine: Machine, full: Running, stage: int, seq_length: int, *, cached: bool
) -> Seconds:
    """The teacher's forward on a stage; with a cache its output layer alone."""
    total = Seconds() if cached else stage_forward(layout, how, machine, full, stage, seq_length)
    if how.is_last(stage):
        total += head_product(layout, how, machine, full, seq_length, student=False)
    return total


def update_seconds(layout: ParamLayout, how: GpuLayout, machine: Machine, stage: int) -> dict[str, float]:
    """Once a step: gradients summed over replicas in fp32, weights gathered (distributed optimizer), and Adam."""
    rows, stride = stage_rows(layout, how, stage), how.tensor_model_parallel_size
    experts = sum(n for name, n in rows.items() if name in layout.table and layout.table[name].is_shared_out)
    parts = [(sum(rows.values()) - experts, stride, how.shards)]
    parts.append((experts, stride * how.expert_model_parallel_size, how.expert_shards))
    moved = 4 + how.element if how.use_distributed_optimizer else 8
    shard = sum(n / (size if how.use_distributed_optimizer else 1) for n, _, size in parts)
    return {
        "gradients": sum(gather_seconds(machine, apart, size, moved * n) for n, apart, size in parts),
        "optimizer": shard * OPTIMIZER_BYTES / (machine.memory_tbs * 1e12),
    }


def hand_over_seconds(layout: ParamLayout, how: GpuLayout, machine: Machine, width: float, seq_length: int) -> float:
    """A micro-batch's states of `width` channels to the next stage, and their gradient back."""
    if how.pipeline_model_parallel_size == 1:
        return 0.0
    stride = how.tensor_model_parallel_size * how.shards
    share = how.sequence_share  # without sequence parallelism every rank sends the whole
    return 2 * how.element * width * share * how.tokens(seq_length) / (link_gbs(machine, stride, 2) * 1e9)
