"""The facts of the layer kinds agree with each other, and nobody outside `kinds/` asks for a letter or a name.

What a kind computes is held against its facts elsewhere: shapes in test_layout, caches and FLOPs in test_cost, masks
and slices in test_elastic_modes, names in test_hf and test_gguf.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from expert_features import SIZES as EXPERTS
from small_parent import architecture

from nemo_elastic.config.sections import RankConfig
from nemo_elastic.cost.counts import CACHES
from nemo_elastic.kinds import kind_of, kind_of_dim, kinds, sizes
from nemo_elastic.report.palette import DARK, LIGHT
from nemo_elastic.space.dims import WIDTH_DIMS
from nemo_elastic.space.layout import ParamLayout

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "nemo_elastic"
KINDS = pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.name)
LETTERS, NAMES = {kind.letter for kind in kinds()}, {kind.name for kind in kinds()}
CONSTANTS = {kind.name.upper() for kind in kinds()}
# Megatron's own letters, to which patterns are translated where they are handed over.
ALLOWED = {"mcore/kernels/kind_modules.py": {"SLOTS"}}


@KINDS
def test_rows_axes_and_dims_agree(kind):
    axes = ParamLayout(architecture(**EXPERTS)).axes
    used = {axis for row in kind.rows.values() for axis in row}
    assert used <= set(axes)
    cut = {f.dim for axis in used for segment in axes[axis] for f in segment.factors if f.dim}
    assert cut == {dim.name for dim in kind.dims} | {"hidden_size"}
    assert {dim.name for dim in kind.dims} <= {size.name for size in kind.sizes}
    assert kind.norm[0] in kind.rows and (kind.norm[1] == kind.norm[0] or kind.norm[1] not in kind.rows)
    for axis in (*kind.aligned, *kind.fp8, *filter(None, [kind.conv_axis])):
        assert axis in used
    for row in kind.stored_in_parts:
        assert [segment.name for segment in axes[kind.rows[row][0]]] == kind.rows[row][0].split("+")
    assert {name for pair in kind.multiples_of for name in pair} | set(kind.split_by) <= {s.name for s in kind.sizes}
    assert set(kind.caches(architecture(), {}, 16)) <= set(CACHES)


@KINDS
def test_every_row_has_a_name_in_hugging_face_and_llama_cpp(kind):
    if kind.huggingface is None:
        assert kind.gguf is None
        return
    always = [row for row in kind.rows if row not in kind.only_with]
    assert [row for row in kind.huggingface.names if row in always] == always
    assert list(kind.huggingface.names) in (always, list(kind.rows))  # of rows that NemotronH never has: none, or all
    theirs = [name for names in kind.huggingface.names.values() for name in names]
    if kind.gguf is not None:
        assert sorted(kind.gguf.names) == sorted(theirs)
        assert kind.gguf.matrices <= set(kind.gguf.names.values())
    several = {row for row, names in kind.huggingface.names.items() if len(names) > 1}
    assert set(kind.huggingface.packed) == several
    for size in kind.sizes:
        assert size.fixed or size.huggingface


@KINDS
def test_its_module_and_its_settings_are_there(kind):
    source = ast.parse((ROOT / kind.module.replace(".", "/")).with_suffix(".py").read_text())
    defined = {node.name for node in source.body if isinstance(node, ast.FunctionDef)}
    defined |= {name.id for node in source.body if isinstance(node, ast.Assign) for name in ast.walk(node)
                if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)}  # fmt: skip
    assert {"LAYER", "SUBLAYER", "plain_layer", "elastic_layer", "observe", "unit_scores"} <= defined
    assert kind.serving is None or (ROOT / kind.serving.replace(".", "/")).with_suffix(".py").is_file()
    for name, choices in kind.ranking.items():
        assert getattr(RankConfig(), name) in choices
    assert kind.fewest is None or getattr(RankConfig(), kind.fewest) == 0


def test_letters_names_colours_and_places_are_nobody_elses():
    every = kinds()
    for values in ([k.letter for k in every], [k.name for k in every], [s.name for s in sizes()], [*LIGHT.values()]):
        assert len(set(values)) == len(values)
    assert all(LIGHT[k.name] == k.colours[0] and DARK[k.name] == k.colours[1] for k in every)
    # The seeds of a router, and the columns of every table that was ever written, follow this order.
    usual = ("hidden_size", "ffn_hidden_size", "mamba_num_heads", "mamba_head_dim", "num_attention_heads")
    assert WIDTH_DIMS[: len(usual)] == usual
    assert [kind_of(letter).name for letter in "M*-E"] == ["mamba", "attention", "mlp", "experts"]
    assert kind_of_dim("mamba_head_dim").letter == "M"


REGISTRATIONS = {
    "kinds.register(kinds.kind_of('M'))": "comes too late",
    "kinds.register(kinds.MAMBA)": "take others",
    "import nemo_elastic.space.elastic_space; kinds.register(kinds.MAMBA)": "comes too late",
}


@pytest.mark.parametrize("code", REGISTRATIONS)
def test_a_kind_that_is_taken_or_late_is_refused(code):
    whole = f"from nemo_elastic import kinds; {code}"
    done = subprocess.run([sys.executable, "-c", whole], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode and REGISTRATIONS[code] in done.stderr


def is_letter(node: ast.expr) -> bool:
    """A letter, name or constant of a kind, or a collection with one."""
    if isinstance(node, ast.Constant):
        return node.value in LETTERS | NAMES
    if isinstance(node, ast.Tuple | ast.List | ast.Set):
        return any(map(is_letter, node.elts))
    return getattr(node, "id", getattr(node, "attr", "")) in CONSTANTS


ASKING = {"count", "index", "find", "layers_of", "kind_of"}


def compared(node: ast.AST) -> list[ast.expr | None]:
    """What a node holds against something else."""
    match node:
        case ast.Compare():
            return [node.left, *node.comparators]
        case ast.Dict():
            return node.keys
        case ast.Subscript():
            return [node.slice]
        case ast.MatchValue():
            return [node.value]
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)) if name in ASKING:
            return node.args
    return []


def asked(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, what) of every place that asks which kind something is."""
    for node in ast.walk(tree):
        if any(is_letter(part) for part in compared(node) if part is not None):
            yield getattr(node, "lineno", 0), ast.unparse(node)


def imports_facts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, what) of every import of one kind's file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            *path, last = (node.module or "").split(".")
            of_all = last == "kinds" and any(alias.name in NAMES | CONSTANTS for alias in node.names)
            if of_all or (last in NAMES and path[-1:] == ["kinds"]):
                yield node.lineno, ast.unparse(node)


def outside() -> Iterator[Path]:
    yield from (p for p in sorted(PACKAGE.rglob("*.py")) if p.relative_to(PACKAGE).parts[0] not in ("kinds", "assets"))


def without_allowed(path: Path) -> ast.Module:
    """The module but for the assignments that may name letters."""
    names, tree = ALLOWED.get(path.relative_to(PACKAGE).as_posix(), ()), ast.parse(path.read_text())
    tree.body = [n for n in tree.body if not (isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") in names)]
    return tree


def test_nobody_outside_the_kinds_compares_a_letter():
    own = {ROOT / Path(kind.module.replace(".", "/")).with_suffix(".py") for kind in kinds()}
    found = []
    for path in outside():
        tree = without_allowed(path)
        lines = [*asked(tree), *(() if path in own else imports_facts(tree))]
        found += [f"{path.relative_to(ROOT)}:{n}: {what}" for n, what in lines]
    assert found == []


@pytest.mark.parametrize(
    "code",
    [
        'if kind == "M": pass',
        "if pattern[i] in ('*', '-'): pass",
        "if kind is MAMBA: pass",
        'WORDS = {"M": 1}',
        'COLOURS["attention"]',
        'pattern.count("*")',
        "arch.layers_of(ATTENTION)",
        'match kind:\n    case "-": pass',
        'if name != "mlp": pass',
        'kind_of("M")',
    ],
)
def test_the_search_finds_what_it_looks_for(code):
    assert list(asked(ast.parse(code)))


def test_the_search_leaves_other_dashes_alone():
    assert not list(asked(ast.parse('x = "-" if a else "M"; y.split("-"); z.startswith("-"); Text("-")')))
    assert list(imports_facts(ast.parse("from nemo_elastic.kinds.mamba import MAMBA")))
    assert list(imports_facts(ast.parse("from ..kinds import MAMBA")))
    assert not list(imports_facts(ast.parse("from ..kinds import kind_of\nfrom .mamba import Mamba")))
