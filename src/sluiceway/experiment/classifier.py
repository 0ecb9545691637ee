"""A trained classifier of texts as a transformers architecture; copied into exported folders."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from sluiceway.experiment.heads import TextClassifier
from sluiceway.moe.saved import BodyConfig, class_of


class ClassifierConfig(BodyConfig):
    """A body with a head on the mean of its last hidden states.

    Args:
        hidden: width of the hidden states.
        outputs: of the head; 1 where each of an example's options is scored by itself.
    """

    model_type = "sluiceway_classifier"

    def __init__(self, hidden: int = 1, outputs: int = 2, **more: Any) -> None:
        self.hidden, self.outputs = hidden, outputs
        super().__init__(**more)


class Classifier(PreTrainedModel):
    """The body and the head, `answer`."""

    config_class = ClassifierConfig
    base_model_prefix = "answer"
    _supports_sdpa = _supports_flash_attn = _supports_attention_backend = True

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__(config)
        kind, body = class_of(config)
        body._attn_implementation = config._attn_implementation
        self.answer = TextClassifier(kind(body), config.hidden, config.outputs)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **_: Any,
    ) -> SequenceClassifierOutput:
        """Logits [B, C] of token ids [B, S] (or [B, C, S], an option each), and the loss."""
        mask = input_ids.new_ones(input_ids.shape) if attention_mask is None else attention_mask
        logits = self.answer(input_ids, mask)
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def register() -> None:
    """Have transformers load exported classifiers without `trust_remote_code`."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    AutoConfig.register(ClassifierConfig.model_type, ClassifierConfig, exist_ok=True)
    AutoModelForSequenceClassification.register(ClassifierConfig, Classifier, exist_ok=True)
