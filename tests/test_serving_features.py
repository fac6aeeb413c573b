"""Serving of dense parents' features: a budget is the elastic model's subnet, whole, in pieces and step by step."""

import pytest
import torch
from dense_features import FEATURES, TRANSFORMER, parts
from pool_elastic import elastic_model, layout_of, random_weights, tokens
from small_parent import space_of

from nemo_elastic.mcore.elastic.plan import hard_plan
from nemo_elastic.serving import ElasticFamily

pytestmark = pytest.mark.usefixtures("one_rank")
LENGTH = 13  # positions and the scan are fp32 whatever the weights are: hence 1e-6
CUT = {"hidden_size": 36, "ffn_hidden_size": 16, "num_attention_heads": 8, "layers": (0, 2, 3, 5)}


@pytest.mark.parametrize("pattern", [None, TRANSFORMER], ids=["hybrid", "transformer"])
@pytest.mark.parametrize("feature", list(FEATURES))
def test_every_feature_is_served_as_it_is_trained(feature: str, pattern: str | None) -> None:
    arch, function = parts(feature, pattern, share_embeddings_and_output_weights=feature == "all")
    weights, space = random_weights(arch, torch.float64), space_of(arch)
    subnets = {"full": space.full_subnet(), "small": space.subnet(**CUT)}
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
