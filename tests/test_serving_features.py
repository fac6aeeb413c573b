"""Serving of dense parents' features and of experts: a budget is the elastic model's subnet, in pieces and by steps."""

from typing import Any

import expert_features
import pytest
import torch
from dense_features import FEATURES, MULTIPLIERS, TRANSFORMER, parts
from pool_elastic import elastic_model, layout_of, random_weights, tokens
from small_parent import space_of

from nemo_elastic.mcore.elastic.plan import hard_plan
from nemo_elastic.serving import ElasticFamily
from nemo_elastic.space.architecture import Architecture

pytestmark = pytest.mark.usefixtures("one_rank")
LENGTH = 13  # positions and the scan are fp32 whatever the weights are: hence 1e-6
CUT = {"hidden_size": 36, "ffn_hidden_size": 16, "num_attention_heads": 8, "layers": (0, 2, 3, 5)}


@pytest.mark.parametrize("pattern", [None, TRANSFORMER], ids=["hybrid", "transformer"])
@pytest.mark.parametrize("feature", list(FEATURES))
def test_every_feature_is_served_as_it_is_trained(feature: str, pattern: str | None) -> None:
    arch, function = parts(feature, pattern, share_embeddings_and_output_weights=feature == "all")
    check(arch, function, CUT)


@pytest.mark.parametrize("multiplied", [False, True], ids=["", "multiplied"])
@pytest.mark.parametrize("feature", list(expert_features.FEATURES))
def test_experts_are_served_as_they_are_trained(feature: str, multiplied: bool) -> None:
    """Of every router, with random biases; the small child has half of the experts, their neurons cut per layer."""
    arch, function = parts(feature)
    cut = {name: size for name, size in CUT.items() if name != "ffn_hidden_size"}
    cut |= {"num_moe_experts": 4, "moe_ffn_hidden_size": [12, 8, 16], "layers": (0, 1, 2, 3, 5, 7)}
    if arch.moe_shared_expert_intermediate_size:
        cut |= {"moe_shared_expert_intermediate_size": 12}
    check(arch, function | (MULTIPLIERS if multiplied else {}), cut)


def check(arch: Architecture, function: dict[str, Any], cut: dict[str, Any]) -> None:
    weights, space = random_weights(arch, torch.float64), space_of(arch)
    subnets = {"full": space.full_subnet(), "small": space.subnet(**cut)}
    ids = tokens(arch, length=LENGTH)
    model = elastic_model(arch, torch.float64, function=function)
    served = ElasticFamily(weights, layout_of(arch), {**vars(arch), **function}, subnets)
    for name, subnet in subnets.items():
        with torch.no_grad():
            wanted = model(ids, None, None, elastic=hard_plan(layout_of(arch), subnet, "sliced"))
        for compact in (False, True):
            served.switch(name, compact=compact)
            assert (served.logits(ids) - wanted).abs().max() < 1e-6 * wanted.abs().max()
            cache, found = served.new_cache(2), []
            for piece in ids.split([5, 1, 1, LENGTH - 7], dim=1):
                found.append(served.logits(piece, cache))
            assert (torch.cat(found, dim=1) - wanted).abs().max() < 1e-6 * wanted.abs().max()
        cache = served.new_cache(2)
        served.logits(ids[:, :5], cache)
        step = served.decode_step(2, room=LENGTH)
        step.begin(cache)
        for place in range(5, LENGTH):
            assert (step(ids[:, place : place + 1])[:, 0] - wanted[:, place]).abs().max() < 1e-6 * wanted.abs().max()
