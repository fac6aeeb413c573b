"""`verify`: what it passes, what it notices, and that it names the first layer that differs.

Children of a random family, changed by hand in their tensors, bytes and configuration.
"""

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoint_family import MODEL, TOKENIZER, manifest, random_weights, write_hf_parent
from safetensors.torch import load_file, save_file
from worker_pool import WorkerPool

from nemo_elastic.cli.main import main
from nemo_elastic.config import load_config
from nemo_elastic.config.load import plain
from nemo_elastic.cost.counts import parameters
from nemo_elastic.kinds import Kind
from nemo_elastic.nemo.export.checkpoints import extract, extract_all, write_nested
from nemo_elastic.problems import ProblemsError

HF_PYTHON = Path(__file__).parent.parent / ".venv-hf" / "bin" / "python"
needs_transformers = pytest.mark.skipif(not HF_PYTHON.is_file(), reason="make setup-hf makes the venv")
CONFIG = load_config("tiny_parent.yaml", ["train.val_samples=4"]).config
FAMILY = replace(manifest(), provenance={"config": plain(CONFIG)})
PATTERN = MODEL["hybrid_override_pattern"]
pytestmark = pytest.mark.usefixtures("one_rank")


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Two batches of any tokens."""
    tokens = torch.randint(0, MODEL["vocab_size"], (4, 25), generator=torch.Generator().manual_seed(2))
    return [(rows[:, :-1], rows[:, 1:]) for rows in tokens.split(2)]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A nested checkpoint, its NeMo children in `children`, its Hugging Face children in `hf`."""
    out = tmp_path_factory.mktemp("run")
    nested = write_nested(out / "nested", random_weights(), FAMILY, tokenizer=TOKENIZER)
    extract_all(nested, out / "children")
    extract_all(nested, out / "hf", format="hf")
    return out


def checks(family: Path, folder: Path | None = None, *names: str, **how: object) -> list:
    """Verify the children `names` (or one changed `folder` of budget small)."""
    from nemo_elastic.nemo.export.verify import verify

    base = family / ("hf" if how.get("format") == "hf" else "children")
    children = {"small": folder} if folder else {n: base / n for n in names or FAMILY.subnets}
    return verify(family / "nested", children, how.pop("run", CONFIG), batches(), **how)


def changed(child: Path, name: str, target: Path, by: float = 1e-7) -> Path:
    """A copy of a NeMo child with one value of one tensor moved."""
    from nemo_elastic.checkpoint.extract import child_layout
    from nemo_elastic.checkpoint.reader import MemoryReader, lazy_tensors
    from nemo_elastic.mcore.checkpoint.dist_checkpoint import TorchDistReader
    from nemo_elastic.mcore.checkpoint.dist_save import write_torch_dist

    with TorchDistReader(child) as reader:
        weights = {n: reader.read(n) for n in reader.names()}
    weights[name].view(-1)[3] += by
    shutil.copytree(child / "context", target / "context")
    layout = child_layout(FAMILY.layout, FAMILY.subnet("small"))
    write_torch_dist(target / "weights", lazy_tensors(MemoryReader(weights)), layout)
    return target


def test_nemo_children_are_the_nested_subnets(family: Path) -> None:
    for check in checks(family):
        assert check.ok and check.difference is None, check
        assert check.comparison.relative < 1e-5 and check.comparison.top1_agreement == 1.0
        assert abs(check.comparison.kl) < 1e-9 and abs(check.loss_nested - check.loss_child) < 1e-6
        assert check.numel == check.parameters == parameters(FAMILY.layout, FAMILY.subnet(check.budget))
    assert [c.nested_in for c in checks(family, None, "small", "full")] == [("full", "large"), ()]


def test_weights_are_judged_not_kernels(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With Transformer Engine installed both sides still have Megatron's linears, and products are not TF32."""
    from nemo_elastic.mcore.elastic import spec
    from nemo_elastic.mcore.kernels import layer_specs
    from nemo_elastic.mcore.kernels.kind_modules import module_of
    from nemo_elastic.nemo.export import verify

    def refuse(*layers: object) -> None:
        raise AssertionError("a stack of Transformer Engine was asked for")

    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        monkeypatch.setenv(name, "1")
    for module in (layer_specs, spec):
        monkeypatch.setattr(module, "have_transformer_engine", lambda: True)
    monkeypatch.setattr(layer_specs, "transformer_engine_stack_spec", refuse)

    def local_alone(kind: Kind) -> SimpleNamespace:
        layer = module_of(kind).elastic_layer
        return SimpleNamespace(elastic_layer=lambda *, transformer_engine: refuse() if transformer_engine else layer())

    monkeypatch.setattr(spec, "module_of", local_alone)
    seen, logits = [], verify.whole_logits
    monkeypatch.setattr(
        verify, "whole_logits", lambda *a: seen.append(torch.get_float32_matmul_precision()) or logits(*a)
    )
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        (check,) = checks(family, None, "small")
        assert torch.get_float32_matmul_precision() == "high"  # as it was
    finally:
        torch.set_float32_matmul_precision(before)
    assert check.ok and seen == ["highest"] * 4


def test_two_processes_run_the_nested_side_split(family: Path, pool2: WorkerPool) -> None:
    import pool_checkpoint

    children = {name: str(family / "children" / name) for name in FAMILY.subnets}
    alone = checks(family)
    for rank in pool2.run(pool_checkpoint.verified, str(family / "nested"), children, batches(), 2):
        for ours, theirs in zip(alone, rank, strict=True):
            assert theirs["ok"] and theirs["budget"] == ours.budget
            assert abs(theirs["loss_nested"] - ours.loss_nested) < 1e-5


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("embedding.word_embeddings.weight", r"^embedding\.word_embeddings\.weight: 1 of 65536 values differ"),
        (
            "decoder.layers.4.mixer.in_proj.weight",
            r"^decoder\.layers\.4\.mixer\.in_proj\.weight \(layer 4 of the child, mamba, layer 5 of the parent\): 1 of",
        ),
    ],
)
def test_one_value_in_its_last_digits_is_named(family: Path, tmp_path: Path, name: str, words: str) -> None:
    (check,) = checks(family, changed(family / "children" / "small", name, tmp_path / "child"))
    assert not check.ok and check.same_logits  # the logits would have let it pass
    assert re.search(words, check.difference), check.difference


def test_flipped_byte_of_a_nemo_child_is_named(family: Path, tmp_path: Path) -> None:
    from nemo_elastic.mcore.checkpoint.preflight import read_metadata

    child = Path(shutil.copytree(family / "children" / "small", tmp_path / "child"))
    (chunk,) = read_metadata(child / "weights").tensors["module.decoder.layers.1.mlp.linear_fc2.weight"].chunks
    data = bytearray((child / "weights" / chunk.file).read_bytes())
    data[chunk.start + chunk.length // 2] ^= 4
    (child / "weights" / chunk.file).write_bytes(data)
    (check,) = checks(family, child)
    assert not check.ok and check.to_dict()["max_abs"] is None and json.dumps(check.to_dict(), allow_nan=False)
    assert re.search(r"linear_fc2\.weight \(layer 1 of the child, mlp.*a byte has changed", check.difference)


def test_another_configuration_is_named(family: Path, tmp_path: Path) -> None:
    child = Path(shutil.copytree(family / "children" / "small", tmp_path / "child"))
    yaml = child / "context" / "model.yaml"
    text = yaml.read_text()
    assert "layernorm_epsilon: 1.0e-05" in text
    yaml.write_text(text.replace("layernorm_epsilon: 1.0e-05", "layernorm_epsilon: 1.0e-03"))
    (check,) = checks(family, child)
    assert check.difference == "configuration: layernorm_epsilon is 0.001, the nested subnet has 1e-05"
    assert not check.same_logits  # and it was run as its folder says


def test_another_child_is_bad_input(family: Path, tmp_path: Path) -> None:
    with pytest.raises(ProblemsError, match="has another shape"):
        checks(family, family / "children" / "large")
    with pytest.raises(ProblemsError, match="no child of format nemo here"):
        checks(family, family / "hf" / "small")
    with pytest.raises(ProblemsError, match=r"--hf-python: is not given, and this Python's is older"):
        checks(family, format="hf")
    with pytest.raises(ProblemsError, match="--hf-python: '/no/such/python' is no program"):
        checks(family, format="hf", python="/no/such/python")
    broken = tmp_path / "python"
    broken.write_bytes(b"no program of this machine")
    broken.chmod(0o755)
    for other in (shutil.which("false"), sys.executable, str(broken)):  # the second: its transformers is older
        with pytest.raises(ProblemsError, match="is no such Python; it must be one whose transformers"):
            checks(family, format="hf", python=other)


def test_the_loss_of_another_engine_counts_the_tokens_that_carry_loss() -> None:
    from nemo_elastic.nemo.export.verify import _loss

    generator = torch.Generator().manual_seed(2)
    logits = [torch.randn(2, 5, 7, generator=generator) for _ in range(2)]
    labels = [torch.randint(0, 7, (2, 5), generator=generator) for _ in range(2)]
    masks = [torch.tensor([[0, 1, 1, 0, 0], [0, 0, 1, 0, 0]]), torch.tensor([[1, 0, 0, 0, 0], [0, 0, 0, 0, 0]])]
    losses = [
        -torch.log_softmax(values[row, place].double(), -1)[wanted[row, place]].item()
        for values, wanted, mask in zip(logits, labels, masks, strict=True)
        for row, place in mask.nonzero().tolist()
    ]
    masked = [(torch.zeros(2, 5), wanted, mask.float()) for wanted, mask in zip(labels, masks, strict=True)]
    assert len(losses) == 4 and _loss(logits, masked) == pytest.approx(sum(losses) / 4, rel=1e-9)
    plain = [(torch.zeros(2, 5), wanted) for wanted in labels]
    whole = torch.stack([torch.log_softmax(v.double(), -1) for v in logits]).gather(-1, torch.stack(labels)[..., None])
    assert _loss(logits, plain) == pytest.approx(-whole.mean().item(), rel=1e-9)


def test_a_layer_that_computes_something_else_is_named() -> None:
    """Same tensors on paper, another function: found by hidden states."""
    from nemo_elastic.checkpoint.extract import child_architecture, child_tensors
    from nemo_elastic.checkpoint.reader import MemoryReader
    from nemo_elastic.mcore.models.build import build_elastic_model, build_plain_model, load_weights
    from nemo_elastic.nemo.export.first_difference import hidden_difference, nested_trace, plain_trace

    subnet, architecture = FAMILY.subnet("small"), FAMILY.space.architecture
    elastic = build_elastic_model(architecture, perform_initialization=False).eval()
    load_weights(elastic, random_weights(), architecture)
    own = child_architecture(architecture, subnet)
    child = build_plain_model(own, perform_initialization=False).eval()
    tensors = child_tensors(MemoryReader(random_weights()), FAMILY.layout, subnet)
    load_weights(child, {t.name: t.read() for t in tensors}, own)
    ours, tokens = nested_trace(elastic, batches()[0][0], subnet), batches()[0][0]
    assert len(ours) == 6
    words = hidden_difference(ours, plain_trace(child, tokens), subnet, PATTERN)
    assert words.startswith("output_layer: logits differ")
    with torch.no_grad():
        child.decoder.layers[3].self_attention.linear_proj.weight *= 1.01
    words = hidden_difference(ours, plain_trace(child, tokens), subnet, PATTERN)
    assert words.startswith(
        "decoder.layers.3 (layer 3 of the child, attention, layer 3 of the parent) output differs by"
    )


def verdict(capsys: pytest.CaptureFixture, *words: str) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of the verb."""
    code = main(["verify", *words])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_the_parent_may_have_moved(family: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """What verify reads travels in the nested checkpoint: the tokenizer, and which of its tokens ends a text."""
    nested = shutil.copytree(family / "nested", tmp_path / "nested")
    file = nested / "elastic" / "manifest.json"
    described = json.loads(file.read_text())
    described["provenance"]["config"]["parent"]["path"] = str(tmp_path / "gone")
    described["provenance"]["config"]["data"]["tokenizer"] = None
    file.write_text(json.dumps(described))
    code, out, _ = verdict(capsys, str(nested), str(family / "children" / "small"))
    assert code == 0 and "verification passed" in out
    shutil.rmtree(nested / "context" / "tokenizer")
    assert verdict(capsys, str(nested), str(family / "children" / "small"))[0] != 0


def test_the_verb_prints_every_check_and_leaves_with_0_or_1(
    family: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    nested = str(family / "nested")
    code, out, _ = verdict(capsys, nested)
    assert code == 0 and "verification passed" in out
    for words in ("max |diff|", "relative", "KL", "top-1", "numel", "cost", "SHA-256 as in the manifest"):
        assert words in out
    assert "small is nested in large" in out and "large is nested in full" in out and "small is nested in full" in out
    child = changed(family / "children" / "small", "decoder.final_norm.weight", tmp_path / "small")
    code, out, _ = verdict(capsys, nested, str(child))
    assert code == 1 and "DIFFERS" in out and "verification FAILED" in out
    assert "small: first difference: decoder.final_norm.weight: 1 of 32 values differ" in out
    code, out, _ = verdict(capsys, nested, str(child), "--json")
    answer = json.loads(out)
    assert code == 1 and answer["verified"] is False and len(answer["pairs"]) == 3
    assert answer["kernels"].startswith("Megatron's local linears and fp32 products on both sides")
    assert answer["children"][0]["first_difference"].startswith("decoder.final_norm.weight")
    assert answer["files_hashed"] == len(json.loads((family / "nested/elastic/manifest.json").read_text())["files"])
    spoilt = Path(shutil.copytree(family / "nested", tmp_path / "nested"))
    data = bytearray((spoilt / "weights" / "__0_0.distcp").read_bytes())
    data[len(data) // 2] ^= 1
    (spoilt / "weights" / "__0_0.distcp").write_bytes(data)
    code, out, err = verdict(capsys, str(spoilt), str(family / "children" / "small"))
    assert code == 1 and "__0_0.distcp: has SHA-256" in err
    assert verdict(capsys, nested, str(tmp_path))[0] == 2  # nothing to verify there


@pytest.mark.slow
@needs_transformers
def test_hf_children_are_the_nested_subnets(family: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    how = {"format": "hf", "python": str(HF_PYTHON)}
    for check in checks(family, **how):
        assert check.ok and check.format == "hf", check
        assert check.comparison.relative < 1e-4 and check.numel == parameters(
            FAMILY.layout, FAMILY.subnet(check.budget)
        )
    child = Path(shutil.copytree(family / "hf" / "small", tmp_path / "child"))
    weights = load_file(child / "model.safetensors")
    weights["backbone.layers.3.mixer.o_proj.weight"][0, 0] += 1e-7
    save_file(weights, child / "model.safetensors", metadata={"format": "pt"})
    (check,) = checks(family, child, **how)
    assert not check.ok and check.same_logits
    assert check.difference.startswith("decoder.layers.3.self_attention.linear_proj.weight (layer 3 of the child, att")
    (child / "model.safetensors").write_bytes((family / "hf" / "small" / "model.safetensors").read_bytes())
    config = json.loads((child / "config.json").read_text())
    (child / "config.json").write_text(json.dumps({**config, "time_step_min": 0.9}))
    (check,) = checks(family, child, **how)  # a field that nothing of ours reads: found by what the layers compute
    assert check.difference.startswith("decoder.layers.0 (layer 0 of the child, mamba, layer 0 of the parent) output")
    code, out, _ = verdict(capsys, str(family / "nested"), "--format", "hf", "--hf-python", str(HF_PYTHON))
    assert code == 0 and "verification passed" in out


@pytest.mark.slow
@needs_transformers
def test_hf_parent_of_strangers_has_the_logits_of_our_model(tmp_path: Path) -> None:
    """A folder that was not written by this package, in transformers and in Megatron."""
    from nemo_elastic.checkpoint.huggingface import HuggingFaceReader
    from nemo_elastic.mcore.models.build import build_plain_model, load_weights
    from nemo_elastic.mcore.models.evaluate import whole_logits
    from nemo_elastic.nemo.export.hf_side import run_transformers

    folder = write_hf_parent(tmp_path / "parent", random_weights(seed=8))
    (side,) = run_transformers(str(HF_PYTHON), [folder], [batches()[0][0]])
    model = build_plain_model(FAMILY.space.architecture, perform_initialization=False)
    load_weights(model, HuggingFaceReader(folder), FAMILY.space.architecture)
    wanted = whole_logits(model, batches()[0][0])
    assert (side.logits[0] - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert side.parameters == sum(w.numel() for w in random_weights().values())


@pytest.mark.slow
@needs_transformers
def test_padded_hf_child_is_the_nested_subnet(tmp_path: Path) -> None:
    sizes = {"ffn_hidden_size": [80, 40, 56], "num_attention_heads": [12, 4], "hidden_size": 40}
    varied = replace(FAMILY, subnets={**FAMILY.subnets, "varied": FAMILY.space.subnet(**sizes)})
    nested = write_nested(tmp_path / "nested", random_weights(), varied, tokenizer=TOKENIZER)
    extract(nested, "varied", tmp_path / "hf" / "varied", format="hf")
    (check,) = checks(tmp_path, None, "varied", format="hf", python=str(HF_PYTHON))
    assert check.ok and check.numel > parameters(varied.layout, varied.subnet("varied"))


@pytest.mark.slow
@needs_transformers
def test_folder_with_a_pickle_is_not_loaded(family: Path, tmp_path: Path) -> None:
    """A folder whose weights are a pickle: refused on both sides, and the pickle is not run."""
    from nemo_elastic.nemo.export.hf_side import run_transformers

    child = Path(shutil.copytree(family / "hf" / "small", tmp_path / "child"))
    (child / "model.safetensors").unlink()
    (child / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "boom").encode() + b"'\ntR.")
    with pytest.raises(ProblemsError, match=r"has neither model\.safetensors"):
        checks(family, child, format="hf", python=str(HF_PYTHON))
    with pytest.raises(ProblemsError, match=r"--hf-python: .* could not run"):
        run_transformers(str(HF_PYTHON), [child], [batches()[0][0]])
    assert not (tmp_path / "boom").exists()


def test_what_was_verified_is_written_down(family: Path, tmp_path: Path) -> None:
    from nemo_elastic.nemo.export.results import note_verified

    found, nested = {check.budget: check for check in checks(family)}, family / "nested"
    first = json.loads(note_verified(tmp_path, CONFIG, nested, [found["small"]]).read_text())
    assert [row["name"] for row in first["budgets"]] == ["small"]
    assert first["verified"] is None  # the others are not verified yet
    first["budgets"][0]["heldout_before"], first["seconds"] = 4.5, {"train": 3.0}
    (tmp_path / "results.json").write_text(json.dumps(first))
    whole = json.loads(note_verified(tmp_path, CONFIG, nested, list(found.values())).read_text())
    assert [row["name"] for row in whole["budgets"]] == list(FAMILY.subnets) and whole["verified"] is True
    assert {row["name"]: row["heldout_before"] for row in whole["budgets"]} == {
        "full": None,
        "large": None,
        "small": 4.5,
    }
    assert whole["seconds"] == {"train": 3.0} and whole["parent"]["parameters"] == whole["budgets"][0]["parameters"]
    bad = replace(found["large"], difference="a tensor")
    assert json.loads(note_verified(tmp_path, CONFIG, nested, [bad]).read_text())["verified"] is False
    (tmp_path / "results.json").write_text(json.dumps(whole | {"nested": "of another training"}))
    again = json.loads(note_verified(tmp_path, CONFIG, nested, [found["full"]]).read_text())
    assert [row["name"] for row in again["budgets"]] == ["full"]
