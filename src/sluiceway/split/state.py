"""A split run as named tensors, both sides of it, and back.

By file: `layers` the global network, `copies` the server's of each client, `strategy` what averages
the clients' layers, `clients` and `servers` what else lives on each side, `masks`, `memory` the
server's of delta coding, and `links` what compression remembers besides.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sluiceway.core.checkpoints import CheckpointError, Saved, require_same
from sluiceway.errors import line
from sluiceway.split.compress import Compressor
from sluiceway.split.config import joined
from sluiceway.split.rounds import SplitLoop
from sluiceway.strategies.base import unprefixed


def state_of(loop: SplitLoop) -> dict[str, dict[str, Tensor]]:
    """Everything that the next round depends on, by file; tensors are not copied."""
    copies = {key: s.back for key, s in loop.servers.items() if s.back is not loop.model.back}
    parts = (part.state_dict() for part in loop.model.parts())
    return {
        "layers": {name: tensor for part in parts for name, tensor in part.items()},
        "strategy": loop.strategy.state_dict(),
        "clients": joined({str(c.client_id): c.state_dict() for c in loop.clients}),
        "servers": joined({str(key): s.trained.state_dict() for key, s in loop.servers.items()}),
        "copies": joined({str(key): back.state_dict() for key, back in copies.items()}),
        "masks": loop.masks.state_dict()
        | ({} if loop.mixer is None else joined({"mixer": loop.mixer.state_dict()})),
        "memory": memory_of(loop),
        "links": joined({name: link.state_dict() for name, link in links(loop).items()}),
    }


def restore(loop: SplitLoop, saved: Saved) -> None:
    """Put a run back as it was after a round. Raises CheckpointError."""
    now = state_of(loop)
    state = {file: saved.tensors(file) for file in now}
    for file, what in (
        ("layers", "the network"),
        ("copies", "the server's copies"),
        ("strategy", "the strategy that averages clients' layers"),
    ):
        require_same(state[file], now[file], what)
    try:
        for file in ("layers", "copies"):
            for name, tensor in now[file].items():
                tensor.copy_(state[file][name])
        loop.strategy.load_state_dict(state["strategy"])
        for client in loop.clients:
            client.load_state_dict(unprefixed(state["clients"], f"{client.client_id}/"))
        for key, server in loop.servers.items():
            server.trained.load_state_dict(unprefixed(state["servers"], f"{key}/"))
        loop.masks.load_state_dict(state["masks"])
        if loop.mixer is not None:
            loop.mixer.load_state_dict(unprefixed(state["masks"], "mixer/"))
        if loop.memory is not None:
            loop.memory.load_state_dict(unprefixed(state["memory"], "kept/"))
            loop.unsure = set(state["memory"]["now/unsure"].tolist())
        for name, link in links(loop).items():
            link.load_state_dict(unprefixed(state["links"], f"{name}/"))
    except Exception as error:
        why = line(str(error))
        raise CheckpointError(f"checkpoint {saved.folder} is of another run ({why})") from error


def memory_of(loop: SplitLoop) -> dict[str, Tensor]:
    """The server's end of delta coding; nothing without it."""
    if loop.memory is None:
        return {}
    unsure = torch.tensor(sorted(loop.unsure), dtype=torch.int64)
    return joined({"kept": loop.memory.state_dict(), "now": {"unsure": unsure}})


def links(loop: SplitLoop) -> dict[str, Compressor]:
    """What compresses at each cut."""
    return {"cut": loop.setup.config.link, "tail": loop.setup.config.tail_link}
