"""Write docs/cli.md from the argument parser and docs/config.md from config/sections.py; `--check` only compares.

    python scripts/reference.py
    python scripts/reference.py --check

tests/test_reference.py runs the comparison, so neither page can fall behind.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import sys
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECTIONS = ROOT / "nemo_elastic" / "config" / "sections.py"
WIDTH = "100"  # columns that argparse wraps its help at

CLI_HEAD = """# Command line

Made from the argument parser by `python scripts/reference.py`; do not edit. A positional word with `=` in it is an
override of the configuration ([config.md](config.md)), any other is a folder; one with `=` in its name is written
`./lr=0.1/nested`. `~` is your folder in every path. JSON and answers go to stdout, progress and logs to stderr.
Words: [concepts.md](concepts.md).

| exit code | means |
|---|---|
| 0 | done |
| 1 | a check failed: a child differs from its nested subnet |
| 2 | bad input: one message with the value, the rule and the remedy |
| 130, 143 | interrupted; stopped by SIGTERM (training has saved a checkpoint then) |
| 128 + n | a process of `--nproc` was killed by signal n |

`--nproc N` starts N processes on this machine and leaves with their code; it passes SIGTERM and SIGINT on and waits for
as long as a checkpoint needs. On several machines `torchrun` starts them: every process leaves with the code above, our
message appears once, from the first one, and below it torchrun writes a summary of its own and leaves with 1. It kills
30 seconds after a signal (`TORCHELASTIC_SIGNALS_TO_HANDLE` and your batch system's own limit decide whether it comes so
far), so signal the workers instead of torchrun where a checkpoint takes longer.
"""
CONFIG_HEAD = """# Configuration

Made from [`config/sections.py`](../nemo_elastic/config/sections.py) by `python scripts/reference.py`; do not edit.

A configuration is YAML under the keys below; every key is a dotted override on the command line, too
(`train.micro_batch_size=2`, `'train.stages=[{steps: 100}]'`, values in YAML). Origins, weakest first: the defaults
here, the files named under `base:` (beside the file, else of the shipped `conf/`), the file itself, the command line.
`nemo-elastic config` shows which one set each value. An unknown key is an error that names the nearest known one.
Words: [concepts.md](concepts.md); the router's are explained in [router.md](router.md).
"""
MODEL_WORDS = """NeMo `SSMConfig` field names verbatim, and `vocab_size` (rows of the embedding). Required: {required};
and of every kind of layer in the pattern its sizes: {of_kinds}.
Everything else has SSMConfig's default; `nemo-elastic config` shows what was set.
"""


def cli_reference() -> str:
    """docs/cli.md."""
    os.environ["COLUMNS"] = WIDTH
    from nemo_elastic.cli.main import VERBS, build_parser

    parser = build_parser()
    (verbs,) = (a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    parts = [CLI_HEAD, _help("nemo-elastic", parser)]
    return "\n".join([*parts, *(_help(f"nemo-elastic {name}", verbs[name]) for name in VERBS)])


def _help(heading: str, parser: argparse.ArgumentParser) -> str:
    return f"## {heading}\n\n```text\n{parser.format_help().strip()}\n```\n"


def config_reference() -> str:
    """docs/config.md."""
    from nemo_elastic.config.model_fields import REQUIRED
    from nemo_elastic.kinds import kinds

    classes, comments = _classes(), _comments()
    parts = [CONFIG_HEAD]
    for prefix, node in _walk(classes, "RunConfig", ""):
        parts.append(_section(prefix, node, comments, classes))
        if not prefix:
            of_kinds = {kind: [size.name for size in kind.sizes if size.required] for kind in kinds()}
            always = [name for name in REQUIRED if name not in {n for names in of_kinds.values() for n in names}]
            words = {
                "required": _listed(always),
                "of_kinds": "; ".join(
                    f"{kind.words} (`{kind.letter}`) {_listed(names)}" for kind, names in of_kinds.items()
                ),
            }
            parts.append("## `model`\n\n" + MODEL_WORDS.format(**words))
    return "\n".join(parts)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _walk(classes: dict[str, ast.ClassDef], name: str, prefix: str) -> Iterator[tuple[str, ast.ClassDef]]:
    """(dotted prefix, class) of a section and of those inside it."""
    yield prefix, classes[name]
    for field in _fields(classes[name]):
        inner = _inner(field, classes)
        if inner:
            words = ast.unparse(field.annotation)
            step = ".NAME" if words.startswith("Mapping") else ".N" if words.startswith("tuple") else ""
            yield from _walk(classes, inner, f"{prefix}.{field.target.id}{step}".lstrip("."))


def _section(prefix: str, node: ast.ClassDef, comments: dict[int, str], classes: dict[str, ast.ClassDef]) -> str:
    """A heading and the table of a section's keys."""
    rows = [f"## `{prefix}`" if prefix else "## The whole", "", ast.get_docstring(node) or "", ""]
    rows += ["| key | type | default | |", "|---|---|---|---|"]
    for field in _fields(node):
        key = f"{prefix}.{field.target.id}".lstrip(".")
        inner = _inner(field, classes)
        note = comments.get(field.end_lineno, "")
        kind = "a section, below" if inner else f"`{ast.unparse(field.annotation)}`"
        cells = [f"`{key}`", *(words.replace("|", "\\|") for words in (kind, _default(field), note))]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def _fields(node: ast.ClassDef) -> list[ast.AnnAssign]:
    return [item for item in node.body if isinstance(item, ast.AnnAssign)]


def _inner(field: ast.AnnAssign, classes: dict[str, ast.ClassDef]) -> str | None:
    names = re.findall(r"\w+", ast.unparse(field.annotation))
    return next((name for name in names if name in classes), None)


def _default(field: ast.AnnAssign) -> str:
    if field.value is None:
        return "required"
    words = ast.unparse(field.value)
    words = "auto" if words == "AUTO" else words
    if words.startswith("field("):
        return ""
    shown = {"None": "empty", "()": "empty", "True": "`true`", "False": "`false`"}
    return shown.get(words, f"`{words.strip(chr(39))}`")


def _classes() -> dict[str, ast.ClassDef]:
    tree = ast.parse(SECTIONS.read_text(encoding="utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def _comments() -> dict[int, str]:
    """Line -> its comment."""
    with SECTIONS.open("rb") as file:
        tokens = list(tokenize.tokenize(file.readline))
    found = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
    return {line: words.replace("<", "&lt;") for line, words in found.items()}


def pages() -> dict[Path, str]:
    """File -> text."""
    return {ROOT / "docs" / "cli.md": cli_reference(), ROOT / "docs" / "config.md": config_reference()}


def main() -> int:
    """Write or compare; 1 when a page is stale."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 when a page is stale")
    check, stale = parser.parse_args().check, []
    for path, text in pages().items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale.append(path.name)
            if not check:
                path.write_text(text, encoding="utf-8")
    if check and stale:
        sys.stderr.write(f"stale: {', '.join(stale)}; run `python scripts/reference.py`\n")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
