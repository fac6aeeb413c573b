"""Dense parents' features on their way: ranked, sorted, nested, read out, opened by NeMo, verified."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_family import MODEL, TOKENIZER, manifest, random_weights
from dense_features import FEATURES, TRANSFORMER, parts
from pool_elastic import layout_of, tokens
from pool_elastic import random_weights as weights_of
from small_parent import FFN_GROUPS

from nemo_elastic.config import load_config
from nemo_elastic.config.load import plain
from nemo_elastic.importance.depth import DepthRules
from nemo_elastic.importance.ranking import random_orders
from nemo_elastic.importance.sorting import sort_tensors
from nemo_elastic.mcore.kernels.observing import WidthSettings
from nemo_elastic.mcore.models.build import build_plain_model, load_weights
from nemo_elastic.mcore.ranking.collect import collect_widths
from nemo_elastic.mcore.ranking.depth import DepthAblation
from nemo_elastic.nemo.export.checkpoints import extract_all, write_nested
from nemo_elastic.nemo.plain.hybrid_config import HybridSSMConfig
from nemo_elastic.problems import ProblemsError
from nemo_elastic.space.dims import WIDTH_DIMS

pytestmark = pytest.mark.usefixtures("one_rank")
FP64 = torch.float64
SAID_BY_NEMO = ("gated", "gelu", "rotary", "partial", "interpolated", "qkv_bias", "biases")


def plain_model(arch: Any, function: dict[str, Any], weights: dict[str, torch.Tensor]) -> Any:
    model = build_plain_model({**vars(arch), **function}, params_dtype=FP64).to(FP64)
    load_weights(model, weights, arch, ffn_groups=FFN_GROUPS)
    return model.eval()


@pytest.mark.parametrize("pattern", [None, TRANSFORMER], ids=["hybrid", "transformer"])
def test_the_sorted_parent_is_the_parent(pattern: str | None) -> None:
    arch, function = parts("all", pattern)
    weights, layout, ids = weights_of(arch, FP64), layout_of(arch), tokens(arch)
    dims = [n for n in WIDTH_DIMS if pattern is None or not n.startswith("mamba")]
    in_order = dict(
        sort_tensors(weights.items(), layout, random_orders(layout, dims, torch.Generator().manual_seed(3)))
    )
    assert not torch.equal(*(w["decoder.layers.1.mlp.linear_fc1.weight"] for w in (in_order, weights)))
    with torch.no_grad():
        logits, again = (plain_model(arch, function, w)(ids, None, None) for w in (weights, in_order))
    assert (again - logits).abs().max() < 1e-10 * logits.abs().max()


def test_neurons_are_scored_on_the_gated_product_and_layers_with_their_positions() -> None:
    """Against the stock forward, hooked by hand and with layers taken out."""
    arch, function = parts("all", TRANSFORMER)
    model, ids = plain_model(arch, function, weights_of(arch, FP64)), tokens(arch)
    seen: dict[int, torch.Tensor] = {}
    hooks = [
        layer.mlp.linear_fc1.register_forward_hook(lambda m, a, out, n=n: seen.update({n: out[0] + out[1]}))
        for n, layer in enumerate(model.decoder.layers)
        if n % 2
    ]
    with torch.no_grad():
        full = model(ids, None, None)
        for hook in hooks:
            hook.remove()
        widths = collect_widths(model, [ids], layout_of(arch), WidthSettings(aggregation="mean_l2"))
        for layer, packed in seen.items():
            gate, up = packed.chunk(2, dim=-1)
            product = (torch.nn.functional.silu(gate) * up).abs().mean(0)  # over the sequence; then L2 over samples
            expected = product.square().sum(0).sqrt().float()
            found = widths["ffn_hidden_size"][layer]
            assert torch.allclose(found / found.sum(), expected / expected.sum(), rtol=1e-4)
        rules = DepthRules(pattern=arch.hybrid_override_pattern, min_layers=5)
        scores = DepthAblation(model, [ids], rules, memory_bytes=1e9).one_shot().scores
        stock = model.decoder.layers

        def squares(logits: torch.Tensor) -> float:
            return (logits - logits.mean(-1, keepdim=True)).square().sum().item()

        for n in range(arch.num_layers):
            model.decoder.layers = torch.nn.ModuleList(layer for m, layer in enumerate(stock) if m != n)
            assert scores[n] == pytest.approx(squares(full - model(ids, None, None)) / squares(full), rel=1e-8)
        model.decoder.layers = stock


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    rows = torch.randint(0, MODEL["vocab_size"], (4, 25), generator=torch.Generator().manual_seed(2))
    return [(part[:, :-1], part[:, 1:]) for part in rows.split(2)]


def nested_family(folder: Path, feature: str) -> Path:
    model = {**MODEL, **FEATURES[feature]}
    config = load_config("tiny_parent.yaml", ["train.val_samples=4"]).config
    family = replace(manifest(model), provenance={"config": plain(config)})
    nested = write_nested(folder / "nested", random_weights(model), family, tokenizer=TOKENIZER)
    extract_all(nested, folder / "children")
    return nested


@pytest.mark.parametrize("feature", ["all", "multipliers", "qk_norm", "scaled", *SAID_BY_NEMO])
def test_nemo_opens_a_child_as_the_function_that_was_trained(tmp_path: Path, feature: str) -> None:
    """By its own class where that can say it, else by ours; and the model that it builds has the subnet's logits."""
    from nemo.collections import llm
    from nemo.lightning import io

    from nemo_elastic.nemo.export.verify import verify

    nested = nested_family(tmp_path, feature)
    child = tmp_path / "children" / "small"
    opened = io.load_context(child / "context", subpath="model")
    assert type(opened.config) is (llm.SSMConfig if feature in SAID_BY_NEMO else HybridSSMConfig)
    assert ("nemo_elastic" in (child / "context" / "io.json").read_text()) == (feature not in SAID_BY_NEMO)
    for name, value in FEATURES[feature].items():
        if name != "activation_func":
            assert getattr(opened.config, name) == value, name
    config = load_config("tiny_parent.yaml", ["train.val_samples=4"]).config
    children = {name: tmp_path / "children" / name for name in ("large", "small")}
    for check in verify(nested, children, config, batches()):
        assert check.ok and check.difference is None, check
        assert check.comparison.relative < 1e-5


@pytest.mark.parametrize(
    ("feature", "line", "other"),
    [
        ("rotary", "rotary_base: 500.0", "rotary_base: 600.0"),
        ("multipliers", "residual_multiplier: 0.22", "residual_multiplier: 0.25"),
        ("scaled", "rope_scaling_factor: 4.0", "rope_scaling_factor: 8.0"),
    ],
)
def test_another_function_is_named(tmp_path: Path, feature: str, line: str, other: str) -> None:
    from nemo_elastic.nemo.export.verify import verify

    nested = nested_family(tmp_path, feature)
    yaml = tmp_path / "children" / "small" / "context" / "model.yaml"
    text = yaml.read_text()
    assert line in text
    yaml.write_text(text.replace(line, other))
    config = load_config("tiny_parent.yaml", ["train.val_samples=4"]).config
    (check,) = verify(nested, {"small": tmp_path / "children" / "small"}, config, batches())
    (name, now), (_, before) = (words.split(": ") for words in (other, line))
    assert check.difference == f"configuration: {name} is {now}, the nested subnet has {before}"
    assert not check.same_logits


def test_what_hugging_faces_nemotron_h_cannot_say_is_refused(tmp_path: Path) -> None:
    nested = nested_family(tmp_path, "all")
    with pytest.raises(ProblemsError) as error:
        extract_all(nested, tmp_path / "hf", format="hf")
    keys = {p.key.removeprefix("model.") for p in error.value.problems}
    assert keys >= {"gated_linear_unit", "position_embedding_type", "qk_layernorm", "residual_multiplier"}
    assert not (tmp_path / "hf" / "small").exists()
