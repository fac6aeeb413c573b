"""What the package has to know of a family of Hugging Face models: an `Adapter`, data and a few small functions.

    model section  <->  config.json            fields with the same value, keys with one value, and the family's own
    canonical tensor  <->  tensors on disk     names by the parameter behind its layer's prefix; fused rows by `packed`

Everybody else walks these facts. No torch here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..kinds.kind import Packed
from ..problems import Problem
from .said import Said

Model = Mapping[str, Any]


@dataclass(frozen=True)
class Stacked:
    """Rows of a fused parameter that others store in equal parts, one behind the other (a gated MLP's gate and up)."""


@dataclass(frozen=True)
class Each:
    """A parameter of which others store every unit of the first axis on its own (an expert), in `parts` equal ones."""

    parts: int = 1


EACH = "#"  # in a name: the number of the unit


@dataclass(frozen=True, kw_only=True)
class Field:
    """A model field and the keys of config.json with the same value, today's first.

    Attributes:
        kind: `size` (a positive integer), `flag`, `number` (above 0), `word` (by `words`), or `hint`: a number that a
            run may use or not, left out where it is not given.
        default: what its configuration class takes where the file does not say; None: it has to be given.
        null: the model field whose value it has where the file says null; with `missing` also where it says nothing.
        derived: (file, model so far) -> its value where the file says nothing, null or `auto`.
        words: of a word: ours -> theirs.
        when: a model of which it is read and written, by what is known so far: the pattern always is.
    """

    ours: str
    keys: tuple[str, ...]
    kind: str = "size"
    default: Any = None
    null: str | None = None
    missing: bool = False
    derived: Callable[[Said, Model], Any] | None = None
    words: Mapping[str, str] = field(default_factory=dict)
    when: Callable[[Model], bool] = lambda model: True


@dataclass(frozen=True, kw_only=True)
class Only:
    """Names of one key that must have a value that means the same in Megatron, and why no other does.

    Attributes:
        allowed: the first is written, unless `unsaid`: other families have that key, or `Adapter.write` writes it.
        default: what the configuration class takes where the file does not say, if that is not allowed.
        when: a model of which it is asked.
    """

    keys: tuple[str, ...]
    allowed: tuple[Any, ...]
    why: str
    default: Any = None
    unsaid: bool = False
    when: Callable[[Model], bool] = lambda model: True


BLOCKS_SAY = {
    "hybrid_override_pattern": "num_hidden_layers and layer_types",
    "layernorm_epsilon": "rms_norm_eps",
    "position_embedding_type": "position_embedding_type",
    "rotary_base": "rope_theta",
    "rotary_percent": "partial_rotary_factor",
    "seq_len_interpolation_factor": "rope_scaling",
    "rope_scaling_factor": "rope_scaling",
    "add_bias_linear": "attention_bias",
    "softmax_scale": "attention_multiplier",
}


def _nothing(said: Any, model: Model) -> dict[str, Any]:
    return {}


@dataclass(frozen=True, kw_only=True, eq=False)
class Adapter:
    """A family: how its config.json and its tensors say a model.

    Attributes:
        model_type, architecture: as config.json has them; the class of transformers.
        words: its name in sentences; `tags` of a model card.
        depth_unit: what it can drop (`space.blocks`): `block` where a layer of theirs is a mixer and an MLP.
        outer: canonical name outside the stack -> name on disk.
        prefixes: in front of all but the head; the first is written.
        names: parameter behind its layer's prefix -> names behind `PREFIXlayers.N.` (several: `packed` says how;
            with a `#`: one for each unit of the first axis, `Each`).
        packed: parameter -> how it is split.
        buffers: ends of names that older folders hold and nothing reads; `left_out`: starts of those of parts that
            children are made without (multi-token prediction).
        between: the name of the norm between the two halves of a block.
        pattern: what the file says of the layers, None with a problem noted; `layers`: (pattern) -> keys.
        pattern_problems: (pattern, reader's words) -> why it cannot be said.
        fields, hints, only: see there.
        has: fields that every model of the family has, beside `PLAIN`.
        speaks: fields that `read` and `write` handle; `handles`: keys that `pattern` and `read` do.
        read: (file, model so far) -> more of the model section; `write`: whole model -> more keys.
        fixed: further keys that are always written so.
        problems: whole model -> what else cannot be said.
        transformers: the first line of it that may be asked: 4.57's Mamba and Granite classes lack what 5's have.
        divides: dim -> the dim that a child's size of it has to divide.
        together: dim -> the dim that children cut in the same proportion, where the family cannot say others.
        elsewhere: model field -> the keys that say it, where those are not of a field.
        unclamped: keys with which transformers computes what Megatron's kernels do, where a folder says otherwise.
    """

    model_type: str
    architecture: str
    words: str
    tags: tuple[str, ...]
    depth_unit: str = "layer"
    outer: Mapping[str, str]
    prefixes: tuple[str, ...] = ("model.",)
    names: Mapping[str, tuple[str, ...]]
    packed: Mapping[str, Packed | Stacked]
    buffers: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    between: str | None = None
    pattern: Callable[[Said], str | None]
    layers: Callable[[str], dict[str, Any]]
    pattern_problems: Callable[[str, str], list[Problem]]
    fields: tuple[Field, ...]
    hints: tuple[Field, ...] = ()
    only: tuple[Only, ...]
    has: Model = field(default_factory=dict)
    speaks: tuple[str, ...] = ()
    handles: tuple[str, ...] = ()
    read: Callable[[Said, Model], dict[str, Any]] = _nothing
    write: Callable[[Model], dict[str, Any]] = lambda model: {}
    fixed: Mapping[str, Any] = field(default_factory=dict)
    problems: Callable[[Model], list[Problem]] = lambda model: []
    transformers: int = 4
    divides: Mapping[str, str] = field(default_factory=dict)
    together: Mapping[str, str] = field(default_factory=dict)
    elsewhere: Mapping[str, str] = field(default_factory=lambda: BLOCKS_SAY)
    unclamped: Mapping[str, Any] = field(default_factory=dict)

    def keys(self) -> dict[str, str]:
        """Model field -> the key of config.json that says it."""
        return {f.ours: f.keys[0] for f in (*self.fields, *self.hints)}
