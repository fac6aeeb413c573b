"""Who may import whom: the rule of docs/architecture.md, read from the syntax trees and checked in a fresh process.

Identity: for every import statement of nemo_elastic (lazy ones too), the wing of its target stands no later in ORDER
than the importer's.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "nemo_elastic"

# Wings of the package from the ground up: who stands in a line may import those before it, never those behind it. A
# name without a dot stands for all that is in it, unless a longer one is listed as well.
ORDER = (
    "__init__", "kinds", "problems", "files", "processes", "space", "cost", "shapes", "huggingface", "config", "family",
    "plan", "data", "checkpoint", "router", "distill", "importance", "report",
    "verbs",
    "mcore.versions", "mcore.runtime", "mcore", "mcore.kernels", "mcore.elastic", "mcore.checkpoint", "mcore.models",
    "mcore.family", "mcore.ranking",
    "nemo", "nemo.plain", "nemo.export", "serving", "nemo.run", "nemo.pipeline", "nemo.api", "nemo.recipes",
    "cli", "__main__",
)  # fmt: skip
# Beyond the order: what these wings know nothing of.
NOT = {"report": {"router", "distill"}, "serving": {"nemo.run", "nemo.pipeline", "nemo.api", "nemo.recipes"}}
# Top-level module of another distribution -> the layers that may import it, at any depth of the code.
OWNERS: dict[str, set[str]] = {
    "megatron": {"mcore"},
    "transformer_engine": {"mcore"},
    "mamba_ssm": {"mcore"},
    "causal_conv1d": {"mcore"},
    "nemo": {"nemo"},
    "nemo_run": {"nemo"},
    "lightning": {"nemo"},
    "pytorch_lightning": set(),
}
# What `plan` and `config` load: nothing of it imports torch, but for the one cutter of tensors.
LIGHT = (*ORDER[: ORDER.index("checkpoint")], "__main__")
HANDLES_TENSORS = {"nemo_elastic.space.slicing"}
LAZY_TORCH_ONLY = {"cli", "report"}
LAZY_IN_CLI = set(ORDER[ORDER.index("checkpoint") : ORDER.index("report")]) | {"space.slicing"}
HEAVY = ("torch", "megatron", "nemo", "lightning")


def module_name(path: Path) -> str:
    """Dotted name of a source file of the package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def wing_of(module: str) -> str:
    """`nemo_elastic.mcore.runtime.cpu` -> `mcore.runtime`; the package root itself -> `__init__`."""
    parts = module.split(".")[1:]
    for length in (2, 1):
        if ".".join(parts[:length]) in ORDER:
            return ".".join(parts[:length])
    return parts[0] if parts else "__init__"


def is_type_checking(test: ast.expr) -> bool:
    return "TYPE_CHECKING" in {getattr(node, "id", getattr(node, "attr", "")) for node in ast.walk(test)}


def imports_of(path: Path, source: str | None = None) -> Iterator[tuple[str, int, str]]:
    """Yield (absolute dotted target, line, when) with when in {"import", "lazy", "typing"}."""
    module = module_name(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]

    def visit(node: ast.AST, when: str) -> Iterator[tuple[str, int, str]]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, when
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = importlib.util.resolve_name("." * node.level + base, package)
            for alias in node.names:
                yield f"{base}.{alias.name}", node.lineno, when
        elif isinstance(node, ast.If) and is_type_checking(node.test):
            for child in node.body:
                yield from visit(child, "typing")
            for child in node.orelse:
                yield from visit(child, when)
        else:
            inside = "lazy" if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) else when
            for child in ast.iter_child_nodes(node):
                yield from visit(child, inside)

    yield from visit(ast.parse(source if source is not None else path.read_text(), filename=str(path)), "import")


def violations(path: Path, source: str | None = None) -> list[str]:
    """Every broken rule of one file, as `file:line: what`."""
    module = module_name(path)
    wing = wing_of(module)
    if wing not in ORDER:
        return [f"{path.relative_to(ROOT)}: '{wing}' has no place in the import rule; give it one here"]
    package, found = wing.split(".")[0], []
    for target, line, when in imports_of(path, source):
        top = target.split(".")[0]
        place = f"{path.relative_to(ROOT)}:{line}"
        if top == "nemo_elastic":
            other = wing_of(target)
            # `from nemo_elastic import __version__` names an attribute of the root, not a wing.
            if other in ORDER and (ORDER.index(other) > ORDER.index(wing) or other in NOT.get(wing, ())):
                found.append(f"{place}: {wing} imports {other}")
            heavy = (
                other.split(".")[0] in {"nemo", "mcore"} | LAZY_IN_CLI
                or ".".join(target.split(".")[1:3]) in LAZY_IN_CLI
            )
            if wing == "cli" and heavy and when == "import":
                found.append(f"{place}: cli imports {other} when it is loaded; import it inside the verb")
        if top in OWNERS and package not in OWNERS[top] and when != "typing":
            found.append(f"{place}: {wing} imports {top}, which only {sorted(OWNERS[top]) or 'nobody'} may")
        if top == "torch" and wing in LIGHT and module not in HANDLES_TENSORS:
            found.append(f"{place}: {wing} imports torch")
        if top == "torch" and wing in LAZY_TORCH_ONLY and when == "import":
            found.append(f"{place}: {wing} imports torch when it is loaded")
    return found


def source_files() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts)


@cache
def module_graph() -> dict[str, set[str]]:
    """Module -> modules of this package it imports when it is loaded (not lazily, not for types)."""
    modules = {module_name(path): path for path in source_files()}
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        targets = set()
        for target, _, when in imports_of(path):
            if when == "import" and target.startswith("nemo_elastic"):
                # `from a.b import c`: c is a module or a name of a.b.
                hit = target if target in modules else target.rpartition(".")[0]
                if hit in modules and hit != name:
                    targets.add(hit)
        graph[name] = targets
    return graph


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Cycles met by a depth-first walk; [] when there is an order in which everything can be imported."""
    state: dict[str, int] = {}
    found: list[list[str]] = []

    def walk(node: str, trail: list[str]) -> None:
        state[node] = 1
        for other in sorted(graph.get(node, ())):
            if state.get(other) == 1:
                found.append([*trail[trail.index(other) :], other])
            elif other not in state:
                walk(other, [*trail, other])
        state[node] = 2

    for node in sorted(graph):
        if node not in state:
            walk(node, [node])
    return found


def test_every_import_is_allowed() -> None:
    files = source_files()
    assert files
    assert [text for path in files for text in violations(path)] == []


@pytest.mark.parametrize(
    ("file", "source", "what"),
    [
        ("cost/counts.py", "def f():\n    import torch\n", "cost imports torch"),
        ("space/layout.py", "from ..cost import counts\n", "space imports cost"),
        ("router/gate.py", "def f():\n    from megatron.core import tensor_parallel\n", "router imports megatron"),
        ("mcore/elastic/stack.py", "import lightning.pytorch as pl\n", "mcore.elastic imports lightning"),
        ("mcore/elastic/stack.py", "from ...nemo.run import train\n", "mcore.elastic imports nemo.run"),
        ("mcore/kernels/ssd.py", "from ..elastic import stack\n", "mcore.kernels imports mcore.elastic"),
        ("serving/family.py", "from ..nemo.run import train\n", "serving imports nemo.run"),
        ("checkpoint/child.py", "from nemo_elastic.mcore.elastic.stack import f\n", "checkpoint imports mcore.elastic"),
        ("distill/loss.py", "from nemo_elastic import cli\n", "distill imports cli"),
        ("nemo/run/model.py", "from megatron.core import parallel_state\n", "nemo.run imports megatron"),
        ("cli/train.py", "from nemo_elastic.nemo.run import train\n", "inside the verb"),
        ("cli/train.py", "from nemo_elastic.space import slicing\n", "inside the verb"),
        ("cli/train.py", "import torch\n", "cli imports torch when it is loaded"),
        ("newcomer/part.py", "", "no place in the import rule"),
    ],
)
def test_the_rule_sees_a_broken_import(file: str, source: str, what: str) -> None:
    (text,) = violations(PACKAGE / file, source)
    assert what in text


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("cli/train.py", "def run():\n    from nemo_elastic.nemo import train\n"),
        ("nemo/model.py", "from nemo_elastic.mcore import stack\nimport lightning.pytorch as pl\n"),
        (
            "mcore/stack.py",
            "from megatron.core import parallel_state\nfrom nemo_elastic.space.layout import ParamLayout\n",
        ),
        ("report/html.py", "from nemo_elastic import __version__\n"),
    ],
)
def test_the_rule_lets_a_good_import_pass(file: str, source: str) -> None:
    assert violations(PACKAGE / file, source) == []


def test_the_page_shows_the_rule() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text().split("## Wings and the import rule")[1]
    block = page.split("```text\n")[1].split("```")[0]
    names = [word for line in block.splitlines() for word in line.split("     ")[0].split() if word in ORDER]
    assert [n for n in names if "." in n or n not in ("mcore", "nemo")] == [
        n for n in ORDER if n not in ("__init__", "__main__", "mcore", "nemo")
    ]


def test_every_test_stands_with_its_wing() -> None:
    lines = (ROOT / "tests" / "README.md").read_text().splitlines()
    rows = [line.split("|")[1:3] for line in lines if line.startswith("| ") and "`test_" in line]
    named = [name for _, tests in rows for name in re.findall(r"`(test_\w+\.py)`", tests)]
    assert sorted(named) == sorted(path.name for path in (ROOT / "tests").glob("test_*.py"))
    wings = {wing for wings, _ in rows for wing in wings.strip().split(", ")}
    assert set(ORDER) - {"__init__", "__main__", "mcore", "nemo"} <= wings


def test_every_wing_says_in_a_sentence_what_is_in_it() -> None:
    for path in PACKAGE.rglob("__init__.py"):
        words = ast.get_docstring(ast.parse(path.read_text())) or ""
        assert words.split("\n")[0].endswith("."), path.relative_to(ROOT)


def test_no_module_imports_in_a_circle() -> None:
    assert cycles(module_graph()) == []


def test_a_circle_is_found() -> None:
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c", "a"]]


def test_planning_loads_nothing_heavy() -> None:
    names = [module_name(path) for path in source_files()]
    present = [name for name in names if wing_of(name) in LIGHT and name not in HANDLES_TENSORS]
    present.remove("nemo_elastic.__main__")  # it runs
    present.append("nemo_elastic.cli.main")
    assert len(present) > 30
    code = "\n".join(
        [
            "import importlib, sys",
            f"for name in {present!r}: importlib.import_module(name)",
            f"print(*sorted(set({HEAVY!r}) & set(sys.modules)))",
        ]
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


def test_checks_before_a_run_load_no_engine() -> None:
    """What they refuse is refused in seconds: Megatron alone takes ten to import on a busy machine."""
    code = "import nemo_elastic.mcore.family.checks, sys; print(*{'megatron', 'nemo'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.split() == [], result.stderr + result.stdout
