"""Bytes that a GPU holds from the first step to the last: weights, gradients, optimizer states, teacher.

    weights     element x n                       n: parameters of the stage's tensor-parallel shard
    gradients   4 x n                             Megatron sums them in fp32
    optimizer   (8 + 4 if bf16) x n / shards      Adam's two moments, and fp32 weights beside bf16 ones
    teacher     element x n                       the parent again; with a cache its output weights alone

With the distributed optimizer weights and gradients lie in one buffer each: every parameter begins at a multiple of 64
elements, and the buffer ends at one of 128 and of the shards, so n is a little more (`buffer_elements`); a tied
embedding that two stages share has a bucket of its own there. Experts that GPUs share out have a buffer of their own,
with as many times fewer shards. The router is fp32 and on every GPU. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from math import lcm

from ..space.layout import ParamLayout
from .gpu_layout import GpuLayout

ALIGNED, BUCKET = 64, 128  # elements: beginning of a parameter, end of a bucket
MOMENTS, WIDE = 8, 4  # bytes: Adam's two moments in fp32; an fp32 number
EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


def stage_rows(layout: ParamLayout, how: GpuLayout, stage: int) -> dict[str, int]:
    """Elements of each parameter of a stage's shard, in the order of the model.

    Args:
        layout: the table of `how`'s tensor- and expert-parallel sizes.
    """
    assert (layout.tp_size, layout.ep_size) == (how.tensor_model_parallel_size, how.expert_model_parallel_size)
    layers, last, elements = how.layers(layout.architecture, stage), how.is_last(stage), _elements(layout)
    rows = {}
    for name, (layer, n) in elements.items():
        if layer in layers if layer is not None else stage == 0 if name == EMBEDDING else last:
            rows[name] = n
    if last and stage and OUTPUT not in elements:
        rows[OUTPUT] = elements[EMBEDDING][1]  # the tied weight, once more
    return rows


@lru_cache(maxsize=64)
def _elements(layout: ParamLayout) -> dict[str, tuple[int | None, int]]:
    """(layer, elements on a rank) of every parameter."""
    return {name: (spec.layer, spec.numel({})) for name, spec in layout.table.items()}


def buffer_elements(counts: Sequence[int], how: GpuLayout, alone: Iterable[int] = (), shards: int | None = None) -> int:
    """Elements of Megatron's buffer of parameters of one dtype.

    Args:
        counts: elements of each, in the order of the model.
        alone: places of those with a bucket of their own.
        shards: GPUs that share its states, where they are not all that have the same weights.
    """
    if not how.use_distributed_optimizer:
        return sum(counts)
    end, begun, alone, divisor = 0, False, set(alone), lcm(shards or how.shards, BUCKET)
    for place in reversed(range(len(counts))):
        end = _next(end, ALIGNED)
        if place in alone and begun:
            end = _next(end, divisor)
        end, begun = end + counts[place], True
        if place in alone:
            end, begun = _next(end, divisor), False
    return _next(end, divisor)


def held_bytes(
    layout: ParamLayout,
    how: GpuLayout,
    stage: int,
    *,
    router: Sequence[int] = (),
    teacher: bool = True,
    cached: bool = False,
) -> dict[str, float]:
    """Bytes by what they are, of the rank of a stage that has most.

    Args:
        router: elements of each of its tensors.
        teacher, cached: whether the loss has one; whether its hidden states come from a cache.
    """
    every = stage_rows(layout, how, stage)
    experts = [n for name, n in every.items() if name in layout.table and layout.table[name].is_shared_out]
    rows = {n: count for n, count in every.items() if n not in layout.table or not layout.table[n].is_shared_out}
    shared = how.pipeline_model_parallel_size > 1 and OUTPUT not in layout.table
    alone = [i for i, name in enumerate(rows) if shared and name in (EMBEDDING, OUTPUT)]
    groups = [(how.element, [*rows.values(), *router], alone, how.shards)]
    if how.element != WIDE:
        groups = [(how.element, list(rows.values()), alone, how.shards), (WIDE, list(router), [], how.shards)]
    groups.append((how.element, experts, [], how.expert_shards))
    found = {"weights": 0.0, "gradients": 0.0, "optimizer": 0.0}
    for element, counts, own, shards in groups:
        n = buffer_elements(counts, how, own, shards) if counts else 0
        states = MOMENTS + (WIDE if element != WIDE else 0)
        found["weights"] += element * n
        found["gradients"] += WIDE * n
        found["optimizer"] += states * n / (shards if how.use_distributed_optimizer else 1)
    head = rows.get(OUTPUT, rows.get(EMBEDDING, 0)) if how.is_last(stage) else 0
    return found | {"teacher": how.element * float(head if cached else sum(every.values())) if teacher else 0.0}


def _next(n: int, divisor: int) -> int:
    return -(-n // divisor) * divisor
