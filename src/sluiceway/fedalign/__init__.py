"""FedAlign-MoE as mathematics: what is measured, what is penalised, how clients are weighted.

The method is federated aggregation alignment for mixture-of-experts (arXiv 2603.21276). Pure
functions on tensors, one MoE layer at a time; this package imports nothing of ours, so it can
be read beside the paper. Letters: N clients, E experts, T tokens, k experts a token, d hidden
size, P parameters of one expert.

Marks, as in docs/methods.md: [paper] is stated by the paper or by a note on it, [ours] is our
reconstruction.

Two kinds of function. Those of every training step (`routing_statistics`, `marginal_penalty`,
`conditional_penalty`, `load_balance`) check nothing and stay on the device and in the precision of
the logits, but at least float32. Those of once a round check shapes (ValueError), detach, and
compute and return in float64, unless they say otherwise.
"""

from sluiceway.fedalign.heads import gram, label_sums, means_head, ridge_head
from sluiceway.fedalign.low_rank import product_change, product_gram
from sluiceway.fedalign.matching import LEAST_GAIN, match_experts
from sluiceway.fedalign.moments import (
    OFF_DIAGONAL,
    RIDGE,
    Moment,
    column_squares,
    low_rank_moment,
    moment_fault,
    packed_triangle,
    received_moment,
    region_step,
    second_moment,
    unpacked_triangle,
    update_moment,
    with_one,
)
from sluiceway.fedalign.routing import (
    REFERENCE_FLOOR,
    adaptive_strength,
    conditional_penalty,
    consistency_score,
    global_routing,
    load_balance,
    marginal_penalty,
    routing_statistics,
)
from sluiceway.fedalign.semantics import (
    DirectionGram,
    centred_regions,
    expert_weights,
    region_similarity,
    region_weights,
    selection_threshold,
    semantic_weights,
    smoothed_weights,
    told_regions,
)

__all__ = [
    "LEAST_GAIN",
    "OFF_DIAGONAL",
    "REFERENCE_FLOOR",
    "RIDGE",
    "DirectionGram",
    "Moment",
    "adaptive_strength",
    "centred_regions",
    "column_squares",
    "conditional_penalty",
    "consistency_score",
    "expert_weights",
    "global_routing",
    "gram",
    "label_sums",
    "load_balance",
    "low_rank_moment",
    "marginal_penalty",
    "match_experts",
    "means_head",
    "moment_fault",
    "packed_triangle",
    "product_change",
    "product_gram",
    "received_moment",
    "region_similarity",
    "region_step",
    "region_weights",
    "ridge_head",
    "routing_statistics",
    "second_moment",
    "selection_threshold",
    "semantic_weights",
    "smoothed_weights",
    "told_regions",
    "unpacked_triangle",
    "update_moment",
    "with_one",
]
