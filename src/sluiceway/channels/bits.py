"""How many bits each component is worth: reverse water-filling, in whole bits  [ours].

For independent Gaussian components of variances var_c the fewest bits for a mean square error are
b_c = max(0, 1/2 log2 var_c - theta) (Cover and Thomas, Elements of Information Theory, 10.3.3): a
component below the water level is not sent, the others all have the same error. 0 bits is a pruned
component.
"""

from typing import Final

import torch
from torch import Tensor

from sluiceway.channels._shapes import as_scores

MOST_BITS: Final = 8


def water_filling(variances: Tensor, total: int, most: int = MOST_BITS) -> Tensor:
    """Whole bits a component, `total` of them together (less if all have the most).

    With b bits a component's error is taken as var 4^-b. A next bit saves 3/4 of what is left,
    which only falls, so that giving each bit where it saves most is optimal among whole bits.

    Args:
        variances: [C], finite, at least 0. Weigh them first where errors do not count alike.
        total: bits to give out, at least 0; bytes of a message are total x positions / 8.
        most: bits of one component.

    Returns:
        [C] int64 in [0, most], CPU. Where savings are equal the first component goes first; one
        without variance gets none.
    """
    left = as_scores(variances, "C", name="variances").cpu()
    if bool((left < 0).any()) or total < 0:
        raise ValueError("variances and total: expected at least 0")
    # What bit number b saves, [C, most]; the largest savings are taken, of equal ones the first.
    savings = left.unsqueeze(1) * 0.25 ** torch.arange(most, dtype=torch.float64)
    order = savings.flatten().sort(descending=True, stable=True)
    taken = order.indices[:total][order.values[:total] > 0]
    return torch.bincount(taken // most, minlength=len(left))
