"""Runs a table of docs/results.md: tunes every method alike, then runs the winners over the seeds.

    python benchmarks/evidence/sweep.py federated              all that is missing, then the page
    python benchmarks/evidence/sweep.py split --workers 2      in two processes of a thread each
    python benchmarks/evidence/sweep.py federated --only 20    twenty runs more, then the page
    python benchmarks/evidence/sweep.py federated --later      the settings marked so as well

A table is a file in benchmarks/evidence/tables; `Table` says what is in it. Each run becomes a
line of docs/evidence/TABLE.jsonl and is never run again while that is there, so that a sweep can be
stopped at any time. At the end its parts of docs/results.md and docs/evidence, and the picture, are
written anew.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tomllib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from kinds import KINDS
from pages import Runs, level, put
from pydantic import BaseModel, ConfigDict

from sluiceway.experiment.recipe import load_recipe
from sluiceway.experiment.run import run
from sluiceway.experiment.session import Session

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
STRICT = ConfigDict(extra="forbid", frozen=True)


class Setting(BaseModel):
    """One column of a table: overrides of the recipe, and who takes part.

    tuned_on: the setting whose trials choose each method's; its own where this is empty.
    methods: which of the table's methods run here; all where this is empty.
    level: how much less may cross, as a key of the methods' `at`; those without it do not run.
    seeds: its own; the table's where this is empty.
    later: runs with --later only.
    """

    model_config = STRICT
    set: list[str] = []
    recipe: str = ""
    tuned_on: str = ""
    methods: list[str] = []
    level: str = ""
    seeds: list[int] = []
    later: bool = False


class Method(BaseModel):
    """One row: what makes the method, what meets a level, and its trials: all are overrides."""

    model_config = STRICT
    set: list[str]
    at: dict[str, list[str]] = {}
    trials: list[list[str]] = [[]]


class Table(BaseModel):
    """A sweep.

    recipe, set: what all runs begin with. seeds: of the table. tune_seeds, tune_set: of the
    trials, which must not see the test set. kind: how it is shown.
    """

    model_config = STRICT
    kind: str
    recipe: str
    set: list[str]
    seeds: list[int]
    tune_seeds: list[int] = []
    tune_set: list[str] = []
    settings: dict[str, Setting]
    methods: dict[str, Method]

    @staticmethod
    def named(name: str) -> Table:
        """The table of that name."""
        return Table(**tomllib.loads((HERE / "tables" / f"{name}.toml").read_text("utf-8")))

    def seeds_of(self, setting: str) -> list[int]:
        """The seeds that a setting is run over."""
        return self.settings[setting].seeds or self.seeds

    def taking_part(self, setting: str) -> list[str]:
        """The methods that run in a setting."""
        wanted, level = self.settings[setting].methods, self.settings[setting].level
        return [
            name
            for name, method in self.methods.items()
            if (not wanted or name in wanted) and (not level or level in method.at)
        ]


@dataclass(frozen=True)
class Job:
    """One run: its overrides after those that all runs of the setting have."""

    setting: str
    method: str
    trial: tuple[str, ...]
    seed: int
    tuning: bool

    @property
    def key(self) -> str:
        return json.dumps([self.setting, self.method, self.trial, self.seed, self.tuning])

    def overrides(self, table: Table) -> list[str]:
        """All overrides of the recipe."""
        split = table.kind in ("split", "wire", "choices", "cases")  # has no workers to choose
        ours = [f"run.seed={self.seed}", *([] if split else ["run.workers=1"])]
        return [
            *table.set,
            *table.settings[self.setting].set,
            *table.methods[self.method].set,
            *table.methods[self.method].at.get(table.settings[self.setting].level, []),
            *self.trial,
            *(table.tune_set if self.tuning else ()),
            *ours,
        ]


@dataclass
class Records:
    """The lines of a table's file, by the job's key."""

    path: Path
    lines: dict[str, dict[str, Any]] = field(default_factory=dict)

    @staticmethod
    def of(name: str) -> Records:
        """What was run so far."""
        records = Records(ROOT / "docs" / "evidence" / f"{name}.jsonl")
        if records.path.exists():
            for text in records.path.read_text("utf-8").splitlines():
                line = json.loads(text)
                records.lines[line["key"]] = line
        return records

    def add(self, line: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.lines[line["key"]] = line

    def of_job(self, job: Job) -> dict[str, Any] | None:
        return self.lines.get(job.key)


def trial_jobs(table: Table, setting: str, method: str) -> list[list[Job]]:
    """The trials of a method in a setting, each over the seeds of tuning."""
    return [
        [Job(setting, method, tuple(trial), seed, True) for seed in table.tune_seeds]
        for trial in table.methods[method].trials
    ]


def chosen_trial(table: Table, records: Records, setting: str, method: str) -> list[str] | None:
    """The trial with the best mean accuracy over the last half of the rounds; None until all ran.

    The last rounds rather than the last one: on skewed clients accuracy goes up and down.
    """
    trials = table.methods[method].trials
    if len(trials) == 1:
        return trials[0]
    tuned_on = table.settings[setting].tuned_on or setting
    found = []
    for jobs in trial_jobs(table, tuned_on, method):
        lines = [records.of_job(job) for job in jobs]
        if any(line is None for line in lines):
            return None
        found.append(sum(level(line) for line in lines if line) / len(lines))
    return trials[max(range(len(trials)), key=found.__getitem__)]


def missing(table: Table, records: Records, later: bool) -> Iterator[Job]:
    """What has not been run, as far as it is known: trials first, setting by setting."""
    for setting, about in table.settings.items():
        if about.later and not later:
            continue
        for method in table.taking_part(setting):
            tuned_on = table.settings[setting].tuned_on or setting
            if len(table.methods[method].trials) > 1:
                trials = itertools.chain(*trial_jobs(table, tuned_on, method))
                yield from (job for job in trials if records.of_job(job) is None)
        for seed, method in itertools.product(table.seeds_of(setting), table.taking_part(setting)):
            trial = chosen_trial(table, records, setting, method)
            if trial is not None:
                job = Job(setting, method, tuple(trial), seed, False)
                if records.of_job(job) is None:
                    yield job


SESSION = Session()


def run_round(table: Table, job: Job) -> dict[str, Any]:
    """One run, as a line of the table's file."""
    torch.set_num_threads(1)
    base = table.settings[job.setting].recipe or table.recipe
    _, summary = run(load_recipe(base, job.overrides(table)), session=SESSION)
    kept = ("accuracy_by_round", "bytes_up", "bytes_down", "bytes_by_round", "seconds")
    return {
        "key": job.key,
        "setting": job.setting,
        "method": job.method,
        "trial": list(job.trial),
        "seed": job.seed,
        "tuning": job.tuning,
        **{name: summary[name] for name in kept},
        "personal": summary["mean_personal_accuracy"],
        "bytes_per_prediction": summary.get("bytes_per_prediction"),
    }


def sweep(name: str, table: Table, workers: int, most: int, later: bool) -> Records:
    """Run what is missing, `most` runs at most, in batches that know what the last one found."""
    records, left = Records.of(name), most
    with ProcessPoolExecutor(workers) as pool:
        while left > 0 and (
            jobs := unique(missing(table, records, later))[: min(left, 2 * workers)]
        ):
            for job, line in zip(jobs, pool.map(run_round, [table] * len(jobs), jobs), strict=True):
                records.add(line)
                what = "trial" if job.tuning else "run"
                print(
                    f"{what} {job.setting}, {job.method} {' '.join(job.trial)}, seed {job.seed}: "
                    f"{line['accuracy_by_round'][-1]:.4f}, {line['seconds']:.0f} s",
                    flush=True,
                )
            left -= len(jobs)
    return records


def unique(jobs: Iterator[Job]) -> list[Job]:
    """Every job once, in order."""
    return list({job.key: job for job in jobs}.values())


def runs_of(table: Table, records: Records) -> Runs:
    """What was run with the chosen trials and all seeds, in the table's order."""
    found: dict[str, dict[str, dict[int, dict[str, Any]]]] = {}
    for setting in table.settings:
        for method in table.taking_part(setting):
            trial = tuple(chosen_trial(table, records, setting, method) or ())
            lines = {
                seed: line
                for seed in table.seeds_of(setting)
                if (line := records.of_job(Job(setting, method, trial, seed, False)))
            }
            if len(lines) == len(table.seeds_of(setting)):
                found.setdefault(setting, {})[method] = lines
    return found


def main() -> None:
    """Run a table, and write its part of the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("table")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--only", type=int, default=10**6, help="runs at most")
    parser.add_argument("--later", action="store_true", help="settings marked `later` as well")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    table = Table.named(args.table)
    records = sweep(args.table, table, args.workers, args.only, args.later)
    docs = ROOT / "docs"
    for page, text in KINDS[table.kind](runs_of(table, records), docs).items():
        put(docs / page, args.table, text)


if __name__ == "__main__":
    main()
