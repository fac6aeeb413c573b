"""The example that thinks small and answers full: what it counts, and what docs/serving.md says it found.

FLOPs of a pair                        == those of the forwards that were run, one request at a time
a cache taken over by its own budget   == the cache as it was
tables, sentence and figure            == what think.json gives
"""

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_family import MODEL, TOKENIZER, manifest, random_weights
from PIL import Image

from nemo_elastic.cost.counts import flops
from nemo_elastic.serving import ElasticFamily, Request, complete, think_then_answer

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "examples" / "paper_small"
sys.path.insert(0, str(FOLDER))

import think  # noqa: E402
import think_page  # noqa: E402
from problems import Problem  # noqa: E402

MANIFEST = manifest()
PROMPTS = ([5, 6, 7], [8, 9, 10, 11, 12])


class Counting(ElasticFamily):
    """Adds up the FLOPs of filling (`s` tokens, logits of one) and of decoded tokens."""

    spent: dict[str, int]

    def logits(self, tokens: torch.Tensor, cache: object = None, *, last_only: bool = False) -> torch.Tensor:
        batch, length = tokens.shape
        subnet = self.subnets[self.active]
        found = flops(self.layout, subnet, sequence_length=length)
        head = 2 * subnet.hidden_size * self.layout.architecture.vocab_size
        assert last_only and batch == 1
        self.spent["filled" if cache.length == 0 else "decoded"] += found - (length - 1) * head
        return super().logits(tokens, cache, last_only=last_only)


def served(kind: type = ElasticFamily) -> ElasticFamily:
    """In memory, in fp64."""
    weights = {name: value.double() for name, value in random_weights().items()}
    return kind(weights, MANIFEST.layout, MODEL, MANIFEST.subnets, TOKENIZER.parent)


@pytest.mark.parametrize(("first", "second"), list(itertools.product(MANIFEST.subnets, MANIFEST.subnets)))
@pytest.mark.parametrize("most", [9, 4])  # with an answer, and ended before there is one
def test_the_flops_of_a_pair_are_those_of_its_forwards(first: str, second: str, most: int) -> None:
    family = served(Counting)
    family.spent = {"filled": 0, "decoded": 0}
    phases = think_then_answer(first, second, until=None, max_tokens=4)
    if first == second:  # nothing is filled again where the budget stays
        phases = think_then_answer(first, second, until=None, max_tokens=most)[:1]
    asked = [Request(prompt=prompt, phases=phases, max_new_tokens=most) for prompt in PROMPTS]
    found = [complete(family, [one])[0] for one in asked]
    asked = [Request(prompt=one.prompt, phases=(phases[0], phases[-1]), max_new_tokens=most) for one in asked]
    problems = [Problem("chain_sum", 2, "", (), "no such answer")] * 2
    counted = think.pair(family, problems, asked, found)
    assert counted["solved"] == counted["kinds"]["chain_sum"] == 0
    assert {part: round(2 * counted[part]) for part in ("filled", "decoded")} == family.spent


def test_a_cache_taken_over_by_its_own_budget_is_that_cache() -> None:
    family, tokens = served(), torch.tensor([[*PROMPTS[1], 3, 4]])
    for name in family.budgets:
        family.switch(name)
        cache = family.new_cache()
        family.logits(tokens[:, :5], cache)
        taken = think.carried(family, name, cache, name)
        wanted = family.logits(tokens)[:, 5:]
        assert (family.logits(tokens[:, 5:], taken) - wanted).abs().max() < 1e-12 * wanted.abs().max()
        assert (family.logits(tokens[:, 5:], cache) - wanted).abs().max() < 1e-12 * wanted.abs().max()  # left as it was


def test_a_cache_of_other_sizes_is_not_taken_over() -> None:
    family = served()
    family.switch("full")
    cache = family.new_cache()
    family.logits(torch.tensor([PROMPTS[0]]), cache)
    family.switch("small")
    with pytest.raises(ValueError, match=r"layer \d+ has \w+ \[.*\] in full, \[.*\] here"):
        think.carried(family, "full", cache, "small")


def test_docs_say_what_the_file_gives() -> None:
    """Nothing of it in docs/serving.md was typed by hand; the figure is of this file; the family is the kept run's."""
    result = json.loads(think.RESULT.read_text(encoding="utf-8"))
    page = " ".join((ROOT / "docs" / "serving.md").read_text(encoding="utf-8").split())
    for part in (think_page.table(result), think_page.switch_table(result), think_page.sentence(result)):
        assert " ".join(part.split()) in page
    pairs, many, moved = result["pairs"], result["problems"], result["switch"]["moved"]
    full, switched = pairs["full>full"], pairs["small>full"]
    totals = (f"{(row['decoded'] + row['filled']) / 1e6:.1f}" for row in (switched, full))
    for words in (
        f"{many * full['solved']:.0f} of {many} problems against {many * pairs['small>small']['solved']:.0f}",
        f"{1 - switched['decoded'] / full['decoded']:.0%} of the decoded FLOPs are saved".replace("%", " %"),
        "{} MFLOPs against {}".format(*totals),
        f"the {result['switch']['tokens']:,} tokens of the answers",
        f"moves by {moved['mean']:.0%} of the largest one".replace("%", " %"),
        f"by {moved['largest']:.0%} at most".replace("%", " %"),
    ):
        assert words in page
    assert Image.open(think.FIGURE).info["Results"] == think_page.digest(result)
    run = json.loads((FOLDER / "results" / f"{result['nested']}.json").read_text(encoding="utf-8"))
    assert run["parameters"] == result["parameters"]


def test_the_figure_is_drawn_again(tmp_path: Path) -> None:
    result = json.loads(think.RESULT.read_text(encoding="utf-8"))
    think_page.draw(result, tmp_path / "think.png")
    drawn, kept = Image.open(tmp_path / "think.png"), Image.open(think.FIGURE)
    assert (drawn.size, drawn.info["Results"]) == (kept.size, kept.info["Results"])
