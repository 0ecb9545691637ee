"""How a data set is read by a model: its texts as tokens, and the module that answers.

The data tell what is asked (a class of a text, or an ending of a context), `model.answer` how it is
answered (a head on the hidden states, or the likelihood that a language model gives).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from sluiceway.data import (
    ChoiceData,
    ChoiceTable,
    TextData,
    TextDataset,
    TextTable,
    encode,
    encode_choices,
    encode_pairs,
    word_tokens,
)
from sluiceway.errors import InputError
from sluiceway.experiment.answers import Endings, TextClassifier, Words, is_encoder_decoder
from sluiceway.experiment.models import Pretrained
from sluiceway.experiment.recipe import Model

#: Tokens by which a text's tokens may grow when it stands in a prompt.
SLACK = 4


def read(
    table: TextTable | ChoiceTable, loaded: Pretrained, model: Model, max_tokens: int
) -> TextDataset:
    """The examples as tokens of that model. Raises DataError."""
    return TextDataset(tokens(table, loaded, model, max_tokens), table.labels)


def tokens(
    table: TextTable | ChoiceTable, loaded: Pretrained, model: Model, max_tokens: int
) -> dict[str, Tensor]:
    """What the module of `answer_of` is called with, a row an example. Raises DataError."""
    tokenizer = loaded.tokenizer
    if isinstance(table, ChoiceTable):
        pairs = model.answer == "likelihood" and is_encoder_decoder(loaded.backbone)
        encoded = encode_pairs if pairs else encode_choices
        return encoded(table.contexts, table.endings, tokenizer, max_tokens)
    if model.answer == "head":
        return encode(table.texts, tokenizer, max_tokens)
    return encode(prompted(table.texts, model.prompt, tokenizer, max_tokens), tokenizer, max_tokens)


def prompted(texts: Sequence[str], prompt: str, tokenizer: Any, max_tokens: int) -> list[str]:
    """The prompt with each text in it; long texts are cut, so that the prompt's end stays.

    Raises:
        InputError: the prompt alone does not fit.
    """

    def bare(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    special = tokenizer.num_special_tokens_to_add()
    room = max_tokens - special - len(bare(prompt.format(text=""))) - SLACK
    if room < 1:
        raise InputError(
            f"data.max_tokens = {max_tokens} leaves no room for a text in model.prompt"
        )
    found = []
    for text in texts:
        ids = bare(text)
        short = text if len(ids) <= room else tokenizer.decode(ids[:room])
        found.append(prompt.format(text=short))
    return found


def answer_of(
    data: TextData | ChoiceData, loaded: Pretrained, model: Model
) -> Callable[[nn.Module], nn.Module]:
    """What puts the answering module around the loaded model. Raises DataError, InputError."""
    choices = isinstance(data, ChoiceData)
    if model.answer == "head":
        outputs = 1 if choices else len(data.label_names)
        return lambda body: TextClassifier(body, loaded.hidden, outputs)
    if choices:
        return Endings
    words = model.words or [name.replace("_", " ") for name in data.label_names]
    if len(words) != len(data.label_names):
        raise InputError(
            f"model.words has {len(words)} words for {len(data.label_names)} classes: "
            f"{', '.join(data.label_names)}"
        )
    behind = model.prompt.rpartition("}")[2].strip() or "text"
    if is_encoder_decoder(loaded.backbone):
        behind = "text"  # the decoder begins with the word
    ids = word_tokens(words, loaded.tokenizer, behind)
    return lambda body: Words(body, ids)
