"""The repository agrees with itself: one version, a licence, what the README names exists, pins are exact."""

from __future__ import annotations

import importlib.resources
import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

import nemo_elastic

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def setup_venv() -> ModuleType:
    return script("setup_venv")


def test_licence_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert PROJECT["license"] == "Apache-2.0"


def test_one_version_everywhere() -> None:
    newest = re.search(r"^## \[?(\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert newest is not None
    assert {PROJECT["version"], newest[1]} == {nemo_elastic.__version__}


def test_readme_names_only_targets_that_exist() -> None:
    named = set(re.findall(r"\bmake ([a-z][a-z-]*)", README))
    assert {"quickstart", "test"} <= named
    assert named - TARGETS == set()


def test_readme_links_lead_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_configs_are_package_data() -> None:
    inside = importlib.resources.files("nemo_elastic") / "conf"
    in_package = {item.name for item in inside.iterdir() if item.name.endswith(".yaml")}
    assert in_package
    assert in_package == {path.name for path in (ROOT / "conf").glob("*.yaml")}


def test_help_lists_every_target() -> None:
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"^  make ([a-z-]+)", shown, flags=re.MULTILINE)) == TARGETS


def test_what_lies_in_the_tree_does_not_change_what_lint_says(tmp_path: Path) -> None:
    """A folder `runs/` once made the module `runs` of an example first-party, and its imports badly sorted."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    modules = sorted((ROOT / "examples" / "paper_small").glob("*.py"))
    for module in modules:
        (tmp_path / module.stem).mkdir()  # what a run, or the reader, may call a folder
        (tmp_path / "example").mkdir(exist_ok=True)
        shutil.copy(module, tmp_path / "example")
    assert "runs" in {module.stem for module in modules}
    lint = [sys.executable, "-m", "ruff", "check", "--no-cache", "--select", "I", "example"]
    done = subprocess.run(lint, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


PINNED = [
    "constraints.txt",
    "constraints-hf.txt",
    "constraints-gguf.txt",
    "constraints-vllm.txt",
    "constraints-0.19.txt",
    "examples/evaluate/constraints.txt",
]


@pytest.mark.parametrize("name", PINNED)
def test_every_pin_is_exact_and_single(setup_venv: ModuleType, name: str) -> None:
    pins = [pin for section in setup_venv.read_sections(ROOT / name).values() for pin in section]
    names = [setup_venv.normalized(pin) for pin in pins]
    assert names and sorted(names) == sorted(set(names))
    assert ("torch" in names and len(names) > 20) or name == "constraints-gguf.txt"  # llama.cpp needs nothing


@pytest.mark.parametrize("name", ["constraints-0.15.txt", "constraints-0.19.txt"])
def test_other_lines_differ_from_the_pins_where_they_must(setup_venv: ModuleType, name: str) -> None:
    """0.15 is laid on top of the default venv: each of its pins replaces one, but the build tool's, which replaces that
    of a new venv. 0.19 has its own, and only Megatron's differs."""
    default, other = (
        {setup_venv.normalized(pin): pin for pins in setup_venv.read_sections(ROOT / file).values() for pin in pins}
        for file in ("constraints.txt", name)
    )
    differing = {package for package, pin in other.items() if default.get(package) != pin}
    assert "megatron-core" in differing and other["megatron-core"].startswith(f"megatron-core=={name[12:16]}.")
    assert setup_venv.BUILD_TOOL in other
    assert differing == (set(other) - {setup_venv.BUILD_TOOL} if "0.15" in name else {"megatron-core"})


def test_pins_satisfy_the_declared_requirements(setup_venv: ModuleType) -> None:
    from packaging.requirements import Requirement

    sections = setup_venv.read_sections(ROOT / "constraints.txt")
    pinned = {setup_venv.normalized(pin): pin.split("==")[1] for pins in sections.values() for pin in pins}
    for text in PROJECT["dependencies"] + [t for extra in PROJECT["optional-dependencies"].values() for t in extra]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pinned[setup_venv.normalized(requirement.name)]), text


def test_a_range_among_the_pins_is_refused(setup_venv: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "constraints.txt").write_text("numpy>=1.26\n")
    with pytest.raises(ValueError, match=r"numpy>=1\.26.*exact pin"):
        setup_venv.read_sections(tmp_path / "constraints.txt")


def test_setup_sees_what_an_image_lacks(setup_venv: ModuleType) -> None:
    lacking = setup_venv.missing(
        Path(sys.executable), ["PyYAML==6.0.3", "no.such_distribution==1.0", "setuptools==80.9.0"]
    )
    assert lacking == ["no.such_distribution==1.0", "setuptools==80.9.0"]


def test_setup_keys_on_the_pins(setup_venv: ModuleType, tmp_path: Path) -> None:
    pins = tmp_path / "constraints.txt"
    pins.write_text("numpy==1.26.4\n")
    before = setup_venv.fingerprint(pins)
    assert setup_venv.fingerprint(pins) == before
    pins.write_text("numpy==1.26.3\n")
    assert setup_venv.fingerprint(pins) != before


def test_an_interpreter_under_root_is_opened_to_every_user_and_nothing_else_is(tmp_path: Path) -> None:
    """As in images whose Python lies under /root: folders above may be entered, and what the interpreter needs read."""
    made = {"bin/python3": 0o700, "lib/module.py": 0o600, "lib/deep/data.so": 0o750, "lib/helper": 0o4750}
    made |= {"lib/fine.py": 0o644, "../secret": 0o600}
    python = tmp_path / "root" / "python"
    for name, mode in made.items():
        (python / name).parent.mkdir(parents=True, exist_ok=True)
        (python / name).write_text("")
        (python / name).chmod(mode)
    for folder in (python / "lib" / "deep", python / "lib", python / "bin", python, python.parent):
        folder.chmod(0o700)
    for path, mode in script("open_python").lacking([python / "bin" / "python3"], [python / "lib"]).items():
        if path.is_relative_to(tmp_path / "root"):
            path.chmod(mode)
    modes = {str(p.relative_to(tmp_path)): oct(p.stat().st_mode & 0o7777) for p in tmp_path.rglob("*")}
    assert modes == {
        "root": "0o701",
        "root/secret": "0o600",
        "root/python": "0o701",
        "root/python/bin": "0o701",
        "root/python/bin/python3": "0o705",
        "root/python/lib": "0o705",
        "root/python/lib/module.py": "0o604",
        "root/python/lib/fine.py": "0o644",
        "root/python/lib/helper": "0o4750",
        "root/python/lib/deep": "0o705",
        "root/python/lib/deep/data.so": "0o755",
    }
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    (opened,) = [i for i, line in enumerate(lines) if line.startswith("RUN") and "open_python.py" in line]
    assert opened < next(i for i, line in enumerate(lines) if line.startswith("USER"))
