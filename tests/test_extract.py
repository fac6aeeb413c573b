"""A child read out of a nested checkpoint equals one cut by hand, in every format; what a format cannot say is refused.

The hand-made cut below indexes z, x, B, C, dt, heads and groups itself, and shares no code with the package's.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_family import MODEL, TOKENIZER, manifest, random_weights
from safetensors import safe_open

from nemo_elastic.checkpoint.extract import child_tensors, per_layer_dims
from nemo_elastic.checkpoint.reader import MemoryReader
from nemo_elastic.checkpoint.safetensors_reader import SafetensorsReader
from nemo_elastic.cost.counts import parameters
from nemo_elastic.nemo.export.checkpoints import describe_parent, extract, extract_all, open_nested, write_nested
from nemo_elastic.problems import ProblemsError

H, M, P, G, N = (
    MODEL[n] for n in ("hidden_size", "mamba_num_heads", "mamba_head_dim", "mamba_num_groups", "mamba_state_dim")
)


def by_hand(weights: dict[str, torch.Tensor], h: int, f: int, m: int, p: int, q: int, layers: list[int]) -> dict:
    """A uniform child by explicit index lists."""
    kinds, kv, d = MODEL["hybrid_override_pattern"], MODEL["num_query_groups"], MODEL["kv_channels"]
    per_head, per_query = M // G, MODEL["num_attention_heads"] // kv
    heads = [g * per_head + i for g in range(G) for i in range(m // G)]
    channels = [head * P + c for head in heads for c in range(p)]
    x_end = M * P
    bc = list(range(2 * x_end, 2 * x_end + 2 * G * N))
    in_rows = channels + [x_end + c for c in channels] + bc + [2 * x_end + 2 * G * N + head for head in heads]
    conv_rows = channels + list(range(x_end, x_end + 2 * G * N))
    qkv, queries = [], []
    for group in range(kv):
        start = group * (per_query + 2)
        units = [start + i for i in range(q // kv)] + [start + per_query, start + per_query + 1]
        qkv += [u * d + c for u in units for c in range(d)]
        queries += [(group * per_query + i) * d + c for i in range(q // kv) for c in range(d)]
    neurons = [g * (MODEL["ffn_hidden_size"] // 8) + i for g in range(8) for i in range(f // 8)]
    rows = {
        "mixer.in_proj.weight": in_rows,
        "mixer.conv1d.weight": conv_rows,
        "mixer.conv1d.bias": conv_rows,
        "mixer.dt_bias": heads,
        "mixer.A_log": heads,
        "mixer.D": heads,
        "mixer.norm.weight": channels,
        "self_attention.linear_qkv.weight": qkv,
        "mlp.linear_fc1.weight": neurons,
    }
    columns = {
        "mixer.out_proj.weight": channels,
        "self_attention.linear_proj.weight": queries,
        "mlp.linear_fc2.weight": neurons,
    }
    child = {
        "embedding.word_embeddings.weight": weights["embedding.word_embeddings.weight"][:, :h],
        "decoder.final_norm.weight": weights["decoder.final_norm.weight"][:h],
        "output_layer.weight": weights["output_layer.weight"][:, :h],
    }
    for new, old in enumerate(layers):
        for name, value in weights.items():
            if not name.startswith(f"decoder.layers.{old}."):
                continue
            suffix = name.split(".", 3)[3]
            if suffix in rows:
                value = value[rows[suffix]]
                value = value[:, :h] if value.dim() == 2 else value
            elif suffix in columns:
                value = value[:h][:, columns[suffix]]
            else:
                value = value[:h]
            child[f"decoder.layers.{new}.{suffix}"] = value
    assert kinds
    return child


HAND = {
    "full": {"h": 48, "f": 80, "m": 12, "p": 8, "q": 12, "layers": [0, 1, 2, 3, 4, 5, 6, 7]},
    "large": {"h": 40, "f": 56, "m": 8, "p": 8, "q": 8, "layers": [0, 1, 2, 3, 4, 5, 6, 7]},
    "small": {"h": 32, "f": 40, "m": 8, "p": 6, "q": 4, "layers": [0, 1, 2, 3, 5, 7]},
}


@pytest.fixture(scope="module")
def nested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The family's nested checkpoint."""
    out = tmp_path_factory.mktemp("family") / "nested"
    extras = {"permutations": {"hidden_size": torch.randperm(H)}, "router": {"net.0.weight": torch.randn(3, 4)}}
    return write_nested(out, random_weights(), manifest(), tokenizer=TOKENIZER, **extras)


@pytest.mark.parametrize("budget", ["full", "large", "small"])
def test_child_is_the_hand_made_cut(budget: str) -> None:
    weights, family = random_weights(), manifest()
    expected = by_hand(weights, **HAND[budget])
    subnet = family.subnet(budget)
    got = {t.name: (t, t.read()) for t in child_tensors(MemoryReader(weights), family.layout, subnet)}
    assert got.keys() == expected.keys()
    for name, (lazy, value) in got.items():
        assert torch.equal(value, expected[name]), name
        assert lazy.shape == tuple(value.shape) and value.is_contiguous()
    assert sum(v.numel() for _, v in got.values()) == parameters(family.layout, subnet)


@pytest.mark.parametrize("budget", ["full", "large", "small"])
def test_nemo_child_is_the_hand_made_cut_in_a_plain_checkpoint(nested: Path, tmp_path: Path, budget: str) -> None:
    from nemo_elastic.mcore.checkpoint.dist_checkpoint import TorchDistReader

    child = extract(nested, budget, tmp_path / "child")
    expected = by_hand(random_weights(), **HAND[budget])
    reader = TorchDistReader(child)
    assert set(reader.names()) == set(expected)
    assert all(torch.equal(reader.read(name), value) for name, value in expected.items())
    sizes = HAND[budget]
    model = describe_parent(str(child)).model
    pattern = "".join(MODEL["hybrid_override_pattern"][i] for i in sizes["layers"])
    wanted = {
        "hybrid_override_pattern": pattern,
        "hidden_size": sizes["h"],
        "ffn_hidden_size": sizes["f"],
        "mamba_num_heads": sizes["m"],
        "mamba_head_dim": sizes["p"],
        "num_attention_heads": sizes["q"],
        "num_query_groups": 4,
        "kv_channels": 8,  # not hidden_size / heads, as NeMo would assume
        "vocab_size": 2048,
        "layernorm_epsilon": 1e-5,
    }
    assert {name: model[name] for name in wanted} == wanted
    text = (child / "context" / "io.json").read_text() + (child / "context" / "model.yaml").read_text()
    assert "nemo_elastic" not in text
    assert (child / "context" / "tokenizer" / "tokenizer.json").read_bytes() == TOKENIZER.read_bytes()


def test_plain_nemo_rebuilds_model_and_tokenizer_from_the_context(nested: Path, tmp_path: Path) -> None:
    from nemo.collections import llm
    from nemo.lightning import io

    child = extract(nested, "small", tmp_path / "child")
    model = io.load_context(child / "context", subpath="model")
    assert type(model) is llm.MambaModel and type(model.config) is llm.SSMConfig
    assert model.config.num_layers == 6 and model.config.kv_channels == 8
    assert model.tokenizer.text_to_ids("def f(x):") and model.tokenizer.vocab_size == 2048
    for tp in (1, 2, 4, 8):  # the padded vocabulary is the embedding's in every layout
        step = model.config.make_vocab_size_divisible_by * tp
        assert -(-model.tokenizer.vocab_size // step) * step == 2048


@pytest.mark.parametrize("budget", ["large", "small"])
def test_hf_child_holds_the_hand_made_cut(nested: Path, tmp_path: Path, budget: str) -> None:
    child = extract(nested, budget, tmp_path / "child", format="hf")
    expected, sizes = by_hand(random_weights(), **HAND[budget]), HAND[budget]
    with safe_open(child / "model.safetensors", "pt") as file:  # the library's own reader
        got = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    q, d = sizes["q"] // 4, 8
    attention = [i for i, layer in enumerate(sizes["layers"]) if MODEL["hybrid_override_pattern"][layer] == "*"]
    for layer in attention:
        rows = expected[f"decoder.layers.{layer}.self_attention.linear_qkv.weight"].view(4, q + 2, d, -1)
        prefix = f"backbone.layers.{layer}.mixer"
        assert torch.equal(got[f"{prefix}.q_proj.weight"], rows[:, :q].flatten(0, 2))
        assert torch.equal(got[f"{prefix}.k_proj.weight"], rows[:, q].flatten(0, 1))
        assert torch.equal(got[f"{prefix}.v_proj.weight"], rows[:, q + 1].flatten(0, 1))
    assert torch.equal(got["backbone.embeddings.weight"], expected["embedding.word_embeddings.weight"])
    assert torch.equal(got["lm_head.weight"], expected["output_layer.weight"])
    assert sum(v.numel() for v in got.values()) == sum(v.numel() for v in expected.values())
    config = json.loads((child / "config.json").read_text())
    pattern = "".join(MODEL["hybrid_override_pattern"][i] for i in sizes["layers"])
    assert config["hybrid_override_pattern"] == pattern and config["num_hidden_layers"] == len(pattern)
    assert len(config["layers_block_type"]) == len(pattern) and config["head_dim"] == 8
    assert config["eos_token_id"] == 0 and config["pad_token_id"] == 1
    assert f"{sum(v.numel() for v in got.values()):,}" in (child / "README.md").read_text()


def test_all_budgets_and_nothing_is_overwritten(nested: Path, tmp_path: Path) -> None:
    found = extract_all(nested, tmp_path / "children", format="hf")
    assert set(found) == {"full", "large", "small"}
    before = (tmp_path / "children" / "small" / "model.safetensors").read_bytes()
    with pytest.raises(ProblemsError, match="add --force") as error:
        extract_all(nested, tmp_path / "children", format="hf", dtype=torch.bfloat16)
    assert len(error.value.problems) == 3
    assert (tmp_path / "children" / "small" / "model.safetensors").read_bytes() == before
    extract(nested, "small", tmp_path / "children" / "small", format="hf", dtype=torch.bfloat16, force=True)
    reader = SafetensorsReader(tmp_path / "children" / "small")
    assert {reader.dtype(name) for name in reader.names()} == {torch.bfloat16}
    assert not [p for p in (tmp_path / "children").iterdir() if p.name.startswith(".")]


def test_nested_carries_router_permutations_and_hashes(nested: Path) -> None:
    opened = open_nested(nested)
    assert set(opened.router()) == {"net.0.weight"} and sorted(opened.permutations()["hidden_size"]) == list(range(H))
    names = {p.relative_to(nested).as_posix() for p in nested.rglob("*") if p.is_file()} - {"elastic/manifest.json"}
    assert set(opened.manifest.files) == names


def test_plain_nemo_builds_the_parent_from_the_nested_checkpoint(nested: Path) -> None:
    from nemo.collections import llm
    from nemo.lightning import io

    model = io.load_context(nested / "context", subpath="model")
    assert type(model) is llm.MambaModel and model.config.num_layers == 8 and model.config.hidden_size == H
    assert "nemo_elastic" not in (nested / "context" / "io.json").read_text()


def size_of(folder: Path) -> int:
    """Bytes of all files."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def test_nested_is_under_a_thousandth_larger_than_parent_and_router(tmp_path: Path) -> None:
    """The parent: its own NeMo checkpoint. Orders of every unit of every layer are in the nested one."""
    wide = {
        "hidden_size": 1024,
        "ffn_hidden_size": 4096,
        "mamba_num_heads": 32,
        "mamba_head_dim": 64,
        "num_attention_heads": 32,
        "vocab_size": 8192,
    }
    family = manifest({**MODEL, **wide})
    dims = family.space.dims
    dims = {**dims, "hidden_size": replace(dims["hidden_size"], full=1024, choices=(512, 1024))}
    family = replace(family, space=replace(family.space, dims=dims))
    subnet = family.space.full_subnet()
    family = replace(family, subnets={"full": subnet}, budgets={"full": family.budgets["full"]})
    weights = {n: torch.zeros(s.shape({}), dtype=torch.bfloat16) for n, s in family.layout.table.items()}
    orders = {f"{layer}.{kind}": torch.randperm(4096) for layer in range(3) for kind in ("ffn_hidden_size", "x")}
    router = {"net.0.weight": torch.zeros(128, 128)}
    nested = write_nested(tmp_path / "nested", weights, family, tokenizer=TOKENIZER, permutations=orders, router=router)
    parent = size_of(extract(nested, "full", tmp_path / "parent"))
    assert parent > 100e6
    routers = (nested / "elastic" / "router.safetensors").stat().st_size
    assert size_of(nested) - routers - parent < 1e-3 * parent
    opened = open_nested(nested)
    assert all(torch.equal(opened.permutations()[name], order) for name, order in orders.items())


@pytest.mark.parametrize("schema", ["uniform", "list", "per_layer_config"])
def test_the_verb_takes_every_schema(tmp_path: Path, capsys: pytest.CaptureFixture, schema: str) -> None:
    from nemo_elastic.cli.main import main

    family = manifest()
    varied = family.space.subnet(ffn_hidden_size=[80, 40, 56])
    family = replace(family, subnets={"varied": varied}, budgets={})
    nested = write_nested(tmp_path / "nested", random_weights(), family, tokenizer=TOKENIZER)
    out = tmp_path / "out"
    words = ["extract", str(nested), "--all", "--out", str(out), "--format", "hf", "--hf-schema", schema, "--json"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["children"] == {"varied": str(out / "varied")}
    config = json.loads((out / "varied" / "config.json").read_text())
    said = {"uniform": (80, None), "list": ([80, 40, 56], None)}
    per_layer = {str(n): {"intermediate_size": size} for n, size in ((1, 80), (4, 40), (7, 56))}
    wanted = said.get(schema, (80, per_layer))
    assert (config["intermediate_size"], config.get("per_layer_config")) == wanted
    stored = SafetensorsReader(out / "varied")
    rows = [stored.shape(f"backbone.layers.{n}.mixer.up_proj.weight")[0] for n in (1, 4, 7)]
    assert rows == ([80, 80, 80] if schema == "uniform" else [80, 40, 56])


def test_per_layer_widths_are_refused_by_plain_nemo(tmp_path: Path) -> None:
    family = manifest()
    space = family.space
    varied = space.subnet(ffn_hidden_size=[80, 40, 40], num_attention_heads=[12, 4])
    assert per_layer_dims(space.architecture, varied) == {
        "ffn_hidden_size": (80, 40, 40),
        "num_attention_heads": (12, 4),
    }
    changed = replace(family, subnets={**family.subnets, "varied": varied})
    nested = write_nested(tmp_path / "nested", random_weights(), changed, tokenizer=TOKENIZER)
    with pytest.raises(ProblemsError) as error:
        extract(nested, "varied", tmp_path / "child")
    assert [p.key for p in error.value.problems] == [
        "elastic.dims.ffn_hidden_size.per_layer",
        "elastic.dims.num_attention_heads.per_layer",
    ]
    assert "80, 40, 40" in str(error.value) and not (tmp_path / "child").exists()
    # Widths that differ only in dropped layers are no obstacle.
    thin = replace(changed, subnets={"thin": space.subnet(ffn_hidden_size=[40, 40, 80], layers=[0, 1, 2, 3])})
    shutil.rmtree(nested)
    nested = write_nested(nested, random_weights(), replace(thin, budgets={}), tokenizer=TOKENIZER)
    assert describe_parent(str(extract(nested, "thin", tmp_path / "child"))).model["ffn_hidden_size"] == 40


def test_unknown_budget_and_format(nested: Path, tmp_path: Path) -> None:
    with pytest.raises(ProblemsError, match="did you mean 'small'"):
        extract(nested, "smal", tmp_path / "child")
    with pytest.raises(ProblemsError, match="--format"):
        extract(nested, "small", tmp_path / "child", format="ggml")


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    weights = random_weights()
    weights["decoder.final_norm.weight"] = torch.ones(40)
    del weights["output_layer.weight"]
    with pytest.raises(ProblemsError) as error:
        write_nested(tmp_path / "nested", weights, manifest())
    assert "lacks output_layer.weight" in str(error.value) and "is [40], model says [48]" in str(error.value)
    assert list(tmp_path.iterdir()) == []
