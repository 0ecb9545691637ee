"""Measures besides accuracy, by scikit-learn, from what an evaluation kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sluiceway.core.evaluation import Evaluation

#: What `run.metric` may name; of all of them more is better.
METRICS = ("accuracy", "balanced_accuracy", "macro_f1", "auc")


def metrics_of(found: Evaluation) -> dict[str, float]:
    """Measures by name, each in [0, 1]; those that are not defined for the examples are absent.

    `balanced_accuracy`: mean recall over the classes that were tested. `macro_f1`: mean F1 over the
    classes that were tested or predicted. `auc`: mean area under the ROC curve of each class
    against the rest, over the classes that some examples have and some have not.
    """
    from sklearn import metrics

    true, guessed, counts = cells(found)
    if not len(true):
        return {}
    recalls = metrics.recall_score(
        true, guessed, labels=np.unique(true), average="macro", sample_weight=counts
    )
    f1 = metrics.f1_score(true, guessed, average="macro", zero_division=0, sample_weight=counts)
    measured = {"balanced_accuracy": float(recalls), "macro_f1": float(f1)}
    if (auc := area(found)) is not None:
        measured["auc"] = auc
    return measured


def area(found: Evaluation) -> float | None:
    """Mean over classes of the area under the ROC curve; None without probabilities."""
    from sklearn import metrics

    if not found.scores:
        return None
    labels = np.concatenate([labels.numpy() for labels, _ in found.scores])
    scores = np.concatenate([scores.numpy() for _, scores in found.scores])
    if not np.isfinite(scores).all():
        return None
    classes = [c for c in np.unique(labels) if c < scores.shape[1] and (labels != c).any()]
    areas = [metrics.roc_auc_score(labels == c, scores[:, c]) for c in classes]
    return float(np.mean(areas)) if areas else None


def by_class(confusion: Sequence[Sequence[int]], names: Sequence[str]) -> list[dict[str, Any]]:
    """Precision, recall, F1 and number of tested examples of each class.

    Args:
        confusion: [C, C], examples by true and by predicted class.
        names: of the C classes.
    """
    from sklearn import metrics

    if not sum(map(sum, confusion)):
        return []
    counts = np.asarray(confusion, dtype=np.int64)
    true, guessed = np.nonzero(counts)
    found = metrics.precision_recall_fscore_support(
        true,
        guessed,
        labels=range(len(names)),
        zero_division=0,
        sample_weight=counts[true, guessed],
    )
    keys = ("precision", "recall", "f1")
    return [
        {"label": name}
        | {key: float(found[at][row]) for at, key in enumerate(keys)}
        | {"examples": int(counts[row].sum()) if row < len(counts) else 0}
        for row, name in enumerate(names)
    ]


def cells(found: Evaluation) -> tuple[Any, Any, Any]:
    """True class, predicted class and count of the confusion matrix's cells that are not empty."""
    confusion = found.confusion.numpy()
    true, guessed = np.nonzero(confusion)
    return true, guessed, confusion[true, guessed]
