"""Two tasks for lm-evaluation-harness, made of local text; nothing is downloaded.

`heldout_text`: bits per byte of held-out documents. `continuation`: after a piece of a document, which of four pieces
comes next; the three wrong ones begin lines of other documents.

    python examples/evaluate/tasks.py --out FOLDER [--text FOLDER_OR_FILE] [--documents N] [--questions N]

Without `--text` it is the standard library's held-out files, which no run trains on. Writes FOLDER/*.jsonl and *.yaml.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable
from pathlib import Path

import yaml

from nemo_elastic.data.corpus import load_corpus_list, read_documents, usable_files
from nemo_elastic.data.entries import text_files

CONTEXT, CONTINUATION = 480, 120  # characters, up to the end of a line
CHOICES, SEED = 4, 0
COMMON = {"dataset_path": "json", "test_split": "test", "metadata": {"version": 1}}
TASKS = {
    "heldout_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "continuation": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
}


def documents(text: Path | None, count: int) -> list[str]:
    """The first `count` documents that are long enough to ask about."""
    if text is None:
        found: Iterable[str] = read_documents(usable_files(load_corpus_list()), "heldout")
    else:
        found = (path.read_text(encoding="utf-8", errors="replace") for path in text_files(text))
    long = [document[:8000] for document in found if len(document) > 3 * (CONTEXT + CONTINUATION)]
    if len(long) < CHOICES:
        raise SystemExit(f"{len(long)} documents are long enough to ask about; {CHOICES} are needed at least")
    return long[:count]


def pieces(document: str) -> list[tuple[str, str]]:
    """(context, what follows) at steps through a document; both end at the end of a line."""
    found, start = [], 0
    while (middle := document.find("\n", start + CONTEXT) + 1) and (
        end := document.find("\n", middle + CONTINUATION) + 1
    ):
        found.append((document[start:middle], document[middle:end]))
        start = end
    return found


def questions(texts: list[str], count: int) -> list[dict]:
    """`count` questions, or as many as the texts give, spread over them."""
    draw = random.Random(SEED)
    of_text = [pieces(text) for text in texts]
    asked = [(i, piece) for i, found in enumerate(of_text) for piece in found]
    draw.shuffle(asked)
    made = []
    for i, (context, right) in asked[:count]:
        others = draw.sample([j for j, found in enumerate(of_text) if found and j != i], CHOICES - 1)
        choices = [draw.choice(of_text[j])[1] for j in others]
        answer = draw.randrange(CHOICES)
        made.append({"context": context, "choices": [*choices[:answer], right, *choices[answer:]], "answer": answer})
    return made


def write_tasks(out: Path, texts: list[str], asked: list[dict]) -> None:
    """The data as JSON lines, and a task file beside each."""
    out.mkdir(parents=True, exist_ok=True)
    rows = {"heldout_text": [{"text": text} for text in texts], "continuation": asked}
    for name, task in TASKS.items():
        data = (out / f"{name}.jsonl").resolve()
        data.write_text("".join(json.dumps(row) + "\n" for row in rows[name]), encoding="utf-8")
        whole = {"task": name, **COMMON, "dataset_kwargs": {"data_files": {"test": str(data)}}, **task}
        (out / f"{name}.yaml").write_text(yaml.safe_dump(whole, sort_keys=False), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--documents", type=int, default=40)
    parser.add_argument("--questions", type=int, default=200)
    given = parser.parse_args()
    texts = documents(given.text, given.documents)
    asked = questions(texts, given.questions)
    write_tasks(given.out, texts, asked)
    print(f"{given.out}: {len(texts)} documents, {len(asked)} questions")


if __name__ == "__main__":
    main()
