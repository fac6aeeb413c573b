"""A built model is counted against the table: what Megatron built plain or left out is an error, on every stage."""

import pool_elastic
import pytest
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import ModuleSpec
from pool_elastic import elastic_model
from small_parent import architecture
from worker_pool import WorkerPool

from nemo_elastic.mcore.elastic import mlp
from nemo_elastic.mcore.models import build
from nemo_elastic.problems import ProblemsError


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("kind", ["M", "*", "-"])
def test_a_layer_that_upstream_built_plain_is_an_error(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """As after a rename in Megatron: the elastic spec no longer reaches the layer, and the stock one is built."""
    monkeypatch.setattr(build, "elastic_stack_spec", lambda **how: pool_elastic.spec_with_a_plain(kind))
    with pytest.raises(ProblemsError) as caught:
        elastic_model(architecture("MM*-"))
    (text,) = str(caught.value).splitlines()
    expected = {"M": "2 of 4 elastic layers (0 of 2 mamba", "*": "3 of 4 elastic", "-": "3 of 4 elastic"}
    layer = {"M": "layer 0 is a MambaLayer", "*": "layer 2 is a TransformerLayer", "-": "layer 3 is a MLPLayer"}
    assert expected[kind] in text and layer[kind] in text and "install 0.15.3 or 0.16.1" in text


@pytest.mark.usefixtures("one_rank")
def test_a_plain_sublayer_in_an_elastic_layer_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    elastic = mlp.elastic_layer

    def with_a_plain_part(**how: bool) -> ModuleSpec:
        spec = elastic(**how)
        spec.submodules.mlp.module = MLP
        return spec

    monkeypatch.setattr(mlp, "elastic_layer", with_a_plain_part)
    with pytest.raises(ProblemsError, match=r"\(1 of 1 mamba, 0 of 1 mlp\); layer 1 is a Elastic"):
        elastic_model(architecture("M-"))


def test_every_stage_counts_its_own_layers(pool2: WorkerPool) -> None:
    """MLP layers stand on the second stage alone; of five layers two stages of two are built, silently before 0.17."""
    first, second = pool2.run(pool_elastic.refusal_of, "MM--", plain="-", pp=2)
    assert first == "" and "pipeline stage 1 of 2 was built with 0 of 2 elastic layers (0 of 2 mlp)" in second
    for text in pool2.run(pool_elastic.refusal_of, "MM--M", pp=2):
        assert "1 of all 5 layers are on no stage" in text or "must be evenly divisible" in text
