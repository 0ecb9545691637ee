"""Contexts and their endings as tensors of tokens, and label words as single tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sluiceway.data.choice_tables import endings_per_row
from sluiceway.data.errors import DataError
from sluiceway.data.tokens import Encoding, pad_rows

_BATCH = 1000


class ChoiceTokenizer(Protocol):
    """What this module needs of a Hugging Face tokenizer."""

    pad_token_id: int | None
    sep_token_id: int | None

    def __call__(
        self,
        text: list[str],
        text_pair: list[str] | None = None,
        *,
        add_special_tokens: bool,
        truncation: bool,
        padding: bool,
        return_attention_mask: bool,
        return_token_type_ids: bool,
        verbose: bool,
    ) -> Encoding: ...


@dataclass(frozen=True)
class _Frame:
    """The special tokens before, between and after the parts of a row."""

    before: list[int]
    between: list[int]
    after: list[int]

    def room(self, max_tokens: int, least: int) -> int:
        """How many tokens fit between them.

        Raises:
            DataError: fewer than `least`.
        """
        special = len(self.before) + len(self.between) + len(self.after)
        if max_tokens < special + least:
            raise DataError(f"max_tokens is {max_tokens}: it must be {special + least} or more")
        return max_tokens - special


def encode_choices(
    contexts: Sequence[str],
    endings: Sequence[Sequence[str]],
    tokenizer: ChoiceTokenizer,
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
        tokenizer: a Hugging Face tokenizer; the padding is its pad token, or 0 where it has none.
        max_tokens: of a context with an ending, special tokens included.

    Returns:
        `input_ids`, `attention_mask` (1 for a token, 0 for padding, which is on the right) and
        `ending_mask` (1 for the ending's tokens, special tokens apart), int64 [N, C, S] with
        S <= max_tokens the longest row's length.

    Raises:
        DataError: `max_tokens` leaves no room for a token of each, a context or an ending yields no
            token, or there is not one row of endings, all of one C, for each context.
    """
    choices = _choices(contexts, endings)
    paired = tokenizer.sep_token_id is not None
    frame = _pair_frame(tokenizer) if paired else _leading_frame(tokenizer)
    lead = "" if paired else _lead(tokenizer)
    room = frame.room(max_tokens, least=2)
    heads = _tokens(contexts, tokenizer, "context")
    tails = _tokens([lead + text for row in endings for text in row], tokenizer, "ending")
    rows, starts, lengths = [], [], []
    for i, whole_tail in enumerate(tails):
        tail = whole_tail[: room - 1]
        head = heads[i // choices][len(tail) - room :]
        leading = [*frame.before, *head, *frame.between]
        rows.append([*leading, *tail, *frame.after])
        starts.append(len(leading))
        lengths.append(len(tail))
    ids, mask = pad_rows(rows, tokenizer.pad_token_id)
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
    tokenizer: ChoiceTokenizer,
    max_tokens: int,
) -> dict[str, Tensor]:
    """Tokenise contexts for an encoder and their endings for its decoder.

    A context above `max_tokens` loses its start, an ending its tail; special tokens stay.

    Args:
        contexts: N texts.
        endings: N rows of C texts, the same C of 2 or more for every row.
        tokenizer: a Hugging Face tokenizer; the padding is its pad token, or 0 where it has none.
        max_tokens: of a context, and likewise of an ending, special tokens included.

    Returns:
        `input_ids` and `attention_mask`, int64 [N, S], of the contexts with their special tokens;
        `decoder_labels` and `decoder_attention_mask`, int64 [N, C, T], of the endings with the
        special tokens that the tokenizer puts after a text, such as T5's </s>, and none before.
        Masks are 1 for a token and 0 for padding, which is on the right.

    Raises:
        DataError: as `encode_choices`.
    """
    choices = _choices(contexts, endings)
    frame = _single_frame(tokenizer)
    room = frame.room(max_tokens, least=1)
    heads = _tokens(contexts, tokenizer, "context")
    tails = _tokens([text for row in endings for text in row], tokenizer, "ending")
    ids, mask = pad_rows(
        [[*frame.before, *head[-room:], *frame.after] for head in heads], tokenizer.pad_token_id
    )
    tail_room = max_tokens - len(frame.after)
    labels, label_mask = pad_rows(
        [[*tail[:tail_room], *frame.after] for tail in tails], tokenizer.pad_token_id
    )
    shape = (len(contexts), choices, labels.shape[1])
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "decoder_labels": labels.view(shape),
        "decoder_attention_mask": label_mask.view(shape),
    }


def word_tokens(words: Sequence[str], tokenizer: ChoiceTokenizer, after: str) -> Tensor:
    """The first token of each word as it follows a text and a space.

    Args:
        words: C label words.
        tokenizer: a Hugging Face tokenizer.
        after: the text that the words follow, such as "Topic:".

    Returns:
        int64 [C].

    Raises:
        DataError: a word yields no token, or two begin with the same one; the line names them.
    """
    (before,) = _bodies([after], tokenizer)
    wholes = _bodies([f"{after} {word}" for word in words], tokenizer)
    # Where the tokens of the text change with what follows, a word on its own has to do.
    alone = _tokens([_lead(tokenizer) + word for word in words], tokenizer, "word")
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


def _choices(contexts: Sequence[str], endings: Sequence[Sequence[str]]) -> int:
    if len(contexts) != len(endings):
        raise DataError(f"there are {len(endings)} rows of endings for {len(contexts)} contexts")
    return endings_per_row(endings)


def _tokens(texts: Sequence[str], tokenizer: ChoiceTokenizer, what: str) -> list[list[int]]:
    """The tokens of each text without special ones, at least one each."""
    rows = _bodies(texts, tokenizer)
    for i, row in enumerate(rows):
        if not row:
            raise DataError(f"{what} {i} ({texts[i][:40]!r}) has no tokens: it must have one")
    return rows


def _bodies(texts: Sequence[str], tokenizer: ChoiceTokenizer) -> list[list[int]]:
    rows: list[list[int]] = []
    for start in range(0, len(texts), _BATCH):
        rows.extend(_ids(tokenizer, list(texts[start : start + _BATCH]), special=False))
    return rows


def _ids(
    tokenizer: ChoiceTokenizer, texts: list[str], pairs: list[str] | None = None, *, special: bool
) -> list[list[int]]:
    encoding = tokenizer(
        texts,
        pairs,
        add_special_tokens=special,
        truncation=False,
        padding=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # what is too long is cut later
    )
    return encoding["input_ids"]


def _single_frame(tokenizer: ChoiceTokenizer) -> _Frame:
    (body,) = _tokens(["a"], tokenizer, "probe")
    (whole,) = _ids(tokenizer, ["a"], special=True)
    start = _find(body, whole, 0)
    return _Frame(whole[:start], [], whole[start + len(body) :])


def _leading_frame(tokenizer: ChoiceTokenizer) -> _Frame:
    return _Frame(_single_frame(tokenizer).before, [], [])


def _pair_frame(tokenizer: ChoiceTokenizer) -> _Frame:
    head, tail = _tokens(["a", "a"], tokenizer, "probe")
    (whole,) = _ids(tokenizer, ["a"], ["a"], special=True)
    start = _find(head, whole, 0)
    end = start + len(head)
    second = _find(tail, whole, end)
    return _Frame(whole[:start], whole[end:second], whole[second + len(tail) :])


def _find(part: list[int], whole: list[int], start: int) -> int:
    """Where the tokens of a text begin among the special tokens around them."""
    for at in range(start, len(whole) - len(part) + 1):
        if whole[at : at + len(part)] == part:
            return at
    raise DataError("the tokenizer changes a text's tokens where it adds special ones")


def _lead(tokenizer: ChoiceTokenizer) -> str:
    """What to put before a text so that its tokens are those it has after a text and a space.

    A space, but nothing for tokenizers that put a space before every text themselves.
    """
    first, spaced, bare, whole = _bodies(["a", " b", "b", "a b"], tokenizer)
    return "" if first + spaced != whole and first + bare == whole else " "
