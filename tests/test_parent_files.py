"""What a parent's own files say counts: every key of config.json and of NeMo's context is read, refused or no matter.

For every key, changed alone to another legal value: the model section changes in that field, or the key is refused by
name, or it stands in a list here with the reason why it cannot change what a trained model computes.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from nemo_elastic.cli.main import main
from nemo_elastic.config import load_config
from nemo_elastic.config.function_fields import ARITHMETIC, OWN
from nemo_elastic.config.model_fields import FUNCTION, ONLY, known_fields, required_of
from nemo_elastic.config.parent_files import parent_files
from nemo_elastic.config.parent_hf import model_from_hf
from nemo_elastic.config.parent_nemo import read_nemo_context
from nemo_elastic.plan.of_run import plan
from nemo_elastic.problems import ProblemsError

HF_PYTHON = Path(__file__).parent.parent / ".venv-hf" / "bin" / "python"
PATTERN = "M-M*-"
CONFIG = {
    "model_type": "nemotron_h",
    "hybrid_override_pattern": PATTERN,
    "num_hidden_layers": 5,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "n_groups": 4,
    "ssm_state_size": 16,
    "vocab_size": 512,
    "max_position_embeddings": 2048,
    "time_step_limit": [0.0, float("inf")],
}
# Key -> (another legal value, the model field that must follow it with which value).
TAKEN = {
    "hybrid_override_pattern": ("M-M*M", "hybrid_override_pattern", "M-M*M"),
    "layers_block_type": (["linear_attention", "mlp", "mlp", "full_attention", "mlp"], None, None),  # the other says M
    "hidden_size": (128, "hidden_size", 128),
    "intermediate_size": (64, "ffn_hidden_size", 64),
    "num_attention_heads": (16, "num_attention_heads", 16),
    "num_key_value_heads": (2, "num_query_groups", 2),
    "head_dim": (8, "kv_channels", 8),
    "mamba_num_heads": (16, "mamba_num_heads", 16),
    "mamba_head_dim": (16, "mamba_head_dim", 16),
    "n_groups": (2, "mamba_num_groups", 2),
    "ssm_state_size": (8, "mamba_state_dim", 8),
    "vocab_size": (1024, "vocab_size", 1024),
    "tie_word_embeddings": (True, "share_embeddings_and_output_weights", True),
    "mlp_hidden_act": ("silu", "activation_func", "silu"),
    "max_position_embeddings": (4096, "seq_length", 4096),
    "initializer_range": (0.01, "init_method_std", 0.01),
    "hidden_dropout": (0.1, "hidden_dropout", 0.1),
    "attention_dropout": (0.1, "attention_dropout", 0.1),
}
REFUSED = {
    "model_type": "mpt",
    "architectures": ["NemotronHModel"],
    "is_causal": False,
    "layers_block_type": TAKEN.pop("layers_block_type")[0],
    "num_hidden_layers": 4,
    "mamba_hidden_act": "gelu",
    "layer_norm_epsilon": 1e-6,
    "rms_norm_eps": 1e-6,
    "conv_kernel": 3,
    "mamba_d_conv": 3,
    "use_conv_bias": False,
    "mamba_conv_bias": False,
    "use_bias": True,
    "mlp_bias": True,
    "attention_bias": True,
    "mamba_proj_bias": True,
    "sliding_window": 128,
    "time_step_limit": [0.0, 0.1],
    "mamba_dt_limit": [0.001, float("inf")],
    "mamba_n_groups": 2,
    "attention_head_dim": 8,
    "quantization_config": {"quant_method": "modelopt"},
}
NO_MATTER = {
    # initialisation: a trained parent has its steps and weights
    "time_step_min": 0.01,
    "time_step_max": 0.5,
    "time_step_floor": 1e-3,
    "mamba_dt_min": 0.01,
    "mamba_dt_max": 0.5,
    "mamba_dt_init_floor": 1e-3,
    "rescale_prenorm_residual": False,
    # how a kernel or a cache works, not what comes out
    "chunk_size": 256,
    "mamba_chunk_size": 256,
    "use_mamba_kernels": False,
    "mamba_ssm_cache_dtype": "bfloat16",
    "use_cache": False,
    "num_logits_to_keep": 0,
    "residual_in_fp32": True,  # rounding of the residual stream; transformers does not read it
    "output_router_logits": True,
    # derived from heads and channels, which are given
    "expand": 4,
    "mamba_expand": 4,
    # of experts and multi-token prediction: there is no such layer in a pattern of M, * and -
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "n_shared_experts": 2,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "moe_latent_size": 16,
    "moe_shared_expert_overlap": False,
    "num_experts_per_tok": 4,
    "routed_scaling_factor": 2.5,
    "n_group": 2,
    "topk_group": 2,
    "norm_topk_prob": False,
    "mtp_layers_block_type": ["mlp"],
    "mtp_hybrid_override_pattern": "-",
    "num_nextn_predict_layers": 1,  # what follows the layers is left out, and said
    # NemotronH has no positions
    "rope_theta": 500000.0,
    "rope_scaling": {"factor": 2.0},
    "partial_rotary_factor": 0.5,
    # of text: read with the tokenizer
    "bos_token_id": 3,
    "eos_token_id": [4, 5],
    "pad_token_id": 6,
    # of the file
    "dtype": "float32",
    "torch_dtype": "float32",
    "auto_map": {"AutoConfig": "configuration_mine.Mine"},
    "transformers_version": "5.0.0",
    "_name_or_path": "elsewhere",
}


@pytest.mark.parametrize("key", [*TAKEN, *REFUSED, *NO_MATTER])
def test_every_key_of_config_json(key: str) -> None:
    before = model_from_hf(CONFIG)
    if key in TAKEN:
        value, field, wanted = TAKEN[key]
        after = model_from_hf(CONFIG | {key: value})
        assert after == before | {field: wanted} != before
    elif key in REFUSED:
        with pytest.raises(ProblemsError) as error:
            model_from_hf(CONFIG | {key: REFUSED[key]}, "folder/config.json")
        named = {"layers_block_type": "hybrid_override_pattern"}.get(key, key)
        assert f"folder/config.json: {named}" in {p.key for p in error.value.problems}
    else:
        assert model_from_hf(CONFIG | {key: NO_MATTER[key]}) == before


@pytest.mark.skipif(not HF_PYTHON.is_file(), reason="make setup-hf makes the venv with transformers 5")
def test_no_key_of_transformers_is_forgotten() -> None:
    (file,) = HF_PYTHON.parent.parent.glob("lib/*/site-packages/transformers/models/nemotron_h/configuration_*.py")
    script = (
        "import ast, sys; tree = ast.parse(open(sys.argv[1]).read());"
        "print(*(n.target.id for c in tree.body if isinstance(c, ast.ClassDef) for n in c.body"
        " if isinstance(n, ast.AnnAssign)))"
    )
    done = subprocess.run([HF_PYTHON, "-I", "-c", script, file], capture_output=True, text=True, check=True)
    fields = set(done.stdout.split())
    assert len(fields) > 50 and not fields - {*TAKEN, *REFUSED, *NO_MATTER}


@pytest.mark.parametrize(
    "limit", [[0.0, float("inf")], [0, "inf"], [0.0, {"__float__": "Infinity"}], [0.0, 1e30], None]
)
def test_no_limit_of_the_step_is_met_in_many_words(limit: object) -> None:
    assert model_from_hf(CONFIG | {"time_step_limit": limit}) == model_from_hf(CONFIG)


@pytest.mark.parametrize("limit", [[0.0], "inf", [0.0, float("nan")], [1e-3, float("inf")], [-1.0, float("inf")]])
def test_other_limits_are_refused(limit: object) -> None:
    with pytest.raises(ProblemsError, match="time_step_limit"):
        model_from_hf(CONFIG | {"time_step_limit": limit})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": "64"}, r"hidden_size: '64' must be a positive integer"),
        ({"hidden_size": True}, r"hidden_size: True must be a positive integer"),
        ({"n_groups": None}, "n_groups: is not given"),
        ({"hybrid_override_pattern": None}, "hybrid_override_pattern: is not given"),
        ({"n_groups": 3}, "mamba_num_heads: 8 must be a multiple of mamba_num_groups=3"),
        ({"mlp_hidden_act": ["relu2"]}, "mlp_hidden_act"),
        ({"layers_block_type": ["mlp", 3]}, "layers_block_type"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ],
)
def test_faults_are_named_by_file_and_key(change: dict, words: str) -> None:
    with pytest.raises(ProblemsError, match=f"^here/config.json: {words}"):
        model_from_hf(CONFIG | change, "here/config.json")


# --- NeMo's context

MODEL = {
    "hybrid_override_pattern": PATTERN, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 8,
    "num_query_groups": 4, "kv_channels": 16, "mamba_num_heads": 8, "mamba_head_dim": 8, "mamba_num_groups": 4,
    "mamba_state_dim": 16, "vocab_size": 512, "seq_length": 2048,
}  # fmt: skip
SILU = {"_target_": "torch.nn.functional.silu", "_call_": False}
STOCK = {name: value for name, value in ARITHMETIC.items() if name not in OWN}  # as NeMo's own class writes
# Field -> (what the file says, what the model section must then say).
CONTEXT_TAKEN = {
    "hybrid_override_pattern": ("M-M*M", "M-M*M"), "hidden_size": (128, 128), "ffn_hidden_size": (64, 64),
    "num_attention_heads": (16, 16), "num_query_groups": (2, 2), "kv_channels": (8, 8), "mamba_num_heads": (16, 16),
    "mamba_head_dim": (16, 16), "mamba_num_groups": (2, 2), "mamba_state_dim": (8, 8), "vocab_size": (1024, 1024),
    "share_embeddings_and_output_weights": (True, True), "activation_func": (SILU, "silu"),
    "layernorm_epsilon": (1e-6, 1e-6), "softmax_scale": (0.1, 0.1), "fp32_residual_connection": (True, True),
    "seq_length": (4096, 4096), "hidden_dropout": (0.1, 0.1), "attention_dropout": (0.1, 0.1),
    "init_method_std": (0.01, 0.01), "gated_linear_unit": (True, True), "add_bias_linear": (True, True),
    "add_qkv_bias": (True, True), "qk_layernorm": (True, True),
    "embedding_multiplier": (12.0, 12.0), "residual_multiplier": (0.22, 0.22), "logits_scaling": (8.0, 8.0),
}  # fmt: skip
# The same of fields that only mean something beside others.
CONTEXT_WITH_ROPE = {
    "rotary_percent": 0.5, "rotary_base": 500000.0, "seq_len_interpolation_factor": 2.0, "rope_scaling_factor": 8.0,
    "rope_low_freq_factor": 2.0, "rope_high_freq_factor": 8.0, "rope_original_max_position_embeddings": 4096,
}  # fmt: skip
CONTEXT_REFUSED = {
    "num_layers": 4, "normalization": "LayerNorm", "num_moe_experts": 4,
    "glu_linear_offset": 1.0, "no_rope_freq": 4, "rotary_interleaved": True,
    "multi_latent_attention": True, "activation_func_clamp_value": 7.0,
    "apply_residual_connection_post_layernorm": True, "heterogeneous_block_specs": True,
    "layernorm_zero_centered_gamma": True, "softmax_type": "off-by-one", "window_attn_skip_freq": 2,
    "window_size": [16, 0], "attention_output_gate": True, "experimental_attention_variant": "gated_delta_net",
    "qk_l2_norm": True,
}  # fmt: skip
# Fields that cannot change what a trained model of M, * and - computes, by the start of their names.
CONTEXT_NO_MATTER = (
    # where and in which order it is computed: parallelism, communication, memory, graphs, kernels
    "_cpu_offloading", "account_for_", "async_", "attention_backend", "barrier_", "batch_p2p", "bias_", "clone_",
    "config_logger", "context_parallel", "cp_comm", "cpu_offloading", "cross_entropy", "cuda_graph", "deallocate_",
    "defer_", "delay_", "deterministic", "disable_", "distribute_", "enable_cuda_graph", "expert_", "external_cuda",
    "finalize_", "flash_decode", "fused_", "get_attention_mask", "grad_", "gradient_", "hetereogenous_dist",
    "hierarchical_", "inference_", "masked_softmax_fusion", "memory_efficient", "microbatch_", "min_offloaded",
    "mlp_chunks", "no_sync", "num_layers_in_", "num_microbatches", "overlap_", "parallel_output", "param_sync",
    "persist_", "pipeline_", "post_process", "pre_process", "recompute_", "sequence_parallel", "symmetric_",
    "tensor_model_parallel", "timers", "tp_", "transformer_impl", "use_cpu", "use_fused", "use_kitchen",
    "use_mamba_mem", "use_ring", "use_te_", "variable_seq", "virtual_pipeline", "wgrad_", "apply_rope_fusion",
    "batch_invariant", "ep_overlap", "fine_grained_activation_offloading", "hybrid_context_parallel", "kitchen_",
    "max_seqlen_per", "offload_modules", "use_inference_optimized", "log_max_attention_logit",
    # rounding: in which precision the same function is computed; scaling by the layer's number is undone in the softmax
    "activation_func_fp8", "apply_query_key_layer_scaling", "attention_softmax_in_fp32", "autocast_", "bf16",
    "enable_autocast", "first_last_layers_bf16", "fp16", "fp4", "fp8", "num_layers_at_", "params_dtype", "quant_",
    # training and initialisation
    "calculate_per_token_loss", "data_step_fn", "embedding_init", "forward_step_fn", "init_m", "output_layer_init",
    "perform_init", "test_mode", "qk_clip",
    # predicts further tokens in training: no part of the model, left out and said
    "mtp_",
    # of parts that a pattern of M, * and - has none of: experts, other positions and attentions
    "moe_", "mrope",
    "dsa_", "linear_",
    # ratios of layers that hybrid_override_pattern overrides; names of classes, which are never called here
    "hybrid_attention_ratio", "hybrid_mlp_ratio", "is_hybrid_model", "mamba_stack_spec", "make_vocab_size",
    "tokenizer_", "vocab_file",
)  # fmt: skip


def write_context(folder: Path, change: dict, *, form: str = "yaml", kind: str = "x") -> Path:
    """A context as NeMo writes it, with one field changed; the weights beside it are not there."""
    squared = {"_target_": "megatron.core.activations.squared_relu", "_call_": False}
    fields = {**MODEL, "num_layers": len(PATTERN), **ONLY, **STOCK, "activation_func": squared, **change}
    (folder / "context").mkdir(parents=True, exist_ok=True)
    if form == "yaml":
        text = yaml.safe_dump(
            {"_target_": "nemo.collections.llm.MambaModel", "config": {"_target_": f"nemo.{kind}", **fields}}
        )
        (folder / "context" / "model.yaml").write_text(text)
    else:
        items = [[f"Attr(name='{name}')", _fiddle(value)] for name, value in fields.items()]
        (folder / "context" / "io.json").write_text(json.dumps({"objects": {f"{kind.lower()}_1": {"items": items}}}))
    return folder


def _fiddle(value: object) -> dict:
    if isinstance(value, dict):
        module, _, name = value["_target_"].rpartition(".")
        return {"type": "pyref", "module": module, "name": name}
    return {"type": "leaf", "value": value}


@pytest.mark.parametrize("form", ["yaml", "json"])
def test_every_field_of_a_nemo_context(tmp_path: Path, form: str) -> None:
    before = dict(read_nemo_context(write_context(tmp_path, {}, form=form)).model)
    assert before == MODEL | {
        "activation_func": "squared_relu", "layernorm_epsilon": 1e-5, "fp32_residual_connection": False,
        "position_embedding_type": "none",
    }  # fmt: skip
    assert not {*CONTEXT_TAKEN} & {*CONTEXT_REFUSED}
    rope = {"position_embedding_type": "rope", "rope_scaling_factor": 4.0}
    with_rope = dict(read_nemo_context(write_context(tmp_path, rope, form=form)).model)
    for name in sorted(known_fields() | {"vocab_size"}):
        if name == "position_embedding_type":
            assert with_rope[name] == "rope" and before[name] == "none"
        elif name in CONTEXT_WITH_ROPE:
            value = CONTEXT_WITH_ROPE[name]
            after = dict(read_nemo_context(write_context(tmp_path, {**rope, name: value}, form=form)).model)
            assert after == with_rope | {name: value} != with_rope, name
        elif name in CONTEXT_TAKEN:
            value, wanted = CONTEXT_TAKEN[name]
            after = dict(read_nemo_context(write_context(tmp_path, {name: value}, form=form)).model)
            assert after == before | {name: wanted} != before, name
        elif name in CONTEXT_REFUSED:
            with pytest.raises(ProblemsError) as error:
                read_nemo_context(write_context(tmp_path, {name: CONTEXT_REFUSED[name]}, form=form))
            assert name in str(error.value), name
        else:
            assert name.startswith(CONTEXT_NO_MATTER), f"{name}: read it, refuse it, or say why it does not matter"
            assert read_nemo_context(write_context(tmp_path, {name: 7}, form=form)).model == before, name


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("nemo.collections.llm.gpt.model.ssm.NemotronHConfigBase.<lambda>", "squared_relu"),
        ("torch._C._nn.gelu", "gelu"),
        ("torch.nn.functional.relu", "relu"),
        ("megatron.core.activations.quick_gelu", None),
        ("os.system", None),
    ],
)
def test_activations_as_nemo_writes_them(tmp_path: Path, target: str, said: str | None) -> None:
    folder = write_context(tmp_path, {"activation_func": {"_target_": target, "_call_": False}})
    if said is None:
        with pytest.raises(ProblemsError, match=f"activation_func: {target} is not supported"):
            read_nemo_context(folder)
    else:
        assert read_nemo_context(folder).model["activation_func"] == said


@pytest.mark.parametrize("text", ["", "3", "config: 3", "config: [", "a: 1", "config: {hidden_size: 3}"])
def test_broken_contexts(tmp_path: Path, text: str) -> None:
    folder = write_context(tmp_path, {})
    (folder / "context" / "model.yaml").write_text(text)
    with pytest.raises(ProblemsError) as error:
        read_nemo_context(folder)
    assert str(folder / "context") in str(error.value)


def test_a_checkpoint_without_a_context_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "nemo" / "context").mkdir(parents=True)
    assert parent_files(str(tmp_path / "nemo")) is None
    text = yaml.safe_dump({"model": MODEL})
    assert load_config(smallest(tmp_path, tmp_path / "nemo", text)).config.model["hidden_size"] == 64


@pytest.mark.parametrize("form", ["yaml", "json"])
@pytest.mark.parametrize(("kind", "said"), [("SSMConfig", "gelu"), ("NemotronNano9Bv2", "squared_relu"), ("x", None)])
def test_an_activation_that_is_not_said_is_that_of_the_class(tmp_path: Path, form: str, kind: str, said: str) -> None:
    folder = write_context(tmp_path, {"activation_func": None}, form=form, kind=kind)
    assert read_nemo_context(folder).model.get("activation_func") == said


def test_sizes_that_megatron_derives_from_null(tmp_path: Path) -> None:
    nothing = dict.fromkeys(("ffn_hidden_size", "kv_channels", "mamba_num_heads", "num_query_groups"))
    model = read_nemo_context(write_context(tmp_path, nothing)).model
    assert (model["ffn_hidden_size"], model["kv_channels"], model["mamba_num_heads"]) == (256, 8, 16)
    assert model["num_query_groups"] == 8


# --- the configuration beside the parent's files

PLAIN = ["elastic.budgets={full: 1.0, half: 0.6}", "elastic.dims={ffn_hidden_size: {choices: [1.0, 0.5]}}"]


def hf_folder(folder: Path, change: dict | None = None) -> Path:
    """A folder with a config.json alone: all that is read before weights are."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | (change or {})))
    return folder


def smallest(tmp_path: Path, parent: Path, text: str = "") -> Path:
    file = tmp_path / "mine.yaml"
    file.write_text(f"parent: {{path: {parent}}}\nelastic: {{budgets: {{full: 1.0, half: 0.6}}}}\n{text}")
    return file


@pytest.mark.parametrize("kind", ["hf", "nemo"])
def test_path_and_budgets_are_a_configuration(tmp_path: Path, kind: str) -> None:
    folder = hf_folder(tmp_path / "hf") if kind == "hf" else write_context(tmp_path / "nemo", {})
    resolved = load_config(smallest(tmp_path, folder))
    assert {name: resolved.config.model[name] for name in MODEL} == MODEL
    assert Path(resolved.origins["model.hidden_size"]).is_relative_to(folder)


OTHERS = {"activation_func": "silu", "share_embeddings_and_output_weights": True, "hybrid_override_pattern": "M-M*M",
          "softmax_scale": 0.5, "fp32_residual_connection": True, "layernorm_epsilon": 1e-6}  # fmt: skip


@pytest.mark.parametrize("kind", ["hf", "nemo"])
def test_what_the_yaml_says_as_well_must_agree(tmp_path: Path, kind: str) -> None:
    folder = hf_folder(tmp_path / "hf") if kind == "hf" else write_context(tmp_path / "nemo", {})
    said = parent_files(str(folder))
    same = yaml.safe_dump({"model": {n: v for n, v in said.model.items() if v is not None}})
    assert load_config(smallest(tmp_path, folder, same)).config == load_config(smallest(tmp_path, folder)).config
    for name in FUNCTION:
        if name not in said.model:
            continue
        other = OTHERS.get(name) or 2 * said.model[name]
        with pytest.raises(ProblemsError) as error:
            load_config(smallest(tmp_path, folder, yaml.safe_dump({"model": {name: other}})))
        (problem,) = (p for p in error.value.problems if "is not what" in p.message)
        assert problem.key == f"model.{name}" and repr(other) in problem.message and str(said.file) in problem.message
        assert f"{said.keys.get(name, name)}: {said.model[name]!r}" in problem.message


def test_length_is_the_parents_own(tmp_path: Path) -> None:
    """`seq_length` becomes max_position_embeddings of the children; lengths of training are the stages'."""
    folder = hf_folder(tmp_path / "hf")
    assert load_config(smallest(tmp_path, folder, "model: {seq_length: 128}")).config.model["seq_length"] == 2048


def test_yaml_may_say_what_is_of_the_run(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "hf", {"hidden_dropout": 0.1})
    run = load_config(smallest(tmp_path, folder, "model: {hidden_dropout: 0.0, gradient_accumulation_fusion: false}"))
    assert run.config.model["hidden_dropout"] == 0.0
    assert run.config.model["gradient_accumulation_fusion"] is False


def test_a_parent_that_is_not_there_is_not_asked(tmp_path: Path) -> None:
    """`plan` of a downloaded configuration works before the parent is downloaded; so does what a manifest stored."""
    gone = tmp_path / "gone"
    text = yaml.safe_dump({"model": MODEL})
    assert load_config(smallest(tmp_path, gone, text)).config.model["hidden_size"] == 64
    with pytest.raises(ProblemsError, match=r"parent\.path: nothing at"):
        load_config(smallest(tmp_path, gone))
    stored = load_config(smallest(tmp_path, gone, text)).values
    folder = hf_folder(tmp_path / "gone", {"hidden_size": 128})
    assert load_config(None, [], base=stored).config.model["hidden_size"] == 64
    assert parent_files(str(folder)).model["hidden_size"] == 128


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "cannot be read as JSON"),
        (b"3", "'3' must be a mapping"),
        (b'{"a": "\xff"}', "byte 7 is no UTF-8"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b'{"architectures": ["X"]}', "model_type: None must be one of nemotron_h"),
        (b'{"hidden_size": 3}', "hybrid_override_pattern: is required"),
    ],
)
def test_broken_config_json(tmp_path: Path, data: bytes, words: str) -> None:
    folder = hf_folder(tmp_path / "hf")
    (folder / "config.json").write_bytes(data)
    with pytest.raises(ProblemsError, match=words) as error:
        load_config(smallest(tmp_path, folder))
    assert all(p.key.startswith(str(folder / "config.json")) for p in error.value.problems[:1])


def test_byte_order_mark_is_read(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "hf")
    (folder / "config.json").write_bytes(b"\xef\xbb\xbf" + (folder / "config.json").read_bytes())
    assert load_config(smallest(tmp_path, folder)).config.model["hidden_size"] == 64


def test_which_output_weights_count(tmp_path: Path) -> None:
    tied = hf_folder(tmp_path / "tied", {"tie_word_embeddings": True})
    key = "share_embeddings_and_output_weights"
    assert load_config(smallest(tmp_path, tied)).config.model[key] is True
    untied = load_config(smallest(tmp_path, tied), ["parent.output_weights=lm_head"]).config
    assert untied.model[key] is False
    assert load_config(smallest(tmp_path, tied), ["parent.output_weights=embedding"]).config.model[key] is True
    with pytest.raises(ProblemsError, match=r"parent\.output_weights: 'head' must be one of"):
        load_config(smallest(tmp_path, tied), ["parent.output_weights=head"])
    with pytest.raises(ProblemsError, match=r"parent\.output_weights: .* is not tied"):
        load_config(smallest(tmp_path, hf_folder(tmp_path / "hf")), ["parent.output_weights=lm_head"])


def test_shipped_configuration_only_for_a_bare_name(tmp_path: Path) -> None:
    assert load_config("tiny_parent.yaml").config.name == "tiny_parent"
    for path in (tmp_path / "tiny_parent.yaml", Path("nowhere/tiny_parent.yaml"), Path("./nowhere/../tiny_parent.yml")):
        with pytest.raises(ProblemsError, match="no file"):
            load_config(path)
    with pytest.raises(ProblemsError, match="no file"):
        load_config("./tiny_parent.yaml" if not Path("tiny_parent.yaml").exists() else "./no.yaml")


def test_required_is_said_by_hugging_face() -> None:
    model = model_from_hf(CONFIG)
    assert {*required_of(model)} <= {*model}


# --- the configuration to start from


@pytest.mark.parametrize("change", [{}, {"hybrid_override_pattern": "M-" * 20 + "*-", "num_hidden_layers": 42}])
def test_a_configuration_to_start_from_is_whole(tmp_path: Path, change: dict, capsys: pytest.CaptureFixture) -> None:
    """`config --from PARENT > mine.yaml` gives what `plan` has no problem with, in sizes of the parent's groups."""
    folder = hf_folder(tmp_path / "my parent's", change)
    assert main(["config", "--from", str(folder)]) == 0
    file = tmp_path / "mine.yaml"
    file.write_text(capsys.readouterr().out)
    run = load_config(file).config
    assert run.parent.path == str(folder) and run.name == "my_parent_s"
    result = plan(run)
    assert not result["problems"] and not [note for note in result["notes"] if "budget (" in note]
    assert [budget["name"] for budget in result["budgets"]] == ["full", "large", "small"]
    counts = [budget["parameters"] for budget in result["budgets"]]
    assert counts[0] > counts[1] > counts[2]
    assert {"hidden_size", "ffn_hidden_size", "mamba_num_heads", "num_attention_heads"} <= run.elastic.dims.keys()


def test_a_configuration_to_start_from_needs_a_parent(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for words, message in (
        (["--from", str(tmp_path / "gone")], "parent.path: nothing at"),
        (["--from", str(tmp_path)], "--from: nothing in"),
        (["--from", "builtin:tiny_parent", "train.seed=3"], "cannot stand beside train.seed=3"),
    ):
        assert main(["config", *words]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("form", ["yaml", "json"])
def test_a_context_with_experts_says_its_routing_and_not_how_it_was_trained(tmp_path: Path, form: str) -> None:
    from expert_features import FEATURES, SIZES

    said = {"hybrid_override_pattern": "ME*-M", **SIZES, **FEATURES["nemotron"]}
    trained = {"moe_aux_loss_coeff": 1e-4, "moe_z_loss_coeff": 1e-3, "moe_router_load_balancing_type": "seq_aux_loss"}
    model = dict(read_nemo_context(write_context(tmp_path, said | trained, form=form)).model)
    assert said.items() <= model.items() and not trained.keys() & model.keys()
    for other in ({"moe_router_load_balancing_type": "sinkhorn"}, {"moe_expert_capacity_factor": 1.0}):
        with pytest.raises(ProblemsError, match=next(iter(other))):
            read_nemo_context(write_context(tmp_path, said | trained | other, form=form))
