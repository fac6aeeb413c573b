"""Any budget of a nested Hugging Face folder, cut out of the parent's weights: in memory, or as a folder of its own.

    python from_nested.py [FOLDER]                               # what budgets there are
    python from_nested.py [FOLDER] --budget small --out small    # a plain folder, which anything loads

    model = from_nested("folder", budget="small", dtype="bfloat16")        # as AutoModelForCausalLM.from_pretrained

FOLDER (default: where this script lies) holds the parent, which loads like any model, and `elastic.json`: of what
units every axis of every tensor is made, and how many of each group a budget keeps. A child keeps the first units of
every group, so that cutting is indexing. Needs torch, safetensors and transformers, nothing else; no pickle is read.
"""

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

FORMAT, VERSION = "nemo_elastic.hf_nested", 1
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 4 * 2**30
EACH = "#"  # in a name: the number of a unit of the first axis, an expert's
LAYER = re.compile(r"^(.*\.layers\.)(\d+)(\..+)$")


def from_nested(path: str | os.PathLike[str], budget: str | None = None, **more: Any) -> Any:
    """A budget as a model of transformers; without one, the parent.

    Args:
        more: what `from_pretrained` takes (dtype, device_map, ...).

    Raises:
        ValueError: no such budget, a folder that is none, or layers whose sizes transformers cannot say.
    """
    import transformers

    if budget is None:
        return transformers.AutoModelForCausalLM.from_pretrained(path, **more)
    elastic = read_elastic(path)
    child = child_of(elastic, budget)
    if child["differs"]:
        words = f"layers of one kind differ in size ({', '.join(child['differs'])}), and transformers has one for all"
        raise ValueError(f"{budget!r}: {words}; --out writes the folder for programs that can read it")
    config = transformers.CONFIG_MAPPING[child["config"]["model_type"]].from_dict(dict(child["config"]))
    state = {name: tensor for name, tensor, _ in child_tensors(Path(path), elastic, child)}
    kind = getattr(transformers, config.architectures[0])
    model = kind.from_pretrained(None, config=config, state_dict=state, **{"dtype": "auto", **more})
    model.generation_config = transformers.GenerationConfig.from_pretrained(path)
    return model


def save_budget(path: str | os.PathLike[str], budget: str, out: str | os.PathLike[str]) -> Path:
    """Write a budget as a plain folder; it appears whole or not at all.

    Raises:
        ValueError: no such budget, a folder that is none, or `out` is there.
    """
    path, out = Path(path), Path(out).absolute()
    elastic = read_elastic(path)
    child = child_of(elastic, budget)
    if out.exists():
        raise ValueError(f"{out} is there; give another folder, or remove it")
    temporary = out.with_name(f".{out.name}.partial-{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        for name in elastic["files"]:
            shutil.copyfile(path / name, temporary / name)
        (temporary / "config.json").write_text(json.dumps(child["config"], indent=2) + "\n")
        (temporary / "README.md").write_text(child["card"])
        write_weights(temporary, path, elastic, child)
        os.rename(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def read_elastic(path: str | os.PathLike[str]) -> dict[str, Any]:
    """elastic.json of a folder.

    Raises:
        ValueError: there is none, or one that this script does not know.
    """
    file = Path(path) / "elastic.json"
    if not file.is_file():
        raise ValueError(f"{path} has no elastic.json: not a nested folder")
    found = json.loads(file.read_text(encoding="utf-8"))
    if (found.get("format"), found.get("version")) != (FORMAT, VERSION):
        raise ValueError(f"{file}: format {found.get('format')!r}, version {found.get('version')!r} is not known here")
    return found


def child_of(elastic: Mapping[str, Any], budget: str) -> Mapping[str, Any]:
    """What elastic.json says of a budget.

    Raises:
        ValueError: nothing.
    """
    if budget not in elastic["children"]:
        raise ValueError(f"{budget!r} is no budget of this family, which has {', '.join(elastic['children'])}")
    return elastic["children"][budget]


def child_tensors(
    path: Path, elastic: Mapping[str, Any], child: Mapping[str, Any]
) -> Iterator[tuple[str, Tensor, str]]:
    """(name in the child, tensor, dtype as safetensors writes it) of all that a child has, one at a time."""
    index = path / INDEX
    where = json.loads(index.read_text())["weight_map"] if index.is_file() else None
    kept = sorted(map(int, child["layers"]))
    for name, axes in elastic["tensors"].items():
        layer = LAYER.match(name)
        number = int(layer[2]) if layer else None
        if layer and number not in kept:
            continue
        sizes = child["layers"][str(number)] if layer else child["outer"]
        new = f"{layer[1]}{kept.index(number)}{layer[3]}" if layer else name
        axes = [elastic["axes"][axis] for axis in axes]
        units = [None] if EACH not in name else places(axes.pop(0), {}, sizes)[0].tolist()
        for place, unit in enumerate(units):
            stored, renamed = (
                (name, new) if unit is None else (name.replace(EACH, str(unit)), new.replace(EACH, str(place)))
            )
            with safe_open(path / (where[stored] if where else SINGLE), "pt") as file:
                tensor, dtype = file.get_tensor(stored), file.get_slice(stored).get_dtype()
            yield renamed, cut(tensor, axes, sizes, child["padded"]), dtype


def cut(tensor: Tensor, axes: Sequence[Any], sizes: Mapping[str, int], padded: Mapping[str, int]) -> Tensor:
    """The entries that `sizes` keep; where a child's layers are `padded` to one size, among zeros."""
    for dim, axis in enumerate(axes):
        kept, whole = places(axis, {}, sizes)
        if len(kept) != whole:
            tensor = tensor.index_select(dim, kept)
    for dim, axis in enumerate(axes):
        new, whole = places(axis, {**sizes, **padded}, sizes)
        if len(new) != whole:
            shape = list(tensor.shape)
            shape[dim] = whole
            tensor = tensor.new_zeros(shape).index_copy_(dim, new, tensor)
    return tensor.contiguous()


def places(axis: Any, whole: Mapping[str, int], kept: Mapping[str, int]) -> tuple[Tensor, int]:
    """Where the units that `kept` keeps lie in an axis of the sizes `whole` ({}: the parent's), and its extent.

    An axis is a list of segments, one behind the other; a segment a product of factors [dim, groups, units of a group].
    """
    found, start = [], 0
    for segment in axis:
        index, extent = torch.zeros(1, dtype=torch.int64), 1
        for dim, groups, count in segment:
            units, few = (sizes.get(dim, groups * count) // groups for sizes in (whole, kept))
            own = (torch.arange(groups)[:, None] * units + torch.arange(few)).flatten()
            index = (index[:, None] * (groups * units) + own).flatten()
            extent *= groups * units
        found.append(start + index)
        start += extent
    return torch.cat(found), start


def write_weights(folder: Path, path: Path, elastic: Mapping[str, Any], child: Mapping[str, Any]) -> None:
    """Safetensors files of at most `SHARD_BYTES` and their index; cut twice, so that one tensor is held at a time."""
    shards: list[dict[str, Any]] = [{}]
    room = SHARD_BYTES
    for name, tensor, dtype in child_tensors(path, elastic, child):
        if shards[-1] and tensor.nbytes > room:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = (dtype, list(tensor.shape), tensor.nbytes)
        room -= tensor.nbytes
    names = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else [SINGLE]
    again = child_tensors(path, elastic, child)
    for name, shard in zip(names, shards, strict=True):
        header, offset = {"__metadata__": {"format": "pt"}}, 0
        for tensor, (dtype, shape, size) in shard.items():
            header[tensor] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with (folder / name).open("xb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for _ in shard:
                file.write(next(again)[1].view(-1).view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())
    if len(shards) > 1:
        total = sum(size for shard in shards for _, _, size in shard.values())
        where = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2))


def main() -> int:
    """List budgets, or write one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default=os.path.dirname(os.path.abspath(__file__)), metavar="FOLDER")
    parser.add_argument("--budget", metavar="NAME")
    parser.add_argument("--out", metavar="DIR", help="a folder that is not there yet")
    given = parser.parse_args()
    if bool(given.budget) != bool(given.out):
        parser.error("give both --budget NAME and --out DIR, or none of them for a list")
    try:
        if given.budget:
            sys.stdout.write(f"{save_budget(given.folder, given.budget, given.out)}\n")
        else:
            elastic = read_elastic(given.folder)
            for name, count in elastic["parameters"].items():
                sys.stdout.write(f"{name}: {count:,} parameters\n")
    except (ValueError, OSError, SafetensorError) as error:
        sys.stderr.write(f"from_nested: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
