"""Stage 7: every budget from one copy of the weights at 12B widths, 8 layers: switch, prefill, decode."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch
from registry import Found, Machine, check, difference

from nemo_elastic.checkpoint.manifest import Manifest
from nemo_elastic.config.model_fields import architecture_of
from nemo_elastic.cost.counts import parameters
from nemo_elastic.space.budget import Budget
from nemo_elastic.space.elastic_space import ElasticSpace
from nemo_elastic.space.layout import ParamLayout

if TYPE_CHECKING:
    from nemo_elastic.serving import ElasticFamily

WIDTHS = {
    "hybrid_override_pattern": "M-M-M*M-",
    "hidden_size": 5120,
    "ffn_hidden_size": 20480,
    "num_attention_heads": 40,
    "num_query_groups": 8,
    "kv_channels": 128,
    "mamba_num_heads": 128,
    "mamba_head_dim": 80,
    "mamba_num_groups": 8,
    "mamba_state_dim": 128,
    "vocab_size": 131072,
    "seq_length": 4096,
}
TINY = {
    "hidden_size": 64,
    "ffn_hidden_size": 128,
    "num_attention_heads": 8,
    "kv_channels": 8,
    "mamba_num_heads": 16,
    "mamba_head_dim": 8,
    "mamba_state_dim": 16,
    "vocab_size": 256,
}
CUTS = {  # the 12B's smallest choices, and some between
    "large": {"hidden_size": 4480, "ffn_hidden_size": 15680, "mamba_num_heads": 112, "num_attention_heads": 32},
    "small": {"hidden_size": 3584, "ffn_hidden_size": 10240, "mamba_num_heads": 80, "num_attention_heads": 24},
}
TINY_CUTS = {"small": {"hidden_size": 32, "ffn_hidden_size": 64, "mamba_num_heads": 8}}


def manifest_of(model: dict, cuts: dict) -> Manifest:
    """A family that is the parent and the children of `cuts`; no layer is dropped."""
    space = ElasticSpace(architecture=architecture_of(model))
    subnets = {"full": space.full_subnet(), **{name: space.subnet(**cut) for name, cut in cuts.items()}}
    layout = ParamLayout(space.architecture)
    shares = {n: parameters(layout, s) / parameters(layout, subnets["full"]) for n, s in subnets.items()}
    budgets = {name: Budget(name=name, kind="fraction", value=share) for name, share in shares.items()}
    return Manifest(model=model, space=space, budgets=budgets, subnets=subnets)


@cache
def family_on(machine: Machine) -> ElasticFamily:
    """The family with random weights, bf16 on a GPU."""
    from serving import wide

    from nemo_elastic.serving import ElasticFamily

    model = WIDTHS | (TINY if machine.tiny else {})
    manifest = manifest_of(model, TINY_CUTS if machine.tiny else CUTS)
    dtype = torch.bfloat16 if machine.is_cuda else torch.float32
    weights = wide(manifest, str(machine.device), dtype)
    return ElasticFamily(weights, manifest.layout, model, manifest.subnets)


def prompt_on(machine: Machine) -> torch.Tensor:
    return torch.zeros(1, 32 if machine.tiny else 2048, dtype=torch.int64, device=machine.device)


@check(
    stage=7,
    seconds=50,
    predicted={"small_compact_switch_ms": (None, 20), "full_decode_ms_1": (1.0, 2.5), "small_decode_ms_1": (1.0, 2.5)},
)
def serving(machine: Machine) -> Found:
    """Compact switch, prefill of 2048 tokens, a decoded token at batch 1 and 32, per budget"""
    family, prompt, found = family_on(machine), prompt_on(machine), {}
    for name in family.budgets:
        found[f"{name}_compact_switch_ms"] = machine.milliseconds(lambda n=name: family.switch(n, compact=True), 3)
        found[f"{name}_prefill_ms"] = machine.milliseconds(lambda: family.logits(prompt, last_only=True), 3)
        for batch in (1, 32):
            rows, cache = prompt[:, :16].repeat(batch, 1), family.new_cache(batch)
            family.logits(rows, cache, last_only=True)
            found[f"{name}_decode_ms_{batch}"] = machine.milliseconds(
                lambda r=rows, c=cache: family.logits(r[:, :1], c, last_only=True)
            )
    return Found(found)


ROOM, LIMIT = 64, {torch.float32: 1e-4, torch.bfloat16: 3e-2}


@check(
    stage=7,
    seconds=30,
    predicted={"full_step_ms_1": (1.35, 2.0), "small_step_ms_1": (0.65, 1.2), "small_step_ms_32": (0.7, 1.5)},
)
def decode_step(machine: Machine) -> Found:
    """A decoded token as one recorded CUDA graph, room for 64 tokens, batch 1 and 32, per budget; logits as launched"""
    family, prompt, found = family_on(machine), prompt_on(machine), {}
    for name in family.budgets:
        family.switch(name, compact=True)
        for batch in (1, 32):
            rows = (prompt[:, :16] + torch.arange(16, device=machine.device)).repeat(batch, 1)
            cache, step = family.new_cache(batch, room=ROOM), family.decode_step(batch, room=ROOM)
            family.logits(rows, cache, last_only=True)
            step.begin(cache)
            apart = [difference(step(rows[:, i : i + 1]), family.logits(rows[:, i : i + 1], cache)) for i in range(4)]
            found[f"{name}_apart_{batch}"] = max(apart)
            assert max(apart) < LIMIT[family.weights["decoder.final_norm.weight"].dtype], f"{name}: {apart}"
            found[f"{name}_step_ms_{batch}"] = machine.milliseconds(lambda s=step, r=rows: s(r[:, :1]))
    return Found(found, stand_in=not machine.is_cuda)
