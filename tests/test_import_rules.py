"""Who may import whom: the rule of docs/architecture.md, read from the syntax trees and checked in a fresh process.

Identity: for every import statement of nemo_elastic (lazy ones too), target in ALLOWED[layer of the importer].
"""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "nemo_elastic"

TENSORS = {"slicing"}
# Every module at the top of the package is arithmetic without torch, unless it is named here.
ARITHMETIC = {path.stem for path in PACKAGE.glob("*.py")} - TENSORS - {"__init__", "__main__"} | {"config", "kinds"}
TEXT = {"data"}
METHOD = {"importance", "router", "distill", "checkpoint"}
REPORT = {"report"}
FACE = {"cli", "__main__", "__init__"}
# Layer -> the layers of this package it may import (itself always). Nobody but the face imports the face.
ALLOWED_LAYERS: dict[str, set[str]] = {
    **{name: ARITHMETIC for name in ARITHMETIC},
    "kinds": set(),  # facts alone: what they take of the rest comes as arguments
    "slicing": ARITHMETIC,
    **{name: ARITHMETIC | TENSORS | METHOD for name in METHOD},
    "report": ARITHMETIC | METHOD,
    "mcore": ARITHMETIC | TENSORS | METHOD,
    **{name: ARITHMETIC for name in TEXT},
    "nemo": ARITHMETIC | TEXT | TENSORS | METHOD | {"mcore"},
    "serving": ARITHMETIC | TENSORS | METHOD | {"mcore", "nemo"},
    "cli": ARITHMETIC | TEXT | TENSORS | METHOD | REPORT | {"mcore", "nemo", "serving"},
    "__main__": {"cli"},
    "__init__": set(),
    "conf": set(),
    "assets": ARITHMETIC,
}
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
NO_TORCH = ARITHMETIC | TEXT | {"__main__", "__init__"}
LAZY_TORCH_ONLY = {"cli", "report"}
LIGHT_MODULES = ["kinds", "architecture", "space", "layout", "cost", "config", "cli.main"]
HEAVY = ("torch", "megatron", "nemo", "lightning")


def module_name(path: Path) -> str:
    """Dotted name of a source file of the package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module: str) -> str:
    """`nemo_elastic.mcore.runtime.cpu` -> `mcore`; the package root itself -> `__init__`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


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
    layer = layer_of(module_name(path))
    if layer not in ALLOWED_LAYERS:
        return [f"{path.relative_to(ROOT)}: '{layer}' has no place in the import rule; give it one here"]
    found = []
    for target, line, when in imports_of(path, source):
        top = target.split(".")[0]
        place = f"{path.relative_to(ROOT)}:{line}"
        if top == "nemo_elastic":
            other = target.split(".")[1] if "." in target else "__init__"
            # `from nemo_elastic import __version__` names an attribute of the root, not a layer.
            if other in ALLOWED_LAYERS and other not in ALLOWED_LAYERS[layer] | {layer, "__init__"}:
                found.append(f"{place}: {layer} imports {other}")
            if layer == "cli" and other in {"nemo", "mcore", "slicing"} | METHOD and when == "import":
                found.append(f"{place}: cli imports {other} when it is loaded; import it inside the verb")
        if top in OWNERS and layer not in OWNERS[top] and when != "typing":
            found.append(f"{place}: {layer} imports {top}, which only {sorted(OWNERS[top]) or 'nobody'} may")
        if top == "torch" and layer in NO_TORCH:
            found.append(f"{place}: {layer} imports torch")
        if top == "torch" and layer in LAZY_TORCH_ONLY and when == "import":
            found.append(f"{place}: {layer} imports torch when it is loaded")
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
        ("cost.py", "def f():\n    import torch\n", "cost imports torch"),
        ("router/gate.py", "def f():\n    from megatron.core import tensor_parallel\n", "router imports megatron"),
        ("mcore/stack.py", "import lightning.pytorch as pl\n", "mcore imports lightning"),
        ("mcore/stack.py", "from ..nemo import model\n", "mcore imports nemo"),
        ("checkpoint/child.py", "from nemo_elastic.mcore.stack import f\n", "checkpoint imports mcore"),
        ("distill/loss.py", "from nemo_elastic import cli\n", "distill imports cli"),
        ("nemo/model.py", "from megatron.core import parallel_state\n", "nemo imports megatron"),
        ("cli/train.py", "from nemo_elastic.nemo.run import train\n", "inside the verb"),
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
        ("cli/train.py", "def run():\n    from nemo_elastic.nemo.run import train\n"),
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


def test_no_module_imports_in_a_circle() -> None:
    assert cycles(module_graph()) == []


def test_no_package_imports_in_a_circle() -> None:
    layers: dict[str, set[str]] = {}
    for module, targets in module_graph().items():
        layer = layer_of(module)
        layers.setdefault(layer, set()).update(layer_of(target) for target in targets)
        layers[layer] -= {layer, "__init__"}
    assert cycles(layers) == []


def test_a_circle_is_found() -> None:
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c", "a"]]


def test_planning_loads_nothing_heavy() -> None:
    names = sorted({*ARITHMETIC, *LIGHT_MODULES})
    present = [name for name in names if (PACKAGE / (name.replace(".", "/") + ".py")).exists()]
    present += [name for name in names if (PACKAGE / name / "__init__.py").exists()]
    assert set(present) & set(LIGHT_MODULES), f"none of {LIGHT_MODULES} exists"
    code = "\n".join(
        [
            "import importlib, sys",
            f"for name in {present!r}: importlib.import_module('nemo_elastic.' + name)",
            f"print(*sorted(set({HEAVY!r}) & set(sys.modules)))",
        ]
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []
