"""GGUF children: what a file holds, what is refused, and that llama.cpp computes what the nested subnet computes.

log-probabilities(llama.cpp on the file) == log-probabilities(fp64 serving)      1e-4, fp32, trained and extreme weights
"""

import json
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from checkpoint_family import TOKENIZER, random_weights
from checkpoint_family import manifest as small_manifest
from trained_family import MODEL, WEIGHTS, manifest, text, weights

from nemo_elastic.checkpoint.gguf_file import GGUF_FILE, GgufFile, first_difference, write_gguf
from nemo_elastic.checkpoint.gguf_model import check_gguf
from nemo_elastic.checkpoint.gguf_tokenizer import PRE_TOKENIZERS, tokenizer_keys
from nemo_elastic.checkpoint.manifest import Manifest
from nemo_elastic.checkpoint.reader import LazyTensor
from nemo_elastic.checkpoint.tokenizer_files import write_tokenizer
from nemo_elastic.cli.main import main
from nemo_elastic.config import load_config
from nemo_elastic.config.load import plain
from nemo_elastic.nemo.export import gguf_check
from nemo_elastic.nemo.export.checkpoints import extract, extract_all, open_nested, write_nested
from nemo_elastic.nemo.export.gguf_check import check_children, open_gguf
from nemo_elastic.nemo.export.gguf_side import run_llama_cpp
from nemo_elastic.problems import ProblemsError
from nemo_elastic.serving import ElasticFamily

GGUF_PYTHON = Path(__file__).parent.parent / ".venv-gguf" / "bin" / "python"
needs_llama = pytest.mark.skipif(not GGUF_PYTHON.is_file(), reason="make setup-gguf makes the venv with llama.cpp")
TEXTS = [
    "def f(x):\n    return x[12345] + 3.14e10  # it's\t\tdon't\n\n\n",
    "  Größe 北京 １２３ Ⅷ½ naïve\r\n\r\nend   ",
    "HTTPServer fooBarBAZ x/y//z 'll 'LL \u00a0\u3000 ‘q’ \U0001f600!",
]
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def varied_manifest() -> Manifest:
    """The trained family, and a child whose MLP and attention layers differ."""
    found = manifest()
    sizes = {"ffn_hidden_size": [512, 256, 384, 128, 512, 64, 320], "num_attention_heads": [8, 16]}
    mlp = found.space.architecture.hybrid_override_pattern.count("-")
    sizes["ffn_hidden_size"] = (sizes["ffn_hidden_size"] * 2)[:mlp]
    varied = found.space.subnet(**sizes, hidden_size=112, layers=[*range(9), *range(10, 16)])
    return replace(found, subnets={**found.subnets, "varied": varied})


@pytest.fixture(scope="module")
def nested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small random family, on disk."""
    out = tmp_path_factory.mktemp("gguf")
    return write_nested(out / "nested", random_weights(), small_manifest(), tokenizer=TOKENIZER)


def test_file_holds_the_child_by_llama_cpps_names(nested: Path, tmp_path: Path) -> None:
    """Against the names of the `gguf` package and cuts made here by hand."""
    file = gguf.GGUFReader(extract(nested, "small", tmp_path / "small", format="gguf") / GGUF_FILE)
    tensors = {t.name: t for t in file.tensors}
    known = [gguf.TENSOR_NAMES[kind] for kind in gguf.MODEL_TENSORS[gguf.MODEL_ARCH.NEMOTRON_H]]
    subnet = small_manifest().subnet("small")
    pattern = "".join(small_manifest().space.architecture.hybrid_override_pattern[i] for i in subnet.layers)
    for name in tensors:
        layer = name.split(".")[1]
        assert name.removesuffix(".weight").removesuffix(".bias") in {n.format(bid=layer) for n in known}, name
    value = {key: field.contents() for key, field in file.fields.items()}
    assert value["general.architecture"] == "nemotron_h" and value["nemotron_h.block_count"] == len(pattern) == 6
    assert value["nemotron_h.feed_forward_length"] == [40 if kind == "-" else 0 for kind in pattern]
    assert value["nemotron_h.attention.head_count_kv"] == [4 if kind == "*" else 0 for kind in pattern]
    assert value["nemotron_h.ssm.inner_size"] == 8 * 6 and value["nemotron_h.ssm.time_step_rank"] == 8
    assert json.loads(value["nemo_elastic.provenance"])["budget"] == "small"
    whole, first = random_weights(), subnet.layers[0]
    heads = [h for group in range(4) for h in (3 * group, 3 * group + 1)]  # 2 of 3 heads of each group
    wanted = -np.exp(whole[f"decoder.layers.{first}.mixer.A_log"].numpy()[heads])
    assert np.allclose(tensors["blk.0.ssm_a"].data.reshape(-1), wanted, rtol=1e-6)
    assert list(tensors["blk.0.ssm_a"].shape) == [1, 8] and list(tensors["blk.0.ssm_norm.weight"].shape) == [12, 4]
    star = pattern.index("*")
    qkv = whole[f"decoder.layers.{subnet.layers[star]}.self_attention.linear_qkv.weight"].view(4, 5, 8, 48)
    queries = tensors[f"blk.{star}.attn_q.weight"].data.reshape(4, 8, 32)
    assert np.array_equal(queries, qkv[:, 0, :, :32].numpy())
    assert np.array_equal(tensors[f"blk.{star}.attn_v.weight"].data.reshape(4, 8, 32), qkv[:, 4, :, :32].numpy())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_only_matrices_are_cast(nested: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    folder = extract(nested, "large", tmp_path / "large", format="gguf", dtype=dtype)
    opened = open_nested(nested)
    child = open_gguf("large", folder, opened)
    assert (
        child.dtype == dtype and list(first_difference(child.file, child.expected.keys, child.expected.tensors)) == []
    )
    kinds = {n: child.file.dtype(n) for n in child.file.names()}
    assert kinds["token_embd.weight"] == kinds["blk.0.ssm_in.weight"] == kinds["blk.3.attn_k.weight"] == dtype
    flat = [n for n in kinds if "norm" in n or "conv" in n or n.endswith((".bias", "ssm_a", "ssm_d"))]
    assert len(flat) > 20 and {kinds[n] for n in flat} == {torch.float32}
    whole = random_weights()["output_layer.weight"]
    assert torch.equal(child.file.read("output.weight"), whole[:, :40].to(dtype))


def test_what_is_not_the_childs_is_named(nested: Path, tmp_path: Path) -> None:
    file = extract(nested, "small", tmp_path / "small", format="gguf") / GGUF_FILE
    opened = open_nested(nested)

    def differences() -> list[str]:
        child = open_gguf("small", file.parent, opened)
        return list(first_difference(child.file, child.expected.keys, child.expected.tensors))

    assert differences() == []
    found = {t.name: t for t in gguf.GGUFReader(file).tensors}["output.weight"]
    data = bytearray(file.read_bytes())
    data[int(found.data_offset) + 13] ^= 1
    file.write_bytes(data)
    assert len(differences()) == 1 and differences()[0].startswith("output.weight: 1 of 65536 values differ")
    expected = open_gguf("small", file.parent, opened).expected
    keys = {**expected.keys, "nemotron_h.attention.layer_norm_rms_epsilon": 1e-6}
    assert next(first_difference(GgufFile(file), keys, [])).startswith("key nemotron_h.attention.layer_norm_rms_eps")
    file.write_bytes(bytes(data)[:1000])
    with pytest.raises(ProblemsError, match="cannot be read as GGUF"):
        differences()


def test_a_file_that_differs_is_named_before_llama_cpp_is_asked(nested: Path, tmp_path: Path) -> None:
    """What llama.cpp might not even load, or would read and we never wrote; there is no llama.cpp here."""
    opened = open_nested(nested)
    folder = extract(nested, "small", tmp_path / "small", format="gguf")
    expected = open_gguf("small", folder, opened).expected
    keys, tensors, last = expected.keys, expected.tensors, expected.tensors[-1]
    half = LazyTensor(last.name, torch.float16, last.shape, lambda: last.read().half())
    flat = LazyTensor(last.name, last.dtype, (last.shape[0] * last.shape[1],), lambda: last.read().flatten())
    more = LazyTensor("rope_freqs.weight", torch.float32, (4,), lambda: torch.ones(4))
    blocks, template = "nemotron_h.block_count", "tokenizer.chat_template"
    assert template not in keys and last.name == "output.weight"
    without = {key: value for key, value in keys.items() if key != blocks}
    for changed, kept, words in (
        (keys, tensors[:-1], "output.weight is missing"),
        (keys, [*tensors[:-1], half], f"output.weight is F16 {list(last.shape)}, wanted F32 {list(last.shape)}"),
        (keys, [*tensors[:-1], flat], f"output.weight is F32 [65536], wanted F32 {list(last.shape)}"),
        (keys, [*tensors, more], "rope_freqs.weight is no tensor of this child"),
        (without, tensors, f"key {blocks} is missing, the nested subnet has 6"),
        ({**keys, blocks: 6.0}, tensors, f"key {blocks} is of type FLOAT32, wanted UINT32"),
        ({**keys, blocks: 7}, tensors, f"key {blocks} is 7, the nested subnet has 6"),
        ({**keys, template: "{{ x }}"}, tensors, f"key {template} is '{{{{ x }}}}', which no child is written with"),
    ):
        write_gguf(folder / GGUF_FILE, changed, kept)
        child = open_gguf("small", folder, opened)
        batches = [(torch.arange(64).view(4, 16), torch.arange(64).view(4, 16))]
        (check,) = check_children(opened, [child], None, "sliced", batches, "/no/such/python", lambda *_: None)
        assert not check.ok and check.difference == words and check.greedy is None
    write_gguf(folder / GGUF_FILE, keys, tensors)
    assert list(first_difference(GgufFile(folder / GGUF_FILE), keys, tensors)) == []


def test_children_that_llama_cpp_cannot_say_are_refused(nested: Path, tmp_path: Path) -> None:
    found = small_manifest()
    varied = found.space.subnet(mamba_num_heads=[8, 12, 4])
    with pytest.raises(ProblemsError, match=r"mamba_num_heads\.per_layer: this child has 8, 12, 4 in its mamba layers"):
        check_gguf(found.model, found.space.architecture, varied)
    with pytest.raises(ProblemsError, match=r"activation_func: 'gelu' cannot be said in llama\.cpp's nemotron_h"):
        check_gguf({**found.model, "activation_func": "gelu"}, found.space.architecture, found.subnet("small"))
    with pytest.raises(ProblemsError, match=r"position_embedding_type: 'rope' cannot be said in llama\.cpp"):
        check_gguf({**found.model, "position_embedding_type": "rope"}, found.space.architecture, found.subnet("small"))
    qwen = load_config("qwen3_4b.yaml").config.model
    with pytest.raises(ProblemsError, match=r"not of Qwen3's; extract with --format hf, and give .* own convert_hf_to"):
        check_gguf(qwen, found.space.architecture, found.subnet("small"))
    with pytest.raises(ProblemsError, match="--dtype: float16 is for --format gguf"):
        extract(nested, "small", tmp_path / "child", dtype=torch.float16)
    large = random_weights()
    large["output_layer.weight"][5, 3] = 7e4
    changed = write_nested(tmp_path / "nested", large, found, tokenizer=TOKENIZER)
    with pytest.raises(ProblemsError, match=r"--dtype: output\.weight has values beyond 65,504 \(7e\+04\)"):
        extract(changed, "small", tmp_path / "child", format="gguf", dtype=torch.float16)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nested"]
    both = replace(open_nested(nested), manifest=replace(found, subnets={**found.subnets, "varied": varied}))
    with pytest.raises(ProblemsError, match=r"cannot say that.*\(budget varied\)"):
        extract_all(both, tmp_path / "all", format="gguf")
    assert not (tmp_path / "all").exists()


def tokenizer_folder(folder: Path, **change: object) -> Path:
    """The shipped tokenizer with parts of its JSON replaced, as a nested checkpoint holds it."""
    source = folder.with_name(f"{folder.name}.json")
    source.write_text(json.dumps({**json.loads(TOKENIZER.read_text()), **change}))
    write_tokenizer(folder, source)
    return folder


def test_tokenizer_travels_in_the_file(tmp_path: Path) -> None:
    vocab = json.loads(TOKENIZER.read_text())["model"]["vocab"]
    found = tokenizer_keys(tokenizer_folder(tmp_path / "plain"), 2050)
    assert found["tokenizer.ggml.model"] == "gpt2" and found["tokenizer.ggml.pre"] == "smollm"
    assert found["tokenizer.ggml.tokens"][2048:] == ["[UNUSED2048]", "[UNUSED2049]"]
    assert all(found["tokenizer.ggml.tokens"][number] == token for token, number in vocab.items())
    assert found["tokenizer.ggml.token_type"][:3] == [3, 3, 1] and found["tokenizer.ggml.token_type"][-1] == 5
    assert found["tokenizer.ggml.eos_token_id"] == 0 and found["tokenizer.ggml.padding_token_id"] == 1
    assert found["tokenizer.ggml.add_bos_token"] is False and found["tokenizer.ggml.add_eos_token"] is False
    begin = {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
    single = [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    template = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": {begin["id"]: begin}}
    folder = tokenizer_folder(tmp_path / "begins", post_processor=template)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    found = tokenizer_keys(folder, 2048)
    assert found["tokenizer.ggml.add_bos_token"] is True and found["tokenizer.chat_template"] == "{{ messages }}"


@pytest.mark.parametrize(
    ("change", "rows", "words"),
    [
        ({"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}, 2048, "its model is Unigram"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}, 2048, "it has no merges"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, 2048, "none of those known here"),
        ({"pre_tokenizer": {**BYTES, "add_prefix_space": True, "use_regex": True}}, 2048, "none of those known here"),
        ({"normalizer": {"type": "NFC"}}, 2048, "it has a normalizer, NFC"),
        ({}, 2000, "beyond the 2000 rows of the embedding"),
    ],
)
def test_other_tokenizers_are_refused(tmp_path: Path, change: dict, rows: int, words: str) -> None:
    with pytest.raises(ProblemsError, match=words):
        tokenizer_keys(tokenizer_folder(tmp_path / "other", **change), rows)


@pytest.mark.slow
@needs_llama
def test_llama_cpp_computes_what_the_subnet_computes(tmp_path: Path) -> None:
    """Trained and extreme weights, uniform children and one whose layers differ; fp32 to 1e-4, 16 bits as measured."""
    family = replace(varied_manifest(), model={**MODEL, "seq_length": 1024})
    row, ends = text()[0].tolist(), [1, 2, 3, 5, *range(16, 1000, 82), 999]
    files, wanted, limits = [], [], []
    for kind in WEIGHTS:
        on_disk = write_nested(tmp_path / kind, weights(kind), family, tokenizer=TOKENIZER)
        exact = ElasticFamily({n: w.double() for n, w in weights(kind).items()}, family.layout, MODEL, family.subnets)
        for budget in family.subnets:
            exact.switch(budget)
            reference = exact.logits(text())[0].log_softmax(-1)[torch.tensor(ends) - 1]
            for dtype, limit in ((torch.float32, 1e-4), (torch.float16, 0.1), (torch.bfloat16, 0.5)):
                if dtype != torch.float32 and (kind, budget) != ("trained", "full"):
                    continue
                folder = tmp_path / f"{kind}-{budget}-{dtype}"
                files.append(extract(on_disk, budget, folder, format="gguf", dtype=dtype) / GGUF_FILE)
                wanted.append(reference)
                limits.append(limit)
    sides = run_llama_cpp(str(GGUF_PYTHON), files, MODEL["vocab_size"], row, ends, texts=TEXTS)
    figures = {}
    for file, side, reference, limit in zip(files, sides, wanted, limits, strict=True):
        gap = float((side.log_probabilities - reference).abs().max())
        at_once = float((side.at_once - reference[-1]).abs().max())
        figures[file.parent.name] = f"{gap:.1e} cached, {at_once:.1e} at once"
        assert max(gap, at_once) < limit, figures
    print(figures)
    assert float((wanted[0] - wanted[-1]).abs().max()) > 1


@pytest.mark.slow
@needs_llama
def test_llama_cpp_cuts_text_as_the_tokenizer_does(tmp_path: Path) -> None:
    """Every way to split text that we know a name for."""
    from tokenizers import Tokenizer

    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    tekken = next(steps for steps, name in PRE_TOKENIZERS.items() if name == "tekken")[0].removeprefix("split ")
    digits = {"type": "Digits", "individual_digits": True}
    ways = {
        "gpt-2": [{**BYTES, "use_regex": True}],
        "smollm": [digits, {**BYTES, "use_regex": True}],
        "tekken": [{**split, "pattern": {"Regex": tekken}}, {**BYTES, "use_regex": False}],
    }
    assert ways.keys() == set(PRE_TOKENIZERS.values())
    model = json.loads(TOKENIZER.read_text())[
        "model"
    ]  # the shipped one has no token of two digits: the last becomes one
    last = max(model["vocab"], key=model["vocab"].get)
    model["vocab"]["12"], model["merges"][-1] = model["vocab"].pop(last), ["1", "2"]
    files, wanted = [], []
    for name, steps in ways.items():
        pre = {"type": "Sequence", "pretokenizers": steps}
        folder = tokenizer_folder(tmp_path / f"tokenizer-{name}", pre_tokenizer=pre, model=model)
        made = write_nested(tmp_path / name, random_weights(), small_manifest(), tokenizer=folder)
        files.append(extract(made, "small", tmp_path / f"child-{name}", format="gguf") / GGUF_FILE)
        assert GgufFile(files[-1]).keys["tokenizer.ggml.pre"] == name
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        wanted.append([tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS])
    sides = run_llama_cpp(str(GGUF_PYTHON), files, 2048, [5, 6], [2], texts=TEXTS)
    assert [side.texts for side in sides] == wanted
    assert wanted[0] != wanted[1] and wanted[1] != wanted[2] and wanted[0] != wanted[2]


@pytest.mark.slow
@needs_llama
@pytest.mark.usefixtures("one_rank")
def test_verb_verifies_and_notices(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chat parent: the likeliest token is often the end of a turn, at which llama.cpp would stop, and which is not
    the tokenizer's end."""
    run = load_config("tiny_parent.yaml", ["train.val_samples=4"]).config
    family = replace(manifest(), provenance={"config": plain(run)})
    turns = tmp_path / "tokenizer.json"
    turns.write_text(TOKENIZER.read_text().replace("<pad>", "<|im_end|>"))
    chat, often = weights("trained"), int(text().mode().values)
    chat["output_layer.weight"][1] = 1.05 * chat["output_layer.weight"][often]  # 1 is the turn's end
    on_disk = write_nested(tmp_path / "nested", chat, family, tokenizer=turns)
    fed: list[list[int]] = []

    def spy(*arguments, **how):
        fed.extend(how["continued"])
        return run_llama_cpp(*arguments, **how)

    monkeypatch.setattr(gguf_check, "run_llama_cpp", spy)
    assert main(["extract", str(on_disk), "--all", "--format", "gguf", "--out", str(tmp_path / "gguf")]) == 0
    verify = ["verify", str(on_disk), "--format", "gguf", "--gguf-python", str(GGUF_PYTHON)]
    capsys.readouterr()
    code = main([*verify, "--json"])
    children = json.loads(capsys.readouterr().out)["children"]
    assert code == 0, children
    for check in children:
        assert check["ok"] and check["format"] == "gguf" and check["greedy"] == 1.0
        assert check["max_abs"] < 1e-4 and check["top1_agreement"] == 1.0
    assert len(fed) == 3 * len(children) and sum(1 in row[16:-1] for row in fed) > len(children)
    file = tmp_path / "gguf" / "small" / GGUF_FILE
    norm = {t.name: t for t in gguf.GGUFReader(file).tensors}["output_norm.weight"]
    data = bytearray(file.read_bytes())
    start = int(norm.data_offset)
    data[start : start + norm.n_bytes] = (norm.data * 1.5).astype("<f4").tobytes()
    file.write_bytes(data)
    assert main([*verify, "--budget", "small"]) == 1
    out = capsys.readouterr().out
    assert "DIFFERS" in out and "small: first difference: output_norm.weight: 96 of 96 values differ" in out
    assert len(fed) == 3 * len(children)  # and llama.cpp was not asked


def test_verb_wants_a_python_that_has_llama_cpp(nested: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from nemo_elastic.nemo.export.verify import verify

    run = load_config("tiny_parent.yaml").config
    with pytest.raises(ProblemsError, match="--gguf-python: is not given, and this Python has no xllamacpp"):
        verify(nested, {"small": tmp_path}, run, [], format="gguf")
    with pytest.raises(ProblemsError, match="--gguf-python: '/no/such' is no program; it must be one that has"):
        verify(nested, {"small": tmp_path}, run, [], format="gguf", python="/no/such")
    assert main(["verify", str(nested), "--gguf-python", "python3"]) == 2
    assert "--gguf-python: runs children of --format gguf" in capsys.readouterr().err
    with pytest.raises(ProblemsError, match=r"no model\.gguf here; run `nemo-elastic extract --format gguf` first"):
        open_gguf("small", tmp_path, open_nested(nested))
