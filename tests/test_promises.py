"""Each promise of README and docs/ still stands on its page, and the test that proves it is there."""

import re
from pathlib import Path

import pytest
import yaml

TESTS = Path(__file__).resolve().parent
PROMISES = yaml.safe_load((TESTS / "promises.yaml").read_text(encoding="utf-8"))
PLACES = [(page, words, proof) for page, those in PROMISES.items() for words, proof in those.items()]


@pytest.mark.parametrize(("page", "words", "proof"), PLACES, ids=lambda value: str(value)[:40])
def test_a_promise_has_its_proof(page: str, words: str, proof: str) -> None:
    text = " ".join((TESTS.parent / page).read_text(encoding="utf-8").split())
    assert words in text, f"{page} does not say it any more: take it out of promises.yaml as well"
    file, name = proof.split("::")
    assert re.search(rf"^def {name}\(", (TESTS / file).read_text(encoding="utf-8"), re.M), f"{proof} is not there"
