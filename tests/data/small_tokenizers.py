"""Small tokenizers of the kinds that models come with, for tests."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import BertTokenizerFast, PreTrainedTokenizerFast

CORPUS = ["the cat sat on the mat", "the world sports business science", "a bird in the hand"] * 4


def bert(folder: Path, words: list[str]) -> BertTokenizerFast:
    """[PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, [MASK] 4, then the words."""
    vocab = folder / "vocab.txt"
    vocab.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    return BertTokenizerFast(str(vocab))


def byte_bpe(begin: bool = False) -> PreTrainedTokenizerFast:
    """As GPT-2's: any text, no special tokens; with `begin` as newer ones that lead with <s>."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    if begin:
        template = TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
        )
        backend.post_processor = template
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>")


def prefixing(words: list[str], before: str = "", after: str = "") -> PreTrainedTokenizerFast:
    """As sentencepiece's: a space is put before every text, so that " b" has an empty word more.

    <pad> 0, <unk> 1, <s> 2, </s> 3, the lone space 4, then the words.
    """
    vocab = {"<pad>": 0, "<unk>": 1, "<s>": 2, "</s>": 3, "\u2581": 4}
    vocab |= {f"\u2581{word}": i for i, word in enumerate(words, start=5)}
    backend = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    backend.post_processor = TemplateProcessing(
        single=f"{before} $A {after}".strip(), special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>")
