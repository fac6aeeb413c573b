"""Which experts a child should keep: held-out loss of untrained children by REAP, by router frequency, in random order.

    python benchmarks/expert_ranking.py [--parent DIR] [--counts 12,10,8] [--draws N] [--windows N] [--samples N]
                                        [--quick] [--output FILE]

On the shipped parent with experts. A draw is of the calibration samples (REAP and frequency are measured on them) and
of the random order. Every order is dealt to groups as `rank` does, and nothing but the number of experts is cut. REAP
is the mean over the tokens of an expert of weight x norm of its output; frequency is how many tokens it has. Exit code
1 where REAP does not end below both, on the mean of the draws, at every count.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from harness import finish, listed, parser, start

from nemo_elastic.config.model_fields import architecture_of
from nemo_elastic.config.parent_files import ASSETS
from nemo_elastic.data.tokenizer import BPETokenizer
from nemo_elastic.data.tokens import load_tokens
from nemo_elastic.data.windows import Windows
from nemo_elastic.importance.ranking import Orders, random_orders, width_orders
from nemo_elastic.importance.sorting import sort_tensors
from nemo_elastic.kinds.experts import COUNT
from nemo_elastic.mcore.elastic.plan import hard_plan
from nemo_elastic.mcore.kernels.routing import Router
from nemo_elastic.mcore.models.build import build_elastic_model, build_plain_model, load_weights
from nemo_elastic.mcore.models.parents import open_parent, whole_state
from nemo_elastic.mcore.ranking.collect import collect_widths
from nemo_elastic.mcore.runtime import process_groups
from nemo_elastic.space.elastic_space import ElasticSpace
from nemo_elastic.space.layout import ParamLayout

GROUPS, BATCH = 2, 8
ORDERS = ("reap", "frequency", "random")


class Study:
    """The parent, its held-out windows, and the loss of any child in any order."""

    def __init__(self, args: argparse.Namespace) -> None:
        model = json.loads((args.parent / "config.json").read_text(encoding="utf-8"))
        self.args, self.architecture = args, architecture_of(model)
        self.layout = ParamLayout(self.architecture, ffn_groups=GROUPS)
        process_groups.start()
        self.weights = whole_state(open_parent(str(args.parent), self.layout), torch.float32)
        self.plain, self.elastic = build_plain_model(model).eval(), build_elastic_model(model, ffn_groups=GROUPS).eval()
        load_weights(self.plain, self.weights, self.architecture, ffn_groups=GROUPS)
        self.space = ElasticSpace(architecture=self.architecture, ffn_groups=GROUPS)
        self.text = {split: load_tokens(split, BPETokenizer()) for split in ("train", "heldout")}
        heldout = Windows(self.text["heldout"], args.seq_length, shuffle=False)
        places = [i * heldout.per_epoch // args.windows for i in range(args.windows)]
        rows = [heldout.sample(place) for place in places]
        self.heldout = [torch.stack([torch.from_numpy(row[n]) for row in rows]) for n in (0, 1)]
        load_weights(self.elastic, self.weights, self.architecture, ffn_groups=GROUPS)
        self.parent_loss = self.loss(self.architecture.num_moe_experts)

    @torch.no_grad()
    def losses(self, orders: Orders | None) -> dict[str, float]:
        """Held-out nats per token by number of experts kept, of the parent sorted by `orders`."""
        found = self.weights if orders is None else dict(sort_tensors(self.weights.items(), self.layout, orders))
        load_weights(self.elastic, found, self.architecture, ffn_groups=GROUPS)
        return {str(n): self.loss(n) for n in self.args.counts}

    @torch.no_grad()
    def loss(self, experts: int) -> float:
        """Of the first so many experts of the model as it is loaded."""
        plan = hard_plan(self.layout, self.space.subnet(**{COUNT: experts}), "sliced")
        total = 0.0
        for tokens, labels in zip(*(part.split(BATCH) for part in self.heldout), strict=True):
            total += self.elastic(tokens, None, None, labels=labels, elastic=plan).double().mean(1).sum().item()
        return total / len(self.heldout[0])

    def scores(self, draw: int) -> dict[str, Orders]:
        """Orders of the experts by what was measured on the calibration samples of a draw, and a random one."""
        train = Windows(self.text["train"], self.args.seq_length, seed=draw)
        batches = [torch.from_numpy(train.batch(n, BATCH)[0]) for n in range(0, self.args.samples, BATCH)]
        reap = {COUNT: collect_widths(self.plain, batches, self.layout)[COUNT]}
        tokens = {COUNT: self.tokens(batches)}
        by = {"reap": width_orders(reap, self.layout), "frequency": width_orders(tokens, self.layout)}
        return by | {"random": random_orders(self.layout, [COUNT], torch.Generator().manual_seed(draw))}

    @torch.no_grad()
    def tokens(self, batches: Sequence[torch.Tensor]) -> dict[int, torch.Tensor]:
        """Per layer the tokens of every expert."""
        found = {}
        for layer in self.plain.decoder.layers:
            for router in (module for module in layer.modules() if isinstance(module, Router)):
                router.tally = found[layer.layer_number - 1] = torch.zeros(router.weight.shape[0], dtype=torch.int64)
        for batch in batches:
            self.plain(batch, None, None)
        return {number: counts.double() for number, counts in found.items()}


def summary(draws: Sequence[Mapping[str, Any]], counts: Sequence[int]) -> dict[str, Any]:
    """Per number of experts the mean and spread of every order, and in how many draws REAP is below another one."""
    found: dict[str, Any] = {}
    for n in map(str, counts):
        rows = {order: [draw[order][n] for draw in draws] for order in ORDERS}
        found[n] = {
            order: {"mean": statistics.mean(row), "stdev": statistics.stdev(row) if len(row) > 1 else 0.0}
            for order, row in rows.items()
        }
        for other in ORDERS[1:]:
            pairs = list(zip(rows["reap"], rows[other], strict=True))
            found[n][f"reap_over_{other}"] = statistics.mean(a / b for a, b in pairs)
            found[n][f"draws_below_{other}"] = sum(a < b for a, b in pairs)
    return found


def main() -> int:
    words = parser(__doc__, quick="one draw, two windows, one count: that it runs")
    words.add_argument("--parent", type=Path, default=ASSETS / "tiny_experts", help="weights and sizes")
    words.add_argument("--counts", type=listed(int), default=[12, 10, 8], help="of experts to keep")
    words.add_argument("--draws", type=int, default=5)
    words.add_argument("--windows", type=int, default=64, help="held-out windows, spread over the split")
    words.add_argument("--samples", type=int, default=64, help="calibration samples, from the training split")
    words.add_argument("--seq-length", type=int, default=256)
    args = start(words)
    if args.quick:
        args.counts, args.draws, args.windows, args.samples, args.seq_length = [8], 1, 2, 8, 32
    study = Study(args)
    first, draws = study.losses(None), []
    for draw in range(args.draws):
        draws.append({order: study.losses(orders) for order, orders in study.scores(draw).items()})
        print(f"draw {draw}: {json.dumps(draws[-1])}", file=sys.stderr, flush=True)
    counts = summary(draws, args.counts)
    below = [row[f"reap_over_{other}"] <= 1.0 for row in counts.values() for other in ORDERS[1:]]
    result = {
        "parent": args.parent.name,
        "weights_sha256": hashlib.sha256((args.parent / "model.safetensors").read_bytes()).hexdigest(),
        "settings": {n: getattr(args, n) for n in ("counts", "draws", "windows", "samples", "seq_length", "threads")},
        "parent_loss": study.parent_loss,
        "first": first,
        "draws": draws,
        "counts": counts,
        "limits": {"reap_over_others": 1.0},
        "met": all(below),
    }
    return finish(args, result)


if __name__ == "__main__":
    raise SystemExit(main())
