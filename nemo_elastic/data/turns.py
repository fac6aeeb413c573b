"""Conversations as published data sets write them, as one list of turns.

| record | becomes |
|---|---|
| `messages: [{role, content, ...}]` | as it is |
| `conversations: [{from, value}]` (ShareGPT) | roles by name: human is user, gpt is assistant, ... |
| `prompt: [turns], completion: [turns]` | one list; loss on turns of the completion only |

Within a turn: a `content` of parts becomes their text end to end; `content: null` is allowed where `tool_calls` are;
any other field that is null is not there; `arguments` of a call that are JSON in a string are read.
`tools` (functions that may be called) stand beside the turns, as a list or as JSON in a string.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TRAINED_ROLES = ("assistant",)
ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "model": "assistant", "bing": "assistant", "bard": "assistant", "function_call": "assistant", "system": "system",
    "tool": "tool", "observation": "tool", "function_response": "tool", "function": "tool",
}  # fmt: skip
Turn = dict[str, Any]


@dataclass(frozen=True)
class Dialogue:
    """A conversation.

    Attributes:
        turns: `role`, `content` (a string; None beside calls), and what else a turn says.
        tools: functions that may be called, as JSON schemas.
        first_trained: turns before this one carry no loss, whoever speaks.
    """

    turns: list[Turn]
    tools: list[Any] | None = None
    first_trained: int = 0

    def trains(self, index: int) -> bool:
        """Whether turn `index` carries loss."""
        return index >= self.first_trained and self.turns[index]["role"] in TRAINED_ROLES


def is_dialogue(record: object) -> bool:
    """Whether a record is meant to be a conversation, or a prompt with its completion."""
    if not isinstance(record, dict):
        return False
    return "messages" in record or "conversations" in record or ("prompt" in record and "text" not in record)


def dialogue(record: Mapping[str, Any]) -> Dialogue | None:
    """The turns of a record; None when its prompt and completion are text.

    Raises:
        ValueError: what is wrong with which turn (from 1), as words behind a file and line.
    """
    tools = _tools(record.get("tools"))
    for key in ("messages", "conversations"):
        if key in record:
            return Dialogue(_turns(key, record[key]), tools)
    pair = [record.get(key) for key in ("prompt", "completion")]
    if all(isinstance(part, str) for part in pair):
        return None
    if all(isinstance(part, list) for part in pair):
        before, after = _turns("prompt", pair[0]), _turns("completion", pair[1])
        return Dialogue(before + after, tools, first_trained=len(before))
    raise ValueError('has neither "messages", "conversations" nor "prompt" and "completion", both text or both turns')


def _turns(key: str, value: object) -> list[Turn]:
    if not isinstance(value, list) or not value:
        raise ValueError(f'has "{key}" that are no list of turns')
    return [_turn(number, turn) for number, turn in enumerate(value, start=1)]


def _turn(number: int, raw: object) -> Turn:
    if not isinstance(raw, dict):
        raise ValueError(f"turn {number} is no object")
    turn = {name: value for name, value in raw.items() if value is not None}
    if "role" not in turn and "from" in turn:
        speaker = turn.pop("from")
        if not isinstance(speaker, str) or speaker not in ROLES:
            raise ValueError(f'turn {number} is "from" {speaker!r}; known are {", ".join(ROLES)}')
        turn = {"role": ROLES[speaker], "content": turn.pop("value", None), **turn}
    if not isinstance(turn.get("role"), str) or not turn["role"]:
        raise ValueError(f'turn {number} has no "role" that is a string')
    if "tool_calls" in turn:
        turn["tool_calls"] = _calls(number, turn["tool_calls"])
    if not turn.get("tool_calls"):
        turn.pop("tool_calls", None)
    turn["content"] = _content(number, turn.get("content"), calls="tool_calls" in turn or "function_call" in turn)
    return turn


def _content(number: int, content: object, *, calls: bool) -> str | None:
    if isinstance(content, str) or (content is None and calls):
        return content
    if isinstance(content, list):
        return "".join(_part(number, part) for part in content)
    raise ValueError(f'turn {number} has no "content" that is a string or a list of parts')


def _part(number: int, part: object) -> str:
    if isinstance(part, str):
        return part
    kind, text = (part.get("type", "text"), part.get("text")) if isinstance(part, dict) else (None, None)
    if kind != "text" or not isinstance(text, str):
        words = f"a part of type {kind!r}" if kind not in (None, "text") else "a part without text"
        raise ValueError(f"turn {number} has {words}; this model reads text only")
    return text


def _calls(number: int, calls: object) -> list[Any]:
    calls = _parsed(calls)
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise ValueError(f'turn {number} has "tool_calls" that are no list of objects')
    return [_call(call) for call in calls]


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    inner = {
        name: _call(value) if name == "function" and isinstance(value, dict) else value for name, value in call.items()
    }
    arguments = inner.get("arguments")
    return inner | {"arguments": _parsed(arguments)} if isinstance(arguments, str) else inner


def _parsed(value: object) -> object:
    """What JSON in a string holds, where that is an object or a list; anything else as it is."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value
    return found if isinstance(found, dict | list) else value


def _tools(tools: object) -> list[Any] | None:
    tools = _parsed(tools)
    if tools is None or tools in ("", []):
        return None
    if not isinstance(tools, list):
        raise ValueError('has "tools" that are no list')
    found = [_parsed(tool) for tool in tools]
    if not all(isinstance(tool, dict) for tool in found):
        raise ValueError('has "tools" that are not all objects')
    return found
