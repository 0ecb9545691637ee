"""What both halves of a deployment must agree on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

#: Bytes of a message that cross in one call. NVFlare holds a few copies of them at each end.
CHUNK: Final = 8 << 20
#: Seconds that a site holds back an answer to "are you done" before it says no.
PATIENCE: Final = 5.0
#: Seconds in which a site must answer any call beyond that, and one that carries a chunk, which may
#: have to pass a slow line together with those of others. One that does not is away.
GRACE: Final = 15.0
CARRYING: Final = 120.0

#: Environment of a started kit: its folder, the site's own file, where the server keeps runs, and
#: the address and port on which it takes the lines of split learning.
KIT: Final = "SLUICEWAY_KIT"
SITE: Final = "SLUICEWAY_SITE"
RUNS: Final = "SLUICEWAY_RUNS"
GATE: Final = "SLUICEWAY_GATE"

#: Parts of a job, by their names in its configuration.
CONDUCTOR, RELAY = "conductor", "relay"
#: Questions that the submitter may ask a running job.
TELL, STOP = "sluiceway.tell", "sluiceway.stop"
#: In a job's workspace on the server: the part of the run folder that the submitter takes home.
BROUGHT, OUTCOME = "run", "outcome.json"


def typed(decorator: Any) -> Callable[[Function], Function]:
    """A decorator of NVFlare, which has no types, as one that changes no type."""

    def apply(function: Function) -> Function:
        decorated: Function = decorator(function)
        return decorated

    return apply
