"""A server of Flower answers its own user alone, whose connections the kernel knows."""

from __future__ import annotations

import asyncio
import os
import socket
from typing import Any

import pytest

from sluiceway.deploy.flower import own_user
from sluiceway.deploy.flower.own_user import for_one_user, user_at

pytestmark = pytest.mark.skipif(not own_user.TABLE.exists(), reason="needs /proc/net/tcp")


def answered(near: Any, far: Any, user: int) -> int:
    """The status of a request between two addresses, to a server for one user."""
    sent: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"status": 200})

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "client": near, "server": far}
    asyncio.run(for_one_user(app, user)(scope, send, send))
    return int(sent[0]["status"])


def test_only_its_own_user_is_answered() -> None:
    me = os.getuid()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        far = listener.getsockname()
        with socket.create_connection(far) as connection, listener.accept()[0]:
            near = connection.getsockname()
            assert user_at(near, far) == me
            assert answered(near, far, me) == 200
            assert answered(near, far, me + 1) == 403
            assert answered(None, far, me) == 403
            connection.shutdown(socket.SHUT_WR)  # half closed, the kernel may call it root's
            assert answered(near, far, me) == 403
        assert user_at(near, far) is None


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to be another user for a moment")
def test_another_user_is_seen() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        far = listener.getsockname()
        os.seteuid(65534)
        try:
            connection = socket.create_connection(far)
        finally:
            os.seteuid(0)
        with connection, listener.accept()[0]:
            near = connection.getsockname()
            assert user_at(near, far) == 65534
            assert answered(near, far, 0) == 403
