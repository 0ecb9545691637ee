"""The federated round: what is broadcast, how one client trains, what comes back, the loop."""

from sluiceway.federated.batches import Batch, Examples, labels_of
from sluiceway.federated.checkpoints import Checkpoint, CheckpointError
from sluiceway.federated.client import Training, Worker, prepare
from sluiceway.federated.evaluation import Evaluation, evaluate
from sluiceway.federated.features import FeatureCache
from sluiceway.federated.rounds import Engine, Loop, Record, Result, Rounds

__all__ = [
    "Batch",
    "Checkpoint",
    "CheckpointError",
    "Engine",
    "Evaluation",
    "Examples",
    "FeatureCache",
    "Loop",
    "Record",
    "Result",
    "Rounds",
    "Training",
    "Worker",
    "evaluate",
    "labels_of",
    "prepare",
]
