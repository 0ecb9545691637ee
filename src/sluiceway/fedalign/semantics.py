"""Semantic-aware aggregation: the expert half of FedAlign-MoE (arXiv 2603.21276).

Experts with the same index may mean different things on different clients. Two clients' versions
of an expert count as alike when they serve the same region of hidden space (S) and were updated in
the same direction (D); each client is then weighted by how much like-minded load stands behind it.
Marks: docs/methods.md.
"""

from typing import Final, Literal

import torch
from torch import Tensor

from sluiceway.fedalign._shapes import as_double, require_shape
from sluiceway.fedalign.low_rank import product_gram

# Slack of `value >= tau`: with equal pairwise values, rounding of their mean must drop none.
_THRESHOLD_SLACK: Final = 1e-9


def centred_regions(regions: Tensor, load: Tensor) -> Tensor:
    """Regions relative to the layer's mean region, mu_i(e) - mu  [ours]::

        mu_i(e) = mean hidden state entering e, over tokens routed to e               [paper]
        mu = sum_ie c_i(e) mu_i(e) / sum_ie c_i(e), the load-weighted mean region     [ours]

    Uncentred cosines are all near 1. Regions of experts without load are ignored, whatever they
    hold, and come out as zero. So does a region that differs from mu by no more than the rounding
    of its own floating type: its direction would be noise [ours]. So is a region of zeros, which
    says that its client does not tell it.

    Args:
        regions: mu_i(e) of all clients and experts of one layer, [N, E, d], finite where load > 0.
        load: tokens routed, c_i(e), [N, E], at least 0.

    Returns:
        Centred regions, [N, E, d], float64.

    Raises:
        ValueError: a shape does not fit.
    """
    values = as_double("regions", regions, "N", "E", "d")
    counts = as_double("load", load, *regions.shape[:2])
    counts = counts * told_regions(values, counts)
    unused = (counts <= 0).unsqueeze(-1)
    values = values.masked_fill(unused, 0.0)
    mean = torch.einsum("ne,ned->d", counts, values) / counts.sum().clamp(min=1e-300)
    centred = values - mean
    rounding = 2 * torch.finfo(regions.dtype).eps + 1e-12
    scale = values.norm(dim=-1, keepdim=True).clamp(min=mean.norm().item())
    noise = centred.norm(dim=-1, keepdim=True) <= rounding * scale
    return centred.masked_fill(unused | noise, 0.0)


def told_regions(regions: Tensor, load: Tensor) -> Tensor:
    """Which regions are known, [N, E] bool: those with load that are not all zero."""
    return (load > 0) & (regions != 0).any(dim=-1)


def region_similarity(regions: Tensor, load: Tensor) -> Tensor:
    """Likeness of the regions that two clients' versions of an expert serve::

        S_ij(e) = cos(mu_i(e) - mu, mu_j(e) - mu)      [ours; uncentred cosines are all near 1]

    The cosine with a zero vector is 0; see `centred_regions`.

    Args:
        regions: mu_i(e), [N, E, d], finite where load > 0.
        load: tokens routed, c_i(e), [N, E], at least 0.

    Returns:
        S, [E, N, N], symmetric, in [-1, 1], float64; the diagonal is exactly 1 where load > 0,
        else 0.

    Raises:
        ValueError: a shape does not fit.
    """
    centred = centred_regions(regions, load)
    gram = torch.einsum("ied,jed->eij", centred, centred)
    return _cosine(gram, (load > 0).T.double())


def _cosine(gram: Tensor, diagonal: Tensor) -> Tensor:
    """Cosines from inner products [..., N, N]; zero norms give 0; the diagonal as told."""
    norms = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    inverse = torch.where(norms > 0, 1 / norms, torch.zeros_like(norms))
    cosine = gram * inverse.unsqueeze(-1) * inverse.unsqueeze(-2)
    # BLAS may round the two triangles differently.
    cosine = ((cosine + cosine.mT) / 2).clamp(-1, 1)
    cosine.diagonal(dim1=-2, dim2=-1).copy_(diagonal)
    return cosine


class DirectionGram:
    """Inner products of the clients' updates of one expert, gathered piece by piece.

    ::

        G_ij = <update_i(e), update_j(e)>,   D_ij(e) = G_ij / sqrt(G_ii G_jj)
                                           = cos(update_i(e), update_j(e))
                                                          [paper: direction consensus]

    An expert has several tensors: `add` each, flattened, in turn; nothing but G is kept.
    A client that did not train the expert takes part with a row of zeros.

    Args:
        clients: N, at least 1.
        chunk: columns taken at a time, at least 1. `add` needs 8 N chunk bytes besides the updates.

    Attributes:
        gram: G so far, [N, N], float64, on the CPU.

    Raises:
        ValueError: `clients` or `chunk` is below 1.
    """

    def __init__(self, clients: int, *, chunk: int = 16384) -> None:
        if clients < 1:
            raise ValueError(f"clients: expected at least 1, got {clients}")
        if chunk < 1:
            raise ValueError(f"chunk: expected at least 1, got {chunk}")
        self._chunk = chunk
        self.gram = torch.zeros(clients, clients, dtype=torch.float64)

    @torch.no_grad()
    def add(self, updates: Tensor) -> None:
        """Add the inner products of one piece of the updates.

        Args:
            updates: new minus old values, [N, P], any floating type and device, finite; the
                clients in the same order in every call.

        Raises:
            ValueError: the shape does not fit.
        """
        require_shape("updates", updates, self.gram.shape[0], "P")
        total = torch.zeros_like(self.gram, device=updates.device)
        for start in range(0, updates.shape[1], self._chunk):
            # In float64 the squares of small updates cannot underflow, at about twice the time.
            columns = updates[:, start : start + self._chunk].double()
            total += columns @ columns.T
        self.gram += total.to(self.gram.device)

    def add_products(self, left: Tensor, right: Tensor) -> None:
        """Add updates that are given by their factors, `product_change` of LoRA's B A  [ours].

        Args:
            left, right: [N, out, r] and [N, r, in]; the updates are left_i @ right_i.

        Raises:
            ValueError: a shape does not fit.
        """
        require_shape("left", left, self.gram.shape[0], "out", "r")
        self.gram += product_gram(left, right).to(self.gram.device)

    def cosine(self) -> Tensor:
        """Direction consensus D_ij(e)  [paper: direction consensus].

        Returns:
            D, [N, N], symmetric, in [-1, 1], float64, on the CPU. The diagonal is exactly 1;
            an update of zeros has cosine 0 with every other.
        """
        return _cosine(self.gram, torch.ones(self.gram.shape[0], dtype=torch.float64))


def selection_threshold(values: Tensor, active: Tensor, beta: float = 1.0) -> Tensor:
    """The value from which a pair of clients counts as alike::

        tau_e = M(e) - beta * Sigma(e)      [paper; beta ours, default 1]

    M and Sigma are mean and (population) standard deviation of the pairwise values, i < j, of
    clients with c > 0.

    Args:
        values: pairwise values, [N, N], symmetric; the diagonal is not read.
        active: clients with c > 0, [N] bool.
        beta: any finite number; larger keeps more pairs.

    Returns:
        tau_e, a scalar, float64; 0 with fewer than two active clients.

    Raises:
        ValueError: a shape does not fit.
    """
    values = as_double("values", values, "N", values.shape[0])
    require_shape("active", active, values.shape[0])
    chosen = values[active][:, active]
    rows, columns = torch.triu_indices(len(chosen), len(chosen), offset=1, device=values.device)
    if len(rows) == 0:
        return values.new_zeros(())
    pairs = chosen[rows, columns]
    return pairs.mean() - beta * pairs.std(correction=0)


def region_weights(S: Tensor, D: Tensor, active: Tensor, beta: float = 1.0) -> Tensor:
    """Which pairs of clients stand together for one expert, and how firmly::

        gamma_ij(e) = max(S_ij, 0) * max(D_ij, 0) where >= tau_e, else 0;  gamma_ii = 1
                                        [paper: region-conditioned gated weights; form ours]

    tau_e is `selection_threshold` of these products. A value that reaches tau_e but for rounding
    (1e-9) is kept.

    Args:
        S: region similarity, [N, N], symmetric, in [-1, 1].
        D: direction consensus, [N, N], symmetric, in [-1, 1].
        active: clients with c > 0, [N] bool.
        beta: see `selection_threshold`.

    Returns:
        gamma, [N, N], symmetric, in [0, 1], float64; the diagonal is 1, and rows and columns of
        inactive clients are 0 off the diagonal.

    Raises:
        ValueError: a shape does not fit.
    """
    S = as_double("S", S, "N", S.shape[0])
    values = S.clamp(min=0) * as_double("D", D, *S.shape).to(S.device).clamp(min=0)
    require_shape("active", active, len(S))
    tau = selection_threshold(values, active, beta)
    kept = (values >= tau - _THRESHOLD_SLACK) & active & active.unsqueeze(1)
    return torch.where(kept, values, torch.zeros_like(values)).fill_diagonal_(1.0)


def expert_weights(gamma: Tensor, load: Tensor) -> Tensor:
    """Weight of each client's update of one expert  [ours]::

        weight_i proportional to q_i(e) * sum_j gamma_ij(e) q_j(e),   q_i(e) = c_i(e) / sum_j c_j(e)

    new expert = old + sum_i weight_i(e) * update_i(e); an expert that nobody used stays as it was
    [ours].

    Args:
        gamma: from `region_weights`, [N, N], in [0, 1], diagonal 1.
        load: tokens routed to the expert, c_i(e), [N], at least 0.

    Returns:
        Weights, [N], in [0, 1], float64, that sum to one; all 0 if every load is 0. A client alone
        in having load has exactly 1.

    Raises:
        ValueError: a shape does not fit.
    """
    gamma = as_double("gamma", gamma, "N", gamma.shape[0])
    load = as_double("load", load, len(gamma))
    total = load.sum()
    if total <= 0:
        return torch.zeros_like(load)
    q = load / total
    weights = q * (gamma @ q)
    return weights / weights.sum()


def smoothed_weights(gamma: Tensor, load: Tensor) -> Tensor:
    """Weight of each client's update of one expert, none losing its share for being alone  [ours]::

        u~_i = sum_j gamma_ij q_j u_j / sum_j gamma_ij q_j,     new expert = old + sum_i q_i u~_i
        that is, weight_j = q_j sum_i q_i gamma_ij / sum_k gamma_ik q_k,   q_i(e) = c_i / sum_j c_j

    Each client's update is first averaged with those that agree with it, and then all count by
    their tokens. Clients that are alike within groups weigh q_i, as in usage weighting; in
    `expert_weights` a group of them weighs by the square of its share.

    Args:
        gamma: from `region_weights`, [N, N], in [0, 1], diagonal 1.
        load: tokens routed to the expert, c_i(e), [N], at least 0.

    Returns:
        Weights, [N], in [0, 1], float64, that sum to one; all 0 if every load is 0.

    Raises:
        ValueError: a shape does not fit.
    """
    gamma = as_double("gamma", gamma, "N", gamma.shape[0])
    load = as_double("load", load, len(gamma))
    total = load.sum()
    if total <= 0:
        return torch.zeros_like(load)
    q = load / total
    heard = gamma @ q
    # A client without tokens hears of nobody else, and has nothing to say.
    views = torch.where(q > 0, q / heard.clamp(min=torch.finfo(q.dtype).tiny), torch.zeros_like(q))
    weights = q * (gamma.T @ views)
    return weights / weights.sum()


#: From gamma [N, N] and load [N] to the weights of one expert, [N].
WEIGHTS: Final = {"select": expert_weights, "smooth": smoothed_weights}


def semantic_weights(
    regions: Tensor,
    load: Tensor,
    D: Tensor,
    beta: float = 1.0,
    form: Literal["select", "smooth"] = "select",
) -> Tensor:
    """Weights of the clients' updates for all experts of a layer.

    S from `region_similarity`, then for each expert `region_weights`, and `expert_weights` or
    `smoothed_weights` [paper: region-conditioned gated weights; form ours]. O(N^2 E d) operations.

    A client that tells no region of an expert, a row of zeros, agrees with everybody about it; of
    clients none of which tells one the weights are by load alone [ours].

    Args:
        regions: mu_i(e), [N, E, d], finite where load > 0.
        load: tokens routed, c_i(e), [N, E], at least 0.
        D: direction consensus of each expert, [E, N, N], in [-1, 1].
        beta: see `selection_threshold`.
        form: "select" for `expert_weights`, "smooth" for `smoothed_weights`.

    Returns:
        Weights, [N, E], in [0, 1], float64; a column sums to one, or is all 0 where nobody used
        the expert.

    Raises:
        ValueError: a shape does not fit.
    """
    S = region_similarity(regions, load)
    require_shape("D", D, *S.shape)
    told = told_regions(regions, load)
    columns = []
    for e in range(load.shape[1]):
        gamma = region_weights(S[e], D[e], told[:, e], beta)
        silent = (load[:, e] > 0) & ~told[:, e]
        gamma[silent, :] = 1
        gamma[:, silent] = 1
        columns.append(WEIGHTS[form](gamma, load[:, e]))
    return torch.stack(columns, dim=1)
