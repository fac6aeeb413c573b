"""What a parent's own files say of its model, and whether the configuration says the same.

`config.json` of a Hugging Face folder, `context/` of a NeMo checkpoint, or `config.json` beside safetensors in
canonical names (a model section). Read as data, in no time, without torch and without executing anything.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..problems import Problem, ProblemsError, raise_if_any
from .function_fields import ARITHMETIC, OWN, ROTARY
from .model_fields import FLAGS, FUNCTION, model_problems
from .parent_hf import family_of_hf, keys_of_hf, left_out_note, model_from_hf
from .parent_nemo import CONTEXT_FILES, read_nemo_context

ASSETS = Path(__file__).resolve().parent.parent / "assets"
BUILTIN = "builtin:"
QUANTIZED_FILE = "hf_quant_config.json"  # beside a config.json that need not say it
TIED = "share_embeddings_and_output_weights"
# What a parent's files that do not say it mean: positions, multipliers and parts that a model has not by default.
UNSAID = {
    **{flag: False for flag in FLAGS},
    **{name: value for name, value in ARITHMETIC.items() if name in (*OWN, *ROTARY, "position_embedding_type")},
}
# Said by the parent alone: for how long a context it was made. Lengths of training are in train.stages.
PARENTS_OWN = ("seq_length",)


@dataclass(frozen=True)
class ParentFiles:
    """A model section, the file that says it, and the names that fields have there (their own where not listed).

    `depth_unit`: what its kind of model can drop (`space.blocks`). `left_out`: what of it children are made without.
    """

    model: Mapping[str, Any]
    file: Path
    keys: Mapping[str, str]
    depth_unit: str = "layer"
    left_out: str | None = None


def folder_of(path: str) -> Path:
    """The folder (or file) a `parent.path` means.

    Raises:
        ProblemsError: nothing is there.
    """
    folder = _place(path)
    if not folder.exists():
        shipped = sorted(p.parent.name for p in ASSETS.glob("*/model.safetensors"))
        words = f"nothing at {path!r}; give a NeMo checkpoint, a Hugging Face folder, or builtin:{'|'.join(shipped)}"
        raise ProblemsError([Problem("parent.path", words)])
    return folder


def _place(path: str) -> Path:
    return ASSETS / path.removeprefix(BUILTIN) if path.startswith(BUILTIN) else Path(path).expanduser()


def parent_files(path: str) -> ParentFiles | None:
    """What the files of a `parent.path` say; None where nothing is there, or nothing that describes a model.

    Raises:
        ProblemsError: unreadable, or a model that cannot be run here, by file and key.
    """
    folder = _place(path)
    if any((folder / "context" / name).is_file() for name in CONTEXT_FILES):
        context = read_nemo_context(folder)
        return ParentFiles(context.model, context.file, {}, left_out=context.left_out)
    file = folder / "config.json"
    if not file.is_file():
        return None
    config = read_json(file)
    if is_hugging_face(config):
        family = family_of_hf(config, file)
        if (folder / QUANTIZED_FILE).is_file():
            words = "is of quantized weights, which cannot be pruned or trained; give the bf16 folder"
            raise ProblemsError([Problem(str(folder / QUANTIZED_FILE), words)])
        model, note = model_from_hf(config, file), left_out_note(config, file)
        return ParentFiles(model, file, keys_of_hf(family), family.depth_unit, note)
    raise_if_any(Problem(f"{file}: {p.key.removeprefix('model.')}", p.message) for p in model_problems(config))
    return ParentFiles(config, file, {})


def is_hugging_face(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is transformers' and not a model section."""
    return any(key in config for key in ("model_type", "architectures", "transformers_version"))


def read_json(file: Path) -> Mapping[str, Any]:
    """A JSON file with a mapping in it; a byte order mark is skipped.

    Raises:
        ProblemsError: keyed by the file.
    """
    try:
        found = json.loads(file.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ProblemsError([Problem(str(file), f"byte {error.start} is no UTF-8; save it as UTF-8")]) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ProblemsError([Problem(str(file), f"cannot be read as JSON ({str(error)[:120]})")]) from error
    if not isinstance(found, Mapping):
        raise ProblemsError([Problem(str(file), f"{str(found)[:40]!r} must be a mapping")])
    return found


def with_parents_words(
    given: Mapping[str, Any], parent: ParentFiles, output_weights: str | None = None
) -> tuple[dict[str, Any], list[Problem]]:
    """(the whole model section, disagreements) of what a configuration gives and what the parent's files say.

    Where a configuration says what decides the parent's function, it must say the same; it may say the rest
    (initialisation, dropout, fields of a run) as it likes.

    Args:
        output_weights: `parent.output_weights`: with `lm_head` a tied parent is run untied.
    """
    problems = []
    if output_weights is not None and not parent.model.get(TIED):
        words = f"{output_weights!r} chooses for a tied parent that stores both; this one is not tied, leave it out"
        problems.append(Problem("parent.output_weights", words))
    elif output_weights == "lm_head":
        parent = replace(parent, model={**parent.model, TIED: False})
    said = {**UNSAID, **parent.model}
    problems += [
        Problem(
            f"model.{name}",
            f"{given[name]!r} is not what {parent.file} says, {parent.keys.get(name, name)}: {said[name]!r}; "
            "remove it here, or give the parent's own",
        )
        for name in FUNCTION
        if given.get(name) is not None and name in said and not _equal(given[name], said[name])
    ]
    own = {name: parent.model[name] for name in PARENTS_OWN if name in parent.model}
    stated = {name: value for name, value in given.items() if value is not None}
    whole = {**parent.model, **stated, **own}
    return {name: value for name, value in whole.items() if value is not None}, problems


def _equal(a: Any, b: Any) -> bool:
    return a == b and isinstance(a, bool) is isinstance(b, bool)
