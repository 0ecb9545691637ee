import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.data.small_tokenizers import byte_bpe
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from sluiceway.data import DataError, TextDataset, check_tokenizer, encode

WORDS = {"[PAD]": 9, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "a": 4, "b": 5, "c": 6}


def make_tokenizer(special: bool = True, **settings: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(WordLevel(WORDS, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    if special:
        ends = [("[CLS]", WORDS["[CLS]"]), ("[SEP]", WORDS["[SEP]"])]
        backend.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **settings)


TOKENIZER = make_tokenizer(pad_token="[PAD]")


def dataset(lengths: list[int]) -> TextDataset:
    """Row i has `lengths[i]` tokens and label i."""
    texts = [" ".join(["a"] * (length - 2)) for length in lengths]
    return TextDataset(encode(texts, TOKENIZER, 64), np.arange(len(lengths)))


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


@given(st.lists(st.integers(2, 20), min_size=1, max_size=12), st.data())
def test_gather_trims_to_the_longest_row_of_the_batch(
    lengths: list[int], data: st.DataObject
) -> None:
    whole = dataset(lengths)
    picked = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=20))
    inputs, labels = whole.gather(picked)
    assert labels.tolist() == picked
    width = max(lengths[row] for row in picked)
    for name, tensor in inputs.items():
        assert tensor.shape == (len(picked), width)
        full = torch.stack([whole[row][0][name] for row in picked])
        assert torch.equal(tensor, full[:, :width])
    assert inputs["attention_mask"].sum(dim=1).tolist() == [lengths[row] for row in picked]


def test_gather_keeps_what_lies_before_the_last_token() -> None:
    mask = torch.tensor([[0, 0, 1, 0], [0, 1, 0, 0]])
    rows = TextDataset({"input_ids": mask * 7, "attention_mask": mask}, torch.tensor([0, 1]))
    inputs, _ = rows.gather([0, 1])
    assert inputs["attention_mask"].tolist() == [[0, 0, 1], [0, 1, 0]]


def test_gather_nothing() -> None:
    inputs, labels = dataset([3, 4]).gather([])
    assert inputs["input_ids"].shape == (0, 0)
    assert labels.shape == (0,)


def test_subsets_share_storage_and_nest() -> None:
    whole = dataset([3, 9, 4, 5])
    part = whole.subset(np.array([3, 0, 2])).subset([2, 0])
    assert len(part) == 2
    assert part.labels.tolist() == [2, 3]
    assert part.labels.dtype == torch.int64
    inputs, labels = part.gather(torch.tensor([1, 0]))
    assert labels.tolist() == [3, 2]
    assert inputs["attention_mask"].sum(dim=1).tolist() == [5, 4]
    assert inputs["input_ids"].shape == (2, 5)
    whole[2][0]["input_ids"][1] = 6
    assert part[0][0]["input_ids"][1] == 6


def test_items_and_loaders() -> None:
    whole = dataset([3, 4, 5])
    inputs, label = whole[1]
    assert inputs["input_ids"].tolist() == [2, 4, 4, 3, 9]
    assert label == 1
    with pytest.raises(IndexError):
        whole[3]
    batches = list(DataLoader(whole, batch_size=2))
    assert batches[0][0]["input_ids"].shape == (2, 5)
    assert batches[1][1].tolist() == [2]


def test_inputs_and_labels_must_match() -> None:
    with pytest.raises(DataError, match="input_ids has 2 rows for 3 labels"):
        TextDataset(encode(["a", "b"], TOKENIZER, 8), np.arange(3))


def test_a_mask_must_be_there_and_fit() -> None:
    ids, labels = torch.ones(2, 3, dtype=torch.int64), np.arange(2)
    with pytest.raises(DataError, match="input_ids comes without its attention_mask"):
        TextDataset({"input_ids": ids}, labels)
    with pytest.raises(DataError, match="input_ids is 3 wide and its attention_mask 2: they"):
        TextDataset({"input_ids": ids, "attention_mask": ids[:, :2]}, labels)
    texts = {"input_ids": ids, "attention_mask": ids}
    with pytest.raises(DataError, match="decoder_labels comes without its decoder_attention_mask"):
        TextDataset({**texts, "decoder_labels": ids}, labels)


@given(st.integers(1, 6), st.integers(2, 4), st.data())
def test_gather_equals_slicing_of_choices_and_decoder_inputs(
    rows: int, choices: int, data: st.DataObject
) -> None:
    def padded(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask whose rows have 1 to 9 tokens."""
        drawn = data.draw(st.lists(st.integers(1, 9), min_size=rows * choices, max_size=24))
        lengths = torch.tensor(drawn[: int(np.prod(shape))]).reshape(shape)
        mask = (torch.arange(9) < lengths[..., None]).long()
        return torch.arange(1, mask.numel() + 1).reshape(mask.shape) * mask, mask

    ids, mask = padded(rows, choices) if data.draw(st.booleans()) else padded(rows)
    labels, label_mask = padded(rows, choices)
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "ending_mask": mask.clone(),
        "decoder_labels": labels,
        "decoder_attention_mask": label_mask,
    }
    whole = TextDataset(inputs, torch.arange(rows))
    picked = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=8))
    batch, found = whole.gather(picked)
    assert found.tolist() == picked
    for name, tensor in inputs.items():
        its_mask = label_mask if name.startswith("decoder_") else mask
        width = int(its_mask[picked].sum(-1).max())
        assert torch.equal(batch[name], tensor[picked][..., :width])
        assert not tensor[picked][..., width:].any()


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
