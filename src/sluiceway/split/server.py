"""The server's side: the layers behind the cut, and in a U-shape those before the tail."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from sluiceway.federated.client import frozen_modules
from sluiceway.split.header import BatchId
from sluiceway.split.packing import Smashed
from sluiceway.split.terms import (
    Terms,
    load_optimiser,
    optimiser_of,
    optimiser_state,
    training_mode,
)


class ServerSide:
    """The server's layers and their optimiser, which lives as long as the run.

    Args:
        back: the layers behind the cut (in a U-shape, those before the tail), trained in place.
        terms: what both sides know.
        smallest: steps on fewer examples are left out, 1 for none.
    """

    def __init__(self, back: nn.Module, terms: Terms, smallest: int = 1) -> None:
        self.back = back
        self.still = frozen_modules(back)
        self.terms = terms
        self.smallest = smallest
        self.optimiser = optimiser_of(back, terms.training)
        self.losses: list[tuple[int, Tensor]] = []

    def state_dict(self) -> dict[str, Tensor]:
        """What the next step depends on but the layers; not copied."""
        return optimiser_state(self.optimiser)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state_dict` gave."""
        load_optimiser(self.optimiser, state)

    def step(self, messages: Sequence[bytes]) -> list[bytes]:
        """One optimiser step on the mean loss over all the batches, as if they were one.

        Returns:
            For each message the packed gradient of its client's own mean loss: that of the mean
            over all examples, times all examples over the client's. So a front learns at the same
            pace whoever else takes part, and fronts averaged by their examples move as one front
            would on the batches together.

        Raises:
            WireError: a message is no smashed data of this cut, or has no labels.
        """
        opened = [self._opened(message, labels=True) for message in messages]
        labels = torch.cat([one.labels for one in opened if one.labels is not None])

        def end(out: Tensor) -> Tensor:
            leaf = out.detach().requires_grad_()
            loss = self.terms.loss(leaf, labels)
            loss.backward()
            self.losses.append((len(labels), loss.detach()))
            assert leaf.grad is not None
            return leaf.grad

        return self._through(opened, end)

    def step_u(
        self, messages: Sequence[bytes], ask: Callable[[BatchId, bytes], bytes]
    ) -> list[bytes]:
        """The same in a U-shape: `ask(name, message)` hands a batch's outcome to its client's tail.

        It returns the client's packed gradient. Labels are never seen here.

        Raises:
            WireError: a message is no smashed data of this cut, or carries labels.
        """
        opened = [self._opened(message, labels=False) for message in messages]
        link = self.terms.tail_link

        def end(out: Tensor) -> Tensor:
            gradients = []
            parts = out.detach().split([len(one.values) for one in opened])
            for part, one in zip(parts, opened, strict=True):
                message, ticket = link.up(part, one.ticket.batch)
                answer = ask(one.ticket.batch, message)
                gradient = link.open_gradient(answer, ticket, self.terms.device)
                gradients.append(gradient * (len(part) / len(out)))
            return torch.cat(gradients)

        return self._through(opened, end)

    def _opened(self, message: bytes, *, labels: bool) -> Smashed:
        terms, shape = self.terms, (None, *self.terms.shape)
        return terms.link.open(
            message, shape, labels=labels, classes=terms.classes, device=terms.device
        )

    def _through(self, opened: Sequence[Smashed], end: Callable[[Tensor], Tensor]) -> list[bytes]:
        """Forward, backward from the gradient that `end` gives, step, and the packed gradients."""
        training_mode(self.back, self.still)
        leaves = [one.values.requires_grad_() for one in opened]
        # Of one message too this makes a copy: the first layer may work in place, and a leaf not.
        out = self.back(torch.cat(leaves))
        out.backward(end(out))
        if self.optimiser is not None:
            self.optimiser.step()
            self.optimiser.zero_grad(set_to_none=True)
        total = sum(len(leaf) for leaf in leaves)
        replies = []
        for leaf, one in zip(leaves, opened, strict=True):
            assert leaf.grad is not None
            replies.append(self.terms.link.down(leaf.grad * (total / len(leaf)), one.ticket))
        return replies
