"""Chromium without a window: what a page looks like there, measured from inside it, as pictures and on paper.

    measured(page, folder, width=390, dark=True) -> dict       of a copy with a script at its end, in a frame
    picture(page, to, width=390, dark=True)                    PNG
    paper(page, to)                                            PDF

Chromium is driven by its command line alone and has no network. It gives a window 500 pixels at least, hence the frame.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MISSING = "no Chromium here: `apt-get install chromium` (.ci/run does)"
TALL = 24_000  # of the frame: what is not in view cannot be asked what lies under it
PROBE = Path(__file__).with_name("browser_probe.js")
FRAME = """<!doctype html><meta charset="utf-8"><meta name="color-scheme" content="light dark">
<style>body, pre {{ margin: 0 }} iframe {{ border: 0; display: block }}</style>
<pre id="measured"></pre><iframe src="{name}" width="{width}" height="{height}"></iframe>
<script>addEventListener("message", (e) => {{ document.getElementById("measured").textContent = e.data }})</script>
"""


def measured(page: Path, folder: Path, *, width: int, dark: bool = False, printed: bool = False) -> dict[str, Any]:
    """What `browser_probe.js` finds in a page of that width; `printed`: under its rules for paper."""
    text = page.read_text(encoding="utf-8")
    if printed:
        text = text.replace("@media print", "@media all").replace("@media screen", "@media print")
    script = f"<script>{PROBE.read_text(encoding='utf-8')}</script>"
    probed, frame = folder / "probed.html", folder / "frame.html"
    probed.write_text(text.replace("</body>", f"{script}</body>"), encoding="utf-8")
    frame.write_text(FRAME.format(name=probed.name, width=width, height=TALL), encoding="utf-8")
    found = _chromium(
        folder, dark, f"--window-size=1400,{TALL}", "--virtual-time-budget=10000", "--dump-dom", frame.as_uri()
    )
    said = re.search(r'<pre id="measured">(.+?)</pre>', found, flags=re.S)
    assert said, f"the page did not answer: {found[:2000]}"
    return json.loads(html.unescape(said.group(1)))


def picture(page: Path, to: Path, *, width: int, height: int, dark: bool = False, scale: float = 1.0) -> Path:
    """A PNG of the upper `height` pixels; below 500 pixels of width there is paper on the right."""
    size = (f"--window-size={width},{height}", f"--force-device-scale-factor={scale:g}", f"--screenshot={to}")
    _chromium(to.parent, dark, *size, "--virtual-time-budget=5000", page.as_uri())
    return to


def paper(page: Path, to: Path) -> Path:
    """A PDF, as the page prints itself."""
    _chromium(to.parent, False, f"--print-to-pdf={to}", "--no-pdf-header-footer", page.as_uri())
    return to


def _chromium(folder: Path, dark: bool, *flags: str) -> str:
    always = (
        "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage",
        "--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={folder / 'chromium'}", f"--blink-settings=preferredColorScheme={0 if dark else 1}",
    )  # fmt: skip
    done = subprocess.run([CHROMIUM, *always, *flags], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
