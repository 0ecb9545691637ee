"""The ClientApp: hands requests of a ServerApp to the site on this machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from sluiceway.deploy.chunks import ChunkHandler
from sluiceway.deploy.flower.records import reply_to
from sluiceway.transport.protocol import ClientHandler


def site_app(
    opened: Callable[[Context], ClientHandler], folder: Callable[[Context], Path]
) -> ClientApp:
    """A ClientApp for a site.

    Flower starts a process for every message, so the site is opened anew each time, and only when
    a request has arrived whole. What must outlive a message is in files, or in a `SiteProcess`.

    Args:
        opened: opens the site of a node.
        folder: of this node, for files of transfers; made if it does not exist.
    """
    app = ClientApp()

    @app.query("sluiceway")
    def answer(message: Message, context: Context) -> Message:
        return reply_to(
            message,
            lambda chunk: ChunkHandler(folder(context), lambda: opened(context)).handle(chunk),
        )

    return app
