"""A site's part of a split run: it connects to the server and answers its frames."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from sluiceway.core.batches import Batch
from sluiceway.core.evaluation import label_counts
from sluiceway.core.trial import try_model
from sluiceway.deploy.site_file import Invitation, SiteFile
from sluiceway.deploy.site_images import own_images
from sluiceway.errors import InputError
from sluiceway.experiment.builders import chosen_network
from sluiceway.experiment.remote_runs import split_settings
from sluiceway.split.setup import SharedSetup
from sluiceway.transport.protocol import ClientHandler, Request, Response
from sluiceway.transport.site import ClientStateStore, SiteError
from sluiceway.transport.split_site import SplitTrainer
from sluiceway.transport.tls import Credentials, TlsClient


class SplitRun(ClientHandler):
    """A client's part; once it is connected, the transport has nothing to carry."""

    def __init__(self, client: TlsClient) -> None:
        self.client = client

    def handle(self, request: Request, folder: Path) -> Response:
        """Raises SiteError."""
        raise SiteError(f"a split run has no {request.what!r}")

    def close(self) -> None:
        """Disconnect."""
        self.client.close()


def begin_split(
    file: SiteFile,
    place: Path,
    folder: Path,
    invited: Invitation,
    device: str,
    keys: Credentials | None,
    leave: Callable[[], None],
) -> tuple[SplitRun, dict[str, Any]]:
    """Prepare, connect, and report the label counts.

    Args:
        place: folder that the file's paths are relative to.
        folder: for what the site keeps.
        device: where the front runs.
        keys: the site's.
        leave: called when the server says that the run has ended.

    Raises:
        InputError: no keys, or data that a split run cannot use.
    """
    if keys is None or invited.endpoint is None:
        raise InputError("split learning needs a TLS connection, which this engine does not have")
    recipe = invited.recipe
    examples, test = own_images(file.data, place, invited)

    if device == "cpu":
        torch.set_num_threads(recipe.run.threads)
    settings, count = split_settings(recipe, device), len(invited.label_names)
    model = chosen_network(recipe, examples.shape, count, filled=not recipe.trains_front())
    model.to(settings.device)
    if shown := next((held for held in (examples, test) if len(held)), None):
        clients = [examples.subset([]) for _ in range(recipe.data.clients)]
        clients[invited.client] = examples
        given = model, clients, shown, "accuracy", settings.device
        try_model(*given, own_loss=False, must=True)

    def setup(classes: int) -> SharedSetup:
        example = Batch.of(examples if len(examples) else test, torch.tensor([0]), settings.device)
        return SharedSetup(deepcopy(model), settings, example, classes, recipe.data.clients)

    states = ClientStateStore(folder / "states")
    trainer = SplitTrainer(invited.client, examples, setup, states, recipe.run.seed)

    def answer(facts: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes] | None:
        if facts.get("what") == "leave":
            leave()
            return None
        return trainer.answer(facts, body)

    run = SplitRun(TlsClient(keys, *invited.endpoint, answer))
    return run, {"label_counts": label_counts([examples])[0].tolist()}
