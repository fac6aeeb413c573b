"""Think small, answer full: held-out problems solved by every pair of budgets, and what each pair costs.

    python examples/paper_small/think.py --out runs/paper_small --nested runs/paper_small/nested/greedy-best-4
    python examples/paper_small/think.py --draw           # docs/think.png, and the tables of docs/serving.md to copy

The first budget writes the chain, to the `=` that begins the answer's line; the second one writes the answer. Solved
is a problem whose answer is right, whatever the chain. FLOPs are those of matrix products (`cost.flops`), per problem:

    decoded    one token at a time, each of which reads all weights: what a reader waits for
    filled     the prompt by the first budget; by the second one, if it is another, all tokens so far, at once

A decoded token counts as a sequence of one: attention to what lies before it is left out. `reused`: the second budget
goes on from the first one's caches instead (a layer that the first one lacks remembers nothing). Times are CPU time, of
one thread and one row, medians.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from problems import Problem, scored_problems
from series import machine
from think_page import draw, sentence, switch_table, table

from nemo_elastic.cost.counts import flops, parameters
from nemo_elastic.data.tokenizer import BPETokenizer
from nemo_elastic.files import write_json
from nemo_elastic.serving import ElasticFamily, Request, complete, think_then_answer
from nemo_elastic.serving.decode import Cache
from nemo_elastic.serving.requests import Completion

HERE = Path(__file__).resolve().parent
RESULT, FIGURE = HERE / "think.json", HERE.parents[1] / "docs" / "think.png"
MARK = "\n="  # a token's end; the blank behind it may be a part of the next one
TURNS = 31
MOST = 80  # tokens; the longest completion has fewer


def request(problem: Problem, tokenizer: BPETokenizer, think: str, answer: str) -> Request:
    """A problem as training shows it, behind the end of the text before."""
    prompt = [tokenizer.eod, *tokenizer.encode(problem.question + "\n")]
    phases = think_then_answer(think, answer, until=MARK)
    return Request(prompt=prompt, phases=phases, max_new_tokens=MOST, stop=(tokenizer.eod,))


def answered(text: str, problem: Problem) -> bool:
    """Whether the text ends in the right answer."""
    return text.rpartition(f"{MARK} ")[2] == problem.answer


def filling(family: ElasticFamily, budget: str, tokens: int) -> int:
    """FLOPs of so many tokens at once; logits of the last one only."""
    subnet, rows = family.subnets[budget], family.layout.architecture.vocab_size
    return flops(family.layout, subnet, sequence_length=tokens) - 2 * (tokens - 1) * subnet.hidden_size * rows


def pair(
    family: ElasticFamily, problems: Sequence[Problem], asked: Sequence[Request], found: Sequence[Completion]
) -> dict[str, Any]:
    """Problems solved by two budgets, and what it took per problem."""
    think, answer = (phase.budget for phase in asked[0].phases)
    right: dict[str, list[bool]] = {}
    for done, problem in zip(found, problems, strict=True):
        right.setdefault(problem.kind, []).append(answered(done.text, problem))
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
    return {
        "solved": sum(map(sum, right.values())) / len(problems),
        "kinds": {kind: sum(found) / len(found) for kind, found in right.items()},
        **{name: value / len(problems) for name, value in totals.items()},
    }


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
    family: ElasticFamily,
    problems: Sequence[Problem],
    asked: Sequence[Request],
    found: Sequence[Completion],
    tokenizer: BPETokenizer,
) -> dict[str, Any]:
    """Logits of the tokens of the answers, told from a cache filled anew and from one that was taken over."""
    think, answer = (phase.budget for phase in asked[0].phases)
    every = zip(asked, found, problems, strict=True)
    every = [row for row in every if len(row[1].parts) > 1]  # the others ended before any answer began
    rows = [([*one.prompt, *done.tokens], len(one.prompt) + done.parts[0].tokens) for one, done, _ in every]
    family.switch(think, compact=True)
    own, caches = [], []
    for tokens, start in rows:
        own.append(family.logits(torch.tensor([tokens[:-1]]))[0, start - 1 :])
        caches.append(family.new_cache())
        family.logits(torch.tensor([tokens[: start - 1]]), caches[-1], last_only=True)
    family.switch(answer, compact=True)
    anew, over, right = [], [], 0
    for (_, _, problem), (tokens, start), cache in zip(every, rows, caches, strict=True):
        anew.append(family.logits(torch.tensor([tokens[:-1]]))[0, start - 1 :])
        over.append(family.logits(torch.tensor([tokens[start - 1 : -1]]), carried(family, think, cache, answer))[0])
        taken, new = carried(family, think, cache, answer), [tokens[start - 1]]
        while len(new) == 1 or (new[-1] != tokenizer.eod and len(new) < MOST):
            new.append(int(family.logits(torch.tensor([new[-1:]]), taken)[0, -1].argmax()))
        text = tokenizer.decode([t for t in (*tokens[:start], *new[1:]) if t != tokenizer.eod])
        right += answered(text, problem)
    moved = [float((a - b).abs().max() / a.abs().max()) for a, b in zip(anew, over, strict=True)]
    return {
        "tokens": sum(map(len, anew)),
        "reused": {**against(anew, over), "solved": right / len(problems)},
        "no_switch": against(anew, own),
        "moved": {"mean": sum(moved) / len(moved), "largest": max(moved)},
    }


@torch.inference_mode()
def times(family: ElasticFamily, think: str, answer: str, length: int) -> dict[str, float]:
    """Milliseconds of a decoded token of either budget, and of filling a cache with `length` tokens."""
    tokens, found = torch.zeros(1, length, dtype=torch.int64), {}
    for name in (think, answer):
        family.switch(name, compact=True)
        spent: dict[str, list[float]] = {"filling": [], "token": []}
        for _ in range(TURNS):
            cache = family.new_cache()
            for what, given in (("filling", tokens), ("token", tokens[:, :1])):
                begin = time.process_time()
                family.logits(given, cache, last_only=True)
                spent[what].append(1e3 * (time.process_time() - begin))
        found |= {f"{name}_{what}_ms": round(median(values), 3) for what, values in spent.items()}
    return {"length": length, **found}


def against(wanted: Sequence[torch.Tensor], got: Sequence[torch.Tensor]) -> dict[str, float]:
    """Mean KL(wanted || got) in nats, and how often the likeliest token is the same."""
    a, b = (torch.cat(list(rows)).double().log_softmax(-1) for rows in (wanted, got))
    return {
        "kl": float((a.exp() * (a - b)).sum(-1).mean()),
        "top1": float((a.argmax(-1) == b.argmax(-1)).double().mean()),
    }


def score(family: ElasticFamily, problems: Sequence[Problem], tokenizer: BPETokenizer) -> dict[str, Any]:
    """Every pair of budgets on all problems, and the switch from the smallest to the largest."""
    names = list(family.budgets)
    both, many = list(itertools.product(names, names)), len(problems)
    asked = [request(problem, tokenizer, a, b) for a, b in both for problem in problems]
    found = complete(family, asked, compact=True)  # all at once: rows that think alike share their forwards
    parts = {f"{a}>{b}": slice(i * many, (i + 1) * many) for i, (a, b) in enumerate(both)}
    pairs = {name: pair(family, problems, asked[part], found[part]) for name, part in parts.items()}
    full = max(names, key=lambda name: parameters(family.layout, family.subnets[name]))
    small = min(names, key=lambda name: parameters(family.layout, family.subnets[name]))
    part = parts[f"{small}>{full}"]
    length = round(sum(len(one.prompt) for one in asked) / len(asked) + pairs[f"{small}>{full}"]["thought"])
    return {
        "problems": len(problems),
        "machine": machine(),
        "parameters": {name: parameters(family.layout, family.subnets[name]) for name in names},
        "pairs": pairs,
        "switch": {"think": small, "answer": full, **reused(family, problems, asked[part], found[part], tokenizer)},
        "times": times(family, small, full, length),
    }


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
        print(f"{table(result)}\n\n{switch_table(result)}\n\n{sentence(result)}")
        return
    if args.out is None or args.nested is None:
        parser.error("give --out and --nested, or --draw")
    tokenizer = BPETokenizer(args.out / "data" / "tokenizer.json")
    family = ElasticFamily.load(args.nested, dtype=torch.float32)
    result = score(family, scored_problems(args.each), tokenizer)
    write_json(args.output, {"nested": args.nested.name, **result})


if __name__ == "__main__":
    main()
