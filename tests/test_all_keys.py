"""Every key of the configuration is read by something, from an object that is that section: no setting does nothing.

Identity: for each field f of each section class, some expression `<owner>.f` stands outside config/, where the owner is
annotated as that section in the same function or class, or, where it has no annotation, called as the section is.
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
from nemo_elastic.config.load import Resolved, leaves, load_values
from nemo_elastic.config.rules import ALLOWED, rule_problems
from nemo_elastic.distill import layouts as gpu_layouts
from nemo_elastic.distill.gpu_work import Work
from nemo_elastic.distill.training_cost import training_cost
from nemo_elastic.distill.training_plan import training_plan
from nemo_elastic.family import family_of
from nemo_elastic.plan.of_run import plan
from nemo_elastic.problems import ProblemsError

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
    "GpuConfig": {"machine", "gpu"},
}


# Read in another way: what it is, and the test below.
ELSEWHERE = {
    ("StageConfig", "tokens"): "becomes steps in the section itself",
    ("RouterConfig", "frozen"): "decides RouterConfig.method in the section itself",
    ("DistillConfig", "teacher"): "decides DistillConfig.self_taught in the section itself",
    ("TrainConfig", "virtual_pipeline_model_parallel_size"): "refused above 1",
    ("ReportConfig", "title"): "read from the run folder's config.json, as plain values",
}


def section_classes() -> Iterator[type]:
    for kind in vars(sections).values():
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            yield kind


class Reads(ast.NodeVisitor):
    """attribute -> what it is read from: the section that the owner is annotated as, else the owner's last word."""

    def __init__(self) -> None:
        self.found: dict[str, set[str]] = {}
        self.scopes: list[dict[str, str]] = [{}]  # name, or self.name -> section

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        named = {arg.arg: arg.annotation for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)}
        self.inside(node, {name: section_of(annotation) for name, annotation in named.items()})

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        """`self.config` is what a field, or the constructor's argument of this name, is."""
        known = {n.target.id: n.annotation for n in node.body if isinstance(n, ast.AnnAssign)}
        made = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        known |= {arg.arg: arg.annotation for n in made for arg in (*n.args.args, *n.args.kwonlyargs)}
        self.inside(node, {f"self.{name}": section_of(annotation) for name, annotation in known.items()})

    def inside(self, node: ast.AST, names: Mapping[str, str]) -> None:
        self.scopes.append({**self.scopes[-1], **names})
        self.generic_visit(node)
        self.scopes.pop()

    def owner(self, value: ast.expr) -> str:
        words = ast.unparse(value)
        return self.scopes[-1].get(words) or words.rsplit(".", 1)[-1].split("[")[0]

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.found.setdefault(node.attr, set()).add(self.owner(node.value))
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if getattr(node.func, "id", "") == "getattr" and len(node.args) > 1:
            for word in ast.walk(node):  # getattr(config.rank, field) for field in (...)
                if isinstance(word, ast.Constant) and isinstance(word.value, str):
                    self.found.setdefault(word.value, set()).add(self.owner(node.args[0]))
        self.generic_visit(node)


def section_of(annotation: ast.expr | None) -> str:
    """The one section class that an annotation names; empty for none."""
    words = {n.id for n in ast.walk(annotation) if isinstance(n, ast.Name)} if annotation is not None else set()
    named = sorted(words & set(NAMES))
    return named[0] if len(named) == 1 else ""


@cache
def read_attributes() -> Mapping[str, frozenset[str]]:
    """attribute -> what it is read from, over the package without the sections themselves and their rules."""
    reads = Reads()
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name != "config" or path.name not in ("sections.py", "rules.py"):
            reads.visit(ast.parse(path.read_text(encoding="utf-8")))
    return {name: frozenset(owners) for name, owners in reads.found.items()}


FIELDS = [(kind, field.name) for kind in section_classes() for field in dataclasses.fields(kind)]


@pytest.mark.parametrize(("kind", "field"), FIELDS, ids=lambda value: getattr(value, "__name__", value))
def test_every_key_is_read_somewhere(kind: type, field: str) -> None:
    owners = read_attributes().get(field, frozenset())
    if (kind.__name__, field) in ELSEWHERE:
        return
    assert owners & {*NAMES[kind.__name__], kind.__name__}, (
        f"{kind.__name__}.{field} is read only from {sorted(owners)}"
    )


def test_the_sections_are_all_here() -> None:
    assert {kind.__name__ for kind in section_classes()} == set(NAMES)
    hints = typing.get_type_hints(sections.RunConfig)
    assert {"train", "export", "report"} <= set(hints)


def test_keys_that_are_read_in_another_way_do_something(tmp_path: Path) -> None:
    from nemo_elastic.report.run_folder import read_run

    for (kind, name), why in ELSEWHERE.items():
        if why == "refused above 1":
            problems = plan(load_config("tiny_parent.yaml", [f"train.{name}=2"]).config)["problems"]
            assert f"train.{name}" in [p["key"] for p in problems], (kind, name)
    assert load_config("tiny_parent.yaml", ["train.stages=[{tokens: 5000}]"]).config.train.stages[0].steps == 3
    methods = [load_config("tiny_parent.yaml", [f"router.frozen={v}"]).config.router.method for v in ("true", "false")]
    assert methods == ["even", "race"]
    taught = [load_config("tiny_parent.yaml", [f"distill.teacher={v}"]).config.distill for v in ("self", "parent")]
    assert [distill.self_taught for distill in taught] == [True, False]
    resolved = load_config("tiny_parent.yaml", ["report.title=Our family"])
    (tmp_path / "config.json").write_text(json.dumps({"values": resolved.values, "origins": resolved.origins}))
    assert read_run(tmp_path).title == "Our family"


@pytest.mark.parametrize("pattern", ["M" * 16, "*" * 16, "-" * 16, "M-" * 8, "M*" * 8, "*-" * 8])
def test_a_parent_without_one_kind_of_layer_can_be_planned(pattern: str, capsys) -> None:
    words = [
        "plan",
        "--config",
        "tiny_parent.yaml",
        "parent.path=null",
        f"model.hybrid_override_pattern='{pattern}'",
        "parent.path=null",
    ]
    assert main([*words, "elastic.budgets={full: 1.0}"]) == 0
    told = capsys.readouterr()
    assert "full" in told.out and "empty" not in told.err, told.err


def test_a_vocabulary_that_tensor_parallelism_does_not_divide_is_padded(capsys) -> None:
    words = ["parent.path=null", "model.vocab_size=2051", "train.tensor_model_parallel_size=2"]
    assert main(["plan", "--config", "tiny_parent.yaml", *words]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "at TP 2, model.vocab_size=2051 is padded to 2052 rows in training" in told


# What `plan --train --gpus` does not show: it decides how scores are measured or the run goes, not what that costs.
OF_OTHER_VERBS = [
    "parent.output_weights",
    "elastic.ffn_groups",
    "data.chat.layout",
    "data.num_workers",
    "rank.samples",
    "rank.seq_length",
    "rank.micro_batch_size",
    "rank.ffn_site",
    "rank.mamba_site",
    "rank.aggregation",
    "rank.depth",
    "rank.depth_metric",
    "rank.depth_samples",
    "rank.min_attention_layers",
    "rank.activation_memory_gb",
    "rank.seed",
    "router.init_std",
    "router.budget_lambda",
    "router.dual_ascent_rate",
    "router.max_price",
    "router.dead_zone",
    "router.tolerance",
    "router.candidates",
    "router.race_rounds",
    "distill.loss",
    "distill.top_k",
    "distill.temperature",
    "distill.kd_weight",
    "distill.ce_weight",
    "distill.hidden_weight",
    "train.seed",
    "train.optimizer.weight_decay",
    "train.optimizer.clip_grad",
    "train.log_every_steps",
    "train.val_every_steps",
    "train.val_samples",
    "train.preemption",
    "train.async_save",
    "train.wait_minutes",
    "export.hf_schema",
]


def others(key: str, value: object) -> list:
    """Other legal-looking values of a key; none where its kind says too little."""
    if key in ALLOWED:
        return [word for word in ALLOWED[key] if word != value]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [2 * value or 1]
    return [value / 2 or 0.5] if isinstance(value, float) else []


def shown(config: sections.RunConfig) -> str:
    """All that `plan --train --gpus` says."""
    result, family = plan(config), family_of(config)
    subnets = {b["name"]: family.space.subnet_from_dict(b["subnet"]) for b in result["budgets"]}
    said = [result, training_plan(config, family), training_cost(config, family, subnets)]
    if said[2] is not None:  # over two nodes, so that every link is used
        said.append(gpu_layouts.layouts(Work(config, family, subnets), 16, config.report.gpu.memory_gb))
    return json.dumps(said, sort_keys=True, default=str)


def changes_nothing(stock: dict, key: str, new: object, before: str) -> bool:
    """Whether the plan is the same with this value, which is not refused."""
    values = json.loads(json.dumps(stock))
    *path, last = (int(word) if word.isdigit() else word for word in key.split("."))
    section = values
    for step in path:
        section = section[step]
    section[last] = new
    try:
        config = load_values(values)
        return not rule_problems(config) and shown(config) == before
    except ProblemsError:
        return False


def test_every_key_that_plan_should_show_changes_it_or_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_layouts, "MICRO_BATCHES", (1,))  # fewer layouts, and all that they are made of
    monkeypatch.setattr(gpu_layouts, "RECOMPUTES", (None,))
    silent = [key for key in silent_keys(load_config("tiny_parent.yaml"), "") if not key.startswith(OF_LEARNED)]
    silent += silent_keys(load_config("tiny_parent.yaml", ["router.shapes=learned"]), OF_LEARNED)
    assert sorted(silent) == sorted(OF_OTHER_VERBS)


# What a learned router's run is judged by: in others it has no effect, and says so, or may show only there.
OF_LEARNED = ("elastic.dims.", *(f"router.{name}" for name in sections.OF_LEARNED))


def silent_keys(stock: Resolved, prefix: str | tuple[str, ...]) -> list[str]:
    """Keys that begin with `prefix` and whose other values change nothing of what a plan says of `stock`."""
    before, silent = shown(stock.config), []
    for key, value in leaves(stock.values):
        new = others(key, value) if key.startswith(prefix) and not key.startswith("model.") else []
        if new and all(changes_nothing(stock.values, key, word, before) for word in new):
            silent.append(key)
    return silent
