"""A family served on a GPU gives the logits that it gives on the CPU, with and without caches."""

import pytest
import torch
from checkpoint_family import MODEL, manifest, random_weights

from nemo_elastic.serving import ElasticFamily

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def family(device: str) -> ElasticFamily:
    """The random family, fp64."""
    weights = {name: value.to(device, torch.float64) for name, value in random_weights().items()}
    return ElasticFamily(weights, manifest().layout, MODEL, manifest().subnets)


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("name", ["full", "large", "small"])
def test_gpu_is_cpu(name: str, compact: bool) -> None:
    tokens = torch.randint(0, MODEL["vocab_size"], (2, 23), generator=torch.Generator().manual_seed(1))
    here, there = family("cpu"), family("cuda")
    here.switch(name)
    there.switch(name, compact=compact)
    wanted = here.logits(tokens)
    assert (there.logits(tokens).cpu() - wanted).abs().max() < 1e-10 * wanted.abs().max()
    cache = there.new_cache(2)
    pieces = torch.cat([there.logits(part, cache) for part in tokens.split([9, 1, 13], dim=1)], dim=1)
    assert (pieces.cpu() - wanted).abs().max() < 1e-10 * wanted.abs().max()
    assert torch.equal(there.generate(tokens, 8).cpu(), here.generate(tokens, 8))
    drawn = {"temperature": 0.8, "top_k": 50, "seed": 3}
    assert torch.equal(there.generate(tokens, 8, **drawn).cpu(), here.generate(tokens, 8, **drawn))


@pytest.mark.parametrize("name", ["full", "small"])
def test_a_recorded_step_is_decoding(name: str) -> None:
    tokens = torch.randint(0, MODEL["vocab_size"], (2, 23), generator=torch.Generator().manual_seed(1)).cuda()
    served = family("cuda")
    served.switch(name)
    whole, step = served.logits(tokens), served.decode_step(2, room=23)
    for start in (9, 3):
        cache = served.new_cache(2)
        served.logits(tokens[:, :start], cache)
        step.begin(cache)
        found = torch.cat([step(tokens[:, i : i + 1]).clone() for i in range(start, 23)], dim=1)
        assert (found - whole[:, start:]).abs().max() < 1e-10 * whole.abs().max()
    assert torch.equal(served.generate(tokens[:, :9], 8, step=step), served.generate(tokens[:, :9], 8))
