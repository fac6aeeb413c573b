"""A nested Hugging Face folder and the script that travels with it.

from_nested.py FOLDER --budget NAME --out DIR  ==  extract --budget NAME --format hf      every file, byte by byte
"""

import ast
import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from checkpoint_family import MODEL, TOKENIZER, manifest, random_weights

from nemo_elastic.checkpoint import hf_nested, writer
from nemo_elastic.checkpoint.hf_nested import SCRIPT
from nemo_elastic.checkpoint.manifest import Manifest
from nemo_elastic.cli.main import main
from nemo_elastic.nemo.export.checkpoints import extract
from nemo_elastic.nemo.export.hf_nested import extract_hf_nested
from nemo_elastic.nemo.export.nested import Nested, open_nested, write_nested
from nemo_elastic.problems import ProblemsError

HF_PYTHON = Path(__file__).parent.parent / ".venv-hf" / "bin" / "python"
ALONE = {"torch", "safetensors", "transformers"}


def family(model: dict = MODEL) -> Manifest:
    """full, large and small; `few`, whose layers differ in neurons and query heads; `odd`, in Mamba heads too."""
    found = manifest(model)
    sizes = {"hidden_size": 40, "ffn_hidden_size": [80, 40, 56], "num_attention_heads": [4, 12], "mamba_head_dim": 6}
    few = found.space.subnet(**sizes, mamba_num_heads=8, layers=[0, 1, 2, 3, 4, 6, 7])
    odd = found.space.subnet(**sizes, mamba_num_heads=[8, 12, 4], layers=[0, 1, 2, 3, 4, 6, 7])
    return replace(found, subnets={**found.subnets, "few": few, "odd": odd})


@pytest.fixture(scope="module")
def nested(tmp_path_factory: pytest.TempPathFactory) -> Nested:
    """On disk."""
    return open_nested(
        write_nested(tmp_path_factory.mktemp("f") / "nested", random_weights(), family(), tokenizer=TOKENIZER)
    )


def only(nested: Nested, *names: str) -> Nested:
    """With these budgets."""
    subnets = {name: nested.manifest.subnets[name] for name in names}
    return replace(nested, manifest=replace(nested.manifest, subnets=subnets))


def script_of(folder: Path) -> ModuleType:
    """The folder's own script."""
    spec = importlib.util.spec_from_file_location("from_nested", folder / "from_nested.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def contents(folder: Path) -> dict[str, bytes]:
    """Every file."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("budgets", "how"),
    [
        (("full", "large", "small", "few"), {}),
        (("small", "few"), {"dtype": torch.bfloat16}),
        (("few",), {"hf_schema": "list"}),
        (("small", "few", "odd"), {"hf_schema": "per_layer_config"}),
    ],
)
def test_the_script_cuts_what_extract_cuts(nested: Nested, tmp_path: Path, budgets: tuple[str, ...], how: dict) -> None:
    if how.get("hf_schema") == "list":  # which has no word for query heads
        ffn = replace(nested.manifest.subnets["few"], num_attention_heads=(4, 4))
        nested = replace(nested, manifest=replace(nested.manifest, subnets={"few": ffn}))
    opened = only(nested, *budgets)
    folder = extract_hf_nested(opened, tmp_path / "hf", **how)
    script = script_of(folder)
    for budget in budgets:
        own = script.save_budget(folder, budget, tmp_path / "cut" / budget)
        wanted = contents(extract(opened, budget, tmp_path / "extracted" / budget, format="hf", **how))
        assert contents(own) == wanted and {"model.safetensors", "tokenizer.json"} < set(wanted)


def test_in_shards_too(nested: Nested, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(writer.write_safetensors.__kwdefaults__, "shard_bytes", 100_000)
    for function in (hf_nested.write_hf_folder, hf_nested.write_hf_nested):
        monkeypatch.setitem(function.__kwdefaults__, "shard_bytes", 100_000)
    folder = extract_hf_nested(nested_of(nested), tmp_path / "hf")
    assert len(list(folder.glob("model-*.safetensors"))) > 5
    script = script_of(folder)
    monkeypatch.setattr(script, "SHARD_BYTES", 100_000)
    wanted = contents(extract(nested, "large", tmp_path / "extracted", format="hf"))
    assert contents(script.save_budget(folder, "large", tmp_path / "cut")) == wanted
    assert len([name for name in wanted if name.endswith(".safetensors")]) > 3


def nested_of(nested: Nested) -> Nested:
    """What the uniform schema can say."""
    return only(nested, "full", "large", "small", "few")


def test_a_tied_parent(tmp_path: Path) -> None:
    model = {**MODEL, "share_embeddings_and_output_weights": True}
    opened = open_nested(write_nested(tmp_path / "nested", random_weights(model), manifest(model), tokenizer=TOKENIZER))
    folder = extract_hf_nested(opened, tmp_path / "hf")
    own = script_of(folder).save_budget(folder, "small", tmp_path / "cut")
    assert contents(own) == contents(extract(opened, "small", tmp_path / "extracted", format="hf"))
    assert "lm_head.weight" not in json.loads((folder / "elastic.json").read_text())["tensors"]


def test_the_folder_is_the_parent_and_says_what_is_in_it(nested: Nested, tmp_path: Path) -> None:
    opened = only(nested, "full", "large", "small")
    folder = extract_hf_nested(opened, tmp_path / "hf")
    whole = contents(extract(opened, "full", tmp_path / "extracted", format="hf"))
    mine = contents(folder)
    assert all(mine[name] == whole[name] for name in whole if name != "README.md")
    assert set(mine) - set(whole) == {"elastic.json", "from_nested.py"}
    assert mine["from_nested.py"] == SCRIPT.read_bytes()
    said, manifest = json.loads(mine["elastic.json"]), opened.manifest.to_dict()
    assert {k: said[k] for k in ("space", "subnets", "parameters")} == {
        k: manifest[k] for k in ("space", "subnets", "parameters")
    }
    assert (said["format"], said["version"]) == (script_of(folder).FORMAT, script_of(folder).VERSION)
    assert "| small |" in mine["README.md"].decode()


def test_the_script_needs_three_packages_only() -> None:
    tree = ast.parse(SCRIPT.read_text(encoding="utf-8"))
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}
    assert not any(isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(tree))
    assert {name.split(".")[0] for name in modules} - sys.stdlib_module_names == ALONE


def test_what_the_script_cannot_do_it_says(nested: Nested, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = extract_hf_nested(only(nested, "small", "odd"), tmp_path / "hf", hf_schema="per_layer_config")
    script = script_of(folder)

    def said(*words: str) -> str:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["from_nested.py", *words])
            assert script.main() == 2
        return capsys.readouterr().err

    assert "'smal' is no budget of this family, which has small, odd" in said(
        str(folder), "--budget", "smal", "--out", str(tmp_path / "x")
    )
    assert "is there" in said(str(folder), "--budget", "small", "--out", str(folder))
    assert "has no elastic.json" in said(str(tmp_path))
    with pytest.raises(ValueError, match=r"'odd': layers of one kind differ in size \(.*mamba_num_heads"):
        script.from_nested(folder, "odd")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-1000])
    before = sorted(tmp_path.rglob("*"))
    assert "from_nested: " in said(str(folder), "--budget", "small", "--out", str(tmp_path / "x"))
    assert sorted(tmp_path.rglob("*")) == before
    elastic = json.loads((folder / "elastic.json").read_text())
    (folder / "elastic.json").write_text(json.dumps({**elastic, "version": 2}))
    assert "version 2 is not known here" in said(str(folder))


def test_a_family_that_cannot_be_said_is_refused_before_anything_is_written(nested: Nested, tmp_path: Path) -> None:
    with pytest.raises(ProblemsError, match=r"uniform cannot say mamba_num_heads per layer .*\(budget odd\)"):
        extract_hf_nested(nested, tmp_path / "hf")
    model = {**MODEL, "position_embedding_type": "rope"}
    other = replace(nested, manifest=replace(only(nested, "small").manifest, model=model))
    with pytest.raises(
        ProblemsError, match=r"model\.position_embedding_type: 'rope' cannot be said in Hugging Face's NemotronH"
    ):
        extract_hf_nested(other, tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


def test_the_verb(nested: Nested, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["extract", str(nested.path), "--nested", "--out", str(tmp_path / "hf")]
    assert main(words) == 2
    assert "--nested: writes a Hugging Face folder; add --format hf" in capsys.readouterr().err
    words += ["--format", "hf"]
    for flag in (["--all"], ["--budget", "small"]):
        assert main([*words, *flag]) == 2
        assert "--nested: holds every budget; leave --budget and --all out" in capsys.readouterr().err
    assert main(words) == 2
    assert "(budget odd)" in capsys.readouterr().err and not (tmp_path / "hf").exists()
    assert main([*words, "--hf-schema", "per_layer_config", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer == {"format": "hf", "nested": str(tmp_path / "hf"), "budgets": list(nested.manifest.subnets)}
    assert main([*words, "--hf-schema", "per_layer_config"]) == 2
    assert "exists" in capsys.readouterr().err
    assert main([*words, "--hf-schema", "per_layer_config", "--force", "--dtype", "bfloat16"]) == 0
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"


CHECK = """
import importlib.util, json, runpy, sys
folder, extracted = sys.argv[1:]
assert importlib.util.find_spec("nemo_elastic") is None and "" not in sys.path
import torch
from transformers import AutoModelForCausalLM
cut = runpy.run_path(folder + "/from_nested.py")
tokens = torch.arange(1, 41)[None] * 37 % 2048
parent, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
assert not any(loading.values()), loading
found = {"parent": [parent.num_parameters(), type(parent).__module__]}
for budget in json.load(open(folder + "/elastic.json"))["children"]:
    model = cut["from_nested"](folder, budget=budget)
    own = AutoModelForCausalLM.from_pretrained(extracted + "/" + budget)
    a, b = model.state_dict(), own.state_dict()
    assert list(a) == list(b) and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in b)
    assert model.config.to_dict() | {"_name_or_path": 0} == own.config.to_dict() | {"_name_or_path": 0}
    assert model.generation_config.to_dict() == own.generation_config.to_dict()
    with torch.no_grad():
        assert torch.equal(model.eval()(tokens).logits, own.eval()(tokens).logits)
        if budget == "full":
            assert torch.equal(parent.eval()(tokens).logits, own(tokens).logits)
    found[budget] = [model.num_parameters(), str(model.dtype)]
assert cut["from_nested"](folder).num_parameters() == found["parent"][0]
assert cut["from_nested"](folder, "small", dtype=torch.bfloat16).dtype == torch.bfloat16
assert not any(name.startswith(("nemo", "megatron")) for name in sys.modules)
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(not HF_PYTHON.is_file(), reason="make setup-hf makes the venv with transformers 5")
def test_transformers_loads_the_parent_and_every_budget_with_nothing_of_ours(nested: Nested, tmp_path: Path) -> None:
    opened = nested_of(nested)
    folder = extract_hf_nested(opened, tmp_path / "hf")
    for budget in opened.manifest.subnets:
        extract(opened, budget, tmp_path / "extracted" / budget, format="hf")
    command = [HF_PYTHON, "-I", "-c", CHECK, folder, tmp_path / "extracted"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    counts = opened.manifest.to_dict()["parameters"]
    assert found["parent"] == [counts["full"], "transformers.models.nemotron_h.modeling_nemotron_h"]
    assert [found[name] for name in ("large", "small")] == [[counts[n], "torch.float32"] for n in ("large", "small")]
    command = [HF_PYTHON, "-I", folder / "from_nested.py", "--budget", "small", "--out", tmp_path / "cut"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert contents(tmp_path / "cut") == contents(tmp_path / "extracted" / "small")
