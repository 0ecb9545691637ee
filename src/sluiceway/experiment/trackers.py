"""Runs told to TensorBoard, MLflow or Weights & Biases: three calls that change no number.

A tracker of one's own is any object with the three methods of `Tracker`, given to
`sluiceway.experiment.run.run(trackers=[...])`. From `federate` and `split_train` its `on_round` can
be given as it is.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Protocol

from sluiceway.core.round_loop import Record
from sluiceway.errors import InputError, first_line, how_to_install
from sluiceway.experiment.summary import overlaps
from sluiceway.experiment.tables import data_name, flattened, method_label


class Tracker(Protocol):
    """What is told of a run."""

    def on_start(self, recipe: Mapping[str, Any], out: Path) -> None:
        """Before the first round.

        Args:
            recipe: its tables, defaults included.
            out: the run folder, which exists.
        """
        ...

    def on_round(self, record: Record) -> None:
        """After each round."""
        ...

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """At the end of a run that came to its end, with what summary.json holds."""
        ...


def scalars(record: Record) -> dict[str, float]:
    """The numbers of a round by name; those that were not measured are absent."""
    plain = record.as_dict()
    names = ("accuracy", "loss", "train_loss", "bytes_up", "bytes_down", "seconds")
    found = {
        name: plain[name] for name in (*names, "accuracy_full", "kept", "bits") if name in plain
    }
    found |= plain["metrics"] | plain["report"]
    found |= {name: len(plain[name]) for name in ("rejected", "failed")}
    by_client = [value for value in plain["accuracy_by_client"] if value is not None]
    if by_client:
        found["client_accuracy_worst"] = min(by_client)
    found["routing_overlap"] = overlaps([plain])[0]
    known = {name: float(value) for name, value in found.items() if value is not None}
    return {name: value for name, value in known.items() if not math.isnan(value)}


def results(summary: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a finished run that its rounds do not have."""
    names = ("best_accuracy", "metric_best", "mean_personal_accuracy", "seconds")
    return {name: float(summary[name]) for name in names if summary.get(name) is not None}


def run_name(recipe: Mapping[str, Any]) -> str:
    """A run's name where several are listed."""
    data = Path(data_name(recipe)).stem
    return f"{data} {method_label(recipe['method'])} seed {recipe['run']['seed']}"


class TensorBoard:
    """Scalars and the recipe as event files in `tensorboard/` of the run folder."""

    def on_start(self, recipe: Mapping[str, Any], out: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(out / "tensorboard"))
        lines = [f"    {key} = {value!r}" for key, value in flattened(recipe).items()]
        self.writer.add_text("recipe", "\n".join(lines))

    def on_round(self, record: Record) -> None:
        for name, value in scalars(record).items():
            self.writer.add_scalar(name, value, record.round)
        self.writer.flush()

    def on_end(self, summary: Mapping[str, Any]) -> None:
        for name, value in results(summary).items():
            self.writer.add_scalar(f"run/{name}", value, summary["rounds"])
        self.writer.close()


class MLflow:
    """A run of the experiment "sluiceway", where MLFLOW_TRACKING_URI says.

    Without it in `mlflow.db` of the run folder (`mlflow ui --backend-store-uri sqlite:///...`).
    """

    def on_start(self, recipe: Mapping[str, Any], out: Path) -> None:
        from mlflow import MlflowClient

        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(out / 'mlflow.db').resolve()}"
        self.client: Any = MlflowClient(tracking_uri=uri)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "sluiceway")
        found = self.client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self.client.create_experiment(name)
        self.run = self.client.create_run(experiment, run_name=run_name(recipe)).info.run_id
        for key, value in flattened(recipe).items():
            self.client.log_param(self.run, key, str(value)[:500])

    def on_round(self, record: Record) -> None:
        for name, value in scalars(record).items():
            self.client.log_metric(self.run, name, value, step=record.round)

    def on_end(self, summary: Mapping[str, Any]) -> None:
        for name, value in results(summary).items():
            self.client.log_metric(self.run, f"run_{name}", value)
        self.client.set_terminated(self.run)


class WeightsAndBiases:
    """A run of the project "sluiceway"; without WANDB_API_KEY offline, in the run folder."""

    def on_start(self, recipe: Mapping[str, Any], out: Path) -> None:
        import wandb

        offline = None if os.environ.get("WANDB_API_KEY") else "offline"
        mode: Any = os.environ.get("WANDB_MODE", offline)
        self.run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "sluiceway"),
            name=run_name(recipe),
            config=flattened(recipe),
            dir=str(out),
            mode=mode,
        )

    def on_round(self, record: Record) -> None:
        self.run.log(scalars(record), step=record.round)

    def on_end(self, summary: Mapping[str, Any]) -> None:
        # Under names of their own: a round's seconds would overwrite those of the run.
        found = {f"run/{name}": value for name, value in results(summary).items()}
        self.run.summary.update(found)
        self.run.finish()


#: Trackers by the name that `run.track` uses, and the package that each needs.
TRACKERS: Final[dict[str, tuple[Callable[[], Tracker], str]]] = {
    "tensorboard": (TensorBoard, "tensorboard"),
    "mlflow": (MLflow, "mlflow"),
    "wandb": (WeightsAndBiases, "wandb"),
}


def chosen_trackers(names: Sequence[str]) -> dict[str, Tracker]:
    """The trackers that a recipe names. Raises InputError for one whose package is missing."""
    for name in names:
        if find_spec(TRACKERS[name][1]) is None:
            raise InputError(
                f"run.track names {name}, which needs its extra: {how_to_install(name)}"
            )
    return {name: TRACKERS[name][0]() for name in names}


class Told:
    """Passes a run's events on; a tracker that fails is dropped, and the run goes on.

    Args:
        trackers: by name.
        say: told of a tracker that failed.
    """

    def __init__(self, trackers: Mapping[str, Tracker], say: Callable[[str], None]) -> None:
        self.trackers = dict(trackers)
        self.say = say

    def __call__(self, event: str, *args: Any) -> None:
        for name, tracker in list(self.trackers.items()):
            with self.dropping(name):
                getattr(tracker, event)(*args)

    @contextmanager
    def dropping(self, name: str) -> Iterator[None]:
        """What fails inside loses that tracker."""
        try:
            yield
        except Exception as error:
            del self.trackers[name]
            self.say(f"{name} failed and gets no more of this run: {first_line(error)}")
