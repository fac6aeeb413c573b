"""A family served from one nested checkpoint.

logits(budget, by views) == logits(elastic model, sliced) == logits(extracted plain child)     1e-5 relative, fp32
logits through caches, in any pieces, or by a step of fixed shapes == logits at once           1e-12 relative, fp64
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_family import MODEL, TOKENIZER, manifest, random_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from nemo_elastic.checkpoint.extract import child_architecture, child_tensors
from nemo_elastic.checkpoint.manifest import Manifest
from nemo_elastic.checkpoint.reader import MemoryReader
from nemo_elastic.nemo.export.nested import write_nested
from nemo_elastic.problems import ProblemsError
from nemo_elastic.serving import ElasticFamily, decode
from nemo_elastic.serving.linear import linear
from nemo_elastic.serving.sampling import next_tokens
from nemo_elastic.space.dims import WIDTH_DIMS
from nemo_elastic.space.layout import ParamLayout
from nemo_elastic.space.slicing import take

TOKENS = torch.randint(0, MODEL["vocab_size"], (2, 23), generator=torch.Generator().manual_seed(1))


def varied_manifest() -> Manifest:
    """The family, and a child whose layers differ."""
    found = manifest()
    varied = found.space.subnet(
        hidden_size=40,
        ffn_hidden_size=[80, 40, 56],
        mamba_num_heads=[8, 12, 4],
        mamba_head_dim=6,
        num_attention_heads=[4, 12],
        layers=[0, 1, 2, 3, 4, 6, 7],
    )
    return replace(found, subnets={**found.subnets, "varied": varied})


MANIFEST = varied_manifest()
NAMES = tuple(MANIFEST.subnets)


@pytest.fixture(scope="module")
def nested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On disk."""
    return write_nested(tmp_path_factory.mktemp("f") / "nested", random_weights(), MANIFEST, tokenizer=TOKENIZER)


def family(dtype: torch.dtype = torch.float64) -> ElasticFamily:
    """In memory."""
    weights = {name: value.to(dtype) for name, value in random_weights().items()}
    return ElasticFamily(weights, MANIFEST.layout, MODEL, MANIFEST.subnets)


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference over largest value."""
    return float((got - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_every_budget_is_the_elastic_models_subnet(nested: Path, one_rank: None, name: str, compact: bool) -> None:
    from nemo_elastic.mcore.elastic.plan import hard_plan
    from nemo_elastic.mcore.models.build import build_elastic_model, load_weights
    from nemo_elastic.mcore.models.evaluate import whole_logits

    served = ElasticFamily.load(nested)
    served.switch(name, compact=compact)
    elastic = build_elastic_model(MANIFEST.space.architecture, perform_initialization=False)
    load_weights(elastic, random_weights(), MANIFEST.space.architecture)
    wanted = {n: whole_logits(elastic, TOKENS, hard_plan(elastic.layout, s)) for n, s in MANIFEST.subnets.items()}
    got = served.logits(TOKENS)
    assert relative(got, wanted[name]) < 1e-5
    assert all(relative(got, other) > 1e-2 for n, other in wanted.items() if n != name)


@pytest.mark.parametrize("name", ["full", "large", "small"])
def test_every_budget_is_the_extracted_child(nested: Path, one_rank: None, name: str) -> None:
    from nemo_elastic.mcore.models.build import build_plain_model, load_weights
    from nemo_elastic.mcore.models.evaluate import whole_logits

    subnet, served = MANIFEST.subnet(name), ElasticFamily.load(nested)
    served.switch(name)
    architecture = child_architecture(MANIFEST.space.architecture, subnet)
    plain = build_plain_model(architecture, perform_initialization=False)
    tensors = child_tensors(MemoryReader(random_weights()), MANIFEST.layout, subnet)
    load_weights(plain, {t.name: t.read() for t in tensors}, architecture)
    assert relative(served.logits(TOKENS), whole_logits(plain, TOKENS)) < 1e-5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pieces", [[1] * 23, [22, 1], [5, 1, 1, 9, 7], [23]])
def test_caches_change_nothing(name: str, pieces: list[int]) -> None:
    served = family()
    served.switch(name)
    whole, cache = served.logits(TOKENS), served.new_cache(2)
    found = torch.cat([served.logits(part, cache) for part in TOKENS.split(pieces, dim=1)], dim=1)
    assert cache.length == 23 and relative(found, whole) < 1e-12
    last = served.logits(TOKENS, last_only=True)
    assert last.shape == (2, 1, 2048) and relative(last, whole[:, -1:]) < 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_fixed_shapes_is_decoding(name: str) -> None:
    """Twice from one step: what an earlier generation left, NaN too, is forgotten."""
    served = family()
    served.switch(name)
    whole, step = served.logits(TOKENS), served.decode_step(2, room=23)
    for start in (9, 3):
        cache = served.new_cache(2, room=start)
        served.logits(TOKENS[:, :start], cache)
        step.begin(cache)
        found = torch.cat([step(TOKENS[:, i : i + 1]) for i in range(start, 23)], dim=1)
        assert relative(found, whole[:, start:]) < 1e-12
        with torch.inference_mode():
            for tensor in memory(step):
                tensor.fill_(torch.nan)
    with pytest.raises(ValueError, match="room for 23 tokens, and all of it is taken"):
        step(TOKENS[:, :1])
    for other in (served.new_cache(3), served.new_cache(2)):
        other.length = 23 + (other.batch == 2)
        with pytest.raises(ValueError, match=r"the step is of budget .* 2 rows and 23 tokens"):
            step.begin(other)


def memory(step: decode.DecodeStep) -> list[torch.Tensor]:
    """What a step remembers, but for where it stands."""
    caches = [vars(cache) for cache in step._layers if cache is not None]
    return [tensor for cache in caches for name, tensor in cache.items() if name != "position"]


class Calls(TorchDispatchMode):
    """Every operation with its arguments; of a tensor its shape, and where it lies if it is one of `kept`."""

    def __init__(self, kept: list[torch.Tensor]) -> None:
        super().__init__()
        self.kept, self.seen = {t.data_ptr() for t in kept}, []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        def tensor(t: torch.Tensor) -> tuple:
            return tuple(t.shape), t.stride(), t.data_ptr() if t.data_ptr() in self.kept else None

        self.seen.append((str(func), tree_map_only(torch.Tensor, tensor, (args, kwargs or {}))))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NAMES)
def test_every_step_is_the_same_calls_on_the_same_memory(name: str) -> None:
    """What can be recorded once and played ever after; with a cache that grows it is not so."""
    served = family()
    served.switch(name, compact=True)
    cache, step = served.new_cache(2, room=23), served.decode_step(2, room=23)
    served.logits(TOKENS[:, :4], cache)
    step.begin(cache)
    fixed, growing = [], []
    for number in range(4, 7):
        token = TOKENS[:, number : number + 1]
        for seen, act in ((fixed, lambda t: step(t)), (growing, lambda t: served.logits(t, cache))):
            with Calls([*memory(step), *served._network.tensors()]) as calls:
                act(token)
            seen.append(calls.seen)
    assert fixed[0] == fixed[1] == fixed[2] and len(fixed[0]) > 50
    assert growing[0] != growing[1]


def test_what_is_recorded_starts_afresh_and_writes_to_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the recorder of a GPU replaced by runs that leave traces, as those in front of a recording do."""
    results: list[torch.Tensor] = []

    def recorded(run: Any, rewind: Any) -> Any:
        for _ in range(decode.WARM_UPS):
            rewind()
            run()
        results.append(run().clone())
        return lambda: results[0].copy_(run())

    monkeypatch.setattr(decode, "recorded", recorded)
    monkeypatch.setattr(decode, "records", lambda device: True)
    served, plain = family(), family()
    served.switch("small")
    plain.switch("small")
    step = served.decode_step(2, room=16)
    for prompt in (TOKENS[:, :5], TOKENS[:, 5:8]):
        assert torch.equal(served.generate(prompt, 12, step=step), plain.generate(prompt, 12))
    assert step(TOKENS[:, :1]) is results[0] if step.length < 16 else step.length == 16
    drawn = {"temperature": 1.5, "top_k": 9, "seed": 3}
    assert torch.equal(
        served.generate(TOKENS[:, :5], 12, step=step, **drawn), plain.generate(TOKENS[:, :5], 12, **drawn)
    )
    with pytest.raises(ValueError, match="room for 17 tokens, the one given has it for 16"):
        served.generate(TOKENS[:, :5], 13, step=step)
    with pytest.raises(ValueError, match="must be at least 1"):
        served.decode_step(0, room=3)


@pytest.mark.parametrize("name", NAMES)
def test_greedy_generation_is_the_argmax_of_uncached_logits(name: str) -> None:
    served = family()
    served.switch(name)
    new, tokens = served.generate(TOKENS[:, :5], 12), TOKENS[:, :5]
    assert new.shape == (2, 12)
    for number in range(12):
        tokens = torch.cat([tokens, served.logits(tokens)[:, -1].argmax(-1, keepdim=True)], dim=1)
        assert torch.equal(tokens[:, -1], new[:, number])


def test_budgets_can_take_turns() -> None:
    served = family()
    before = {}
    for name in NAMES:
        served.switch(name)
        before[name] = served.logits(TOKENS)
    for name in (*reversed(NAMES), *NAMES):
        served.switch(name, compact=name == "large")
        assert torch.equal(served.logits(TOKENS), before[name]) or relative(served.logits(TOKENS), before[name]) < 1e-12
    cache = served.new_cache(2)
    served.logits(TOKENS, cache)
    served.switch("small")
    with pytest.raises(ValueError, match="cache is of budget 'varied', 'small' is active"):
        served.logits(TOKENS, cache)


def test_drawing_is_a_function_of_the_seed() -> None:
    served = family()
    how = {"max_new_tokens": 20, "temperature": 1.5}
    one, same, other = (served.generate(TOKENS, seed=seed, **how) for seed in (3, 3, 4))
    assert torch.equal(one, same) and not torch.equal(one, other)
    greedy = served.generate(TOKENS, 20)
    assert torch.equal(served.generate(TOKENS, 20, temperature=1.0, top_k=1), greedy)
    assert torch.equal(served.generate(TOKENS[0].tolist(), 20), greedy[:1])  # rows do not see each other


def test_stop_fills_up_and_ends() -> None:
    served = family()
    free = served.generate(TOKENS, 20)
    stop = int(free[0, 4])
    first = [row.tolist().index(stop) if stop in row.tolist() else 99 for row in free]
    found = served.generate(TOKENS, 20, stop=stop)
    assert found.shape[1] == min(20, max(first) + 1)
    assert found[0, :5].tolist() == free[0, :5].tolist() and set(found[0, first[0] :].tolist()) == {stop}
    assert served.generate(TOKENS[:1], 20, stop=stop).shape == (1, first[0] + 1)


def test_top_k_keeps_the_largest_at_their_odds() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).log_softmax(-1)
    generator, counts = torch.Generator().manual_seed(0), torch.zeros(4)
    for _ in range(4000):
        counts[next_tokens(logits, 2.0, 2, generator)] += 1
    wanted = torch.tensor([1.0, 0.5]).softmax(0)
    assert counts[2:].sum() == 0 and (counts[:2] / 4000 - wanted).abs().max() < 0.03


def test_nothing_is_copied_but_vectors(nested: Path) -> None:
    served = ElasticFamily.load(nested)
    parent = sum(v.nbytes for v in random_weights().values())
    layout = ParamLayout(served.layout.architecture)
    vectors = sum(random_weights()[n].nbytes for n, s in layout.table.items() if len(s.axes) != 2)
    for name in NAMES:
        served.switch(name)
        memory = served.memory_bytes()
        assert memory["weights"] == parent
        assert memory["active"] <= vectors  # the projections and embeddings are views
    served.switch("small")
    copied = sum(
        4 * spec.numel(sizes) for _, spec, sizes in layout.child_params(MANIFEST.subnet("small")) if len(spec.axes) == 2
    )
    views = served.memory_bytes()["active"]
    served.switch("small", compact=True)
    assert served.memory_bytes()["active"] == views + copied


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_linear_by_views_is_linear_of_the_cut(data: st.DataObject) -> None:
    """Any row of the table with two axes, any legal sizes, any number of tokens."""
    layout, generator = MANIFEST.layout, torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    spec = data.draw(st.sampled_from([s for s in layout.table.values() if len(s.axes) == 2 and s.layer is not None]))
    steps = {"mamba_num_heads": 4, "num_attention_heads": 4, "ffn_hidden_size": 8}
    full = {f.dim: f.groups * f.count for axis in spec.axes for s in axis for f in s.factors if f.dim}
    assert set(full) <= set(WIDTH_DIMS)
    sizes = {
        dim: data.draw(st.integers(1, whole // steps.get(dim, 1))) * steps.get(dim, 1) for dim, whole in full.items()
    }
    weight = torch.randn(spec.shape({}), generator=generator, dtype=torch.float64)
    cut = take(weight, spec, sizes)
    x = torch.randn(data.draw(st.integers(1, 3)), 2, cut.shape[1], generator=generator, dtype=torch.float64)
    apply = linear(weight, spec, sizes)
    assert relative(apply(x), x @ cut.t()) < 1e-13
    assert torch.allclose(linear(weight, spec, sizes, compact=True)(x), x @ cut.t(), rtol=0, atol=1e-12)


def test_what_is_not_implemented_is_refused() -> None:
    with pytest.raises(ProblemsError) as error:
        ElasticFamily(random_weights(), MANIFEST.layout, {**MODEL, "qk_l2_norm": True}, MANIFEST.subnets)
    assert [p.key for p in error.value.problems] == ["model.qk_l2_norm"]
    with pytest.raises(ProblemsError, match="did you mean 'small'"):
        family().switch("smal")
    for wrong in ({"prompt": []}, {"max_new_tokens": 0}, {"temperature": -1.0}, {"top_k": 0}):
        with pytest.raises(ValueError, match="must be"):
            family().generate(**{"prompt": [1, 2], "max_new_tokens": 1, **wrong})


def test_bfloat16_runs(nested: Path) -> None:
    served = ElasticFamily.load(nested, dtype=torch.bfloat16)
    served.switch("small")
    wanted = ElasticFamily.load(nested)
    wanted.switch("small")
    got = served.logits(TOKENS)
    assert got.dtype == torch.bfloat16 and relative(got.float(), wanted.logits(TOKENS)) < 0.1
    assert served.generate(TOKENS, 3).shape == (2, 3)


def test_shipped_parent_costs_its_own_memory_and_switches_in_milliseconds() -> None:
    """Within 2 % of the parent alone; under 50 ms with the first token behind the switch."""
    import time

    from nemo_elastic.config import load_config
    from nemo_elastic.config.model_fields import architecture_of
    from nemo_elastic.mcore.models.parents import open_parent, whole_state
    from nemo_elastic.space.elastic_space import ElasticSpace

    model = dict(load_config("tiny_parent.yaml").config.model)
    space = ElasticSpace(architecture=architecture_of(model))
    cut = {"hidden_size": 96, "ffn_hidden_size": 256, "mamba_num_heads": 8, "num_attention_heads": 8}
    subnets = {"full": space.full_subnet(), "small": space.subnet(**cut)}
    layout = ParamLayout(space.architecture)
    weights = whole_state(open_parent("builtin:tiny_parent", layout), torch.float32)
    served, parent = ElasticFamily(weights, layout, model, subnets), sum(w.nbytes for w in weights.values())
    seconds = []
    for _ in range(8):
        for name in subnets:
            start = time.perf_counter()
            served.switch(name)
            served.logits(TOKENS[:1, :1])
            seconds.append(time.perf_counter() - start)
            assert sum(served.memory_bytes().values()) <= 1.02 * parent
    assert sorted(seconds)[len(seconds) // 4] < 0.05
