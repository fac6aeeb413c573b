"""Held-out loss and solved problems of every budget of a nested checkpoint, or of the parent.

Without NeMo and Megatron.

    python examples/paper_small/score.py --out runs/paper_small --weights runs/paper_small/parent --output parent.json
    python examples/paper_small/score.py --out runs/paper_small --weights .../nested --output run.json

    loss      nats per token of the completion: chain, answer and end of text
    solved    greedy decoding writes exactly the reference's chain and answer, and ends

The second is read off one forward: the likeliest token is the reference's at every place exactly when greedy decoding
writes the reference, by induction over its tokens. An answer that is right behind another chain does not count.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from problems import Problem, scored_problems

from nemo_elastic.checkpoint.safetensors_reader import SafetensorsReader
from nemo_elastic.config.model_fields import architecture_of
from nemo_elastic.data.tokenizer import BPETokenizer
from nemo_elastic.data.tokens import load_tokens
from nemo_elastic.data.windows import Windows
from nemo_elastic.files import write_json
from nemo_elastic.serving import ElasticFamily
from nemo_elastic.space.elastic_space import ElasticSpace
from nemo_elastic.space.layout import ParamLayout

BATCH = 16
Found = list[tuple[float, int, bool]]  # per problem


def load(folder: Path) -> ElasticFamily:
    """A nested checkpoint, or what `parent.py` wrote as a family of one."""
    if (folder / "elastic").is_dir():
        return ElasticFamily.load(folder, dtype=torch.float32)
    model = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    architecture = architecture_of(model)
    space = ElasticSpace(architecture=architecture, dims={}, ffn_groups=8)
    reader, layout = SafetensorsReader(folder), ParamLayout(architecture, ffn_groups=8)
    weights = {name: reader.read(name).float() for name in layout.table}
    return ElasticFamily(weights, layout, model, {"parent": space.full_subnet()})


@torch.inference_mode()
def window_loss(family: ElasticFamily, windows: Windows, count: int) -> float:
    """Mean cross entropy over `count` windows, evenly spread."""
    total = 0.0
    places = [i * windows.per_epoch // count for i in range(count)]
    for first in range(0, count, BATCH):
        tokens, labels = (torch.stack([torch.from_numpy(windows.sample(i)[k]) for i in places[first : first + BATCH]])
                          for k in (0, 1))  # fmt: skip
        total += F.cross_entropy(family.logits(tokens).flatten(0, 1), labels.flatten(), reduction="sum").item()
    return total / (count * windows.seq_length)


def ids_of(problem: Problem, tokenizer: BPETokenizer) -> tuple[list[int], int]:
    """Ids of end-of-text and the document between two of them, and how many of them belong to the question."""
    question = tokenizer.encode(problem.question + "\n")
    whole = tokenizer.encode(problem.text)
    if whole[: len(question)] != question:
        raise ValueError(f"the tokens of {problem.text!r} do not begin with those of its question")
    return [tokenizer.eod, *whole, tokenizer.eod], 1 + len(question)


@torch.inference_mode()
def solve(family: ElasticFamily, problems: Sequence[Problem], tokenizer: BPETokenizer) -> list[tuple[float, int, bool]]:
    """Per problem: summed loss of its completion, tokens of it, solved."""
    found = []
    for first in range(0, len(problems), BATCH):
        rows = [ids_of(p, tokenizer) for p in problems[first : first + BATCH]]
        length = max(len(ids) for ids, _ in rows)
        padded = torch.tensor([ids + [tokenizer.eod] * (length - len(ids)) for ids, _ in rows])
        logits = family.logits(padded[:, :-1])
        losses = F.cross_entropy(logits.transpose(1, 2), padded[:, 1:], reduction="none")
        right = logits.argmax(-1) == padded[:, 1:]
        for row, (ids, question) in enumerate(rows):
            part = slice(question - 1, len(ids) - 1)
            found.append((losses[row, part].sum().item(), len(ids) - question, bool(right[row, part].all())))
    return found


def score(
    family: ElasticFamily,
    problems: Sequence[Problem],
    tokenizer: BPETokenizer,
    text: Mapping[str, tuple[Windows, int]],
) -> dict[str, Any]:
    """Everything about the active budget."""
    by_class: dict[str, dict[str, Any]] = {}
    solved = solve(family, problems, tokenizer)
    for problem, (loss, tokens, right) in zip(problems, solved, strict=True):
        row = by_class.setdefault(f"{problem.kind}/{problem.size}", {"loss": 0.0, "tokens": 0, "solved": 0, "count": 0})
        row["loss"] += loss
        row["tokens"] += tokens
        row["solved"] += right
        row["count"] += 1
    losses = {name: window_loss(family, windows, count) for name, (windows, count) in text.items()}
    windows = sum(count for _, count in text.values())
    return {
        "heldout_loss": sum(losses[name] * count for name, (_, count) in text.items()) / windows,
        "losses": losses,
        "solved": sum(right for _, _, right in solved) / len(solved),
        "problems": {name: {**row, "loss": row["loss"] / row["tokens"]} for name, row in by_class.items()},
    }


def main() -> None:
    """Score, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the reproduction")
    parser.add_argument("--weights", type=Path, required=True, help="nested checkpoint or parent")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--budgets", help="comma separated; default: all")
    parser.add_argument("--windows", type=int, default=64, help="of 256 held-out tokens, a quarter of them text")
    parser.add_argument("--each", type=int, default=32, help="problems of every kind and size")
    args = parser.parse_args()
    tokenizer, family = BPETokenizer(args.out / "data" / "tokenizer.json"), load(args.weights)
    file, text = args.out / "data" / "problems.jsonl", args.windows // 4
    windows = {
        "problems": (Windows(load_tokens("heldout", tokenizer, paths=[file]), 256, shuffle=False), args.windows - text),
        "text": (Windows(load_tokens("heldout", tokenizer), 256, shuffle=False), text),
    }
    problems = scored_problems(args.each)
    found = {}
    for budget in args.budgets.split(",") if args.budgets else family.budgets:
        family.switch(budget, compact=True)
        found[budget] = score(family, problems, tokenizer, windows)
    write_json(args.output, found)


if __name__ == "__main__":
    main()
