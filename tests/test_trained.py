"""The same function on trained weights and at extremes, on short and long text, at once and token by token.

fp64 serving is the reference. Its fp32, Megatron's elastic model (masked and sliced), the extracted plain child and the
exported Hugging Face child in transformers give its logits; what differs is rounding.
"""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_family import TOKENIZER
from trained_family import BUDGETS, MODEL, WEIGHTS, manifest, relative, served, text, weights

from nemo_elastic.checkpoint.extract import child_architecture, child_tensors
from nemo_elastic.checkpoint.reader import MemoryReader
from nemo_elastic.importance.ranking import random_orders
from nemo_elastic.importance.sorting import sort_tensors
from nemo_elastic.serving import ElasticFamily
from nemo_elastic.space.dims import WIDTH_DIMS

HF_PYTHON = Path(__file__).parent.parent / ".venv-hf" / "bin" / "python"
FP32 = 1e-4
SHORT = (1, 2, 5)
BOTH = pytest.mark.parametrize(("kind", "budget"), [(k, b) for k in WEIGHTS for b in BUDGETS])


def test_the_extremes_are_extreme() -> None:
    """And the trained parent has what transformers' default would clamp."""
    for kind, low, high in (("trained", 1e-3, 0.1), ("extreme", 2e-6, 9.0)):
        found = weights(kind)
        steps = torch.nn.functional.softplus(torch.stack([v for n, v in found.items() if n.endswith("dt_bias")]))
        assert steps.min() < low and steps.max() > high
        assert all(torch.isfinite(v).all() for v in found.values())


@BOTH
def test_serving_in_pieces_is_serving_at_once(kind: str, budget: str) -> None:
    family, tokens = served(kind, budget), text()
    whole, cache = family.logits(tokens), family.new_cache(1)
    pieces = torch.cat([family.logits(part, cache) for part in tokens.split([600, *[1] * 12, 388], dim=1)], dim=1)
    assert relative(pieces, whole) < 1e-10
    narrow = served(kind, budget, torch.float32)
    assert relative(narrow.logits(tokens), whole) < FP32
    cache = narrow.new_cache(1)
    pieces = torch.cat([narrow.logits(part, cache) for part in tokens.split([988, *[1] * 12], dim=1)], dim=1)
    assert relative(pieces, whole) < FP32
    for length in SHORT:
        assert relative(narrow.logits(tokens[:, :length]), whole[:, :length]) < FP32


@pytest.mark.parametrize("kind", WEIGHTS)
def test_sorted_parent_is_the_parent(kind: str) -> None:
    found, layout = weights(kind), manifest().layout
    orders = random_orders(layout, WIDTH_DIMS, torch.Generator().manual_seed(3))
    family = ElasticFamily(
        {n: w.double() for n, w in sort_tensors(found.items(), layout, orders)}, layout, MODEL, manifest().subnets
    )
    family.switch("full")
    assert relative(family.logits(text()), served(kind, "full").logits(text())) < 1e-10


@BOTH
def test_subnet_and_plain_child_are_the_served_one(kind: str, budget: str, one_rank: None) -> None:
    from nemo_elastic.mcore.elastic.plan import hard_plan
    from nemo_elastic.mcore.models.build import build_elastic_model, build_plain_model, load_weights
    from nemo_elastic.mcore.models.evaluate import whole_logits

    family, tokens, wanted = manifest(), text(), served(kind, budget).logits(text())
    subnet, whole = family.subnet(budget), weights(kind)
    elastic = build_elastic_model(family.space.architecture, perform_initialization=False)
    load_weights(elastic, whole, family.space.architecture)
    architecture = child_architecture(family.space.architecture, subnet)
    plain = build_plain_model(architecture, perform_initialization=False)
    tensors = child_tensors(MemoryReader(whole), family.layout, subnet)
    load_weights(plain, {t.name: t.read() for t in tensors}, architecture)
    for length in (*SHORT, tokens.shape[1]):
        part = tokens[:, :length]
        for mode in ("masked", "sliced"):
            found = whole_logits(elastic, part, hard_plan(elastic.layout, subnet, mode))
            assert relative(found, wanted[:, :length]) < FP32, (mode, length)
        assert relative(whole_logits(plain, part), wanted[:, :length]) < FP32, length


@pytest.mark.slow
@pytest.mark.skipif(not HF_PYTHON.is_file(), reason="make setup-hf makes the venv with transformers 5")
def test_exported_children_in_transformers_are_the_served_ones(tmp_path: Path) -> None:
    """Prefill of 1,000 tokens and of a few, and 40 tokens decoded with the cache behind a prefill of 100."""
    from nemo_elastic.nemo.export.checkpoints import extract
    from nemo_elastic.nemo.export.nested import write_nested

    folders, wanted = [], []
    for kind in WEIGHTS:
        nested = write_nested(tmp_path / kind, weights(kind), manifest(), tokenizer=TOKENIZER)
        for budget in BUDGETS:
            folders.append(str(extract(nested, budget, tmp_path / f"{kind}-{budget}", format="hf")))
            wanted.append(served(kind, budget).logits(text()).numpy())
    (tmp_path / "tokens.json").write_text(json.dumps(text().tolist()))
    script = Path(__file__).parent / "hf_logits.py"
    command = [HF_PYTHON, script, tmp_path / "tokens.json", tmp_path / "out.npz", *folders]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    got = np.load(tmp_path / "out.npz")
    for number, reference in enumerate(wanted):
        scale = np.abs(reference).max()
        assert np.abs(got[str(number)] - reference).max() < FP32 * scale, folders[number]
        assert np.abs(got[f"cached{number}"] - reference[:, 100:140]).max() < FP32 * scale, folders[number]
        for length in SHORT:
            short = got[f"short{length}.{number}"]
            assert np.abs(short - reference[:, :length]).max() < FP32 * scale, (folders[number], length)
