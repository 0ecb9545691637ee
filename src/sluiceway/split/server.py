"""The server's side: the layers behind the cut, and in a U-shape those before the tail."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from sluiceway.core.guards import finite
from sluiceway.core.parameters import frozen_modules
from sluiceway.split.config import (
    SplitConfig,
    load_optimiser,
    optimiser_of,
    optimiser_state,
    training_mode,
)
from sluiceway.split.errors import WireError
from sluiceway.split.header import BatchId
from sluiceway.split.packing import Smashed


class SplitServer:
    """The server's layers and their optimiser, which lives as long as the run.

    Args:
        back: the layers behind the cut (in a U-shape, those before the tail), trained in place.
        terms: what both sides know.
        smallest: steps on fewer examples are left out, 1 for none.
    """

    def __init__(self, back: nn.Module, terms: SplitConfig, smallest: int = 1) -> None:
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

    def open(self, message: bytes, *, labels: bool) -> Smashed:
        """A client's smashed data, if they are fit to be trained on.

        Args:
            message: as the client sent it.
            labels: whether it must have labels; in a U-shape it must not.

        Raises:
            WireError: it is no smashed data of this cut, or a value is NaN or infinite.
        """
        terms, shape = self.terms, (None, *self.terms.shape)
        opened = terms.link.open(
            message, shape, labels=labels, classes=terms.classes, device=terms.device
        )
        if not finite(opened.values):
            raise WireError("NaN or Inf in the smashed data")
        return opened

    def step(self, opened: Sequence[Smashed]) -> list[bytes]:
        """One optimiser step on the mean loss over all the batches, as if they were one.

        Args:
            opened: what `open` gave, with labels.

        Returns:
            For each batch the packed gradient of its client's own mean loss: that of the mean
            over all examples, times all examples over the client's. So a front learns at the same
            pace whoever else takes part, and fronts averaged by their examples move as one front
            would on the batches together.
        """
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
        self, opened: Sequence[Smashed], ask: Callable[[BatchId, bytes], bytes]
    ) -> tuple[list[bytes], dict[int, str]]:
        """The same in a U-shape: `ask(name, message)` hands a batch's outcome to its client's tail.

        It returns the client's packed gradient. Labels are never seen here.

        Returns:
            The packed gradients, and by client why what its tail answered was not used.
        """
        link, refused = self.terms.tail_link, dict[int, str]()

        def end(out: Tensor) -> Tensor:
            gradients = []
            parts = out.detach().split([len(one.values) for one in opened])
            for part, one in zip(parts, opened, strict=True):
                message, ticket = link.up(part, one.ticket.batch)
                try:
                    answer = ask(one.ticket.batch, message)
                    gradient = link.open_gradient(answer, ticket, self.terms.device)
                    if not finite(gradient):
                        raise WireError("NaN or Inf in the gradient of the tail")
                except ValueError as error:
                    refused[one.ticket.batch.client] = str(error)
                    gradient = torch.zeros_like(part)
                gradients.append(gradient * (len(part) / len(out)))
            return torch.cat(gradients)

        return self._through(opened, end), refused

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
