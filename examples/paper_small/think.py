"""Think small, answer full: held-out problems solved by every pair of budgets, and what each pair costs.

    python examples/paper_small/think.py --out runs/paper_small --nested runs/paper_small/nested/greedy-best-4
    python examples/paper_small/think.py --draw           # docs/think.png, and the tables of docs/serving.md to copy

The first budget writes the chain, to the `= ` that begins the answer's line; the second one writes the answer. Solved
is a problem whose answer is right, whatever the chain. FLOPs are those of matrix products (`cost.flops`), per problem:

    decoded    one token at a time, each of which reads all weights: what a reader waits for
    filled     the prompt by the first budget; by the second one, if it is another, all tokens so far, at once

A decoded token counts as a sequence of one: attention to what lies before it is left out. `reused`: the second budget
goes on from the first one's caches instead (a layer that the first one lacks remembers nothing).
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from problems import Problem, scored_problems

from nemo_elastic.cost.counts import flops, parameters
from nemo_elastic.data.tokenizer import BPETokenizer
from nemo_elastic.files import write_json
from nemo_elastic.serving import ElasticFamily, Request, complete, think_then_answer
from nemo_elastic.serving.decode import Cache
from nemo_elastic.serving.requests import Completion

HERE = Path(__file__).resolve().parent
RESULT, FIGURE = HERE / "think.json", HERE.parents[1] / "docs" / "think.png"
MARK = "\n= "
MOST = 80  # tokens; the longest completion has fewer


def request(problem: Problem, tokenizer: BPETokenizer, think: str, answer: str) -> Request:
    """A problem as training shows it, behind the end of the text before."""
    prompt = [tokenizer.eod, *tokenizer.encode(problem.question + "\n")]
    phases = think_then_answer(think, answer, until=MARK)
    return Request(prompt=prompt, phases=phases, max_new_tokens=MOST, stop=(tokenizer.eod,))


def answered(text: str, problem: Problem) -> bool:
    """Whether the text ends in the right answer."""
    return text.rpartition("= ")[2] == problem.answer


def filling(family: ElasticFamily, budget: str, tokens: int) -> int:
    """FLOPs of so many tokens at once; logits of the last one only."""
    subnet, rows = family.subnets[budget], family.layout.architecture.vocab_size
    return flops(family.layout, subnet, sequence_length=tokens) - 2 * (tokens - 1) * subnet.hidden_size * rows


def pair(
    family: ElasticFamily, problems: Sequence[Problem], asked: Sequence[Request], found: Sequence[Completion]
) -> dict[str, Any]:
    """Problems solved by two budgets, and what it took per problem."""
    think, answer = (phase.budget for phase in asked[0].phases)
    right = sum(answered(done.text, problem) for done, problem in zip(found, problems, strict=True))
    totals = {"thought": 0, "answered": 0, "decoded": 0, "filled": 0}
    for one, done in zip(asked, found, strict=True):
        first, second = [part.tokens for part in done.parts] + [0] * (2 - len(done.parts))
        totals["thought"] += first
        totals["answered"] += second
        # The first token of a phase comes out of the filling; where the budget stays, nothing is filled again.
        refilled = think != answer and second > 0
        totals["filled"] += filling(family, think, len(one.prompt))
        totals["filled"] += filling(family, answer, len(one.prompt) + first) if refilled else 0
        totals["decoded"] += (first - 1) * flops(family.layout, family.subnets[think], sequence_length=1)
        totals["decoded"] += (second - refilled) * flops(family.layout, family.subnets[answer], sequence_length=1)
    return {"solved": right / len(problems), **{name: value / len(problems) for name, value in totals.items()}}


def carried(family: ElasticFamily, first: str, cache: Cache, second: str) -> Cache:
    """What `second`, the active budget, would remember if it took over the caches of `first`.

    Raises:
        ValueError: a layer of both remembers tensors of other sizes.
    """
    kept = {layer: cache.layers[place] for place, layer in enumerate(family.subnets[first].layers)}
    new = family.new_cache(cache.batch)
    for place, layer in enumerate(family.subnets[second].layers):
        if kept.get(layer) is None:
            continue
        for name, value in vars(new.layers[place]).items():
            given = getattr(kept[layer], name)
            grows = name in ("keys", "values")  # attention's room is not its size
            if isinstance(value, torch.Tensor) and not grows and value.shape != given.shape:
                raise ValueError(f"layer {layer} has {name} {list(given.shape)} in {first}, {list(value.shape)} here")
            setattr(new.layers[place], name, given.clone() if isinstance(given, torch.Tensor) else given)
    new.length = cache.length
    return new


@torch.inference_mode()
def reused(
    family: ElasticFamily, problems: Sequence[Problem], tokenizer: BPETokenizer, think: str, answer: str
) -> dict[str, Any]:
    """The logits behind the chain, from a cache that was filled anew and from one that was taken over."""
    asked = [request(problem, tokenizer, think, think) for problem in problems]
    chains = complete(family, asked, compact=True)
    seen = [[*one.prompt, *done.tokens[: done.parts[0].tokens]] for one, done in zip(asked, chains, strict=True)]
    caches = []
    family.switch(think, compact=True)
    for tokens in seen:
        caches.append(family.new_cache())
        family.logits(torch.tensor([tokens[:-1]]), caches[-1], last_only=True)
    own = [family.logits(torch.tensor([tokens]), last_only=True)[0, -1] for tokens in seen]
    family.switch(answer, compact=True)
    taken = [carried(family, think, cache, answer) for cache in caches]
    anew = [family.logits(torch.tensor([tokens]), last_only=True)[0, -1] for tokens in seen]
    over = [family.logits(torch.tensor([t[-1:]]), c)[0, -1] for t, c in zip(seen, taken, strict=True)]
    right = 0
    for problem, logits, cache in zip(problems, over, taken, strict=True):
        new = [int(logits.argmax())]
        while new[-1] != tokenizer.eod and len(new) < MOST:
            new.append(int(family.logits(torch.tensor([new[-1:]]), cache)[0, -1].argmax()))
        right += tokenizer.decode(new).strip() == problem.answer
    return {
        "reused": {**against(anew, over), "solved": right / len(problems)},
        "no_switch": against(anew, own),
        "moved": statistics_of([float((a - b).abs().max() / a.abs().max()) for a, b in zip(anew, over, strict=True)]),
    }


def against(wanted: Sequence[torch.Tensor], got: Sequence[torch.Tensor]) -> dict[str, float]:
    """Mean KL(wanted || got) in nats, and how often the likeliest token is the same."""
    a, b = (torch.stack(list(rows)).double().log_softmax(-1) for rows in (wanted, got))
    return {
        "kl": float((a.exp() * (a - b)).sum(-1).mean()),
        "top1": float((a.argmax(-1) == b.argmax(-1)).double().mean()),
    }


def statistics_of(values: Sequence[float]) -> dict[str, float]:
    """Mean and largest."""
    return {"mean": sum(values) / len(values), "largest": max(values)}


def score(family: ElasticFamily, problems: Sequence[Problem], tokenizer: BPETokenizer) -> dict[str, Any]:
    """Everything."""
    names = list(family.budgets)
    both, many = list(itertools.product(names, names)), len(problems)
    asked = [request(problem, tokenizer, a, b) for a, b in both for problem in problems]
    found = complete(family, asked, compact=True)  # all at once: rows that think alike share their forwards
    parts = {f"{a}>{b}": slice(i * many, (i + 1) * many) for i, (a, b) in enumerate(both)}
    pairs = {name: pair(family, problems, asked[part], found[part]) for name, part in parts.items()}
    full = max(names, key=lambda name: parameters(family.layout, family.subnets[name]))
    small = min(names, key=lambda name: parameters(family.layout, family.subnets[name]))
    return {
        "problems": len(problems),
        "parameters": {name: parameters(family.layout, family.subnets[name]) for name in names},
        "pairs": pairs,
        "switch": {"think": small, "answer": full, **reused(family, problems, tokenizer, small, full)},
    }


def table(result: Mapping[str, Any]) -> str:
    """The pairs, in Markdown."""
    lines = ["| thinks | answers | solved | decoded, MFLOPs | filled, MFLOPs |", "|---|---|---|---|---|"]
    for name, row in result["pairs"].items():
        think, answer = name.split(">")
        cost = f"{row['decoded'] / 1e6:.1f} | {row['filled'] / 1e6:.1f}"
        lines.append(f"| `{think}` | `{answer}` | {row['solved']:.1%} | {cost} |")
    return "\n".join(lines)


def switch_table(result: Mapping[str, Any]) -> str:
    """What the first token behind a switch is told from, in Markdown."""
    switch = result["switch"]
    again = result["pairs"][f"{switch['think']}>{switch['answer']}"]["solved"]
    stays = result["pairs"][f"{switch['think']}>{switch['think']}"]["solved"]
    rows = {
        f"`{switch['answer']}`, cache filled anew": (0.0, 1.0, again),
        f"`{switch['answer']}`, cache of `{switch['think']}` taken over": (
            *_numbers(switch["reused"]),
            switch["reused"]["solved"],
        ),
        f"`{switch['think']}`, no switch": (*_numbers(switch["no_switch"]), stays),
    }
    lines = ["| answers | KL, nats | same likeliest token | solved |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {kl:.3f} | {top:.1%} | {s:.1%} |" for name, (kl, top, s) in rows.items())])


def _numbers(row: Mapping[str, float]) -> tuple[float, float]:
    return row["kl"], row["top1"]


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Solved against FLOPs: those that a reader waits for, and all of them. The result's hash goes into the file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from figures import STYLE

    colours = dict(zip(result["parameters"], ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#666666"), strict=False))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
        for axis, parts in zip(axes, (("decoded",), ("decoded", "filled")), strict=True):
            for name, row in result["pairs"].items():
                think, answer = name.split(">")
                x = sum(row[part] for part in parts) / 1e6
                axis.scatter(x, 100 * row["solved"], color=colours[think], edgecolor=colours[answer], s=70, lw=2.5)
                axis.annotate(name, (x, 100 * row["solved"]), textcoords="offset points", xytext=(6, 5), fontsize=7)
            axis.margins(x=0.2, y=0.2)
        axes[0].set(xlabel="MFLOPs of decoded tokens, per problem", ylabel="problems solved, %")
        axes[1].set(xlabel="MFLOPs in all, filling and refilling too")
        figure.savefig(path, dpi=130, metadata={"Software": None, "Results": digest(result)})
        plt.close(figure)


def digest(result: Mapping[str, Any]) -> str:
    """SHA-256 of what is drawn."""
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()


def main() -> None:
    """Score, or draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the reproduction: its tokenizer")
    parser.add_argument("--nested", type=Path, help="nested checkpoint")
    parser.add_argument("--each", type=int, default=64, help="problems of every kind and size")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--draw", action="store_true", help="from the file at --output; nothing is scored")
    args = parser.parse_args()
    if args.draw:
        result = json.loads(args.output.read_text(encoding="utf-8"))
        draw(result, FIGURE if args.output == RESULT else args.output.with_suffix(".png"))
        print(f"{table(result)}\n\n{switch_table(result)}")
        return
    if args.out is None or args.nested is None:
        parser.error("give --out and --nested, or --draw")
    tokenizer = BPETokenizer(args.out / "data" / "tokenizer.json")
    family = ElasticFamily.load(args.nested, dtype=torch.float32)
    result = score(family, scored_problems(args.each), tokenizer)
    write_json(args.output, {"nested": args.nested.name, **result})


if __name__ == "__main__":
    main()
