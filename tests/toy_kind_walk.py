"""A process that knows the toy kind of `toy_linear.py` and takes it through the package: toy_kind_walk.py FOLDER

It registers the kind first, writes a random parent with its layers, and leaves what it found in FOLDER/found.json for
`test_toy_kind.py` to judge. Nothing here touches a table or class of the package.
"""

import contextlib
import json
import os
import random
import sys
from pathlib import Path

from toy_linear import LINEAR, RANK

from nemo_elastic import kinds

kinds.register(LINEAR)  # before anything else of the package is imported

PATTERN = "ML-*LM-L"
CONFIG = """
name: toy
parent: {{path: {folder}/parent.safetensors}}
data: {{tokenizer: {tokenizer}, paths: [{folder}/text.txt], cache_dir: {folder}/cache}}
model: {model}
elastic:
  ffn_groups: 8
  dims:
    hidden_size: {{choices: [48, 40]}}
    {rank}: {{choices: [1.0, 0.75, 0.5, 0.25]}}
    num_layers: {{choices: [8, 7, 6]}}
  budgets: {{full: 1.0, small: 0.8, thin: 0.77}}
  subnets: {{thin: {{hidden_size: 40, {rank}: 8, num_layers: 7}}}}
rank: {{samples: 4, depth_samples: 2, seq_length: 32}}
router: {{shapes: learned, hidden_size: 16, warmup_fraction: 0.2, soft_fraction: 0.4, freeze_fraction: 0.2,
  tolerance: 0.02}}
train:
  micro_batch_size: 2
  optimizer: {{lr: 1.0e-3, min_lr: 1.0e-4, warmup_steps: 1}}
  stages: [{{steps: 5, seq_length: 32, global_batch_size: 4}}]
  val_samples: 4
"""


def command_line(folder: Path, *words: str) -> dict:
    """What a verb answers with --json, and says on stderr."""
    from nemo_elastic.cli.main import main

    answer, said = folder / "answer.txt", folder / "said.txt"
    with (
        answer.open("w") as out, said.open("w") as err, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
    ):  # fmt: skip
        code = main([*words, "--json"])
    return {"code": code, "errors": said.read_text(), **json.loads(answer.read_text() or "{}")}


def modes() -> dict:
    """Largest difference of the logits, in fp64, over random subnets: masked, soft and extracted against sliced; and
    the parameters of each child, counted and built.
    """
    import torch
    from pool_elastic import FFN_GROUPS, elastic_model, layout_of, one_hot_masks, random_weights, space_of, tokens
    from small_parent import architecture, random_subnet

    from nemo_elastic.checkpoint.extract import child_layout, child_tensors
    from nemo_elastic.cost.counts import parameters
    from nemo_elastic.mcore.elastic.plan import hard_plan, soft_plan
    from nemo_elastic.mcore.models.build import build_plain_model, load_weights

    arch = architecture(PATTERN, **{RANK: 32})
    layout, space, ids = layout_of(arch), space_of(arch), tokens(arch)
    weights, elastic = random_weights(arch, torch.float64), elastic_model(arch, torch.float64)
    draw, found, counted = random.Random(5), {"masked": 0.0, "soft": 0.0, "child": 0.0}, []
    subnets = [space.subnet(**{RANK: [8, 16, 32]}), *(random_subnet(space, draw) for _ in range(3))]
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    for subnet in subnets:
        plans = {m: hard_plan(layout, subnet, m) for m in ("sliced", "masked")}
        plans["soft"] = soft_plan(layout, space.full_subnet(), one_hot_masks(arch, subnet))
        with torch.no_grad():
            logits = {m: elastic(ids, positions, None, elastic=plan) for m, plan in plans.items()}
            if subnet.is_uniform(RANK):
                own = child_layout(layout, subnet)
                child = build_plain_model(own.architecture, params_dtype=torch.float64)
                tensors = {t.name: t.read() for t in child_tensors(Tensors(weights), layout, subnet)}
                load_weights(child, tensors, own.architecture, ffn_groups=FFN_GROUPS)
                logits["child"] = child(ids, positions, None)
                counted.append([parameters(layout, subnet), sum(p.numel() for p in child.parameters())])
        for mode in logits.keys() & found.keys():
            found[mode] = max(found[mode], (logits[mode] - logits["sliced"]).abs().max().item())
    return {"modes": found, "counted": counted, "ranks": [list(getattr(s, RANK)) for s in subnets]}


class Tensors:
    """A reader of tensors in memory."""

    def __init__(self, tensors: dict) -> None:
        self.tensors = tensors

    def names(self) -> list[str]:
        return list(self.tensors)

    def read(self, name: str):
        return self.tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str):
        return self.tensors[name].dtype


def sorting_and_ranking() -> dict:
    """Logits before and after sorting by random orders; collected scores beside those of the formula, by layer."""
    import torch
    from pool_elastic import FFN_GROUPS, layout_of, random_weights, tokens
    from small_parent import architecture

    from nemo_elastic.importance.ranking import random_orders
    from nemo_elastic.importance.sorting import sort_reader
    from nemo_elastic.mcore.models.build import build_plain_model, load_weights
    from nemo_elastic.mcore.ranking.collect import collect_widths
    from nemo_elastic.space.dims import WIDTH_DIMS

    arch = architecture(PATTERN, **{RANK: 32})
    layout, ids = layout_of(arch), tokens(arch)
    weights = random_weights(arch, torch.float64)
    orders = random_orders(layout, WIDTH_DIMS, torch.Generator().manual_seed(3))
    plain = build_plain_model(arch, params_dtype=torch.float64)
    positions, logits = torch.arange(ids.shape[1]).expand_as(ids), []
    for whole in (dict(sort_reader(Tensors(weights), layout, orders)), weights):
        load_weights(plain, whole, arch, ffn_groups=FFN_GROUPS)
        with torch.no_grad():
            logits.append(plain(ids, positions, None))
    seen = {}
    hooks = [
        layer.mlp.up.register_forward_pre_hook(lambda m, args, n=layer.layer_number - 1: seen.update({n: args[0]}))
        for layer in plain.decoder.layers
        if type(getattr(layer, "mlp", None)).__name__ == "Linear"
    ]
    scores = collect_widths(plain, [ids], layout)[RANK]
    for hook in hooks:
        hook.remove()
    formula = {n: a.abs().mean(0).square().sum(0).sqrt().tolist() for n, a in seen.items()}
    moved = sum(not torch.equal(w, s) for w, s in zip(weights.values(), dict(
        sort_reader(Tensors(weights), layout, orders)).values(), strict=True))  # fmt: skip
    return {
        "sorted": (logits[0] - logits[1]).abs().max().item(),
        "moved": moved,
        "scores": {n: s.tolist() for n, s in scores.items()},
        "formula": formula,
    }


def slots() -> dict:
    """Which layers the MLP's slot builds on either of two pipeline stages, by Megatron's number on the stage."""
    from types import SimpleNamespace

    from megatron.core.transformer.spec_utils import ModuleSpec, build_module

    from nemo_elastic.mcore.kernels.kind_modules import megatron_pattern, stack_submodules

    class Named:
        def __init__(self, kind: str, **given: object) -> None:
            self.kind = kind

    table = stack_submodules(lambda kind: ModuleSpec(module=Named, params={"kind": kind.name}), PATTERN)
    config, built = SimpleNamespace(num_layers=len(PATTERN)), {}
    for stage in range(2):
        groups = SimpleNamespace(pp=SimpleNamespace(rank=lambda stage=stage: stage, size=lambda: 2))
        for number in range(1, 5):
            layer = build_module(table.mlp_layer, config=config, layer_number=number, pg_collection=groups)
            built[f"{stage}.{number}"] = layer.kind
    return {"pattern": megatron_pattern(PATTERN), "slots": built, "mamba_slot": table.mamba_layer.params["kind"]}


def write_parent(folder: Path) -> Path:
    """A random parent, a text and a configuration."""
    from checkpoint_family import MODEL, TOKENIZER, random_weights
    from safetensors.torch import save_file

    model = MODEL | {"hybrid_override_pattern": PATTERN, RANK: 32, "seq_length": 32}
    save_file(random_weights(model), folder / "parent.safetensors")
    (folder / "text.txt").write_text("".join(f"line {i} says {i * i % 97} and {i**3 % 89}\n" for i in range(6000)))
    config = folder / "run.yaml"
    config.write_text(CONFIG.format(folder=folder, tokenizer=TOKENIZER, model=json.dumps(model), rank=RANK))
    return config


def main(folder: Path) -> None:
    """Plan, count, mask, slice, sort and rank; then the whole pipeline of the command line."""
    config = write_parent(folder)
    found = {"plan": command_line(folder, "plan", "--config", str(config))}
    from nemo_elastic.mcore.runtime import process_groups

    process_groups.start(1, 1)
    found |= modes() | sorting_and_ranking() | slots()
    run, hf = folder / "run", folder / "hf"
    found["run"] = command_line(folder, "quickstart", "--config", str(config), "--out", str(run))
    for name in ("RANK", "LOCAL_RANK"):  # of the run's process group
        os.environ.pop(name, None)
    words = ("--budget", "thin", "--format", "hf", "--out", str(hf))
    found["refused"] = command_line(folder, "extract", str(run / "nested"), *words)
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
