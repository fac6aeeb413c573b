"""Set-up with a stand-in for the venv's Python: two at once, one that was killed, the interpreter make keeps to."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Runs the real set-up; only the venv is made of one file, a Python whose pip takes a moment and notices when its folder
# goes away, or when another pip works in it.
DRIVER = """
import sys
sys.path.insert(0, {scripts!r})
import setup_venv

def create(target, on_top):
    target.mkdir(exist_ok=True)
    python = target / "python"
    python.write_text({python!r})
    python.chmod(0o755)
    return python

setup_venv.create = create
raise SystemExit(setup_venv.main())
"""
PYTHON = """#!/bin/sh
case "$*" in *"-m pip install"*) ;; *) echo " False"; exit 0 ;; esac
cd "$(dirname "$0")"
mkdir half || exit 1
echo begin >> {log}
sleep {seconds}
rmdir "$(dirname "$0")/half" || exit 1
echo end >> {log}
"""


class SetUps:
    """Set-ups of one stand-in venv in `folder`."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self.venv, self.log = folder / ".venv", folder / "log"
        self.pins = folder / "pins.txt"
        self.pins.write_text("torch==2.0\nnumpy==1.0\n")
        script = PYTHON.format(log=self.log, seconds=seconds)
        self.driver = DRIVER.format(scripts=str(ROOT / "scripts"), python=script)

    def start(self) -> subprocess.Popen:
        words = ["--venv", str(self.venv), "--constraints", str(self.pins), "--no-project"]
        return subprocess.Popen([sys.executable, "-c", self.driver, *words], stderr=subprocess.PIPE, text=True)

    def installed(self) -> list[str]:
        """What pip did, call by call."""
        return self.log.read_text().split() if self.log.exists() else []

    def wait_for(self, count: int) -> None:
        deadline = time.monotonic() + 20
        while len(self.installed()) < count:
            assert time.monotonic() < deadline, self.installed()
            time.sleep(0.01)


def test_two_set_ups_at_once_both_end_well_and_one_of_them_works(tmp_path: Path) -> None:
    setups = SetUps(tmp_path, seconds=0.4)
    both = [setups.start(), setups.start()]
    said = [one.communicate(timeout=60)[1] for one in both]
    assert [one.returncode for one in both] == [0, 0], said
    assert setups.installed() == ["begin", "end"] * 2  # torch, then the pins: once
    assert (setups.venv / ".setup-complete").is_file() and not (setups.venv / ".setup-running").exists()
    waiting = [text for text in said if "waiting for its end" in text]
    assert len(waiting) == 1
    assert str(both[1 - said.index(waiting[0])].pid) in waiting[0]
    again = setups.start()
    assert again.communicate(timeout=60)[1] == "" and again.returncode == 0  # nothing to do, nothing said


def test_a_set_up_that_was_killed_is_started_again_when_its_pip_has_ended(tmp_path: Path) -> None:
    setups = SetUps(tmp_path, seconds=0.6)
    first = setups.start()
    setups.wait_for(1)
    first.send_signal(signal.SIGKILL)  # and pip goes on
    first.wait(timeout=20)
    assert setups.installed() == ["begin"]
    second = setups.start()
    said = second.communicate(timeout=60)[1]
    assert second.returncode == 0, said
    assert "waiting for its end" in said and "interrupted: starting again" in said
    assert setups.installed() == ["begin", "end"] * 3


def test_make_keeps_the_interpreter_the_venv_was_made_with(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "MAKEFLAGS", "MAKELEVEL")}

    def interpreter(*words: str) -> str:
        done = subprocess.run(["make", "-n", "setup", *words], cwd=tmp_path, env=clean, capture_output=True, text=True)
        return done.stdout.split()[0]

    assert interpreter() == "python3"
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".setup-python").write_text(sys.executable)
    assert interpreter() == sys.executable
    assert interpreter("PYTHON=python3.12") == "python3.12"
    (tmp_path / ".venv" / ".setup-python").write_text(str(tmp_path / "gone"))
    assert interpreter() == "python3"
