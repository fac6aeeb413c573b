"""What ranks of a pool run to compare layouts of the plain hybrid model: one training step on Megatron's own schedule.

Weights are a function of their checkpoint key: every rank cuts its part out of the same global tensor, by the global
offsets of its own sharded state dict. Gradients travel back as (key, offset, part), to be put together in the test.
"""

import zlib
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.activations import squared_relu
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_elastic.mcore.kernels.layer_specs import hybrid_stack_spec
from nemo_elastic.mcore.versions import HybridModel, build_optimizer, layer_pattern

VOCAB, SEQ, MICRO_BATCH, MICRO_BATCHES = 2048, 64, 2, 2
TINY_PATTERN = "M-M-M*-M-M-M*-M-"
Part = tuple[str, tuple[int, ...], tuple[int, ...], torch.Tensor]


def tiny_config(pattern: str = TINY_PATTERN, *, sp: bool = False, **more: Any) -> TransformerConfig:
    """The tiny parent's config for the layout that the pool has set."""
    settings: dict[str, Any] = {
        "num_layers": len(pattern),
        "hidden_size": 128,
        "ffn_hidden_size": 512,
        "num_attention_heads": 16,
        "num_query_groups": 4,
        "kv_channels": 16,
        "mamba_num_heads": 16,
        "mamba_head_dim": 16,
        "mamba_num_groups": 4,
        "mamba_state_dim": 32,
        "normalization": "RMSNorm",
        "activation_func": squared_relu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "is_hybrid_model": True,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": False,
        "attention_backend": AttnBackend.local,
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "sequence_parallel": sp,
        "pipeline_dtype": torch.float32,
    }
    return TransformerConfig(**settings | more)


def plain_model(config: TransformerConfig, pattern: str = TINY_PATTERN) -> torch.nn.Module:
    """This rank's part of the plain hybrid model, with weights that depend on their checkpoint keys alone."""
    model = HybridModel(
        config,
        hybrid_stack_spec(config),
        VOCAB,
        SEQ,
        **layer_pattern(pattern),
        position_embedding_type="none",
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )
    with torch.no_grad():
        for sharded in sharded_tensors(model):
            whole = weight_by_key(sharded.key, sharded.global_shape)
            sharded.data.copy_(whole[_window(sharded)])
    return model


def sharded_tensors(model: torch.nn.Module) -> list[ShardedTensor]:
    """The model's tensors under the keys of its checkpoint (`in_proj.weight.z`, ...), as views of its parameters."""
    state = model.sharded_state_dict()
    apply_factories(state)
    found: list[ShardedTensor] = []
    pending: list[Any] = [state]
    while pending:
        node = pending.pop()
        if isinstance(node, ShardedTensor):
            found.append(node)
        elif isinstance(node, (dict, list)):
            pending += node.values() if isinstance(node, dict) else node
    return found


def _window(sharded: ShardedTensor) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(sharded.global_offset, sharded.local_shape, strict=True))


def weight_by_key(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A global weight: random, of a sensible size, and no norm weight equal to one."""
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    noise = torch.randn(shape, generator=generator)
    if key.endswith("A_log"):
        return noise.abs().add(1.0).log()
    if len(shape) == 1:
        return (0.0 if "bias" in key else 1.0) + 0.2 * noise
    return noise * (0.5 if "conv1d" in key else 0.05)


def plain_step(pattern: str = TINY_PATTERN, *, sp: bool = False) -> dict[str, Any]:
    """Losses per micro-batch (last stage), gradient norm, and this rank's parts of every gradient."""
    config = tiny_config(pattern, sp=sp)
    model = plain_model(config, pattern)
    ddp = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
    optimizer = build_optimizer(OptimizerConfig(optimizer="adam", lr=1e-3, clip_grad=0.0), [ddp])
    config.finalize_model_grads_func = finalize_model_grads
    ddp.zero_grad_buffer()
    batches = torch.randint(0, VOCAB, (MICRO_BATCHES, MICRO_BATCH, SEQ + 1), generator=torch.Generator().manual_seed(7))
    results = get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=iter(batches),
        model=[ddp],
        num_microbatches=MICRO_BATCHES,
        seq_length=SEQ,
        micro_batch_size=MICRO_BATCH,
        forward_only=False,
    )
    gradients = [parameter.main_grad.clone() for parameter in model.parameters()]
    _, grad_norm, _ = optimizer.step()
    with torch.no_grad():  # the sharded state dict then cuts the gradients as it cuts the weights
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.copy_(gradient)
    parts = [
        (s.key, tuple(s.global_shape), tuple(s.global_offset), s.data.detach().clone())
        for s in sharded_tensors(model)
        if is_main_replica(s.replica_id)
    ]
    return {"losses": [r["loss"].item() for r in results], "grad_norm": float(grad_norm), "parts": parts}


def _forward_step(batches: Any, model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    tokens = next(batches)
    positions = torch.arange(SEQ).expand(MICRO_BATCH, SEQ)
    output = model(tokens[:, :-1].contiguous(), positions, None, labels=tokens[:, 1:].contiguous())
    return output, lambda losses: (losses.mean(), {"loss": losses.detach().mean()})


def assemble(ranks: list[list[Part]]) -> dict[str, torch.Tensor]:
    """Global tensors from the parts of all ranks; a part that is missing leaves NaN."""
    whole: dict[str, torch.Tensor] = {}
    for key, shape, offset, part in (entry for parts in ranks for entry in parts):
        target = whole.setdefault(key, torch.full(shape, float("nan")))
        target[tuple(slice(o, o + n) for o, n in zip(offset, part.shape, strict=True))] = part
    return whole


def checkpoint_keys(pattern: str) -> dict[str, tuple[int, ...]]:
    """Key and global shape of every tensor of the checkpoint on this rank."""
    return {s.key: tuple(s.global_shape) for s in sharded_tensors(plain_model(tiny_config(pattern), pattern))}


def split_marks(pattern: str) -> dict[str, bool]:
    """Parameter name -> whether it counts as split over tensor-parallel ranks."""
    model = plain_model(tiny_config(pattern), pattern)
    return {name: getattr(p, "tensor_model_parallel", False) for name, p in model.named_parameters()}


def shared_marks(pattern: str, *, sp: bool) -> dict[str, bool]:
    """Parameter name -> whether its gradient is all-reduced for sequence parallelism."""
    model = plain_model(tiny_config(pattern, sp=sp), pattern)
    return {name: getattr(p, "sequence_parallel", False) for name, p in model.named_parameters()}


def fail_on(rank: int) -> int:
    """A case that raises on one rank, for the pool's own test."""
    if torch.distributed.get_rank() == rank:
        raise RuntimeError("this rank was told to fail")
    return torch.distributed.get_rank()


def layout() -> tuple[int, int, int, int]:
    """(world rank, TP rank, PP rank, DP size)."""
    return (
        torch.distributed.get_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
    )


def tracker_draws() -> tuple[float, float, bool]:
    """A number from the tensor-parallel stream, one from the common stream, and whether forking left that alone."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    before = torch.get_rng_state()
    with get_cuda_rng_tracker().fork():
        own = torch.rand(()).item()
    untouched = torch.equal(before, torch.get_rng_state())
    return own, torch.rand(()).item(), untouched
