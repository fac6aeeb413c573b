"""Children whose layers differ: padded without loss, or said per layer, or refused with a reason.

logits(plain model of the padded child) == logits(the nested subnet), 1e-5, fp32
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_family import MODEL, TOKENIZER, manifest, random_weights

from nemo_elastic.checkpoint.reader import MemoryReader
from nemo_elastic.checkpoint.safetensors_reader import SafetensorsReader
from nemo_elastic.checkpoint.schemas import PlainChild, plain_child
from nemo_elastic.cost.counts import parameters
from nemo_elastic.problems import ProblemsError
from nemo_elastic.space.subnet import Subnet

FAMILY = manifest()
WIDTHS = {"ffn_hidden_size": [56, 80, 40], "num_attention_heads": [8, 4]}


def subnet(**sizes: object) -> Subnet:
    """A child that drops the parent's layer 5 (a Mamba layer) and cuts the hidden size: `M-M*-*-`."""
    return FAMILY.space.subnet(**{"hidden_size": 40, "layers": [0, 1, 2, 3, 4, 6, 7], **sizes})


def child(which: Subnet, schema: str = "uniform") -> PlainChild:
    """The child of random weights."""
    return plain_child(MemoryReader(random_weights()), FAMILY.layout, which, schema=schema)


def test_padded_child_has_the_logits_of_the_nested_subnet(one_rank: None) -> None:
    from nemo_elastic.mcore.elastic.plan import hard_plan
    from nemo_elastic.mcore.models.build import build_elastic_model, build_plain_model, load_weights
    from nemo_elastic.mcore.models.evaluate import whole_logits

    weights, which = random_weights(), subnet(**WIDTHS)
    arch, tokens = FAMILY.space.architecture, torch.randint(0, MODEL["vocab_size"], (2, 24))
    elastic = build_elastic_model(arch, perform_initialization=False)
    load_weights(elastic, weights, arch)
    expected = whole_logits(elastic, tokens, hard_plan(elastic.layout, which))
    padded = child(which)
    plain = build_plain_model(padded.architecture, perform_initialization=False)
    load_weights(plain, {t.name: t.read() for t in padded.tensors}, padded.architecture)
    got = whole_logits(plain, tokens)
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()
    other = whole_logits(elastic, tokens, hard_plan(elastic.layout, FAMILY.space.full_subnet()))
    assert (other - expected).abs().max() > 0.01 * expected.abs().max()


def test_padding_is_counted_and_is_zeros() -> None:
    which = subnet(**WIDTHS)
    padded = child(which)
    assert (padded.architecture.ffn_hidden_size, padded.architecture.num_attention_heads) == (80, 8)
    numel = sum(t.read().numel() for t in padded.tensors)
    assert numel - parameters(FAMILY.layout, which) == padded.padding
    # by hand: neurons 24 + 40 short of 80 in two of three MLP layers, 4 query heads of 8 channels in one attention
    assert padded.padding == (24 + 40) * 2 * 40 + 4 * 8 * 2 * 40
    zeros = sum(int((t.read() == 0).sum()) for t in padded.tensors)
    assert zeros == padded.padding
    assert all(tuple(t.read().shape) == t.shape for t in padded.tensors)


def test_uniform_child_is_left_alone() -> None:
    same = child(subnet(ffn_hidden_size=40))
    assert same.padding == 0 and same.config == {} and same.architecture.ffn_hidden_size == 40


def test_list_schema_names_the_mlp_layers_in_order() -> None:
    said = child(subnet(ffn_hidden_size=[56, 80, 40]), "list")
    assert said.config == {"intermediate_size": [56, 80, 40]} and said.padding == 0
    shapes = [t.shape[0] for t in said.tensors if t.name.endswith("linear_fc1.weight")]
    assert shapes == [56, 80, 40]


def test_per_layer_config_names_layers_of_the_child() -> None:
    which = subnet(ffn_hidden_size=[56, 80, 40], mamba_num_heads=[12, 8, 4])
    said = child(which, "per_layer_config")
    assert said.config["per_layer_config"] == {
        "0": {"mamba_num_heads": 12},
        "1": {"intermediate_size": 56},
        "2": {"mamba_num_heads": 8},
        "4": {"intermediate_size": 80},
        "6": {"intermediate_size": 40},
    }  # the third Mamba layer, the parent's layer 5, is dropped


@pytest.mark.parametrize(
    ("schema", "sizes", "key"),
    [
        ("uniform", {"mamba_num_heads": [12, 8, 8]}, "padding Mamba heads"),
        ("list", {"num_attention_heads": [12, 4]}, "one size per MLP layer"),
        ("wide", {}, "must be one of uniform, list, per_layer_config"),
    ],
)
def test_what_a_schema_cannot_say_is_refused(schema: str, sizes: dict, key: str) -> None:
    layers = {"layers": list(range(8))}
    with pytest.raises(ProblemsError, match=key):
        child(subnet(**sizes, **layers), schema)


def test_folder_of_a_child_whose_layers_differ(tmp_path: Path) -> None:
    from nemo_elastic.nemo.export.checkpoints import extract, write_nested

    which = subnet(ffn_hidden_size=[56, 80, 40])
    family = replace(FAMILY, subnets={**FAMILY.subnets, "varied": which})
    nested = write_nested(tmp_path / "nested", random_weights(), family, tokenizer=TOKENIZER)
    uniform = extract(nested, "varied", tmp_path / "uniform", format="hf")
    listed = extract(nested, "varied", tmp_path / "list", format="hf", hf_schema="list")
    assert json.loads((uniform / "config.json").read_text())["intermediate_size"] == 80
    assert json.loads((listed / "config.json").read_text())["intermediate_size"] == [56, 80, 40]
    assert "padding (zeros)" in (uniform / "README.md").read_text()
    a, b = SafetensorsReader(uniform), SafetensorsReader(listed)
    assert a.shape("backbone.layers.1.mixer.up_proj.weight") == (80, 40)
    assert b.shape("backbone.layers.1.mixer.up_proj.weight") == (56, 40)
