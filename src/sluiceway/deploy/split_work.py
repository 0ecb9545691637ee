"""A site's part of a split run: it dials the server and answers what comes down the line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from sluiceway.core.batches import Batch
from sluiceway.core.evaluation import label_counts
from sluiceway.data import ImageDataset
from sluiceway.deploy.site_file import Invitation, Own, SiteFile
from sluiceway.errors import InputError
from sluiceway.experiment.builders import chosen_compressor, chosen_network, parts_of
from sluiceway.experiment.recipe import Data, Recipe
from sluiceway.experiment.session import Session
from sluiceway.split.setup import SharedSetup, SplitSettings
from sluiceway.strategies import STRATEGIES
from sluiceway.transport.protocol import Request, Response
from sluiceway.transport.site import ClientStateStore, SiteError
from sluiceway.transport.split_site import SplitTrainer
from sluiceway.transport.tls import Credentials, TlsClient


class SplitWork:
    """A client's part; the carrier has nothing to bring once the line is there."""

    def __init__(self, dialler: TlsClient) -> None:
        self.dialler = dialler

    def answer(self, ask: Request, folder: Path) -> Response:
        """Raises SiteError."""
        raise SiteError(f"a split run has no {ask.what!r}")

    def close(self) -> None:
        """Hang up."""
        self.dialler.close()


def begin_split(
    file: SiteFile,
    folder: Path,
    invited: Invitation,
    device: str,
    keys: Credentials | None,
    ended: Callable[[], None],
) -> tuple[SplitWork, dict[str, Any]]:
    """Prepare, dial, and say how much the site holds.

    Args:
        device: where the front runs.
        keys: the site's.
        ended: called when the server says that the run has ended.

    Raises:
        InputError: no keys, or the data are not to be had.
    """
    if keys is None or invited.gate is None:
        raise InputError("split learning needs a line to the server, which this engine has not")
    recipe = invited.recipe
    examples, test = own_images(file.data, recipe, invited)

    def grounds(classes: int) -> SharedSetup:
        if device == "cpu":
            torch.set_num_threads(recipe.run.threads)
        return ground_of(recipe, examples, test, classes, len(invited.label_names), device)

    trainer = SplitTrainer(
        invited.client, examples, grounds, ClientStateStore(folder / "states"), recipe.run.seed
    )

    def answer(facts: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes] | None:
        if facts.get("what") == "leave":
            ended()
            return None
        return trainer.answer(facts, body)

    work = SplitWork(TlsClient(keys, *invited.gate, answer))
    return work, {"label_counts": label_counts([examples])[0].tolist()}


def ground_of(
    recipe: Recipe,
    examples: ImageDataset,
    test: ImageDataset,
    classes: int,
    outputs: int,
    device: str,
) -> SharedSetup:
    """What both sides make alike."""
    chosen = recipe.model
    assert chosen.cut is not None
    model = chosen_network(recipe, examples.shape, outputs)
    place = torch.device(device)
    example = Batch.of(examples if len(examples) else test, torch.tensor([0]), place)
    settings = SplitSettings(
        chosen.cut,
        chosen_compressor(recipe),
        recipe.run.schedule,
        chosen.tail,
        STRATEGIES[recipe.run.client_aggregation](),
        recipe.training(),
        F.cross_entropy,
        place,
        recipe.run.seed,
    )
    return SharedSetup(model, settings, example, classes, recipe.data.clients)


def own_images(own: Own, recipe: Recipe, invited: Invitation) -> tuple[ImageDataset, ImageDataset]:
    """What the site trains on, and the test set of the same data. Raises DataError, InputError."""
    if own.path is not None:
        raise InputError("data.path takes texts; in a split run give data.name or data.share")
    session = Session()
    if own.share:
        found, train, test = session.images(recipe.data, lambda line: None)
        train = train.subset(parts_of(recipe, found)[invited.client])
    else:
        wanted = Data(name=own.name, alpha=1, limit=own.limit, augment=recipe.data.augment)
        found, train, test = session.images(wanted, lambda line: None)
    if tuple(found.label_names) != invited.label_names:
        raise InputError(f"the classes of {found.name} are not those of the run")
    return train, test
