"""Held-out loss (also of groups) and logits through Megatron's schedule, against the formula, at every layout."""

import pool_elastic
import pytest
import torch

CASES = {
    "single": (1, 1, False),
    "tp2": (2, 1, False),
    "pp2": (1, 2, False),
    "dp2": (1, 1, False),
    "tp2sp": (2, 1, True),
    "odd_tp2": (2, 1, False),  # a vocabulary that TP does not divide: its padding is in no logits
}


@pytest.mark.parametrize("name", CASES)
def test_heldout_loss_is_the_mean_cross_entropy_of_the_logits(pool2, name):
    tp, pp, sp = CASES[name]
    rows = 61 if name.startswith("odd") else 64
    results = pool2.run(pool_elastic.evaluate_case, sp=sp, tp=tp, pp=pp, vocab_size=rows)
    for found in results:
        labels = torch.cat([y for _, y in found["batches"]])
        for which in ("full", "cut"):
            logits = torch.cat(found[which]["logits"])
            assert logits.shape[-1] == rows
            expected = torch.nn.functional.cross_entropy(logits.double().flatten(0, 1), labels.flatten()).item()
            assert found[which]["loss"] == pytest.approx(expected, rel=1e-6)
            groups = torch.tensor(found["groups"]).flatten()
            for group, (total, weight) in enumerate(found[which]["sums"].tolist()):
                mine = logits[groups == group].double().flatten(0, 1), labels[groups == group].flatten()
                assert total == pytest.approx(
                    torch.nn.functional.cross_entropy(*mine, reduction="sum").item(), rel=1e-6
                )
                assert weight == len(mine[1])
            total, weight = found[which]["sums"].sum(0).tolist()
            assert found[which]["loss"] == pytest.approx(total / weight, rel=1e-14)
    first = results[0]
    for found in results[1:]:
        assert found["full"]["loss"] == first["full"]["loss"] and found["cut"]["loss"] == first["cut"]["loss"]
