"""What `rank` measured, on disk: `importance.safetensors` (scores) beside `importance.json` (everything else).

Both are written to temporary names and renamed, the JSON last; it holds the tensors' SHA-256, so that a torn pair is
noticed. Loading checks every score against an `Architecture` and never executes anything. Torch only.
"""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ..files import write_json
from ..problems import Problem, ProblemsError, raise_if_any
from ..shapes.importance_file import DESCRIPTION, FORMAT, TENSORS, read_description
from ..space.architecture import Architecture
from ..space.dims import KIND_OF_DIM, WIDTH_DIMS, score_shape
from ..space.layout import ParamLayout
from .ranking import Orders, width_orders


@dataclass(frozen=True, kw_only=True)
class Importance:
    """Scores of one parent.

    Attributes:
        widths: dim -> layer -> score per unit, fp32. `hidden_size` has one row per norm (layer L: the final norm),
            `mamba_num_heads` `[m]`, `mamba_head_dim` `[p]`, `num_attention_heads` `[q]`, `ffn_hidden_size` `[f]`;
            a dim within another one `[units of that, units]`.
        depth_scores: layer -> what the output loses without it (its score when it was removed, or the last one known).
        depth_ranking: every layer once, most important first; empty when depth was not ranked.
        provenance: settings, versions, seeds, data, counts: whatever says how the scores came to be.
    """

    widths: Mapping[str, Mapping[int, Tensor]] = field(default_factory=dict)
    depth_scores: Mapping[int, float] = field(default_factory=dict)
    depth_ranking: tuple[int, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def orders(self, layout: ParamLayout) -> Orders:
        """The permutation that sorts every group by importance."""
        return width_orders(self.widths, layout)

    def problems(self, architecture: Architecture, key: str = "importance") -> list[Problem]:
        """Every score that does not fit `architecture`."""
        found, layers = [], architecture.num_layers
        for dim, by_layer in self.widths.items():
            if dim not in WIDTH_DIMS:
                found.append(Problem(f"{key}.{dim}", "no width dim"))
                continue
            wanted = range(layers + 1) if dim == "hidden_size" else architecture.layers_of(KIND_OF_DIM[dim])
            if sorted(by_layer) != list(wanted):
                found.append(Problem(f"{key}.{dim}", f"has scores of layers {sorted(by_layer)}, wants {list(wanted)}"))
            wanted_shape = score_shape(architecture, dim)
            for layer, scores in by_layer.items():
                if tuple(scores.shape) != wanted_shape:
                    words = (
                        f"has shape {tuple(scores.shape)}, the parent has {' x '.join(map(str, wanted_shape))} units"
                    )
                    found.append(Problem(f"{key}.{dim}.{layer}", words))
                elif not torch.isfinite(scores).all():
                    found.append(Problem(f"{key}.{dim}.{layer}", "has scores that are not finite; rank again"))
        if self.depth_ranking and sorted(self.depth_ranking) != list(range(layers)):
            found.append(Problem(f"{key}.depth_ranking", f"must name each of the {layers} layers once"))
        return found

    def save(self, folder: str | Path, architecture: Architecture) -> Path:
        """Write both files under `folder`; returns it. Overwrites atomically, file by file."""
        raise_if_any(self.problems(architecture))
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{dim}.{layer}": scores.detach().float().contiguous().cpu()
            for dim, by_layer in self.widths.items()
            for layer, scores in by_layer.items()
        }
        content = save(tensors)
        digest = hashlib.sha256(content).hexdigest()
        temporary = folder / f".{TENSORS}.{os.getpid()}"
        temporary.write_bytes(content)
        os.replace(temporary, folder / TENSORS)
        description = {
            "format": FORMAT,
            "architecture": asdict(architecture),
            "depth_ranking": list(self.depth_ranking),
            "depth_scores": {str(layer): score for layer, score in self.depth_scores.items()},
            "sha256": {TENSORS: digest},
            "provenance": dict(self.provenance),
        }
        write_json(folder / DESCRIPTION, description)
        return folder

    @classmethod
    def load(cls, folder: str | Path, architecture: Architecture) -> "Importance":
        """Read what `save` wrote for the same architecture.

        Raises:
            ProblemsError: missing, torn, foreign or ill-shaped files; the message says what to do.
        """
        folder = Path(folder)
        key, tensors, description = str(folder), folder / TENSORS, read_description(folder, architecture)
        widths: dict[str, dict[int, Tensor]] = {}
        try:
            for name, scores in load_file(tensors).items():
                dim, _, layer = name.rpartition(".")
                widths.setdefault(dim, {})[int(layer)] = scores
        except (SafetensorError, ValueError) as error:
            raise ProblemsError([Problem(key, f"{TENSORS} cannot be read ({error}); rank again")]) from error
        loaded = cls(
            widths={dim: dict(sorted(widths[dim].items())) for dim in WIDTH_DIMS if dim in widths}
            | {dim: rows for dim, rows in widths.items() if dim not in WIDTH_DIMS},
            depth_scores={int(layer): score for layer, score in description["depth_scores"].items()},
            depth_ranking=tuple(description["depth_ranking"]),
            provenance=description["provenance"],
        )
        raise_if_any(loaded.problems(architecture, key))
        return loaded
