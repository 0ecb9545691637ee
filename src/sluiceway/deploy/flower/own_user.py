"""Flower's servers for the processes of one user alone, on a machine that others use too.

    python -P -m sluiceway.deploy.flower.own_user flower-superlink --host 127.0.0.1 ...

A SuperLink takes runs, which are code, from whoever reaches its port, and these releases of Flower
have no password for it. The kernel knows, in /proc/net/tcp, which user a connection of this machine
belongs to: a request of another one is answered with 403, whatever it asks for.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Final

#: The kernel's table of IPv4 connections (Linux).
TABLE: Final = Path("/proc/net/tcp")
#: A connection in it that is open at both ends. The kernel calls others root's once closed.
ESTABLISHED: Final = "01"

Address = tuple[str, int]
Messages = Callable[..., Awaitable[Any]]
App = Callable[[MutableMapping[str, Any], Messages, Messages], Awaitable[None]]


def user_at(near: Address, far: Address) -> int | None:
    """The user who holds the near end of an open connection of this machine; None if none does."""
    wanted = [in_hex(near), in_hex(far), ESTABLISHED]
    for row in TABLE.read_text().splitlines()[1:]:
        fields = row.split()
        if fields[1:4] == wanted:
            return int(fields[7])
    return None


def in_hex(address: Address) -> str:
    """An IPv4 address and port as the table has them: the address in the machine's byte order."""
    host, port = address
    return f"{int.from_bytes(socket.inet_aton(host), sys.byteorder):08X}:{port:04X}"


def for_one_user(app: App, user: int) -> App:
    """The ASGI application `app`, which answers this user's requests only."""

    async def guarded(scope: MutableMapping[str, Any], receive: Messages, send: Messages) -> None:
        if scope["type"] != "lifespan":
            near, far = (tuple(scope[end] or ("0.0.0.0", 0)) for end in ("client", "server"))
            if user_at(near, far) != user:
                await send({"type": "http.response.start", "status": 403, "headers": []})
                await send({"type": "http.response.body", "body": b"another user's"})
                return
        await app(scope, receive, send)

    return guarded


def main() -> None:
    """Run the program that is named first, with the arguments after its name."""
    import uvicorn

    load = uvicorn.Config.load

    def load_guarded(config: uvicorn.Config) -> None:
        load(config)
        # Outermost: what is within believes X-Forwarded-For of loopback.
        config.loaded_app = for_one_user(config.loaded_app, os.getuid())

    setattr(uvicorn.Config, "load", load_guarded)  # noqa: B010  (mypy)
    sys.argv = sys.argv[1:]
    (program,) = entry_points(group="console_scripts", name=sys.argv[0])
    program.load()()


if __name__ == "__main__":
    main()
