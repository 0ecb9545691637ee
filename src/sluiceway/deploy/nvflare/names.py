"""What server and sites of a deployment must agree on."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any, Final, TypeVar

from sluiceway.errors import InputError, quoted

Function = TypeVar("Function", bound=Callable[..., Any])

#: Bytes of a file that cross in one call, of which NVFlare holds a few copies at each end; and in
#: the first call, which notices a site that does not answer.
CHUNK: Final = 8 << 20
FIRST_CHUNK: Final = 64 << 10
#: Seconds that a site delays the reply "busy" to "wait".
WAIT: Final = 5.0
#: Seconds within which a site must reply to a call besides that, and to one that carries a chunk,
#: which may share a slow network with those of other sites. Else it is not connected.
CALL_TIMEOUT: Final = 15.0
CHUNK_TIMEOUT: Final = 120.0

#: Environment of a started kit: its folder, the site's own file, where the server keeps runs, and
#: the address and port on which it listens for split learning.
KIT: Final = "SLUICEWAY_KIT"
SITE: Final = "SLUICEWAY_SITE"
RUNS: Final = "SLUICEWAY_RUNS"
ENDPOINT: Final = "SLUICEWAY_ENDPOINT"
#: A JSON list of folders of the server from which recipes may name files.
FILES: Final = "SLUICEWAY_FILES"
#: The server's own code that makes a model, "file.py:make", in place of what a recipe names.
MODEL: Final = "SLUICEWAY_MODEL"

#: Parts of a job, by their names in its configuration.
CONTROLLER, EXECUTOR = "sluiceway_server", "sluiceway_client"
#: Commands that the admin may send to a running job.
PROGRESS, STOP = "sluiceway.progress", "sluiceway.stop"
#: In a job's workspace on the server: the part of the run folder that the admin downloads.
RESULT, OUTCOME = "run", "outcome.json"


def require_name(name: str) -> str:
    """The name of a run, which becomes a folder's at the server. Raises InputError."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._ =+-]{0,199}", name):
        raise InputError(
            f"{quoted(name)} cannot be the name of a run: letters, digits and . _ = + - alone"
        )
    return name


def refuse_tensors() -> None:
    """From here on, this process neither sends nor accepts tensors by NVFlare's serialisation.

    Collab registers that where it can be imported, which would also import torch everywhere.
    """
    sys.modules.setdefault("nvflare.app_opt.pt.decomposers", None)  # type: ignore[arg-type]


def typed(decorator: Any) -> Callable[[Function], Function]:
    """A decorator of NVFlare, which has no types, as one that changes no type."""

    def apply(function: Function) -> Function:
        decorated: Function = decorator(function)
        return decorated

    return apply
