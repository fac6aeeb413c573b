"""A family served from one copy of its weights: memory, time of a switch, speed by views and from a compact copy.

    python benchmarks/serving.py [--quick] [--device cuda] [--repetitions 5] [--threads 1] [--output FILE]

Two families, fp32 on the CPU (on a GPU bf16), neither of them trained: `tiny` is the shipped parent through a nested
checkpoint on disk, `wide` is a random parent (`--quick` leaves it out). Per budget: time of a prefill (256 tokens)
and of a decoded token, by views (`views`) and from one compact copy of the child (`compact`); both take turns, least
of the repetitions. A switch is timed alone and with the first token behind it. How much of what its FLOPs promise a
child's decoding gains over the parent's (`wide`) is taken by steps of fixed memory, CPU time, all budgets in turn token
by token, medians: `compact_share` is child and parent both compact, `views_share` both by views. Memory is that of the
tensors, and (`wide`) the resident set of processes of their own that hold the parent alone, the family after running
every budget, or one model per budget.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch
from harness import finish, memory_bytes, parser, start, timer

from nemo_elastic.checkpoint.extract import child_architecture, child_tensors, plain_model
from nemo_elastic.checkpoint.manifest import Manifest
from nemo_elastic.checkpoint.reader import MemoryReader
from nemo_elastic.config import load_config
from nemo_elastic.config.model_fields import architecture_of
from nemo_elastic.cost.counts import flops, parameters
from nemo_elastic.mcore.models.parents import open_parent, whole_state
from nemo_elastic.serving import ElasticFamily
from nemo_elastic.space.budget import Budget
from nemo_elastic.space.elastic_space import ElasticSpace
from nemo_elastic.space.layout import ParamLayout

GOALS = {"memory_ratio_to_parent": 1.02, "switch_ms": 50.0, "decode_share": 0.8}
FRACTIONS = {"full": 1.0, "large": 0.75, "small": 0.5}
CUTS = {
    "large": {"hidden_size": 0.875, "ffn_hidden_size": 0.75, "mamba_num_heads": 0.75, "num_attention_heads": 0.75},
    "small": {"hidden_size": 0.75, "ffn_hidden_size": 0.5, "mamba_num_heads": 0.5, "num_attention_heads": 0.5},
}
WIDE = {
    "hybrid_override_pattern": "M-M*-M-M*-",
    "hidden_size": 1024,
    "ffn_hidden_size": 4096,
    "num_attention_heads": 16,
    "num_query_groups": 4,
    "kv_channels": 64,
    "mamba_num_heads": 32,
    "mamba_head_dim": 64,
    "mamba_num_groups": 8,
    "mamba_state_dim": 128,
    "vocab_size": 16384,
    "seq_length": 4096,
}


def family_of(model: dict) -> Manifest:
    """Budgets full, large and small of a parent: every width cut, no layer dropped."""
    space = ElasticSpace(architecture=architecture_of(model))
    sizes = {name: {dim: int(part * model[dim]) for dim, part in cut.items()} for name, cut in CUTS.items()}
    subnets = {"full": space.full_subnet(), **{name: space.subnet(**cut) for name, cut in sizes.items()}}
    budgets = {name: Budget(name=name, kind="fraction", value=value) for name, value in FRACTIONS.items()}
    return Manifest(model=model, space=space, budgets=budgets, subnets=subnets)


def tiny(device: str, dtype: torch.dtype) -> ElasticFamily:
    """The shipped parent, through a nested checkpoint."""
    from nemo_elastic.nemo.export.nested import write_nested
    from nemo_elastic.nemo.plain import cpu

    cpu.install()
    model = dict(load_config("tiny_parent.yaml").config.model)
    manifest = family_of(model)
    with tempfile.TemporaryDirectory() as folder:
        weights = whole_state(open_parent("builtin:tiny_parent", manifest.layout))
        write_nested(Path(folder) / "nested", weights, manifest)
        return ElasticFamily.load(Path(folder) / "nested", device=device, dtype=dtype)


def wide(manifest: Manifest, device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Random weights, on a GPU drawn by it: two thousand million of them take a CPU 20 seconds."""
    home = torch.device(device if device.startswith("cuda") else "cpu")
    generator = torch.Generator(home).manual_seed(0)
    found = {}
    for name, spec in manifest.layout.table.items():
        found[name] = torch.randn(spec.shape({}), generator=generator, device=home) * 0.02
        if name.endswith("norm.weight"):
            found[name] += 1
        found[name] = found[name].to(device, dtype)
    return found


def measure(family: ElasticFamily, repetitions: int, decoded: int, prompt: int) -> dict:
    """Speed and memory of every budget."""
    tokens, timed = torch.randint(0, family.layout.architecture.vocab_size, (1, prompt)), timer(family.device)
    parent = family.memory_bytes()["weights"]
    answers = {}
    for name, subnet in family.subnets.items():
        times: dict[str, list[float]] = {}
        memory = {}
        for _ in range(repetitions):
            for kind in ("views", "compact"):
                alone = timed(lambda n=name, k=kind: family.switch(n, compact=k == "compact")).wall
                first = timed(lambda: family.logits(tokens[:, :1])).wall
                memory[kind] = family.memory_bytes()["active"]
                prefill = timed(lambda: family.logits(tokens, last_only=True)).wall
                cache = family.new_cache()
                family.logits(tokens, cache, last_only=True)
                decode = timed(lambda c=cache: [family.logits(tokens[:, :1], c) for _ in range(decoded)]).wall / decoded
                for what, value in (("switch", alone), ("switch_and_first_token", alone + first)):
                    times.setdefault(f"{kind}_{what}_ms", []).append(1e3 * value)
                times.setdefault(f"{kind}_prefill_ms", []).append(1e3 * prefill)
                times.setdefault(f"{kind}_token_ms", []).append(1e3 * decode)
        answers[name] = {
            "parameters": parameters(family.layout, subnet),
            **{key: round(min(found), 3) for key, found in times.items()},
            "slowest_switch_ms": round(max(times["views_switch_ms"]), 3),
            "views_memory_ratio_to_parent": round(1 + memory["views"] / parent, 5),
            "compact_memory_ratio_to_parent": round(1 + memory["compact"] / parent, 5),
        }
    size = next(iter(family.weights.values())).element_size()
    children = sum(size * parameters(family.layout, s) for s in family.subnets.values())
    return {
        "parent_mb": round(parent / 1e6, 2),
        "separate_children_ratio_to_parent": round(children / parent, 4),
        "budgets": answers,
    }


def decoding(family: ElasticFamily, turns: int) -> dict:
    """Tokens per second of every budget, and its gain over the parent as a share of what FLOPs promise."""
    timed, token = timer(family.device), torch.zeros(1, 1, dtype=torch.int64)
    full = max(family.subnets, key=lambda name: parameters(family.layout, family.subnets[name]))
    steps, times = {}, {}
    for name in family.subnets:
        for kind in ("views", "compact"):
            family.switch(name, compact=kind == "compact")
            steps[name, kind] = family.decode_step(room=turns + 2)
    for turn in range(turns + 2):
        for which, step in steps.items():
            taken = timed(lambda s=step: s(token)).cpu
            if turn >= 2:
                times.setdefault(which, []).append(taken)
    seconds = {which: median(found) for which, found in times.items()}
    work = {name: flops(family.layout, subnet, sequence_length=1) for name, subnet in family.subnets.items()}
    found = {}
    for name in family.subnets:
        promised = work[full] / work[name]
        found[name] = {"flops_ratio": round(promised, 4)}
        for kind in ("views", "compact"):
            gained = seconds[full, kind] / seconds[name, kind]
            found[name][f"{kind}_tokens_per_s"] = round(1 / seconds[name, kind], 2)
            found[name][f"{kind}_share"] = round(gained / promised, 4)
    return found


def hold(what: str) -> float:
    """MB that a process holds after running `parent` alone, every budget of a `family`, or `separate` models."""
    manifest, tokens = family_of(WIDE), torch.zeros(1, 16, dtype=torch.int64)
    before = memory_bytes("VmRSS")
    weights = wide(manifest)
    alive = []
    if what == "separate":
        for subnet in manifest.subnets.values():
            architecture = child_architecture(manifest.space.architecture, subnet)
            cut = child_tensors(MemoryReader(weights), manifest.layout, subnet)
            alone = {"full": ElasticSpace(architecture=architecture).full_subnet()}
            own = ParamLayout(architecture, ffn_groups=manifest.layout.groups)
            alive.append(ElasticFamily({t.name: t.read() for t in cut}, own, plain_model(WIDE, architecture), alone))
        del weights, cut
    else:
        alive.append(ElasticFamily(weights, manifest.layout, WIDE, manifest.subnets))
    for served in alive:
        for name in served.budgets if what != "parent" else ("full",):
            served.switch(name)
            served.logits(tokens)
    return (memory_bytes("VmRSS") - before) / 2**20


def main() -> int:
    """Measure, print."""
    words = parser(__doc__, quick="the shipped parent only, once: that it runs", repetitions=5, device=True)
    words.add_argument("--hold", choices=("parent", "family", "separate"), help=argparse.SUPPRESS)
    arguments = start(words)
    torch.manual_seed(0)
    if arguments.hold:
        print(hold(arguments.hold))
        return 0
    repetitions, result = arguments.repetitions, {"goals": GOALS}
    where = (arguments.device, torch.bfloat16 if arguments.device == "cuda" else torch.float32)
    result["tiny"] = measure(tiny(*where), repetitions, 4 if arguments.quick else 32, 64 if arguments.quick else 256)
    if not arguments.quick:
        manifest = family_of(WIDE)
        served = ElasticFamily(wide(manifest, *where), manifest.layout, WIDE, manifest.subnets)
        result["wide"] = measure(served, repetitions, 8, 256)
        result["wide"]["decoding"] = decoding(served, 20 * repetitions)
        del served
        resident = {}
        for what in ("parent", "family", "separate"):
            command = [sys.executable, __file__, "--hold", what, "--threads", str(arguments.threads)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            resident[what] = round(float(done.stdout.split()[-1]), 1)
        result["wide"]["resident_mb"] = resident
        result["wide"]["resident_ratio_to_parent"] = {k: round(v / resident["parent"], 4) for k, v in resident.items()}
    budgets = result["tiny"]["budgets"].values()
    worst = {
        "memory_ratio_to_parent": max(b["views_memory_ratio_to_parent"] for b in budgets),
        "switch_ms": max(b["views_switch_and_first_token_ms"] for b in budgets),
    }
    met = all(value <= GOALS[key] for key, value in worst.items())
    if not arguments.quick:
        worst["decode_share"] = min(row["compact_share"] for row in result["wide"]["decoding"].values())
        met = met and worst["decode_share"] >= GOALS["decode_share"]
    return finish(arguments, {**worst, "met": met, **result})


if __name__ == "__main__":
    raise SystemExit(main())
