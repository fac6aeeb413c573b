"""How every child is loaded: lines to copy for NeMo, transformers, llama.cpp and vLLM, where it can be said there.

What cannot be is named with the reason that `plan` and `extract` give. Nothing is looked up on disk but whether a
child's folder is there already: the lines before it say how it is made.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path

from ..plan.deployment import hugging_face_note
from ..problems import ProblemsError
from ..space.dims import PER_LAYER_DIMS
from ..space.subnet import Subnet
from .budget_rows import BudgetRow
from .run_folder import RunFolder

NO = ("no:", "per-layer")  # how `hugging_face_note` begins where there is nothing to load
PADDED = "padded to uniform"
VLLM_HEADS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # channels of a head that it takes on a CPU


@dataclass(frozen=True)
class Way:
    """One reader of one child: `lines` to copy, or `reason` why there are none."""

    reader: str
    lines: str = ""
    reason: str = ""


def ways(run: RunFolder, row: BudgetRow) -> list[Way]:
    """Every reader of a budget's child; empty where its subnet or the configuration is not known."""
    subnet = run.subnet(row.subnet)
    if subnet is None or run.family is None:
        return []
    note = hugging_face_note(run.family.model, subnet)
    said = not note.startswith(NO) or PADDED in note
    reason = note.removeprefix("no: ")
    return [
        _nemo(run.folder, row.name, subnet),
        _transformers(run.folder, row.name) if said else Way("transformers", reason=reason),
        _llama(run, row.name, subnet),
        _vllm(run, row) if said else Way("vLLM", reason=reason),
    ]


def _nemo(out: Path, name: str, subnet: Subnet) -> Way:
    ragged = [dim for dim in PER_LAYER_DIMS if not subnet.is_uniform(dim)]
    if ragged:
        return Way("NeMo", reason=f"{', '.join(ragged)} differ per layer, which a plain NeMo model cannot say")
    child = out / "children" / name
    code = (
        "from nemo import lightning as nl\n"
        "from nemo.lightning import io\n"
        "from nemo.lightning.pytorch.strategies.utils import RestoreConfig\n\n"
        f"model = io.load_context({str(child / 'context')!r}, subpath='model')\n"
        f"restore = RestoreConfig(path={str(child)!r}, load_artifacts=False)\n"
        "trainer = nl.Trainer(strategy=nl.MegatronStrategy(restore_config=restore), devices=1, accelerator='gpu')"
    )
    return Way("NeMo", _extracted(out, name, "nemo", child / "weights") + code)


def _transformers(out: Path, name: str) -> Way:
    child = str(out / "hf" / name)
    code = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({child!r}, dtype='auto')\n"
        f"tokenizer = AutoTokenizer.from_pretrained({child!r})"
    )
    return Way("transformers", _extracted(out, name, "hf", Path(child) / "config.json") + code)


def _vllm(run: RunFolder, row: BudgetRow) -> Way:
    child, channels = str(run.folder / "hf" / row.name), run.architecture.kv_channels
    attends = "num_attention_heads" in row.subnet  # dims of kinds without a layer are left out
    takes = f"# on a CPU vLLM takes heads of {', '.join(map(str, VLLM_HEADS))} channels; this child has {channels}\n"
    code = "from vllm import LLM\n\n" + (takes if attends and channels not in VLLM_HEADS else "")
    code += f"model = LLM({child!r}, enable_prefix_caching=False)"
    return Way("vLLM", _extracted(run.folder, row.name, "hf", Path(child) / "config.json") + code)


def _llama(run: RunFolder, name: str, subnet: Subnet) -> Way:
    from ..checkpoint.gguf_model import check_gguf

    try:
        check_gguf(run.family.model, run.architecture, subnet)
    except ProblemsError as error:
        first = error.problems[0]
        return Way("llama.cpp", reason=f"{first.key.removeprefix('model.')} {first.message}")
    file = run.folder / "gguf" / name / "model.gguf"
    return Way("llama.cpp", _extracted(run.folder, name, "gguf", file) + f"llama-cli -m {_quoted(file)} -p 'def '")


def _extracted(out: Path, name: str, format: str, result: Path) -> str:
    """The line that makes a child's folder, where there is none yet."""
    if result.exists():
        return ""
    folder = "children" if format == "nemo" else format
    how = "" if format == "nemo" else f" --format {format}"
    target = _quoted(out / folder / name)
    return f"# nemo-elastic extract {_quoted(out / 'nested')} --budget {shlex.quote(name)}{how} --out {target}\n"


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
