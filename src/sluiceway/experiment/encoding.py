"""A data set's examples as tokens of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sluiceway.data import (
    ChoiceTable,
    TextDataset,
    TextTable,
    encode,
    encode_choices,
    encode_pairs,
)
from sluiceway.errors import InputError
from sluiceway.experiment.heads import is_encoder_decoder
from sluiceway.experiment.models import Pretrained
from sluiceway.experiment.recipe import Model

#: Tokens by which a text's tokens may grow when it stands in a prompt.
SLACK = 4


def encoded(
    table: TextTable | ChoiceTable, loaded: Pretrained, model: Model, max_tokens: int
) -> TextDataset:
    """The examples as the model's head takes them. Raises DataError, InputError."""
    tokenizer = loaded.tokenizer
    tokens: dict[str, Tensor]
    if isinstance(table, ChoiceTable):
        pairs = model.answer == "likelihood" and is_encoder_decoder(loaded.backbone)
        encode_table = encode_pairs if pairs else encode_choices
        tokens = encode_table(table.contexts, table.endings, tokenizer, max_tokens)
    else:
        texts: Sequence[str] = table.texts
        if model.answer == "likelihood":
            texts = prompted(texts, model.prompt, tokenizer, max_tokens)
        tokens = encode(texts, tokenizer, max_tokens)
    width = max(tensor.shape[-1] for tensor in tokens.values())
    if width > (most := positions(loaded)):
        raise InputError(
            f"data.max_tokens = {max_tokens}: a text has {width} tokens, and the model takes {most}"
        )
    return TextDataset(tokens, table.labels)


def positions(loaded: Pretrained) -> int:
    """Tokens that a model takes, as its configuration and its tokenizer say; many if none does."""
    config: Any = getattr(loaded.backbone, "config", None)
    texts = config.get_text_config() if hasattr(config, "get_text_config") else config
    known = getattr(texts, "max_position_embeddings", None)
    told = [known, getattr(loaded.tokenizer, "model_max_length", None)]
    for name, module in loaded.backbone.named_modules():
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None:
            # RoBERTa and its like count positions from behind the padding's.
            told.append(module.num_embeddings - padding - 1)
    return min((one for one in told if isinstance(one, int) and one > 0), default=1 << 30)


def prompted(texts: Sequence[str], prompt: str, tokenizer: Any, max_tokens: int) -> list[str]:
    """The prompt with each text in it; long texts are cut, so that the prompt's end stays.

    Raises:
        InputError: the prompt alone does not fit.
    """

    def ids_of(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    special = tokenizer.num_special_tokens_to_add()
    room = max_tokens - special - len(ids_of(prompt.format(text=""))) - SLACK
    if room < 1:
        raise InputError(
            f"data.max_tokens = {max_tokens} leaves no room for a text in model.prompt"
        )
    found = []
    for text in texts:
        ids = ids_of(text)
        short = text if len(ids) <= room else tokenizer.decode(ids[:room])
        found.append(prompt.format(text=short))
    return found
