"""A site's images: its own, by name, or its part of the recipe's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sluiceway.data import ImageData, ImageDataset, image_datasets, limit, load_own_images
from sluiceway.data.own import Paths
from sluiceway.deploy.site_file import Invitation, OwnData
from sluiceway.errors import InputError
from sluiceway.experiment.builders import image_set, parts_of
from sluiceway.experiment.recipe import Data
from sluiceway.experiment.session import Session, image_form
from sluiceway.files import listed


def own_images(
    own: OwnData, place: Path, invited: Invitation, *, augment: bool = True
) -> tuple[ImageDataset, ImageDataset]:
    """The site's training images, and test images of the same data.

    Own images are made what those of the run are: in shape, and in mean and std.

    Args:
        own: [data] of the site file.
        place: folder that its paths are relative to.
        invited: what the server sent.
        augment: False leaves training images as they are, whatever the recipe says.

    Raises:
        DataError: they cannot be read, or one has a label that the run has not.
        InputError: the data set by that name has other classes.
    """
    recipe, session = invited.recipe, Session()
    if own.share:
        found, train, test = session.images(recipe.data, lambda line: None, augment=augment)
        return train.subset(parts_of(recipe, found)[invited.client]), test
    augment = augment and recipe.data.augment
    if own.path is not None:
        return image_datasets(images_of_files(own, place, invited), augment)
    wanted = named_data(own, invited)
    found, train, test = session.images(wanted, lambda line: None, augment=augment)
    if tuple(found.label_names) != invited.label_names:
        raise InputError(f"the classes of {found.name} are not those of the run")
    return train, test


def named_data(own: OwnData, invited: Invitation) -> Data:
    """[data] of a data set by its name at a site, with the run's classes."""
    data = invited.recipe.data
    return Data(
        name=own.name,
        alpha=1,
        limit=own.limit,
        test_limit=data.test_limit,
        # Merged labels have other names than those that are merged.
        classes=data.classes if data.coarse else data.classes and invited.label_names,
        coarse=data.coarse,
        seed=data.seed if data.coarse else 0,
    )


def images_of_files(own: OwnData, place: Path, invited: Invitation) -> ImageData:
    """Images of the site's files, all for training. Raises DataError, InputError."""
    assert own.path is not None
    recipe = invited.recipe
    wanted = recipe.data.model_copy(
        update={
            "encoding": own.encoding,
            "image_column": own.image_column,
            "label_column": own.label_column,
        }
    )
    form = image_form(wanted)
    if recipe.data.name is not None:
        known = image_set(recipe.data, (1, 1, 1))
        form = replace(form, shape=known.shape, mean=known.mean, std=known.std)
    train, test = within(place, own.path), within(place, own.test_path or own.path)
    found = load_own_images(
        train, form, test, label_names=invited.label_names, classes=own.taken(invited)
    )
    kept = limit(found.train, own.limit, recipe.data.seed) if own.limit else found.train
    return found.with_tables(kept, found.test if own.test_path else found.test.take([]))


def within(place: Path, paths: str | Sequence[str]) -> Paths:
    """Paths of a site file, found relative to it."""
    return [place / each for each in listed(paths)]
