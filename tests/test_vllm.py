"""Hugging Face children in vLLM (`make test-vllm`, not in CI): what it computes is what the family computes.

log-probabilities(vLLM on the child, fp32) == log-probabilities(fp64 serving)      1e-4, trained and extreme weights

vLLM's attention on a CPU takes heads of 32 channels and more, and the shipped parent's have 16. Its heads are widened
with zeros, which changes nothing that it computes.
"""

import json
import math
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_family import TOKENIZER
from trained_family import MODEL, WEIGHTS, manifest, relative, served, text, weights

from nemo_elastic.checkpoint.manifest import Manifest
from nemo_elastic.data.tokenizer import BPETokenizer
from nemo_elastic.nemo.export.checkpoints import extract, write_nested
from nemo_elastic.serving import ElasticFamily

VLLM_PYTHON = Path(__file__).parent.parent / ".venv-vllm" / "bin" / "python"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.skipif(not VLLM_PYTHON.is_file(), reason="make setup-vllm makes the venv with vLLM"),
]
WIDE = {**MODEL, "kv_channels": 32, "seq_length": 1024}
PROMPTS = ["def main(", "import os\n\nclass ", "    return self."]
NEW_TOKENS = 40
LENGTHS = (200, 1000)
# One process, 1 GB for caches, no look at the network.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def wide_manifest() -> Manifest:
    """The trained family with wider heads, a child whose MLP layers differ, and one whose attention does too."""
    found = manifest(WIDE)
    sizes = {"hidden_size": 112, "layers": [*range(9), *range(10, 16)]}
    sizes["ffn_hidden_size"] = [512, 256, 384, 128, 512, 64, 320]
    more = {
        "lists": found.space.subnet(**sizes),
        "padded": found.space.subnet(**sizes, num_attention_heads=[8, 16]),
    }
    return replace(found, subnets={**found.subnets, **more})


def widened(kind: str) -> dict[str, torch.Tensor]:
    """The same function with 32 channels a head: zeros add nothing to q k, and q takes the ratio of the roots in
    softmax(q k / sqrt(channels)) v."""
    heads, groups, old, new = (*(MODEL[k] for k in ("num_attention_heads", "num_query_groups", "kv_channels")), 32)
    found = weights(kind)
    for name, value in found.items():
        if name.endswith("linear_qkv.weight"):  # [groups, queries + k + v, channels, h]
            rows = torch.nn.functional.pad(value.view(groups, -1, old, value.shape[-1]), (0, 0, 0, new - old))
            rows[:, : heads // groups] *= math.sqrt(new / old)
            found[name] = rows.reshape(-1, value.shape[-1])
        elif name.endswith("linear_proj.weight"):  # [h, heads, channels]
            found[name] = torch.nn.functional.pad(value.view(-1, heads, old), (0, new - old)).flatten(1)
    return found


def family(kind: str, dtype: torch.dtype = torch.float64) -> ElasticFamily:
    found = wide_manifest()
    return ElasticFamily({n: w.to(dtype) for n, w in widened(kind).items()}, found.layout, WIDE, found.subnets)


def take_list(folder: Path) -> list[int] | None:
    """The list of `intermediate_size`, with one number left in its place: transformers' configuration refuses a list,
    vLLM's model reads one."""
    config = json.loads((folder / "config.json").read_text())
    sizes = config["intermediate_size"]
    if not isinstance(sizes, list):
        return None
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": max(sizes)}))
    return sizes


def ask_vllm(folder: Path) -> dict:
    """What `vllm_logprobs.py` answers."""
    request, answer = folder.with_suffix(".request.json"), folder.with_suffix(".answer.json")
    rows = [text(length)[0].tolist() for length in LENGTHS]
    asked = {"folder": str(folder), "intermediate_size": take_list(folder), "rows": rows, "prompts": PROMPTS}
    request.write_text(json.dumps(asked | {"new_tokens": NEW_TOKENS}))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | ENVIRONMENT
    command = [VLLM_PYTHON, Path(__file__).with_name("vllm_logprobs.py"), request, answer]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(answer.read_text())


@pytest.mark.parametrize("kind", WEIGHTS)
def test_widened_family_is_the_shipped_one(kind: str) -> None:
    wide = family(kind)
    for budget in ("full", "small"):
        wide.switch(budget)
        assert relative(wide.logits(text(200)), served(kind, budget).logits(text(200))) < 1e-7  # the root of 2 in fp32


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("budget", ["full", "small", "lists", "padded"])
def test_vllm_computes_what_the_family_computes(kind: str, budget: str, tmp_path: Path) -> None:
    nested = write_nested(tmp_path / "nested", widened(kind), wide_manifest(), tokenizer=TOKENIZER)
    schema = "list" if budget == "lists" else "uniform"
    said = ask_vllm(extract(nested, budget, tmp_path / budget, format="hf", hf_schema=schema))
    exact = family(kind)
    exact.switch(budget)
    for length, row in zip(LENGTHS, said["rows"], strict=True):
        tokens = text(length)
        wanted = exact.logits(tokens)[0, :-1].log_softmax(-1)
        of_row = wanted.gather(1, tokens[0, 1:, None])[:, 0]
        gap = float((torch.tensor(row["log_probabilities"]).double() - of_row).abs().max())
        same = sum(a == b for a, b in zip(row["best"], wanted.argmax(-1).tolist(), strict=True))
        print(f"vLLM {said['version']}, {kind} {budget}: {length} tokens within {gap:.1e}, likeliest same at {same}")
        assert gap < 1e-4
        assert same == length - 1
    prompts = [BPETokenizer().encode(words) for words in PROMPTS]
    assert said["prompts"] == prompts
    assert said["continued"] == [exact.generate(prompt, NEW_TOKENS)[0].tolist() for prompt in prompts]
