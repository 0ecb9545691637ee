"""A split run as named tensors, both sides of it, and back.

By file: `layers` the global network, `copies` the server's of each client, `strategy` what averages
the clients' layers, `clients` and `servers` what lives on each side beside them, `masks`, and
`links` what compression remembers.
"""

from __future__ import annotations

from torch import Tensor

from sluiceway.core.checkpoints import CheckpointError, Saved, require_same
from sluiceway.errors import line
from sluiceway.split.config import joined
from sluiceway.split.rounds import SplitLoop
from sluiceway.strategies.base import unprefixed


def state_of(split: SplitLoop) -> dict[str, dict[str, Tensor]]:
    """Everything that the next round depends on, by file; tensors are not copied."""
    own = {key: s.back for key, s in split.servers.items() if s.back is not split.back}
    links = {"cut": split.judge.terms.link, "tail": split.judge.terms.tail_link}
    return {
        "layers": layers_of(split),
        "strategy": split.strategy.state_dict(),
        "clients": joined({str(p.number): p.state_dict() for p in split.parties}),
        "servers": joined({str(key): s.state_dict() for key, s in split.servers.items()}),
        "copies": joined({str(key): back.state_dict() for key, back in own.items()}),
        "masks": split.masks.state_dict(),
        "links": joined({name: link.state_dict() for name, link in links.items()}),
    }


def restore(split: SplitLoop, saved: Saved) -> None:
    """Put a run back as it was after a round. Raises CheckpointError."""
    now = state_of(split)
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
        split.strategy.load_state_dict(state["strategy"])
        for party in split.parties:
            party.load_state_dict(unprefixed(state["clients"], f"{party.number}/"))
        for key, server in split.servers.items():
            server.load_state_dict(unprefixed(state["servers"], f"{key}/"))
        split.masks.load_state_dict(state["masks"])
        split.judge.terms.link.load_state_dict(unprefixed(state["links"], "cut/"))
        split.judge.terms.tail_link.load_state_dict(unprefixed(state["links"], "tail/"))
    except Exception as error:
        why = line(str(error))
        raise CheckpointError(f"checkpoint {saved.folder} is of another run ({why})") from error


def layers_of(split: SplitLoop) -> dict[str, Tensor]:
    """Parameters and buffers of the global network, by their names in the model."""
    parts = [part for part in (split.front, split.back, split.tail) if part is not None]
    return {name: tensor for part in parts for name, tensor in part.state_dict().items()}
