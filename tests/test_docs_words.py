"""Every page reads with docs/concepts.md beside it: house words and abbreviations are explained, no entry is unused.

An entry of concepts.md is what begins a paragraph in bold, a word in italics above the tables, or the first cell of a
row of the tables.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CONCEPTS = ROOT / "docs" / "concepts.md"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted(path for folder in ("examples", "benchmarks", "tests") for path in (ROOT / folder).glob("**/README.md"))
CONF = sorted((ROOT / "conf").glob("**/*.yaml"))

# What means something of its own in this project: an entry of concepts.md wherever a page says it.
HOUSE = """active parameters, alone, before training, block, budget, candidate, canonical name, census, child,
    choice, curriculum, damage, dim, even shrink, extracted, family, forced, full member, gate, greedy search,
    group, hard, kind, layout, manifest, masked, member, nat, nested, OUT, parameter table, parent, pinned,
    plan, price, race, ranking, recipe, repair, router, score, settling, shape, shim, shipped parent, sliced,
    soft, sorted parent, space, stock, subnet, unit, wide search, width, window"""
# What one page explains, and another one that says it links to that page.
LOCAL = {
    r"wings?": "architecture.md",
    r"the kit|GPU kit": "gpu.md",
    r"gentle": "results.md",
    r"[Cc]ompact (?:copy|copies|switch)": "serving.md",
}
# Words that stood for what a standard word says, and that word.
REPLACED = {
    r"METHOD(?:\.md)?": "a page of docs/, or the paper",
    r"(?:the|one|own) door": "mcore/versions.py",
    r"twin": "a version in plain torch",
    r"quadratic pull": "penalty",
    r"token meets": "token uses",
    r"legality": "allowed sizes",
    r"which is said": "and a line says so",
}
# Known to whoever trains models: products, formats, units, signals, and what is short for nothing that matters here.
KNOWN = set(
    """AMD API BOM CPU CSV CUDA DGX EPYC FFFD GB GPT GPU H100 HTML IBM JSON L2 MB NCCL NFS NVIDIA PB PDF PNG POSIX
    README RMS SHA SIGINT SXM TB TFLOP TMPDIR UTF YAML CMU UIUC HH MM SS H200""".split()  # noqa: SIM905
)
VARIES = "concepts.md#how-much-numbers-vary"
SHORT_RUNS = r"\b(?:160|240) steps\b|the small reproduction|the quickstart's family|`make quickstart` made"


def prose(path: Path) -> str:
    """A page without commands, code, comments and the places of links; of a YAML file its comments."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".yaml":
        return "\n".join(re.findall(r"(?:^|\s)#(.*)$", text, flags=re.MULTILINE))
    text = re.sub(r"^```.*?^```|<!--.*?-->", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`]*`|\]\([^)]*\)", " ", text)


def entries() -> list[str]:
    """What concepts.md explains, in lower case."""
    text = CONCEPTS.read_text(encoding="utf-8")
    running, *tables = re.split(r"^## (?:More words|Abbreviations)$", text, flags=re.MULTILINE)
    tables[-1], rest = re.split(r"^## ", tables[-1], maxsplit=1, flags=re.MULTILINE)
    running += rest
    found = re.findall(r"^\*\*([^*]+)\.\*\*", running, flags=re.MULTILINE)
    found += re.findall(r"\*([^*`]+)\*", re.sub(r"\*\*[^*]+\*\*|`[^`]*`", "", running))
    for table in tables:
        rows = re.findall(r"^\| ([^|]+) \|", table, flags=re.MULTILINE)[1:]
        found += [word for row in rows for word in row.split(", ")]
    return [" ".join(word.split()).lower() for word in found]


PROSE = {page: prose(page) for page in [*PAGES, *CONF]}
ENTRIES = entries()


def says(text: str, word: str) -> bool:
    """Whether a text has the word, alone or with an ending."""
    words = r"\s+".join(map(re.escape, word.split()))
    case = 0 if word.isupper() else re.IGNORECASE
    return re.search(rf"(?<![\w-])(?:{words})(?:s|es|ed|d|ren)?(?!\w)", text, flags=case) is not None


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_there_are_entries() -> None:
    assert {"parent", "full member", "units", "masked", "wide search", "reap", "tp"} <= set(ENTRIES)
    assert 70 < len(ENTRIES) < 130


def test_every_house_word_that_a_page_says_is_an_entry() -> None:
    words = [" ".join(word.split()) for word in HOUSE.split(",")]
    unsaid = [word for word in words if not any(says(text, word) for page, text in PROSE.items() if page != CONCEPTS)]
    assert unsaid == [], "no page says these: take them out of HOUSE"
    assert [word for word in words if not {word.lower(), f"{word.lower()}s"} & set(ENTRIES)] == []


def test_every_entry_is_said_on_another_page() -> None:
    rest = "\n".join(page.read_text(encoding="utf-8") for page in PROSE if page != CONCEPTS)
    assert [word for word in ENTRIES if not says(rest, word) and not says(rest, word.upper())] == []


@pytest.mark.parametrize("page", PROSE, ids=name)
def test_every_abbreviation_is_expanded(page: Path) -> None:
    text = PROSE[page]
    short = set(re.findall(r"(?<![\w/.+-])[A-Z][A-Z0-9]{1,5}(?!\w)", text)) - KNOWN
    here = {word for word in short if re.search(rf"\w \({word}\b|\b{word}(?:-\d+)? \([a-z]", text)}
    unknown = sorted(word for word in short - here if word.lower() not in ENTRIES)
    assert unknown == [], "write these out on the page, or in concepts.md"


@pytest.mark.parametrize("page", [page for page in PAGES if page != CONCEPTS], ids=name)
def test_a_page_leads_to_what_explains_its_words(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert re.search(r"\]\([^)]*concepts\.md(?:#[a-z-]+)?\)", text), "a page links to the words"
    if re.search(SHORT_RUNS, text):
        assert VARIES in text, f"a page that quotes short runs links to {VARIES}"
    for words, home in LOCAL.items():
        if page.name != home and re.search(rf"\b(?:{words})\b", PROSE[page]):
            assert re.search(rf"\]\([^)]*{re.escape(home)}", text), f"{words}: {home} explains it, link to it"


@pytest.mark.parametrize("page", PROSE, ids=name)
def test_no_page_falls_back_to_a_private_word(page: Path) -> None:
    for words, instead in REPLACED.items():
        assert re.search(rf"\b(?:{words})\b", PROSE[page]) is None, f"{words}: say {instead}"
