"""Consistency-weighted routing alignment: the gating half of FedAlign-MoE (arXiv 2603.21276).

For one MoE layer: what a client measures of its routing, the regulariser that holds its gate near
the global routing while it trains, and the weights by which the server merges gates.
Every step is a function of its own, so that each can be switched off. Marks: docs/methods.md.
"""

from typing import Final

import torch
from torch import Tensor

from sluiceway.fedalign._shapes import as_double, require_shape

REFERENCE_FLOOR: Final = 1e-6
"""Smallest value that `marginal_penalty` takes for r_g(e), so that log(p / r_g) stays finite."""


@torch.no_grad()
def routing_statistics(
    logits: Tensor, selected: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums over one batch from which a client's routing report is made.

    With p(e|x) the softmax over all E logits and the sums over counted tokens x::

        load(e)        = number of x with e in top-k(x)              c_i(e)  [ours]
        routing_sum(e) = sum of p(e|x)                               r_i(e)  [paper: "empirical
                                                       routing distribution"], soft mean [ours]
        margin_sum(e)  = sum of p(1st) - p(2nd) over x whose first   m_i(e)  [paper: name],
                         choice is e                                         form [ours]
        first_count(e) = number of x whose first choice is e

    Sums of batches add up; then r_i = routing_sum / tokens, and m_i = margin_sum / first_count,
    0 where first_count is 0. The first choice is the arg max of p, whatever `selected` holds; in a
    tie either expert may be named, and the margin is 0. With E = 1 the second probability is 0.

    Args:
        logits: router logits, [T, E], any floating type, finite for counted tokens; T may be 0.
        selected: the experts that got each token, [T, k] int64 in [0, E), distinct within a row.
        mask: [T] bool, True for tokens that count (not padding); None counts all.

    Returns:
        load, routing_sum, margin_sum, first_count: each [E], float32, without graph, on the device
        of the logits. Each sums over e to at most k T, T, T and T. Counts are exact to 2**24: add
        batches up in float64.
    """
    counted: Tensor | None = None
    logits = logits.float()
    if mask is not None:
        counted = mask.unsqueeze(1).float()
        # Logits of padding may be anything, NaN included: a product with 0 would not remove them.
        logits = logits.masked_fill(~mask.unsqueeze(1), 0.0)
    p = logits.softmax(-1)
    if counted is not None:
        p = p * counted
    best, first = p.max(-1, keepdim=True)
    # Blanking the best and taking the maximum again is several times faster than topk(2).
    margin = best - p.scatter(1, first, 0.0).amax(-1, keepdim=True)
    # Scattering into [T, E] and summing is deterministic on every device (index_add is not), and
    # no autocast can turn it into a half-precision matmul.
    zeros = torch.zeros_like(p)
    if counted is None:
        load, first_count = zeros.scatter(1, selected, 1.0), zeros.scatter(1, first, 1.0)
    else:
        load = zeros.scatter(1, selected, counted.expand_as(selected))
        first_count = zeros.scatter(1, first, counted)
    return load.sum(0), p.sum(0), zeros.scatter(1, first, margin).sum(0), first_count.sum(0)


def adaptive_strength(r_i: Tensor, r_g: Tensor) -> Tensor:
    """How strongly each expert is held to the global routing, in [0, 1].

    alpha_i(e): strong for globally consistent experts, weak for client-specific ones
    [paper in words]::

        alpha_i(e) = 1 - |r_i(e) - r_g(e)| / (r_i(e) + r_g(e))          [ours]

    and 1 where both are 0: they agree.

    Args:
        r_i: routing distribution of a client or of several, [..., E], in [0, 1].
        r_g: global routing, [..., E] with the same E, broadcast against r_i.

    Returns:
        alpha, [..., E], in the precision of the arguments, without graph.

    Raises:
        ValueError: the last sizes differ.
    """
    require_shape("r_g", r_g, *("..." for _ in r_g.shape[:-1]), r_i.shape[-1])
    r_i, r_g = r_i.detach(), r_g.detach()
    total = r_i + r_g
    alpha = 1 - (r_i - r_g).abs() / total
    return torch.where(total == 0, torch.ones_like(alpha), alpha).clamp(0, 1)


def marginal_penalty(
    logits: Tensor,
    selected: Tensor,
    reference: Tensor,
    alpha: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The regulariser of the local objective L = L_task + lambda * L_reg  [paper]::

        L_reg = mean over tokens of
                sum over e in top-k(x) of alpha_i(e) p_i(e|x) log(p_i(e|x) / r_g(e))     [paper]

    p_i is the softmax over all E logits; r_g is taken as at least `REFERENCE_FLOOR` [ours]. Since
    the sum runs over the chosen experts only, it is no divergence for k < E and may be negative.
    The reference is a marginal: pulling every token toward it can flatten specialisation, and
    `conditional_penalty` is the alternative [ours].

    Args:
        logits: router logits with their graph, [T, E], finite for counted tokens; T may be 0.
        selected: top-k(x), [T, k] int64 in [0, E), distinct within a row.
        reference: r_g, [E], in [0, 1]; no gradient flows into it.
        alpha: per-expert strength, [E], in [0, 1], from `adaptive_strength`; None means 1.
        mask: [T] bool, True for tokens that count; None counts all.

    Returns:
        L_reg in nats per counted token, a scalar with graph; 0, still with graph, if none counts.
    """
    log_p = _log_probabilities(logits, mask)
    log_reference = reference.detach().to(log_p).clamp(min=REFERENCE_FLOOR).log()
    terms = log_p.exp() * (log_p - log_reference)
    if alpha is not None:
        terms = terms * alpha.detach().to(terms)
    return _mean_over_tokens(terms.gather(1, selected).sum(-1), mask)


def conditional_penalty(
    logits: Tensor,
    received_logits: Tensor,
    alpha: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The regulariser with the gate as received this round for its reference  [ours]::

        mean over tokens of sum over e of alpha_i(e) p_i(e|x) (log p_i(e|x) - log p_received(e|x))

    which for alpha = 1 is KL(p_i(.|x) || p_received gate(.|x)) [ours], at least 0, and 0 only where
    the two gates route alike. With other alpha it may be slightly negative.

    Args:
        logits: router logits with their graph, [T, E], finite for counted tokens; T may be 0.
        received_logits: what the gate as received gives for the same hidden states, [T, E],
            finite for counted tokens; no gradient flows into it.
        alpha: per-expert strength, [E], in [0, 1], from `adaptive_strength`; None means 1.
        mask: [T] bool, True for tokens that count; None counts all.

    Returns:
        The penalty in nats per counted token, a scalar with graph; 0, still with graph, if none
        counts.
    """
    log_p = _log_probabilities(logits, mask)
    log_received = _log_probabilities(received_logits.detach(), mask)
    terms = log_p.exp() * (log_p - log_received.to(log_p))
    if alpha is not None:
        terms = terms * alpha.detach().to(terms)
    return _mean_over_tokens(terms.sum(-1), mask)


def load_balance(logits: Tensor, selected: Tensor, mask: Tensor | None = None) -> Tensor:
    """The auxiliary load-balancing loss of one MoE layer on one batch::

        L_balance = E * sum over e of f(e) P(e)     [paper: Switch, arXiv 2101.03961, eq. 4 to 6]
        f(e) = (1 / (k T)) * number of x with e in top-k(x)     [paper: k = 1; else ours]
        P(e) = (1 / T) * sum over x of p(e|x)                                            [paper]

    with T the counted tokens and p the softmax over all E logits. It is 1 where the choices or the
    probabilities are uniform, and E where one expert gets all with certainty (k = 1). f has no
    gradient [paper]. Mixtral's in transformers is k times as large: there f sums to k.

    Args:
        logits: router logits with their graph, [T, E], finite for counted tokens; T may be 0.
        selected: top-k(x), [T, k] int64 in [0, E), distinct within a row.
        mask: [T] bool, True for tokens that count; None counts all.

    Returns:
        L_balance, in [0, E], a scalar with graph; 0, still with graph, if no token counts.
    """
    p = _log_probabilities(logits, mask).exp()
    ones = p.new_ones(len(p)) if mask is None else mask.to(p)
    chosen = torch.zeros_like(p, requires_grad=False).scatter(
        1, selected, ones.unsqueeze(1).expand_as(selected)
    )
    tokens = ones.sum().clamp(min=1)
    f = chosen.sum(0) / (selected.shape[1] * tokens)
    return p.shape[1] * (f * (p * ones.unsqueeze(1)).sum(0)).sum() / tokens


def _log_probabilities(logits: Tensor, mask: Tensor | None) -> Tensor:
    """log p(e|x), [T, E], in float32 or better; rows of uncounted tokens are uniform."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if mask is not None:
        # Filled before the softmax, padding gets a gradient of exactly 0 even where it is NaN.
        logits = logits.masked_fill(~mask.unsqueeze(1), 0.0)
    return logits.log_softmax(-1)


def _mean_over_tokens(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of `values` [T] over counted tokens; 0 with graph if there are none."""
    if mask is None:
        return values.sum() / max(values.shape[0], 1)
    return (values * mask).sum() / mask.sum().clamp(min=1)


def consistency_score(r: Tensor, margin: Tensor) -> Tensor:
    """What one client counts for each expert's routing, without the others: w_i(e) up to a factor.

    With r_g the global routing of the previous round and m_i(e) the mean decision margin::

        o_i(e) = r_i(e) * r_g(e)      [paper: "product alignment of local and global routing"]
        s_i(e) = o_i(e) * m_i(e);   w_i(e) = s_i(e) / sum_j s_j(e)      [paper]

    and row e of the server's gate is sum_i w_i(e) * row e of client i's gate [ours]. r_g(e) is a
    common factor of an expert's scores and cancels, so that scores can be added up as clients
    come. The small terms count where those before them are zero for every client: an expert that
    no client chose first is weighed by r alone, and where that is 0 too, clients weigh alike
    [ours].

    Args:
        r: routing distribution of the client, [E], in [0, 1].
        margin: its mean decision margins, [E], in [0, 1].

    Returns:
        [E], above 0.
    """
    return r * (margin + 1e-12) + 1e-30


def global_routing(w: Tensor, r: Tensor) -> Tensor:
    """The global routing after a round::

        r_g(e) proportional to sum_i w_i(e) r_i(e), renormalised over e      [paper in words]

    If every product is 0 (nobody routed a token) it is uniform [ours].

    Args:
        w: consistency weights, [N, E], columns sum to one.
        r: routing distributions of the clients, [N, E], in [0, 1].

    Returns:
        r_g, [E], in [0, 1], float64, sums to one.

    Raises:
        ValueError: a shape does not fit.
    """
    w = as_double("w", w, "N", "E")
    mixed = (w * as_double("r", r, *w.shape)).sum(0)
    total = mixed.sum()
    if total <= 0:
        return torch.full_like(mixed, 1 / mixed.numel())
    return mixed / total
