"""One round's updates on their way into a strategy: pushed one at a time, never pulled."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from sluiceway.core.guards import Diverged, finite
from sluiceway.strategies import Strategy, Update


class Aggregation:
    """Hands each update to the strategy's rules and then to the strategy, as it arrives.

    Where the strategy or one of its rules must see every update first, they are held until
    `finish`. Nothing of the strategy that outlives the round changes before `finish`, so that a
    round can be given up at any point before it.

    Args:
        strategy: set up.
        number: of the round, from 1.
        hold: hold updates even where nothing needs them all.
    """

    def __init__(self, strategy: Strategy, number: int, hold: bool = False) -> None:
        self.strategy = strategy
        self.number = number
        self.held: list[Update] = []
        #: Clients whose updates a rule left out when the round was last combined.
        self.dropped: set[int] = set()
        #: Privacy at the server is the last of the rules, and adds its noise to the mean.
        private = strategy.privacy
        self.privacy = private if private and private.where == "server" else None
        self.rules = (*strategy.rules, *([self.privacy] if self.privacy else []))
        #: Whether updates must stay readable until `finish`.
        self.holds = hold or not (strategy.streams() and all(rule.streams() for rule in self.rules))
        if self.privacy:
            self.privacy.begin()
        if not self.holds:
            strategy.begin(number)

    def add(self, update: Update) -> None:
        """Take one usable update."""
        if self.holds:
            self.held.append(update)
            return
        updates = [update]
        for rule in self.rules:
            updates = rule(updates, self.strategy)
        for changed in updates:
            self.strategy.accumulate(changed)

    def finish(self, without: Collection[int] = ()) -> None:
        """Let the strategy take its new global values, and its server optimiser step along them.

        Args:
            without: clients whose held updates are left out.

        Raises:
            Diverged: the server optimiser made a value that is not finite.
        """
        if self.holds:
            updates = [update for update in self.held if update.client not in without]
            if self.privacy:
                self.privacy.begin()
            for rule in self.rules:
                updates = rule(updates, self.strategy)
            combined = {update.client for update in updates}
            self.dropped = {u.client for u in self.held} - combined - set(without)
            self.strategy.begin(self.number, updates)
            for update in updates:
                self.strategy.accumulate(update)
        old, server = self.strategy.tensors, self.strategy.server
        self.strategy.finish()
        if self.privacy and self.privacy.count:
            self.privacy.finish(self.strategy, self.number)
        if server is not None and self.strategy.tensors is not old:
            new = server.step(old, self.strategy.tensors, self.strategy.pieces)
            for name, tensor in new.items():
                if not finite(tensor):
                    raise Diverged(
                        f"round {self.number}: {name} is not finite after the server optimiser's "
                        "step; its lr is too large"
                    )
            self.strategy.tensors = new


def aggregate(strategy: Strategy, updates: Iterable[Update], number: int = 1) -> None:
    """Combine all of a round's updates at once; `strategy.tensors` are the new global values."""
    aggregation = Aggregation(strategy, number)
    for update in updates:
        aggregation.add(update)
    aggregation.finish()
