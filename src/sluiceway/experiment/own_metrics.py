"""What `run.metric` names: one of the measures that ship, or a function of the user's own."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from sluiceway.core.metrics import METRICS, name_of
from sluiceway.errors import InputError, quoted
from sluiceway.experiment.keys import sentence
from sluiceway.experiment.own_code import fault, is_code, load_code, short_name

if TYPE_CHECKING:  # what is mistyped is said without torch
    from sluiceway.core.evaluation import Metric

#: Group of entry points by which packages bring measures of their own.
GROUP = "sluiceway.metrics"
#: One line about each that ships, in the order of `METRICS`.
TEXTS = (
    "Share of right answers.",
    "Mean recall over the classes.",
    "Mean F1 over the classes.",
    "Mean area under the ROC curve of each class against the rest.",
)


class Named:
    """A function under the name by which a recipe has it.

    Args:
        function: of (labels [N], probabilities [N, C]), numpy arrays, to a number.
        name: in records and summaries.
    """

    def __init__(self, function: Metric, name: str) -> None:
        self.function, self.__name__ = function, name
        name_of(self)

    def __call__(self, labels: Any, probabilities: Any) -> float:
        return self.function(labels, probabilities)


def require_metric(value: str) -> None:
    """Raise InputError for what can be no measure; runs no code."""
    named = [point.name for point in entry_points(group=GROUP)]
    if value not in (*METRICS, *named) and not is_code(value):
        raise InputError(
            f"run.metric = {quoted(value)}; allowed: {', '.join([*METRICS, *named])}, or a "
            'function of your own, "file.py:name"'
        )


def metric_of(value: str) -> str | Metric:
    """The measure that `run.metric` names: a name of ours, or the user's function.

    Raises:
        InputError: there is none, or it is no function.
    """
    require_metric(value)
    if value in METRICS:
        return value
    if is_code(value):
        found = load_code("run.metric", value)
    else:
        found = loaded(next(iter(entry_points(group=GROUP, name=value))))
    if not callable(found) or isinstance(found, type):
        raise InputError(
            f"run.metric = {quoted(short_name(value))} is {quoted(type(found).__name__)}, not a "
            "function of (labels, probabilities)"
        )
    return Named(found, short_name(value))


def loaded(point: EntryPoint) -> Any:
    """What an entry point names. Raises InputError where that fails."""
    try:
        return point.load()
    except Exception as error:
        raise InputError(f"run.metric = {quoted(point.name)}: {fault(error)}") from None


def listed_metrics() -> list[tuple[str, str]]:
    """Name and one line of each measure that ships or that installed packages bring."""
    found = list(zip(METRICS, TEXTS, strict=True))
    for point in entry_points(group=GROUP):
        package = point.dist.name if point.dist else point.value
        try:
            doc = (loaded(point).__doc__ or "").strip().partition("\n")[0]
            text = f"{sentence(doc)} "
        except InputError as error:
            text = f"Cannot be used: {error} "
        found.append((point.name, f"{text}(package {package})"))
    return found
