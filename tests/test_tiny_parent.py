"""The shipped parents: files, sizes, hashes, and that they have learnt what their cards say. Megatron, no NeMo."""

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from expert_features import skip_without_slot
from safetensors import safe_open

import nemo_elastic
from nemo_elastic.data.corpus import load_corpus_list, usable_files
from nemo_elastic.data.tokenizer import BPETokenizer
from nemo_elastic.data.tokens import load_tokens
from nemo_elastic.data.windows import Windows

ASSETS = Path(nemo_elastic.__file__).parent / "assets"
MEBIBYTES = {"tiny_parent": 8, "tiny_experts": 4}
# A kind's tensor, and one of attention.
SOME = {
    "tiny_parent": {"decoder.layers.1.mlp.linear_fc1.weight", "decoder.layers.5.self_attention.linear_qkv.weight"},
    "tiny_experts": {
        "decoder.layers.1.mlp.router.expert_bias",
        "decoder.layers.1.mlp.experts.experts.linear_fc1.weight",
        "decoder.layers.3.self_attention.linear_qkv.weight",
    },
}


@pytest.fixture(scope="module", params=list(MEBIBYTES))
def folder(request: pytest.FixtureRequest) -> Path:
    return ASSETS / request.param


@pytest.fixture(scope="module")
def sizes(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def facts(folder: Path) -> dict:
    with safe_open(str(folder / "model.safetensors"), "pt") as file:
        return {k: json.loads(v) for k, v in file.metadata().items() if k != "format"}


def closed_form(s: dict) -> int:
    """Parameters by layer kind, from the sizes alone."""
    h, d_inner = s["hidden_size"], s["mamba_num_heads"] * s["mamba_head_dim"]
    conv = d_inner + 2 * s["mamba_num_groups"] * s["mamba_state_dim"]
    projected = d_inner + conv + s["mamba_num_heads"]
    queries, keys = s["num_attention_heads"] * s["kv_channels"], s["num_query_groups"] * s["kv_channels"]
    layers = {
        "M": h + h * projected + 5 * conv + 3 * s["mamba_num_heads"] + d_inner + d_inner * h,
        "*": h + h * (queries + 2 * keys) + queries * h,
        "-": h + 2 * h * s.get("ffn_hidden_size", 0),
        "E": h
        + 2 * s.get("num_moe_experts", 0) * h * s.get("moe_ffn_hidden_size", 0)
        + 2 * h * s.get("moe_shared_expert_intermediate_size", 0)
        + (h + 1) * s.get("num_moe_experts", 0),
    }
    return sum(layers[kind] for kind in s["hybrid_override_pattern"]) + h + 2 * s["vocab_size"] * h


def test_weights_are_bf16_small_and_complete(folder: Path, sizes: dict, facts: dict) -> None:
    assert sum(file.stat().st_size for file in folder.iterdir()) <= MEBIBYTES[folder.name] * 2**20
    with safe_open(str(folder / "model.safetensors"), "pt") as file:
        tensors = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
        assert {t.get_dtype() for t in tensors.values()} == {"BF16"}
        assert sum(math.prod(t.get_shape()) for t in tensors.values()) == closed_form(sizes) == facts["parameters"]
    assert {"embedding.word_embeddings.weight", "output_layer.weight", "decoder.final_norm.weight"} < tensors.keys()
    assert {"decoder.layers.0.mixer.in_proj.weight", *SOME[folder.name]} < tensors.keys()
    assert sizes["vocab_size"] == BPETokenizer().vocab_size


def test_card_belongs_to_the_weights(folder: Path, facts: dict) -> None:
    card = (folder / "README.md").read_text()
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() in card
    assert re.search(rf"\| held-out loss \| {facts['heldout_loss']:.4f} nats", card)
    assert f"| seed | {facts['seed']} |" in card and "python examples/tiny_parent/train.py" in card
    assert not re.search(r"(/home|/root|/work|/tmp)/", card)


def plain_model(folder: Path, sizes: dict) -> Any:
    """The parent with experts as the package builds it, the hybrid by Megatron's own configuration alone."""
    from megatron.core.transformer.transformer_config import TransformerConfig
    from safetensors.torch import load_file

    from nemo_elastic.mcore.kernels.layer_specs import hybrid_stack_spec
    from nemo_elastic.mcore.models.build import build_plain_model
    from nemo_elastic.mcore.versions import AttnBackend, HybridModel, layer_pattern, squared_relu

    weights = load_file(str(folder / "model.safetensors"))
    if "num_moe_experts" in sizes:
        skip_without_slot()
        model = build_plain_model(sizes)
        missing, unexpected = model.load_state_dict(weights, strict=False)
        assert not unexpected and all(name.endswith("_extra_state") for name in missing)
        return model.eval()
    names = TransformerConfig.__dataclass_fields__
    config = TransformerConfig(
        num_layers=len(sizes["hybrid_override_pattern"]),
        **{k: v for k, v in sizes.items() if k in names},
        add_bias_linear=False,
        normalization="RMSNorm",
        activation_func=squared_relu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        is_hybrid_model=True,
        attention_backend=AttnBackend.local,
    )
    pattern = layer_pattern(sizes["hybrid_override_pattern"]) | {"position_embedding_type": "none"}
    model = HybridModel(config, hybrid_stack_spec(config), sizes["vocab_size"], sizes["seq_length"], **pattern)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and all(name.endswith("_extra_state") for name in missing)
    return model.eval()


def test_parent_has_learnt_what_the_card_says(
    one_rank: None, folder: Path, sizes: dict, facts: dict, tmp_path: Path
) -> None:
    """The loss over the whole held-out text where this Python has the same text, over part of it elsewhere."""
    import torch

    from nemo_elastic.nemo.plain.tiny_parent import expert_load

    model = plain_model(folder, sizes)
    corpus = load_corpus_list()
    heldout = [f for f in corpus.files if f.split == "heldout"]
    same_text = [f for f in usable_files(corpus) if f.split == "heldout"] == heldout
    stream = load_tokens("heldout", BPETokenizer(), cache_dir=tmp_path)
    windows = Windows(stream, sizes["seq_length"], shuffle=False)
    total, batches = 0.0, windows.per_epoch // 8 if same_text else 8
    with torch.no_grad(), expert_load(model) as load:
        for index in range(batches):
            tokens, labels = map(torch.from_numpy, windows.batch(8 * index, 8))
            positions = torch.arange(sizes["seq_length"]).expand_as(tokens)
            total += model(tokens, positions, None, labels=labels).mean().item()
    assert total / batches == pytest.approx(facts["heldout_loss"], abs=1e-3 if same_text else 0.5)
    assert load == pytest.approx(facts.get("expert_load", []), rel=0.02 if same_text else 0.5)
    assert all(busiest < 2 for busiest in load)  # the bias was moved until no expert had nearly all tokens, or none
