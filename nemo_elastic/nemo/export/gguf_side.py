"""Children as GGUF files, run by llama.cpp in the Python that has it (`make setup-gguf`), as a process of its own."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nemo_elastic.checkpoint import gguf_reference
from nemo_elastic.nemo.export.other_python import python_that, run_script

KEY = "--gguf-python"
HAS_LLAMA = "from importlib.util import find_spec as f; exit(not f('xllamacpp'))"


@dataclass(frozen=True)
class GgufSide:
    """What llama.cpp says of a file.

    Attributes:
        log_probabilities: `[ends, v]`, token by token through the cache.
        at_once: `[v]`, behind the last of these by one prefill.
        texts: the tokens of each text.
        chosen: the likeliest token behind each prompt, and behind each token of its continuation but the last.
    """

    log_probabilities: Tensor
    at_once: Tensor
    texts: list[list[int]]
    chosen: list[list[int]]


def gguf_python(given: str | None) -> str:
    """The Python to ask, which has xllamacpp: `given`, or this one.

    Raises:
        ProblemsError: it is no program, or has no xllamacpp.
    """
    remedy = "it must be one that has xllamacpp; `make setup-gguf` makes one, .venv-gguf/bin/python"
    return python_that(KEY, given, HAS_LLAMA, lacks=" has no xllamacpp", remedy=remedy)


def run_llama_cpp(
    python: str,
    files: Sequence[Path],
    vocab: int,
    row: Sequence[int],
    ends: Sequence[int],
    *,
    texts: Sequence[str] = (),
    continued: Sequence[Sequence[int]] = (),
    prompt: int = 1,
) -> list[GgufSide]:
    """Run every file (see `checkpoint.gguf_reference` for the arguments).

    Raises:
        ProblemsError: that Python could not run one, with what llama.cpp said last.
    """
    wanted = {
        "files": [str(file) for file in files],
        "vocab": vocab,
        "row": list(row),
        "ends": list(ends),
        "texts": list(texts),
        "continued": [list(row) for row in continued],
        "prompt": prompt,
        "threads": torch.get_num_threads(),
    }
    with tempfile.TemporaryDirectory(prefix="nemo-elastic-gguf-") as place:
        request, out, answer = (Path(place) / name for name in ("request.json", "out.f32", "answer.json"))
        request.write_text(json.dumps(wanted))
        what = ", ".join(wanted["files"])
        run_script(KEY, python, gguf_reference.__file__, [request, out, answer], {}, what)
        said = json.loads(answer.read_text())["files"]
        values = torch.frombuffer(bytearray(out.read_bytes()), dtype=torch.float32).view(len(files), -1, vocab)
    return [GgufSide(v[:-1], v[-1], s["texts"], s["chosen"]) for v, s in zip(values, said, strict=True)]
