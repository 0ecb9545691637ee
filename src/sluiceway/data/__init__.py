"""Data sets by name or file, their partition over clients, their tokens and their augmentation.

What needs torch is imported when it is asked for, so that recipes are checked without it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sluiceway.data.choices import CHOICE_NAMES, load_choices
from sluiceway.data.columns import is_missing, read_columns
from sluiceway.data.download import cache_folder, wheel_folder, wheel_members
from sluiceway.data.errors import DataError
from sluiceway.data.image_files import read_image_files
from sluiceway.data.images import IMAGE_NAMES, load_images
from sluiceway.data.own_images import load_own_images
from sluiceway.data.partition import partition
from sluiceway.data.tables import (
    AnyTable,
    ChoiceData,
    ChoiceTable,
    ImageData,
    ImageTable,
    TextData,
    TextTable,
    coarse_labels,
    holdout,
    limit,
    local_tests,
    of_classes,
)
from sluiceway.data.text import TEXT_NAMES, load_own, load_text

if TYPE_CHECKING:
    from sluiceway.data.tokens import (
        check_tokenizer,
        encode,
        encode_choices,
        encode_pairs,
        word_tokens,
    )
    from sluiceway.data.torch_datasets import ImageDataset, TextDataset, image_datasets

__all__ = [
    "CHOICE_NAMES",
    "IMAGE_NAMES",
    "TEXT_NAMES",
    "AnyTable",
    "ChoiceData",
    "ChoiceTable",
    "DataError",
    "ImageData",
    "ImageDataset",
    "ImageTable",
    "TextData",
    "TextDataset",
    "TextTable",
    "cache_folder",
    "check_tokenizer",
    "coarse_labels",
    "encode",
    "encode_choices",
    "encode_pairs",
    "holdout",
    "image_datasets",
    "is_missing",
    "limit",
    "load_choices",
    "load_images",
    "load_own",
    "load_own_images",
    "load_text",
    "local_tests",
    "of_classes",
    "partition",
    "read_columns",
    "read_image_files",
    "wheel_folder",
    "wheel_members",
    "word_tokens",
]

_WITH_TORCH = {
    "tokens": ("check_tokenizer", "encode", "encode_choices", "encode_pairs", "word_tokens"),
    "torch_datasets": ("ImageDataset", "TextDataset", "image_datasets"),
}


def __getattr__(name: str) -> Any:
    for module, names in _WITH_TORCH.items():
        if name in names:
            found = globals()[name] = getattr(import_module(f"{__name__}.{module}"), name)
            return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
