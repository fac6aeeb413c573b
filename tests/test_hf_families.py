"""Every family on its way from transformers and back: tiny random parents of its own classes, and their children.

logits(ours on the parent's folder) == logits(transformers' class), 1e-4 relative, fp32
hf(nemo(hf)) == hf, byte by byte per tensor
logits(nested subnet) == logits(transformers on the child's folder), one of three children without some blocks
"""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_family import TOKENIZER
from safetensors.torch import load_file

from nemo_elastic.checkpoint.hf_config import hf_config
from nemo_elastic.checkpoint.huggingface import HuggingFaceReader
from nemo_elastic.checkpoint.manifest import Manifest
from nemo_elastic.checkpoint.reader import lazy_tensors
from nemo_elastic.checkpoint.safetensors_reader import SafetensorsReader
from nemo_elastic.config import load_config
from nemo_elastic.config.load import plain
from nemo_elastic.config.model_fields import architecture_of
from nemo_elastic.config.parent_files import parent_files
from nemo_elastic.config.parent_hf import model_from_hf
from nemo_elastic.nemo.export.checkpoints import extract_all, write_nested
from nemo_elastic.space.blocks import DEPTH_UNITS
from nemo_elastic.space.budget import Budget
from nemo_elastic.space.dims import ElasticDim
from nemo_elastic.space.elastic_space import ElasticSpace
from nemo_elastic.space.layout import ParamLayout

HF_PYTHON = Path(__file__).parent.parent / ".venv-hf" / "bin" / "python"
ATTENTION = {
    "hidden_size": 48,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "num_hidden_layers": 4,
    "intermediate_size": 80,
    "vocab_size": 2048,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MAMBA = {
    "num_hidden_layers": 5,
    "mamba_n_heads": 12,
    "mamba_d_head": 8,
    "mamba_n_groups": 2,
    "mamba_d_state": 16,
    "mamba_expand": 2,
    "rms_norm_eps": 1e-5,
}
SCALED = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0}
PARENTS: dict[str, dict[str, Any]] = {
    "llama": {
        **ATTENTION,
        "model_type": "llama",
        "rope_parameters": {"rope_theta": 500.0, **SCALED, "original_max_position_embeddings": 32},
    },
    "llama_biased": {
        **ATTENTION,
        "model_type": "llama",
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_theta": 500.0, "rope_type": "linear", "factor": 2.0},
    },
    "qwen2": {**ATTENTION, "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {**ATTENTION, "model_type": "qwen3", "head_dim": 16, "rope_theta": 1e6},
    "bamba": {**ATTENTION, **MAMBA, "model_type": "bamba", "attn_layer_indices": [2], "num_key_value_heads": 2},
    "granite": {
        **ATTENTION,
        **MAMBA,
        "model_type": "granitemoehybrid",
        "layer_types": ["mamba", "mamba", "attention", "mamba", "attention"],
        "shared_intermediate_size": 80,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "embedding_multiplier": 12,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.2,
        "logits_scaling": 8,
        "position_embedding_type": "rope",
        "tie_word_embeddings": True,
    },
    "granite_attention": {
        **ATTENTION,
        "model_type": "granitemoehybrid",
        "layer_types": ["attention"] * 4,
        "shared_intermediate_size": 80,
        "num_local_experts": 0,
        "mamba_n_heads": 12,
        "attention_multiplier": 8**-0.5,
        "rms_norm_eps": 1e-5,
        "residual_multiplier": 0.5,
    },
}
EXPERTS = {"num_experts_per_tok": 3, "moe_intermediate_size": 24}
NEMOTRON = {
    **ATTENTION,
    **EXPERTS,
    "model_type": "nemotron_h",
    "layers_block_type": ["linear_attention", "moe", "full_attention", "moe", "linear_attention", "moe", "mlp", "moe"],
    "num_hidden_layers": 8,
    "mamba_num_heads": 12,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "ssm_state_size": 16,
    "time_step_min": 1e-30,
    "n_routed_experts": 16,
    "moe_shared_expert_intermediate_size": 40,
    "routed_scaling_factor": 2.5,
}
PARENTS |= {
    "nemotron_experts": NEMOTRON,
    "nemotron_latent": {**NEMOTRON, "moe_latent_size": 20, "routed_scaling_factor": 5.0},
    "granite_experts": {
        **PARENTS["granite"],
        "num_local_experts": 16,
        "num_experts_per_tok": 3,
        "intermediate_size": 24,
        "shared_intermediate_size": 40,
        "position_embedding_type": "nope",
    },
    "qwen3_experts": {
        **ATTENTION,
        **EXPERTS,
        "model_type": "qwen3_moe",
        "num_experts": 16,
        "norm_topk_prob": True,
        "rope_theta": 1e6,
        "head_dim": 16,
    },
    "qwen3_experts_first": {**ATTENTION, **EXPERTS, "model_type": "qwen3_moe", "num_experts": 16},
}
IN_CI = ("granite", "nemotron_experts")
FAMILIES = [
    pytest.param(name, marks=[pytest.mark.slow, *([] if name in IN_CI else [pytest.mark.families])]) for name in PARENTS
]
pytestmark = [
    pytest.mark.skipif(not HF_PYTHON.is_file(), reason="make setup-hf makes the venv with transformers 5"),
    pytest.mark.usefixtures("one_rank"),
]


# Fields of the configuration classes that we leave out, because nothing that is computed without experts reads them.
LEFT_OUT = {
    "num_logits_to_keep": "which logits are returned",
    "z_loss_coefficient": "of a loss",
    "output_router_logits": "experts",
    "router_aux_loss_coef": "of a loss",
    "use_mamba_kernels": "how a kernel works",
    "expand": "derived from heads and channels",
    "mtp_layers_block_type": "of the multi-token prediction that num_nextn_predict_layers=0 leaves out",
    "moe_shared_expert_overlap": "when the shared expert is computed",
    "max_window_layers": "of windows, which use_sliding_window=False leaves out",
    "layer_types": "of windows; Granite's are written",
    "rope_parameters": "of a Granite without positions",
}
TOKEN_IDS = {"bos_token_id", "eos_token_id", "pad_token_id"}
ASKED = """
import json, sys, transformers as t
said = [t.CONFIG_MAPPING[c["model_type"]] for c in json.loads(sys.argv[1])]
print(json.dumps([[k.from_dict(c).to_dict(), list(k.__annotations__)] for k, c in zip(said, json.loads(sys.argv[1]))]))
"""


@pytest.mark.slow
def test_what_a_file_does_not_say_is_what_its_class_takes() -> None:
    """read(what a class makes of a file) == read(the file); and no field of a class is left to its default by us."""
    sizes = ("num_hidden_layers", "intermediate_size", "vocab_size", "max_position_embeddings")
    files = {
        kind: {"model_type": kind, "hidden_size": 256, "num_attention_heads": 32, **{n: ATTENTION[n] for n in sizes}}
        for kind in ("llama", "qwen2", "qwen3", "bamba", "granitemoehybrid")
    }
    files["granitemoehybrid"] |= {"num_local_experts": 0, "rms_norm_eps": 1e-5}  # what else it takes is refused
    chosen = {"num_experts_per_tok": 4, "rms_norm_eps": 1e-5}
    files["granite with experts"] = {**files["granitemoehybrid"], "num_local_experts": 16, **chosen}
    files["qwen3_moe"] = {**files["qwen3"], **chosen, "model_type": "qwen3_moe", "num_experts": 8}
    files["qwen3_moe"] |= {"moe_intermediate_size": 16}
    files["nemotron_h"] = {**NEMOTRON, "hidden_size": 256}
    command = [HF_PYTHON, "-I", "-c", ASKED, json.dumps(list(files.values()))]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    for (kind, file), (whole, fields) in zip(files.items(), json.loads(done.stdout), strict=True):
        model = model_from_hf(file)
        known = {name: value for name, value in model_from_hf(whole).items() if name in model}
        assert known == {**known, **model}, kind
        assert set(model_from_hf(whole)) - set(model) <= {"init_method_std", "attention_dropout", "hidden_dropout"}
        written = hf_config(model, torch.float32, {})
        assert len(fields) > 15 and set(fields) - set(written) - TOKEN_IDS <= set(LEFT_OUT), kind
        assert model_from_hf(written) == {**model_from_hf(written), **model}, kind


def made(folder: Path, name: str) -> tuple[Path, dict[str, torch.Tensor]]:
    """The parent's folder, and its tokens and logits in transformers."""
    (folder / "configs.json").write_text(json.dumps({name: PARENTS[name]}))
    script = Path(__file__).with_name("hf_family_parents.py")
    command = [HF_PYTHON, script, folder / "configs.json", folder]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / name, load_file(folder / f"{name}.safetensors")


def family(folder: Path) -> Manifest:
    """The parent, its widths cut, some blocks less besides; and one whose layers differ, filled up with zeros."""
    said = parent_files(str(folder))
    model = dict(said.model)
    arch, unit = architecture_of(model), DEPTH_UNITS[said.depth_unit]
    blocks = arch.num_layers // unit
    ranking = tuple(unit * block + half for block in [0, *range(blocks - 1, 0, -1)] for half in range(unit))
    dims = {"hidden_size": ElasticDim(name="hidden_size", full=arch.hidden_size, groups=1, choices=(40, 32))}
    space = ElasticSpace(architecture=arch, dims=dims, ffn_groups=8, depth_ranking=ranking, depth_unit=unit)
    large, small = {"num_attention_heads": 8}, {"num_attention_heads": 4, "num_layers": arch.num_layers - 2 * unit}
    layers = {letter: len(arch.layers_of(letter)) for letter in "M*-E"}
    if layers["M"]:
        large, small = large | {"mamba_num_heads": 10}, small | {"mamba_num_heads": 8}
    ragged = {**large, "num_attention_heads": [8, 4, *[8] * layers["*"]][: layers["*"]]}
    cut = {"ffn_hidden_size": (56, 40, 48)} if layers["-"] else {}
    if layers["E"]:
        cut |= {"moe_ffn_hidden_size": (16, 8, 16)}
        large, small, ragged = ({**one, "num_moe_experts": 8} for one in (large, small, ragged))
    if layers["E"] and arch.moe_shared_expert_intermediate_size:
        cut |= {"moe_shared_expert_intermediate_size": (24, 16, 16)}
    for name, (much, little, some) in cut.items():
        count = layers["-" if name == "ffn_hidden_size" else "E"]
        large[name], small[name] = much, little
        ragged[name] = [much, little, *[some] * count][:count]
    subnets = {
        "full": space.full_subnet(),
        "large": space.subnet(hidden_size=40, **large),
        "small": space.subnet(hidden_size=32, **small),
        "ragged": space.subnet(hidden_size=40, **ragged),
    }
    budgets = {name: Budget(name=name, kind="fraction", value=1 / n) for n, name in enumerate(subnets, start=1)}
    config = load_config("tiny_parent.yaml", ["train.val_samples=4"]).config
    return Manifest(model=model, space=space, budgets=budgets, subnets=subnets, provenance={"config": plain(config)})


def batches(vocabulary: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    rows = torch.randint(0, vocabulary, (4, 33), generator=torch.Generator().manual_seed(2))
    return [(part[:, :-1], part[:, 1:]) for part in rows.split(2)]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_goes_there_and_back(name: str, tmp_path: Path) -> None:
    from nemo_elastic.mcore.checkpoint.dist_checkpoint import TorchDistReader
    from nemo_elastic.mcore.checkpoint.dist_save import write_torch_dist
    from nemo_elastic.mcore.models.build import build_plain_model, load_weights
    from nemo_elastic.nemo.export.first_difference import plain_trace
    from nemo_elastic.nemo.export.hf_side import run_transformers
    from nemo_elastic.nemo.export.verify import verify
    from nemo_elastic.nemo.export.verify_parent import verify_parent

    parent, theirs = made(tmp_path, name)
    reader = HuggingFaceReader(parent)
    arch = architecture_of(reader.model)
    megatron = build_plain_model(reader.model, params_dtype=torch.float32)
    load_weights(megatron, reader, arch)
    tokens, wanted = theirs["tokens"], theirs["logits"]
    with torch.no_grad():
        ours = megatron.eval()(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)
    error = float((ours - wanted).abs().max() / wanted.abs().max())
    print(f"{name}: parent {error:.2g}")
    assert error < 1e-4
    (traced,) = run_transformers(str(HF_PYTHON), [parent], [tokens], trace=True)  # where a difference begins
    scale, behind = reader.model.get("logits_scaling") or 1.0, plain_trace(megatron, tokens)
    assert len(behind) == len(traced.hidden) == arch.num_layers
    for layer, (mine, hidden) in enumerate(zip(behind, traced.hidden, strict=True)):
        assert float((mine - hidden / scale).abs().max() / mine.abs().max()) < 1e-4, layer

    write_torch_dist(tmp_path / "weights", lazy_tensors(reader), ParamLayout(arch))
    manifest = family(parent)
    nested = write_nested(tmp_path / "nested", TorchDistReader(tmp_path / "weights"), manifest, tokenizer=TOKENIZER)
    children = extract_all(nested, tmp_path / "hf", format="hf")
    before, after = SafetensorsReader(parent), SafetensorsReader(children["full"])
    assert set(before.names()) == set(after.names())
    for tensor in before.names():
        x, y = before.read(tensor), after.read(tensor)
        assert x.dtype == y.dtype and torch.equal(x.view(-1).view(torch.uint8), y.view(-1).view(torch.uint8)), tensor

    check = verify_parent(load_config(None, [f"parent.path={parent}"]).config, batches(2048), str(HF_PYTHON))
    assert check.ok and abs(check.loss - check.loss_transformers) < 1e-5, check
    run = load_config("tiny_parent.yaml", ["train.val_samples=4"]).config
    checks = verify(nested, children, run, batches(arch.vocab_size), format="hf", python=str(HF_PYTHON))
    assert len(checks) == 4 and len({check.numel for check in checks}) == 3  # what is filled up is as large as `large`
    for check in checks:
        print(f"{name}: {check.budget} {check.comparison.relative:.2g}")
        assert check.ok and check.difference is None and check.comparison.relative < 1e-4, check
