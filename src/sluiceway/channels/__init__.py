"""ACP-SL as mathematics: how channels of smashed data are scored, and which of them are sent.

The method is adaptive channel pruning in split learning (arXiv 2603.09792): LCIS, label-aware
channel importance scoring, rates channels; ACP, adaptive channel pruning, drops the less important
ones [paper, abstract only: no formula, number or setting is public to us]. Pure functions on
tensors, and one small state machine; this package imports torch and nothing of ours, so it can be
read beside the paper. Letters: B examples, C channels, H x W positions, g cells after pooling,
K classes, N clients.

Marks, as in docs/methods.md: [paper] is stated by the paper or by a note on it, [ours] is our
reconstruction.

Read in the order of a round: `pooled` and `ClassStatistics` (statistics), `fisher` and its like
(scoring; what rivals do is in rivals), `fraction` and its like (pruning), `ChannelChooser`
(chooser); or, in a better basis than the channels, `Moments` (moments), `Basis` (bases) and
`water_filling` (bits). Shapes, ranges and finiteness of arguments are checked everywhere
(ValueError); scores are detached, float64 and finite.
"""

from sluiceway.channels.bases import (
    Basis,
    eigenbasis,
    gradient_basis,
    label_basis,
    label_weights,
)
from sluiceway.channels.bits import MOST_BITS, water_filling
from sluiceway.channels.chooser import ChannelChooser, Rule
from sluiceway.channels.moments import Moments, merge_moments, moments_size
from sluiceway.channels.pruning import (
    budget,
    cumulative,
    fraction,
    hysteresis,
    rechoose,
    schedule,
    share_count,
    threshold,
    top,
)
from sluiceway.channels.rivals import (
    class_balanced,
    class_gradients,
    entropy,
    l1,
    random_scores,
    std,
    taylor,
)
from sluiceway.channels.scoring import (
    FISHER_FLOOR,
    between,
    distinct,
    fisher,
    merge_scores,
    similarity,
)
from sluiceway.channels.statistics import ClassStatistics, pooled

__all__ = [
    "FISHER_FLOOR",
    "MOST_BITS",
    "Basis",
    "ChannelChooser",
    "ClassStatistics",
    "Moments",
    "Rule",
    "between",
    "budget",
    "class_balanced",
    "class_gradients",
    "cumulative",
    "distinct",
    "eigenbasis",
    "entropy",
    "fisher",
    "fraction",
    "gradient_basis",
    "hysteresis",
    "l1",
    "label_basis",
    "label_weights",
    "merge_moments",
    "merge_scores",
    "moments_size",
    "pooled",
    "random_scores",
    "rechoose",
    "schedule",
    "share_count",
    "similarity",
    "std",
    "taylor",
    "threshold",
    "top",
    "water_filling",
]
