"""Which device a name stands for."""

from __future__ import annotations

import torch


def chosen_device(name: str | torch.device) -> str:
    """The device that "auto" stands for; any other as it is, by its name."""
    if str(name) != "auto":
        return str(name)
    return "cuda" if torch.cuda.is_available() else "cpu"
