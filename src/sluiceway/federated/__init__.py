"""The federated round: what is broadcast, how one client trains, what comes back, the loop."""

from sluiceway.federated.batches import Batch, Examples, labels_of
from sluiceway.federated.checkpoints import Checkpoint, CheckpointError
from sluiceway.federated.client import Training, Worker, prepare
from sluiceway.federated.evaluation import Evaluation, evaluate
from sluiceway.federated.features import FeatureCache
from sluiceway.federated.joining import Card, JoinError, check_joining
from sluiceway.federated.rounds import Engine, Loop, Record, Result, Rounds

__all__ = [
    "Batch",
    "Card",
    "Checkpoint",
    "CheckpointError",
    "Engine",
    "Evaluation",
    "Examples",
    "FeatureCache",
    "JoinError",
    "Loop",
    "Record",
    "Result",
    "Rounds",
    "Training",
    "Worker",
    "check_joining",
    "evaluate",
    "labels_of",
    "prepare",
]
