"""Budgets and noise: their distributions, and that they depend on (seed, step, micro-batch) alone."""

import math

import pytest
import torch

from nemo_elastic.router.sampling import gumbel_noise, sample_budgets


def sample_budget(*arguments) -> str:
    (name,) = sample_budgets(*arguments)
    return name


SHAPES = {"ffn_hidden_size": (3, 5), "hidden_size": (1, 4)}


def test_budgets_come_as_often_as_they_should():
    probabilities = {"12B": 0.5, "9B": 0.3, "6B": 0.2}
    n, counts = 20_000, dict.fromkeys(probabilities, 0)
    for step in range(n // 8):
        for micro_batch in range(8):
            counts[sample_budget(probabilities, 17, step, micro_batch)] += 1
    chi_square = sum((counts[b] - n * p) ** 2 / (n * p) for b, p in probabilities.items())
    assert chi_square < 13.8  # 99.9 % of a chi-square with two degrees of freedom


@pytest.mark.parametrize("count", [2, 3, 5])
def test_shares_of_a_shared_teacher_have_the_same_expectation(count: int):
    probabilities = {"12B": 0.5, "9B": 0.3, "6B": 0.2}
    n, totals = 6000, dict.fromkeys(probabilities, 0.0)
    for step in range(n):
        shares = sample_budgets(probabilities, 17, step, 0, count)
        assert math.isclose(sum(shares.values()), 1.0) and len(shares) <= count
        for name, share in shares.items():
            assert abs(share - probabilities[name]) < 1 / count + 1e-9  # systematic: never a whole point off
            totals[name] += share
    for name, p in probabilities.items():
        assert abs(totals[name] / n - p) < 4 / count * math.sqrt(0.25 / n)


def test_as_many_draws_as_equal_budgets_take_each_once():
    fair = dict.fromkeys("abc", 1 / 3)
    assert all(set(sample_budgets(fair, 5, s, 0, 3)) == set("abc") for s in range(500))


def test_neighbouring_draws_are_independent():
    fair = {"a": 0.5, "b": 0.5}
    for shift in ((0, 1), (1, 0)):
        same = sum(
            sample_budget(fair, 3, s, m) == sample_budget(fair, 3, s + shift[0], m + shift[1])
            for s in range(0, 200, 2)
            for m in range(0, 40, 2)
        )
        assert abs(same - 1000) < 3.3 * math.sqrt(2000) / 2


def test_a_budget_of_probability_zero_is_never_drawn():
    assert {sample_budget({"a": 0.0, "b": 1.0, "c": 0.0}, 1, s, 0) for s in range(500)} == {"b"}


def test_noise_is_a_pure_function_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = gumbel_noise(SHAPES, 1, 2, 3)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(99)
    again = gumbel_noise({"hidden_size": (1, 4)}, 1, 2, 3)  # another dim more or less changes nothing
    assert torch.equal(first["hidden_size"], again["hidden_size"])
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4)):
        assert not torch.equal(first["hidden_size"], gumbel_noise(SHAPES, *other)["hidden_size"])


def test_noise_is_gumbel_distributed():
    x = gumbel_noise({"d": (1, 100_000)}, 7, 0, 0)["d"].double()
    assert torch.isfinite(x).all()
    assert abs(x.mean().item() - 0.5772156649) < 0.02
    assert abs(x.var().item() - math.pi**2 / 6) < 0.04
    for q in (0.01, 0.1, 0.5, 0.9, 0.99):
        expected = -math.log(-math.log(q))
        assert abs((x <= expected).double().mean().item() - q) < 0.006


def test_argmax_of_noisy_logits_follows_their_softmax():
    z = torch.tensor([0.3, -0.5, 1.1, 0.0])
    n = 4000
    hits = torch.zeros(4)
    for step in range(n):
        hits[(z + gumbel_noise({"d": (1, 4)}, 0, step, 0)["d"][0]).argmax()] += 1
    expected = torch.softmax(z, 0) * n
    assert ((hits - expected) ** 2 / expected).sum() < 16.3  # 99.9 %, three degrees of freedom
