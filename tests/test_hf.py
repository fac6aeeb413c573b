"""Hugging Face folders against transformers' own NemotronH, and back.

logits(transformers 5 on the extracted folder) == logits(Megatron on the same child), 1e-4 relative, fp32
hf(nemo(hf)) == hf, byte by byte per tensor
"""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_family import MODEL, TOKENIZER, manifest, random_weights, write_hf_parent

from nemo_elastic.checkpoint.extract import child_architecture, child_layout
from nemo_elastic.checkpoint.hf_config import hf_config
from nemo_elastic.checkpoint.hf_folder import write_hf_folder
from nemo_elastic.checkpoint.huggingface import HuggingFaceReader
from nemo_elastic.checkpoint.reader import check_against_layout, lazy_tensors
from nemo_elastic.checkpoint.safetensors_reader import SafetensorsReader
from nemo_elastic.config.model_fields import architecture_of
from nemo_elastic.config.parent_hf import model_from_hf
from nemo_elastic.config.sections import ParentConfig
from nemo_elastic.mcore.models.parents import open_parent
from nemo_elastic.problems import ProblemsError
from nemo_elastic.space.layout import ParamLayout

HF_PYTHON = Path(__file__).parent.parent / ".venv-hf" / "bin" / "python"
# Fields of transformers' NemotronHConfig that we leave out, because nothing that our layers compute reads them.
LEFT_OUT = {
    "num_logits_to_keep": "which logits are returned",
    "use_mamba_kernels": "deprecated, without effect",
    "expand": "the inner size is mamba_num_heads * mamba_head_dim",
    "mtp_layers_block_type": "of the multi-token prediction that num_nextn_predict_layers=0 leaves out",
    # mixture of experts: we write no such layer
    "n_routed_experts": "experts",
    "output_router_logits": "experts",
    "n_shared_experts": "experts",
    "moe_intermediate_size": "experts",
    "moe_shared_expert_intermediate_size": "experts",
    "moe_latent_size": "experts",
    "moe_shared_expert_overlap": "experts",
    "num_experts_per_tok": "experts",
    "routed_scaling_factor": "experts",
    "n_group": "experts",
    "topk_group": "experts",
    "norm_topk_prob": "experts",
}
TOKEN_IDS = {"bos_token_id", "eos_token_id", "pad_token_id"}  # of the tokenizer, see test_extract
CARD = {"name": "child", "parameters": 1, "of_parent": 1.0, "sizes": {}, "provenance": {}}


def write_hf(folder: Path, reader: object, layout: ParamLayout, model: dict, **how: object) -> Path:
    """A folder of a whole model."""
    folder.mkdir(parents=True)
    write_hf_folder(folder, list(lazy_tensors(reader)), layout, model, tokenizer=TOKENIZER, card=CARD, **how)
    return folder


def test_hand_made_folder_is_read_by_canonical_names(tmp_path: Path) -> None:
    weights = random_weights()
    reader = HuggingFaceReader(write_hf_parent(tmp_path / "hf", weights), architecture_of(MODEL))
    check_against_layout(reader, ParamLayout(architecture_of(MODEL)), "hf")
    assert all(torch.equal(reader.read(name), value) for name, value in weights.items())
    assert all(reader.shape(name) == tuple(value.shape) for name, value in weights.items())
    assert {k: reader.model[k] for k in MODEL} == MODEL


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hf_to_nemo_to_hf_keeps_every_byte(tmp_path: Path, dtype: torch.dtype) -> None:
    from nemo_elastic.mcore.checkpoint.dist_checkpoint import TorchDistReader
    from nemo_elastic.mcore.checkpoint.dist_save import write_torch_dist

    weights = random_weights(dtype=dtype)
    weights["decoder.layers.0.mixer.A_log"] = weights["decoder.layers.0.mixer.A_log"].float()  # mixed, as some are
    first, layout = write_hf_parent(tmp_path / "first", weights), ParamLayout(architecture_of(MODEL))
    write_torch_dist(tmp_path / "weights", lazy_tensors(HuggingFaceReader(first)), layout)
    second = write_hf(tmp_path / "second", TorchDistReader(tmp_path / "weights"), layout, MODEL, shard_bytes=200_000)
    assert len(list(second.glob("model-*.safetensors"))) > 2
    a, b = SafetensorsReader(first), SafetensorsReader(second)
    assert set(a.names()) == set(b.names())
    for name in a.names():
        x, y = a.read(name), b.read(name)
        assert x.dtype == y.dtype and torch.equal(x.view(-1).view(torch.uint8), y.view(-1).view(torch.uint8)), name


def test_config_survives_the_way_there_and_back() -> None:
    config = hf_config(MODEL, torch.bfloat16, {"eos_token_id": 0})
    assert {k: model_from_hf(config)[k] for k in MODEL} == MODEL
    without_pattern = {k: v for k, v in config.items() if k != "hybrid_override_pattern"}
    without_list = {k: v for k, v in config.items() if k != "layers_block_type"}
    assert model_from_hf(without_pattern) == model_from_hf(without_list) == model_from_hf(config)
    older = {("attention_head_dim" if k == "head_dim" else k): v for k, v in config.items()}
    assert model_from_hf(older) == model_from_hf(config)


@pytest.mark.slow
@pytest.mark.skipif(not HF_PYTHON.is_file(), reason="make setup-hf makes the venv with transformers 5")
def test_no_field_of_the_configuration_class_is_left_to_its_default() -> None:
    """A field that transformers adds or renames fails here, and is written or said to be without effect."""
    asked = "from transformers import NemotronHConfig as C; import json; print(json.dumps(list(C.__annotations__)))"
    done = subprocess.run([HF_PYTHON, "-I", "-c", asked], capture_output=True, text=True, timeout=300, check=True)
    fields = set(json.loads(done.stdout))
    assert "time_step_min" in fields and len(fields) > 40
    bare = {name: value for name, value in MODEL.items() if name not in ("seq_length", "layernorm_epsilon")}
    written = hf_config(bare, torch.float32, {}).keys() | {"max_position_embeddings"}  # no positions are encoded
    assert fields - written - TOKEN_IDS == set(LEFT_OUT) & fields
    assert not written & set(LEFT_OUT)
    assert not json.dumps(hf_config(MODEL, torch.float32, {}), allow_nan=False).count("Infinity")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "mpt"}, "'mpt' must be one of nemotron_h, llama, .*; docs/extending.md"),
        ({"hybrid_override_pattern": "M-M*-M*"}, "one is stale"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"intermediate_size": [80, 40, 40]}, "is a list"),
        ({"layer_norm_epsilon": 1e-6}, "1e-06 must be 1e-05"),
        ({"mlp_hidden_act": "swish2"}, "'swish2' is not supported"),
        ({"layers_block_type": ["moe"] * 8, "hybrid_override_pattern": None}, "n_routed_experts: is not given"),
    ],
)
def test_other_models_are_refused(change: dict, words: str) -> None:
    with pytest.raises(ProblemsError, match=words):
        model_from_hf({**hf_config(MODEL, torch.float32, {}), **change})


def test_what_nemotron_h_cannot_say_is_refused() -> None:
    with pytest.raises(ProblemsError) as error:
        hf_config({**MODEL, "position_embedding_type": "rope", "add_bias_linear": True}, torch.float32, {})
    assert {p.key for p in error.value.problems} == {"model.position_embedding_type", "model.add_bias_linear"}
    with pytest.raises(ProblemsError, match=r"model\.layernorm_epsilon: 1e-06 must be 1e-05"):
        hf_config({**MODEL, "layernorm_epsilon": 1e-6}, torch.float32, {})


def test_damaged_folders(tmp_path: Path) -> None:
    good = write_hf_parent(tmp_path / "hf", random_weights())
    with pytest.raises(ProblemsError, match=r"model\.hidden_size: 64 is not what"):
        HuggingFaceReader(good, architecture_of({**MODEL, "hidden_size": 64}))
    file = good / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-100])
    with pytest.raises(ProblemsError, match="truncated"):
        HuggingFaceReader(good)
    file.write_bytes(b"\xff" * 8 + data[8:])
    with pytest.raises(ProblemsError, match="truncated or no safetensors"):
        HuggingFaceReader(good)
    file.unlink()
    with pytest.raises(ProblemsError, match="has neither"):
        HuggingFaceReader(good)
    weights = random_weights()
    del weights["decoder.final_norm.weight"]
    with pytest.raises(ProblemsError, match=r"lacks backbone\.norm_f\.weight"):
        HuggingFaceReader(write_hf_parent(tmp_path / "less", weights))
    weights = {**random_weights(), "decoder.layers.0.mixer.extra": torch.ones(1)}
    with pytest.raises(ProblemsError, match=r"has backbone\.layers\.0\.mixer\.extra"):
        HuggingFaceReader(write_hf_parent(tmp_path / "more", weights))


def test_tied_parent_with_another_lm_head(tmp_path: Path) -> None:
    """Said, and refused unless told which one counts; the same matrix twice is no contradiction."""
    tied = {**MODEL, "share_embeddings_and_output_weights": True}
    both = random_weights()
    folder = write_hf_parent(tmp_path / "hf", both)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.raises(
        ProblemsError, match=r"lm_head\.weight is not backbone\.embeddings\.weight; say which one counts"
    ):
        HuggingFaceReader(folder, architecture_of(tied))
    reader = HuggingFaceReader(folder, architecture_of(tied), "embedding")
    assert "output_layer.weight" not in reader.names()
    untied = open_parent(ParentConfig(path=str(folder), output_weights="lm_head"), ParamLayout(architecture_of(MODEL)))
    assert torch.equal(untied.read("output_layer.weight"), both["output_layer.weight"])
    both["output_layer.weight"] = both["embedding.word_embeddings.weight"].clone()
    same = write_hf_parent(tmp_path / "same", both)
    (same / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    assert "output_layer.weight" not in HuggingFaceReader(same, architecture_of(tied)).names()


def test_quantized_tensors_are_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = write_hf_parent(tmp_path / "hf", random_weights())
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in tensors if n.endswith("up_proj.weight"))
    save_file({**tensors, name: tensors[name].to(torch.float8_e4m3fn)}, folder / "model.safetensors")
    with pytest.raises(
        ProblemsError, match=r"up_proj\.weight \(F8_E4M3\): quantized weights cannot be trained; give the bf16"
    ):
        HuggingFaceReader(folder)
    save_file({**tensors, f"{name}_scale": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(ProblemsError, match="quantized weights cannot be trained"):
        HuggingFaceReader(folder)


def test_file_that_is_exchanged_meanwhile_is_not_read(tmp_path: Path) -> None:
    folder = write_hf_parent(tmp_path / "hf", random_weights())
    other = write_hf_parent(tmp_path / "other", random_weights(seed=1))
    reader = HuggingFaceReader(folder)
    (other / "model.safetensors").rename(folder / "model.safetensors")
    assert all(torch.equal(reader.read(name), value) for name, value in random_weights().items())


def test_index_that_lies_is_refused(tmp_path: Path) -> None:
    layout = ParamLayout(architecture_of(MODEL))
    source = HuggingFaceReader(write_hf_parent(tmp_path / "hf", random_weights()))
    folder = write_hf(tmp_path / "sharded", source, layout, MODEL, shard_bytes=200_000)
    index = folder / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    name = next(iter(good["weight_map"]))
    for file, words in (
        ("../hf/model.safetensors", "not a file of the same folder"),
        ("gone.safetensors", "not exist"),
    ):
        index.write_text(json.dumps({**good, "weight_map": {**good["weight_map"], name: file}}))
        with pytest.raises(ProblemsError, match=words):
            SafetensorsReader(folder)
    last = sorted(set(good["weight_map"].values()))[-1]
    index.write_text(json.dumps({**good, "weight_map": {**good["weight_map"], name: last}}))
    with pytest.raises(ProblemsError, match="which lacks it"):
        SafetensorsReader(folder)


@pytest.mark.slow
@pytest.mark.skipif(not HF_PYTHON.is_file(), reason="make setup-hf makes the venv with transformers 5")
def test_transformers_gives_megatrons_logits(tmp_path: Path, one_rank: None) -> None:
    """Parent and children at three budgets, the parent also through HF -> canonical names -> Megatron."""
    from nemo_elastic.checkpoint.extract import child_tensors, plain_model
    from nemo_elastic.checkpoint.reader import MemoryReader
    from nemo_elastic.mcore.models.build import build_plain_model, load_weights

    family, parent = manifest(), MemoryReader(random_weights(seed=5))
    tokens = torch.randint(0, MODEL["vocab_size"], (2, 40), generator=torch.Generator().manual_seed(1))
    folders, expected, counts = [], [], []
    for budget, subnet in family.subnets.items():
        architecture = child_architecture(family.space.architecture, subnet)
        layout, model = child_layout(family.layout, subnet), plain_model(MODEL, architecture)
        tensors = {t.name: t.read() for t in child_tensors(parent, family.layout, subnet)}
        folders.append(str(write_hf(tmp_path / budget, MemoryReader(tensors), layout, model)))
        megatron = build_plain_model(architecture, perform_initialization=False)
        load_weights(megatron, HuggingFaceReader(folders[-1]), architecture)
        with torch.no_grad():
            positions = torch.arange(tokens.shape[1]).expand_as(tokens)
            expected.append(megatron.eval()(tokens, positions, None).numpy())
        counts.append(sum(v.numel() for v in tensors.values()))
    (tmp_path / "tokens.json").write_text(json.dumps(tokens.tolist()))
    script = Path(__file__).parent / "hf_logits.py"
    command = [HF_PYTHON, script, tmp_path / "tokens.json", tmp_path / "out.npz", *folders]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    got = np.load(tmp_path / "out.npz")
    for number, wanted in enumerate(expected):
        error = np.abs(got[str(number)] - wanted).max() / np.abs(wanted).max()
        assert error < 1e-4, (folders[number], error)
        assert got[f"parameters{number}"] == counts[number]
    assert np.abs(expected[0] - expected[1]).max() > 0.01  # the children do differ
