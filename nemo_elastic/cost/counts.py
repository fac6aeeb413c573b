"""What a subnet costs: parameters, memory, FLOPs, all counted from the one table.

Identity: `parameters(layout, subnet)` == `sum(p.numel())` of the built child. The arithmetic takes integers (exact) or
tensors of expected sizes (differentiable: the count is multilinear in the sizes). No torch import here.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from ..kinds import kind_of, kinds_of
from ..space.architecture import KIND_NAMES, Architecture
from ..space.layout import ParamLayout
from ..space.subnet import Subnet

CACHES = ("kv_cache", "ssm_state", "conv_state")  # what a layer may keep between tokens


@dataclass(frozen=True, kw_only=True)
class ByteProfile:
    """Bytes per element of weights, KV cache, and SSM + convolution state (METHOD section 4)."""

    weights: float
    kv_cache: float
    state: float


BYTE_PROFILES = {
    "bf16": ByteProfile(weights=2, kv_cache=2, state=2),
    "fp32": ByteProfile(weights=4, kv_cache=4, state=4),
    "fp8_kv": ByteProfile(weights=2, kv_cache=1, state=2),
    "fp8": ByteProfile(weights=1, kv_cache=1, state=1),
    "int8": ByteProfile(weights=1, kv_cache=1, state=1),
    "fp4": ByteProfile(weights=0.5625, kv_cache=0.5625, state=1),
}


@dataclass(frozen=True)
class Memory:
    """Bytes of one serving copy."""

    weights: float
    kv_cache: float
    ssm_state: float
    conv_state: float

    @property
    def total(self) -> float:
        return self.weights + self.kv_cache + self.ssm_state + self.conv_state

    def to_dict(self) -> dict[str, float]:
        return {**asdict(self), "total": self.total}


def layer_parameters(layout: ParamLayout, kind: str, sizes: Mapping[str, Any]) -> Any:
    """Parameters of one layer of `kind` at `sizes` (dim -> size; ints or tensors; what is missing is the parent's)."""
    if all(isinstance(v, int) for v in sizes.values()):
        return _layer_count(layout, kind, tuple(sorted(sizes.items())))
    return _sum_rows(layout, kind, sizes)


@lru_cache(maxsize=1 << 16)
def _layer_count(layout: ParamLayout, kind: str, sizes: tuple[tuple[str, int], ...]) -> int:
    return _sum_rows(layout, kind, dict(sizes))


def _sum_rows(layout: ParamLayout, kind: str, sizes: Mapping[str, Any]) -> Any:
    layer = layout.architecture.hybrid_override_pattern.index(kind)
    return sum(spec.numel(sizes) for spec in layout.table.values() if spec.layer == layer)


def outer_parameters(layout: ParamLayout, hidden_size: Any) -> Any:
    """Parameters outside the stack: embedding, final norm and, untied, the output layer."""
    return sum(spec.numel({"hidden_size": hidden_size}) for spec in layout.table.values() if spec.layer is None)


def parameters(layout: ParamLayout, subnet: Subnet) -> int:
    """Exact parameter count of a child."""
    pattern = layout.architecture.hybrid_override_pattern
    layers = (layer_parameters(layout, pattern[i], layout.sizes(subnet, i)) for i in subnet.layers)
    return outer_parameters(layout, subnet.hidden_size) + sum(layers)


def layer_active_parameters(layout: ParamLayout, kind: str, sizes: Mapping[str, Any]) -> Any:
    """Those of one layer that one token passes through: of a mixture, the router, the shared and `top-k` experts."""
    arch = layout.architecture
    prefix = f"decoder.layers.{arch.hybrid_override_pattern.index(kind)}."
    count = layer_parameters(layout, kind, sizes)
    for row, (met, units) in kind_of(kind).met(arch, sizes).items():
        whole = layout.table[prefix + row].numel(sizes)
        one = whole // units if isinstance(units, int) else whole / units
        count = count - whole + met * one
    return count


def active_parameters(layout: ParamLayout, subnet: Subnet) -> int:
    """Exact count of what one token passes through, embedding and output layer counted whole."""
    pattern = layout.architecture.hybrid_override_pattern
    layers = (layer_active_parameters(layout, pattern[i], layout.sizes(subnet, i)) for i in subnet.layers)
    return outer_parameters(layout, subnet.hidden_size) + sum(layers)


def parameters_by_kind(layout: ParamLayout, subnet: Subnet) -> dict[str, int]:
    """Exact count per kind of layer that the parent has.

    Embedding, final norm and output layer stand under `embedding_and_output`.
    """
    pattern = layout.architecture.hybrid_override_pattern
    found = {kind.name: 0 for kind in kinds_of(pattern)}
    for layer in subnet.layers:
        kind = pattern[layer]
        found[KIND_NAMES[kind]] += layer_parameters(layout, kind, layout.sizes(subnet, layer))
    return {**found, "embedding_and_output": outer_parameters(layout, subnet.hidden_size)}


def layer_state_elements(
    arch: Architecture, kind: str, sizes: Mapping[str, Any], sequence_length: int
) -> dict[str, Any]:
    """Cached elements of one layer for one sequence, for each of `CACHES`."""
    return dict.fromkeys(CACHES, 0) | kind_of(kind).caches(arch, sizes, sequence_length)


def memory(
    layout: ParamLayout, subnet: Subnet, *, batch_size: int, sequence_length: int, profile: ByteProfile
) -> Memory:
    """Bytes to serve a child at a batch and length: weights, KV cache, SSM and convolution state."""
    arch, sums = layout.architecture, dict.fromkeys(CACHES, 0)
    for layer in subnet.layers:
        kind = arch.hybrid_override_pattern[layer]
        for term, n in layer_state_elements(arch, kind, layout.sizes(subnet, layer), sequence_length).items():
            sums[term] += n * batch_size
    return Memory(
        weights=parameters(layout, subnet) * profile.weights,
        kv_cache=sums["kv_cache"] * profile.kv_cache,
        ssm_state=sums["ssm_state"] * profile.state,
        conv_state=sums["conv_state"] * profile.state,
    )


def layer_flops(
    layout: ParamLayout, kind: str, sizes: Mapping[str, Any], *, sequence_length: int, chunk_size: int = 128
) -> Any:
    """Forward FLOPs of one layer for one sequence: 2 per multiply-add of its matrix products, and nothing else.

    Elementwise work, norms and the convolution (4 taps) are left out; what is counted is said by the kind. A scan
    works in chunks of `chunk_size` steps.
    """
    return kind_of(kind).flops(layout.architecture, sizes, sequence_length, chunk_size)


def layer_recomputed(
    layout: ParamLayout, kind: str, sizes: Mapping[str, Any], *, sequence_length: int, chunk_size: int = 128
) -> Any:
    """Of `layer_flops`, what selective recomputation does again."""
    return kind_of(kind).recomputed(layout.architecture, sizes, sequence_length, chunk_size)


def flops(layout: ParamLayout, subnet: Subnet, *, sequence_length: int, chunk_size: int = 128) -> int:
    """Forward FLOPs of a child for one sequence, output layer included.

    A training step is three times that, plus what its kernels compute again (ours: C B^T; recomputation: a forward).
    """
    pattern = layout.architecture.hybrid_override_pattern
    layers = (
        layer_flops(layout, pattern[i], layout.sizes(subnet, i), sequence_length=sequence_length, chunk_size=chunk_size)
        for i in subnet.layers
    )
    return sum(layers) + 2 * sequence_length * subnet.hidden_size * layout.architecture.vocab_size
