"""Layer forwards and seconds of depth ranking: every ablation from the embedding on, against reuse of activations.

    python benchmarks/ranking.py [--model FILE.json] [--samples N] [--min-layers N] [--repetitions N] [--output FILE]

Naive is the stock Megatron model without the left-out layers, from tokens to logits, compared with the kept logits of
the full model; reuse is `nemo_elastic.mcore.ranking.depth`, which restarts at kept activations and needs no logits.
Both rank the same samples in the same process, in turns, and must remove the same layers. Times are the least of the
repetitions; `cpu` ones are CPU seconds of the process, which other work on the machine disturbs less.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from harness import finish, interleaved, least, parser, start

from nemo_elastic.config.model_fields import architecture_of
from nemo_elastic.config.parent_files import ASSETS
from nemo_elastic.importance.depth import DepthProgress, DepthRules, rank_by, rank_greedy
from nemo_elastic.mcore.models.build import build_plain_model, load_weights
from nemo_elastic.mcore.models.parents import open_parent
from nemo_elastic.mcore.ranking.depth import DepthAblation
from nemo_elastic.mcore.runtime import process_groups
from nemo_elastic.space.architecture import Architecture
from nemo_elastic.space.layout import ParamLayout

REQUIRED_RATIO = 1.8


class Naive:
    """Depth scores by running the stock model with the layers taken out."""

    def __init__(self, model: torch.nn.Module, batches: Sequence[torch.Tensor], depth: int) -> None:
        self.model, self.batches, self.depth, self.layer_forwards = model, batches, depth, 0
        self.full = [self.logits(tokens, ()) for tokens in batches]
        self.energy = sum(logits.double().square().sum().item() for logits in self.full)

    @torch.no_grad()
    def logits(self, tokens: torch.Tensor, removed: Sequence[int]) -> torch.Tensor:
        stock = self.model.decoder.layers
        self.model.decoder.layers = torch.nn.ModuleList(m for n, m in enumerate(stock) if n not in removed)
        self.layer_forwards += len(self.model.decoder.layers)
        try:
            return self.model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)
        finally:
            self.model.decoder.layers = stock

    def score(self, removed: Sequence[int], candidates: Sequence[int]) -> dict[int, float]:
        scores = {}
        for candidate in candidates:
            errors = [
                (full - self.logits(tokens, (*removed, candidate))).double().square().sum().item()
                for tokens, full in zip(self.batches, self.full, strict=True)
            ]
            scores[candidate] = sum(errors) / self.energy
        return scores


def compare(method: str, model: torch.nn.Module, batches: list[torch.Tensor], rules: DepthRules, args) -> dict:
    depth = len(rules.pattern)
    progress: dict[str, DepthProgress] = {}
    forwards: dict[str, int] = {}

    def naive() -> None:
        ranker = Naive(model, batches, depth)
        if method == "greedy":
            progress["naive"] = rank_greedy(ranker.score, rules)
        else:
            progress["naive"] = rank_by(ranker.score((), range(depth)), rules)
        forwards["naive"] = ranker.layer_forwards

    def reuse() -> None:
        ranker = DepthAblation(model, batches, rules, memory_bytes=args.memory_gb * 1024**3, metric="mse")
        progress["reuse"] = getattr(ranker, method)()
        forwards["reuse"] = ranker.layer_forwards

    seconds = interleaved({"naive": naive, "reuse": reuse}, args.repetitions, warm_up=False)
    best = {name: least(found) for name, found in seconds.items()}
    return {
        "layer_forwards_ratio": forwards["naive"] / forwards["reuse"],
        "time_ratio": best["naive"].wall / best["reuse"].wall,
        "cpu_time_ratio": best["naive"].cpu / best["reuse"].cpu,
        "same_ranking": progress["naive"].removed == progress["reuse"].removed,
        "removed": progress["naive"].removed,
        **{
            name: {"layer_forwards": forwards[name], "seconds": best[name].wall, "cpu_seconds": best[name].cpu}
            for name in best
        },
    }


def parent(args) -> tuple[Architecture, torch.nn.Module]:
    """The shipped parent, or random weights of the sizes in a JSON file of `model` fields."""
    path = Path(args.model) if args.model else ASSETS / "tiny_parent" / "config.json"
    architecture = architecture_of(json.loads(path.read_text()))
    process_groups.start()
    model = build_plain_model(architecture).eval()
    if not args.model:
        load_weights(model, open_parent("builtin:tiny_parent", ParamLayout(architecture)), architecture)
    return architecture, model


def main() -> int:
    words = parser(__doc__, quick="two short samples, few layers removed: that it runs", repetitions=3)
    words.add_argument("--model", help="JSON of model fields (random weights); default: the shipped parent")
    words.add_argument("--samples", type=int, default=4)
    words.add_argument("--micro-batch-size", type=int, default=2)
    words.add_argument("--seq-length", type=int, default=256)
    words.add_argument("--min-layers", type=int, help="depth at which greedy stops; default: half")
    words.add_argument("--memory-gb", type=float, default=1.0)
    args = start(words)
    if args.quick:
        args.samples, args.seq_length, args.min_layers = 2, 32, 14
    architecture, model = parent(args)
    depth = architecture.num_layers
    rules = DepthRules(pattern=architecture.hybrid_override_pattern, min_layers=args.min_layers or depth // 2)
    generator = torch.Generator().manual_seed(0)
    shape = (args.samples // args.micro_batch_size, args.micro_batch_size, args.seq_length)
    batches = list(torch.randint(0, architecture.vocab_size, shape, generator=generator))
    result = {
        "layers": depth,
        "min_layers": rules.min_layers,
        "samples": args.samples,
        "micro_batch_size": args.micro_batch_size,
        "seq_length": args.seq_length,
        "memory_gb": args.memory_gb,
        "model": args.model or "shipped parent",
        "required_layer_forwards_ratio": REQUIRED_RATIO,
        **{method: compare(method, model, batches, rules, args) for method in ("one_shot", "greedy")},
    }
    met = all(result[m]["layer_forwards_ratio"] >= REQUIRED_RATIO for m in ("one_shot", "greedy")) or depth < 16
    same = all(result[m]["same_ranking"] for m in ("one_shot", "greedy"))
    result["met"] = met and same
    return finish(args, result)


if __name__ == "__main__":
    raise SystemExit(main())
