"""The parameter table against the modules it describes: names, shapes, shards, child names, unknown names."""

import pytest
import torch
from small_parent import FFN_GROUPS, PATTERN, architecture, child_architecture

from nemo_elastic.kinds import kind_of
from nemo_elastic.mcore.models.build import build_elastic_model, build_plain_model
from nemo_elastic.problems import ProblemsError
from nemo_elastic.space.elastic_space import ElasticSpace
from nemo_elastic.space.layout import ParamLayout, fused_name

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.mark.parametrize("tied", [False, True])
def test_the_table_is_the_plain_model(tied: bool) -> None:
    """Names, order of axes and shapes; the elastic model has the same parameters."""
    arch = architecture(share_embeddings_and_output_weights=tied)
    layout = ParamLayout(arch, ffn_groups=FFN_GROUPS)
    for model in (build_plain_model(arch), build_elastic_model(arch, ffn_groups=FFN_GROUPS)):
        built = {name: tuple(p.shape) for name, p in model.named_parameters()}
        assert built == {name: spec.shape({}) for name, spec in layout.table.items()}


def test_child_parameters_are_those_of_the_built_child() -> None:
    arch = architecture()
    subnet = ElasticSpace(architecture=arch, ffn_groups=FFN_GROUPS).subnet(
        hidden_size=36,
        ffn_hidden_size=24,
        mamba_num_heads=8,
        mamba_head_dim=5,
        num_attention_heads=4,
        layers=(1, 2, 3, 6),
    )
    child = build_plain_model(child_architecture(arch, subnet))
    built = {name: tuple(p.shape) for name, p in child.named_parameters()}
    layout = ParamLayout(arch, ffn_groups=FFN_GROUPS)
    assert built == {name: spec.shape(sizes) for name, spec, sizes in layout.child_params(subnet)}
    parents = {name: spec.layer for name, spec, _ in layout.child_params(subnet) if spec.layer is not None}
    assert {int(n.split(".")[2]): layer for n, layer in parents.items()} == {0: 1, 1: 2, 2: 3, 3: 6}


def test_an_unknown_parameter_is_named() -> None:
    layout = ParamLayout(architecture(), ffn_groups=FFN_GROUPS)
    for name in (
        "decoder.layers.0.mixer.gate.weight",
        "decoder.layers.1.mixer.D",  # an MLP layer has none
        "decoder.layers.8.mixer.D",  # there are 8 layers
        "lm_head.weight",
        "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight",
    ):
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            layout.spec(name)


def test_names_of_wrappers_and_fused_norms_are_resolved() -> None:
    layout = ParamLayout(architecture(), ffn_groups=FFN_GROUPS)
    assert layout.canonical_name("module.module.decoder.layers.3.self_attention.linear_proj.weight").startswith("dec")
    for layer, kind in enumerate(PATTERN):
        own, fused = (f"decoder.layers.{layer}.{n}" for n in kind_of(kind).norm)
        assert layout.canonical_name(fused) == own
        assert fused_name(own, kind) == fused
    assert fused_name("decoder.layers.0.mixer.D", "M") == "decoder.layers.0.mixer.D"


def test_tensor_parallelism_that_splits_a_group_is_refused() -> None:
    """All three axes in one error; the vocabulary is padded."""
    with pytest.raises(ProblemsError) as caught:
        ParamLayout(architecture(), ffn_groups=FFN_GROUPS, tp_size=3)
    assert len(caught.value.problems) == 3
    assert all("3 must divide" in p.message for p in caught.value.problems)


@pytest.mark.parametrize(("vocab_size", "tp", "rows", "padding"), [
    (64, 4, 64, [0, 0, 0, 0]), (61, 2, 62, [0, 1]), (61, 4, 64, [0, 0, 0, 3]), (5, 4, 8, [0, 0, 1, 2]),
])  # fmt: skip
def test_a_vocabulary_is_padded_to_the_next_multiple(vocab_size: int, tp: int, rows: int, padding: list[int]) -> None:
    layout = ParamLayout(architecture(vocab_size=vocab_size), ffn_groups=FFN_GROUPS, tp_size=tp)
    assert layout.padded_vocab_size == rows
    assert [layout.vocab_padding(rank) for rank in range(tp)] == padding
    assert layout.table["output_layer.weight"].shape({})[0] == rows // tp


@pytest.mark.parametrize("tp", [2, 4])
def test_shards_add_up(tp: int) -> None:
    """What is split has 1/tp of the entries; norms, and nothing else, are whole on every rank."""
    arch = architecture()
    whole, part = (ParamLayout(arch, ffn_groups=FFN_GROUPS, tp_size=n).table for n in (1, tp))
    for name in whole:
        split = whole[name].numel({}) // part[name].numel({})
        replicated = "norm" in name and "mixer.norm" not in name
        assert split == (1 if replicated else tp), name


def test_expected_sizes_count_like_integers() -> None:
    """The count is multilinear: at a point that is an integer it is the integer count, and it has a gradient."""
    layout = ParamLayout(architecture(), ffn_groups=FFN_GROUPS)
    sizes = {"hidden_size": 20, "mamba_num_heads": 8, "mamba_head_dim": 5}
    soft = {k: torch.tensor(float(v), dtype=torch.float64, requires_grad=True) for k, v in sizes.items()}
    spec = layout.table["decoder.layers.0.mixer.in_proj.weight"]
    assert spec.numel(soft).item() == spec.numel(sizes)
    spec.numel(soft).backward()
    step = {**sizes, "mamba_head_dim": 6}
    assert soft["mamba_head_dim"].grad.item() == spec.numel(step) - spec.numel(sizes)
