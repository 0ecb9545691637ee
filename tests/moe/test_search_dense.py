"""Dense models in which the search by structure must find nothing, look-alikes above all."""

from collections.abc import Callable

import pytest
from tests.moe.conftest import BERT
from torch import nn

from sluiceway.moe import NoExpertsError, find_layout, moe_layout


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(16, 16)
        self.heads = nn.ModuleList(nn.Linear(16, 4) for _ in range(4))
        self.fc = nn.Linear(16, 4)


class Layered(nn.Module):
    """A linear map to 2 values beside 2 identical layers."""

    def __init__(self, layer: Callable[[], nn.Module], name: str, **more: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(2))
        self.add_module(name, nn.Linear(16, 2))
        for key, value in more.items():
            setattr(self, key, value)


class Biaffine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair, self.gate, self.k = nn.Bilinear(16, 16, 3), nn.Linear(16, 3), 1


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gate, self.k = nn.Conv1d(16, 4, 3), nn.Linear(16, 4), 1


def transformer_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(16, 2, 24)


def of_transformers(name: str, **settings: object) -> Callable[[], nn.Module]:
    import transformers

    kind = getattr(transformers, name)
    return lambda: kind(kind.config_class(**settings))


T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "num_labels": 2, "pad_token_id": 0}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2], "num_labels": 2}


@pytest.mark.parametrize(
    "build",
    [
        of_transformers("BertForSequenceClassification", **BERT, num_labels=2),
        of_transformers("ResNetForImageClassification", **RESNET),
        of_transformers("T5ForConditionalGeneration", vocab_size=50, **T5),
        of_transformers("GPT2ForSequenceClassification", vocab_size=50, **GPT2),
        lambda: nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2)),
        lambda: nn.TransformerEncoder(transformer_layer(), 2),
        lambda: nn.LSTM(16, 4, 2),
        Heads,
        Biaffine,
        Convolution,
        lambda: Layered(lambda: nn.Linear(16, 16), "head"),
        lambda: Layered(lambda: nn.Linear(16, 16), "head", top_k=2),
        lambda: Layered(lambda: nn.Linear(16, 16), "proj"),
        lambda: Layered(transformer_layer, "gate", top_k=2),
        lambda: Layered(lambda: nn.Linear(8, 8), "gate", top_k=2),
        lambda: Layered(lambda: nn.Embedding(16, 16), "gate", top_k=2),
        lambda: Layered(lambda: nn.GRU(16, 16), "gate", top_k=2),
    ],
)
def test_dense_models_have_no_block(build: Callable[[], nn.Module]) -> None:
    model = build()
    assert find_layout(model) is None
    with pytest.raises(NoExpertsError, match=r"none was found by structure \(a router \[E, H\]"):
        moe_layout(model)


def test_dense_families_have_no_block(dense: Callable[[str], nn.Module]) -> None:
    for name in ("bert", "llama"):
        with pytest.raises(NoExpertsError, match=r"no known family .*mixtral.*none was found"):
            moe_layout(dense(name))
