"""Make the virtual environment the Makefile works in, once, exactly pinned, and resumable.

Four cases:
- a plain machine: torch, where it is among the pins, first and alone (`TORCH_INDEX_URL`, when set, is where it is taken
  from), then every other pin of the constraints file with `--no-deps`, then this project, editable;
- an image whose `python3` already has CUDA torch, megatron.core and NeMo (the NGC image): a venv on top of these
  packages, and only what is missing of the file's [project] section is installed;
- `--on-top-of VENV` (another venv of this project): a venv that sees all packages of VENV but those that the file of
  constraints pins, which it has of its own: another line of Megatron-core in seconds;
- the venv is up to date: nothing happens. A stamp, written last, holds the hash of everything that decides its content.

An interrupted run leaves a marker behind, and the next one starts from an empty venv: pip cannot tell a half-written
package from an installed one. One run at a time works on a venv: a lock beside it (`.venv.lock`) is held by the run and
by the pip it started, and a second run waits for both, then looks again.

    python3 scripts/setup_venv.py [--venv .venv] [--constraints constraints.txt] [--no-project] [--on-top-of VENV]
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON_RANGE = ((3, 11), (3, 13))
# An older one than the pin, from the image or from venv itself, cannot read pyproject.toml.
BUILD_TOOL = "setuptools"
# Built from C sources where no wheel exists; only reasoning problems are missing without it.
NEEDS_COMPILER = {"pycosat"}
PIP_OPTIONS = ["--quiet", "--quiet", "--no-input", "--disable-pip-version-check", "--no-warn-script-location"]


def read_sections(path: Path) -> dict[str, list[str]]:
    """Pins by section: a comment line `# [name]...` opens one. Raises ValueError on anything but `name==version`."""
    sections: dict[str, list[str]] = {}
    current = "all"
    for line in path.read_text().splitlines():
        header = re.match(r"#\s*\[(\w+)\]", line)
        if header:
            current = header[1]
        elif line.strip() and not line.startswith("#"):
            if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+", line.strip()):
                raise ValueError(f"{path.name}: {line.strip()!r} is not an exact pin; write name==version")
            sections.setdefault(current, []).append(line.strip())
    return sections


def normalized(requirement: str) -> str:
    """Distribution name of a pin as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", requirement.split("==")[0]).lower()


def fingerprint(constraints: Path, base: Path | None = None) -> str:
    """Hash of all that decides what the venv holds: pins, project metadata, this script, interpreter, place, base."""
    digest = hashlib.sha256()
    for path in (constraints, ROOT / "pyproject.toml", Path(__file__)):
        digest.update(path.read_bytes())
    digest.update(f"{sys.version}|{sys.prefix}|{ROOT}".encode())
    if base is not None:
        digest.update((base / ".setup-complete").read_bytes())
    return digest.hexdigest()


def is_complete(target: Path, constraints: Path, base: Path | None = None) -> bool:
    """True when `target` was made from these pins by this interpreter, to its end."""
    stamp = target / ".setup-complete"
    return stamp.exists() and stamp.read_text() == fingerprint(constraints, base)


def has_gpu_stack() -> bool:
    """True when this interpreter has a CUDA build of torch together with megatron.core and NeMo."""
    if not all(importlib.util.find_spec(name) for name in ("torch", "megatron", "nemo")):
        return False
    check = "import torch, megatron.core, nemo; raise SystemExit(0 if torch.version.cuda else 1)"
    return subprocess.run([sys.executable, "-c", check], capture_output=True).returncode == 0


def say(start: float, text: str) -> None:
    print(f"[setup {time.monotonic() - start:5.1f}s] {text}", file=sys.stderr, flush=True)


def lock(target: Path, start: float) -> int:
    """Wait for the lock beside `target` and hold it until this process ends; returns its descriptor.

    pip inherits it: it goes on when only this process is killed, and must not lose the folder it writes to.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    held = os.open(target.with_name(f"{target.name}.lock"), os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        for _ in range(20):  # it takes the lock a moment before it says who it is
            if holder := os.pread(held, 20, 0).decode():
                break
            time.sleep(0.05)
        say(start, f"another set-up is at work on {target.name} (process {holder}): waiting for its end")
        fcntl.flock(held, fcntl.LOCK_EX)
    os.ftruncate(held, 0)
    os.pwrite(held, str(os.getpid()).encode(), 0)
    os.set_inheritable(held, True)
    return held


def pip(python: Path, *arguments: str) -> None:
    command = [python, "-m", "pip", "install", *PIP_OPTIONS, *arguments]
    subprocess.run(command, check=True, cwd=ROOT, close_fds=False)  # it inherits the lock


def is_usable(python: Path) -> bool:
    """True when `python` runs, is of this interpreter's version, and has a working pip."""
    check = f"import sys, pip; raise SystemExit(tuple(sys.version_info[:2]) != {tuple(sys.version_info[:2])})"
    return python.exists() and subprocess.run([python, "-c", check], capture_output=True).returncode == 0


def create(target: Path, on_top: bool) -> Path:
    """Make (or reuse) the venv and return its interpreter; `on_top` lets it see this interpreter's packages."""
    python = target / "bin" / "python"
    if not is_usable(python):
        shutil.rmtree(target, ignore_errors=True)
        venv.EnvBuilder(system_site_packages=on_top, with_pip=True).create(target)
    if on_top and sys.prefix != sys.base_prefix:
        # This interpreter is itself in a venv, whose packages system_site_packages does not reach.
        see_packages_of(target, {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    return python


def see_packages_of(target: Path, outer: set[str]) -> None:
    """Let the venv `target` import from the folders `outer` what it does not have itself."""
    lines = [f"import site; site.addsitedir({directory!r})" for directory in sorted(outer)]
    (site_packages(target) / "outer_environment.pth").write_text("\n".join(lines) + "\n")


def site_packages(target: Path) -> Path:
    """Where the venv `target`, of this interpreter's version, keeps its packages."""
    return target / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"


def missing(python: Path, pins: list[str]) -> list[str]:
    """The pins whose distribution `python` does not have in any version, and always the build tool's."""
    listing = "import importlib.metadata as m; print(*{d.metadata['Name'] for d in m.distributions()}, sep='\\n')"
    names = subprocess.run([python, "-c", listing], capture_output=True, text=True, check=True).stdout.split()
    present = {normalized(name) for name in names} - {BUILD_TOOL}
    return [pin for pin in pins if normalized(pin) not in present]


def install_torch(python: Path, constraints: Path, pins: list[str], start: float) -> None:
    torch = next((pin for pin in pins if normalized(pin) == "torch"), None)
    if torch is None:
        return
    index = os.environ.get("TORCH_INDEX_URL")
    say(start, f"{torch} first and alone" + (" from TORCH_INDEX_URL" if index else ""))
    # An index of torch wheels holds its own choice of torch's dependencies: the pins follow in the next step.
    pip(python, *(["--index-url", index] if index else ["--constraint", str(constraints)]), torch)
    found = "import torch; print(torch.version.cuda or '', torch.cuda.is_available())"
    cuda, _, usable = subprocess.run(
        [python, "-W", "ignore", "-c", found], capture_output=True, text=True, check=True
    ).stdout.rpartition(" ")
    if cuda.strip() and usable.strip() == "False":
        say(
            start,
            "a CUDA build without a usable GPU: it works, and TORCH_INDEX_URL (README) saves gigabytes",
        )


def install_pins(python: Path, pins: list[str], start: float, *options: str) -> None:
    firm = [pin for pin in pins if normalized(pin) not in NEEDS_COMPILER]
    if firm:
        pip(python, "--no-deps", *options, *firm)
    for pin in pins:
        if normalized(pin) in NEEDS_COMPILER:
            try:
                pip(python, "--no-deps", pin)
            except subprocess.CalledProcessError:
                say(start, f"{pin} needs a C compiler and the Python headers: reasoning-gym's problems are unavailable")


def make_venv(target: Path, constraints: Path, with_project: bool, base: Path | None, start: float) -> None:
    """Everything between the marker and the stamp. Raises CalledProcessError when an installer fails."""
    stamp, marker = target / ".setup-complete", target / ".setup-running"
    if marker.exists():
        say(start, "the last set-up was interrupted: starting again")
        shutil.rmtree(target)
    elif base is not None:
        shutil.rmtree(target, ignore_errors=True)  # made in seconds, and nothing of an older line stays
    sections = read_sections(constraints)
    on_top = with_project and base is None and has_gpu_stack()
    if base is not None:  # what the base has from below is seen here, too
        on_top = "include-system-site-packages = true" in (base / "pyvenv.cfg").read_text()
    python = create(target, on_top)
    stamp.unlink(missing_ok=True)
    marker.touch()
    (target / ".setup-python").write_text(sys.executable)  # the Makefile keeps to it
    if base is not None:
        see_packages_of(target, {str(site_packages(base))})
        pins = [pin for section in sections.values() for pin in section]
        say(start, f"on top of {base.name}: {' '.join(pins)}")
        install_pins(python, pins, start, "--ignore-installed")  # what is installed is the base's, and stays there
    elif on_top:
        pins = missing(python, sections["project"])
        say(start, f"CUDA torch, megatron.core and NeMo are here: adding {len(pins)} packages on top")
        install_pins(python, pins, start)
    else:
        pins = [pin for section in sections.values() for pin in section]
        install_torch(python, constraints, pins, start)
        say(start, f"{len(pins)} pinned packages (two to three minutes the first time)")
        install_pins(python, pins, start)
    if with_project and base is None:
        say(start, "this project, editable")
        pip(python, "--no-deps", "--no-build-isolation", "--editable", str(ROOT))
    stamp.write_text(fingerprint(constraints, base))
    marker.unlink()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument("--constraints", type=Path, default=ROOT / "constraints.txt")
    parser.add_argument("--no-project", action="store_true", help="leave this project itself out")
    parser.add_argument("--on-top-of", type=Path, metavar="VENV", help="take all that is not pinned from this venv")
    arguments = parser.parse_args()
    low, high = PYTHON_RANGE
    if not low <= sys.version_info[:2] < high:
        print(
            f"setup: Python {sys.version.split()[0]} is not in >=3.11,<3.13; try PYTHON=python3.11",
            file=sys.stderr,
        )
        return 2
    target, start = arguments.venv.resolve(), time.monotonic()
    base = arguments.on_top_of and arguments.on_top_of.resolve()
    if base and not (base / ".setup-complete").exists():
        print(f"setup: {base} is no complete venv of this project; run `make setup` first", file=sys.stderr)
        return 2
    if base == target:
        print(f"setup: --on-top-of {base} is the venv that is made; give another --venv", file=sys.stderr)
        return 2
    if is_complete(target, arguments.constraints, base):
        return 0
    try:
        lock(target, start)
        if not is_complete(target, arguments.constraints, base):  # by the run that was waited for
            make_venv(target, arguments.constraints, not arguments.no_project, base, start)
    except subprocess.CalledProcessError as error:
        print(f"setup: {' '.join(map(str, error.cmd))[:200]} failed; its message is above", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("setup: interrupted; the next call starts again", file=sys.stderr)
        return 130
    say(start, f"ready: {target}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
