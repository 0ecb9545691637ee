"""A few test examples go through a model before training: what every client would fail at."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sluiceway.core.batches import OWN_LOSS, Batch, Examples
from sluiceway.core.evaluation import Metric, require_fitting
from sluiceway.core.settings import Training
from sluiceway.errors import InputError, first_line
from sluiceway.moe import MoELayout, Observer

#: Examples that are made a batch, and how many of them go through the model.
READ, RUN = 32, 2


def try_model(
    model: nn.Module,
    clients: Sequence[Examples],
    test: Examples,
    metric: str | Metric,
    device: torch.device,
    *,
    layout: MoELayout | None = None,
    training: Training | None = None,
    own_loss: bool = True,
    local_tests: Sequence[Examples] = (),
    must: bool = False,
) -> None:
    """Check what a model gives for some test examples, in evaluation mode; leaves it as it was.

    Clients' inputs are not read here, as they may hang or end the process that reads them. What
    fails in another way is left to the round, which names the client.

    Args:
        model: on the device.
        clients, test: as they are trained and tested on.
        metric: see `require_fitting`.
        layout: the mixtures that are observed in training, or None.
        training: whether the attention mask says which of their tokens count, and the precision of
            a forward pass; None for all of a batch in the model's own.
        own_loss: whether the model may return an auxiliary loss beside its logits.
        local_tests: test parts of clients.
        must: whether the examples have to go through it: a site has no round that names it.

    Raises:
        InputError: examples make no batch; the model gives no logits [B, C], or too few for the
            labels; a mixture's tokens are not those of the attention mask; with `must` whatever
            else it raises.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    model.eval()
    try:
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            torch.no_grad(),
            contextlib.nullcontext() if training is None else training.precision(device),
        ):
            masked = training is not None and training.routing_mask == "attention"
            found = _outcome(model, test, device, layout, masked, must)
    finally:
        for module, mode in modes:
            module.training = mode
        for module, name, buffer, value in buffers:
            setattr(module, name, buffer.copy_(value))
    if found is None:
        return
    logits, own = found
    if own is not None and not own_loss:
        raise InputError(OWN_LOSS)
    try:
        require_fitting(logits, clients, test, metric, local_tests)
    except ValueError as error:
        raise InputError(str(error)) from None


def _outcome(
    model: nn.Module,
    test: Examples,
    device: torch.device,
    layout: MoELayout | None,
    masked: bool,
    must: bool,
) -> tuple[Tensor, Tensor | None] | None:
    """Logits and own loss for a few test examples; None where they cannot be read or run."""
    try:
        Batch.of(test, torch.arange(min(READ, len(test))), torch.device("cpu"))
        few = Batch.of(test, torch.arange(min(RUN, len(test))), device)
        with contextlib.ExitStack() as stack:
            if layout is not None and layout.blocks:
                observer = stack.enter_context(Observer(model, layout, regions=False))
                mask, decoder_mask = (few.mask, few.decoder_mask) if masked else (None, None)
                stack.enter_context(observer.observing(mask, decoder_mask))
            return few.outcome(model)
    except InputError:
        raise
    except Exception as error:
        if must:
            why = f"{type(error).__name__}: {first_line(error)}"
            raise InputError(f"the model cannot be run on these examples: {why}") from None
        return None
