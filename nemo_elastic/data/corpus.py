"""The text that is always there: the Python standard library's sources and `pydoc_data.topics`.

A shipped list names the files, their SHA-256 and their split. A reader compares it with the running
installation, reports what differs or lacks, and uses the rest:

    used files = listed files whose bytes have the listed hash

Under another minor version of Python nearly every file differs, so there the listed names that exist are
used whatever their bytes are (and the log says that losses do not compare with the model card's).
Held out by file, a pure function of the name: a module is wholly in one split on every machine.
"""

from __future__ import annotations

import ast
import hashlib
import json
import logging
import os
import platform
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

SPLITS = ("train", "heldout")
HELDOUT_PER_MILLE = 30
TOPICS = "pydoc_data/topics.py"
DEFAULT_LIST = Path(__file__).parent.parent / "assets" / "tiny_parent" / "corpus.json"

# Folders whose text is not like the rest: tests (more bytes than all the others together), vendored or
# generated code. Tables of character codes are left out by their content, see `_is_table`.
_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "msilib"})
_SKIPPED_PREFIXES = ("_sysconfigdata", "config-", "lib-dynload")
_SKIPPED_FILES = frozenset({"html/entities.py", "stringprep.py"})


@dataclass(frozen=True, kw_only=True)
class CorpusFile:
    """One file of the list. `path` is relative to the standard library, with forward slashes; `size` in bytes."""

    path: str
    sha256: str
    size: int
    split: str


@dataclass(frozen=True, kw_only=True)
class CorpusList:
    """The shipped list: `files` sorted by path, and the Python version it was made from."""

    python: str
    files: tuple[CorpusFile, ...]

    def bytes_of(self, split: str) -> int:
        """Total size of a split in bytes."""
        return sum(f.size for f in self.files if f.split == split)

    def save(self, path: Path) -> None:
        """Write as JSON, one file a line, to a temporary name and then rename."""
        head = {"python": self.python, **{f"{split}_bytes": self.bytes_of(split) for split in SPLITS}}
        lines = ",\n".join("    " + json.dumps(asdict(f)) for f in self.files)
        text = json.dumps(head, indent=2)[:-2] + f',\n  "files": [\n{lines}\n  ]\n}}\n'
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)


def standard_library() -> Path:
    """Folder of the running Python's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def split_of(path: str) -> str:
    """Split of a file by its name alone. `pydoc_data/topics.py` is the only prose, so it always trains."""
    if path == TOPICS:
        return "train"
    number = int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "big")
    return "heldout" if number % 1000 < HELDOUT_PER_MILLE else "train"


def scan_standard_library(root: Path | None = None) -> CorpusList:
    """Make the list from an installation: what the shipped `corpus.json` was made with."""
    root = root or standard_library()
    files = []
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        name = relative.as_posix()
        skipped = _SKIPPED_FOLDERS.intersection(relative.parts[:-1]) or name.startswith(_SKIPPED_PREFIXES)
        if skipped or name in _SKIPPED_FILES:
            continue
        content = path.read_bytes()
        if content.strip() and not _is_table(name, content):
            digest = hashlib.sha256(content).hexdigest()
            files.append(CorpusFile(path=name, sha256=digest, size=len(content), split=split_of(name)))
    return CorpusList(python=platform.python_version(), files=tuple(files))


def load_corpus_list(path: Path = DEFAULT_LIST) -> CorpusList:
    """Read a list written by `CorpusList.save`."""
    raw = json.loads(Path(path).read_text(encoding="utf-8"))
    return CorpusList(python=raw["python"], files=tuple(CorpusFile(**entry) for entry in raw["files"]))


def usable_files(corpus: CorpusList, root: Path | None = None) -> tuple[CorpusFile, ...]:
    """Files of the list that this installation can stand in for, in the list's order, with the hash they have here.

    Raises:
        ValueError: nothing of a split is left (a Python without its sources).
    """
    root = root or standard_library()
    same_minor = corpus.python.split(".")[:2] == platform.python_version().split(".")[:2]
    found, lacking, differing = [], [], []
    for file in corpus.files:
        path = root / file.path
        if not path.is_file():
            lacking.append(file.path)
            continue
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        if digest != file.sha256:
            differing.append(file.path)
            if same_minor:
                continue
        found.append(CorpusFile(path=file.path, sha256=digest, size=len(content), split=file.split))
    if lacking or differing:
        logger.warning(
            "corpus: %d of %d listed files lack and %d differ (list: Python %s, here %s); %s. "
            "Losses do not compare exactly with the model card's.",
            len(lacking),
            len(corpus.files),
            len(differing),
            corpus.python,
            platform.python_version(),
            "the differing ones are left out" if same_minor else "the differing ones are used as they are",
        )
        logger.info("corpus: lacking %s; differing %s", lacking, differing)
    empty = [split for split in SPLITS if not any(f.split == split for f in found)]
    if empty:
        raise ValueError(
            f"the standard library at {root} has no usable source for split {' and '.join(empty)}; "
            "install Python with its .py sources or set data.paths to text of your own"
        )
    return tuple(found)


def read_documents(files: Iterable[CorpusFile], split: str, root: Path | None = None) -> Iterator[str]:
    """Text of every file of a split, in order; `pydoc_data/topics.py` gives one document per topic."""
    root = root or standard_library()
    for file in files:
        if file.split != split:
            continue
        source = (root / file.path).read_bytes().decode("utf-8", errors="replace").replace("\r\n", "\n")
        if file.path == TOPICS:
            yield from _topics(source)
        else:
            yield source


def _topics(source: str) -> Iterator[str]:
    """The help texts themselves: as Python source they are quotes and escapes more than prose."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            yield from ast.literal_eval(node.value).values()


def _is_table(name: str, content: bytes) -> bool:
    """True for the code pages of `encodings/`: 256 near-identical lines each, a hundred times."""
    return name.startswith("encodings/") and (b"decoding_table" in content or b"decoding_map" in content)
