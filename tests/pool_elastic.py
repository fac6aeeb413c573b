"""Cases of the elastic modules that run in the worker pool or in the test's own process."""

from typing import Any

import torch
from megatron.core import parallel_state

from nemo_elastic.architecture import Architecture
from nemo_elastic.layout import ParamLayout
from nemo_elastic.mcore.build import build_elastic_model, build_plain_model, load_weights, named_global_parameters
from nemo_elastic.mcore.elastic.plan import hard_plan
from nemo_elastic.slicing import accumulate, take
from nemo_elastic.space import Subnet

FFN_GROUPS = 4
SMALL = {
    "hybrid_override_pattern": "M-M*M-*-",
    "hidden_size": 48,
    "ffn_hidden_size": 64,
    "num_attention_heads": 12,
    "num_query_groups": 4,
    "kv_channels": 8,
    "mamba_num_heads": 12,
    "mamba_head_dim": 8,
    "mamba_num_groups": 4,
    "mamba_state_dim": 8,
    "vocab_size": 64,
}


def architecture(**more: Any) -> Architecture:
    return Architecture(**(SMALL | more))


def random_weights(arch: Architecture, dtype: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor]:
    """Whole weights with random norms, biases and A, so that no identity holds by symmetry."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, spec in ParamLayout(arch, ffn_groups=FFN_GROUPS).table.items():
        shape = spec.shape({})
        w = torch.randn(shape, generator=generator, dtype=torch.float64)
        if len(shape) > 1:
            w = w / shape[-1] ** 0.5
        elif "norm" in name:
            w = 1 + 0.3 * w
        elif name.endswith("A_log"):
            w = 0.5 * w
        weights[name] = w.to(dtype)
    return weights


def tokens(arch: Architecture, seed: int = 1, batch: int = 2, length: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, arch.vocab_size, (batch, length), generator=generator)


def child_architecture(arch: Architecture, subnet: Subnet) -> Architecture:
    """The plain architecture of a child with uniform widths."""
    pattern = "".join(arch.hybrid_override_pattern[i] for i in subnet.layers)
    return Architecture(
        **(
            {f: getattr(arch, f) for f in SMALL if f != "hybrid_override_pattern"}
            | {
                "hybrid_override_pattern": pattern,
                "hidden_size": subnet.hidden_size,
                "ffn_hidden_size": subnet.ffn_hidden_size[0],
                "mamba_num_heads": subnet.mamba_num_heads[0],
                "mamba_head_dim": subnet.mamba_head_dim,
                "num_attention_heads": subnet.num_attention_heads[0],
                "share_embeddings_and_output_weights": arch.share_embeddings_and_output_weights,
            }
        )
    )


def _loss(logits: torch.Tensor, seed: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (logits * torch.randn(logits.shape, generator=generator, dtype=torch.float64).to(logits.dtype)).sum()


def run_modes(arch: Architecture, subnets: list[Subnet], dtype: torch.dtype, seed: int = 0) -> list[dict[str, Any]]:
    """Per subnet: logits and parameter gradients masked, sliced and of the extracted plain child (single process)."""
    weights, ids = random_weights(arch, dtype, seed), tokens(arch)
    layout = ParamLayout(arch, ffn_groups=FFN_GROUPS)
    model = build_elastic_model(arch, ffn_groups=FFN_GROUPS, params_dtype=dtype)
    load_weights(model, weights, arch, ffn_groups=FFN_GROUPS)
    results = []
    for subnet in subnets:
        found: dict[str, Any] = {}
        for mode in ("masked", "sliced"):
            model.zero_grad(set_to_none=True)
            logits = model(ids, None, None, elastic=hard_plan(layout, subnet, mode))
            _loss(logits).backward()
            grads = {
                n: torch.zeros_like(p) if p.grad is None else p.grad.clone()
                for n, p in named_global_parameters(model, layout)
            }
            found[mode] = (logits.detach().clone(), grads)
        uniform = all(subnet.is_uniform(n) for n in ("ffn_hidden_size", "mamba_num_heads", "num_attention_heads"))
        if uniform:
            child_arch = child_architecture(arch, subnet)
            child = build_plain_model(child_arch, params_dtype=dtype)
            cut = {name: take(weights[spec.name], spec, sizes) for name, spec, sizes in layout.child_params(subnet)}
            load_weights(child, cut, child_arch, ffn_groups=1)
            logits = child(ids, None, None)
            _loss(logits).backward()
            grads = {n: torch.zeros_like(weights[n]) for n in weights}
            rows = {name: (spec, sizes) for name, spec, sizes in layout.child_params(subnet)}
            for name, p in named_global_parameters(child, ParamLayout(child_arch, ffn_groups=1)):
                spec, sizes = rows[name]
                accumulate(p.grad, spec, sizes, grads[spec.name])
            found["extracted"] = (logits.detach(), grads)
        results.append(found)
    return results


def rank_of_pool() -> int:
    return parallel_state.get_tensor_model_parallel_rank()
