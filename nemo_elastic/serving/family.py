"""`ElasticFamily`: every budget of a nested checkpoint out of one copy of its weights.

    family = ElasticFamily.load("runs/tiny/nested")
    family.switch("small")                        # milliseconds: views, no weights move
    family.generate(tokens, max_new_tokens=32)

memory(family) == memory(parent) + vectors of the active child (+ its compact copy, when asked for)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config.model_fields import ONLY
from ..cost.counts import parameters
from ..kinds import kinds
from ..nemo.export.nested import open_nested
from ..problems import Problem, ProblemsError, did_you_mean, raise_if_any
from ..space.layout import ParamLayout, is_uncast
from ..space.subnet import Subnet
from .decode import Cache, DecodeStep, records
from .network import ACTIVATIONS, Network
from .sampling import next_tokens


@dataclass(eq=False)
class ElasticFamily:
    """A nested family in memory.

    Args:
        weights: the parent's whole tensors by canonical name.
        layout: their table.
        model: the parent's model section.
        subnets: budget -> subnet.
        tokenizer: the checkpoint's tokenizer folder, if it has one.

    Raises:
        ProblemsError: the model has parts that are not implemented here.
    """

    weights: dict[str, Tensor]
    layout: ParamLayout
    model: Mapping[str, Any]
    subnets: Mapping[str, Subnet]
    tokenizer: Path | None = None
    active: str = field(init=False)
    compact: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        raise_if_any(_unsupported(self.model))
        self.switch(max(self.subnets, key=lambda name: parameters(self.layout, self.subnets[name])))

    @classmethod
    def load(
        cls, nested: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
    ) -> ElasticFamily:
        """Read a nested checkpoint, a tensor at a time, to `device`; nothing of it is executed.

        Args:
            dtype: cast to it; None keeps what is stored (on a CPU, fp32 is faster than bf16).

        Raises:
            ProblemsError: a damaged checkpoint, or a model with parts that are not implemented here.
        """
        opened = open_nested(nested)
        raise_if_any(_unsupported(opened.manifest.model))
        with opened.reader as reader:
            weights = {
                name: reader.read(name).to(device, None if is_uncast(spec) else dtype)
                for name, spec in opened.layout.table.items()
            }
        return cls(weights, opened.layout, opened.manifest.model, opened.manifest.subnets, opened.tokenizer)

    @property
    def budgets(self) -> tuple[str, ...]:
        """Names of all budgets."""
        return tuple(self.subnets)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(iter(self.weights.values())).device

    @torch.inference_mode()
    def switch(self, budget: str, *, compact: bool | None = None) -> None:
        """Make `budget` the active one.

        Args:
            compact: run it from contiguous weights: what lies apart is copied (at most the child's size more memory).
                None: on a GPU, where many small products of views cost more than they save; not on a CPU.

        Raises:
            ProblemsError: no such budget.
        """
        if budget not in self.subnets:
            known = did_you_mean(budget, self.subnets)
            raise ProblemsError([Problem("budget", f"{budget!r} is not in this family{known}")])
        compact = self.device.type != "cpu" if compact is None else compact
        self._network: Network | None = None  # frees the copy of the one before
        self._network = Network(self.weights, self.layout, self.subnets[budget], self.model, compact=compact)
        self.active, self.compact = budget, compact

    def new_cache(self, batch: int = 1, *, room: int = 0) -> Cache:
        """An empty cache of the active budget for `batch` rows, with `room` for so many tokens (then it grows)."""
        with torch.inference_mode():
            return Cache(self.active, batch, self._network.new_caches(batch, room))

    def decode_step(self, batch: int = 1, *, room: int) -> DecodeStep:
        """A step of the active budget for `batch` rows of at most `room` tokens; on a GPU a CUDA graph.

        Raises:
            ValueError: no rows, or no room.
            ProblemsError: on a GPU, a model with experts.
        """
        if batch < 1 or room < 1:
            raise ValueError(f"batch={batch} and room={room} must be at least 1")
        if records(self.device) and any(getattr(layer, "waits", False) for layer in self._network.layers):
            words = (
                "a step with experts cannot be one CUDA graph, as which of them run is known only behind their router"
            )
            raise ProblemsError([Problem("decode_step", f"{words}; call generate without a step")])
        return DecodeStep(self._network, self.active, batch, room)

    @torch.inference_mode()
    def logits(self, tokens: Tensor, cache: Cache | None = None, *, last_only: bool = False) -> Tensor:
        """Tokens `[b, s]` -> logits `[b, s, v]` of the active budget.

        Args:
            cache: of earlier tokens of the same rows; `tokens` are those behind them, and it then holds these, too.
            last_only: only those of the last token, `[b, 1, v]`.

        Raises:
            ValueError: a cache of another budget.
        """
        if cache is not None and cache.budget != self.active:
            raise ValueError(f"the cache is of budget {cache.budget!r}, {self.active!r} is active; make a new one")
        layers = None if cache is None else cache.layers
        found = self._network.logits(tokens.to(self.device), layers, last_only=last_only)
        if cache is not None:
            cache.length += tokens.shape[1]
        return found

    @torch.inference_mode()
    def generate(
        self,
        prompt: Tensor | Sequence[int],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        seed: int = 0,
        stop: int | None = None,
        step: DecodeStep | None = None,
    ) -> Tensor:
        """Continue prompts of one length.

        Args:
            prompt: tokens `[b, s]`, or one row of them.
            temperature: 0: the likeliest token.
            stop: a row that has it is filled up with it; all rows there: the end.
            step: of this budget, for these rows and at least all tokens but the last; decode by it.

        Returns:
            the new tokens `[b, n]`, n at most `max_new_tokens`.

        Raises:
            ValueError: an empty prompt, settings that mean nothing, or a step that does not fit.
        """
        tokens = torch.as_tensor(prompt, dtype=torch.int64)
        tokens = (tokens.unsqueeze(0) if tokens.dim() == 1 else tokens).to(self.device)
        if tokens.dim() != 2 or not tokens.numel():
            raise ValueError(f"the prompt has shape {tuple(tokens.shape)}; it must be [batch, tokens], not empty")
        if max_new_tokens < 1 or temperature < 0 or (top_k is not None and top_k < 1):
            raise ValueError("max_new_tokens and top_k must be at least 1, temperature at least 0")
        if step is not None and (needed := tokens.shape[1] + max_new_tokens - 1) > step.room:
            raise ValueError(f"this needs a step with room for {needed} tokens, the one given has it for {step.room}")
        generator = torch.Generator().manual_seed(seed)
        cache = self.new_cache(tokens.shape[0], room=tokens.shape[1] + max_new_tokens)
        ended = torch.zeros(tokens.shape[0], dtype=torch.bool, device=self.device)
        found: list[Tensor] = []
        for number in range(max_new_tokens):
            if number == 0 or step is None:
                logits = self.logits(tokens, cache, last_only=True)[:, 0]
            else:
                logits = step(tokens)[:, 0]
            if number == 0 and step is not None:
                step.begin(cache)
            new = next_tokens(logits, temperature, top_k, generator)
            if stop is not None:
                new = torch.where(ended, stop, new)
                ended |= new == stop
            found.append(new)
            if stop is not None and bool(ended.all()):
                break
            tokens = new.unsqueeze(1)
        return torch.stack(found, dim=1)

    def memory_bytes(self) -> dict[str, int]:
        """`weights`: the parent's tensors; `active`: what the active child holds beside them."""
        own = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.weights.values()}
        more = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self._network.tensors()}
        return {"weights": sum(own.values()), "active": sum(n for at, n in more.items() if at not in own)}


def _unsupported(model: Mapping[str, Any]) -> list[Problem]:
    found = [
        Problem(f"model.{name}", f"{model[name]!r} is not implemented in serving, which has {value!r}; use NeMo")
        for name, value in ONLY.items()
        if model.get(name, value) != value
    ]
    pattern = model.get("hybrid_override_pattern", "")
    found += [
        Problem("model.hybrid_override_pattern", f"{kind.letter!r} ({kind.words}) is not implemented in serving")
        for kind in kinds()
        if kind.serving is None and kind.letter in pattern
    ]
    activation = model.get("activation_func", "squared_relu")
    if activation not in ACTIVATIONS:
        found.append(Problem("model.activation_func", f"{activation!r} must be one of {', '.join(ACTIVATIONS)}"))
    return found
