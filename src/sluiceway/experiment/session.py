"""What several runs share, and what a run tells while it goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from sluiceway.core.round_loop import Record
from sluiceway.core.waits import announced
from sluiceway.data import (
    CHOICE_NAMES,
    ChoiceData,
    ImageData,
    ImageDataset,
    TextData,
    TextDataset,
    cache_folder,
    coarse_labels,
    holdout,
    image_datasets,
    limit,
    load_choices,
    load_images,
    load_own,
    load_own_images,
    load_text,
    of_classes,
)
from sluiceway.data.own_images import Form
from sluiceway.data.tables import AnyTable, Labelled
from sluiceway.experiment.encoding import encoded
from sluiceway.experiment.models import Pretrained
from sluiceway.experiment.recipe import Data, Model
from sluiceway.federated.feature_files import FeatureFiles
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
        """The texts or questions of [data], limited as it says. Raises DataError."""
        key = without_partition(wanted)
        if key not in self.texts:
            with announced("reading the data"):
                self.texts[key] = load_texts(wanted)
            say(described(self.texts[key]))
        return self.texts[key]

    def images(
        self, wanted: Data, say: Say, *, augment: bool = True
    ) -> tuple[ImageData, ImageDataset, ImageDataset]:
        """The images of [data], limited as it says, also as data sets. Raises DataError."""
        augment = augment and wanted.augment
        key = without_partition(wanted).model_copy(update={"augment": augment})
        if key not in self.pictures:
            with announced("reading the data"):
                found = load_pictures(wanted)
            self.pictures[key] = (found, *image_datasets(found, augment))
            say(described(found))
        return self.pictures[key]

    def encoded(
        self, wanted: Data, data: TextData | ChoiceData, loaded: Pretrained, model: Model
    ) -> tuple[TextDataset, TextDataset]:
        """Train and test examples as tokens of that model, for its head."""
        asked = without_partition(wanted).model_dump_json()
        key = (asked, loaded.source, model.answer, model.prompt)
        if key not in self.tokens:
            tables = data.train, data.test
            with announced(f"tokenising {sum(map(len, tables)):,} examples"):
                train, test = (encoded(t, loaded, model, wanted.max_tokens) for t in tables)
            self.tokens[key] = train, test
        return self.tokens[key]

    def feature_cache(self, memory_mb: int, disk_mb: int) -> FeatureCache:
        """One cache for all runs of the session."""
        if self.features is None:
            files = FeatureFiles(cache_folder() / "features", disk_mb << 20)
            self.features = FeatureCache(memory_mb << 20, files)
        return self.features


def load_texts(wanted: Data) -> TextData | ChoiceData:
    """Texts or questions by name, or from the user's file, limited. Raises DataError."""
    if wanted.name in CHOICE_NAMES:
        questions = chosen_classes(load_choices(wanted.name), wanted)
        return questions.with_tables(*capped(questions.train, questions.test, wanted))
    if wanted.path is None:
        texts = load_text(str(wanted.name))
    else:
        texts = load_own(
            wanted.path,
            text_column=wanted.text_column,
            label_column=wanted.label_column,
            test_path=wanted.test_path,
            test_fraction=wanted.test_fraction,
            seed=wanted.seed,
            encoding=wanted.encoding,
        )
    texts = chosen_classes(texts, wanted)
    return texts.with_tables(*capped(texts.train, texts.test, wanted))


def load_pictures(wanted: Data) -> ImageData:
    """Images by name, or the user's own, limited. Raises DataError."""
    if wanted.path is None:
        found = load_images(str(wanted.name))
    else:
        found = load_own_images(
            wanted.path,
            image_form(wanted),
            test_path=wanted.test_path,
            test_fraction=wanted.test_fraction,
            seed=wanted.seed,
        )
    found = chosen_classes(found, wanted)
    return found.with_tables(*capped(found.train, found.test, wanted))


def image_form(wanted: Data) -> Form:
    """How own images are to be read."""
    shape = None
    if wanted.image_shape is not None:
        channels, height, width = map(int, wanted.image_shape.split("x"))
        shape = channels, height, width
    return Form(
        shape,
        wanted.image_column,
        wanted.label_column,
        wanted.encoding,
        wanted.mean,
        wanted.std,
    )


def chosen_classes(found: Labelled, wanted: Data) -> Labelled:
    """The examples of the classes that [data] names, merged if it says so. Raises DataError."""
    if wanted.classes is not None:
        found = of_classes(found, wanted.classes)
    return coarse_labels(found, wanted.coarse, wanted.seed) if wanted.coarse else found


def capped(train: AnyTable, test: AnyTable, wanted: Data) -> tuple[AnyTable, AnyTable]:
    """What is trained on and what is tested on, with the limits that [data] sets.

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


def without_partition(wanted: Data) -> Data:
    """The same examples without their partition: the key of loaded data and tokens."""
    same = {"clients": 1, "partition": "iid", "alpha": None, "local_test": 0.0}
    return wanted.model_copy(update=same)


def described(found: TextData | ChoiceData | ImageData) -> str:
    """One line about a data set."""
    return (
        f"data: {found.name} from {found.source}, {len(found.train)} to train, "
        f"{len(found.test)} to test, {len(found.label_names)} classes"
    )
