"""Error feedback for gradients: what rounding lost goes into the client's next gradient  [ours].

Only rounding counts as error. A channel or element that did not cross was zero in the forward pass
on the server, so that the network as deployed has no gradient there: nothing was lost. And only
gradients are corrected, not smashed data: the front's update is a sum of gradients over steps, in
which a late part still counts, while smashed data of one batch says nothing of the next batch's.

Per client the residual r [C, ...] is a sum over examples, at every position of the cut::

    sent_b  = rounded(g_b + r / n)      n = examples that carry the position in this batch
    r      <- sum over them of (g_b + r / n - sent_b)

A position that this batch does not carry keeps its r. So over any number of steps the sum of what
the client received is the sum of the gradients less the last r.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sluiceway.split.packing import BatchContext, Encoded


class ErrorFeedback:
    """The residuals of all clients, on the side that sends gradients.

    A client's residual begins at zero, and is dropped when its smashed data changes shape.
    """

    def __init__(self) -> None:
        self._residuals: dict[int, Tensor] = {}

    @torch.no_grad()
    def send(
        self,
        grad: Tensor,
        context: BatchContext,
        pack: Callable[[Tensor], Encoded],
        unpack: Callable[[Encoded], Tensor],
    ) -> Encoded:
        """Pack a gradient with the client's residual added, and keep what rounding lost.

        Args:
            grad: the shape of the context, any floating type.
            context: of the batch.
            pack: makes the message of a dense gradient.
            unpack: the dense float32 gradient that the client will read from the message.
        """
        selection, client = context.selection, context.batch.client
        grad = grad.detach().float()
        residual = self._residuals.get(client, grad.new_zeros(())).to(grad.device)
        if residual.shape != grad.shape[1:]:
            residual = torch.zeros_like(grad[0])
        carried = selection.spread(torch.ones_like(selection.take(grad)), context.shape)
        examples = carried.sum(0)
        corrected = (grad + residual / examples.clamp(min=1)) * carried
        message = pack(corrected)
        error = (corrected - unpack(message)).sum(0)
        self._residuals[client] = torch.where(examples > 0, error, residual)
        return message

    def state_dict(self) -> dict[str, Tensor]:
        """The residuals by client, [C, ...] each."""
        return {str(client): r.cpu().clone() for client, r in self._residuals.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state_dict` gave."""
        self._residuals = {int(client): r.clone() for client, r in state.items()}
