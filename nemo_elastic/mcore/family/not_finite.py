"""Where a forward stops being finite: the first module, in the order of the network, whose output has a NaN or Inf.

The micro-batch is run once more, without gradients, through Megatron's schedule at the same plan, so that every rank of
the replica takes part and pipeline stages look at their own layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from ...kinds import kinds
from ..elastic.plan import Plan
from ..models.build import unwrapped
from ..models.evaluate import run_forward
from ..versions import pattern_of


@dataclass(frozen=True, order=True)
class BadOutput:
    """A finding; the smallest of all ranks is the first.

    Attributes:
        micro_batch: number of the micro-batch within the step, over all replicas.
        place: position in the network; -1 the embedding.
        module: name, and kind of a layer.
        budget: what the micro-batch ran.
        weights: parameters of the module that are not finite themselves.
    """

    micro_batch: int
    place: int
    module: str
    budget: str
    weights: tuple[str, ...] = ()


@torch.no_grad()
def first_bad_output(
    model: nn.Module,
    micro_batches: Sequence[tuple[int, str, Mapping[str, Any], Plan | None]],
    shape: tuple[int, int],
) -> BadOutput | None:
    """The first over all ranks, or None when every output is finite.

    Args:
        micro_batches: (number over all replicas, budget, batch, plan), as many on each rank. The first stage has the
            tokens, the last one the labels; context-parallel ranks their own positions of them.
        shape: `[b, s]` of a micro-batch.
    """
    core, found, context = unwrapped(model), [], parallel_state.get_context_parallel_world_size()
    own = (shape[0], shape[1] // context)
    for number, budget, batch, plan in micro_batches:
        given = (batch.get(key) for key in ("tokens", "labels"))
        pair = tuple(torch.zeros(own, dtype=torch.int64) if t is None else t for t in given)
        with _watched(core) as seen:
            run_forward(core, [pair], plan)
        found += [BadOutput(number, place, name, budget, weights) for place, name, weights in seen]
    everywhere: list[list[BadOutput]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everywhere, found)
    return min((bad for ranks in everywhere for bad in ranks), default=None)


@contextmanager
def _watched(core: nn.Module) -> Iterator[list[tuple[int, str, tuple[str, ...]]]]:
    seen: list[tuple[int, str, tuple[str, ...]]] = []

    def look(place: int, name: str, module: nn.Module, output: Any) -> None:
        if not all(bool(torch.isfinite(t).all()) for t in _tensors(output)):
            bad = tuple(n for n, p in module.named_parameters() if not bool(torch.isfinite(p).all()))
            seen.append((place, name, bad))

    def watch(place: int, name: str, module: nn.Module) -> Callable[[], None]:
        handle = module.register_forward_hook(lambda m, inputs, output: look(place, name, m, output))
        stock = getattr(module, "elastic", None)  # what a plan runs instead of the forward
        if stock is None:
            return handle.remove

        def elastic(*args: Any, **kwargs: Any) -> Any:
            output = stock(*args, **kwargs)
            look(place, name, module, output)
            return output

        module.elastic = elastic
        return lambda: (handle.remove(), delattr(module, "elastic"))

    undo = [watch(*place) for place in _places(core)]
    try:
        yield seen
    finally:
        for forget in undo:
            forget()


def _places(core: nn.Module) -> Iterator[tuple[int, str, nn.Module]]:
    if core.pre_process:
        yield -1, "embedding", core.embedding
    table = getattr(core, "layout", None)
    pattern = pattern_of(core) if table is None else table.architecture.hybrid_override_pattern
    words = {kind.letter: f" ({kind.words})" for kind in kinds()}
    for layer in core.decoder.layers:
        index = layer.layer_number - 1
        yield index, f"layer {index}{words.get(pattern[index : index + 1], '')}", layer
    if core.post_process:
        yield 1 << 30, "final norm", core.decoder.final_norm
        yield (1 << 30) + 1, "output layer", core.output_layer


def _tensors(output: Any) -> list[Tensor]:
    outputs = output if isinstance(output, tuple | list) else (output,)
    return [t for t in outputs if isinstance(t, Tensor) and t.is_floating_point()]
