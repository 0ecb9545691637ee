"""Outputs of frozen layers kept on the disk between runs, up to a size."""

from __future__ import annotations

import contextlib
import hashlib
import os
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sluiceway.core.batches import Batch, Examples, tensors_of
from sluiceway.files import replacing

#: What decides how frozen layers compute, besides the model itself.
PACKAGES = ("torch", "transformers")


@dataclass(frozen=True)
class FeatureFiles:
    """A folder of features, one file a model and data set; the least used go first.

    Attributes:
        folder: made when it is needed, readable by its owner alone.
        limit: bytes of all files; 0 keeps none.
    """

    folder: Path
    limit: int

    def load(self, key: str) -> dict[str, Tensor] | None:
        """The tensors of a key; None if they are not there or cannot be read."""
        path = self.folder / key
        try:
            found: dict[str, Tensor] = load_file(path)
            os.utime(path)  # used now
        except Exception:  # gone, or damaged: it is computed anew
            return None
        return found

    def save(self, key: str, tensors: dict[str, Tensor]) -> None:
        """Keep the tensors, if there is room for them; a full disk is no error."""
        if sum(tensor.nbytes for tensor in tensors.values()) > self.limit:
            return
        with contextlib.suppress(OSError):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with replacing(self.folder / key) as draft:
                save_file(tensors, draft)
            self.prune()

    def prune(self) -> None:
        """Remove the files that were used least recently, until the rest is within the limit."""
        files = [(path.stat(), path) for path in self.folder.iterdir() if path.is_file()]
        held = 0
        for found, path in sorted(files, key=lambda item: -item[0].st_mtime_ns):
            held += found.st_size
            if held > self.limit:
                path.unlink()


def feature_key(fingerprint: str, model: nn.Module, examples: Examples, rows: Tensor) -> str:
    """Equal for the same frozen values, the same code, and the same inputs at these rows.

    Args:
        fingerprint: of the layers that are run and of the frozen parameters.
        model: its buffers, its structure and where it is count besides.
        examples: inputs are read in order of the rows.
        rows: int64.
    """
    digest = hashlib.sha256(fingerprint.encode())
    place = next(model.parameters()).device.type
    told = [repr(model), place, str(torch.get_num_threads()), *(version(name) for name in PACKAGES)]
    digest.update("\n".join(told).encode())
    for name, tensor in model.named_buffers():
        add(digest, name, tensor)
    add(digest, f"{len(examples)} rows", rows)
    for part in rows.split(1024):
        inputs = Batch.of(examples, part, torch.device("cpu")).inputs
        for name, tensor in tensors_of(inputs).items():
            add(digest, name, tensor)
    return digest.hexdigest()


def add(digest: hashlib._Hash, name: str, tensor: Tensor) -> None:
    """Count a tensor in, with its name, type and shape."""
    digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
