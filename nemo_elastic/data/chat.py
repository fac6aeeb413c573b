"""A conversation as tokens, with a loss on the assistant's tokens only.

With a chat template (the parent's own, or a file's) the text is the template's, as transformers gives it. Without one:

    turn         = start(role) content end            mask 0 .. 0, 1 .. 1 for content and end of an assistant
    prompt pair  = prompt completion <eod>             mask 0 .. 0, 1 .. 1, 1

and tools and their calls, which then have no form of their own, are JSON between `<tools>` (in the system turn) and
`<tool_call>` tags. In plain turns names of special tokens are text; in a template's text they are those tokens.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Sequence
from pathlib import Path

from nemo_elastic.config.sections import ChatConfig
from nemo_elastic.data.chat_template import ChatTemplate, Span, template_beside, template_file
from nemo_elastic.data.tokenizer import BPETokenizer
from nemo_elastic.data.turns import Dialogue, Turn, dialogue

START = "<|{role}|>\n"


def template_for(tokenizer: BPETokenizer, chat: ChatConfig) -> ChatTemplate | None:
    """`data.chat.template`, else the parent's own unless `start` or `end` are set; None: no template.

    Raises:
        ValueError: a template that cannot be read.
    """
    if chat.template:
        return template_file(Path(chat.template), tokenizer.path, chat.date)
    if chat.start is not None or chat.end is not None:
        return None
    return template_beside(tokenizer.path, chat.date)


def encode(
    record: object, tokenizer: BPETokenizer, chat: ChatConfig, template: ChatTemplate | None = None
) -> tuple[list[int], list[int]]:
    """Ids of a conversation and which of them carry loss (0 or 1).

    Raises:
        ValueError: the record is none, or its turns cannot be read or rendered.
    """
    if not isinstance(record, dict):
        raise ValueError("is no object")
    found = dialogue(record)
    if found is None:
        prompt, completion = (
            tokenizer.encode(record["prompt"]),
            [*tokenizer.encode(record["completion"]), tokenizer.eod],
        )
        return prompt + completion, [0] * len(prompt) + [1] * len(completion)
    return _plain(found, tokenizer, chat) if template is None else _templated(found, tokenizer, template)


def _plain(found: Dialogue, tokenizer: BPETokenizer, chat: ChatConfig) -> tuple[list[int], list[int]]:
    ids: list[int] = []
    mask: list[int] = []

    def add(some: list[int], trained: bool) -> None:
        ids.extend(some)
        mask.extend([int(trained)] * len(some))

    end = [tokenizer.eod] if chat.end is None else tokenizer.encode_markers(chat.end)
    start = START if chat.start is None else chat.start
    turns, added = _with_tools(found)
    for i, turn in enumerate(turns):
        trained = i >= added and found.trains(i - added)
        add(tokenizer.encode_markers(start.replace("{role}", turn["role"])), False)
        add(tokenizer.encode((turn["content"] or "") + _calls(turn)), trained)
        add(end, trained)
    if chat.end is not None:
        add([tokenizer.eod], False)
    return ids, mask


def _with_tools(found: Dialogue) -> tuple[Sequence[Turn], int]:
    """Turns with the tools in the system turn, and how many turns (0 or 1) were put in front for that."""
    if not found.tools:
        return found.turns, 0
    words = "".join(f"\n<tools>{json.dumps(tool, ensure_ascii=False)}</tools>" for tool in found.tools)
    first, *rest = found.turns
    if first["role"] == "system":
        return [first | {"content": (first["content"] or "") + words}, *rest], 0
    return [{"role": "system", "content": words.lstrip()}, *found.turns], 1


def _calls(turn: Turn) -> str:
    calls = [call.get("function", call) for call in turn.get("tool_calls", ())]
    calls += [turn["function_call"]] if "function_call" in turn else []
    words = "\n".join(f"<tool_call>{json.dumps(call, ensure_ascii=False)}</tool_call>" for call in calls)
    return f"\n{words}" if words and turn["content"] else words


def _templated(found: Dialogue, tokenizer: BPETokenizer, template: ChatTemplate) -> tuple[list[int], list[int]]:
    text, spans = template.text_and_loss(found)
    ids, places = tokenizer.encode_with_places(text)
    mask = [0] * len(ids)
    begins = [begin for begin, _ in places]
    for span in spans:
        for k in _turn_tokens(span, ids, begins, text, tokenizer):
            mask[k] = 1
    return ids, mask


def _turn_tokens(span: Span, ids: Sequence[int], begins: Sequence[int], text: str, tokenizer: BPETokenizer) -> range:
    """Tokens that begin inside a span, without the white space behind the special token that ends a turn."""
    first, last = bisect.bisect_left(begins, span[0]), bisect.bisect_left(begins, span[1])
    end = last
    while end > first and ids[end - 1] not in tokenizer.special_ids:
        end -= 1
    ends_there = end > first and (end == last or not text[begins[end] : span[1]].strip())
    return range(first, end if ends_there else last)
