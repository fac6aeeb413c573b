"""Every key of the configuration is read by something, from an object that is that section: no setting does nothing.

Identity: for each field f of each section class, some expression `<owner>.f` stands outside config/, where the owner is
called by the section's name or is annotated, or assigned, as that section in the same function or class.
"""

import ast
import dataclasses
import json
import typing
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

from nemo_elastic.cli.main import main
from nemo_elastic.config import load_config, sections

PACKAGE = Path(__file__).resolve().parent.parent / "nemo_elastic"
# What objects of a section are called where they are no attribute of their parent.
NAMES = {
    "RunConfig": {"run", "config", "run_config", "before", "_run"},
    "ParentConfig": {"parent"},
    "DimConfig": {"dim"},
    "ElasticConfig": {"elastic"},
    "BlendSource": {"source", "entry"},
    "ChatConfig": {"chat"},
    "DataConfig": {"data"},
    "RankConfig": {"rank", "config"},
    "RouterConfig": {"router", "config"},
    "DistillConfig": {"distill", "config"},
    "OptimizerSettings": {"optimizer", "settings"},
    "StageConfig": {"stage", "s", "last", "first"},
    "TrainConfig": {"train", "settings"},
    "ExportConfig": {"export"},
    "ReportConfig": {"report"},
}


# Read in another way: what it is, and the test below.
ELSEWHERE = {
    ("StageConfig", "tokens"): "becomes steps in the section itself",
    ("TrainConfig", "context_parallel_size"): "refused above 1",
    ("TrainConfig", "expert_model_parallel_size"): "refused above 1",
    ("TrainConfig", "virtual_pipeline_model_parallel_size"): "refused above 1",
    ("ReportConfig", "title"): "read from the run folder's config.json, as plain values",
}


def section_classes() -> Iterator[type]:
    for kind in vars(sections).values():
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            yield kind


@cache
def read_attributes() -> Mapping[str, frozenset[str]]:
    """attribute -> last words of what it is read from, over the package without config/."""
    found: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name == "config" and path.name in ("sections.py", "rules.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                owner = ast.unparse(node.value).rsplit(".", 1)[-1].split("[")[0]
                found.setdefault(node.attr, set()).add(owner)
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr" and len(node.args) > 1:
                for word in ast.walk(node):  # getattr(config.rank, field) for field in (...)
                    if isinstance(word, ast.Constant) and isinstance(word.value, str):
                        found.setdefault(word.value, set()).add(ast.unparse(node.args[0]).rsplit(".", 1)[-1])
    return {name: frozenset(owners) for name, owners in found.items()}


FIELDS = [(kind, field.name) for kind in section_classes() for field in dataclasses.fields(kind)]


@pytest.mark.parametrize(("kind", "field"), FIELDS, ids=lambda value: getattr(value, "__name__", value))
def test_every_key_is_read_somewhere(kind: type, field: str) -> None:
    owners = read_attributes().get(field, frozenset())
    if (kind.__name__, field) in ELSEWHERE:
        return
    assert owners & NAMES[kind.__name__], f"{kind.__name__}.{field} is read only from {sorted(owners) or 'nothing'}"


def test_the_sections_are_all_here() -> None:
    assert {kind.__name__ for kind in section_classes()} == set(NAMES)
    hints = typing.get_type_hints(sections.RunConfig)
    assert {"train", "export", "report"} <= set(hints)


def test_keys_that_are_read_in_another_way_do_something(tmp_path: Path) -> None:
    from nemo_elastic.plan import plan
    from nemo_elastic.report.run_folder import read_run

    for (kind, name), why in ELSEWHERE.items():
        if why == "refused above 1":
            problems = plan(load_config("tiny_parent.yaml", [f"train.{name}=2"]).config)["problems"]
            assert f"train.{name}" in [p["key"] for p in problems], (kind, name)
    assert load_config("tiny_parent.yaml", ["train.stages=[{tokens: 5000}]"]).config.train.stages[0].steps == 3
    resolved = load_config("tiny_parent.yaml", ["report.title=Our family"])
    (tmp_path / "config.json").write_text(json.dumps({"values": resolved.values, "origins": resolved.origins}))
    assert read_run(tmp_path).title == "Our family"


@pytest.mark.parametrize("pattern", ["M" * 16, "*" * 16, "-" * 16, "M-" * 8, "M*" * 8, "*-" * 8])
def test_a_parent_without_one_kind_of_layer_can_be_planned(pattern: str, capsys) -> None:
    words = ["plan", "--config", "tiny_parent.yaml", f"model.hybrid_override_pattern='{pattern}'"]
    assert main([*words, "elastic.budgets={full: 1.0}"]) == 0
    told = capsys.readouterr()
    assert "full" in told.out and "empty" not in told.err, told.err


def test_a_vocabulary_that_tensor_parallelism_does_not_divide_names_what_does(capsys) -> None:
    words = ["model.vocab_size=2052", "train.tensor_model_parallel_size=8", "elastic.ffn_groups=8"]
    assert main(["plan", "--config", "tiny_parent.yaml", *words]) == 2
    told = " ".join(capsys.readouterr().out.split())
    assert "8 must divide model.vocab_size (padded)=2052; possible: 1, 2, 4" in told
