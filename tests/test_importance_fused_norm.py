"""A norm that is fused into the linear behind it (Transformer Engine) gives the scores of a norm of its own."""

import torch
from pool_importance import TINY, build, layout_of, load, token_batches, whole_tensors

from nemo_elastic.mcore.ranking.collect import collect_widths


class FusedNormLinear(torch.nn.Module):
    """What Transformer Engine's fused module is to an observer: unnormalised input, a `layer_norm_weight`."""

    def __init__(self, norm, linear):
        super().__init__()
        self.layer_norm_weight, self.weight, self.norm, self.linear = norm.weight, linear.weight, [norm], linear

    def forward(self, x):
        return self.linear(self.norm[0](x))


def fuse(layer):
    """Move the layer's norm into its first linear."""
    owner, first, name = {
        "MambaLayer": ("mixer", "in_proj", "norm"),
        "TransformerLayer": ("self_attention", "linear_qkv", "input_layernorm"),
        "MLPLayer": ("mlp", "linear_fc1", "pre_mlp_layernorm"),
    }[type(layer).__name__]
    module = getattr(layer, owner)
    setattr(module, first, FusedNormLinear(getattr(layer, name), getattr(module, first)))
    setattr(layer, name, torch.nn.Identity())


def test_fused_norms_are_seen_through(one_rank):
    plain, fused = (load(build(TINY), TINY, whole_tensors(TINY)) for _ in range(2))
    for layer in fused.decoder.layers:
        fuse(layer)
    expected, scores = (collect_widths(m, token_batches(TINY, 2), layout_of(TINY)) for m in (plain, fused))
    assert scores["hidden_size"].keys() == expected["hidden_size"].keys()
    for layer, row in expected["hidden_size"].items():
        torch.testing.assert_close(scores["hidden_size"][layer], row, rtol=1e-6, atol=0)
