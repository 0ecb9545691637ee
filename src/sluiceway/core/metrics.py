"""Measures besides accuracy, by scikit-learn, from what an evaluation kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sluiceway.errors import InputError, described

if TYPE_CHECKING:  # what is mistyped in a recipe is said without torch
    from sluiceway.core.evaluation import Evaluation, Metric

#: What `run.metric` may name; of all of them more is better.
METRICS = ("accuracy", "balanced_accuracy", "macro_f1", "auc")


def name_of(metric: str | Metric) -> str:
    """A metric's name: of a function its own. Raises InputError for one of ours."""
    if isinstance(metric, str):
        return metric
    name = str(getattr(metric, "__name__", type(metric).__name__))
    if name in (*METRICS, "loss"):
        raise InputError(f"metric: a function of your own is not called {name}, as one of ours is")
    return name


def metrics_of(found: Evaluation, metric: str | Metric = "accuracy") -> dict[str, float]:
    """Measures by name; ours are in [0, 1], and absent where the examples do not define them.

    Args:
        found: what was counted.
        metric: a function of the user's own is one of them.

    `balanced_accuracy`: mean recall over the classes that were tested. `macro_f1`: mean F1 over the
    classes that were tested or predicted. `auc`: mean area under the ROC curve of each class
    against the rest, over the classes that some examples have and some have not.

    Raises:
        InputError: the user's own function fails.
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
    if not isinstance(metric, str):
        measured[name_of(metric)] = own(metric, found)
    return measured


def own(metric: Metric, found: Evaluation) -> float:
    """The value of the user's own function. Raises InputError where it has or gives none."""
    from sluiceway.core.evaluation import SCORES_LIMIT

    name = name_of(metric)
    if not found.scores:
        raise InputError(
            f"metric {name}: the test set has more than {SCORES_LIMIT:,} probabilities"
        )
    labels = np.concatenate([labels.numpy() for labels, _ in found.scores])
    scores = np.concatenate([scores.numpy() for _, scores in found.scores])
    try:
        value = float(metric(labels, scores))
    except Exception as error:
        raise InputError(f"metric {name}: {described(error)}") from error
    if not np.isfinite(value):
        raise InputError(f"metric {name} gives {value}: expected a number")
    return value


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
