"""Texts as tensors of tokens, and fast batches out of them."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sluiceway.data.errors import DataError
from sluiceway.data.rows import LabelledRows
from sluiceway.data.tables import IntArray

_BATCH = 1000


class Tokenizer(Protocol):
    """What `encode` needs of a Hugging Face tokenizer."""

    pad_token_id: int | None

    def __call__(
        self,
        text: list[str],
        *,
        truncation: bool,
        max_length: int,
        padding: bool,
        return_attention_mask: bool,
        return_token_type_ids: bool,
    ) -> "Encoding": ...

    def num_special_tokens_to_add(self) -> int: ...


class Vocabulary(Protocol):
    """What `check_tokenizer` needs of a Hugging Face tokenizer."""

    def get_vocab(self) -> dict[str, int]: ...


class Encoding(Protocol):
    """A tokenizer's answer: lists by name."""

    def __getitem__(self, name: str, /) -> list[list[int]]: ...


def encode(texts: Sequence[str], tokenizer: Tokenizer, max_tokens: int) -> dict[str, Tensor]:
    """Tokenise texts and pad them on the right to the longest of them.

    Args:
        texts: N texts.
        tokenizer: a Hugging Face tokenizer; the padding is its pad token, or 0 where it has none.
        max_tokens: texts are cut to this many tokens, special tokens included; above the number
            of special tokens.

    Returns:
        `input_ids` and `attention_mask` (1 for a token, 0 for padding), int64 [N, S] with
        S <= max_tokens the length of the longest text.

    Raises:
        DataError: `max_tokens` is too small, or a text yields no token at all.
    """
    special = tokenizer.num_special_tokens_to_add()
    if max_tokens <= special:
        raise DataError(f"max_tokens is {max_tokens}: it must be {special + 1} or more")
    rows: list[list[int]] = []
    for start in range(0, len(texts), _BATCH):
        encoding = tokenizer(
            list(texts[start : start + _BATCH]),
            truncation=True,
            max_length=max_tokens,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        rows.extend(encoding["input_ids"])
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    if not lengths.all():
        first = int(np.argmin(lengths))
        raise DataError(f"text {first} ({texts[first][:40]!r}) has no tokens: it must have one")
    ids, mask = pad_rows(rows, tokenizer.pad_token_id)
    return {"input_ids": ids, "attention_mask": mask}


def check_tokenizer(tokenizer: Vocabulary, vocabulary: int) -> None:
    """Refuse a tokenizer whose tokens a model has no embeddings for.

    Args:
        tokenizer: a Hugging Face tokenizer.
        vocabulary: the model's number of embedding rows; more than there are tokens is fine.

    Raises:
        DataError: the tokenizer has a token id of `vocabulary` or more.
    """
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= vocabulary:
        raise DataError(
            f"the tokenizer has token ids up to {highest}, but the model embeds only "
            f"0..{vocabulary - 1}: tokenizer and model must belong together"
        )


def pad_rows(rows: Sequence[Sequence[int]], pad: int | None) -> tuple[Tensor, Tensor]:
    """Rows of N token lists, padded on the right with `pad` (0 where it is None).

    Returns:
        Ids and mask (1 for a token, 0 for padding), int64 [N, S] with S the longest row's length.
    """
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    width = int(lengths.max(initial=0))
    mask = np.arange(width) < lengths[:, None]
    ids = np.full(mask.shape, pad or 0, dtype=np.int64)
    ids[mask] = [token for row in rows for token in row]
    return torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64))


class TextDataset(LabelledRows[dict[str, Tensor]]):
    """Tokenised texts, or contexts and their endings, with labels.

    `dataset[i]` is (row i of every input, label int64 []): {"input_ids": int64 [S],
    "attention_mask": int64 [S]} of a text.

    Args:
        inputs: what `encode`, `encode_choices` or `encode_pairs` returns: int64 [N, S] or
            [N, C, S] each. Inputs named decoder_... are padded as "decoder_attention_mask" tells,
            all others as "attention_mask" tells.
        labels: int64 [N].

    Raises:
        DataError: inputs and labels differ in length, a mask is missing, or an input and its mask
            differ in width.
    """

    def __init__(self, inputs: dict[str, Tensor], labels: IntArray | Tensor) -> None:
        super().__init__(labels)
        for name, tensor in inputs.items():
            if tensor.shape[0] != len(self):
                raise DataError(f"{name} has {tensor.shape[0]} rows for {len(self)} labels")
            mask = inputs.get(_mask_of(name))
            if mask is None:
                raise DataError(f"{name} comes without its {_mask_of(name)}")
            if tensor.shape[-1] != mask.shape[-1]:
                raise DataError(
                    f"{name} is {tensor.shape[-1]} wide and its {_mask_of(name)} "
                    f"{mask.shape[-1]}: they must be alike"
                )
        self._inputs = inputs
        self._lengths = {mask: _lengths(inputs[mask]) for mask in map(_mask_of, inputs)}

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], Tensor]:
        row = self._rows[index]
        return {name: tensor[row] for name, tensor in self._inputs.items()}, self._labels[row]

    def gather(
        self, indices: Sequence[int] | IntArray | Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """A batch, without the padding that no row of it needs.

        Args:
            indices: B row numbers, each 0..N-1.

        Returns:
            The inputs, int64 [B, S'] or [B, C, S'] each with S' the longest row's number of tokens
            by the input's mask, and the labels, int64 [B].
        """
        rows = self._rows[torch.as_tensor(indices, dtype=torch.int64)]
        widths = {
            mask: int(lengths[rows].max()) if len(rows) else 0
            for mask, lengths in self._lengths.items()
        }
        batch = {
            name: tensor[..., : widths[_mask_of(name)]].index_select(0, rows)
            for name, tensor in self._inputs.items()
        }
        return batch, self._labels[rows]


def _mask_of(name: str) -> str:
    """The mask that tells which part of an input is padding."""
    return "decoder_attention_mask" if name.startswith("decoder_") else "attention_mask"


def _lengths(mask: Tensor) -> Tensor:
    """Where the last token of each row ends, int64 [N], of a mask [N, S] or [N, C, S].

    Right padding alone counts as padding: whatever lies before the last token stays.
    """
    positions = torch.arange(1, mask.shape[-1] + 1)
    # With a leading 0 there is always something to take the maximum of.
    return torch.nn.functional.pad((mask * positions).flatten(1), (1, 0)).amax(dim=1)
