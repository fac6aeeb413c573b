"""Bytes that a micro-batch leaves on a GPU for its backward, and what is needed for moments on the way.

Per token of a layer (h channels in the residual stream, e bytes an activation, t = 1/TP under sequence parallelism):

    the layer's norm      4 (2 h + 1) t           its input and the normed one in fp32, and the factor
    into its linear       e h t                   e h, whole, where a sliced child's linear has gathered it
    the sub-layer         `Kind.saved`            said by each kind, divided by TP
    learned choices       2 e h t                 in front of the gates, or the soft masks, of norm and residual
    full recomputation    e h t                   instead of all of the above: the layer's input

Stages keep this for every micro-batch in flight. Token ids are counted, weights and masks of a size are not. No torch
here.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..kinds import kind_of
from ..kinds.kind import size_of
from ..space.layout import ParamLayout
from .gpu_layout import GpuLayout, Running, alike, ran

WIDE, IDS = 4, 8  # bytes of fp32; of a token id (tensor parallelism keeps a byte more: whose it is)


def layer_bytes(
    layout: ParamLayout, how: GpuLayout, running: Running, layer: int, seq_length: int, recompute: str | None
) -> float:
    """Bytes that one layer keeps of one token.

    Args:
        recompute: `how.recompute_granularity`; another to ask what would be kept.
    """
    arch, e, share = layout.architecture, how.element, how.sequence_share
    letter = arch.hybrid_override_pattern[layer]
    sizes = running.sizes(layout, layer)
    hidden = size_of(arch, sizes, "hidden_size")
    if recompute == "full":
        return e * hidden * share
    way = ran(how, running, arch, letter, length=seq_length, selective=recompute == "selective")
    kept = kind_of(letter).saved(arch, sizes, way)
    cut = not running.full_width and any(n < getattr(arch, name) for name, n in sizes.items())
    into = e * hidden * (1 if cut and kept else share)  # a sub-layer that is computed again keeps what it was given
    learned = 2 * e * hidden * share if running.gates or running.mode == "soft" else 0
    return WIDE * (2 * hidden + 1) * share + into + sum(kept.values()) + learned


def saved_bytes(
    layout: ParamLayout, how: GpuLayout, running: Running, stage: int, seq_length: int, recompute: str | None
) -> float:
    """Bytes that one student of one micro-batch keeps on a stage, the head aside."""
    arch, share = layout.architecture, how.sequence_share
    layers = alike(layout, how, running, stage)
    per_token = sum(n * layer_bytes(layout, how, running, layer, seq_length, recompute) for layer, n in layers)
    hidden = running.hidden_size(arch)
    if stage == 0:
        per_token += IDS + (1 if how.tensor_model_parallel_size > 1 else 0)
        per_token += how.element * hidden * share if running.mode == "soft" else 0  # in front of the mask
    if how.is_last(stage):
        per_token += WIDE * (2 * hidden + 1) * share + (how.element * hidden * share if running.gates else 0)
    return per_token * how.tokens(seq_length)


def hand_over_bytes(
    layout: ParamLayout,
    how: GpuLayout,
    students: Sequence[Running],
    stage: int,
    seq_length: int,
    micro_batches: int,
    *,
    teacher: bool = True,
) -> float:
    """Bytes of what pipeline stages exchange: what was received for every micro-batch in flight and one gradient of it;
    what is sent and its gradient.
    """
    arch = layout.architecture
    width = sum(r.hidden_size(arch) for r in students) + (arch.hidden_size if teacher else 0)
    one = how.element * width * how.sequence_share * how.tokens(seq_length)
    received = one * (how.in_flight(stage, micro_batches) + 1) if stage else 0.0
    return received + (0.0 if how.is_last(stage) else 2 * one)


def head_bytes(
    layout: ParamLayout,
    how: GpuLayout,
    running: Running,
    seq_length: int,
    *,
    chunk_tokens: int,
    fused: bool = True,
    teacher: bool = True,
) -> float:
    """Bytes of output layer and loss at their highest, on the last stage.

    Fused: final states of student and teacher, gradients of states and weight in fp32 and, in bf16, cast, and the
    logits of a chunk (student, scratch, teacher) in fp32. Else the logits of all tokens, student's, their gradient and
    teacher's, and the chunk's buffers.
    """
    arch, e, tokens = layout.architecture, how.element, how.tokens(seq_length)
    hidden, rows = running.hidden_size(arch), layout.padded_vocab_size / how.tensor_model_parallel_size
    states = e * tokens * (hidden + (arch.hidden_size if teacher else 0))
    chunk = min(chunk_tokens, tokens) * rows * WIDE
    if not fused:
        return states + e * tokens * rows * (3 if teacher else 2) + chunk * (2 if e == WIDE else 3)
    gradients = hidden * (tokens + rows) * (WIDE if e == WIDE else WIDE + e)
    return states + gradients + chunk * (3 if teacher else 2)


def working_bytes(layout: ParamLayout, how: GpuLayout, running: Running, stage: int, seq_length: int) -> float:
    """Bytes of one layer at work, estimated: what it keeps without recomputation, for the gradients on the way back,
    and once more where it is computed again; on the first stage at least the embedding's dense gradient.
    """
    arch = layout.architecture
    again = 1 if how.recompute_granularity is None else 2
    layers = alike(layout, how, running, stage)
    largest = max((layer_bytes(layout, how, running, layer, seq_length, None) for layer, _ in layers), default=0.0)
    rows = layout.padded_vocab_size / how.tensor_model_parallel_size
    embedding = how.element * rows * arch.hidden_size if stage == 0 and running.full_width else 0.0
    return max(again * largest * how.tokens(seq_length), embedding)
