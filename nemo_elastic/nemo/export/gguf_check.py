"""`verify --format gguf`: every GGUF child against the nested subnet it was read from, run by llama.cpp.

keys(file), tensors(file) == those of the subnet, bit by bit (cast to the file's dtype); only such a file is run
log-probabilities(llama.cpp) == log-probabilities(subnet)      token by token through the cache, and at once
tokens(llama.cpp, text) == tokens(tokenizer.json, text)
argmax(llama.cpp | prompt, t_1 .. t_k) == t_k+1 where t = greedy(subnet, prompt), for every k

The last line is greedy continuation, with one difference: llama.cpp is fed every token, so that the ones at which it
would stop (the tokenizer's end, and whatever it takes for the end of a chat's turn) are compared like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_elastic.checkpoint.comparison import LOGIT_TOLERANCE, NOTHING, ChildCheck, compare_logits
from nemo_elastic.checkpoint.gguf_file import GGUF_FILE, GgufFile, first_difference
from nemo_elastic.checkpoint.gguf_model import FILE_TYPES, check_gguf, context_length
from nemo_elastic.checkpoint.schemas import plain_child
from nemo_elastic.checkpoint.tokenizer_files import TOKENIZER_FILE
from nemo_elastic.cost.counts import parameters
from nemo_elastic.mcore.elastic.plan import Plan, hard_plan
from nemo_elastic.mcore.models.evaluate import whole_logits
from nemo_elastic.mcore.runtime import process_groups
from nemo_elastic.nemo.export.checkpoints import child_card
from nemo_elastic.nemo.export.gguf_child import GgufChild, gguf_child
from nemo_elastic.nemo.export.gguf_side import GgufSide, run_llama_cpp
from nemo_elastic.nemo.export.nested import Nested
from nemo_elastic.problems import Problem, ProblemsError
from nemo_elastic.space.subnet import Subnet

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
        check = process_groups.on_first_rank(lambda child=child: _by_its_file(nested, child))
        if check.difference is None:
            plan = hard_plan(model.layout, child.subnet, mode)
            logits = whole_logits(model, tokens, plan)[0]
            rows_fed, steps = _greedy(model, prompts, plan)

            def run(child: OpenedGguf = child, fed: Tensor = rows_fed) -> GgufSide:
                how = {"texts": texts, "continued": fed.tolist(), "prompt": prompts.shape[1]}
                return run_llama_cpp(python, [child.file.path], vocab, tokens[0].tolist(), ends, **how)[0]

            side = process_groups.on_first_rank(run)
            check = _with_figures(check, logits, side, ends, batches[0][1][0])
            if side.texts != wanted_tokens:
                words = "tokenizer: llama.cpp cuts the text into other tokens than tokenizer.json"
                check = replace(check, difference=words)
            check = replace(check, greedy=_share_equal(side.chosen, steps, LOGIT_TOLERANCE[child.dtype]))
        checks.append(check)
    report("verify", len(children), len(children))
    return checks


def _by_its_file(nested: Nested, child: OpenedGguf) -> ChildCheck:
    """What the file alone says; llama.cpp may not even load one that differs."""
    larger = [n for n, s in nested.manifest.subnets.items() if n != child.name and child.subnet.is_nested_in(s)]
    return ChildCheck(
        budget=child.name,
        comparison=NOTHING,
        loss_nested=float("nan"),
        loss_child=float("nan"),
        parameters=parameters(nested.layout, child.subnet),
        numel=child.file.numel(),
        nested_in=tuple(larger),
        dtype=child.dtype,
        difference=next(first_difference(child.file, child.expected.keys, child.expected.tensors), None),
        format="gguf",
    )


def _with_figures(check: ChildCheck, logits: Tensor, side: GgufSide, ends: list[int], labels: Tensor) -> ChildCheck:
    at = torch.tensor(ends) - 1
    ours = logits.double().log_softmax(-1)[at]
    theirs = torch.cat([side.log_probabilities, side.at_once.unsqueeze(0)]).double()
    theirs = theirs.log_softmax(-1)  # the server adds up exponentials in fp32, one after the other
    labels = labels[at].unsqueeze(1)
    return replace(
        check,
        comparison=compare_logits(torch.cat([ours, ours[-1:]]), theirs),
        loss_nested=float(-ours.gather(1, labels).mean()),
        loss_child=float(-theirs[:-1].gather(1, labels).mean()),
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
    """Prompts `[b, s]` with what the subnet continues them by `[b, s+n]`; the logits that it chose from `[b, n, v]`."""
    tokens, steps = prompts, []
    for _ in range(NEW_TOKENS):
        steps.append(whole_logits(model, tokens, plan)[:, -1])
        tokens = torch.cat([tokens, steps[-1].argmax(-1, keepdim=True)], dim=1)
    return tokens, torch.stack(steps, dim=1)


def _share_equal(chosen: Sequence[Sequence[int]], steps: Tensor, tolerance: float) -> float:
    """Share of the prompts at whose every step both choose alike, or one of two tokens that tie within rounding."""
    theirs = torch.tensor(chosen).unsqueeze(-1)
    behind = steps.amax(-1) - steps.gather(-1, theirs).squeeze(-1)
    return float((behind <= tolerance * steps.abs().amax(-1)).all(1).double().mean())
