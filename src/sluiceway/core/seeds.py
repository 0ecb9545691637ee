"""Seeds derived from (seed, round, client), so that no generator has a state to save."""

from __future__ import annotations

import numpy as np

#: Largest seed that torch and numpy take alike.
LARGEST_SEED = (1 << 63) - 1


def derive_seed(*numbers: int) -> int:
    """One seed from several numbers, the same on every machine."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
