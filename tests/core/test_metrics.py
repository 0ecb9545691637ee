"""Measures from counts equal those of scikit-learn on the examples themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn import metrics

from sluiceway.core.evaluation import Evaluation
from sluiceway.core.metrics import by_class, metrics_of


def evaluated(
    logits: torch.Tensor, labels: torch.Tensor, parts: int, classes: int, scores: bool = True
) -> Evaluation:
    """Added up from so many batches."""
    total = Evaluation.nothing()
    for a, b in zip(logits.chunk(parts), labels.chunk(parts), strict=True):
        total += Evaluation.of(a, b, F.cross_entropy, classes, scores=scores)
    return total


@pytest.mark.parametrize("present", [[0, 1, 2, 3, 4], [0, 2, 3], [1, 4]])
@pytest.mark.parametrize("seed", range(3))
def test_measures_equal_scikit_learn(present: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = torch.as_tensor(rng.choice(present, 90))
    logits = torch.randn(90, 5, generator=torch.Generator().manual_seed(seed))
    logits[torch.arange(90), labels] += 1.0
    found = metrics_of(evaluated(logits, labels, 4, int(labels.max()) + 1))
    true, guessed, p = labels.numpy(), logits.argmax(1).numpy(), logits.softmax(1).numpy()
    recalls = [float((guessed[true == c] == c).mean()) for c in present]
    assert found["balanced_accuracy"] == pytest.approx(np.mean(recalls), abs=1e-12)
    f1 = metrics.f1_score(true, guessed, average="macro", zero_division=0)
    assert found["macro_f1"] == pytest.approx(f1, abs=1e-12)
    areas = [metrics.roc_auc_score(true == c, p[:, c]) for c in present]
    assert found["auc"] == pytest.approx(np.mean(areas), abs=1e-12)
    if len(present) == 5:
        whole = metrics.roc_auc_score(true, p, multi_class="ovr")
        assert found["auc"] == pytest.approx(whole, abs=1e-9)


def test_by_hand() -> None:
    # Two of class 0, right; two of class 1, one right; class 2 was predicted once, never tested.
    logits = F.one_hot(torch.tensor([0, 0, 1, 2]), 3).float()
    total = evaluated(logits, torch.tensor([0, 0, 1, 1]), 2, 2, scores=False)
    assert total.confusion.tolist() == [[2, 0, 0], [0, 1, 1], [0, 0, 0]]
    found = metrics_of(total)
    assert found == {
        "balanced_accuracy": pytest.approx(0.75),
        "macro_f1": pytest.approx((1 + 2 / 3 + 0) / 3),
    }
    rows = by_class(total.confusion.tolist(), ["a", "b", "c"])
    assert [row["label"] for row in rows] == ["a", "b", "c"]
    assert [row["examples"] for row in rows] == [2, 2, 0]
    assert [row["recall"] for row in rows] == [1, 0.5, 0]
    assert [row["precision"] for row in rows] == [1, 1, 0]


def test_nothing_to_measure() -> None:
    assert metrics_of(Evaluation.nothing()) == {}
    one = evaluated(torch.randn(4, 2), torch.zeros(4).long(), 1, 1)
    assert "auc" not in metrics_of(one)
    broken = evaluated(torch.full((4, 2), torch.nan), torch.tensor([0, 1, 0, 1]), 1, 2)
    assert "auc" not in metrics_of(broken)
