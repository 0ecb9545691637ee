"""One run of a recipe: load, partition, train, and leave a run folder behind."""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tomli_w
import torch

import sluiceway
from sluiceway.data import TextData, TextDataset, encode, limit, load_own, load_text, partition
from sluiceway.engines.local import chosen_device, federate
from sluiceway.experiment.errors import InputError
from sluiceway.experiment.models import Pretrained, classifier, load_pretrained
from sluiceway.experiment.recipe import Data, Recipe
from sluiceway.federated.checkpoints import Checkpoint
from sluiceway.federated.features import FeatureCache
from sluiceway.federated.rounds import Record, Result

#: Lines for people while a run goes on.
Say = Callable[[str], None]


@dataclass
class Progress:
    """What a run tells while it goes on; the command line replaces these with a progress bar."""

    say: Say = lambda line: None
    begin: Callable[[int], None] = lambda rounds: None
    on_round: Callable[[Record], None] = lambda record: None
    on_update: Callable[[int, int], None] = lambda done, of: None


@dataclass
class Session:
    """Keeps what several runs share: loaded data, tokens, and frozen layers' outputs."""

    texts: dict[Data, TextData] = field(default_factory=dict)
    tokens: dict[tuple[Data, str], tuple[TextDataset, TextDataset]] = field(default_factory=dict)
    features: FeatureCache | None = None

    def data(self, wanted: Data, say: Say) -> TextData:
        """The texts of [data], capped as it says. Raises DataError."""
        key = wanted.model_copy(update={"clients": 1, "partition": "iid", "alpha": None})
        if key not in self.texts:
            self.texts[key] = load_texts(wanted)
            found = self.texts[key]
            say(
                f"data: {found.name} from {found.source}, {len(found.train)} to train, "
                f"{len(found.test)} to test, {len(found.label_names)} classes"
            )
        return self.texts[key]

    def encoded(
        self, wanted: Data, texts: TextData, loaded: Pretrained
    ) -> tuple[TextDataset, TextDataset]:
        """Train and test texts as tokens of that model."""
        key = (
            wanted.model_copy(update={"clients": 1, "partition": "iid", "alpha": None}),
            loaded.source,
        )
        if key not in self.tokens:
            self.tokens[key] = (
                TextDataset(
                    encode(texts.train.texts, loaded.tokenizer, wanted.max_tokens),
                    texts.train.labels,
                ),
                TextDataset(
                    encode(texts.test.texts, loaded.tokenizer, wanted.max_tokens),
                    texts.test.labels,
                ),
            )
        return self.tokens[key]

    def feature_cache(self, megabytes: int) -> FeatureCache:
        """One cache for all runs of the session."""
        if self.features is None:
            self.features = FeatureCache(megabytes << 20)
        return self.features


def load_texts(wanted: Data) -> TextData:
    """Texts by name or from the user's file, with the caps applied. Raises DataError."""
    if wanted.path is not None:
        found = load_own(
            wanted.path,
            text_column=wanted.text_column,
            label_column=wanted.label_column,
            test_path=wanted.test_path,
            test_fraction=wanted.test_fraction,
            seed=wanted.seed,
        )
    else:
        assert wanted.name is not None
        found = load_text(wanted.name)
    train = limit(found.train, wanted.limit, wanted.seed) if wanted.limit else found.train
    test = limit(found.test, wanted.test_limit, wanted.seed) if wanted.test_limit else found.test
    return TextData(found.name, found.source, train, test, found.label_names)


def run(
    recipe: Recipe,
    out: Path | None = None,
    *,
    resume: bool = False,
    session: Session | None = None,
    progress: Progress | None = None,
) -> tuple[Result, dict[str, Any]]:
    """Run a recipe on the embedded engine.

    Args:
        recipe: checked.
        out: the run folder; None writes nothing.
        resume: continue what is in `out`.
        session: shares data and frozen layers' outputs between runs.
        progress: what to tell while it goes on.

    Returns:
        The result, and the summary that is in `summary.json`.

    Raises:
        InputError, DataError, NoExpertsError, CheckpointError: one line each.
    """
    session = session or Session()
    progress = progress or Progress()
    began = time.perf_counter()
    folder = Folder(out, recipe, resume) if out else None
    device = usable_device(recipe.run.device)
    texts = session.data(recipe.data, progress.say)
    parts = partition(
        recipe.data.partition,
        texts.train.labels,
        recipe.data.clients,
        recipe.run.seed,
        alpha=recipe.data.alpha,
        classes_per_client=recipe.data.classes_per_client,
        groups=texts.train.groups,
        column=recipe.data.group,
    )
    loaded = load_pretrained(recipe.model.name)
    train, test = session.encoded(recipe.data, texts, loaded)
    model = classifier(loaded, recipe.model, len(texts.label_names), recipe.run.seed)
    workers = worker_count(recipe, device)
    progress.say(
        f"model: {recipe.model.name} from {loaded.source}, on {device}, "
        f"{workers} worker{'s' if workers > 1 else ''}"
    )

    def on_start() -> None:
        progress.begin(recipe.run.rounds)
        if folder:
            folder.open()

    def on_round(record: Record) -> None:
        if folder:
            folder.add(record)
        progress.on_round(record)

    result = federate(
        model,
        [train.subset(part) for part in parts],
        test,
        recipe.strategy(),
        rounds=recipe.run.rounds,
        participation=recipe.run.participation,
        seed=recipe.run.seed,
        training=recipe.training(),
        device=device,
        workers=workers,
        threads=recipe.run.threads if device == "cpu" else None,
        features=session.feature_cache(recipe.run.feature_memory_mb),
        on_start=on_start,
        on_round=on_round,
        on_update=progress.on_update,
        checkpoint=Checkpoint(out / "checkpoints", resume) if out else None,
    )
    summary = summarise(recipe, result, texts, device, time.perf_counter() - began)
    if folder:
        folder.finish(result, summary)
    return result, summary


def usable_device(name: str) -> str:
    """The device that a recipe names. Raises InputError if this machine does not have it."""
    try:
        device = chosen_device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise InputError(f"run.device = {name!r} cannot be used here: {why}") from None
    return device


def worker_count(recipe: Recipe, device: str) -> int:
    """How many processes play clients."""
    if device != "cpu":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(recipe.run.workers or cores or 1, recipe.data.clients)


@dataclass
class Folder:
    """A run folder: recipe.toml, metrics.jsonl, summary.json.

    Nothing is written before `open`, so that a run that is refused leaves nothing behind.

    Raises:
        InputError: the folder holds a run and `resume` was not asked, or another recipe's run.
    """

    out: Path
    recipe: Recipe
    resume: bool

    def __post_init__(self) -> None:
        self.text = tomli_w.dumps(self.recipe.resolved())
        written = self.out / "recipe.toml"
        if written.exists() and not self.resume:
            raise InputError(
                f"{self.out} already holds a run; give --resume, --force or another --out"
            )
        if written.exists() and written.read_text(encoding="utf-8") != self.text:
            raise InputError(f"{self.out} holds a run of another recipe; see {written}")

    def open(self) -> None:
        """Make the folder, with the resolved recipe in it."""
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "recipe.toml").write_text(self.text, encoding="utf-8")

    def add(self, record: Record) -> None:
        """Append a round to metrics.jsonl."""
        with (self.out / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record.as_dict()) + "\n")

    def finish(self, result: Result, summary: dict[str, Any]) -> None:
        """Write the summary, and metrics.jsonl anew.

        A round that was stopped between its line and its checkpoint left a line too many.
        """
        lines = [json.dumps(record.as_dict()) + "\n" for record in result.records]
        (self.out / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
        write_json(self.out / "summary.json", summary)


def clear_folder(out: Path) -> None:
    """Remove what a run left in its folder, and nothing else."""
    for name in ("recipe.toml", "metrics.jsonl", "summary.json", "report.html"):
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)


def summarise(
    recipe: Recipe, result: Result, texts: TextData, device: str, seconds: float
) -> dict[str, Any]:
    """What summary.json holds."""
    personal = {str(client): value for client, value in sorted(result.personal_accuracy.items())}
    return {
        "recipe": recipe.resolved(),
        "method": recipe.method["name"],
        "seed": recipe.run.seed,
        "rounds": len(result.records),
        "accuracy": result.accuracy,
        "best_accuracy": result.best_accuracy,
        "accuracy_by_round": result.accuracy_by_round,
        "personal_accuracy": personal,
        "mean_personal_accuracy": sum(personal.values()) / len(personal) if personal else None,
        "accuracy_by_client": result.records[-1].accuracy_by_client,
        "bytes_up": result.bytes_up,
        "bytes_down": result.bytes_down,
        "bytes_by_round": [record.bytes_up + record.bytes_down for record in result.records],
        "seconds": seconds,
        "clients": recipe.data.clients,
        "empty_clients": result.empty,
        "refused_updates": result.refused,
        "refused": [
            {"round": record.round, "client": client, "why": why}
            for record in result.records
            for client, why in record.refused.items()
        ],
        "data_source": texts.source,
        "label_names": list(texts.label_names),
        "label_counts": result.label_counts,
        "engine": recipe.run.engine,
        "device": device,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """What the run was made with."""
    return {
        "sluiceway": sluiceway.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }


def write_json(path: Path, content: Any) -> None:
    """Write under a temporary name first, so that a reader never sees half a file."""
    made = path.with_name(f".{path.name}")
    made.write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(made, path)
