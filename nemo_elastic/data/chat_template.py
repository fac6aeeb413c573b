"""A parent's own chat template (Jinja), rendered in a sandbox as transformers renders it, and where its loss lies.

    text = render(turns)
    loss = text inside `{% generation %}` blocks, where the template has them; else, for every assistant turn i,
           [len(render(turns[:i], generation prompt)), len(render(turns[: i + 1]))),   both beginnings of text

What a template says of earlier turns must not depend on later ones, or there is no such place: that is refused. Behind
the token that ends a turn only white space follows; it carries no loss, as a model stops there.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import ext, nodes
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nemo_elastic.data.turns import TRAINED_ROLES, Dialogue, Turn
from nemo_elastic.files import read_json

FILE, CONFIG = "chat_template.jinja", "tokenizer_config.json"
_BEGIN, _END = "\ufdd0", "\ufdd1"  # noncharacters: no text has them
_MARKS = re.compile(f"([{_BEGIN}{_END}])")
Span = tuple[int, int]


class _Generation(ext.Extension):
    """`{% generation %} ... {% endgeneration %}`: what the assistant writes."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        environment.extend(has_generation=False)

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        self.environment.has_generation = True
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Any) -> str:
        return f"{_BEGIN}{caller()}{_END}"


class ChatTemplate:
    """A compiled template with the special tokens that it may name.

    Args:
        source: Jinja text.
        names: `bos_token`, `eos_token`, ... -> text.
        date: the day that `strftime_now` tells, so that the same conversation always gives the same tokens.
        tool_use: another template for conversations with tools, where the parent has two.

    Raises:
        ValueError: no Jinja.
    """

    def __init__(self, source: str, names: Mapping[str, str], *, date: str, tool_use: str | None = None) -> None:
        self.identity = [source, tool_use, dict(names), date]
        day = datetime.datetime.fromisoformat(date)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _raise, "strftime_now": day.strftime}
        try:
            self._plain = environment.from_string(source)
            self._tools = environment.from_string(tool_use) if tool_use else self._plain
        except (TemplateError, RecursionError) as error:
            raise ValueError(f"is no chat template that Jinja can read ({error})") from error
        self._names, self._marks = dict(names), environment.has_generation

    def render(self, turns: Sequence[Turn], tools: Sequence[Any] | None = None, *, prompt: bool = False) -> str:
        """Text of some turns; with `prompt` what an assistant's next turn begins with.

        Raises:
            ValueError: the template refuses these turns, or cannot be rendered with them.
        """
        text = self._marked(turns, tools, prompt=prompt)
        return _MARKS.sub("", text) if self._marks else text

    def _marked(self, turns: Sequence[Turn], tools: Sequence[Any] | None, *, prompt: bool = False) -> str:
        template = self._tools if tools else self._plain
        try:
            return template.render(
                messages=list(turns), tools=tools, documents=None, add_generation_prompt=prompt, **self._names
            )
        except RecursionError as error:
            raise ValueError("is nested too deeply for the chat template") from error
        except Exception as error:  # a template can do whatever Python's operators do wrong
            reason = str(error) or type(error).__name__
            raise ValueError(f"cannot be rendered by the chat template ({reason})") from error

    def text_and_loss(self, dialogue: Dialogue) -> tuple[str, list[Span]]:
        """The text of a conversation, and which of its characters the assistant wrote, end of turn included.

        Raises:
            ValueError: a turn that the template cannot render, or renders in another way once others follow.
        """
        marked = self._marked(dialogue.turns, dialogue.tools)
        if self._marks:
            return _without_marks(marked, dialogue)
        spans = []
        for i in range(len(dialogue.turns)):
            if not dialogue.trains(i):
                continue
            upto = self.render(dialogue.turns[: i + 1], dialogue.tools)
            if not marked.startswith(upto):
                words = f"has a turn {i + 1} that the chat template renders in another way once others follow; cut the "
                raise ValueError(words + "conversation there, or set data.chat.template to one with generation blocks")
            spans.append((len(self._head(dialogue, i, upto)), len(upto)))
        return marked, spans

    def _head(self, dialogue: Dialogue, i: int, upto: str) -> str:
        """What of `upto` stands before the assistant's turn i: the prompt for it, else its own constant beginning."""
        before, turn, tools = dialogue.turns[:i], dialogue.turns[i], dialogue.tools
        try:
            head = self.render(before, tools, prompt=True)
            if upto.startswith(head) and head != self.render(before, tools):
                return head
        except ValueError:
            pass  # templates refuse prompts behind nothing, or behind an assistant
        probes = [self.render([*before, turn | {"content": text}], tools) for text in ("x1", "y2")]
        head = _common(*probes)
        if not upto.startswith(head) or head == probes[0]:
            words = f"has a turn {i + 1} whose beginning the chat template does not tell"
            raise ValueError(f"{words}; set data.chat.template to one with generation blocks")
        return head


def template_beside(tokenizer: Path, date: str) -> ChatTemplate | None:
    """The template in the folder of a `tokenizer.json`: `chat_template.jinja`, else in `tokenizer_config.json`.

    Raises:
        ValueError: a file that cannot be read, or no Jinja.
    """
    folder = tokenizer.parent
    if tokenizer.name != "tokenizer.json":
        return None
    config = _config(folder)
    if (folder / FILE).is_file():
        return _compiled(folder / FILE, (folder / FILE).read_text(encoding="utf-8"), config, date)
    found = config.get("chat_template")
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        default = named.get("default")
        return _compiled(folder / CONFIG, default, config, date, named.get("tool_use")) if default else None
    return _compiled(folder / CONFIG, found, config, date) if found else None


def template_file(file: Path, tokenizer: Path, date: str) -> ChatTemplate:
    """A template of the user's own, with the special tokens of the tokenizer.

    Raises:
        ValueError: a file that cannot be read, or no Jinja.
    """
    if not file.is_file():
        raise ValueError(f"{file} does not exist; give a file with a Jinja chat template")
    try:
        source = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no text ({error})") from error
    return _compiled(file, source, _config(tokenizer.parent), date)


def _compiled(
    file: Path, source: object, config: Mapping[str, Any], date: str, tool_use: str | None = None
) -> ChatTemplate:
    if not isinstance(source, str):
        raise ValueError(f"{file} has a chat_template that is no text")
    try:
        return ChatTemplate(source, _special_tokens(config), date=date, tool_use=tool_use)
    except ValueError as error:
        raise ValueError(f"{file} {error}") from error


def _config(folder: Path) -> dict[str, Any]:
    """What a tokenizer's folder says; `special_tokens_map.json` names what `tokenizer_config.json` does not."""
    found: dict[str, Any] = {}
    for name in ("special_tokens_map.json", CONFIG):
        try:
            words = read_json(folder / name) if (folder / name).is_file() else {}
        except ValueError as error:
            raise ValueError(f"{folder / name} cannot be read as JSON ({error}); copy it again") from error
        found |= {k: v for k, v in words.items() if v is not None} if isinstance(words, dict) else {}
    return found


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token`, `eos_token`, ...: what a template may name."""
    found = {}
    for name in ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"):
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            found[name] = text
    return found


def _without_marks(marked: str, dialogue: Dialogue) -> tuple[str, list[Span]]:
    """Text, and the spans between marks. As many blocks as assistant turns: block k is turn k's."""
    if _MARKS.search(json.dumps(dialogue.turns, ensure_ascii=False)):
        raise ValueError("has U+FDD0 or U+FDD1 in it, which no text has")
    pieces: list[str] = []
    spans: list[Span] = []
    begun: list[int] = []
    at = 0
    for piece in _MARKS.split(marked):
        if piece == _BEGIN:
            begun.append(at)
        elif piece == _END and begun:
            spans.append((begun.pop(), at))
        else:
            pieces.append(piece)
            at += len(piece)
    speakers = [i for i, turn in enumerate(dialogue.turns) if turn["role"] in TRAINED_ROLES]
    if dialogue.first_trained and len(spans) != len(speakers):
        raise ValueError("has not one generation block of the chat template for every turn of the assistant")
    if dialogue.first_trained:
        spans = [span for span, i in zip(spans, speakers, strict=True) if dialogue.trains(i)]
    return "".join(pieces), spans


def _common(a: str, b: str) -> str:
    n = next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:n]


def _raise(message: str) -> None:
    raise TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, **how: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **how)
