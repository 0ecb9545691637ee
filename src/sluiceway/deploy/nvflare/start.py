"""Starting the server or a site from its kit."""

from __future__ import annotations

import fcntl
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from sluiceway.deploy.nvflare.kits import ORG, Kit, localise
from sluiceway.deploy.nvflare.names import ENDPOINT, FILES, KIT, MODEL, RUNS, SITE
from sluiceway.errors import InputError
from sluiceway.experiment.own_code import is_code, placed


def command_of(kit: Kit) -> list[str]:
    """The command of NVFlare's process of a kit. Raises InputError: the kit has none."""
    if kit.role == "admin":
        raise InputError(f"{kit.folder} is the admin's kit; it submits, it is not started")
    module, uid = ("server", []) if kit.role == "server" else ("client", [f"uid={kit.name}"])
    return [
        *(sys.executable, "-u", "-m", f"nvflare.private.fed.app.{module}.{module}_train"),
        *("-m", str(kit.folder), "-s", f"fed_{module}.json"),
        *("--set", "secure_train=true", f"org={ORG}", "config_folder=config", *uid),
    ]


def environment_of(
    kit: Kit,
    site: Path | None = None,
    runs: Path | None = None,
    endpoint: str | None = None,
    files: Sequence[str | Path] = (),
    model: str | None = None,
) -> dict[str, str]:
    """The environment of its processes.

    Args:
        site: the site's own file, for a site.
        runs: where run folders are kept, for the server; None for `runs` in the kit.
        endpoint: ADDRESS:PORT to listen on for split learning, for the server; None for any address
            and the port after the server's own. Port 0 is any that is free.
        files: folders of the server from which recipes may name files.
        model: code that makes the model, "file.py:make", for the server.

    Raises:
        InputError: a site without a file, or a server with one.
    """
    # Fewer memory arenas, as in NVFlare's own scripts, so that chunks leave less behind.
    made = {KIT: str(kit.folder), "MALLOC_ARENA_MAX": os.environ.get("MALLOC_ARENA_MAX", "4")}
    if kit.role == "site":
        if site is None:
            raise InputError(f"site {kit.name} needs its site file: --site FILE")
        return made | {SITE: str(site.resolve())}
    if site is not None:
        raise InputError("a server has no site file")
    endpoint = endpoint or f"0.0.0.0:{kit.address[1] + 1}"
    address, _, port = endpoint.rpartition(":")
    if not address or not port.isdecimal() or int(port) > 65535:
        raise InputError(f"--gate {endpoint}: give ADDRESS:PORT, such as 0.0.0.0:8003")
    if model is not None:
        if not is_code(model):
            raise InputError(f"--model {model}: give FILE.py:FUNCTION")
        made |= {MODEL: placed("model.name", model, Path())}
    return (
        made
        | {RUNS: str((runs or kit.folder / "runs").resolve()), ENDPOINT: endpoint}
        | {FILES: json.dumps([str(Path(folder).resolve()) for folder in files])}
    )


def lock(kit: Kit) -> int:
    """A file descriptor that locks a kit as long as it is open. Raises InputError."""
    handle = os.open(kit.folder / "running.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise InputError(f"{kit.folder} is started already; a kit runs once at a time") from None
    return handle


def start_here(kit: Kit, environment: Mapping[str, str]) -> None:
    """Become NVFlare's process of this kit; does not return.

    Raises:
        InputError: it runs already.
    """
    command = command_of(kit)
    os.set_inheritable(lock(kit), True)
    localise(kit)
    os.environ.update(environment)
    os.execv(command[0], command)
