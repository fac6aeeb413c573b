"""Collect width scores from a plain model: observing hooks, one micro-batch at a time, at any parallel layout.

Hooks sit where METHOD section 3 says (each norm's output, linear_fc2's input, ...: `observe` of a kind's module) inside
a context manager, and only observe. A micro-batch leaves one vector per site and layer; memory does not grow with
samples. Partial sums over the sequence are reduced over TP under sequence parallelism, sums over samples over DP before
the square root, whole groups are gathered over TP and layers over PP: every rank ends with the same scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...importance.scores import AGGREGATIONS, sample_sum, sequence_sum
from ...kinds import kind_of
from ...space.layout import ParamLayout
from ..kernels.kind_modules import module_of
from ..kernels.observing import WidthSettings
from .stack_forward import Groups, StackForward

Site = tuple[str, int]  # what is observed, global layer (the final norm counts as layer L)
HIDDEN = "hidden"  # of the norms; what else is observed is the kinds' own


class WidthCollector:
    """Sums over the samples seen so far; a context manager that hooks `model` while it is open.

    Args:
        layout: the table of the whole parent (`tp_size` 1).
    """

    def __init__(self, model: nn.Module, layout: ParamLayout, settings: WidthSettings, groups: Groups) -> None:
        self.stack = StackForward(model, groups)
        self.layout, self.settings, self.groups = layout, settings, groups
        self.local = ParamLayout(layout.architecture, ffn_groups=layout.groups, tp_size=groups.tp.size())
        self.aggregation = AGGREGATIONS[settings.aggregation]
        self.totals: dict[Site, Tensor] = {}
        self.sums: dict[str, int | None] = {}  # sites that are plain sums over tokens -> the axis that TP splits
        self.samples = 0
        self._seen: dict[Site, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> WidthCollector:
        arch = self.layout.architecture
        for number, layer in self.stack.layers.items():
            module_of(kind_of(arch.hybrid_override_pattern[number])).observe(self, number, layer)
        if self.stack.is_last:
            self.on_output(self.stack.model.decoder.final_norm, HIDDEN, arch.num_layers)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        for undo in self._undo:
            undo()
        self._handles.clear()
        self._undo.clear()

    def observe(self, tokens: Tensor) -> None:
        """Run one micro-batch of token ids `[b, s]` and add its samples."""
        self._seen.clear()
        self.stack.all_layers(tokens)
        self._join_sequence()
        for site, sums in self._seen.items():
            if site[0] in self.sums:
                self.totals[site] = self.totals[site] + sums if site in self.totals else sums
                continue
            share = sample_sum(sums, tokens.shape[1], self.aggregation)
            self.totals[site] = self.totals[site] + share if site in self.totals else share
        self.samples += tokens.shape[0]
        self._seen.clear()

    def widths(self) -> dict[str, dict[int, Tensor]]:
        """Scores of the whole parent, fp32 on the CPU, the same on every rank; dim -> layer -> `[units]`."""
        if not self.samples:
            raise ValueError("no sample was observed: rank.samples must be at least one per data-parallel rank")
        self.stack.wait()
        finished = self._over_data_parallel()
        by_rank: list[dict[Site, Tensor]] = [{}] * self.groups.tp.size()
        dist.all_gather_object(by_rank, finished, group=self.groups.tp)
        whole = {site: self._whole(site, [rank[site] for rank in by_rank]) for site in finished}
        stages: list[dict[str, dict[int, Tensor]]] = [{}] * self.groups.pp.size()
        dist.all_gather_object(stages, self._units(whole), group=self.groups.pp)
        dims: dict[str, dict[int, Tensor]] = {}
        for stage in stages:
            for dim, rows in stage.items():
                dims.setdefault(dim, {}).update(rows)
        return {dim: {layer: rows[layer].float() for layer in sorted(rows)} for dim, rows in dims.items()}

    def _whole(self, site: Site, parts: list[Tensor]) -> Tensor:
        axis = None if site[0] == HIDDEN else self.sums.get(site[0], 0)
        return parts[0] if axis is None else torch.cat(parts, dim=axis)

    def state(self) -> dict[str, Tensor]:
        """This rank's sums, to go on later with the same parallel layout."""
        return {f"{what}.{layer}": total for (what, layer), total in self.totals.items()} | {
            "samples": torch.tensor(self.samples)
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        self.samples = int(state["samples"])
        names = [name.rpartition(".") for name in state if name != "samples"]
        device = next(self.stack.model.parameters()).device
        self.totals = {(what, int(layer)): state[f"{what}.{layer}"].to(device) for what, _, layer in names}

    def _join_sequence(self) -> None:
        """Under sequence parallelism a norm saw this rank's part of each sequence: add up the parts."""
        rows = [site for site in self._seen if site[0] == HIDDEN]
        if self.stack.sequence_is_split and rows:
            joined = torch.stack([self._seen[site] for site in rows])
            dist.all_reduce(joined, group=self.groups.tp)
            self._seen.update(zip(rows, joined, strict=True))

    def _over_data_parallel(self) -> dict[Site, Tensor]:
        sites = list(self.totals)
        flat = [self.totals[site].flatten() for site in sites]
        joined = torch.cat([*flat, flat[0].new_tensor([self.samples])])
        dist.all_reduce(joined, group=self.groups.dp)
        dist.broadcast(joined, dist.get_global_rank(self.groups.ep, 0), group=self.groups.ep)  # alike to the last bit
        *totals, samples = joined.split([self.totals[site].numel() for site in sites] + [1])
        count = int(samples.item())
        found = {}
        for site, total in zip(sites, totals, strict=True):
            finished = total if site[0] in self.sums else self.aggregation.finish(total, count)
            found[site] = finished.view_as(self.totals[site]).cpu()
        return found

    def _units(self, whole: Mapping[Site, Tensor]) -> dict[str, dict[int, Tensor]]:
        """Per-channel scores of this stage's layers -> scores per elastic unit."""
        arch, dims = self.layout.architecture, {}
        by_layer: dict[int, dict[str, Tensor]] = {}
        for (what, layer), scores in whole.items():
            by_layer.setdefault(layer, {})[what] = scores
        for layer, sites in by_layer.items():
            dims.setdefault("hidden_size", {})[layer] = sites.pop(HIDDEN)
            if layer < arch.num_layers:
                kind = kind_of(arch.hybrid_override_pattern[layer])
                for dim, scores in module_of(kind).unit_scores(sites, arch, self.settings).items():
                    dims.setdefault(dim, {})[layer] = scores
        return dims

    def see(self, what: str, layer: int, activation: Tensor) -> None:
        """Add up an activation `[s, b, n]` of a layer under a name of its own."""
        self._seen[(what, layer)] = sequence_sum(activation.detach(), self.aggregation)

    def at_the_end(self, undo: Callable[[], None]) -> None:
        """Call `undo` when the collector closes."""
        self._undo.append(undo)

    def plain_sums(self, sites: Mapping[str, int | None]) -> None:
        """Sites that are plain sums over tokens -> the axis that tensor parallelism splits."""
        self.sums |= sites

    def add(self, what: str, layer: int, sums: Tensor) -> None:
        """Add to the plain sums of a layer, of any shape."""
        value = sums.detach().double()
        self._seen[(what, layer)] = self._seen[(what, layer)] + value if (what, layer) in self._seen else value

    def on_output(
        self, module: nn.Module, what: str, layer: int, *, part: Callable[[Tensor], Tensor] = lambda y: y
    ) -> None:
        """See (a part of) what a module puts out."""

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.see(what, layer, part(output[0] if isinstance(output, tuple) else output))

        self._handles.append(module.register_forward_hook(hook))

    def on_input(self, module: nn.Module, see: Callable[[Tensor], None]) -> None:
        """Call `see` with what enters a module."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            see(args[0] if args else next(iter(kwargs.values())))

        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def watch_norm(self, layer: int, norm: nn.Module, linear: nn.Module) -> None:
        """See the layer's norm, a module of its own or fused into the linear behind it."""
        if getattr(linear, "layer_norm_weight", None) is None:
            self.on_output(norm, HIDDEN, layer)
        else:
            self.on_input(linear, lambda x: self.see(HIDDEN, layer, fused_norm_output(linear, x, self.stack.config)))


def fused_norm_output(linear: nn.Module, x: Tensor, config: Any) -> Tensor:
    """What the RMSNorm inside a fused norm + linear gives for its input `[s, b, h]` (Transformer Engine, METHOD 3)."""
    if config.normalization != "RMSNorm":
        raise ValueError(f"model.normalization={config.normalization}: ranking through fused norms knows RMSNorm only")
    weight = linear.layer_norm_weight.detach().float() + (1 if config.layernorm_zero_centered_gamma else 0)
    y = x.detach().float()
    return y * torch.rsqrt(y.square().mean(-1, keepdim=True) + config.layernorm_epsilon) * weight


def collect_widths(
    model: nn.Module,
    batches: Iterable[Tensor],
    layout: ParamLayout,
    settings: WidthSettings | None = None,
    groups: Groups | None = None,
    on_batch: Callable[[WidthCollector], None] | None = None,
) -> dict[str, dict[int, Tensor]]:
    """Width scores of `model` over `batches` of token ids `[b, s]` (this data-parallel rank's own).

    Args:
        on_batch: called after every micro-batch, for progress and for saving `collector.state()`.
    Returns:
        dim -> layer -> `[units]` of the whole parent, on every rank.
    """
    training = model.training
    model.eval()
    with WidthCollector(model, layout, settings or WidthSettings(), groups or Groups.from_megatron()) as collector:
        for tokens in batches:
            collector.observe(tokens)
            if on_batch is not None:
                on_batch(collector)
    model.train(training)
    return collector.widths()
