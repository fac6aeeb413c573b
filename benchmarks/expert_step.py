"""What a training step of half the experts costs: sliced and masked, against the extracted child and the whole model.

    python benchmarks/expert_step.py [--quick] [--repetitions N] [--threads N] [--output FILE]

As `elastic_step.py`, of a model with a mixture in every other layer. One child has half of the experts, the other half
of the neurons of each besides; a token meets as many experts in all of them, so that half of the experts alone saves no
product. The limit is 1.08 x the extracted child.
"""

from __future__ import annotations

import os
from dataclasses import replace

from elastic_step import measure, start_megatron
from harness import finish, parser, start

from nemo_elastic.space.architecture import Architecture

FULL = Architecture(
    hybrid_override_pattern="MEM*EME",
    hidden_size=512,
    ffn_hidden_size=1,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=64,
    mamba_num_heads=16,
    mamba_head_dim=64,
    mamba_num_groups=8,
    mamba_state_dim=64,
    num_moe_experts=32,
    moe_ffn_hidden_size=768,
    moe_router_topk=4,
    moe_shared_expert_intermediate_size=1536,
    vocab_size=8192,
)
HALVED = {
    "experts": {"num_moe_experts": 16},
    "experts and neurons": {"num_moe_experts": 16, "moe_ffn_hidden_size": 384},
}
QUICK = replace(
    FULL,
    hybrid_override_pattern="ME*E",
    hidden_size=128,
    mamba_num_heads=8,
    mamba_head_dim=32,
    mamba_state_dim=16,
    num_attention_heads=4,
    kv_channels=32,
    vocab_size=512,
)


def main() -> int:
    words = parser(__doc__, quick="a toy model: shows that it runs, measures overheads only", repetitions=5)
    arguments = start(words)
    start_megatron()
    arch, length = (QUICK, 128) if arguments.quick else (FULL, 2048)
    result = measure(arch, [], halved=HALVED, length=length, repetitions=arguments.repetitions)
    return finish(arguments, {**result, "load_average_at_end": round(os.getloadavg()[0], 2)})


if __name__ == "__main__":
    raise SystemExit(main())
