"""What several runs share, and what a run tells while it goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from sluiceway.core.round_loop import Record
from sluiceway.data import (
    CHOICE_NAMES,
    ChoiceData,
    ImageData,
    ImageDataset,
    TextData,
    TextDataset,
    holdout,
    image_datasets,
    limit,
    load_choices,
    load_images,
    load_own,
    load_text,
)
from sluiceway.data.tables import AnyTable
from sluiceway.experiment.encoding import encoded
from sluiceway.experiment.models import Pretrained
from sluiceway.experiment.recipe import Data, Model
from sluiceway.federated.frozen_prefix import FeatureCache

#: Lines for people while a run goes on.
Say = Callable[[str], None]


@dataclass
class Progress:
    """What a run tells while it goes on; the command line replaces these with a progress bar."""

    say: Say = lambda line: None
    begin: Callable[[int], None] = lambda rounds: None
    on_start: Callable[[], None] = lambda: None
    on_round: Callable[[Record], None] = lambda record: None
    on_update: Callable[[int, int], None] = lambda done, of: None


@dataclass
class Session:
    """Keeps what several runs share: loaded data, tokens, and frozen layers' outputs."""

    texts: dict[Data, TextData | ChoiceData] = field(default_factory=dict)
    tokens: dict[tuple[str, ...], tuple[TextDataset, TextDataset]] = field(default_factory=dict)
    pictures: dict[Data, tuple[ImageData, ImageDataset, ImageDataset]] = field(default_factory=dict)
    features: FeatureCache | None = None

    def data(self, wanted: Data, say: Say) -> TextData | ChoiceData:
        """The texts or questions of [data], capped as it says. Raises DataError."""
        key = without_partition(wanted)
        if key not in self.texts:
            self.texts[key] = load_texts(wanted)
            say(described(self.texts[key]))
        return self.texts[key]

    def images(self, wanted: Data, say: Say) -> tuple[ImageData, ImageDataset, ImageDataset]:
        """The images of [data], capped as it says, and as train and test sets. Raises DataError."""
        key = without_partition(wanted)
        if key not in self.pictures:
            found = load_pictures(wanted)
            self.pictures[key] = (found, *image_datasets(found, wanted.augment))
            say(described(found))
        return self.pictures[key]

    def encoded(
        self, wanted: Data, data: TextData | ChoiceData, loaded: Pretrained, model: Model
    ) -> tuple[TextDataset, TextDataset]:
        """Train and test examples as tokens of that model, for the answer that it is to give."""
        asked = without_partition(wanted).model_dump_json()
        key = (asked, loaded.source, model.answer, model.prompt)
        if key not in self.tokens:
            train, test = (
                encoded(table, loaded, model, wanted.max_tokens)
                for table in (data.train, data.test)
            )
            self.tokens[key] = train, test
        return self.tokens[key]

    def feature_cache(self, megabytes: int) -> FeatureCache:
        """One cache for all runs of the session."""
        if self.features is None:
            self.features = FeatureCache(megabytes << 20)
        return self.features


def load_texts(wanted: Data) -> TextData | ChoiceData:
    """Texts or questions by name, or from the user's file, with the caps applied.

    Raises:
        DataError: they are not to be had.
    """
    if wanted.name in CHOICE_NAMES:
        found = load_choices(wanted.name)
        asked, held = capped(found.train, found.test, wanted)
        return found.with_tables(asked, held)
    texts = load_own_texts(wanted) if wanted.path is not None else load_text(str(wanted.name))
    train, test = capped(texts.train, texts.test, wanted)
    return texts.with_tables(train, test)


def load_own_texts(wanted: Data) -> TextData:
    """Texts from the user's file. Raises DataError."""
    return load_own(
        str(wanted.path),
        text_column=wanted.text_column,
        label_column=wanted.label_column,
        test_path=wanted.test_path,
        test_fraction=wanted.test_fraction,
        seed=wanted.seed,
    )


def capped(train: AnyTable, test: AnyTable, wanted: Data) -> tuple[AnyTable, AnyTable]:
    """What is trained on and what is tested on, with the caps that [data] sets.

    With `validation` the test set is a part of the training examples, and the real one is unused.

    Raises:
        DataError: there are too few examples to hold some out.
    """
    if wanted.validation:
        train, test = holdout(train, wanted.validation, wanted.seed)
    return (
        limit(train, wanted.limit, wanted.seed) if wanted.limit else train,
        limit(test, wanted.test_limit, wanted.seed) if wanted.test_limit else test,
    )


def load_pictures(wanted: Data) -> ImageData:
    """Images by name, with the caps applied. Raises DataError."""
    assert wanted.name is not None
    found = load_images(wanted.name)
    train, test = capped(found.train, found.test, wanted)
    return found.with_tables(train, test)


def without_partition(wanted: Data) -> Data:
    """The same examples without their partition: the key of loaded data and tokens."""
    return wanted.model_copy(update={"clients": 1, "partition": "iid", "alpha": None})


def described(found: TextData | ChoiceData | ImageData) -> str:
    """One line about a data set."""
    return (
        f"data: {found.name} from {found.source}, {len(found.train)} to train, "
        f"{len(found.test)} to test, {len(found.label_names)} classes"
    )
