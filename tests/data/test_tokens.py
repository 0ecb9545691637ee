import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.data.small_tokenizers import bert, byte_bpe, prefixing
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import BertTokenizerFast, PreTrainedTokenizerFast

from sluiceway.data import (
    DataError,
    TextDataset,
    check_tokenizer,
    encode,
    encode_choices,
    encode_pairs,
    word_tokens,
)

VOCABULARY = {"[PAD]": 9, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "a": 4, "b": 5, "c": 6}


def make_tokenizer(special: bool = True, **settings: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(WordLevel(VOCABULARY, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    if special:
        ends = [("[CLS]", VOCABULARY["[CLS]"]), ("[SEP]", VOCABULARY["[SEP]"])]
        backend.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **settings)


TOKENIZER = make_tokenizer(pad_token="[PAD]")


def test_texts_are_padded_right_to_the_longest() -> None:
    encoded = encode(["a b", "c", "b z a"], TOKENIZER, 16)
    assert set(encoded) == {"input_ids", "attention_mask"}
    assert all(tensor.dtype == torch.int64 for tensor in encoded.values())
    assert encoded["input_ids"].tolist() == [[2, 4, 5, 3, 9], [2, 6, 3, 9, 9], [2, 5, 1, 4, 3]]
    assert encoded["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [1] * 5]


def test_long_texts_are_cut_with_their_special_tokens() -> None:
    encoded = encode(["a b c a b c", "a"], TOKENIZER, 4)
    assert encoded["input_ids"].tolist() == [[2, 4, 5, 3], [2, 4, 3, 9]]


def test_left_padding_tokenizers_pad_right_here_and_are_left_as_they_were() -> None:
    tokenizer = make_tokenizer(pad_token="[PAD]", padding_side="left")
    assert encode(["a", "a b"], tokenizer, 9)["attention_mask"].tolist() == [[1, 1, 1, 0], [1] * 4]
    assert tokenizer.padding_side == "left"


def test_tokenizers_without_a_pad_token_pad_with_zero() -> None:
    encoded = encode(["a", "a b"], make_tokenizer(), 9)
    assert encoded["input_ids"].tolist() == [[2, 4, 3, 0], [2, 4, 5, 3]]


def test_more_texts_than_a_batch_keep_their_order() -> None:
    texts = ["a"] * 1500 + ["b c"] * 1000
    ids = encode(texts, TOKENIZER, 8)["input_ids"]
    assert ids.shape == (2500, 4)
    assert ids[:, 1].tolist() == [4] * 1500 + [5] * 1000


def test_too_few_tokens_for_a_text() -> None:
    with pytest.raises(DataError, match="max_tokens is 2: it must be 3 or more"):
        encode(["a"], TOKENIZER, 2)


def test_a_text_without_tokens() -> None:
    with pytest.raises(DataError, match=r"text 1 \('  '\) has no tokens"):
        encode(["a", "  "], make_tokenizer(special=False), 8)


def test_no_texts_are_no_rows() -> None:
    encoded = encode([], TOKENIZER, 8)
    assert [tensor.shape for tensor in encoded.values()] == [(0, 0), (0, 0)]
    assert len(TextDataset(encoded, np.array([], dtype=np.int64))) == 0


def test_a_tokenizer_must_fit_its_model() -> None:
    # Ids up to 9 though there are 7 tokens: what counts is the highest.
    check_tokenizer(TOKENIZER, 10)
    check_tokenizer(TOKENIZER, 64)
    with pytest.raises(DataError, match=r"ids up to 9, but the model embeds only 0\.\.8"):
        check_tokenizer(TOKENIZER, 9)
    grown = byte_bpe()
    size = len(grown)
    check_tokenizer(grown, size)
    grown.add_tokens(["new one"])
    with pytest.raises(DataError, match=f"ids up to {size}, but"):
        check_tokenizer(grown, size)


BYTES = byte_bpe()
BEGUN = byte_bpe(begin=True)
WORDS = list("abcdef")
"""Tokens 5..10 of the tokenizers below."""
T5 = prefixing(WORDS, after="</s>")
LLAMA = prefixing(WORDS, before="<s>")
BART = prefixing(WORDS, before="<s>", after="</s>")

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)
rows = st.integers(2, 4).flatmap(
    lambda choices: st.lists(
        st.tuples(texts, st.lists(texts, min_size=choices, max_size=choices)),
        min_size=1,
        max_size=5,
    )
)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> BertTokenizerFast:
    return bert(tmp_path_factory.mktemp("bert"), WORDS)


def marked(inputs: dict[str, Tensor], row: int, choice: int) -> list[int]:
    """The tokens that the ending mask marks."""
    chosen = inputs["ending_mask"][row, choice].bool()
    return inputs["input_ids"][row, choice][chosen].tolist()


def test_encoders_take_pairs(encoder: BertTokenizerFast) -> None:
    found = encode_choices(["a b", "c"], [["d", "e f"], ["a", "b"]], encoder, 16)
    assert found["input_ids"].tolist() == [
        [[2, 5, 6, 3, 8, 3, 0], [2, 5, 6, 3, 9, 10, 3]],
        [[2, 7, 3, 5, 3, 0, 0], [2, 7, 3, 6, 3, 0, 0]],
    ]
    assert found["ending_mask"].tolist() == [
        [[0, 0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 1, 1, 0]],
        [[0, 0, 0, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0, 0]],
    ]
    assert found["attention_mask"].tolist() == [
        [[1, 1, 1, 1, 1, 1, 0], [1] * 7],
        [[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0, 0]],
    ]
    assert all(tensor.dtype == torch.int64 for tensor in found.values())


def test_encoders_pairs_are_the_tokenizers_own(encoder: BertTokenizerFast) -> None:
    found = encode_choices(["a z b"], [["c", "[SEP] d"]], encoder, 32)
    for choice, ending in enumerate(["c", "[SEP] d"]):
        ids = found["input_ids"][0, choice][found["attention_mask"][0, choice].bool()]
        assert ids.tolist() == encoder("a z b", ending)["input_ids"]


def test_long_pairs_lose_the_start_of_the_context_then_the_endings_tail(
    encoder: BertTokenizerFast,
) -> None:
    found = encode_choices(["a b c"], [["d e", "a b c d"]], encoder, 6)
    # Three tokens beside the special ones: one of the context at least.
    assert found["input_ids"].tolist() == [[[2, 7, 3, 8, 9, 3], [2, 7, 3, 5, 6, 3]]]
    assert found["ending_mask"].tolist() == [[[0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 0]]]
    found = encode_choices(["a b c"], [["d", "e"]], encoder, 6)
    assert found["input_ids"].tolist() == [[[2, 6, 7, 3, 8, 3], [2, 6, 7, 3, 9, 3]]]


def test_decoders_take_the_ending_after_a_space() -> None:
    found = encode_choices(["the cat", "a"], [["sat", "on"], ["bird", "the mat"]], BYTES, 16)
    for row, (context, endings) in enumerate([("the cat", ("sat", "on")), ("a", ("bird",))]):
        for choice, ending in enumerate(endings):
            ids = found["input_ids"][row, choice][found["attention_mask"][row, choice].bool()]
            assert ids.tolist() == BYTES(f"{context} {ending}")["input_ids"]
            assert BYTES.decode(marked(found, row, choice)) == f" {ending}"


def test_what_leads_a_text_leads_its_context_and_stays_when_it_is_cut() -> None:
    found = encode_choices(["the cat sat"], [["on", "mat"]], BEGUN, 4)
    cat, sat, on, mat = BYTES(" cat sat on mat")["input_ids"]
    assert found["input_ids"].tolist() == [[[1, cat, sat, on], [1, cat, sat, mat]]]
    found = encode_choices(["the cat sat"], [["on the mat", "mat"]], BEGUN, 3)
    assert found["input_ids"].tolist() == [[[1, sat, on], [1, sat, mat]]]
    assert found["ending_mask"].tolist() == [[[0, 0, 1], [0, 0, 1]]]


def test_tokenizers_that_put_a_space_before_every_text_get_no_second_one() -> None:
    found = encode_choices(["a b"], [["c", "d e"]], LLAMA, 16)
    assert found["input_ids"].tolist() == [[[2, 5, 6, 7, 0], [2, 5, 6, 8, 9]]]


def test_what_ends_a_text_does_not_end_a_decoders_row() -> None:
    found = encode_choices(["a b"], [["c", "d"]], BART, 16)
    assert found["input_ids"].tolist() == [[[2, 5, 6, 7], [2, 5, 6, 8]]]


@given(rows, st.integers(3, 40), st.booleans())
def test_masks_mark_what_they_say(
    pairs: list[tuple[str, list[str]]], most: int, begin: bool
) -> None:
    tokenizer, special = (BEGUN, 1) if begin else (BYTES, 0)
    contexts, endings = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    found = encode_choices(contexts, endings, tokenizer, most)
    ids, mask, ending_mask = found.values()
    assert ids.shape == mask.shape == ending_mask.shape
    assert ids.shape[:2] == (len(pairs), len(endings[0]))
    lengths = mask.sum(-1)
    assert ids.shape[2] == lengths.max() <= most
    # Padding lies on the right, an ending just before it.
    assert torch.equal(mask, (torch.arange(ids.shape[2]) < lengths[..., None]).long())
    ending_lengths = ending_mask.sum(-1)
    behind = lengths[..., None] - torch.arange(ids.shape[2])
    assert torch.equal(ending_mask, ((behind > 0) & (behind <= ending_lengths[..., None])).long())
    assert (ending_lengths >= 1).all()
    assert (lengths - ending_lengths >= 1 + special).all()
    assert not ids[mask == 0].any()
    for row, (context, choices) in enumerate(pairs):
        for choice, ending in enumerate(choices):
            own = tokenizer(f" {ending}", add_special_tokens=False)["input_ids"]
            tokens = marked(found, row, choice)
            assert tokens == own[: most - 1 - special]
            if len(tokens) == len(own):
                assert tokenizer.decode(tokens, clean_up_tokenization_spaces=False) == f" {ending}"
            kept = lengths[row, choice] - len(tokens) - special
            before = tokenizer(context, add_special_tokens=False)["input_ids"]
            assert (
                ids[row, choice, special : special + kept].tolist() == before[len(before) - kept :]
            )
            assert kept == len(before) or lengths[row, choice] == most


def test_pairs_for_an_encoder_and_its_decoder() -> None:
    found = encode_pairs(["a b c", "d"], [["e", "f a"], ["b", "c"]], T5, 16)
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        "input_ids": [[5, 6, 7, 3], [8, 3, 0, 0]],
        "attention_mask": [[1, 1, 1, 1], [1, 1, 0, 0]],
        "decoder_labels": [[[9, 3, 0], [10, 5, 3]], [[6, 3, 0], [7, 3, 0]]],
        "decoder_attention_mask": [[[1, 1, 0], [1, 1, 1]], [[1, 1, 0], [1, 1, 0]]],
    }
    assert all(tensor.dtype == torch.int64 for tensor in found.values())


def test_long_pairs_keep_their_special_tokens() -> None:
    found = encode_pairs(["a b c d"], [["a b c d", "e"]], BART, 3)
    assert found["input_ids"].tolist() == [[2, 8, 3]]
    assert found["decoder_labels"].tolist() == [[[5, 6, 3], [9, 3, 0]]]


@pytest.mark.parametrize("encoded", [encode_choices, encode_pairs])
def test_no_rows(encoded: object) -> None:
    found = encoded([], [], LLAMA, 8)  # type: ignore[operator]
    assert all(tensor.numel() == 0 and len(tensor) == 0 for tensor in found.values())
    none = TextDataset(found, np.zeros(0, dtype=np.int64))
    assert len(none.gather([])[1]) == 0


@pytest.mark.parametrize("encoded", [encode_choices, encode_pairs])
def test_what_cannot_be_encoded(encoded: object) -> None:
    def encode_(contexts: list[str], endings: list[list[str]], most: int = 8) -> None:
        encoded(contexts, endings, BEGUN, most)  # type: ignore[operator]

    with pytest.raises(DataError, match="there are 1 rows of endings for 2 contexts"):
        encode_(["a", "b"], [["c", "d"]])
    with pytest.raises(DataError, match="row 1 has 3 endings and row 0 has 2"):
        encode_(["a", "b"], [["c", "d"], ["c", "d", "e"]])
    with pytest.raises(DataError, match=r"context 1 \(''\) has no tokens"):
        encode_(["a", ""], [["c", "d"]] * 2)
    least = 3 if encoded is encode_choices else 2
    with pytest.raises(DataError, match=f"max_tokens is {least - 1}: it must be {least} or more"):
        encode_(["a"], [["c", "d"]], least - 1)
    encode_(["a"], [["c", "d"]], least)


def test_an_ending_without_tokens(encoder: BertTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"ending 1 \(' '\) has no tokens: it must have one"):
        encode_choices(["a"], [["c", " "]], encoder, 8)


def test_first_tokens_of_words() -> None:
    labels = ["world", "sports", "business", "science"]
    found = word_tokens(labels, BYTES, "Topic:")
    assert found.dtype == torch.int64
    assert [BYTES.decode([int(token)]) for token in found] == [f" {label}" for label in labels]
    assert torch.equal(word_tokens(labels, BEGUN, "Topic:"), found)
    assert word_tokens(["b", "d"], LLAMA, "a").tolist() == [6, 8]


def test_first_tokens_of_words_for_encoders(encoder: BertTokenizerFast) -> None:
    assert word_tokens(["b c", "d"], encoder, "a").tolist() == [6, 8]
    with pytest.raises(DataError, match="the words 'y' and 'z' both begin with token 1 after 'a'"):
        word_tokens(["b", "y", "z"], encoder, "a")
    with pytest.raises(DataError, match=r"word 1 \(' '\) has no tokens"):
        word_tokens(["b", ""], encoder, "a")


def test_words_that_begin_alike() -> None:
    message = "the words 'the cat' and 'the mat' both begin with token"
    with pytest.raises(DataError, match=message):
        word_tokens(["the cat", "bird", "the mat"], BYTES, "Topic:")


def test_words_that_change_the_tokens_of_the_text_before_them() -> None:
    vocab = {"<unk>": 0, "a": 1, "a b": 2, "a c": 3, " b": 4, " c": 5}
    unsplit = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    )
    assert unsplit("a b")["input_ids"] == [2]
    assert word_tokens(["b", "c"], unsplit, "a").tolist() == [4, 5]
