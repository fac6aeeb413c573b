"""`verify --format gguf`: every GGUF child against the nested subnet it was read from, run by llama.cpp.

keys(file), tensors(file) == those of the subnet, bit by bit (cast to the file's dtype)
log-probabilities(llama.cpp) == log-probabilities(subnet)      token by token through the cache, and at once
tokens(llama.cpp, text) == tokens(tokenizer.json, text),   greedy(llama.cpp, prompt) == greedy(subnet, prompt)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_elastic.checkpoint.comparison import LOGIT_TOLERANCE, ChildCheck, compare_logits
from nemo_elastic.checkpoint.gguf_file import GGUF_FILE, GgufFile, first_difference
from nemo_elastic.checkpoint.gguf_model import FILE_TYPES, check_gguf, context_length
from nemo_elastic.checkpoint.schemas import plain_child
from nemo_elastic.checkpoint.tokenizer_files import TOKENIZER_FILE
from nemo_elastic.cost import parameters
from nemo_elastic.mcore import process_groups
from nemo_elastic.mcore.elastic.plan import Plan, hard_plan
from nemo_elastic.mcore.evaluate import whole_logits
from nemo_elastic.nemo.checkpoints import child_card
from nemo_elastic.nemo.gguf_child import GgufChild, gguf_child
from nemo_elastic.nemo.gguf_side import GgufSide, run_llama_cpp
from nemo_elastic.nemo.nested import Nested
from nemo_elastic.problems import Problem, ProblemsError
from nemo_elastic.space import Subnet

POSITIONS, VALUES = 200, 2**22  # at most so many positions of the row, and log-probabilities
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 3, 16, 40


@dataclass(frozen=True)
class OpenedGguf:
    """A child's file, and what it should hold."""

    name: str
    file: GgufFile
    subnet: Subnet
    expected: GgufChild
    dtype: torch.dtype


def open_gguf(name: str, folder: Path, nested: Nested) -> OpenedGguf:
    """A child's file by its header.

    Raises:
        ProblemsError: none there, no GGUF, or a child that cannot be said in one.
    """
    if not (folder / GGUF_FILE).is_file():
        words = f"no {GGUF_FILE} here; run `nemo-elastic extract --format gguf` first"
        raise ProblemsError([Problem(str(folder), words)])
    subnet, file = nested.manifest.subnet(name), GgufFile(folder / GGUF_FILE)
    check_gguf(nested.manifest.model, nested.layout.architecture, subnet)
    child = plain_child(nested.reader, nested.layout, subnet, schema="per_layer_config")
    dtype = {number: dtype for dtype, number in FILE_TYPES.items()}.get(file.keys.get("general.file_type"))
    if dtype is None:
        words = f"general.file_type {file.keys.get('general.file_type')!r} is none that `extract` writes"
        raise ProblemsError([Problem(str(file.path), words)])
    expected = gguf_child(nested, subnet, child, child_card(nested, name, subnet), dtype)
    return OpenedGguf(name, file, subnet, expected, dtype)


def check_children(
    nested: Nested,
    children: Sequence[OpenedGguf],
    model: Any,
    mode: str,
    batches: Sequence[tuple[Tensor, ...]],
    python: str,
    report: Callable[[str, int, int], None],
) -> list[ChildCheck]:
    """Compare.

    Args:
        model: the elastic model of this rank with the nested weights.
        mode: in which its subnets run, `masked` or `sliced`.
        batches: real (tokens, labels); the first row is compared, prompts are the starts of rows.
    """
    vocab = nested.layout.architecture.vocab_size
    tokens = batches[0][0][:1, : context_length(nested.manifest.model) - 1]  # llama.cpp's server takes no more
    length = tokens.shape[1]
    count = max(1, min(POSITIONS, VALUES // vocab, length))
    ends = [round(length * (i + 1) / count) for i in range(count)]
    rows = torch.cat([rows for rows, *_ in batches])
    prompts = rows[:: max(1, len(rows) // PROMPTS), :PROMPT_TOKENS][:PROMPTS]
    texts, wanted_tokens = _texts(nested, rows[:PROMPTS])
    checks = []
    for done, child in enumerate(children):
        report("verify", done, len(children))
        plan = hard_plan(model.layout, child.subnet, mode)
        logits = whole_logits(model, tokens, plan)[0]
        greedy, steps = _greedy(model, prompts, plan)

        def run(child: OpenedGguf = child) -> GgufSide:
            how = {"texts": texts, "prompts": prompts.tolist(), "new_tokens": NEW_TOKENS}
            return run_llama_cpp(python, [child.file.path], vocab, tokens[0].tolist(), ends, **how)[0]

        side = process_groups.on_first_rank(run)
        difference = next(first_difference(child.file, child.expected.keys, child.expected.tensors), None)
        if difference is None and side.texts != wanted_tokens:
            difference = "tokenizer: llama.cpp cuts the text into other tokens than tokenizer.json"
        end = child.expected.keys.get("tokenizer.ggml.eos_token_id")
        equal = _share_equal(side.continued, greedy, steps, end, LOGIT_TOLERANCE[child.dtype])
        labels = batches[0][1][0]
        checks.append(_check(nested, child, logits, side, ends, labels, difference, equal))
    report("verify", len(children), len(children))
    return checks


def _check(
    nested: Nested,
    child: OpenedGguf,
    logits: Tensor,
    side: GgufSide,
    ends: list[int],
    labels: Tensor,
    difference: str | None,
    greedy: float,
) -> ChildCheck:
    at = torch.tensor(ends) - 1
    ours = logits.double().log_softmax(-1)[at]
    theirs = torch.cat([side.log_probabilities, side.at_once.unsqueeze(0)]).double()
    theirs = theirs.log_softmax(-1)  # the server adds up exponentials in fp32, one after the other
    labels = labels[at].unsqueeze(1)
    larger = [n for n, s in nested.manifest.subnets.items() if n != child.name and child.subnet.is_nested_in(s)]
    return ChildCheck(
        budget=child.name,
        comparison=compare_logits(torch.cat([ours, ours[-1:]]), theirs),
        loss_nested=float(-ours.gather(1, labels).mean()),
        loss_child=float(-theirs[:-1].gather(1, labels).mean()),
        parameters=parameters(nested.layout, child.subnet),
        numel=child.file.numel(),
        nested_in=tuple(larger),
        dtype=child.dtype,
        difference=difference,
        format="gguf",
        greedy=greedy,
    )


def _texts(nested: Nested, rows: Tensor) -> tuple[list[str], list[list[int]]]:
    """Real text, and its tokens by tokenizer.json."""
    if nested.tokenizer is None:
        return [], []
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(nested.tokenizer / TOKENIZER_FILE))
    texts = [tokenizer.decode(row.tolist()) for row in rows]
    return texts, [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


def _greedy(model: Any, prompts: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """What the subnet continues prompts `[b, s]` by, `[b, n]`, and the logits it chose from, `[b, n, v]`."""
    tokens, steps = prompts, []
    for _ in range(NEW_TOKENS):
        steps.append(whole_logits(model, tokens, plan)[:, -1])
        tokens = torch.cat([tokens, steps[-1].argmax(-1, keepdim=True)], dim=1)
    return tokens[:, prompts.shape[1] :], torch.stack(steps, dim=1)


def _share_equal(
    theirs: Sequence[Sequence[int]], ours: Tensor, steps: Tensor, end: int | None, tolerance: float
) -> float:
    """Share of the prompts that both continue alike, up to the end token, or to two tokens that tie within rounding."""
    alike = 0
    for got, wanted, logits in zip(theirs, ours.tolist(), steps, strict=True):
        wanted = wanted[: wanted.index(end) + 1] if end in wanted else wanted
        place = next((i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b), None)
        if place is None:
            alike += len(got) >= len(wanted) - (end in wanted)  # the end token itself may be left out
        else:
            gap = float(logits[place, wanted[place]] - logits[place, got[place]])
            alike += gap <= tolerance * float(logits[place].abs().max())
    return alike / len(theirs)
