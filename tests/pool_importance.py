"""What the workers of the importance tests run: a tiny plain hybrid with weights that are a function of their name."""

import zlib

import torch
from megatron.core import parallel_state
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_elastic.importance.scores import AGGREGATIONS
from nemo_elastic.mcore.kernels.layer_specs import hybrid_stack_spec
from nemo_elastic.mcore.ranking.collect import WidthSettings, collect_widths
from nemo_elastic.mcore.versions import HybridModel, layer_pattern
from nemo_elastic.space.architecture import Architecture
from nemo_elastic.space.layout import ParamLayout

TINY = Architecture(
    hybrid_override_pattern="M-M*M-M-",
    hidden_size=48,
    ffn_hidden_size=64,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=8,
    mamba_num_heads=8,
    mamba_head_dim=8,
    mamba_num_groups=4,
    mamba_state_dim=8,
    vocab_size=64,
)
FFN_GROUPS = 8
BATCH, LENGTH = 2, 16


def layout_of(arch: Architecture) -> ParamLayout:
    return ParamLayout(arch, ffn_groups=FFN_GROUPS)


def whole_tensors(arch: Architecture, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Random whole parameters (norm weights too), each a function of its name."""
    tensors = {}
    for name, spec in layout_of(arch).table.items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        shape = spec.shape({})
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        if "norm" in name:
            noise = 1 + 0.3 * noise
        elif name.endswith("A_log"):
            noise = noise.abs()
        elif name.endswith(("dt_bias", "conv1d.bias", "mixer.D")):
            noise = 0.5 * noise
        elif name.startswith("embedding"):
            pass
        else:
            noise = noise * 0.7 / shape[-1] ** 0.5
        tensors[name] = noise.to(dtype)
    return tensors


def build(arch: Architecture, *, sp: bool = False, dtype: torch.dtype = torch.float32) -> HybridModel:
    """The plain model on this rank of the current layout."""
    config = TransformerConfig(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.ffn_hidden_size,
        num_attention_heads=arch.num_attention_heads,
        num_query_groups=arch.num_query_groups,
        kv_channels=arch.kv_channels,
        mamba_num_heads=arch.mamba_num_heads,
        mamba_head_dim=arch.mamba_head_dim,
        mamba_num_groups=arch.mamba_num_groups,
        mamba_state_dim=arch.mamba_state_dim,
        add_bias_linear=False,
        normalization="RMSNorm",
        activation_func=lambda x: torch.relu(x) ** 2,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        persist_layer_norm=False,
        attention_backend=AttnBackend.local,
        is_hybrid_model=True,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        sequence_parallel=sp,
        pipeline_dtype=dtype,
        params_dtype=dtype,
    )
    return HybridModel(
        config,
        hybrid_stack_spec(),
        arch.vocab_size,
        LENGTH,
        **layer_pattern(arch.hybrid_override_pattern),
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=arch.share_embeddings_and_output_weights,
    ).to(dtype)


def rank_rows(arch: Architecture, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a whole parameter, written independently of the table: segment by segment."""
    tp = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    inner, state = arch.mamba_num_heads * arch.mamba_head_dim, arch.mamba_num_groups * arch.mamba_state_dim
    if "in_proj" in name:
        parts = tensor.split([inner, inner, state, state, arch.mamba_num_heads])
        return torch.cat([p.chunk(tp)[rank] for p in parts])
    if "conv1d" in name:
        return torch.cat([p.chunk(tp)[rank] for p in tensor.split([inner, state, state])])
    if name.endswith(("out_proj.weight", "linear_proj.weight", "linear_fc2.weight")):
        return tensor.chunk(tp, dim=1)[rank]
    if name.endswith(("qkv.weight", "fc1.weight", "embeddings.weight", "output_layer.weight")) or ".mixer." in name:
        return tensor.chunk(tp)[rank]
    return tensor


def global_name(model: HybridModel, name: str) -> str:
    """`decoder.layers.<place in this stage>` -> `decoder.layers.<global number>`."""
    if not name.startswith("decoder.layers."):
        return name
    _, _, place, rest = name.split(".", 3)
    return f"decoder.layers.{model.decoder.layers[int(place)].layer_number - 1}.{rest}"


def load(model: HybridModel, arch: Architecture, tensors: dict[str, torch.Tensor]) -> HybridModel:
    """Fill `model` from whole parameters."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            whole = global_name(model, name)
            parameter.copy_(rank_rows(arch, whole, tensors[whole]))
    return model.eval()


def token_batches(arch: Architecture, count: int, batch: int = BATCH, length: int = LENGTH) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, arch.vocab_size, (batch, length), generator=generator) for _ in range(count)]


def own_batches(arch: Architecture, count: int) -> list[torch.Tensor]:
    """This data-parallel rank's part of the batches."""
    dp, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    return token_batches(arch, count)[rank::dp]


def logits_of(model: HybridModel, tokens: torch.Tensor) -> torch.Tensor:
    """`[b, s, v]`; one process."""
    return model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)


def collect(
    sp: bool = False,
    ffn_site: str = "linear_fc2_input",
    mamba_site: str = "out_proj_input",
    aggregation: str = "mean_l2",
) -> dict[str, dict[int, torch.Tensor]]:
    """Width scores of the tiny model over four batches in the current layout."""
    assert aggregation in AGGREGATIONS
    model = load(build(TINY, sp=sp), TINY, whole_tensors(TINY))
    settings = WidthSettings(ffn_site=ffn_site, mamba_site=mamba_site, aggregation=aggregation, top_channels=4)
    return collect_widths(model, own_batches(TINY, 4), layout_of(TINY), settings)


def ablation(arch=TINY, *, sp=False, dtype=torch.float32, batches=4, memory_bytes=1e9, on_batch=None, **rest):
    """A `DepthAblation` of the tiny model in the current layout; `rest`: `metric`, and fields of `DepthRules`."""
    from nemo_elastic.importance.depth import DepthRules
    from nemo_elastic.mcore.ranking.depth import DepthAblation

    model = load(build(arch, sp=sp, dtype=dtype), arch, whole_tensors(arch, dtype))
    options = {"memory_bytes": memory_bytes, "on_batch": on_batch, "metric": rest.pop("metric", "centred_mse")}
    return DepthAblation(
        model, own_batches(arch, batches), DepthRules(pattern=arch.hybrid_override_pattern, **rest), **options
    )


def rank_depth(method, sp=False, **options):
    """(removed, scores, layer forwards, cosine scores) in the current layout."""
    from nemo_elastic.mcore.ranking.cosine import cosine_scores

    ranker = ablation(sp=sp, **options)
    progress = getattr(ranker, method)()
    cosine = cosine_scores(ranker.stack.model, ranker.batches, unit=ranker.rules.unit)
    return progress.removed, progress.scores, ranker.layer_forwards, cosine


def whole_gradients(arch: Architecture, tensors: dict, dtype: torch.dtype, sp: bool) -> tuple[list, dict]:
    """(this rank's logits, whole gradients of this stage's parameters) through Megatron's own schedule."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from nemo_elastic.mcore.models.build import named_global_parameters
    from nemo_elastic.mcore.models.build import whole_tensors as gathered

    tp, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    model, logits = load(build(arch, sp=sp, dtype=dtype), arch, tensors), []
    part = torch.linspace(-1, 1, arch.vocab_size, dtype=dtype).chunk(tp)[rank]

    def step(batches, model):
        tokens = next(batches)
        output = model(tokens, torch.arange(LENGTH).expand(BATCH, LENGTH), None)

        def loss(output):
            logits.append(output.detach())
            return (output * part).sum(), {}

        return output, loss

    batches = token_batches(arch, 2)
    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(batches),
        model=[model],
        num_microbatches=len(batches),
        seq_length=LENGTH,
        micro_batch_size=BATCH,
        forward_only=False,
    )
    group = parallel_state.get_tensor_model_parallel_group()
    gradients = {}
    local = ParamLayout(arch, ffn_groups=FFN_GROUPS, tp_size=tp)
    for name, parameter in named_global_parameters(model, local):
        gradient = parameter.grad
        if sp and getattr(parameter, "sequence_parallel", False):
            torch.distributed.all_reduce(gradient, group=group)  # what finalize_model_grads does
        ((_, gradients[name]),) = gathered([(name, gradient)], local)
    return logits, gradients


def sorting_errors(sp: bool = False) -> dict[str, tuple[float, float]]:
    """Largest difference of logits and of mapped-back gradients, parent against sorted parent, relative to the
    largest value of the tensor: every dim alone in fp64, all together in fp64 and fp32."""
    from nemo_elastic.importance.ranking import random_orders
    from nemo_elastic.importance.sorting import sort_tensor, sort_tensors
    from nemo_elastic.space.dims import present_dims

    def difference(a, b):
        return ((a - b).abs().max() / b.abs().max().clamp_min(1e-3)).item()

    layout, errors = layout_of(TINY), {}
    for dtype in (torch.float32, torch.float64):
        tensors = whole_tensors(TINY, dtype)
        logits, gradients = whole_gradients(TINY, tensors, dtype, sp)
        for dims in [(dim,) for dim in present_dims(TINY) if dtype == torch.float64] + [present_dims(TINY)]:
            orders = random_orders(layout, dims, torch.Generator().manual_seed(3))
            in_order = dict(sort_tensors(tensors.items(), layout, orders))
            assert any(not torch.equal(in_order[name], tensors[name]) for name in tensors)
            sorted_logits, sorted_gradients = whole_gradients(TINY, in_order, dtype, sp)
            back = {n: sort_tensor(n, g, layout, orders, inverse=True) for n, g in sorted_gradients.items()}
            errors[f"{'+'.join(dims)} {dtype}"] = (
                max((difference(a, b) for a, b in zip(sorted_logits, logits, strict=True)), default=0.0),
                max(difference(back[name], gradient) for name, gradient in gradients.items()),
            )
    return errors
