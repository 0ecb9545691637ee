"""Whose scores lead to whose mask: one merged mask for all clients, or one for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from sluiceway import channels
from sluiceway.core.seeds import derive_seed
from sluiceway.split.config import joined
from sluiceway.split.methods import ChannelChoice
from sluiceway.split.scorers import FixedScores
from sluiceway.strategies.base import unprefixed

#: Key of what all clients share, where others have the client id.
ALL = -1


class MaskSelector:
    """The masks of a run, and the scores they come from.

    Args:
        choice: the method, or None for one that chooses no channels: then there are no masks.
        count: C.
        sizes: how many examples each client holds.
        nbytes: see `ChannelChoice.chooser`.
        seed: decides what is kept where scores say nothing.
    """

    def __init__(
        self,
        choice: ChannelChoice | None,
        count: int,
        sizes: Sequence[int],
        nbytes: Callable[[int], int],
        seed: int,
    ) -> None:
        self.sizes = sizes
        self.merged = choice is not None and choice.masks == "merged"
        #: Whether the mask crosses at all.
        self.crossing = self.merged and choice is not None and choice.sends_scores
        keys = [] if choice is None else [ALL] if self.merged else range(len(sizes))
        self.choosers = {key: choice.chooser(count, nbytes) for key in keys if choice is not None}
        self.drawn = {key: FixedScores(count, derive_seed(seed, key + 1)).drawn for key in keys}
        self.scores: dict[int, Tensor] = {}
        self.ahead = choice is not None and choice.warmup == 0

    def unrated(self, clients: Sequence[int]) -> list[int]:
        """Of the clients of a round, those that must rate channels before it begins."""
        if not self.ahead or (self.merged and self.scores):
            return []
        return [client for client in clients if client not in self.scores]

    def choose(self, round: int, clients: Sequence[int]) -> None:
        """Choose the masks of a round, in which these clients take part.

        Without scores nothing is chosen, and everything is sent: so it is in the warm-up, with
        masks of their own also for clients that first take part after it.
        """
        for key in [ALL] if self.merged else clients:
            scores = self.of(key)
            if scores is not None:
                self.choosers[key].choose(round, scores)

    def of(self, key: int) -> Tensor | None:
        """The scores that decide a mask, [C] float64; None before there are any.

        Scores that are all equal, as where every client holds a single class, are ranked by chance
        drawn once: a fixed random mask, not one by index.
        """
        scores = self.merged_scores() if key == ALL else self.scores.get(key)
        if scores is None or bool((scores != scores[0]).any()):
            return scores
        return scores + 1e-9 * scores.abs().clamp(min=1e-3) * self.drawn[key]

    def merged_scores(self) -> Tensor | None:
        """The newest scores of all clients that have any, merged by their examples; [C] float64.

        Scores of `ALL`, which a server took for all of them, are used alone.
        """
        if not self.merged or not self.scores:
            return None
        if ALL in self.scores:
            return self.scores[ALL]
        rated = sorted(self.scores)
        weights = torch.tensor([float(self.sizes[client]) for client in rated])
        return channels.merge_scores(torch.stack([self.scores[c] for c in rated]), weights)

    def rate(self, client: int, scores: Tensor) -> None:
        """Take a client's newest scores, or those of `ALL`, [C]."""
        if self.choosers:
            self.scores[client] = scores.double().cpu()

    def mask(self, client: int) -> Tensor | None:
        """The client's mask of the round, [C] bool; None if the method chooses no channels."""
        if not self.choosers:
            return None
        return self.choosers[ALL if self.merged else client].mask

    def state_dict(self) -> dict[str, Tensor]:
        """What the next round's masks depend on."""
        choosers = {str(key): chooser.state_dict() for key, chooser in self.choosers.items()}
        scores = {str(client): scores for client, scores in self.scores.items()}
        return joined({"scores": scores} | choosers)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state_dict` gave."""
        self.scores = {int(client): s for client, s in unprefixed(state, "scores/").items()}
        for key, chooser in self.choosers.items():
            chooser.load_state_dict(unprefixed(state, f"{key}/"))
