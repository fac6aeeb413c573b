"""Problems of `reasoning-gym` with short chains of thought, as text that a model of a few million parameters can learn.

    sum 37+58-12          sort up 56 25 75        reverse appall
    37+58=95              25 < 56 75              : a p p a l l
    95-12=83              56 < 75                 = l l a p p a
    = 83                  = 25 56 75

The first line is the question, the last the answer, the lines between are the chain. Questions and answers come from
`reasoning-gym`; the chain is computed from them. A question whose hash falls into one of `SCORED` of 20 buckets is
never trained on: those are the problems that `score.py` asks.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import reasoning_gym

SCORED = 1  # of 20 buckets of questions
SIZES = {"chain_sum": (2, 3, 4), "number_sorting": (3, 4, 5), "spell_backward": (5, 7, 10)}
SHARES = {"problems": 3, "text": 1}  # of the training samples
COUNTS = {"chain_sum": 18_000, "number_sorting": 14_000, "spell_backward": 20_000}


@dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
        kind: the `reasoning-gym` dataset.
        size: its difficulty: terms of a sum, numbers to sort, longest word length of its class.
        question: the first line.
        chain: the lines between.
        answer: what the last line says behind its `= `.
    """

    kind: str
    size: int
    question: str
    chain: tuple[str, ...]
    answer: str

    @property
    def completion(self) -> str:
        """What a solver writes behind the question and its end of line."""
        return "\n".join((*self.chain, f"= {self.answer}"))

    @property
    def text(self) -> str:
        """The whole document."""
        return f"{self.question}\n{self.completion}"

    @property
    def scored(self) -> bool:
        """Whether it is kept for scoring."""
        return int(hashlib.sha256(self.question.encode()).hexdigest(), 16) % 20 < SCORED


def options(kind: str, size: int) -> dict[str, Any]:
    """What `reasoning-gym` is asked for."""
    if kind == "chain_sum":
        return {"min_terms": size, "max_terms": size, "min_digits": 1, "max_digits": 2}
    if kind == "number_sorting":
        return {"min_numbers": size, "max_numbers": size, "min_value": 0, "max_value": 99, "max_decimals": 0}
    shortest = {5: 3, 7: 6, 10: 8}[size]
    return {"min_word_len": shortest, "max_word_len": size}


def problems(kind: str, size: int, count: int, seed: int) -> Iterator[Problem]:
    """`count` draws of `reasoning-gym`, each different question once."""
    seen: set[str] = set()
    for entry in reasoning_gym.create_dataset(kind, size=count, seed=seed, **options(kind, size)):
        problem = SOLVERS[kind](size, entry)
        if problem.question not in seen:
            seen.add(problem.question)
            yield problem


def chain_sum(size: int, entry: dict[str, Any]) -> Problem:
    """Running sums from the left."""
    expression = entry["metadata"]["expression"].replace(" ", "")
    first, *rest = re.findall(r"[+-]?\d+", expression)
    total, chain = int(first), []
    for term in rest:
        chain.append(f"{total}{term}={total + int(term)}")
        total += int(term)
    return checked(Problem("chain_sum", size, f"sum {expression}", tuple(chain), str(total)), entry["answer"])


def number_sorting(size: int, entry: dict[str, Any]) -> Problem:
    """The next number, and those that are left in the order they were given."""
    left = [int(float(n)) for n in entry["metadata"]["original_numbers"]]
    up = entry["metadata"]["direction"] == "ascending"
    question = f"sort {'up' if up else 'down'} {' '.join(map(str, left))}"
    chain, done = [], []
    while len(left) > 1:
        done.append(min(left) if up else max(left))
        left.remove(done[-1])
        chain.append(f"{done[-1]} {'<' if up else '>'} {' '.join(map(str, left))}")
    answer = " ".join(map(str, done + left))
    given = " ".join(str(int(float(n))) for n in json.loads(entry["answer"].replace("'", '"')))
    return checked(Problem("number_sorting", size, question, tuple(chain), answer), given)


def spell_backward(size: int, entry: dict[str, Any]) -> Problem:
    """The letters one by one, then backward."""
    word = entry["metadata"]["word"]
    answer = " ".join(reversed(word))
    checked(Problem("spell_backward", size, "", (), answer.replace(" ", "")), entry["answer"])
    return Problem("spell_backward", size, f"reverse {word}", (f": {' '.join(word)}",), answer)


SOLVERS = {"chain_sum": chain_sum, "number_sorting": number_sorting, "spell_backward": spell_backward}


def checked(problem: Problem, answer: str) -> Problem:
    """The problem, if the chain ends where `reasoning-gym` says.

    Raises:
        ValueError: it does not.
    """
    if problem.answer != answer.strip():
        raise ValueError(f"{problem.kind}: the chain of {problem.question!r} ends in {problem.answer}, not {answer}")
    return problem


def training_file(path: Path, seed: int = 11, counts: dict[str, int] | None = None) -> None:
    """All problems that are not kept for scoring, shuffled by the hash of their text, one JSON object a line."""
    counts = counts or COUNTS
    found = [p for kind, sizes in SIZES.items() for size in sizes for p in problems(kind, size, counts[kind], seed)]
    texts = sorted({p.text for p in found if not p.scored}, key=lambda text: hashlib.sha256(text.encode()).digest())
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    temporary.replace(path)


def blend(folder: Path) -> list[dict[str, Any]]:
    """`data.blend` of every run: problems, and the text of the running Python."""
    ours = {"path": str(folder / "problems.jsonl"), "weight": SHARES["problems"]}
    return [ours, {"path": "builtin:corpus", "weight": SHARES["text"]}]


def scored_problems(each: int = 64, seed: int = 12) -> list[Problem]:
    """`each` problems of every kind and size that no training file has."""
    found: list[Problem] = []
    for kind, sizes in SIZES.items():
        for size in sizes:
            kept = (p for p in problems(kind, size, 60 * each, seed) if p.scored)
            found += [problem for problem, _ in zip(kept, range(each), strict=False)]
    return found
