"""A nested family as one Hugging Face folder: the parent, `elastic.json`, and a script that cuts any budget out of it.

    from_nested.py FOLDER --budget NAME --out DIR  ==  extract --budget NAME --format hf       byte by byte

The script (`from_nested.py`) travels with the folder and knows nothing of this package: elastic.json holds the one
table in Hugging Face's names. A fused tensor is stored in parts there, and so are its axes: a group's fixed units are
tensors of their own. Experts are, too: `#` in a name is the number of a unit of the first axis.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..config.parent_hf import adapter_of_model
from ..cost.counts import parameters
from ..huggingface import NEMOTRON_H, Each
from ..kinds.axis import Axis, Factor, Segment
from ..problems import Problem, ProblemsError
from ..space.layout import ParamLayout
from ..space.subnet import layer_sizes
from .extract import per_layer_dims, plain_model
from .hf_config import hf_config
from .hf_folder import model_card, write_hf_folder
from .huggingface import hf_templates, packing
from .manifest import Manifest
from .safetensors_reader import INDEX_FILE, SINGLE_FILE
from .schemas import PlainChild
from .writer import SHARD_BYTES

FORMAT, VERSION = "nemo_elastic.hf_nested", 1  # as the script knows them
ELASTIC_FILE, SCRIPT = "elastic.json", Path(__file__).with_name("from_nested.py")
OWN = ("config.json", "README.md", ELASTIC_FILE, SCRIPT.name, INDEX_FILE)  # what a child's folder has of its own
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def check_family(model: Mapping[str, Any]) -> None:
    """Only a NemotronH's layers stand one by one in its folder, as the script cuts them.

    Raises:
        ProblemsError: a model of another family.
    """
    if (adapter := adapter_of_model(model)) is not NEMOTRON_H:
        words = f"is not written for {adapter.words}, only for NemotronH; give --all for a folder per budget"
        raise ProblemsError([Problem("--nested", words)])


@dataclass(frozen=True)
class NestedChild:
    """A budget as a child of the folder: how its config.json says it, and the model card."""

    child: PlainChild
    card: Mapping[str, Any]


def write_hf_nested(
    folder: Path,
    whole: NestedChild,
    children: Mapping[str, NestedChild],
    manifest: Manifest,
    *,
    tokenizer: Path | None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Fill the existing empty `folder`.

    Args:
        whole: the parent as a child that keeps everything.
        children: by budget, those of `manifest.subnets`.

    Raises:
        ProblemsError: the model has something that NemotronH cannot say.
    """
    layout, parent = manifest.layout, whole.child
    model = plain_model(manifest.model, parent.architecture)
    write_hf_folder(
        folder,
        parent.tensors,
        parent.layout,
        model,
        tokenizer=tokenizer,
        card=whole.card,
        adapter=NEMOTRON_H,
        shard_bytes=shard_bytes,
    )
    said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    ids = {name: said[name] for name in IDS if name in said}
    tables, axes = {}, {}
    for name in layout.table:
        for new, own in _hf_axes(layout, name):
            axes |= dict(own)
            tables[new] = [label for label, _ in own]
    files = sorted(p.name for p in folder.iterdir() if p.name not in OWN and p.suffix != Path(SINGLE_FILE).suffix)
    described = manifest.to_dict()
    elastic = {
        "format": FORMAT,
        "version": VERSION,
        **{name: described[name] for name in ("space", "budgets", "subnets", "parameters")},
        "files": files,
        "axes": axes,
        "tensors": tables,
        "children": {name: _child(manifest, name, own, ids) for name, own in children.items()},
    }
    (folder / ELASTIC_FILE).write_text(json.dumps(elastic, indent=1, default=str) + "\n", encoding="utf-8")
    shutil.copyfile(SCRIPT, folder / SCRIPT.name)
    with (folder / "README.md").open("a", encoding="utf-8") as file:
        file.write(_budget_section(manifest))


def _child(manifest: Manifest, budget: str, own: NestedChild, ids: Mapping[str, Any]) -> dict[str, Any]:
    """What the script needs to know of a budget."""
    layout, subnet, child = manifest.layout, manifest.subnets[budget], own.child
    architecture = layout.architecture
    model = plain_model(manifest.model, child.architecture)
    varied = per_layer_dims(architecture, subnet)
    return {
        "config": {**hf_config(model, child.tensors[0].dtype, ids, NEMOTRON_H), **child.config},
        "card": model_card(own.card, model, NEMOTRON_H),
        "outer": layout.sizes(subnet, None),
        "layers": {str(layer): layer_sizes(architecture, subnet, layer) for layer in subnet.layers},
        "padded": {name: getattr(child.architecture, name) for name in varied} if child.padding else {},
        "differs": [] if child.padding else list(varied),
    }


def _hf_axes(layout: ParamLayout, name: str) -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    """Each tensor on disk of a canonical one, with its axes: a label, and what it is made of as JSON has it."""
    spec, names, packed = layout.table[name], hf_templates(layout, name, NEMOTRON_H), packing(layout, name, NEMOTRON_H)
    known = {axis: label for label, axis in layout.axes.items()}
    if packed is None or isinstance(packed, Each):  # a unit's number in the name, its axis the first
        yield names[0], [(known[axis], _json(axis)) for axis in spec.axes]
        return
    fused, *others = spec.axes
    for number, new in enumerate(names):
        label = f"{known[fused]}, {new.rsplit('.', 2)[1]}"
        part = _single(fused) if number else _rest(fused)
        yield new, [(label, _json(part)), *((known[axis], _json(axis)) for axis in others)]


def _rest(axis: Axis) -> Axis:
    """The elastic units of a fused axis."""
    (segment,) = axis
    first, *others = segment.factors
    return (Segment(segment.name, (replace(first, fixed=0), *others)),)


def _single(axis: Axis) -> Axis:
    """One of the fixed units of every group."""
    (segment,) = axis
    first, *others = segment.factors
    return (Segment(segment.name, (Factor(None, first.groups, 1), *others)),)


def _json(axis: Axis) -> list[list[list[Any]]]:
    assert not any(f.fixed for segment in axis for f in segment.factors), "a fused axis is not stored as one"
    return [[[f.dim, f.groups, f.count] for f in segment.factors] for segment in axis]


def _budget_section(manifest: Manifest) -> str:
    counts = {name: parameters(manifest.layout, subnet) for name, subnet in manifest.subnets.items()}
    least = min(counts, key=counts.get)
    lines = [
        "",
        "## Budgets",
        "",
        f"This folder is nested: `{SCRIPT.name}` cuts any of its budgets out of it, without further training. It needs "
        "torch, safetensors and transformers, and nothing else.",
        "",
        "| budget | parameters |",
        "|---|---|",
        *(f"| {name} | {count:,} |" for name, count in counts.items()),
        "",
        "```python",
        "from from_nested import from_nested  # with this folder on the path",
        f"model = from_nested('.', budget={least!r})",
        "```",
        "",
        "```",
        f"python {SCRIPT.name} --budget {least} --out child",
        "```",
    ]
    return "\n".join(lines) + "\n"
