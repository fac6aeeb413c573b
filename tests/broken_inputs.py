"""Broken inputs of every verb: what a good set of files looks like, and each way in which one of them is spoilt.

A case is a command line over a copy of the good files with one thing wrong. Paths are written `{w}`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from family_configs import PUBLISHED

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "nemo_elastic" / "assets" / "tiny_parent"
CONFIGURED = ("config", "plan", "rank", "sort", "train", "nest", "profile", "quickstart")
CONFIG = """
base: tiny_parent.yaml
name: broken
parent: {{path: {w}/parent}}
data: {{paths: [{w}/text.txt], cache_dir: {w}/cache}}
rank: {{samples: 4, depth_samples: 2, seq_length: 32, micro_batch_size: 2}}
train: {{micro_batch_size: 2, val_samples: 2, stages: [{{steps: 2, seq_length: 32, global_batch_size: 4}}]}}
"""
TURNS = [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "It is 5, as ever."}]
Spoil = Callable[[Path], None]


@dataclass(frozen=True)
class Broken:
    """One case.

    Attributes:
        name: what is wrong.
        words: the command line.
        spoil: what is done to a copy of the good files, in its folder.
        codes: exit codes that are right; 1 where a check of `verify` fails.
    """

    name: str
    words: tuple[str, ...]
    spoil: Spoil = lambda folder: None
    codes: tuple[int, ...] = (2,)


def write_good(folder: Path) -> Path:
    """A parent, text, a run with its scores, and a nested family with a child; takes seconds (NeMo writes contexts)."""
    from checkpoint_family import TOKENIZER, manifest, random_weights
    from synthetic_run import write_run

    from nemo_elastic.config import load_config
    from nemo_elastic.nemo.export.checkpoints import extract, write_nested

    shutil.copytree(ASSETS, folder / "parent")
    (folder / "text.txt").write_text("".join(f"line {i} says {i * i % 97} and {i**3 % 89}\n" for i in range(4000)))
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": f"document {i} " * 40}) + "\n" for i in range(80)))
    (folder / "chat.jsonl").write_text((json.dumps({"messages": TURNS}) + "\n") * 80)
    ids = (np.arange(8000) % 2000).astype(np.uint16)
    (folder / "pair.bin").write_bytes(ids.tobytes())
    lengths = np.full(80, 100, np.int32)
    pointers, documents = np.arange(80, dtype=np.int64) * 200, np.arange(81, dtype=np.int64)
    head = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, 80, 81)
    (folder / "pair.idx").write_bytes(head + lengths.tobytes() + pointers.tobytes() + documents.tobytes())
    (folder / "run.yaml").write_text(CONFIG.format(w=folder))
    write_run(folder / "run", steps=30)
    values = load_config(str(folder / "run.yaml"), ["elastic.budgets={full: 1.0, large: 0.8, small: 0.6}"]).values
    family = dataclasses.replace(manifest(), provenance={"config": values, "seed": 7})
    write_nested(folder / "family" / "nested", random_weights(), family, tokenizer=TOKENIZER)
    extract(folder / "family" / "nested", "small", folder / "family" / "children" / "small")
    return folder


def copy_good(good: Path, folder: Path) -> Path:
    """The good files by hard links (a spoil replaces files, never writes into one), YAML and cache its own."""
    shutil.copytree(good, folder, copy_function=os.link, ignore=shutil.ignore_patterns("cache"))
    replace(folder / "run.yaml", CONFIG.format(w=folder).encode())
    return folder


def replace(file: Path, content: bytes) -> None:
    """A new file in the place of another, or of nothing."""
    file.unlink(missing_ok=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


def _to(name: str, make: Callable[[bytes], bytes]) -> Spoil:
    def spoil(folder: Path) -> None:
        file = folder / name
        replace(file, make(file.read_bytes() if file.is_file() else b""))

    return spoil


def _gone(name: str) -> Spoil:
    return lambda folder: (folder / name).unlink()


def _as_folder(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return spoil


NOISE = np.random.default_rng(1).integers(0, 256, 4096, dtype=np.uint8).tobytes()
DEEP = b"[" * 100_000 + b"]" * 100_000
DEEP_YAML = b"a: " + b"[" * 2_000 + b"]" * 2_000
JSONS = {
    "empty": b"", "noise": NOISE, "a list": b"[]", "null": b"null", "a number": b"3", "a string": b'"x"', "NaN": b"NaN",
    "deep": DEEP, "UTF-16": '{"a": 1}'.encode("utf-16"), "an empty object": b"{}", "half": None,
}  # fmt: skip


def json_spoils(file: str, *without: str) -> Iterator[tuple[str, Spoil]]:
    """(name, spoil) for a JSON file."""
    for name, content in JSONS.items():
        if name not in without:
            make = (lambda old: old[: len(old) // 2]) if content is None else (lambda old, new=content: new)
            yield f"{file} is {name}", _to(file, make)
    if "missing" not in without:
        yield f"{file} is missing", _gone(file)
    if "a folder" not in without:
        yield f"{file} is a folder", _as_folder(file)


def key_spoils(file: str, keys: dict[str, tuple[object, ...]]) -> Iterator[tuple[str, Spoil]]:
    """(name, spoil) that give one key of a JSON object another value."""
    for key, values in keys.items():
        for value in values:

            def make(old: bytes, key: str = key, value: object = value) -> bytes:
                return json.dumps(json.loads(old) | {key: value}).encode()

            yield f"{file} has {key}={json.dumps(value)[:20]}", _to(file, make)


def binary_spoils(file: str, *without: str) -> Iterator[tuple[str, Spoil]]:
    """(name, spoil) for a file of tensors."""
    makes: dict[str, Callable[[bytes], bytes]] = {
        "empty": lambda old: b"", "noise": lambda old: NOISE, "half": lambda old: old[: len(old) // 2],
        "a huge header": lambda old: struct.pack("<Q", 1 << 62) + old[8:], "text": lambda old: b"version https://git-lfs\n",
    }  # fmt: skip
    for name, make in makes.items():
        if name not in without:
            yield f"{file} is {name}", _to(file, make)
    if "missing" not in without:
        yield f"{file} is missing", _gone(file)
    if "a folder" not in without:
        yield f"{file} is a folder", _as_folder(file)


YAMLS = {
    "empty": b"", "noise": NOISE, "a list": b"- 1\n- 2\n", "a word": b"hello", "a number": b"3", "deep": DEEP_YAML,
    "UTF-16": "model: {}".encode("utf-16"), "Latin-1": b"name: caf\xe9\n", "open": b"model: {hidden_size: 3",
    "tabs": b"model:\n\thidden_size: 3\n", "python": b"name: !!python/object/apply:os.getcwd []\n",
    "a cycle": b"&a [*a]",
    "an unknown section": b"modell: {}\n", "a missing base": b"base: nothing.yaml\n", "itself": b"base: run.yaml\n",
    "without its model": b"name: x\nparent: {path: x}\n", "null": b"model: null\n", "twice": b"base: 3\n",
    "zero bytes": b"name: a\0b\n", "bad reference": b"name: ${nobody.knows}\n",
}  # fmt: skip
OVERRIDES = (
    "model.hidden_size=x", "model.hidden_size=-8", "model.hybrid_override_pattern=MX", "elastic.dims=[1]", "train=3",
    "elastic.budgets={a: -3}", "elastic.dims.ffn_hidden_size.choices=[127]", "nobody=1", "data.paths=3",
    "parent.path=3", "train.stages=[{steps: -1}]", "train.tensor_model_parallel_size=3", "train.precision=fp4",
    "rank.depth=best",
    "elastic.subnets={nobody: {}}", "train.optimizer.lr=.nan", "data.chat.date=today", "router.shapes=best",
)  # fmt: skip


# `config` shows what was written, whatever it means; `plan` is for parents that are not there yet.
LATER = {
    "config": ("train.tensor", "elastic.dims.", "elastic.budgets", "elastic.subnets", "parent.path"),
    "plan": ("parent.path",),
    "profile": ("parent.path", "train.tensor"),
}


def cases() -> list[Broken]:
    """All of them, in a fixed order."""
    return [*_configurations(), *_flags(), *_parents(), *_texts(), *_scores(), *_families(), *_runs()]


def _words(verb: str) -> tuple[str, ...]:
    words = (verb, "--config", "{w}/run.yaml")
    return (*words, "--output", "{w}/latency.yaml") if verb == "profile" else words


def _configurations() -> Iterator[Broken]:
    for number, (name, content) in enumerate(YAMLS.items()):
        for verb in (CONFIGURED[number % 8], CONFIGURED[(number + 3) % 8]):
            yield Broken(f"YAML is {name}", _words(verb), _to("run.yaml", lambda old, new=content: new))
    for number, word in enumerate(OVERRIDES):
        for verb in dict.fromkeys((CONFIGURED[number % 8], CONFIGURED[(number + 5) % 8], "train")):
            if word.startswith(LATER.get(verb, ())):
                continue
            yield Broken(f"{word}", (*_words(verb), word))
    for verb in CONFIGURED[:-1]:
        yield Broken("the configuration is missing", (verb, "--config", "{w}/nothing.yaml"))
        yield Broken("the configuration is a folder", (verb, "--config", "{w}/parent"))
        yield Broken("no configuration", (verb,))
    for verb in CONFIGURED:
        yield Broken("an unknown flag", (*_words(verb), "--nobody"))
        yield Broken("a folder too many", (*_words(verb), "{w}/one", "{w}/two"))


def _flags() -> Iterator[Broken]:
    for verb in ("rank", "train", "quickstart"):
        for count in ("0", "-1", "x"):
            yield Broken(f"--nproc {count}", (*_words(verb), "--nproc", count))
        layout = ("--nproc", "3", "train.tensor_model_parallel_size=2")
        yield Broken("--nproc that the layout cannot use", (*_words(verb), *layout))
        yield Broken("--out is a file", (*_words(verb), "--out", "{w}/text.txt"))
        yield Broken("--out is below a file", (*_words(verb), "--out", "{w}/text.txt/run"))
        yield Broken("--out cannot be made", (*_words(verb), "--out", "/proc/nowhere/run"))
        yield Broken("--out has a name that is too long", (*_words(verb), "--out", "{w}/" + "a" * 300))
    for flag, value in (
        ("--rounds", "0"),
        ("--repeats", "-1"),
        ("--points", "1"),
        ("--warm-up", "-1"),
        ("--rounds", "x"),
    ):
        yield Broken(f"profile {flag} {value}", (*_words("profile"), flag, value))
    yield Broken("profile --output is a folder", ("profile", "--config", "{w}/run.yaml", "--output", "{w}/run"))
    yield Broken("profile --output is there", ("profile", "--config", "{w}/run.yaml", "--output", "{w}/text.txt"))
    for words in (
        ("--search", "best"), ("--search", "random:0"), ("--search", "random:x"), ("--search", "greedy"), ("--score",),
        ("--budget", "0.5"), ("--output", "{w}/x.yaml"), ("--ranking", "{w}/nothing"),
        ("--train", "--search", "uniform"),
    ):  # fmt: skip
        yield Broken(f"plan {' '.join(words)}", (*_words("plan"), *words))


# model_type, a key and what makes it another function, or none.
OF_FAMILIES = (
    ("llama", "attn_logit_softcapping", 50.0), ("llama", "rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
    ("llama", "rope_scaling", "x"), ("llama", "rope_parameters", {"a": {}}), ("llama", "rope_theta", "x"),
    ("llama", "mlp_bias", True), ("llama", "head_dim", [64]), ("llama", "num_key_value_heads", 5),
    ("llama", "layer_types", 3), ("llama", "model_type", "opt"), ("llama", "pretraining_tp", 2),
    ("qwen2", "use_sliding_window", True), ("qwen2", "layer_types", ["sliding_attention"] * 28),
    ("qwen2", "num_hidden_layers", 0), ("qwen2", "partial_rotary_factor", 0.5), ("qwen3", "alibi", True),
    ("qwen3", "attention_bias", True), ("qwen3", "rms_norm_eps", 0), ("qwen3", "num_experts", 128),
    ("bamba", "attn_layer_indices", [99]), ("bamba", "mamba_d_head", "x"), ("bamba", "time_step_limit", [0, 1]),
    ("bamba", "mamba_expand", 1.5), ("bamba", "hidden_act", "gelu"), ("granitemoehybrid", "num_local_experts", 72),
    ("granitemoehybrid", "layer_types", ["mamba"]), ("granitemoehybrid", "residual_multiplier", "x"),
    ("granitemoehybrid", "position_embedding_type", "learned"), ("granitemoehybrid", "attention_multiplier", 0),
)  # fmt: skip


def _parents() -> Iterator[Broken]:
    verbs = ("train", "rank", "quickstart")
    config = {
        "model_type": ("gpt2", 3, None), "hidden_size": ("x", -128, 0, None, 1e300, 127), "vocab_size": ("x", 0, 7),
        "hybrid_override_pattern": ("", "MX", 3), "num_hidden_layers": ("x", -1), "mamba_num_heads": (0, "x", 5),
        "layers_block_type": (["nobody"],),
    }  # fmt: skip
    spoils = [
        *json_spoils("parent/config.json", "missing", "a folder"),  # stock names need none
        *key_spoils("parent/config.json", config),
        *binary_spoils("parent/model.safetensors"),
        *json_spoils("parent/tokenizer.json"),
    ]
    for number, (name, spoil) in enumerate(spoils):
        yield Broken(name, _words(verbs[number % 3]), spoil)
    for number, (kind, key, value) in enumerate(OF_FAMILIES):
        said = {**next(config for config, _, _ in PUBLISHED.values() if config["model_type"] == kind), key: value}
        spoil = _to("hf/config.json", lambda old, said=said: json.dumps(said).encode())
        words = (
            ("plan", "{w}/hf"),
            ("config", "--from", "{w}/hf"),
            (*_words("train"), "parent.path={w}/hf"),
        )
        yield Broken(f"{kind} has {key}={json.dumps(value)[:20]}", words[number % 3], spoil)
    for path in ("{w}/nothing", "{w}/text.txt", "{w}/run", "builtin:nobody", "/dev/null", "''", "'a\\0b'"):
        yield Broken(f"parent.path={path}", (*_words("train"), f"parent.path={path}"))
        yield Broken(f"parent.path={path}", (*_words("rank"), f"parent.path={path}"))
    for path in ("{w}/nothing", "{w}/text.txt", "{w}/run", "3"):
        yield Broken(f"data.tokenizer={path}", (*_words("train"), f"data.tokenizer={path}"))


def _texts() -> Iterator[Broken]:
    lines = {
        "Latin-1": b'{"text": "caf\xe9"}\n', "UTF-16": '{"text": "a"}'.encode("utf-16"), "no object": b"[1]\n",
        "deep": b'{"text": ' + DEEP + b"}", "no text": b'{"tex": "a"}\n', "a number": b'{"text": 3}\n',
        "half a line": b'{"text": "a', "zero bytes": b"\0" * 100,
    }  # fmt: skip
    turns = {
        "no turns": {"messages": []}, "a turn without content": {"messages": [{"role": "user"}]},
        "an image": {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        "an unknown speaker": {"conversations": [{"from": "nobody", "value": "a"}]}, "half a pair": {"prompt": "a"},
        "tools": {"messages": TURNS, "tools": 3}, "a null": {"messages": [None]},
    }  # fmt: skip
    for number, (name, line) in enumerate(lines.items()):
        spoil = _to("a.jsonl", lambda old, line=line: old + line)
        verb = ("train", "rank", "quickstart")[number % 3]
        yield Broken(f"a line is {name}", (*_words(verb), "data.paths=[{w}/a.jsonl]"), spoil)
        for verb in ("train", "data"):
            yield Broken(
                f"a line is {name}", (*_words(verb), "data.paths=[]", "data.blend=[{path: {w}/a.jsonl}]"), spoil
            )
    for name, turn in turns.items():
        spoil = _to("chat.jsonl", lambda old, turn=turn: old + json.dumps(turn).encode())
        for verb in ("train", "data"):
            yield Broken(f"a conversation has {name}", (*_words(verb), *_CHAT), spoil)
    for ending in (".jsonl.gz", ".txt.bz2", ".jsonl.xz", ".txt.zst", ".parquet"):
        for name, content in (("noise", NOISE), ("text", b"some text\n"), ("empty", b"")):
            spoil = _to(f"b{ending}", lambda old, new=content: new)
            yield Broken(f"b{ending} is {name}", (*_words("train"), f"data.paths=[{{w}}/b{ending}]"), spoil)
    for name, spoil in (*binary_spoils("pair.idx"), *binary_spoils("pair.bin", "a huge header")):
        yield Broken(name, (*_words("rank"), "data.paths=[]", "data.blend=[{path: {w}/pair}]"), spoil)
    for path in ("{w}/nothing", "{w}/run.yaml", "{w}/family/children", "/dev/zero", "''"):
        for verb in ("train", "data"):
            yield Broken(f"data.paths=[{path}]", (*_words(verb), f"data.paths=[{path}]"))
    for flag in ("--samples=-1", "--documents=-3", "--documents=many"):
        yield Broken(f"data {flag}", (*_words("data"), flag))
    yield Broken(
        "too little text", (*_words("train"), "data.paths=[{w}/c.txt]"), _to("c.txt", lambda old: b"a few words")
    )
    yield Broken("a tokenizer's words", (*_words("train"), "data.chat.template={w}/nothing.jinja", *_CHAT))
    broken = _to("parent/chat_template.jinja", lambda old: b"{% if %}")
    yield Broken("a chat template that is none", (*_words("train"), *_CHAT), broken)
    yield Broken("a chat template that is none", (*_words("data"), *_CHAT), broken)
    refusing = _to("parent/chat_template.jinja", lambda old: b"{{ raise_exception('no') }}")
    yield Broken("a chat template that refuses", (*_words("train"), *_CHAT), refusing)


_CHAT = ("data.paths=[]", "data.blend=[{path: {w}/chat.jsonl}]")


def _scores() -> Iterator[Broken]:
    search = ("plan", "--config", "tiny_parent.yaml", "--search", "greedy", "--ranking", "{w}/run")
    sort = ("sort", "--config", "tiny_parent.yaml", "--out", "{w}/run")
    keys = {
        "format": (2, None),
        "architecture": ({}, 3),
        "provenance": (3,),
        "depth_scores": ({"x": 1}, {"0": "a"}),
        "depth_ranking": ([0], "x", [0] * 16),
        "sha256": ({}, 3),
    }
    spoils = [
        *json_spoils("run/importance/importance.json"),
        *key_spoils("run/importance/importance.json", keys),
        *binary_spoils("run/importance/importance.safetensors"),
    ]
    for number, (name, spoil) in enumerate(spoils):
        yield Broken(name, (search, sort)[number % 2], spoil)


def _families() -> Iterator[Broken]:
    nested, manifest = "{w}/family/nested", "family/nested/elastic/manifest.json"
    verbs = (
        ("extract", nested, "--budget", "small", "--out", "{w}/new"), ("verify", nested),
        ("plan", nested, "--budget", "0.6"),
        ("extract", nested, "--all", "--format", "hf", "--out", "{w}/new"),
        ("generate", nested, "--prompt", "x", "--budget", "small"),
    )  # fmt: skip
    keys = {
        "format": (99, "x", None), "model": ({}, 3, None), "space": ({}, [], None), "budgets": ([], {"small": 3}),
        "subnets": ({}, {"small": {}}, {"small": {"hidden_size": -1}}, 3), "provenance": (3, {"config": 3}),
        "files": ([], {"a": 3}),
    }  # fmt: skip
    for number, (name, spoil) in enumerate((*json_spoils(manifest), *key_spoils(manifest, keys))):
        yield Broken(name, verbs[number % 5], spoil, codes=(1, 2))
    weights = "family/nested/weights"
    for file in (f"{weights}/.metadata", f"{weights}/__0_0.distcp"):
        for number, (name, spoil) in enumerate(binary_spoils(file, "a huge header")):
            yield Broken(name, verbs[(0, 3, 1, 4)[number % 4]], spoil, codes=(1, 2))
    child = "family/children/small/weights"
    for file in (f"{child}/.metadata", f"{child}/__0_0.distcp"):
        for name, spoil in binary_spoils(file, "a huge header"):
            yield Broken(name, ("verify", nested), spoil, codes=(1, 2))
    for words in (
        ("--budget", "nobody"), (), ("--budget", "small", "--all"), ("--budget", "small", "--format", "onnx"),
        ("--budget", "small", "--out", "{w}/text.txt"), ("--budget", "small", "--out", "{w}/run"),
        ("--subnet", "{w}/no.yaml"), ("--nested",), ("--nested", "--all", "--format", "hf"),
        ("--nested", "--format", "hf", "--out", "{w}/run"),
        ("--budget", "small", "export.dtype=int3"), ("--budget", "small", "model.hidden_size=3"),
    ):  # fmt: skip
        yield Broken(f"extract {' '.join(words)}", ("extract", nested, *words))
    for content in YAMLS.values():
        spoil = _to("subnet.yaml", lambda old, new=content: new)
        yield Broken("a subnet's file", ("extract", nested, "--subnet", "{w}/subnet.yaml", "--out", "{w}/new"), spoil)
    for words in (
        ("{w}/family/children/nobody",), ("{w}/text.txt", "--budget", "small"), ("--budget", "nobody"),
        ("--format", "hf"),
        ("--format", "x"), ("{w}/run", "--budget", "small"), ("train.stages=3",),
    ):  # fmt: skip
        yield Broken(f"verify {' '.join(words)}", ("verify", nested, *words))
    for words in ((), ("--budget", "nobody"), ("--think", "small"), ("--think", "small", "--answer", "3")):
        yield Broken(f"generate {' '.join(words)}", ("generate", nested, "--prompt", "x", *words))
    for words in (
        ("--budget", "x"),
        ("--budget", "-1"),
        ("--budget", "1e99"),
        ("--budget", "a:b"),
        ("--output", "{w}/run"),
    ):
        yield Broken(f"plan NESTED {' '.join(words)}", ("plan", nested, *words))
    asked = ("--prompt", "x", "--budget", "small")
    for verb, more in {"extract": ("--all",), "verify": (), "plan": (), "generate": asked}.items():
        for path in ("{w}/nothing", "{w}/text.txt", "{w}/parent", "", "/dev/null", "/"):
            if (verb, path) != ("plan", "{w}/parent"):  # which is a parent, and is planned
                yield Broken(f"{verb} of {path}", (verb, path, *more))


def _runs() -> Iterator[Broken]:
    for path in ("{w}/nothing", "{w}/text.txt", "/dev/null", ""):
        yield Broken(f"report of {path}", ("report", path))
    yield Broken("report without a folder", ("report",))
    yield Broken("report where report/ is a file", ("report", "{w}/run"), _to("run/report", lambda old: b"x"))
    for out in ("{w}/run", "{w}/nothing", "{w}/text.txt", "{w}/parent"):
        yield Broken(f"nest of {out}", (*_words("nest"), "--out", out))
        yield Broken(f"nest of {out}", (*_words("nest"), "--out", out, "{w}/run/checkpoints/step=3"))
    for name, content in YAMLS.items():
        spoil = _to("latency.yaml", lambda old, new=content: new)
        budget = "elastic.budgets={full: 1.0, fast: {kind: latency_ms, value: 3}}"
        words = (*_words("plan"), "report.latency_table={w}/latency.yaml", budget)
        yield Broken(f"a latency table is {name}", words, spoil)
