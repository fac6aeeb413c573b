"""Chat templates as transformers renders them, and the exact loss mask; three templates of well-known shapes."""

import datetime
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import AddedToken, Tokenizer

from nemo_elastic.config import load_config
from nemo_elastic.config.sections import ChatConfig
from nemo_elastic.data.chat import encode, template_for
from nemo_elastic.data.chat_template import ChatTemplate
from nemo_elastic.data.conversations import is_chat, load_conversations
from nemo_elastic.data.tokenizer import DEFAULT_TOKENIZER, BPETokenizer
from nemo_elastic.data.turns import dialogue
from nemo_elastic.problems import ProblemsError

CHATML = """{%- if tools %}
<|im_start|>system
{% for tool in tools -%}
{{ tool | tojson }}
{% endfor -%}
<|im_end|>
{% endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<response>' + message.content + '</response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- if message.content %}{{ message.content }}{% endif %}
        {%- for call in message.tool_calls or [] %}
            {{- '<call>' }}{{ call.function.name }} {{ call.function.arguments | tojson(indent=2) }}{{ '</call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
HEADERS = """{{- bos_token }}
{%- set ns = namespace(system='') %}
{%- if messages[0]['role'] == 'system' %}
    {%- set ns.system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- '<|head|>system<|/head|>\\n\\nToday: ' + strftime_now('%d %b %Y') + '\\n' + ns.system + '<|eot|>' }}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate user/assistant') }}
    {%- endif %}
    {%- if message.role not in ['user', 'assistant'] %}{% continue %}{% endif %}
    {{- '<|head|>' + message['role'] + '<|/head|>\\n\\n' + message['content'] | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\\n\\n' }}{% endif %}
"""
THINKING = """{%- for message in messages %}
{%- if message.role == 'system' or (loop.first and tools) -%}
<SPECIAL_10>System
{{ message.content if message.role == 'system' }}
{%- if tools %}{{ '\\n<AVAILABLE_TOOLS>' + (tools | tojson) + '</AVAILABLE_TOOLS>' }}{% endif %}
{%- endif -%}
{%- if message.role == 'user' %}
<SPECIAL_11>User
{{ message.content }}
<SPECIAL_11>Assistant
{% elif message.role == 'assistant' %}
{%- if message.content %}{{ message.content }}{% endif %}
{%- if message.tool_calls %}{{ '<TOOLCALL>' }}{{ message.tool_calls | map(attribute='function') | list | tojson }}{{ '</TOOLCALL>' }}{% endif %}
{{- '<SPECIAL_12>' -}}
{% elif message.role == 'tool' %}
{{ '\\n<SPECIAL_11>User\\n<TOOL_RESPONSE>' + message.content + '</TOOL_RESPONSE>\\n<SPECIAL_11>Assistant\\n' -}}
{% endif -%}
{% endfor -%}
{%- if add_generation_prompt %}{{ '<think>\\n' }}{% endif %}
"""  # noqa: E501 - the line is the template's
SPECIAL = [
    "<|im_start|>", "<|im_end|>", "<|bos|>", "<|head|>", "<|/head|>", "<|eot|>",
    "<SPECIAL_10>", "<SPECIAL_11>", "<SPECIAL_12>",
]  # fmt: skip
EOT = {"__type": "AddedToken", "content": "<|eot|>", "lstrip": False, "normalized": False, "rstrip": False}
EOT |= {"single_word": False, "special": True}
TODAY = datetime.date.today().isoformat()
SUM = {"type": "function", "function": {"name": "sum", "parameters": {"type": "object", "note": 'a <b> & "é"'}}}
CALL = {"type": "function", "function": {"name": "sum", "arguments": {"a": 2, "b": [3, "é"]}}}
TALK = [
    {"role": "system", "content": " Be short. "},
    {"role": "user", "content": "What is 2 + 3?\n"},
    {"role": "assistant", "content": "It is 5."},
    {"role": "user", "content": "And 2 + 4? 文字"},
    {"role": "assistant", "content": "It is\n6. \U0001f40d "},
]
TOOLED = [
    {"role": "user", "content": "What is 2 + 3?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "5"},
    {"role": "tool", "content": "five"},
    {"role": "assistant", "content": "It is 5."},
]


def folder_with(folder: Path, template: str | None, **config: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(DEFAULT_TOKENIZER))
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    words = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|bos|>", "eos_token": EOT}
    words |= config | ({"chat_template": template} if template else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
    return folder


def trained_text(ids: list[int], mask: list[int], bpe: BPETokenizer) -> list[str]:
    """Text of every stretch with loss."""
    edges = np.flatnonzero(np.diff([0, *mask, 0]))
    return [bpe.decode(ids[a:b], skip_special_tokens=False) for a, b in edges.reshape(-1, 2)]


CALLS = '<call>sum {\n  "a": 2,\n  "b": [\n    3,\n    "é"\n  ]\n}</call>'
TOOLCALL = json.dumps([CALL["function"]] * 2, ensure_ascii=False)
CASES = {
    "chatml": (CHATML, TALK, None, ["It is 5.<|im_end|>", "It is\n6. \U0001f40d <|im_end|>"]),
    "chatml tools": (CHATML, TOOLED, [SUM], [f"{CALLS * 2}<|im_end|>", "It is 5.<|im_end|>"]),
    "headers": (HEADERS, TALK, None, ["It is 5.<|eot|>", "It is\n6. \U0001f40d<|eot|>"]),
    "thinking": (THINKING, TALK, None, ["It is 5.<SPECIAL_12>", "It is\n6. \U0001f40d <SPECIAL_12>"]),
    "thinking tools": (
        THINKING, TOOLED, [SUM], [f"<TOOLCALL>{TOOLCALL}</TOOLCALL><SPECIAL_12>", "It is 5.<SPECIAL_12>"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_ids_are_those_of_transformers_and_loss_is_the_assistants(tmp_path: Path, case: str) -> None:
    transformers = pytest.importorskip("transformers")
    template, talk, tools, trained = CASES[case]
    folder = folder_with(tmp_path / "t", template)
    bpe, chat = BPETokenizer(folder), ChatConfig(date=TODAY)
    ids, mask = encode({"messages": talk, "tools": tools}, bpe, chat, template_for(bpe, chat))
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    assert ids == theirs.apply_chat_template(talk, tools=tools, tokenize=True, return_dict=False)
    assert trained_text(ids, mask, bpe) == trained
    text = theirs.apply_chat_template(talk[:-1], tools=tools, tokenize=False, add_generation_prompt=True)
    found = template_for(bpe, chat).render(talk[:-1], tools, prompt=True)
    assert found == text


GENERATION = """{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}
{%- else %}{{ m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"""


def test_generation_blocks_are_honoured_as_transformers_honours_them(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = folder_with(tmp_path, GENERATION)
    bpe = BPETokenizer(folder)
    ids, mask = encode({"messages": TALK}, bpe, ChatConfig(), template_for(bpe, ChatConfig()))
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    how = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    found = theirs.apply_chat_template(TALK, **how)
    assert (ids, mask) == (found["input_ids"], found["assistant_masks"])
    assert trained_text(ids, mask, bpe)[0] == "It is 5.<|im_end|>"
    with pytest.raises(ValueError, match=r"U\+FDD0"):
        marked = [TALK[1] | {"content": "a\ufdd0"}, TALK[2]]
        encode({"messages": marked}, bpe, ChatConfig(), template_for(bpe, ChatConfig()))


FORGETS = """{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}
{%- else %}{{ m.content }}{% endif %}
{{- '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>' }}{% endif %}"""


def test_a_template_that_renders_earlier_turns_anew_is_refused_where_it_does(tmp_path: Path) -> None:
    bpe = BPETokenizer(folder_with(tmp_path, FORGETS))
    template = template_for(bpe, ChatConfig())
    thoughts = [t | {"content": f"<think>hm</think>{t['content']}"} if t["role"] == "assistant" else t for t in TALK]
    with pytest.raises(ValueError, match=r"has a turn 3 that the chat template renders in another way once others"):
        encode({"messages": thoughts}, bpe, ChatConfig(), template)
    ids, mask = encode({"messages": thoughts[:3]}, bpe, ChatConfig(), template)  # <think> is part of the prompt
    assert trained_text(ids, mask, bpe) == ["hm</think>It is 5.<|im_end|>"]
    ids, mask = encode({"messages": TALK}, bpe, ChatConfig(), template)  # no thought: the turn's constant beginning
    assert trained_text(ids, mask, bpe) == ["It is 5.<|im_end|>", "It is\n6. \U0001f40d <|im_end|>"]


def test_a_template_without_a_generation_prompt_and_a_first_turn_of_the_assistant(tmp_path: Path) -> None:
    source = "{% for m in messages %}{{ '<|im_start|>' + m.role + ':' + m.content + eos_token + ' ' }}{% endfor %}"
    bpe = BPETokenizer(folder_with(tmp_path, source))
    ids, mask = encode({"messages": [TALK[2], *TALK[1:3]]}, bpe, ChatConfig(), template_for(bpe, ChatConfig()))
    assert trained_text(ids, mask, bpe) == ["It is 5.<|eot|>"] * 2
    no_content = ChatTemplate("{% for m in messages %}{{ m.role }}{% endfor %}", {}, date="2025-01-01")
    with pytest.raises(ValueError, match="turn 2 whose beginning the chat template does not tell"):
        no_content.text_and_loss(dialogue({"messages": TALK[1:3]}))


def test_where_a_template_comes_from(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "t", "config {{ eos_token }}")
    own = tmp_path / "own.jinja"
    own.write_text("own {{ bos_token }}")
    bpe = BPETokenizer(folder / "tokenizer.json")

    def rendered(**chat: str) -> str | None:
        found = template_for(bpe, ChatConfig(**chat))
        return found and found.render(TALK)

    assert rendered() == "config <|eot|>" and rendered(start="<{role}>") is rendered(end="\n") is None
    assert rendered(template=str(own)) == "own <|bos|>"
    (folder / "chat_template.jinja").write_text("file")
    assert rendered() == "file"
    (folder / "chat_template.jinja").unlink()
    folder_with(folder, None, chat_template=[{"name": n, "template": n} for n in ("default", "tool_use")])
    assert rendered() == "default" and template_for(bpe, ChatConfig()).render(TALK, [SUM]) == "tool_use"
    folder_with(folder, "{{ eos_token }} {{ unk_token }}")
    (folder / "special_tokens_map.json").write_text('{"unk_token": "<|head|>", "eos_token": "<|bos|>"}')
    assert rendered() == "<|eot|> <|head|>"
    assert template_for(BPETokenizer(), ChatConfig()) is None
    for broken, words in (("{% if %}", "is no chat template that Jinja can read"), (3, "has a chat_template that")):
        folder_with(folder, broken)
        with pytest.raises(ValueError, match=rf"tokenizer_config\.json {words}"):
            rendered()
    with pytest.raises(ValueError, match=r"nowhere does not exist; give a file with a Jinja"):
        rendered(template=str(tmp_path / "nowhere"))


def test_a_template_reaches_nothing_and_knows_one_day(tmp_path: Path) -> None:
    for source in (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ strftime_now.__globals__ }}{{ raise_exception.__globals__.x }}",
        "{% for i in range(1000000) %}{% endfor %}",
        "{{ raise_exception('no such turns') }}",
        "{{ 1 + 'a' }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ):
        with pytest.raises(ValueError, match=r"cannot be rendered by the chat template|is nested too deeply"):
            ChatTemplate(source, {}, date="2025-01-01").render(TALK)
    found = ChatTemplate("{{ strftime_now('%d %b %Y') }}", {}, date="2024-07-26")
    assert found.render(TALK) == "26 Jul 2024"


def test_published_shapes_are_the_same_conversation() -> None:
    bpe = BPETokenizer()
    plain = {"messages": [{"role": r, "content": c} for r, c in (("system", "S"), ("user", "U"), ("assistant", "A"))]}
    turns = plain["messages"]
    same = [
        {"conversations": [{"from": f, "value": v} for f, v in (("system", "S"), ("human", "U"), ("gpt", "A"))]},
        {"conversations": turns},
        {"messages": [{**t, "content": [{"type": "text", "text": t["content"]}], "name": None} for t in turns]},
        {"prompt": turns[:2], "completion": turns[2:]},
        plain | {"tools": None},
        plain | {"tools": "[]"},
    ]
    for record in same:
        assert encode(record, bpe, ChatConfig()) == encode(plain, bpe, ChatConfig())
    pair = {"prompt": [TALK[1], TALK[2], TALK[3]], "completion": [TALK[4]]}
    ids, mask = encode(pair, bpe, ChatConfig())
    assert trained_text(ids, mask, bpe) == [f"{TALK[4]['content']}<|endoftext|>"]


def test_tools_without_a_template_are_json(tmp_path: Path) -> None:
    bpe = BPETokenizer()
    as_text = json.dumps(CALL["function"]["arguments"])
    calls = [{"function": {"name": "sum", "arguments": as_text}}]
    turns = [TALK[1], {"role": "assistant", "content": None, "tool_calls": calls}, {"role": "tool", "content": "5"}]
    ids, mask = encode({"messages": turns, "tools": json.dumps([SUM])}, bpe, ChatConfig())
    call, tool = (json.dumps(x, ensure_ascii=False) for x in (CALL["function"], SUM))
    assert trained_text(ids, mask, bpe) == [f"<tool_call>{call}</tool_call><|endoftext|>"]
    assert bpe.decode(ids).startswith(f"<|system|>\n<tools>{tool}</tools><|user|>\nWhat")
    with_system = encode({"messages": [TALK[0], *turns], "tools": [SUM]}, bpe, ChatConfig())[0]
    assert bpe.decode(with_system).startswith(f"<|system|>\n Be short. \n<tools>{tool}</tools><|user|>")


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ([], "is no object"),
        ({"messages": {}}, 'has "messages" that are no list of turns'),
        ({"messages": [3]}, "turn 1 is no object"),
        ({"messages": [{"content": "a"}]}, 'turn 1 has no "role" that is a string'),
        ({"messages": [TALK[1], {"role": "assistant", "content": None}]}, 'turn 2 has no "content" that is a string'),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "turn 1 has a part of type 'image'; this model",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "turn 1 has a part without text"),
        ({"conversations": [{"from": "alien", "value": "a"}]}, "turn 1 is \"from\" 'alien'; known are human, user"),
        ({"conversations": [{"from": ["a"], "value": "a"}]}, 'turn 1 is "from" '),
        ({"messages": [{"role": "assistant", "tool_calls": 3}]}, 'turn 1 has "tool_calls" that are no list'),
        ({"messages": TALK, "tools": "none"}, 'has "tools" that are no list'),
        ({"messages": TALK, "tools": [3]}, 'has "tools" that are not all objects'),
        ({"prompt": "a", "completion": [TALK[2]]}, "both text or both turns"),
    ],
)
def test_what_is_wrong_with_a_conversation_is_named(record: object, words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        encode(record, BPETokenizer(), ChatConfig())


def test_files_of_conversations_with_the_parents_template(tmp_path: Path) -> None:
    bpe = BPETokenizer(folder_with(tmp_path / "t", CHATML))
    record = {"messages": TOOLED, "tools": [SUM]}
    lines = [json.dumps(record)] * 3
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    found = load_conversations("train", bpe, [tmp_path / "a.jsonl"], ChatConfig(), tmp_path / "cache")
    ids, mask = encode(record, bpe, ChatConfig(), template_for(bpe, ChatConfig()))
    assert (
        found.ids.tolist() == ids * 2
        and found.mask.tolist() == mask * 2
        and found.ends.tolist() == [len(ids), 2 * len(ids)]
    )
    other = load_conversations("train", bpe, [tmp_path / "a.jsonl"], ChatConfig(start="<{role}>"), tmp_path / "cache")
    assert len(other.ids) != len(found.ids)
    (tmp_path / "t" / "chat_template.jinja").write_text("{{ raise_exception('never') }}")
    (tmp_path / "a.jsonl").write_text("\n".join(["", *lines]))
    with pytest.raises(ValueError, match=r"a\.jsonl line 2 cannot be rendered by the chat template \(never\)"):
        load_conversations("train", bpe, [tmp_path / "a.jsonl"], ChatConfig(), tmp_path / "cache")
    shares = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    pq.write_table(pa.table({"id": ["x"] * 3, "conversations": [shares] * 3}), tmp_path / "a.parquet")
    assert is_chat(tmp_path / "a.parquet")
    rows = load_conversations("train", bpe, [tmp_path / "a.parquet"], ChatConfig(end="\n"), tmp_path / "cache")
    assert bpe.decode(rows.ids[: rows.ends[0]]) == "<|user|>\na\n<|assistant|>\nb\n"


def test_the_configuration_refuses_what_would_do_nothing() -> None:
    with pytest.raises(ProblemsError) as error:
        load_config("tiny_parent.yaml", ["data.chat.template=a.jinja", "data.chat.start=x", "data.chat.date=today"])
    assert [p.key for p in error.value.problems] == ["data.chat.start", "data.chat.date"]
