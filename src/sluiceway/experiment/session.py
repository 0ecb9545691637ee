"""What several runs share, and what a run tells while it goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from sluiceway.data import (
    ImageData,
    ImageDataset,
    TextData,
    TextDataset,
    encode,
    image_datasets,
    limit,
    load_images,
    load_own,
    load_text,
)
from sluiceway.experiment.models import Pretrained
from sluiceway.experiment.recipe import Data
from sluiceway.federated.features import FeatureCache
from sluiceway.federated.rounds import Record

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

    texts: dict[Data, TextData] = field(default_factory=dict)
    tokens: dict[tuple[Data, str], tuple[TextDataset, TextDataset]] = field(default_factory=dict)
    pictures: dict[Data, tuple[ImageData, ImageDataset, ImageDataset]] = field(default_factory=dict)
    features: FeatureCache | None = None

    def data(self, wanted: Data, say: Say) -> TextData:
        """The texts of [data], capped as it says. Raises DataError."""
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
        self, wanted: Data, texts: TextData, loaded: Pretrained
    ) -> tuple[TextDataset, TextDataset]:
        """Train and test texts as tokens of that model."""
        key = (without_partition(wanted), loaded.source)
        if key not in self.tokens:
            self.tokens[key] = (
                TextDataset(
                    encode(texts.train.texts, loaded.tokenizer, wanted.max_tokens),
                    texts.train.labels,
                ),
                TextDataset(
                    encode(texts.test.texts, loaded.tokenizer, wanted.max_tokens),
                    texts.test.labels,
                ),
            )
        return self.tokens[key]

    def feature_cache(self, megabytes: int) -> FeatureCache:
        """One cache for all runs of the session."""
        if self.features is None:
            self.features = FeatureCache(megabytes << 20)
        return self.features


def load_texts(wanted: Data) -> TextData:
    """Texts by name or from the user's file, with the caps applied. Raises DataError."""
    if wanted.path is not None:
        found = load_own(
            wanted.path,
            text_column=wanted.text_column,
            label_column=wanted.label_column,
            test_path=wanted.test_path,
            test_fraction=wanted.test_fraction,
            seed=wanted.seed,
        )
    else:
        assert wanted.name is not None
        found = load_text(wanted.name)
    train = limit(found.train, wanted.limit, wanted.seed) if wanted.limit else found.train
    test = limit(found.test, wanted.test_limit, wanted.seed) if wanted.test_limit else found.test
    return TextData(found.name, found.source, train, test, found.label_names)


def load_pictures(wanted: Data) -> ImageData:
    """Images by name, with the caps applied. Raises DataError."""
    assert wanted.name is not None
    found = load_images(wanted.name)
    train = limit(found.train, wanted.limit, wanted.seed) if wanted.limit else found.train
    test = limit(found.test, wanted.test_limit, wanted.seed) if wanted.test_limit else found.test
    return replace(found, train=train, test=test)


def without_partition(wanted: Data) -> Data:
    """The same examples, whoever holds them: what data and tokens are kept by."""
    return wanted.model_copy(update={"clients": 1, "partition": "iid", "alpha": None})


def described(found: TextData | ImageData) -> str:
    """A data set in a line."""
    return (
        f"data: {found.name} from {found.source}, {len(found.train)} to train, "
        f"{len(found.test)} to test, {len(found.label_names)} classes"
    )
