"""`CausalAttention` is Megatron's `DotProductAttention`, forward and backward, in fp64."""

import pytest

pytest.importorskip("megatron.core")

import torch
import torch.nn.functional as F
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_elastic.mcore.kernels.attention import CausalAttention
from nemo_elastic.mcore.kernels.grouped_heads import ungrouped


def config(**more: object) -> TransformerConfig:
    sizes = {"num_layers": 1, "hidden_size": 24, "num_attention_heads": 6, "num_query_groups": 2, "kv_channels": 4}
    return TransformerConfig(**sizes, masked_softmax_fusion=False, attention_dropout=0.0, **more)


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("layer_scaling", [False, True])
def test_equals_dot_product_attention(one_rank: None, scale: float | None, layer_scaling: bool) -> None:
    cfg = config(apply_query_key_layer_scaling=layer_scaling, attention_softmax_in_fp32=layer_scaling)
    generator = torch.Generator().manual_seed(0)
    shapes = [(17, 3, 6, 4), (17, 3, 2, 4), (17, 3, 2, 4)]
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]
    outer = torch.randn(17, 3, 24, generator=generator, dtype=torch.float64)
    results = []
    for kind in (DotProductAttention, CausalAttention):
        attention = kind(cfg, 3, AttnMaskType.causal, "self", softmax_scale=scale)
        out = attention(*inputs, None, attn_mask_type=AttnMaskType.causal)
        results.append([out, *torch.autograd.grad((out * outer).sum(), inputs)])
    tolerance = 1e-6 if layer_scaling else 1e-12  # Megatron takes the softmax in fp32 then
    for ours, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_keys_are_repeated_where_no_kernel_knows_groups() -> None:
    q, kv = torch.randn(1, 6, 5, 4), torch.randn(1, 2, 5, 4)
    assert ungrouped(q, kv, kv) == (kv, kv)  # a CPU's kernel does
    assert ungrouped(*(t.to("meta", torch.bfloat16) for t in (q, kv, kv)))[0].shape == kv.shape
    k, v = ungrouped(*(t.to("meta") for t in (q, kv, kv)))
    assert k.shape == v.shape == q.shape
    repeated = kv.repeat_interleave(3, dim=1)
    wanted = F.scaled_dot_product_attention(q, kv, kv, enable_gqa=True)
    torch.testing.assert_close(F.scaled_dot_product_attention(q, repeated, repeated), wanted)


def test_what_it_cannot_do_is_refused(one_rank: None) -> None:
    with pytest.raises(ValueError, match="is causal"):
        CausalAttention(config(), 1, AttnMaskType.padding, "self")
    q = torch.zeros(4, 1, 6, 4)
    kv = torch.zeros(4, 1, 2, 4)
    with pytest.raises(ValueError, match="neither a bias nor packed"):
        CausalAttention(config(), 1, AttnMaskType.causal, "self")(q, kv, kv, None, packed_seq_params=object())
