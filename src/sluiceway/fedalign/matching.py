"""Experts matched by meaning: which expert of a client has the role of which index  [ours].

The paper averages experts of the same index, and leaves out updates that do not agree. Where the
experts of some clients have come to stand in another order, that throws their knowledge away; put
into the common order first, it is kept.
"""

from typing import Final

import torch
from torch import Tensor

from sluiceway.fedalign.semantics import centred_regions, region_similarity

#: Gain in cosine, for each expert that moves, from which another order is believed.
LEAST_GAIN: Final = 0.5


def match_experts(regions: Tensor, load: Tensor, least_gain: float = LEAST_GAIN) -> Tensor:
    """The expert of each client that has the role of each index  [ours]::

        o = the client whose regions agree most with the others' by index: max_i sum_je S_ij(e)
        order_i = the permutation with the largest sum_e cos(mu_o(e) - mu, mu_i(order_i(e)) - mu)

    found by linear assignment. A client keeps its own order unless that sum grows by at least
    `least_gain` for each expert that moves: two experts that changed places gain more than 1 each,
    chance gains little. Regions of experts without load are zero, and say nothing. Of clients that
    agree equally well, the one with the largest load sets the order, then the first.

    Args:
        regions: mu_i(e), [N, E, d], finite where load > 0.
        load: tokens routed, c_i(e), [N, E], at least 0.
        least_gain: at least 0.

    Returns:
        order, [N, E], int64, a permutation in each row: the row of client i says which of its
        experts has the role of index e.

    Raises:
        ValueError: a shape does not fit.
    """
    from scipy.optimize import linear_sum_assignment  # takes a third of a second to import

    agreement = region_similarity(regions, load).sum((0, 2))
    centred = torch.nn.functional.normalize(centred_regions(regions, load), dim=-1)
    best = agreement >= agreement.max() - 1e-9
    common = int(torch.where(best, load.double().sum(1), -1.0).argmax())
    clients, experts = load.shape
    order = torch.arange(experts).repeat(clients, 1)
    for client in range(clients):
        cosines = centred[common] @ centred[client].T
        found = torch.from_numpy(linear_sum_assignment(-cosines.numpy())[1])
        gain = cosines.gather(1, found.unsqueeze(1)).sum() - cosines.trace()
        moved = int((found != order[client]).sum())
        if moved and float(gain) >= least_gain * moved:
            order[client] = found
    return order
