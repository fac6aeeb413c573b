"""One way of laying a training run over GPUs, and what a micro-batch runs there; Megatron's sizes. No torch here."""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

from ..kinds import kind_of
from ..kinds.kind import Ran
from ..space.architecture import Architecture
from ..space.layout import ParamLayout
from ..space.subnet import Subnet, row_of

Mode = Literal["whole", "sliced", "masked", "soft"]


@dataclass(frozen=True, kw_only=True)
class GpuLayout:
    """Parallel sizes, micro-batch, recomputation.

    Attributes:
        data_parallel_size: replicas that have samples of their own. Gradients and optimizer shards go over these times
            `context_parallel_size`.
        expert_model_parallel_size: how many of these share out a layer's experts.
        element: bytes of a weight and of an activation: 2 in bf16-mixed, 4 in fp32.
        rotary_percent: share of a head's channels that positions turn; 0 without positions.
        kernels: as of `kinds.kind.Ran`.
    """

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    data_parallel_size: int = 1
    sequence_parallel: bool = False
    micro_batch_size: int = 1
    recompute_granularity: str | None = None
    use_distributed_optimizer: bool = True
    element: int = 2
    rotary_percent: float = 0.0
    kernels: str = "cuda"

    @property
    def gpus(self) -> int:
        """All of them."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.shards

    @property
    def shards(self) -> int:
        """How many GPUs share the optimizer's states of the same weights."""
        return self.data_parallel_size * self.context_parallel_size

    @property
    def expert_shards(self) -> int:
        """How many GPUs share the optimizer's states of the same experts."""
        return self.shards // self.expert_model_parallel_size

    @property
    def sequence_share(self) -> float:
        """What a rank holds of the tokens between tensor-parallel regions."""
        return 1 / self.tensor_model_parallel_size if self.sequence_parallel else 1.0

    def tokens(self, seq_length: int) -> float:
        """Tokens of a micro-batch on one context-parallel rank."""
        return self.micro_batch_size * seq_length / self.context_parallel_size

    def layers(self, architecture: Architecture, stage: int) -> range:
        """The parent's layers on a pipeline stage."""
        each = architecture.num_layers // self.pipeline_model_parallel_size
        return range(stage * each, (stage + 1) * each)

    def in_flight(self, stage: int, micro_batches: int) -> int:
        """Micro-batches whose backward a stage still owes at most (one forward, one backward in turn)."""
        return min(micro_batches, self.pipeline_model_parallel_size - stage)

    def is_last(self, stage: int) -> bool:
        """Whether a stage has the output layer."""
        return stage == self.pipeline_model_parallel_size - 1


@dataclass(frozen=True, kw_only=True)
class Running:
    """What a student of a micro-batch runs: the parent itself, or a subnet sliced, masked, or under soft masks.

    `gates`: a hard choice that is being learned carries straight-through gates.
    """

    subnet: Subnet
    mode: Mode = "whole"
    gates: bool = False

    @cached_property
    def full_width(self) -> bool:
        """Whether activations have the parent's widths."""
        return self.mode != "sliced"

    def sizes(self, layout: ParamLayout, layer: int | None) -> dict[str, int]:
        """Widths that are computed with."""
        return {} if self.full_width else layout.sizes(self.subnet, layer)

    def hidden_size(self, architecture: Architecture) -> int:
        """Channels of the residual stream."""
        return architecture.hidden_size if self.full_width else self.subnet.hidden_size

    def is_cut(self, architecture: Architecture, letter: str) -> bool:
        """Whether the subnet has layers of a kind without all of its units."""
        dims = [dim.name for dim in kind_of(letter).dims]
        return any(min(row_of(self.subnet, n), default=0) < getattr(architecture, n) for n in dims)


@lru_cache(maxsize=1 << 14)
def alike(layout: ParamLayout, how: GpuLayout, running: Running, stage: int) -> tuple[tuple[int, int], ...]:
    """(a layer that runs on a stage, how many there are of its kind and sizes): they cost the same."""
    arch, found = layout.architecture, {}
    kept = set(running.subnet.layers) if running.mode != "soft" else set(range(arch.num_layers))
    for layer in how.layers(arch, stage):
        if layer in kept:
            key = (arch.hybrid_override_pattern[layer], *running.sizes(layout, layer).items())
            first, count = found.get(key, (layer, 0))
            found[key] = (first, count + 1)
    return tuple(found.values())


def ran(how: GpuLayout, running: Running, architecture: Architecture, letter: str, **more: Any) -> Ran:
    """How a layer of a kind runs there."""
    return Ran(
        element=how.element,
        ranks=how.tensor_model_parallel_size,
        context=how.context_parallel_size,
        sequences=how.micro_batch_size,
        turned=int(how.rotary_percent * architecture.kv_channels) if how.rotary_percent else 0,
        soft=running.mode == "soft",
        gates=running.gates,
        cut=running.mode == "masked" and running.is_cut(architecture, letter),
        kernels=how.kernels,
        **more,
    )
