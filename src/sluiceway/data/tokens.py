"""Texts, contexts with their endings, and label words as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sluiceway.data.errors import DataError
from sluiceway.data.tables import endings_per_row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

#: Texts that a tokenizer is given at once.
_BATCH = 1000


def encode(texts: Sequence[str], tokenizer: Tokenizer, max_tokens: int) -> dict[str, Tensor]:
    """Tokenise texts and pad them on the right to the longest of them.

    Args:
        texts: N texts.
        tokenizer: the padding is its pad token, or 0 where it has none.
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
    rows = _ids(tokenizer, texts, truncation=True, max_length=max_tokens)
    ids, mask = _pad(_with_tokens(rows, texts, "text"), tokenizer)
    return {"input_ids": ids, "attention_mask": mask}


def check_tokenizer(tokenizer: Tokenizer, vocabulary: int) -> None:
    """Refuse a tokenizer whose tokens a model has no embeddings for.

    Args:
        tokenizer: of a model.
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


def encode_choices(
    contexts: Sequence[str],
    endings: Sequence[Sequence[str]],
    tokenizer: Tokenizer,
    max_tokens: int,
) -> dict[str, Tensor]:
    """Tokenise each ending after its context, for decoder-only models and encoders.

    A tokenizer with a separator token (BERT's) makes its own pair of the two, [CLS] context [SEP]
    ending [SEP]. Any other's special tokens lead, then come the context and the ending as it is
    tokenised after a space; nothing follows.

    A row above `max_tokens` loses the start of its context, of which one token always stays: a
    decoder needs it to predict the ending's first. What is still too long loses the ending's tail.

    Args:
        contexts: N texts.
        endings: N rows of C texts, the same C of 2 or more for every row.
        tokenizer: the padding is its pad token, or 0 where it has none.
        max_tokens: of a context with an ending, special tokens included.

    Returns:
        `input_ids`, `attention_mask` (1 for a token, 0 for padding, which is on the right) and
        `ending_mask` (1 for the ending's tokens, special tokens apart), int64 [N, C, S] with
        S <= max_tokens the longest row's length.

    Raises:
        DataError: `max_tokens` leaves no room for a token of each, a context or an ending yields no
            token, or there is not one row of endings, all of one C, for each context.
    """
    choices = endings_per_row(contexts, endings)
    paired = tokenizer.sep_token_id is not None
    special = _special_tokens(tokenizer, pair=paired)
    if not paired:
        special = _SpecialTokens(special.before, [], [])
    lead = "" if paired else _lead(tokenizer)
    room = special.room(max_tokens, least=2)
    heads = _bodies(tokenizer, contexts, "context")
    tails = _bodies(tokenizer, [lead + text for row in endings for text in row], "ending")
    rows, starts, lengths = [], [], []
    for i, whole_tail in enumerate(tails):
        tail = whole_tail[: room - 1]
        head = heads[i // choices][len(tail) - room :]
        leading = [*special.before, *head, *special.between]
        rows.append([*leading, *tail, *special.after])
        starts.append(len(leading))
        lengths.append(len(tail))
    ids, mask = _pad(rows, tokenizer)
    behind = torch.arange(ids.shape[1]) - torch.tensor(starts, dtype=torch.int64)[:, None]
    in_ending = (behind >= 0) & (behind < torch.tensor(lengths, dtype=torch.int64)[:, None])
    shape = (len(contexts), choices, ids.shape[1])
    return {
        "input_ids": ids.view(shape),
        "attention_mask": mask.view(shape),
        "ending_mask": in_ending.long().view(shape),
    }


def encode_pairs(
    contexts: Sequence[str],
    endings: Sequence[Sequence[str]],
    tokenizer: Tokenizer,
    max_tokens: int,
) -> dict[str, Tensor]:
    """Tokenise contexts for an encoder and their endings for its decoder.

    A context above `max_tokens` loses its start, an ending its tail; special tokens stay.

    Args:
        contexts: N texts.
        endings: N rows of C texts, the same C of 2 or more for every row.
        tokenizer: the padding is its pad token, or 0 where it has none.
        max_tokens: of a context, and likewise of an ending, special tokens included.

    Returns:
        `input_ids` and `attention_mask`, int64 [N, S], of the contexts with their special tokens;
        `decoder_labels` and `decoder_attention_mask`, int64 [N, C, T], of the endings with the
        special tokens that the tokenizer puts after a text, such as T5's </s>, and none before.
        Masks are 1 for a token and 0 for padding, which is on the right.

    Raises:
        DataError: as `encode_choices`.
    """
    choices = endings_per_row(contexts, endings)
    special = _special_tokens(tokenizer)
    room, tail_room = special.room(max_tokens, least=1), max_tokens - len(special.after)
    heads = _bodies(tokenizer, contexts, "context")
    tails = _bodies(tokenizer, [text for row in endings for text in row], "ending")
    ids, mask = _pad([[*special.before, *h[-room:], *special.after] for h in heads], tokenizer)
    labels, label_mask = _pad([[*t[:tail_room], *special.after] for t in tails], tokenizer)
    shape = (len(contexts), choices, labels.shape[1])
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "decoder_labels": labels.view(shape),
        "decoder_attention_mask": label_mask.view(shape),
    }


def word_tokens(words: Sequence[str], tokenizer: Tokenizer, after: str) -> Tensor:
    """The first token of each word as it follows a text and a space.

    Args:
        words: C label words.
        tokenizer: of the model that predicts them.
        after: the text that the words follow, such as "Topic:".

    Returns:
        int64 [C].

    Raises:
        DataError: a word yields no token, or two begin with the same one; the line names them.
    """
    before, *wholes = _bodies(tokenizer, [after, *(f"{after} {word}" for word in words)])
    # Where the tokens of the text change with what follows, a word on its own has to do.
    alone = _bodies(tokenizer, [_lead(tokenizer) + word for word in words], "word")
    holders: dict[int, str] = {}
    for word, whole, own in zip(words, wholes, alone, strict=True):
        kept = whole[: len(before)] == before and len(whole) > len(before)
        token = whole[len(before)] if kept else own[0]
        if token in holders:
            raise DataError(
                f"the words {holders[token]!r} and {word!r} both begin with token {token} "
                f"after {after!r}: every label needs a first token of its own"
            )
        holders[token] = word
    return torch.tensor(list(holders), dtype=torch.int64)


@dataclass(frozen=True)
class _SpecialTokens:
    """The special tokens before, between and after the parts of a row."""

    before: list[int]
    between: list[int]
    after: list[int]

    def room(self, max_tokens: int, least: int) -> int:
        """How many tokens fit between them. Raises DataError if fewer than `least`."""
        special = len(self.before) + len(self.between) + len(self.after)
        if max_tokens < special + least:
            raise DataError(f"max_tokens is {max_tokens}: it must be {special + least} or more")
        return max_tokens - special


def _special_tokens(tokenizer: Tokenizer, pair: bool = False) -> _SpecialTokens:
    """What the tokenizer puts around a text, or around and between a pair of texts."""
    (body,) = _bodies(tokenizer, ["a"], "probe")
    pairs = ["a"] if pair else None
    (whole,) = _ids(tokenizer, ["a"], pairs, add_special_tokens=True, verbose=False)
    start = _find(body, whole, 0)
    end = start + len(body)
    if not pair:
        return _SpecialTokens(whole[:start], [], whole[end:])
    second = _find(body, whole, end)
    return _SpecialTokens(whole[:start], whole[end:second], whole[second + len(body) :])


def _find(part: list[int], whole: list[int], start: int) -> int:
    """Where the tokens of a text begin among the special tokens around them."""
    for at in range(start, len(whole) - len(part) + 1):
        if whole[at : at + len(part)] == part:
            return at
    raise DataError("the tokenizer changes a text's tokens where it adds special ones")


def _lead(tokenizer: Tokenizer) -> str:
    """What to put before a text so that its tokens are those it has after a text and a space.

    A space, but nothing for tokenizers that put a space before every text themselves.
    """
    first, spaced, bare, whole = _bodies(tokenizer, ["a", " b", "b", "a b"])
    return "" if first + spaced != whole and first + bare == whole else " "


def _bodies(tokenizer: Tokenizer, texts: Sequence[str], what: str = "") -> list[list[int]]:
    """The tokens of each text without special ones; at least one each if `what` says what it is."""
    # Not verbose: what is too long is cut later.
    rows = _ids(tokenizer, texts, add_special_tokens=False, verbose=False)
    return _with_tokens(rows, texts, what) if what else rows


def _ids(
    tokenizer: Tokenizer, texts: Sequence[str], pairs: list[str] | None = None, **how: Any
) -> list[list[int]]:
    how = {"padding": False, "return_attention_mask": False, "return_token_type_ids": False, **how}
    rows: list[list[int]] = []
    for start in range(0, len(texts), _BATCH):
        rows.extend(tokenizer(list(texts[start : start + _BATCH]), pairs, **how)["input_ids"])
    return rows


def _with_tokens(rows: list[list[int]], texts: Sequence[str], what: str) -> list[list[int]]:
    """The rows. Raises DataError if one is empty; the line shows its text."""
    for i, row in enumerate(rows):
        if not row:
            raise DataError(f"{what} {i} ({texts[i][:40]!r}) has no tokens: it must have one")
    return rows


def _pad(rows: Sequence[Sequence[int]], tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """Ids and mask (1 for a token, 0 for padding), int64 [N, S] with S the longest row's length."""
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    mask = np.arange(int(lengths.max(initial=0))) < lengths[:, None]
    ids = np.full(mask.shape, tokenizer.pad_token_id or 0, dtype=np.int64)
    ids[mask] = [token for row in rows for token in row]
    return torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64))
