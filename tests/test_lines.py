"""Which tests run under another line of megatron-core (scripts/test_engine.py): all that come to Megatron."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from test_import_rules import ORDER, wing_of

TESTS = Path(__file__).resolve().parent
MAY_NOT_IMPORT_MEGATRON = ORDER[: ORDER.index("mcore.versions")]


@pytest.fixture(scope="module")
def engine() -> ModuleType:
    spec = importlib.util.spec_from_file_location("script_of_the_engine", TESTS.parent / "scripts" / "test_engine.py")
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import megatron.core", True),
        ("from nemo_elastic.mcore.runtime import cpu", True),
        ("from nemo_elastic import serving", True),
        ("def test_it(one_rank): pass", True),
        ("import subprocess; subprocess.run(['python', '-m', 'nemo_elastic', 'plan'])", True),
        ("import worker_pool", True),  # beside it
        ("family_cost = __import__('family_cost')", True),  # benchmarks/
        ("script = FOLDER / 'stage2_identities.py'", True),  # benchmarks/gpu/
        ("from score import solve", True),  # examples/paper_small/
        ("from nemo_elastic.space.elastic_space import ElasticSpace", False),
        ("from nemo_elastic import __version__, router", False),
        ("import problems, json", False),  # examples/paper_small/, which comes to none
        ("text = 'pool'", False),
    ],
)
def test_what_comes_to_megatron(engine: ModuleType, tmp_path: Path, source: str, expected: bool) -> None:
    (tmp_path / "test_source.py").write_text(source)
    assert engine.touches_megatron(tmp_path / "test_source.py") is expected


def test_what_is_left_out_imports_nothing_that_may_import_megatron(engine: ModuleType) -> None:
    """By the statements of each file: only wings that stand below Megatron's."""
    run = set(engine.files_of("0.15", smoke=False, seed=""))
    left_out = [path for path in TESTS.glob("test_*.py") if f"tests/{path.name}" not in run]
    assert 10 < len(left_out) < len(run)
    for path in left_out:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nemo_elastic."):
                assert wing_of(node.module) in MAY_NOT_IMPORT_MEGATRON, f"{path.name}:{node.lineno}: {node.module}"


def test_a_line_has_commands_of_its_own(engine: ModuleType, tmp_path: Path) -> None:
    """They run under the line's Python; what the venv has of its own stays."""
    base, other = (tmp_path / name / "bin" / "python" for name in ("base", "other"))
    for python, commands in ((base, ("tool", "pip")), (other, ("pip",))):
        python.parent.mkdir(parents=True)
        python.symlink_to(sys.executable)
        for name in commands:
            python.with_name(name).write_text(f"#!{python}\nimport sys\nprint(sys.argv[0], sys.prefix)\n")
    kept = other.with_name("pip").read_text()
    engine.give_commands(other, base)
    assert sorted(path.name for path in other.parent.iterdir()) == ["pip", "python", "tool"]
    assert other.with_name("pip").read_text() == kept
    shown = subprocess.check_output([other.with_name("tool")], text=True)
    assert other.with_name("tool").read_text().startswith(f"#!{other}\n") and str(other.with_name("tool")) in shown


def test_the_smoke_takes_children_from_line_to_line(engine: ModuleType) -> None:
    """With a Python of the other line, without which tests/test_other_line.py would skip itself."""
    smoke = engine.files_of("0.15", smoke=True, seed="abc")
    assert "tests/test_other_line.py" in smoke and len(smoke) == len(set(smoke)) == len(engine.ALWAYS) + 2
    assert len({tuple(engine.files_of("0.15", smoke=True, seed=str(seed))) for seed in range(40)}) > 5
    assert all((TESTS.parent / name).exists() for name in [*smoke, *engine.files_of("0.19", False, "")])
    assert engine.environment_of("0.15")["NEMO_ELASTIC_OTHER_LINE"] == str(TESTS.parent / ".venv/bin/python")
    marks = ast.parse((TESTS / "test_other_line.py").read_text())
    assert "slow" not in {node.attr for node in ast.walk(marks) if isinstance(node, ast.Attribute)}, "not in a smoke"
