"""What a ranking is worth: held-out loss of children that were never trained, by order of units and of layers.

    python benchmarks/ranking_quality.py [--parent DIR] [--dims DIM ...] [--windows N] [--orders N]
                                         [--quick] [--output FILE]

On the shipped parent, or another. For every width dim, and all of them together, at 0.9 / 0.75 / 0.5: the loss of the
child that keeps the first units of the parent sorted by each named choice of scores, of the parent as it is (`first`)
and of the parent in random orders. `all` keeps one fraction of every dim but Mamba's head dim, so that the child has
0.9 / 0.75 / 0.5 of the parent's parameters. For depth: the loss after removing 1 .. k layers by `greedy` and `one_shot`
(each by both metrics), `cosine`, the last layers and `random` (which keeps the first two layers, without which any
hybrid falls apart). Children run sliced, on the same held-out windows.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from harness import finish, parser, start

from nemo_elastic.config.model_fields import architecture_of
from nemo_elastic.config.parent_files import ASSETS
from nemo_elastic.cost.counts import parameters
from nemo_elastic.data.tokenizer import BPETokenizer
from nemo_elastic.data.tokens import load_tokens
from nemo_elastic.data.windows import Windows
from nemo_elastic.importance.depth import DepthRules, rank_by, rank_randomly
from nemo_elastic.importance.ranking import Orders, random_orders, width_orders
from nemo_elastic.importance.sorting import sort_tensors
from nemo_elastic.mcore.elastic.plan import hard_plan
from nemo_elastic.mcore.models.build import build_elastic_model, build_plain_model, load_weights
from nemo_elastic.mcore.models.parents import open_parent, whole_state
from nemo_elastic.mcore.ranking.collect import WidthSettings, collect_widths
from nemo_elastic.mcore.ranking.cosine import cosine_scores
from nemo_elastic.mcore.ranking.depth import DepthAblation
from nemo_elastic.mcore.runtime import process_groups
from nemo_elastic.space.dims import WIDTH_DIMS, dim_groups
from nemo_elastic.space.elastic_space import ElasticSpace
from nemo_elastic.space.layout import ParamLayout
from nemo_elastic.space.subnet import Subnet

FRACTIONS = (0.9, 0.75, 0.5)
# dim -> named choices of scores to compare; the first one is the default of `rank`.
CHOICES: dict[str, dict[str, dict[str, str]]] = {
    "hidden_size": {"mean_l2": {}, "l2_l2": {"aggregation": "l2_l2"}, "mean_mean": {"aggregation": "mean_mean"}},
    "ffn_hidden_size": {
        "linear_fc2_input": {},
        "linear_fc1_output": {"ffn_site": "linear_fc1_output"},
        "linear_fc2_input l2_l2": {"aggregation": "l2_l2"},
    },
    "mamba_num_heads": {
        "out_proj_contribution": {},
        "out_proj_input": {"mamba_site": "out_proj_input"},
        "in_proj_x": {"mamba_site": "in_proj_x"},
    },
    "mamba_head_dim": {
        "out_proj_contribution": {},
        "out_proj_input": {"mamba_site": "out_proj_input"},
        "in_proj_x": {"mamba_site": "in_proj_x"},
    },
    "num_attention_heads": {"mean_l2": {}, "l2_l2": {"aggregation": "l2_l2"}},
    "all": {
        "default": {},
        "out_proj_input": {"mamba_site": "out_proj_input"},
        "paper": {"ffn_site": "linear_fc1_output", "mamba_site": "in_proj_x"},
    },
}


class Study:
    """The parent, its held-out windows, and the loss of any child in any order."""

    def __init__(self, args: argparse.Namespace) -> None:
        folder = args.parent
        self.architecture = architecture_of(json.loads((folder / "config.json").read_text()))
        self.layout = ParamLayout(self.architecture)
        process_groups.start()
        self.weights = whole_state(open_parent(str(folder), self.layout), torch.float32)
        self.plain = build_plain_model(self.architecture).eval()
        load_weights(self.plain, self.weights, self.architecture)
        self.elastic = build_elastic_model(self.architecture).eval()
        self.space = ElasticSpace(architecture=self.architecture)
        tokenizer = BPETokenizer(folder / "tokenizer.json")
        heldout = Windows(load_tokens("heldout", tokenizer), args.seq_length, shuffle=False)
        stride = max(1, heldout.per_epoch // args.windows)
        self.heldout = [heldout.batch(i * stride, 1) for i in range(args.windows)]
        train = Windows(load_tokens("train", tokenizer), args.seq_length, seed=0)
        self.calibration = [
            torch.from_numpy(train.batch(first, 8)[0].astype("int64")) for first in range(0, args.samples, 8)
        ]
        self.losses: dict[str, float] = {}

    def load(self, orders: Orders | None) -> None:
        """Put the parent, in some order, into the elastic model."""
        tensors = self.weights if orders is None else dict(sort_tensors(self.weights.items(), self.layout, orders))
        load_weights(self.elastic, tensors, self.architecture)

    @torch.no_grad()
    def loss(self, subnet: Subnet) -> float:
        """Held-out nats per token of a child of the model as it is loaded."""
        plan, total, size = hard_plan(self.layout, subnet, "sliced"), 0.0, 8
        for at in range(0, len(self.heldout), size):
            part = self.heldout[at : at + size]
            tokens, labels = (torch.from_numpy(column(part, n)) for n in (0, 1))
            positions = torch.arange(tokens.shape[1]).expand_as(tokens)
            total += self.elastic(tokens, positions, None, labels=labels, elastic=plan).double().mean(1).sum().item()
        return total / len(self.heldout)

    def widths(self, choice: Mapping[str, str]) -> dict:
        return collect_widths(self.plain, self.calibration, self.layout, WidthSettings(**choice))


def column(part: list, n: int):
    import numpy as np

    return np.concatenate([pair[n] for pair in part]).astype("int64")


def only(orders: Orders, dims: tuple[str, ...]) -> Orders:
    """The orders of some dims."""
    return {layer: {d: o for d, o in by_dim.items() if d in dims} for layer, by_dim in orders.items()}


def child_of(study: Study, dim: str, fraction: float) -> Subnet:
    """One dim at a fraction; `all`: every width at the one fraction that leaves that part of the parameters."""
    arch, groups = study.architecture, dim_groups(study.architecture)

    def at(share: float, dims: tuple[str, ...]) -> Subnet:
        return study.space.subnet(**{d: max(1, round(share * getattr(arch, d) / groups[d])) * groups[d] for d in dims})

    if dim != "all":
        return at(fraction, (dim,))
    wanted = fraction * parameters(study.layout, study.space.full_subnet())
    uniform = tuple(d for d in WIDTH_DIMS if d != "mamba_head_dim")
    return min((at(s / 200, uniform) for s in range(60, 201)), key=lambda c: abs(parameters(study.layout, c) - wanted))


def width_study(study: Study, names: list[str], orders: int) -> dict:
    scores, results = {}, {}
    for dim, choices in ((dim, CHOICES[dim]) for dim in names):
        dims = WIDTH_DIMS if dim == "all" else (dim,)
        children = {f: child_of(study, dim, f) for f in FRACTIONS}
        children = {f: c for f, c in children.items() if c != study.space.full_subnet()}
        table: dict[str, dict] = {
            str(f): {"sizes": c.to_dict(), "sorted": {}, "random": []} for f, c in children.items()
        }
        study.load(None)
        for f, child in children.items():
            table[str(f)]["parameters"] = parameters(study.layout, child)
            table[str(f)]["first"] = study.loss(child)
        for name, choice in choices.items():
            key = json.dumps(choice, sort_keys=True)
            scores[key] = scores.get(key) or study.widths(choice)
            study.load(only(width_orders(scores[key], study.layout), dims))
            for f, child in children.items():
                table[str(f)]["sorted"][name] = study.loss(child)
        for seed in range(orders):
            study.load(random_orders(study.layout, dims, torch.Generator().manual_seed(seed)))
            for f, child in children.items():
                table[str(f)]["random"].append(study.loss(child))
        for row in table.values():
            mean, spread = statistics.mean(row["random"]), statistics.stdev(row["random"])
            row["random_mean"], row["random_stdev"] = mean, spread
            row["gain_over_random"] = {name: mean - value for name, value in row["sorted"].items()}
            row["beats_every_random"] = {name: value < min(row["random"]) for name, value in row["sorted"].items()}
        results[dim] = table
        print(f"{dim}: " + json.dumps({f: summary(r) for f, r in table.items()}), file=sys.stderr, flush=True)
    return results


def summary(row: dict) -> dict:
    sort = {name: round(value, 4) for name, value in row["sorted"].items()}
    return {**sort, "first": round(row["first"], 4), "random": f"{row['random_mean']:.4f}+-{row['random_stdev']:.4f}"}


def depth_study(study: Study, orders: int, most: int, samples: int) -> dict:
    depth = study.architecture.num_layers
    rules = DepthRules(pattern=study.architecture.hybrid_override_pattern, min_layers=depth - most)
    fair = DepthRules(pattern=rules.pattern, min_layers=depth - most, protected_layers=(0, 1))
    batches = study.calibration[: max(1, samples // 8)]

    def ablation(metric: str) -> DepthAblation:
        return DepthAblation(study.plain, batches, rules, memory_bytes=2**30, metric=metric)

    removed = {
        "greedy": ablation("centred_mse").greedy().removed,
        "greedy mse": ablation("mse").greedy().removed,
        "one_shot": ablation("centred_mse").one_shot().removed,
        "one_shot mse": ablation("mse").one_shot().removed,
        "cosine": rank_by(cosine_scores(study.plain, batches), rules).removed,
        "last": list(range(depth - 1, depth - 1 - most, -1)),
        **{f"random {seed}": rank_randomly(fair, seed).removed for seed in range(orders)},
    }
    study.load(None)
    kept = {name: [keep(depth, gone[:k]) for k in range(1, most + 1)] for name, gone in removed.items()}
    loss = {layers: study.loss(study.space.subnet(layers=layers)) for row in kept.values() for layers in row}
    losses = {name: [loss[layers] for layers in row] for name, row in kept.items()}
    drawn = [values for name, values in losses.items() if name.startswith("random")]
    losses["random"] = [statistics.mean(column) for column in zip(*drawn, strict=True)]
    named = [name for name in losses if not name.startswith("random ")]
    best = [min(named, key=lambda name: losses[name][k]) for k in range(most)]
    for name in named:
        print(f"depth {name}: {[round(v, 3) for v in losses[name]]}", file=sys.stderr, flush=True)
    return {"removed": removed, "loss": losses, "best": best, "greedy_is_best": [name == "greedy" for name in best]}


def keep(depth: int, gone: list[int]) -> tuple[int, ...]:
    return tuple(n for n in range(depth) if n not in gone)


def flags() -> argparse.ArgumentParser:
    words = parser(__doc__, quick="one dim, two windows, one layer: that it runs")
    words.add_argument("--parent", type=Path, default=ASSETS / "tiny_parent", help="weights, sizes, tokenizer")
    words.add_argument("--dims", nargs="*", choices=CHOICES, default=list(CHOICES))
    words.add_argument("--no-depth", action="store_true")
    words.add_argument("--windows", type=int, default=32, help="held-out windows, spread over the split")
    words.add_argument("--seq-length", type=int, default=256)
    words.add_argument("--samples", type=int, default=64, help="calibration samples, from the training split")
    words.add_argument("--depth-samples", type=int, default=32, help="those of them that rank layers")
    words.add_argument("--orders", type=int, default=5, help="random orders")
    words.add_argument("--most", type=int, default=8, help="layers to remove at most")
    return words


SETTINGS = ("dims", "no_depth", "windows", "seq_length", "samples", "depth_samples", "orders", "most", "threads")


def main() -> int:
    args = start(flags())
    if args.quick:
        args.dims, args.windows, args.seq_length, args.samples = ["ffn_hidden_size"], 2, 32, 8
        args.depth_samples, args.orders, args.most = 8, 2, 1
    study = Study(args)
    study.load(None)
    result = {
        "parent": args.parent.name,
        "weights_sha256": hashlib.sha256((args.parent / "model.safetensors").read_bytes()).hexdigest(),
        "parent_loss": study.loss(study.space.full_subnet()),
        "settings": {name: getattr(args, name) for name in SETTINGS},
        "widths": width_study(study, args.dims, args.orders),
        "depth": None if args.no_depth else depth_study(study, args.orders, args.most, args.depth_samples),
    }
    return finish(args, result)


if __name__ == "__main__":
    raise SystemExit(main())
