"""What a transformer's answer is: one score for each of C classes, label words or endings.

Each module here takes tokens and gives logits [B, C], so that everything else (loss, accuracy,
partitions) is the same for classifiers, language models and encoder-decoders. Shapes: B examples,
C options, S tokens, T tokens of an ending for a decoder, d hidden width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TextClassifier(nn.Module):
    """A transformer, the mean of its last hidden states over the tokens, and a linear head.

    Args:
        backbone: a Hugging Face model that gives `last_hidden_state` [B, S, d].
        hidden: d.
        classes: C; 1 where each of an example's options is scored by itself.
    """

    def __init__(self, backbone: nn.Module, hidden: int, classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(hidden, classes)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, ending_mask: Tensor | None = None
    ) -> Tensor:
        """Logits [B, C] of token ids and their mask, both [B, S] int64, or [B, C, S]: an option
        each, which the head's one output scores (`ending_mask` is not looked at)."""
        ids, mask = input_ids.flatten(0, -2), attention_mask.flatten(0, -2)
        hidden: Tensor = self.backbone(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * weights).sum(1) / weights.sum(1).clamp_min(1)
        logits: Tensor = self.head(pooled.to(self.head.weight.dtype))
        return logits if input_ids.ndim == 2 else logits.view(input_ids.shape[:-1])


class Words(nn.Module):
    """A language model whose next token names the class: C label words, one token each.

    Args:
        lm: a Hugging Face decoder with its output embeddings, or an encoder-decoder, whose decoder
            then begins.
        words: [C] int64, token ids.
    """

    words: Tensor

    def __init__(self, lm: nn.Module, words: Tensor) -> None:
        super().__init__()
        self.lm = lm
        self.output = _Selected(lm)
        self.register_buffer("words", words, persistent=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits [B, C] of prompts and their mask, [B, S] int64, padded on the right."""
        rows = torch.arange(len(input_ids), device=input_ids.device)
        if is_encoder_decoder(self.lm):
            first = torch.full_like(input_ids[:, :1], start_token(self.lm))
            more, at = {"decoder_input_ids": first}, torch.zeros_like(rows)
        else:
            more, at = {}, attention_mask.sum(1) - 1
        logits = self.output((rows, at), input_ids=input_ids, attention_mask=attention_mask, **more)
        return logits[:, self.words]


class Endings(nn.Module):
    """A language model that scores C endings by their likelihood, mean over the ending's tokens.

    score_c = 1/T_c sum_t log p(token t of ending c | context, its tokens before)

    The mean, not the sum, so that long endings are not at a disadvantage.

    Args:
        lm: a Hugging Face decoder with its output embeddings, or an encoder-decoder.
    """

    def __init__(self, lm: nn.Module) -> None:
        super().__init__()
        self.lm = lm
        self.output = _Selected(lm)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        ending_mask: Tensor | None = None,
        decoder_labels: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Scores [B, C], <= 0, float32 or wider.

        Args:
            input_ids, attention_mask: [B, C, S] int64, each ending behind its context, with
                ending_mask [B, C, S], 1 for the ending's tokens (decoders); or the contexts alone,
                [B, S] (encoder-decoders).
            decoder_labels, decoder_attention_mask: [B, C, T] int64, the endings' tokens and their
                mask (encoder-decoders).
        """
        if decoder_labels is None or decoder_attention_mask is None:
            assert ending_mask is not None
            return self._decoder_only(input_ids, attention_mask, ending_mask)
        return self._pairs(input_ids, attention_mask, decoder_labels, decoder_attention_mask)

    def _decoder_only(self, ids: Tensor, mask: Tensor, ending: Tensor) -> Tensor:
        shape = ids.shape[:2]
        ids, mask, ending = (x.flatten(0, 1) for x in (ids, mask, ending))
        rows, at = ending[:, 1:].nonzero(as_tuple=True)  # position at predicts token at + 1
        logits = self.output((rows, at), input_ids=ids, attention_mask=mask)
        return mean_likelihood(logits, ids[rows, at + 1], rows, shape)

    def _pairs(self, ids: Tensor, mask: Tensor, labels: Tensor, label_mask: Tensor) -> Tensor:
        shape = labels.shape[:2]
        labels, label_mask = labels.flatten(0, 1), label_mask.flatten(0, 1)
        encoded = self.lm.get_encoder()(input_ids=ids, attention_mask=mask)  # type: ignore[operator]
        # The context is read once and stands before each of its endings.
        encoded["last_hidden_state"] = encoded.last_hidden_state.repeat_interleave(shape[1], 0)
        shifted = torch.full_like(labels, start_token(self.lm))
        shifted[:, 1:] = labels[:, :-1]
        rows, at = label_mask.nonzero(as_tuple=True)
        logits = self.output(
            (rows, at),
            encoder_outputs=encoded,
            attention_mask=mask.repeat_interleave(shape[1], 0),
            decoder_input_ids=shifted,
            decoder_attention_mask=label_mask,
        )
        return mean_likelihood(logits, labels[rows, at], rows, shape)


def mean_likelihood(logits: Tensor, tokens: Tensor, rows: Tensor, shape: torch.Size) -> Tensor:
    """Mean log-probability of the chosen tokens of each row.

    Args:
        logits: [n, V], for n positions.
        tokens: [n] int64, what stands there.
        rows: [n] int64, the row of each position, below B C; every row has one.
        shape: (B, C).

    Returns:
        [B, C], float32 or wider.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    found = -F.cross_entropy(logits.to(wide), tokens, reduction="none")
    total = found.new_zeros(shape.numel()).index_add(0, rows, found)
    count = found.new_zeros(shape.numel()).index_add(0, rows, torch.ones_like(found))
    return (total / count.clamp_min(1)).view(shape)


class _Selected:
    """Runs a language model with its output embeddings on some positions alone.

    A vocabulary of 50,000 makes logits of all tokens the largest tensor of a step by far.
    What a family does behind its output embeddings (scaling, capping) stays in place.
    """

    def __init__(self, lm: nn.Module) -> None:
        self.lm = lm
        self.embedding: nn.Module = lm.get_output_embeddings()  # type: ignore[operator]

    def __call__(self, positions: tuple[Tensor, Tensor], **inputs: Any) -> Tensor:
        """Logits [n, V] at the n positions (rows, columns) of the [rows, columns, V] there are."""
        hook = self.embedding.register_forward_pre_hook(lambda _, args: (args[0][positions],))
        try:
            logits: Tensor = self.lm(**inputs).logits
        finally:
            hook.remove()
        return logits


def is_encoder_decoder(lm: nn.Module) -> bool:
    """Whether the Hugging Face model has an encoder and a decoder."""
    return bool(getattr(lm.config, "is_encoder_decoder", False))


def start_token(lm: nn.Module) -> int:
    """The token that an encoder-decoder's decoder begins with."""
    config: Any = lm.config
    start = config.decoder_start_token_id
    return int(config.pad_token_id if start is None else start)
