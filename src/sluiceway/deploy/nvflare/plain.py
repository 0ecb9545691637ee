"""Only plain values cross: NVFlare's own way of carrying tensors is left out."""

from __future__ import annotations

import sys

#: Collab registers this where it can be imported, which also brings torch into every process.
TENSORS = "nvflare.app_opt.pt.decomposers"


def refuse_tensors() -> None:
    """From here on, this process neither sends nor accepts tensors by NVFlare's serialisation."""
    if TENSORS not in sys.modules:
        sys.modules[TENSORS] = None  # type: ignore[assignment]  # what imports it is told no
