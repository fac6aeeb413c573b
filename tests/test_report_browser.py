"""The report in a real browser, in both themes, on a phone and on paper: whole, readable, without a network."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import browser
import pytest
from synthetic_run import write_run

from nemo_elastic.report.write import write_report

pytestmark = pytest.mark.skipif(browser.CHROMIUM is None, reason=browser.MISSING)
VIEWS: dict[str, dict[str, Any]] = {
    "phone": {"width": 390},
    "phone-dark": {"width": 390, "dark": True},
    "desk": {"width": 1280},
    "desk-dark": {"width": 1280, "dark": True},
    "paper": {"width": 688, "printed": True},  # A4 without its margins
}
FAULTS = """<section class="picture" id="lost"><h2>Lost</h2><figure></figure></section>
<p style="width: 900px">too wide</p><p style="color: #ddd; background: #fff">pale</p>
<p style="font-size: 6px">small</p><a href="#nowhere">nowhere</a>
<svg class="figure" viewBox="0 0 100 20"><rect width="100" height="20" fill="#333"/>
<text y="15" fill="#444">dim</text></svg>
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(write_run(tmp_path_factory.mktemp("run")))


@pytest.mark.parametrize("view", VIEWS)
def test_every_view_is_whole_and_readable(page: Path, tmp_path: Path, view: str) -> None:
    found = browser.measured(page, tmp_path, **VIEWS[view])
    assert found["width"] == found["scroll"] == VIEWS[view]["width"]
    assert found["height"] <= browser.TALL  # else what lies below was not asked
    assert found["dark"] == VIEWS[view].get("dark", False)
    assert (sum(found["paper"][:3]) < 200) == found["dark"]
    assert found["texts"] > 500
    assert (found["wide"], found["pale"], found["small"]) == ([], [], [])
    assert (found["dead"], found["fetched"]) == ([], [])
    drawn = {path.stem for path in page.parent.glob("*.png")}
    assert {figure["name"] for figure in found["figures"]} == drawn
    for figure in found["figures"]:
        assert figure["width"] > 300 and figure["height"] > 80 and figure["marks"] > 4, figure


def test_links_lead_to_files_beside_the_page(page: Path, tmp_path: Path) -> None:
    links = browser.measured(page, tmp_path, width=1280)["links"]
    assert {"#spending", "#planned", "#loading", "#sources", "budgets.csv", "loss.png"} <= set(links)
    assert all(to.startswith("#") or (page.parent / to).is_file() for to in links)


def test_it_prints(page: Path, tmp_path: Path) -> None:
    printed = browser.paper(page, tmp_path / "report.pdf").read_bytes()
    assert printed.startswith(b"%PDF")
    assert 4 <= len(re.findall(rb"/Type /Page\b", printed)) <= 16


def test_the_probe_sees_what_is_wrong(page: Path, tmp_path: Path) -> None:
    spoilt = tmp_path / "spoilt.html"
    text = page.read_text(encoding="utf-8")
    spoilt.write_text(text.replace("<footer>", f"{FAULTS}<footer>"), encoding="utf-8")
    found = browser.measured(spoilt, tmp_path, width=390)
    assert any("too wide" in words for words in found["wide"]) and found["scroll"] > 390
    assert any("pale" in words for words in found["pale"]) and any("dim" in words for words in found["pale"])
    assert any("small" in words for words in found["small"])
    assert found["dead"] == ["#nowhere"]
    assert {"name": "lost", "width": 0, "height": 0, "marks": 0} in found["figures"]
