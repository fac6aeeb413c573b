"""Stage 5: what a step costs at 12B widths, and what unaligned widths cost a product."""

from dataclasses import replace

import torch
from registry import Found, Machine, check, one_process

from nemo_elastic.space.architecture import Architecture

WIDE = Architecture(
    hybrid_override_pattern="M-M-*-",
    hidden_size=5120,
    ffn_hidden_size=20480,
    num_attention_heads=40,
    num_query_groups=8,
    kv_channels=128,
    mamba_num_heads=128,
    mamba_head_dim=80,
    mamba_num_groups=8,
    mamba_state_dim=128,
    vocab_size=131072,
)
SHARD = replace(  # what a rank of TP 8 holds
    WIDE, ffn_hidden_size=2560, num_attention_heads=5, num_query_groups=1, mamba_num_heads=16, mamba_num_groups=1,
    vocab_size=16384,
)  # fmt: skip
TOKENS = 8192
IN_PROJ_WIDTHS = {2671: 2672, 2510: 2512, 2188: 2192, 1866: 1872}  # of the 12B's choices at TP 8, and the next of 16


@check(
    stage=5,
    seconds=60,
    predicted={
        "plain_s": (0.13, 0.18),
        "elastic_over_plain": (None, 1.01),
        "sliced_over_extracted_0.5": (None, 1.05),
        "masked_over_full_0.5": (1.02, 1.05),
    },
)
def step_time(machine: Machine) -> Found:
    """Plain, elastic, sliced, masked and extracted steps at 12B widths, M-M-*-, 8192 tokens, bf16"""
    import elastic_step

    one_process()
    arch, length = (elastic_step.QUICK, 64) if machine.tiny else (WIDE, TOKENS)
    dtype = torch.bfloat16 if machine.is_cuda else torch.float32
    how = {"length": length, "repetitions": 1 if machine.tiny else 3, "device": machine.device, "dtype": dtype}
    measured = elastic_step.measure(arch, [0.5] if machine.tiny else [0.75, 0.5], **how, with_optimizer=False)
    full = measured["full"]
    found = {"plain_s": full["plain_s"], "elastic_over_plain": full["elastic_over_plain"]}
    found["plain_peak_gb"] = full["memory_bytes"] / 1e9
    for budget in measured["budgets"]:
        at = budget["budget"]
        found |= {
            f"sliced_over_extracted_{at}": budget["sliced_over_extracted"],
            f"masked_over_full_{at}": budget["masked_time_ratio"],
            f"sliced_over_full_{at}": budget["sliced_time_ratio"],
            f"sliced_memory_ratio_{at}": budget["sliced_memory_ratio"],
        }
    return Found(found)


@check(stage=5, seconds=30, predicted={"sliced_over_extracted_0.5": (None, 1.08)})
def shard_step_time(machine: Machine) -> Found:
    """The same at the widths of a rank of TP 8"""
    import elastic_step

    one_process()
    arch, length = (elastic_step.QUICK, 64) if machine.tiny else (SHARD, TOKENS)
    dtype = torch.bfloat16 if machine.is_cuda else torch.float32
    how = {"length": length, "repetitions": 1 if machine.tiny else 3, "device": machine.device, "dtype": dtype}
    measured = _with_one_group(elastic_step, arch, how)
    (budget,) = measured["budgets"]
    return Found({"plain_s": measured["full"]["plain_s"], "sliced_over_extracted_0.5": budget["sliced_over_extracted"]})


def _with_one_group(elastic_step: object, arch: Architecture, how: dict) -> dict:
    """`measure` of one budget, the FFN in as many groups as the shard has."""
    before = elastic_step.FFN_GROUPS
    elastic_step.FFN_GROUPS = arch.mamba_num_groups
    try:
        return elastic_step.measure(arch, [0.5], **how, with_optimizer=False)
    finally:
        elastic_step.FFN_GROUPS = before


@check(stage=5, seconds=20, predicted={"slowest_over_aligned": (1.1, 2.0)})
def unaligned_products(machine: Machine) -> Found:
    """in_proj of a rank at the 12B's unaligned widths against the next multiple of 16, forward and backward"""
    tokens, hidden = (64, 64) if machine.tiny else (TOKENS, 5120)
    dtype = torch.bfloat16 if machine.is_cuda else torch.float32
    x = torch.randn(tokens, hidden, device=machine.device, dtype=dtype, requires_grad=True)

    def run(width: int) -> float:
        weight = torch.randn(width, hidden, device=machine.device, dtype=dtype, requires_grad=True)
        gradient = torch.randn(tokens, width, device=machine.device, dtype=dtype)
        return machine.milliseconds(lambda: (x @ weight.t()).backward(gradient))

    ratios = {f"{odd}": run(odd) / run(even) for odd, even in IN_PROJ_WIDTHS.items()}
    return Found({"slowest_over_aligned": max(ratios.values()), **ratios})
