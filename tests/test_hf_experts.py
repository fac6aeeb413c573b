"""Mixtures in Hugging Face folders, without transformers: names, refusals, the nested folder. See test_hf_families.py.

read(write(experts)) == experts, one tensor an expert on disk        from_nested.py == extract, byte by byte
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import expert_features
import pytest
import torch
from checkpoint_family import MODEL, TOKENIZER, manifest, random_weights
from family_configs import NANO_30B, SUPER_120B
from safetensors.torch import load_file, save_file
from test_families import folder
from test_hf_nested import contents, only, script_of
from test_parent_files import write_context

from nemo_elastic.checkpoint.huggingface import HuggingFaceReader
from nemo_elastic.checkpoint.manifest import Manifest
from nemo_elastic.checkpoint.reader import lazy_tensors
from nemo_elastic.config.parent_files import parent_files
from nemo_elastic.nemo.export.checkpoints import extract, extract_all
from nemo_elastic.nemo.export.hf_nested import extract_hf_nested
from nemo_elastic.nemo.export.nested import Nested, open_nested, write_nested
from nemo_elastic.nemo.run.start_checks import say_left_out
from nemo_elastic.plan.deployment import hugging_face_note
from nemo_elastic.plan.of_parent import plan_parent
from nemo_elastic.plan.starting import starting_configuration
from nemo_elastic.problems import ProblemsError

PATTERN = "ME*-MEME"
SIXTEEN = {"num_moe_experts": 16, "moe_router_topk": 3}
PREDICTION = "its blocks of multi-token prediction are left out; children are made without them"


def family(feature: str) -> Manifest:
    """full, large, small; `ragged`: the widths of experts differ per layer; `counts`: so do their numbers."""
    said = expert_features.SIZES | expert_features.FEATURES[feature] | SIXTEEN
    model = {**MODEL, "hybrid_override_pattern": PATTERN, **{name: value for name, value in said.items() if value}}
    found, space = manifest(model), manifest(model).space
    cut = {"hidden_size": 40, "num_moe_experts": 8, "mamba_num_heads": 8}
    subnets = {
        "full": found.subnets["full"],
        "large": space.subnet(**cut, moe_ffn_hidden_size=16, moe_shared_expert_intermediate_size=16),
        "small": space.subnet(**cut, moe_ffn_hidden_size=8, layers=[0, 1, 2, 3, 5, 6]),
        "ragged": space.subnet(**cut, moe_ffn_hidden_size=[16, 8, 8], moe_shared_expert_intermediate_size=[8, 16, 24]),
        "counts": space.subnet(num_moe_experts=[16, 8, 16]),
    }
    return replace(found, subnets=subnets)


def nested(tmp_path: Path, feature: str, *budgets: str) -> Nested:
    whole = family(feature)
    opened = open_nested(write_nested(tmp_path / "nested", random_weights(whole.model), whole, tokenizer=TOKENIZER))
    return only(opened, *budgets)


@pytest.mark.parametrize("feature", ["nemotron", "latent"])
def test_the_script_cuts_experts_as_extract_does(feature: str, tmp_path: Path) -> None:
    opened = nested(tmp_path, feature, "full", "large", "small", "ragged")
    hf = extract_hf_nested(opened, tmp_path / "hf")
    script = script_of(hf)
    for budget in opened.manifest.subnets:
        wanted = contents(extract(opened, budget, tmp_path / "extracted" / budget, format="hf"))
        assert contents(script.save_budget(hf, budget, tmp_path / "cut" / budget)) == wanted
    names = load_file(tmp_path / "cut" / "small" / "model.safetensors")
    own = [name for name in names if name.startswith("backbone.layers.1.mixer.experts.")]
    assert {int(name.split(".")[5]) for name in own} == set(range(8)) and len(own) == 16
    latent = 12 if feature == "latent" else 40
    assert names["backbone.layers.1.mixer.experts.7.up_proj.weight"].shape == (8, latent)
    assert names["backbone.layers.1.mixer.gate.e_score_correction_bias"].shape == (8,)


@pytest.mark.parametrize("schema", ["uniform", "per_layer_config", "list"])
def test_counts_that_differ_per_layer_are_refused_by_name(schema: str, tmp_path: Path) -> None:
    opened = nested(tmp_path, "nemotron", "counts")
    with pytest.raises(ProblemsError) as error:
        extract(opened, "counts", tmp_path / "out", format="hf", hf_schema=schema)
    (problem,) = error.value.problems
    assert problem.key == "--hf-schema" and "num_moe_experts per layer (16, 8, 16)" in problem.message
    assert problem.message.endswith("train experts layers with elastic.dims.num_moe_experts.per_layer=false")
    with pytest.raises(ProblemsError, match="cannot say that; train with per_layer: false"):
        extract(opened, "counts", tmp_path / "out", format="nemo")
    assert not (tmp_path / "out").exists()


def test_widths_that_differ_need_the_uniform_schema(tmp_path: Path) -> None:
    opened = nested(tmp_path, "nemotron", "ragged")
    with pytest.raises(ProblemsError, match=r"moe_ffn_hidden_size per layer .*give --hf-schema uniform, or train"):
        extract(opened, "ragged", tmp_path / "out", format="hf", hf_schema="per_layer_config")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"moe_router_score_function": "softmax", "moe_router_enable_expert_bias": False}, "score_function: 'softmax'"),
        ({"moe_router_enable_expert_bias": False}, "moe_router_enable_expert_bias: False cannot be said"),
        ({"moe_shared_expert_intermediate_size": 0}, "intermediate_size: 0 cannot be said in Hugging Face's NemotronH"),
    ],
)
def test_another_router_is_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    whole = family("nemotron")
    model = {name: value for name, value in {**whole.model, **change}.items() if value != 0}
    opened = write_nested(tmp_path / "nested", random_weights(model), manifest(model), tokenizer=TOKENIZER)
    with pytest.raises(ProblemsError, match=words):
        extract_all(opened, tmp_path / "out", format="hf")


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the whole parent; tests that change it do so with a copy."""
    place = tmp_path_factory.mktemp("f")
    return extract(nested(place, "nemotron", "full"), "full", place / "hf", format="hf")


def changed(hf: Path, place: Path, **change: Any) -> Path:
    """A copy with tensors put in, or (None) taken out; `.` is written `__`."""
    hf = Path(shutil.copytree(hf, place / "changed"))
    file = hf / "model.safetensors"
    tensors = load_file(file) | {name.replace("__", "."): value for name, value in change.items()}
    save_file({name: value for name, value in tensors.items() if value is not None}, file)
    return hf


UP = "backbone__layers__1__mixer__experts__{}__up_proj__weight"


def test_experts_are_read_one_by_one(hf: Path) -> None:
    whole = family("nemotron")
    reader = HuggingFaceReader(hf)
    weights = random_weights(whole.model)
    for tensor in lazy_tensors(reader):
        assert torch.equal(tensor.read(), weights.pop(tensor.name)), tensor.name
    assert not weights


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({UP.format(15): None}, r"lacks backbone\.layers\.1\.mixer\.experts\.15\.up_proj\.weight$"),
        ({UP.format(16): torch.zeros(16, 48)}, r"has .*\.experts\.16\.up_proj\.weight, which config\.json does not"),
        ({UP.format(3): torch.zeros(8, 48)}, r"experts\.3\.up_proj\.weight as float32 \[8, 48\] and .*all experts"),
        ({UP.format(3): torch.zeros(16, 48).bfloat16()}, r"experts\.3\.up_proj\.weight as bfloat16 \[16, 48\]"),
        ({UP.format(3): torch.zeros(16, 48).to(torch.float8_e4m3fn)}, r"F8_E4M3.*give the bf16 folder"),
        ({UP.format(3): torch.zeros(16, 24, dtype=torch.uint8)}, r"\(uint8\): quantized .*give the bf16 folder"),
        ({f"{UP.format(3)}_scale": torch.ones(1)}, r"_scale \(float32\): quantized .*give the bf16 folder"),
        ({"mtp__layers__0__norm__weight": torch.ones(48)}, r"has mtp\.layers\.0\.norm\.weight, which config\.json"),
    ],
)  # fmt: skip
def test_damaged_and_quantized_folders(hf: Path, change: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ProblemsError, match=words):
        HuggingFaceReader(changed(hf, tmp_path, **change))


def test_a_parent_that_predicts_further_tokens(hf: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its blocks are left out, with one line in a plan, in a configuration, and where a run starts."""
    plain = parent_files(str(folder(tmp_path / "plain", NANO_30B))).model
    more = {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"}
    parent = folder(tmp_path / "more", {**NANO_30B, **more})
    said = parent_files(str(parent))
    assert said.model == plain and said.left_out == f"{parent}/config.json: {PREDICTION}"
    planned = plan_parent(str(parent))
    assert planned["supported"] and sum(PREDICTION in note for note in planned["notes"]) == 1
    assert starting_configuration(str(parent)).count(PREDICTION) == 1
    for _ in range(2):
        say_left_out(str(parent))
    assert [record.getMessage() for record in caplog.records] == [said.left_out]
    slashed = {**NANO_30B, "hybrid_override_pattern": NANO_30B["hybrid_override_pattern"] + "/*E/*E"}
    other = parent_files(str(folder(tmp_path / "slashed", slashed)))
    assert other.model == plain and other.left_out
    assert parent_files(str(folder(tmp_path / "super", SUPER_120B))).left_out

    copy = changed(hf, tmp_path, mtp__layers__0__norm__weight=torch.ones(48))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **more}))
    reader = HuggingFaceReader(copy)
    assert not any("mtp" in name for name in reader.names())
    assert reader.model == HuggingFaceReader(hf).model


def test_a_nemo_parent_that_predicts_further_tokens(tmp_path: Path) -> None:
    plain = parent_files(str(write_context(tmp_path / "plain", {})))
    assert plain.left_out is None
    pattern = plain.model["hybrid_override_pattern"]
    said = parent_files(str(write_context(tmp_path / "more", {"hybrid_override_pattern": f"{pattern}/*-/*-"})))
    assert said.model == plain.model and PREDICTION in said.left_out
    assert PREDICTION in parent_files(str(write_context(tmp_path / "count", {"mtp_num_layers": 1}))).left_out


def test_a_quantized_folder_is_known_by_its_second_file(tmp_path: Path) -> None:
    parent = folder(tmp_path / "fp8", NANO_30B)
    (parent / "hf_quant_config.json").write_text("{}")
    with pytest.raises(ProblemsError, match=r"hf_quant_config\.json: is of quantized weights.*give the bf16 folder"):
        parent_files(str(parent))


def test_a_child_has_at_least_as_many_experts_as_are_chosen() -> None:
    said = expert_features.SIZES | expert_features.FEATURES["nemotron"] | {"num_moe_experts": 16, "moe_router_topk": 9}
    space = manifest({**MODEL, "hybrid_override_pattern": PATTERN, **said}).space
    with pytest.raises(ProblemsError, match=r"num_moe_experts.* 8 .*9"):
        space.subnet(num_moe_experts=8)
    assert space.subnet(num_moe_experts=16).num_moe_experts == (16, 16, 16)


def test_a_plan_says_what_becomes_of_sizes_that_differ() -> None:
    whole = family("nemotron")
    note = hugging_face_note(whole.model, whole.subnets["ragged"])
    assert note.startswith("per-layer moe_ffn_hidden_size, moe_shared_expert_intermediate_size: padded to uniform")
    note = hugging_face_note(whole.model, whole.subnets["counts"])
    assert note == "per-layer num_moe_experts: no stock schema can say it"
