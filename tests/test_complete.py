"""Requests answered by several budgets in turn.

tokens and logits of a phase == those of its budget's own child on all tokens so far      1e-5 relative, fp32
a batch of any requests == each of them alone                                             the same tokens and text
"""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_family import MODEL, TOKENIZER, manifest, random_weights
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_elastic.checkpoint.extract import child_architecture, child_tensors
from nemo_elastic.checkpoint.reader import MemoryReader
from nemo_elastic.data.tokenizer import BPETokenizer
from nemo_elastic.problems import ProblemsError
from nemo_elastic.serving import ElasticFamily, Phase, Request, complete, think_then_answer
from nemo_elastic.serving.requests import Completion, Part, Piece
from nemo_elastic.serving.written import Written

MANIFEST = manifest()
NAMES = tuple(MANIFEST.subnets)
PROMPTS = [
    torch.randint(0, MODEL["vocab_size"], (n,), generator=torch.Generator().manual_seed(seed)).tolist()
    for seed, n in enumerate((7, 7, 3))
]
BPE = BPETokenizer(TOKENIZER)


class Recording(ElasticFamily):
    """Keeps every call of `logits`."""

    def logits(self, tokens: torch.Tensor, cache: object = None, *, last_only: bool = False) -> torch.Tensor:
        found = super().logits(tokens, cache, last_only=last_only)
        self.__dict__.setdefault("calls", []).append((self.active, tuple(tokens.shape), found))
        return found


def family(dtype: torch.dtype = torch.float64, kind: type = ElasticFamily) -> ElasticFamily:
    """In memory, with the shipped tokenizer."""
    weights = {name: value.to(dtype) for name, value in random_weights().items()}
    return kind(weights, MANIFEST.layout, MODEL, MANIFEST.subnets, TOKENIZER.parent)


@pytest.fixture(scope="module")
def own_logits() -> Callable[[str, list[int]], torch.Tensor]:
    """Logits of a budget's extracted child as a model of Megatron's, all tokens at once."""
    models = {}

    def run(name: str, tokens: list[int]) -> torch.Tensor:
        from nemo_elastic.mcore.models.build import build_plain_model, load_weights
        from nemo_elastic.mcore.models.evaluate import whole_logits

        if name not in models:
            subnet = MANIFEST.subnet(name)
            architecture = child_architecture(MANIFEST.space.architecture, subnet)
            models[name] = build_plain_model(architecture, perform_initialization=False)
            cut = child_tensors(MemoryReader(random_weights()), MANIFEST.layout, subnet)
            load_weights(models[name], {t.name: t.read() for t in cut}, architecture)
        return whole_logits(models[name], torch.tensor([tokens]))[0]

    return run


@pytest.mark.parametrize(("think", "answer"), list(itertools.product(NAMES, NAMES)))
def test_a_switch_is_the_two_budgets_own_models(
    one_rank: None, own_logits: Callable[[str, list[int]], torch.Tensor], think: str, answer: str
) -> None:
    served = family(torch.float32, Recording)
    phases = think_then_answer(think, answer, until=None, max_tokens=6)
    (found,) = complete(served, [Request(prompt=PROMPTS[0], phases=phases, max_new_tokens=11)])
    assert [(p.budget, p.tokens, p.ended) for p in found.parts] == [
        (think, 6, "max_tokens"),
        (answer, 5, "max_new_tokens"),
    ]
    tokens = [*PROMPTS[0], *found.tokens]
    calls = [(budget, shape) for budget, shape, _ in served.calls]
    assert calls == [(think, (1, 7)), *[(think, (1, 1))] * 5, (answer, (1, 13)), *[(answer, (1, 1))] * 4]
    for number, (budget, _, logits) in enumerate(served.calls):
        seen = tokens[: 7 + number]
        wanted = own_logits(budget, seen)[-1]
        assert (logits[0, -1] - wanted).abs().max() / wanted.abs().max() < 1e-5
        assert int(wanted.argmax()) == tokens[7 + number]


def requests(temperature: float) -> list[Request]:
    """Different lengths, schedules, ends and seeds; some switch at the same length, some never."""
    how = {"temperature": temperature, "top_k": 50}
    first = complete(family(), [Request(prompt=PROMPTS[1], phases=(Phase(budget="small"),), max_new_tokens=9, **how)])
    met = first[0].tokens[6]
    return [
        Request(prompt=PROMPTS[0], phases=think_then_answer("small", "full", max_tokens=3), max_new_tokens=9, **how),
        Request(prompt=PROMPTS[1], phases=think_then_answer("small", "full", until=met), max_new_tokens=12, **how),
        Request(prompt=PROMPTS[2], phases=think_then_answer("large", "small", max_tokens=4), max_new_tokens=8, **how),
        Request(prompt=PROMPTS[1], phases=(Phase(budget="small"),), max_new_tokens=9, stop=(met,), **how),
        Request(prompt=PROMPTS[0], phases=(Phase(budget="full"),), max_new_tokens=6, seed=5, **how),
        Request(
            prompt=PROMPTS[0],
            phases=(
                Phase(budget="full", max_tokens=2),
                Phase(budget="small", max_tokens=3),
                Phase(budget="full", max_tokens=2),
            ),
            max_new_tokens=20,
            seed=1,
            **how,
        ),
    ]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_is_one_by_one(temperature: float) -> None:
    served, asked = family(), requests(temperature)
    served.switch("large", compact=True)
    together = complete(served, asked)
    assert (served.active, served.compact) == ("large", True)
    assert together == [complete(served, [request])[0] for request in asked]
    assert together == complete(served, asked, compact=True)
    ends = [[(part.budget, part.tokens, part.ended) for part in found.parts] for found in together]
    assert ends[0] == [("small", 3, "max_tokens"), ("full", 6, "max_new_tokens")]
    assert ends[1][0][1] > 3  # one row leaves before another one of its group does
    assert ends[1][0][2] == "until" and ends[1][1][0] == "full" and len(together[1].tokens) == 12
    assert ends[3][-1] == ("small", ends[1][0][1], "stop") and together[3].tokens[-1] == asked[3].stop[0]
    assert ends[5] == [("full", 2, "max_tokens"), ("small", 3, "max_tokens"), ("full", 2, "max_tokens")]


def test_one_phase_is_generate_and_draws_follow_the_seed() -> None:
    served = family()
    served.switch("small")
    alone = (Phase(budget="small"),)
    (found,) = complete(served, [Request(prompt=PROMPTS[0], phases=alone, max_new_tokens=10)])
    assert list(found.tokens) == served.generate(PROMPTS[0], 10)[0].tolist()
    drawn = [
        complete(served, [Request(prompt=PROMPTS[0], phases=alone, max_new_tokens=10, temperature=1.5, seed=seed)])
        for seed in (3, 3, 4)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    wanted = served.generate(PROMPTS[0], 10, temperature=1.5, seed=3)[0].tolist()
    assert list(drawn[0][0].tokens) == wanted


def test_rows_of_one_budget_and_length_share_their_forwards() -> None:
    """Two rows think together; the one that ends first waits for nobody, both answers are filled apart."""
    served = family(torch.float32, Recording)
    asked = [
        Request(prompt=PROMPTS[0], phases=think_then_answer("small", "full", max_tokens=n), max_new_tokens=5)
        for n in (2, 2, 4)
    ]
    complete(served, asked)
    assert [(budget, shape) for budget, shape, _ in served.calls] == [
        ("small", (3, 7)),
        ("small", (3, 1)),
        ("small", (1, 1)),
        ("small", (1, 1)),
        ("full", (2, 9)),
        ("full", (2, 1)),
        ("full", (2, 1)),
        ("full", (1, 11)),
    ]


def streamed(asked: list[Request]) -> tuple[list[Completion], list[list[Piece]]]:
    """Answers, and what was heard of each."""
    heard: list[list[Piece]] = [[] for _ in asked]
    return complete(family(), asked, stream=lambda piece: heard[piece.request].append(piece)), heard


def test_a_stream_says_the_text_and_never_a_stop() -> None:
    free = Request(prompt=PROMPTS[0], phases=(Phase(budget="small"),), max_new_tokens=24)
    ((whole,), ((*pieces,),)) = streamed([free])
    assert [piece.token for piece in pieces] == list(whole.tokens)
    assert "".join(piece.text for piece in pieces) == whole.text
    assert BPE.decode(whole.tokens, skip_special_tokens=False).startswith(whole.text) and len(whole.text) > 20
    begin = len(whole.text) // 2
    stop = whole.text[begin : begin + 7]  # over several tokens, and what it begins with is held back
    (answers, heard) = streamed([free, Request(**{**vars(free), "stop": ("never there", stop)})])
    assert answers[0] == whole
    assert answers[1].text == whole.text[: whole.text.index(stop)]
    assert answers[1].parts[0].ended == "stop" and len(answers[1].tokens) < 24
    for answer, row in zip(answers, heard, strict=True):
        assert "".join(piece.text for piece in row) == answer.text
        assert all(answer.text.startswith("".join(p.text for p in row[:n])) for n in range(len(row)))


def test_until_counts_what_the_phase_itself_says() -> None:
    free = Request(prompt=PROMPTS[0], phases=(Phase(budget="small"),), max_new_tokens=12)
    whole = complete(family(), [free])[0]
    mark = BPE.decode(whole.tokens[:3])[-2:]
    assert mark.strip()
    until = tuple(Phase(budget="small", until=mark) for _ in range(2))
    (found,) = complete(family(), [Request(**{**vars(free), "phases": (*until, Phase(budget="full"))})])
    texts, at = [], 0
    for part in found.parts:
        texts.append(BPE.decode(found.tokens[at : at + part.tokens]))
        at += part.tokens
    ended = [part.ended for part in found.parts]
    assert ended[0] == "until" and mark in texts[0]
    assert found.tokens[: found.parts[0].tokens] == whole.tokens[: found.parts[0].tokens]
    assert all((mark in text) == (end == "until") for text, end in zip(texts, ended, strict=True))


@settings(max_examples=60, deadline=None)
@given(tokens=st.lists(st.integers(0, 2047), min_size=1, max_size=40), stop=st.text("aeion t", min_size=1, max_size=3))
def test_text_that_grows_is_the_text(tokens: list[int], stop: str) -> None:
    """Any tokens, halves of characters too; what was said is never taken back."""
    written, said, stopped = Written(BPE.tokenizer, [stop]), "", False
    for number, token in enumerate(tokens):
        written.add(token)
        stopped = written.stop()
        said += written.say(last=stopped or number + 1 == len(tokens))
        if stopped:
            break
    whole = BPE.decode(tokens[: number + 1], skip_special_tokens=False)
    assert said == written.text and stop not in said
    assert whole.startswith(said)
    assert stopped == (stop in whole)
    if not stopped:
        assert set(whole[len(said) :]) <= {"\ufffd"} or whole[len(said) :].endswith("\ufffd")


GOOD = {"prompt": [1, 2], "phases": (Phase(budget="small"),), "max_new_tokens": 3}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": []}, r"requests\[0\]\.prompt: is empty"),
        ({"prompt": [1, 2048]}, "token 2048 must be below the parent's vocab_size=2048"),
        ({"max_new_tokens": 0}, r"max_new_tokens: 0 must be at least 1"),
        ({"temperature": -1.0}, r"temperature: -1.0 must be at least 0"),
        ({"temperature": float("nan")}, "temperature: nan must"),
        ({"top_k": 0}, "top_k: 0 must be at least 1"),
        ({"stop": ("",)}, "'' is in every text"),
        ({"phases": ()}, "phases: are none"),
        ({"phases": think_then_answer("smal", "full")}, r"phases\[0\]\.budget: 'smal' .* did you mean 'small'"),
        ({"phases": think_then_answer("small", "full", until=None)}, r"phases\[0\]: never ends"),
        ({"phases": think_then_answer("small", "full", until="")}, r"until: '' is in every text"),
        ({"phases": think_then_answer("small", "full", max_tokens=0)}, r"max_tokens: 0 must be at least 1"),
    ],
)
def test_what_means_nothing_is_refused(change: dict, words: str) -> None:
    with pytest.raises(ProblemsError, match=words):
        complete(family(), [Request(**{**GOOD, **change})])


def test_without_a_tokenizer_marks_are_ids(tmp_path: Path) -> None:
    served = family()
    served.tokenizer = None
    with pytest.raises(ProblemsError, match="this checkpoint has no tokenizer; give the ids"):
        complete(served, [Request(**{**GOOD, "stop": ("x",)})])
    (found,) = complete(served, [Request(**GOOD)])
    assert found.text is None and found.parts == (Part("small", 3, "max_new_tokens"),)
