"""The memory of delta coding: of every example its smashed data, as the server last read them.

Of an example with smashed data a, of which m was read so far, what changed crosses, in the basis
M = W U^T D^1/2 if there is one (after AQ-SGD, arXiv 2206.01299, which has no basis)::

    sent = rounded(M (a - m)),    m <- m + M^-1 sent,    the server trains on m

so that behind layers that stay as they are, and of images that are not augmented, rounding dies out
from round to round. m begins at the basis's mean, or at 0. Each end keeps its own; a client that
did not come well through a round begins anew at both.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from sluiceway.channels import Basis


class ExampleMemory:
    """One end's memory, by client; tensors are where the smashed data are."""

    def __init__(self) -> None:
        self._kept: dict[int, Tensor] = {}

    def read(
        self, client: int, rows: Tensor, size: int, like: Tensor, basis: Basis | None
    ) -> Tensor:
        """What was read of some examples so far, [B, C, ...].

        Args:
            client: whose they are.
            rows: their numbers, [B] int64 in [0, size), all different.
            size: examples of the client.
            like: smashed data of them, [B, C, ...].
            basis: in whose mean examples begin that did not cross yet.
        """
        if client not in self._kept:
            kept = like.new_zeros((size, *like.shape[1:]))
            if basis is not None:
                kept += basis.mean.view(-1, *[1] * (like.dim() - 2))
            self._kept[client] = kept
        kept = self._kept[client] = self._kept[client].to(like.device)
        return kept[rows.to(like.device)]

    def write(self, client: int, rows: Tensor, values: Tensor) -> None:
        """Keep what was read of these examples now; see `read`."""
        self._kept[client][rows.to(values.device)] = values

    def forget(self, client: int) -> None:
        """Begin anew with a client."""
        self._kept.pop(client, None)

    def state_dict(self) -> dict[str, Tensor]:
        """All of it, by client; not copied."""
        return {str(client): kept for client, kept in self._kept.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state_dict` gave."""
        self._kept = {int(client): kept.clone() for client, kept in state.items()}


def to_cross(A: Tensor, basis: Basis | None, before: Tensor | None = None) -> Tensor:
    """What crosses of smashed data, not rounded: components, or what changed of them.

    Args:
        A: [B, C, ...]. basis: of the components, None for channels.
        before: what `ExampleMemory.read` gave; None without a memory.
    """
    if before is not None:
        A, basis = A - before, basis and basis.centred
    return A if basis is None else basis.forward(A)


def crossed(values: Tensor, basis: Basis | None, before: Tensor | None = None) -> Tensor:
    """The smashed data again, from what crossed: the inverse of `to_cross`."""
    if before is None:
        return values if basis is None else basis.inverse(values)
    return before + (values if basis is None else basis.centred.inverse(values))


def require_room(sizes: Iterable[int], shape: Iterable[int], device: torch.device) -> None:
    """Raise ValueError unless the device's memory holds all examples' smashed data.

    Args:
        sizes: examples of each client.
        shape: of smashed data, without the batch.
    """
    needed = 4 * sum(sizes) * torch.Size(shape).numel()
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
    else:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise ValueError(
            f"method.delta: smashed data of all examples take {needed / 1e9:.1f} GB, and {device} "
            f"has {there / 1e9:.1f} GB"
        )
