"""Families of Hugging Face models: what their config.json means here, by an adapter each, and which of them a model is.

plan(config.json) == the parameters that the makers published        read(config.json) == the model section of conf/
read(write(model)) == model                                          another function is refused by the key that says it
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_family import random_weights
from family_configs import (
    ACTIVE,
    BAMBA_9B,
    GRANITE_4_H_MICRO,
    GRANITE_4_H_SMALL,
    LLAMA3,
    NANO_30B,
    PUBLISHED,
    QWEN2_5_7B,
    QWEN3_30B_A3B,
)

from nemo_elastic.checkpoint.hf_config import check_hf, hf_config
from nemo_elastic.checkpoint.reader import MemoryReader
from nemo_elastic.checkpoint.schemas import plain_child
from nemo_elastic.config import load_config
from nemo_elastic.config.function_fields import ARITHMETIC
from nemo_elastic.config.model_fields import FLAGS, FUNCTION, architecture_of, whole_model
from nemo_elastic.config.parent_files import parent_files
from nemo_elastic.config.parent_hf import adapter_of_model, model_from_hf
from nemo_elastic.huggingface import ADAPTERS
from nemo_elastic.huggingface.read import PLAIN
from nemo_elastic.kinds import kinds
from nemo_elastic.kinds.experts import EXPERTS
from nemo_elastic.plan.of_parent import plan_parent
from nemo_elastic.plan.starting import starting_configuration
from nemo_elastic.problems import ProblemsError
from nemo_elastic.space.dims import ElasticDim
from nemo_elastic.space.elastic_space import ElasticSpace
from nemo_elastic.space.layout import ParamLayout

CONF = Path(__file__).resolve().parent.parent / "conf"
LLAMA, QWEN3 = PUBLISHED["llama_3_2_1b"][0], PUBLISHED["qwen3_4b"][0]
OF_TYPE = {
    "llama": LLAMA,
    "qwen2": QWEN2_5_7B,
    "qwen3": QWEN3,
    "bamba": BAMBA_9B,
    "granitemoehybrid": GRANITE_4_H_MICRO,
}
MIXED = {"nemotron_h": NANO_30B, "granite_mixed": GRANITE_4_H_SMALL, "qwen3_moe": QWEN3_30B_A3B}
TYPES = {adapter.model_type: adapter for adapter in ADAPTERS}


def folder(path: Path, config: dict[str, Any]) -> Path:
    """A folder with this config.json and no weights."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    return path


def function(model: dict[str, Any]) -> dict[str, Any]:
    """What decides a model's function, defaults filled in; sizes of layers that it has not left out."""
    whole = whole_model(model)
    absent = {s.name for kind in kinds() if kind.letter not in whole["hybrid_override_pattern"] for s in kind.sizes}
    said = {name: whole[name] for name in FUNCTION if name not in absent}
    return said | {"seq_length": model.get("seq_length")}


@pytest.mark.parametrize("name", PUBLISHED)
def test_plan_counts_what_the_makers_published(name: str, tmp_path: Path) -> None:
    config, count, conf = PUBLISHED[name]
    found = plan_parent(str(folder(tmp_path / "parent", config)))
    assert found["supported"] and found["parent"]["parameters"] == count
    assert found["parent"]["active_parameters"] == ACTIVE.get(name, count)
    assert (found["budgets"][0]["active_parameters"] < count) == (name in ACTIVE)
    adapter = TYPES[config["model_type"]]
    assert found["budgets"][0]["deployment"]["hugging_face"] == f"loads as {adapter.words}"
    said = parent_files(str(tmp_path / "parent"))
    assert said.depth_unit == ("layer" if config["model_type"] == "nemotron_h" else "block")
    if conf is not None:
        ours, wanted = function(dict(said.model)), function(dict(load_config(CONF / conf).config.model))
        if "seq_length" not in said.model:
            del ours["seq_length"], wanted["seq_length"]
        assert ours == wanted


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_written_is_read_as_the_same_model(name: str) -> None:
    model = model_from_hf(PUBLISHED[name][0])
    adapter = adapter_of_model(model)
    assert adapter.model_type == PUBLISHED[name][0]["model_type"]
    written = hf_config(model, torch.bfloat16, {"eos_token_id": 1})
    assert json.loads(json.dumps(written, allow_nan=False)) == written
    assert model_from_hf(written) == {**model_from_hf(written), **model}
    assert function(model_from_hf(written)) == function(model)
    for known in (("rope_parameters",), ("rope_theta", "rope_scaling")):  # to newer and to older readers
        gone = {"rope_parameters", "rope_theta", "rope_scaling"} - set(known)
        one = {name: value for name, value in written.items() if name not in gone}
        assert model_from_hf(one) == model_from_hf(written)


def test_old_and_new_words_for_positions_are_the_same() -> None:
    old = model_from_hf(LLAMA)
    scaling = LLAMA["rope_scaling"]
    new = {name: value for name, value in LLAMA.items() if name not in ("rope_theta", "rope_scaling")}
    assert model_from_hf({**new, "rope_parameters": {**scaling, "rope_theta": 500000.0}}) == old
    older = {"type" if name == "rope_type" else name: value for name, value in scaling.items()}
    assert model_from_hf({**LLAMA, "rope_scaling": older}) == old
    linear = model_from_hf({**LLAMA, "rope_scaling": {"type": "linear", "factor": 4}})
    assert linear["seq_len_interpolation_factor"] == 4.0 and "rope_scaling_factor" not in linear
    unsaid = {name: value for name, value in scaling.items() if name != "original_max_position_embeddings"}
    assert model_from_hf({**LLAMA, "rope_scaling": unsaid})["rope_original_max_position_embeddings"] == 131072


def test_every_field_of_the_function_is_said_or_refused() -> None:
    """A new field of the model section is forgotten by no adapter."""
    for adapter in ADAPTERS:
        spoken = {*adapter.keys(), *adapter.speaks, *adapter.has, *PLAIN}
        rotary = {name for name in ARITHMETIC if name.startswith(("rotary_", "rope_", "seq_len"))}
        experts = {name for name in (*FLAGS, *ARITHMETIC) if name.startswith("moe_")}
        if experts <= spoken:
            experts = set()
        else:
            refused = adapter.pattern_problems(f"*{EXPERTS.letter}", "x")
            assert refused and "mixture of experts" in refused[0].message, adapter.model_type
        assert all(adapter.pattern_problems(kind.letter * 2, "x") for kind in kinds() if kind.huggingface is None)
        forgotten = {*FLAGS, *ARITHMETIC} - spoken - rotary - experts  # rotary: position_embedding_type is in PLAIN
        assert forgotten <= {"fp32_residual_connection"}, adapter.model_type


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    *((kind, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping") for kind in OF_TYPE),
    *((kind, {"final_logit_softcapping": 30.0}, "final_logit_softcapping") for kind in OF_TYPE),
    *((kind, {"alibi": True}, "alibi") for kind in OF_TYPE),
    *((kind, {"parallel_attn": True}, "parallel_attn") for kind in OF_TYPE),
    *((kind, {"use_sliding_window": True}, "use_sliding_window") for kind in OF_TYPE),
    *((kind, {"quantization_config": {"bits": 4}}, "quantization_config") for kind in OF_TYPE),
    *((kind, {"num_nextn_predict_layers": 1}, "num_nextn_predict_layers") for kind in OF_TYPE),
    *((kind, {"num_experts": 8}, "num_experts") for kind in OF_TYPE),
    *((kind, {"attention_bias": True}, "attention_bias") for kind in OF_TYPE if kind != "qwen2"),
    *((kind, {"hidden_act": "tanh"}, "hidden_act") for kind in OF_TYPE),
    *((kind, {"hidden_size": "big"}, "hidden_size") for kind in OF_TYPE),
    *((kind, {"num_hidden_layers": None}, "num_hidden_layers") for kind in OF_TYPE),
    *((kind, {"sliding_window": 4096}, "sliding_window") for kind in ("llama", "bamba", "granitemoehybrid")),
    *((kind, {"layer_types": ["sliding_attention"] * 99}, "layer_types") for kind in ("llama", "qwen2", "qwen3")),
    *((kind, {"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling") for kind in ("llama", "qwen2", "qwen3", "bamba")),
    *((kind, {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_scaling") for kind in ("llama", "qwen3")),
    *((kind, {"partial_rotary_factor": 0.25}, "partial_rotary_factor") for kind in ("llama", "bamba")),
    *(("nemotron_h", {key: 2}, key) for key in ("n_group", "topk_group", "n_shared_experts")),
    ("qwen3_moe", {"num_experts": None}, "num_experts"),
    ("qwen3_moe", {"num_experts_per_tok": None}, "num_experts_per_tok"),
    *(("nemotron_h", {key: None}, key) for key in ("n_routed_experts", "moe_intermediate_size", "num_experts_per_tok")),
    ("nemotron_h", {"norm_topk_prob": False}, "norm_topk_prob"),
    ("nemotron_h", {"num_experts_per_tok": 1}, "norm_topk_prob"),
    ("nemotron_h", {"num_experts_per_tok": 129}, "num_experts_per_tok"),
    ("nemotron_h", {"moe_shared_expert_intermediate_size": 0}, "moe_shared_expert_intermediate_size"),
    ("nemotron_h", {"moe_latent_size": "small"}, "moe_latent_size"),
    ("nemotron_h", {"routed_scaling_factor": 0}, "routed_scaling_factor"),
    ("nemotron_h", {"num_local_experts": 64}, "num_local_experts"),
    ("nemotron_h", {"num_nextn_predict_layers": -1}, "num_nextn_predict_layers"),
    ("nemotron_h", {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}, "quantization_config"),
    ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step"),
    ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers"),
    ("qwen3_moe", {"norm_topk_prob": "yes"}, "norm_topk_prob"),
    ("qwen3_moe", {"num_experts_per_tok": 1}, "num_experts_per_tok"),
    ("qwen3_moe", {"num_experts": 0}, "num_experts"),
    ("qwen3_moe", {"attention_bias": True}, "attention_bias"),
    ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window"),
    ("granitemoehybrid", {"num_local_experts": "many"}, "num_local_experts"),
    ("granite_mixed", {"num_experts_per_tok": 73}, "num_experts_per_tok"),
    ("granite_mixed", {"intermediate_size": "wide"}, "intermediate_size"),
    ("granite_mixed", {"shared_intermediate_size": 0}, "shared_intermediate_size"),
    ("llama", {"rope_parameters": {"rope_theta": 1.0, **LLAMA3, "factor": 32.0}}, "rope_parameters.rope_theta"),
    ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "rope_parameters"),
    ("llama", {"rope_scaling": {**LLAMA3, "factor": 0}}, "rope_scaling.factor"),
    ("llama", {"mlp_bias": True}, "attention_bias"),
    ("llama", {"pretraining_tp": 2}, "pretraining_tp"),
    ("llama", {"rms_norm_eps": None, "rope_theta": -1}, "rope_theta"),
    *((kind, {"rms_norm_eps": 1e-6}, "rms_norm_eps") for kind in ("bamba", "granitemoehybrid")),
    *((kind, {"mamba_d_conv": 3}, "mamba_d_conv") for kind in ("bamba", "granitemoehybrid")),
    *((kind, {"mamba_expand": 3}, "mamba_expand") for kind in ("bamba", "granitemoehybrid")),
    *((kind, {"time_step_limit": [0.01, 0.1]}, "time_step_limit") for kind in ("bamba", "granitemoehybrid")),
    *((kind, {"is_causal": False}, "is_causal") for kind in OF_TYPE),
    *((kind, {"architectures": ["A", "BForSequenceClassification"]}, "architectures") for kind in OF_TYPE),
    *((kind, {"num_local_experts": 4}, "num_local_experts") for kind in ("llama", "bamba")),
    *((kind, {"attention_multiplier": 0.5}, "attention_multiplier") for kind in ("llama", "qwen2", "qwen3", "bamba")),
    *((kind, {"mamba_expand": {}}, "mamba_expand") for kind in ("bamba", "granitemoehybrid")),
    ("llama", {"qk_norm": True}, "qk_norm"),
    ("llama", {"rope_scaling": {"factor": 4.0}}, "rope_scaling"),
    ("llama", {"rope_scaling": {**LLAMA3, "factor": 32.0, "rope_theta": 1.0}}, "rope_scaling.rope_theta"),
    ("llama", {"rope_theta": 10**400}, "rope_theta"),
    ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ("llama", {"max_position_embeddings": -5}, "max_position_embeddings"),
    *((kind, {"num_hidden_layers": 320_000}, "num_hidden_layers") for kind in OF_TYPE),
    ("bamba", {"attn_layer_indices": [40]}, "attn_layer_indices"),
    ("bamba", {"attn_rotary_emb": 128}, "attn_rotary_emb"),
    ("bamba", {"mlp_bias": True}, "mlp_bias"),
    ("granitemoehybrid", {"num_local_experts": 8}, "num_experts_per_tok"),
    ("granitemoehybrid", {"layer_types": ["mamba"]}, "layer_types"),
    ("granitemoehybrid", {"layer_types": ["conv"] * 40}, "layer_types"),
    ("granitemoehybrid", {"position_embedding_type": "alibi"}, "position_embedding_type"),
    ("granitemoehybrid", {"logits_scaling": 0}, "logits_scaling"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "change", "key"), REFUSED, ids=lambda v: v if isinstance(v, str) else "")
def test_another_function_is_refused_by_its_key(kind: str, change: dict[str, Any], key: str) -> None:
    with pytest.raises(ProblemsError) as error:
        model_from_hf({**(OF_TYPE | MIXED)[kind], **change}, "here/config.json")
    assert [p.key for p in error.value.problems] == [f"here/config.json: {key}"]


def test_what_a_class_takes_for_a_missing_key_counts_as_said() -> None:
    """Granite's class has eight experts where the file says nothing; with none chosen that is no model."""
    bare = {name: value for name, value in GRANITE_4_H_MICRO.items() if name != "num_local_experts"}
    with pytest.raises(ProblemsError, match="num_experts_per_tok: 0 must be a positive integer"):
        model_from_hf(bare)
    assert model_from_hf({n: v for n, v in LLAMA.items() if n != "rms_norm_eps"})["layernorm_epsilon"] == 1e-6


TINY = {
    "hybrid_override_pattern": "*-*-*-",
    "hidden_size": 48,
    "ffn_hidden_size": 80,
    "num_attention_heads": 12,
    "num_query_groups": 4,
    "kv_channels": 8,
    "vocab_size": 64,
    "gated_linear_unit": True,
    "activation_func": "silu",
    "position_embedding_type": "rope",
}


@pytest.mark.parametrize(
    ("more", "sizes", "schema", "key", "words"),
    [
        ({}, {"layers": [0, 1, 2, 4, 5]}, "uniform", "model.hybrid_override_pattern", "knows only whole blocks"),
        ({}, {"ffn_hidden_size": [80, 40, 40]}, "per_layer_config", "--hf-schema", "uniform is the only one"),
        ({}, {"ffn_hidden_size": [80, 40, 40]}, "list", "--hf-schema", "uniform is the only one"),
        ({}, {"hidden_size": 40}, "uniform", "model.hidden_size", "40 must be a multiple of num_attention_heads 12"),
        ({"qk_layernorm": True, "logits_scaling": 3.0}, {}, "uniform", "model.logits_scaling", "Hugging Face's Qwen3"),
        ({"add_qkv_bias": True, "add_bias_linear": True}, {"hidden_size": 32}, "uniform", "model.hidden_size", "32"),
    ],
)
def test_what_a_family_cannot_say_of_a_child_is_refused(
    more: dict[str, Any], sizes: dict[str, Any], schema: str, key: str, words: str
) -> None:
    model = {**TINY, **more}
    arch = architecture_of(model)
    dims = {"hidden_size": ElasticDim(name="hidden_size", full=48, groups=1, choices=(40, 32))}
    space = ElasticSpace(architecture=arch, dims=dims, ffn_groups=8)
    layout = ParamLayout(arch, ffn_groups=8)
    child = plain_child(MemoryReader(random_weights(model)), layout, space.subnet(**sizes), schema=schema)
    with pytest.raises(ProblemsError) as error:
        check_hf(model, child)
    (problem,) = error.value.problems
    assert problem.key == key and words in problem.message


@pytest.mark.parametrize(
    ("more", "family"),
    [
        ({}, "llama"),
        ({"add_bias_linear": True}, "llama"),
        ({"add_qkv_bias": True}, "qwen2"),
        ({"qk_layernorm": True}, "qwen3"),
        ({"residual_multiplier": 0.5}, "granitemoehybrid"),
        ({"position_embedding_type": "none"}, "granitemoehybrid"),
        ({"position_embedding_type": "none", "gated_linear_unit": False}, "nemotron_h"),
        ({"hybrid_override_pattern": "*-*"}, "nemotron_h"),
    ],
)
def test_a_model_from_elsewhere_is_of_the_first_family_that_can_say_it(more: dict[str, Any], family: str) -> None:
    assert adapter_of_model({**TINY, **more}).model_type == family


@pytest.mark.parametrize("name", ["llama_3_1_8b", "qwen3_4b", "granite_4_h_micro"])
def test_what_config_writes_for_a_family_drops_whole_blocks(name: str, tmp_path: Path) -> None:
    text = starting_configuration(str(folder(tmp_path / "hf", PUBLISHED[name][0])))
    (tmp_path / "mine.yaml").write_text(text)
    assert "depth_unit: block" in text
    run = load_config(tmp_path / "mine.yaml").config
    assert all(depth % 2 == 0 for depth in run.elastic.dims["num_layers"].choices)
    plain = folder(tmp_path / "again", PUBLISHED[name][0])
    assert load_config(None, [f"parent.path={plain}"]).config.elastic.depth_unit == "block"
    if (
        name != "granite_4_h_micro"
    ):  # whose heads of Mamba a search may cut otherwise than its hidden size; plan says so
        notes = [b["deployment"]["hugging_face"] for b in plan_parent(str(plain))["budgets"]]
        assert {note.split()[0] for note in notes} == {"loads"}


@pytest.mark.parametrize(
    ("sizes", "line", "choices"),
    [
        ({"num_experts": 14}, "expert_groups: 2 ", "num_moe_experts: {choices: [14,"),
        ({"num_experts": 7, "num_experts_per_tok": 2}, "expert_groups: 1 ", "num_moe_experts: {choices: [7,"),
        ({"moe_intermediate_size": 12}, "ffn_groups: 4 ", "moe_ffn_hidden_size: {choices: [12,"),
        ({"num_experts": 16, "num_experts_per_tok": 12}, "name: ", "moe_ffn_hidden_size"),
    ],
)
def test_a_start_has_groups_that_divide_and_no_fewer_experts_than_a_token_meets(
    tmp_path: Path, sizes: dict[str, int], line: str, choices: str
) -> None:
    """A child of ours may have 14 experts, and its folder is a parent, too."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_30B_A3B | sizes))
    text = starting_configuration(str(tmp_path))
    assert line in text and choices in text
    assert "num_moe_experts: {choices: [16, 8" not in text
