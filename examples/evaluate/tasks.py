"""Two tasks for lm-evaluation-harness, made of local text; nothing is downloaded.

`heldout_text`: bits per byte of held-out documents. `continuation`: after a piece of a document, which of four pieces
comes next; the three wrong ones begin lines of other documents.

    python examples/evaluate/tasks.py --out FOLDER [--text FOLDER_OR_FILE] [--documents N] [--questions N]

Without `--text` it is the standard library's held-out files, which no run trains on. `--text` takes what `data.paths`
takes: `.txt` (a file is a document), `.jsonl` and `.parquet` with a `text` in every record, packed or not. Writes
FOLDER/*.jsonl and *.yaml.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import yaml

from nemo_elastic.data.corpus import load_corpus_list, read_documents, usable_files
from nemo_elastic.data.entries import text_files
from nemo_elastic.data.records import blocks, texts
from nemo_elastic.data.text_files import kind_of

LONGEST = 8000  # characters that are taken of a document
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
    """The first `count` documents that are long enough to ask about.

    Raises:
        ValueError: no text, damaged text, or too little; it names the file, and mostly the line.
    """
    if text is None:
        found = read_documents(usable_files(load_corpus_list()), "heldout")
    else:
        found = (document for file in text_files(text) for document in of_file(file))
    long = (document[:LONGEST] for document in found if len(document) > 3 * (CONTEXT + CONTINUATION))
    return list(islice(long, count))


def of_file(file: Path) -> Iterator[str]:
    """The documents of a file; of a `.txt` the one that it is, as much of it as is taken."""
    if kind_of(file) != ".txt":
        yield from texts(file)
        return
    document = ""
    for block in blocks(file):
        document += block
        if len(document) >= LONGEST:
            break
    yield document


def pieces(document: str) -> list[tuple[str, str]]:
    """(context, what follows) at steps through a document; both end at the end of a line."""
    found, start = [], 0
    while (middle := document.find("\n", start + CONTEXT) + 1) and (
        end := document.find("\n", middle + CONTINUATION) + 1
    ):
        found.append((document[start:middle], document[middle:end]))
        start = end
    return found


def questions(documents: list[str], count: int) -> list[dict]:
    """`count` questions, or as many as the documents give, spread over them.

    Raises:
        ValueError: too few documents to take wrong choices from.
    """
    draw = random.Random(SEED)
    of_text = [pieces(document) for document in documents]
    if (usable := sum(map(bool, of_text))) < CHOICES:
        words = (
            f"of {len(documents)} documents that are longer than {3 * (CONTEXT + CONTINUATION):,} characters, {usable}"
        )
        raise ValueError(f"{words} have lines to cut at; {CHOICES} are needed at least")
    asked = [(i, piece) for i, found in enumerate(of_text) for piece in found]
    draw.shuffle(asked)
    made = []
    for i, (context, right) in asked[:count]:
        others = draw.sample([j for j, found in enumerate(of_text) if found and j != i], CHOICES - 1)
        choices = [draw.choice(of_text[j])[1] for j in others]
        answer = draw.randrange(CHOICES)
        made.append({"context": context, "choices": [*choices[:answer], right, *choices[answer:]], "answer": answer})
    return made


def write_tasks(out: Path, documents: list[str], asked: list[dict]) -> None:
    """The data as JSON lines, and a task file beside each."""
    out.mkdir(parents=True, exist_ok=True)
    rows = {"heldout_text": [{"text": document} for document in documents], "continuation": asked}
    for name, task in TASKS.items():
        data = (out / f"{name}.jsonl").resolve()
        data.write_text("".join(json.dumps(row) + "\n" for row in rows[name]), encoding="utf-8")
        whole = {"task": name, **COMMON, "dataset_kwargs": {"data_files": {"test": str(data)}}, **task}
        (out / f"{name}.yaml").write_text(yaml.safe_dump(whole, sort_keys=False), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--documents", type=int, default=40)
    parser.add_argument("--questions", type=int, default=200)
    given = parser.parse_args(arguments)
    if given.documents < CHOICES or given.questions < 1:
        parser.error(f"--documents must be {CHOICES} at least, --questions 1")
    try:
        found = documents(given.text, given.documents)
        asked = questions(found, given.questions)
        write_tasks(given.out, found, asked)
    except (OSError, ValueError) as error:
        parser.exit(2, f"tasks.py: {'--text: ' if given.text else ''}{error}\n")
    print(f"{given.out}: {len(found)} documents, {len(asked)} questions")


if __name__ == "__main__":
    main()
