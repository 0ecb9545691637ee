"""The server's side: the layers behind the cut, and in a U-shape those before the tail."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import zip_longest

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sluiceway.channels import Basis
from sluiceway.core.guards import finite
from sluiceway.core.messages import WireError
from sluiceway.split.config import SplitConfig, TrainedLayers
from sluiceway.split.memory import ExampleMemory, crossed
from sluiceway.split.packing import BatchId, Encoded, Message, Smashed
from sluiceway.split.scorers import ChannelScorer


class SplitServer:
    """The server's layers and their optimiser, which lives as long as the run.

    Args:
        back: the layers behind the cut (in a U-shape, those before the tail), trained in place.
        config: what both sides know.
        smallest: steps on fewer examples are left out, 1 for none.
        scorer: rates channels by their gradients, or None.
        memory: of delta coding, that of all servers of a run; or None.
    """

    def __init__(
        self,
        back: nn.Module,
        config: SplitConfig,
        smallest: int = 1,
        scorer: ChannelScorer | None = None,
        memory: ExampleMemory | None = None,
    ) -> None:
        self.memory = memory
        self.back, self.config, self.smallest, self.scorer = back, config, smallest, scorer
        self.trained = TrainedLayers(back, config.training)
        #: Of the round, in which smashed data and gradients cross; None for channels.
        self.basis: Basis | None = None
        #: Examples and mean loss of each step since they were last taken.
        self.losses: list[tuple[int, Tensor]] = []
        #: By client the values that BatchNorm's statistics are estimated from.
        self.newest = defaultdict[int, list[Tensor]](list)

    def open(
        self,
        message: Message,
        batch: BatchId,
        rows: int,
        size: int,
        *,
        labels: bool,
        finer: bool = False,
    ) -> Smashed:
        """A client's smashed data, if they are those that are due and can be trained on.

        Args:
            message: as the client sent it.
            batch: that the client was asked for; the message must say the same of itself.
            rows: examples of that batch, >= 1.
            size: examples of the client.
            labels: whether it must have labels; in a U-shape it must not.
            finer: it is one of the last batches, that cross as in use.

        Raises:
            WireError: it is no smashed data of this cut, another batch, or a value is NaN or
                infinite.
        """
        config, shape = self.config, (rows, *self.config.shape)
        opened = (config.finer_link if finer else config.link).open(
            message,
            shape,
            batch,
            labels=labels,
            classes=config.classes,
            examples=0 if self.memory is None else size,
            device=config.device,
        )
        if not finite(opened.values):
            raise WireError("NaN or Inf in the smashed data")
        values, rows_of = opened.values, opened.rows
        if self.memory is None or rows_of is None:
            values = crossed(values, self.basis)
        else:
            before = self.memory.read(batch.client, rows_of, size, values, self.basis)
            values = crossed(values, self.basis, before)
            self.memory.write(batch.client, rows_of, values)
        if finer:
            self.newest[batch.client].append(values.detach())
        return replace(opened, values=values)

    @torch.no_grad()
    def recalibrate(self) -> None:
        """Estimate BatchNorm's statistics anew from the last batches of the round  [ours].

        The mean over steps in which each client has a batch, one of the first, one of the second,
        ..., of each step's mean and variance; the layers stay as they are.
        """
        steps = [
            torch.cat([one for one in step if one is not None])
            for step in zip_longest(*self.newest.values())
        ]
        steps = [step for step in steps if len(step) >= self.smallest]
        self.trained.train()
        norms = [m for m in self.back.modules() if isinstance(m, _BatchNorm) and m.training]
        self.back.eval()
        before = [
            (norm, norm.momentum, count.clone())
            for norm in norms
            if steps and (count := norm.num_batches_tracked) is not None
        ]
        for norm, _, _ in before:
            norm.train()
            norm.reset_running_stats()
            norm.momentum = None  # the mean of all
        for step in steps:
            self.back(step)
        for norm, momentum, count in before:
            norm.eval()
            norm.momentum, norm.num_batches_tracked = momentum, count

    def step(self, opened: Sequence[Smashed]) -> list[Encoded]:
        """One optimiser step on the mean loss over all the batches, as if they were one.

        Args:
            opened: what `open` gave, with labels.

        Returns:
            For each batch the gradient of its client's own mean loss: that of the mean
            over all examples, times all examples over the client's. So a front learns at the same
            pace whoever else takes part, and fronts averaged by their examples move as one front
            would on the batches together. No gradients where clients need none.
        """
        labels = torch.cat([one.labels for one in opened if one.labels is not None])

        def output_gradient(out: Tensor) -> Tensor:
            leaf = out.detach().requires_grad_()
            loss = self.config.loss(leaf, labels)
            loss.backward()
            self.losses.append((len(labels), loss.detach()))
            assert leaf.grad is not None
            return leaf.grad

        return self._train(opened, output_gradient)

    def step_u(
        self, opened: Sequence[Smashed], tail: Callable[[BatchId, Message], Message]
    ) -> tuple[list[Encoded], dict[int, str]]:
        """The same in a U-shape, where labels are never seen here.

        Args:
            opened: what `open` gave.
            tail: carries the message of a batch's output to its client's tail; returns that of the
                gradient.

        Returns:
            The gradients, and by client why the gradient of its tail was not used.
        """
        link, rejected = self.config.tail_link, dict[int, str]()

        def output_gradient(out: Tensor) -> Tensor:
            gradients = []
            parts = out.detach().split([len(one.values) for one in opened])
            for part, one in zip(parts, opened, strict=True):
                message, context = link.up(part, one.context.batch)
                try:
                    answer = tail(one.context.batch, message)
                    gradient = link.open_gradient(answer, context, self.config.device)
                    if not finite(gradient):
                        raise WireError("NaN or Inf in the gradient of the tail")
                except ValueError as error:
                    rejected[one.context.batch.client] = str(error)
                    gradient = torch.zeros_like(part)
                gradients.append(gradient * (len(part) / len(out)))
            return torch.cat(gradients)

        return self._train(opened, output_gradient), rejected

    def _train(
        self, opened: Sequence[Smashed], output_gradient: Callable[[Tensor], Tensor]
    ) -> list[Encoded]:
        """Forward, backward from the output's gradient, step, and the gradients."""
        self.trained.train()
        needed = self.config.gradients or self.scorer is not None
        leaves = [one.values.requires_grad_(needed) for one in opened]
        # Of one message too this makes a copy: the first layer may work in place, and a leaf not.
        out = self.back(torch.cat(leaves))
        out.backward(output_gradient(out))
        self.trained.step()
        for leaf, one in zip(leaves, opened, strict=True):
            if self.scorer is not None and leaf.grad is not None and one.labels is not None:
                self.scorer.watch(leaf.grad, one.labels)
        if not self.config.gradients:
            return []
        total = sum(len(leaf) for leaf in leaves)
        replies = []
        for leaf, one in zip(leaves, opened, strict=True):
            assert leaf.grad is not None
            # Times one it would be copied for nothing, where one client steps by itself.
            own = leaf.grad if len(leaf) == total else leaf.grad * (total / len(leaf))
            if self.basis is not None:
                own = self.basis.gradient(own)
            replies.append(self.config.link.down(own, one.context))
        return replies
