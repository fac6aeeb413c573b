"""The numbers that decide every tensor's size in a plain hybrid model; a parent and a uniform child are both one.

Field names are those of Megatron's `TransformerConfig` and NeMo's `SSMConfig`; what one kind of layer has of them is
said by the kind (`kinds`). No torch here.
"""

from dataclasses import dataclass, field, fields, make_dataclass

from ..kinds import flags, kinds, kinds_of, sizes
from ..problems import Problem, raise_if_any

MOST_LAYERS = 4  # that a problem lists
DEEPEST = 2000
PREDICTION = "/"  # what follows predicts further tokens in training, and is no layer of the model
KIND_NAMES = {kind.letter: kind.name for kind in kinds()}
UNSUPPORTED_KINDS = {
    "G": "gated delta net",
    "D": "deepseek sparse attention",
    "+": "multi-latent attention, MLA",
    "/": "multi-token-prediction boundary",
    "|": "pipeline stage boundary",
}
_OfKinds = make_dataclass(
    "_OfKinds",
    [
        ("hybrid_override_pattern", str),
        ("hidden_size", int),
        *((s.name, int) if s.default is None else (s.name, int, field(default=s.default)) for s in sizes()),
        *((flag, bool, field(default=False)) for flag in flags()),
    ],
    frozen=True,
    kw_only=True,
)


@dataclass(frozen=True, kw_only=True)
class Architecture(_OfKinds):
    """Sizes of a plain hybrid Mamba-attention model. `vocab_size` is the rows that whole tensors have.

    Attributes:
        hybrid_override_pattern: the letter of each layer's kind.
        hidden_size: channels of the residual stream.
        others: an integer for every size of every kind (`kinds.Size`), such as `ffn_hidden_size`, and true or false for
            every flag, such as `gated_linear_unit`.

    Raises:
        ProblemsError: with every illegal value, keyed `model.<field>`.
    """

    vocab_size: int
    share_embeddings_and_output_weights: bool = False

    def __post_init__(self) -> None:
        raise_if_any(self._problems())

    @property
    def num_layers(self) -> int:
        return len(self.hybrid_override_pattern)

    def layers_of(self, kind: str) -> tuple[int, ...]:
        """Global indices of the layers of one kind, ascending."""
        return tuple(i for i, letter in enumerate(self.hybrid_override_pattern) if letter == kind)

    def _problems(self) -> list[Problem]:
        found = [
            Problem(f"model.{f.name}", f"{getattr(self, f.name)} must be a positive integer")
            for f in fields(self)
            if f.type is int and not _is_size(getattr(self, f.name), zero=f.default == 0)
        ]
        found += [
            Problem(f"model.{name}", f"{getattr(self, name)!r} must be true or false")
            for name in flags()
            if not isinstance(getattr(self, name), bool)
        ]
        found += pattern_problems(self.hybrid_override_pattern)
        if found:
            return found
        for whole, groups in (
            p for kind in reversed(kinds_of(self.hybrid_override_pattern)) for p in kind.multiples_of
        ):
            n, g = getattr(self, whole), getattr(self, groups)
            if n % g:
                found.append(Problem(f"model.{whole}", f"{n} must be a multiple of {groups}={g}"))
        for kind in kinds_of(self.hybrid_override_pattern):
            found += [Problem(f"model.{name}", words) for name, words in kind.broken(self)]
        return found


def _is_size(value: object, *, zero: bool) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= (0 if zero else 1)


def layers_with(pattern: str, letter: str) -> str:
    """The layers of one letter in words, `layers 1, 3 of 8`."""
    layers = [str(layer) for layer, other in enumerate(pattern) if other == letter]
    more = f", ... ({len(layers)} of them)" if len(layers) > MOST_LAYERS else ""
    return f"layer{'s' * (len(layers) > 1)} {', '.join(layers[:MOST_LAYERS])}{more} of {len(pattern)}"


def without_prediction(pattern: str) -> str:
    """The layers of a Megatron pattern in front of its multi-token prediction, `ME*E/*E/*E`."""
    return pattern.partition(PREDICTION)[0] if isinstance(pattern, str) else pattern


def pattern_problems(pattern: str) -> list[Problem]:
    """Every letter of a `hybrid_override_pattern` that cannot be elastic here, with the numbers of its layers."""
    key = "model.hybrid_override_pattern"
    if not isinstance(pattern, str) or not pattern:
        *first, last = KIND_NAMES
        return [Problem(key, f"{pattern!r} must be a non-empty string of {', '.join(first)} and {last}")]
    if len(pattern) > DEEPEST:
        return [Problem(key, f"{len(pattern):,} layers, at most {DEEPEST:,} can be described: is it a typo?")]
    found, known = [], ", ".join(f"{kind.letter} ({kind.words})" for kind in kinds())
    for letter in dict.fromkeys(pattern):
        if letter in KIND_NAMES:
            continue
        where = layers_with(pattern, letter)
        if letter in UNSUPPORTED_KINDS:
            what = f"{UNSUPPORTED_KINDS[letter]} ({letter!r}) is not supported yet"
        else:
            what = f"{letter!r} is no layer kind"
        found.append(Problem(key, f"{where}: {what}; supported: {known}"))
    return found
