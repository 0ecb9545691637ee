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
    return _pad(rows, lengths, tokenizer.pad_token_id or 0)


def _pad(rows: Sequence[Sequence[int]], lengths: IntArray, pad: int) -> dict[str, Tensor]:
    width = int(lengths.max(initial=0))
    mask = np.arange(width) < lengths[:, None]
    ids = np.full(mask.shape, pad, dtype=np.int64)
    ids[mask] = [token for row in rows for token in row]
    return {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(mask.astype(np.int64)),
    }


class TextDataset(LabelledRows[dict[str, Tensor]]):
    """Tokenised texts with labels.

    `dataset[i]` is ({"input_ids": int64 [S], "attention_mask": int64 [S]}, label int64 []).

    Args:
        inputs: what `encode` returns, int64 [N, S] each.
        labels: int64 [N].

    Raises:
        DataError: inputs and labels differ in length.
    """

    def __init__(self, inputs: dict[str, Tensor], labels: IntArray | Tensor) -> None:
        super().__init__(labels)
        for name, tensor in inputs.items():
            if tensor.shape[0] != len(self):
                raise DataError(f"{name} has {tensor.shape[0]} rows for {len(self)} labels")
        mask = inputs["attention_mask"]
        self._inputs = inputs
        positions = torch.arange(1, mask.shape[1] + 1)
        # Where the last token ends; right padding alone is cut, whatever lies before stays.
        self._lengths = torch.nn.functional.pad(mask * positions, (1, 0)).amax(dim=1)

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
            The inputs, int64 [B, S'] each with S' the longest row's number of tokens, and the
            labels, int64 [B].
        """
        rows = self._rows[torch.as_tensor(indices, dtype=torch.int64)]
        width = int(self._lengths[rows].max()) if len(rows) else 0
        batch = {
            name: tensor[:, :width].index_select(0, rows) for name, tensor in self._inputs.items()
        }
        return batch, self._labels[rows]
