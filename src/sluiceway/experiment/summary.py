"""What summary.json holds: of a finished run, or of one as far as its rounds tell."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from statistics import fmean, pstdev
from typing import Any

import torch

import sluiceway
from sluiceway.core.metrics import METRICS, by_class
from sluiceway.core.round_loop import Result
from sluiceway.data import ImageData
from sluiceway.experiment.own_code import short_name
from sluiceway.experiment.recipe import Recipe
from sluiceway.experiment.tables import with_old_keys


@dataclass(frozen=True)
class Outcome:
    """A result, and the data that it was trained on; `input` says what images the model takes."""

    result: Result
    source: str
    label_names: Sequence[str]
    input: Mapping[str, Any] | None = None


def image_input(data: ImageData) -> dict[str, Any]:
    """What a model of these images takes: shape (C, H, W), and by channel mean and std of 0..1."""
    shape = data.train.images.shape[1:]
    return {"shape": list(shape), "mean": list(data.mean), "std": list(data.std)}


def summarise(recipe: Recipe, outcome: Outcome, device: str, seconds: float) -> dict[str, Any]:
    """The summary of a finished run."""
    result = outcome.result
    records = [record.as_dict() for record in result.records]
    personal = {str(client): value for client, value in sorted(result.personal_accuracy.items())}
    return with_old_keys(
        summary_so_far(recipe.resolved(), records)
        | {
            "personal_accuracy": personal,
            "mean_personal_accuracy": sum(personal.values()) / len(personal) if personal else None,
            "seconds": seconds,
            "empty_clients": result.empty,
            "rejected_updates": result.rejected,
            "rejected": left_out(records, "rejected"),
            "failed_updates": result.failed,
            "failed": left_out(records, "failed"),
            "repeated_rounds": sum(record.retries for record in result.records),
            "data_source": outcome.source,
            "label_names": list(outcome.label_names),
            "label_counts": result.label_counts,
            "input": outcome.input,
            "confusion": result.confusion,
            "by_class": by_class(result.confusion, outcome.label_names),
            "epsilon": result.privacy.get("epsilon"),
            "delta": result.privacy.get("delta"),
            "privacy": result.privacy or None,
            "engine": recipe.run.engine,
            "device": device,
            "versions": {
                "sluiceway": sluiceway.__version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": version("transformers"),
            },
        }
    )


def summary_so_far(
    recipe: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What the lines of metrics.jsonl tell.

    Args:
        recipe: its tables, defaults included; may lack any.
        records: at least one.
    """
    accuracy = [record["accuracy"] for record in records]
    evaluated = [record for record in records if record["accuracy"] is not None] or [{}]
    metric = short_name(recipe.get("run", {}).get("metric", "accuracy"))
    measured = [
        {"accuracy": r["accuracy"]} | r.get("metrics", {}) if r["accuracy"] is not None else {}
        for r in records
    ]
    scores = [one[metric] for one in measured if metric in one]
    return {
        "recipe": recipe,
        "method": short_name(recipe.get("method", {}).get("name", "unknown method")),
        "seed": recipe.get("run", {}).get("seed", 0),
        "rounds": len(records),
        "accuracy": evaluated[-1].get("accuracy"),
        "best_accuracy": max((r["accuracy"] for r in evaluated if r), default=None),
        "accuracy_by_round": accuracy,
        "metric": metric,
        "metric_value": scores[-1] if scores else None,
        "metric_best": max(scores, default=None),
        **dict.fromkeys(METRICS[1:]),
        **evaluated[-1].get("metrics", {}),
        "metrics_by_round": measured,
        "accuracy_by_client": evaluated[-1].get("accuracy_by_client"),
        **client_accuracy(evaluated[-1].get("accuracy_by_client") or []),
        "routing_overlap_by_round": overlaps(records),
        "bytes_by_round": [record["bytes_up"] + record["bytes_down"] for record in records],
        **{key: sum(r[key] for r in records) for key in ("bytes_up", "bytes_down", "seconds")},
        "round_seconds": sum(r["seconds"] for r in records),
        "clients": recipe.get("data", {}).get("clients"),
        **split_facts(records),
    }


def overlaps(records: Sequence[Mapping[str, Any]]) -> list[float | None]:
    """By round, the overlap of the clients' routing, mean over the mixtures; None without any."""
    found = [[block["overlap"] for block in record.get("routing") or []] for record in records]
    return [fmean(values) if values else None for values in found]


def client_accuracy(by_client: Sequence[float | None]) -> dict[str, float | None]:
    """Mean, worst and standard deviation over the clients that have an accuracy."""
    known = [value for value in by_client if value is not None and value == value]
    return {
        "client_accuracy_mean": fmean(known) if known else None,
        "client_accuracy_worst": min(known, default=None),
        "client_accuracy_std": pstdev(known) if known else None,
    }


def split_facts(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a summary has of a split run alone; nothing of a federated one."""
    if any(record.get("channels") is None for record in records):
        return {}
    return {
        "accuracy_full": records[-1]["accuracy_full"],
        "accuracy_full_by_round": [record["accuracy_full"] for record in records],
        "kept_by_round": [record["kept"] for record in records],
        "channels": records[-1]["channels"],
        "bits_by_round": [record.get("bits") for record in records],
        "bytes_per_prediction": records[-1].get("bytes_per_prediction"),
        "scores_by_round": [record["scores"] for record in records],
        "masks_by_round": [record["mask"] for record in records],
    }


def left_out(records: Sequence[Mapping[str, Any]], key: str) -> list[dict[str, Any]]:
    """Every client that a round did without, and why; `key` is "rejected" or "failed"."""
    return [
        {"round": record["round"], "client": int(client), "why": why}
        for record in records
        for client, why in record[key].items()
    ]
