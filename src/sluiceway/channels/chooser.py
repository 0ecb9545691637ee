"""ACP over a run: scores smoothed, a warm-up, a gradual schedule, few and clear swaps  [ours]."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sluiceway.channels._shapes import as_scores, require_shape
from sluiceway.channels.pruning import hysteresis, rechoose, schedule, share_count

Rule = Callable[[Tensor], Tensor]
"""From scores [C] to a keep mask [C] bool, such as `partial(fraction, share=0.25)`."""


@dataclass
class ChannelChooser:
    """Chooses the channels of every round; one for all clients, or one per client  [ours].

    Given the merged scores of all clients it gives one mask per round; a chooser per client, given
    that client's scores, gives one mask each. Accuracy falls each time the mask changes, so:

    - scores are smoothed, s <- decay * s + (1 - decay) * new, from the warm-up on;
    - after the warm-up, the share kept falls by `schedule` to what `rule` asks for;
    - channels are swapped in the rounds of `rechoose` only, by `hysteresis`. Between them the mask
      can only shrink with the schedule, losing its lowest-scored, and the rule is not asked.

    Args:
        channels: C, at least 1.
        rule: decides how many channels are kept in the end, by the size of its mask.
        warmup: rounds that send everything, at least 0.
        ramp_rounds: rounds between the warm-up and the final share, at least 0.
        every, growth: see `rechoose`, counted from the end of the warm-up.
        margin: see `hysteresis`, at least 0.
        decay: in [0, 1); 0 uses the newest scores alone.

    Raises:
        ValueError: a number is out of range.
    """

    channels: int
    rule: Rule
    warmup: int = 1
    ramp_rounds: int = 4
    every: int = 1
    growth: float = 1.5
    margin: float = 0.2
    decay: float = 0.5
    _mask: Tensor = field(init=False, repr=False)
    _smoothed: Tensor | None = field(init=False, repr=False, default=None)
    _final: int = field(init=False, repr=False)
    _round: int = field(init=False, repr=False, default=0)

    def __post_init__(self) -> None:
        if self.channels < 1:
            raise ValueError(f"channels: expected at least 1, got {self.channels}")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay: expected a number in [0, 1), got {self.decay}")
        if not self.margin >= 0:
            raise ValueError(f"margin: expected at least 0, got {self.margin}")
        schedule(1, self.warmup, 1.0, self.ramp_rounds)
        rechoose(1, self.every, self.growth)
        self._mask = torch.ones(self.channels, dtype=torch.bool)
        self._final = self.channels

    @property
    def mask(self) -> Tensor:
        """The mask of the last round, [C] bool, on the CPU; a copy. Evaluate with this one."""
        return self._mask.clone()

    def choose(self, round: int, scores: Tensor) -> Tensor:
        """The mask of a round.

        Args:
            round: counted from 1, larger than in the last call; rounds may be left out, and a
                choice that was due in one of them is made now.
            scores: of the round or the one before it, [C], finite, high is keep.

        Returns:
            Keep mask, [C] bool, on the CPU, with at least one channel.

        Raises:
            ValueError: the round does not grow, the shape does not fit, a score is not finite, or
                the rule gives a mask of another shape or without channels.
        """
        if round <= self._round:
            raise ValueError(f"round: expected more than {self._round}, got {round}")
        fresh = as_scores(scores, self.channels).cpu()
        if self._smoothed is not None:
            fresh = self.decay * self._smoothed + (1 - self.decay) * fresh
        missed = range(self._round + 1, round + 1)
        due = any(rechoose(r - self.warmup, self.every, self.growth) for r in missed)
        final = self._asked(fresh) if due else self._final
        share = schedule(round, self.warmup, final / self.channels, self.ramp_rounds)
        count = share_count(share, self.channels)
        if due:
            self._mask = hysteresis(self._mask, fresh, count, self.margin)
        elif count < int(self._mask.sum()):
            self._mask = hysteresis(self._mask, fresh, count, float("inf"))
        self._smoothed, self._final, self._round = fresh, final, round
        return self.mask

    def _asked(self, scores: Tensor) -> int:
        """How many channels the rule keeps of these scores."""
        mask = self.rule(scores)
        require_shape("mask of the rule", mask, self.channels)
        if not bool(mask.any()):
            raise ValueError("mask of the rule: expected at least one channel, got none")
        return int(mask.bool().sum())

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that the next round depends on but the settings, as named tensors.

        `mask` [C] bool, `final` and `round` scalars, and from the first round on `smoothed` [C].
        """
        state = {
            "mask": self.mask,
            "final": torch.tensor(self._final),
            "round": torch.tensor(self._round),
        }
        return state if self._smoothed is None else {**state, "smoothed": self._smoothed.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state_dict` gave.

        Raises:
            ValueError: a name is missing or unknown, or a shape does not fit; nothing is changed.
        """
        if set(state) - {"smoothed"} != {"mask", "final", "round"}:
            raise ValueError(f"state: expected mask, final, round, smoothed, got {sorted(state)}")
        require_shape("mask", state["mask"], self.channels)
        if "smoothed" in state:
            require_shape("smoothed", state["smoothed"], self.channels)
        self._mask = state["mask"].bool().cpu().clone()
        self._smoothed = state["smoothed"].double().cpu().clone() if "smoothed" in state else None
        self._final, self._round = int(state["final"]), int(state["round"])
