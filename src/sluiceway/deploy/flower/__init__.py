"""Flower: our strategies and client for its users, and whole recipes over its SuperLink.

Needs the extra `[flower]`. Has `Adapter`, `ClientSetup`, `GridTransport`, `client_app`, `site_app`,
`load_arrays`, `unpacked`, the table `STRATEGIES`, and its classes by name, such as `FedAlignMoE`.
They are imported when they are asked for, because Flower starts a process for every message, and
one that only passes chunks on need not wait for torch.
"""

from importlib import import_module
from typing import Any

_MODULES = {
    "Adapter": "adapter",
    "ClientSetup": "custom_client",
    "GridTransport": "transport",
    "STRATEGIES": "strategies",
    "client_app": "custom_client",
    "load_arrays": "records",
    "site_app": "client",
    "unpacked": "records",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        found = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    elif name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    else:
        found = import_module(f"{__name__}.strategies").CLASSES.get(name)
        if found is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found
    return found
