"""A client whose model is not the server's is told so before the first round."""

from __future__ import annotations

import pytest
import torch
from tests.worlds import TinyClassifier, TinyText

from sluiceway.core.handshake import HandshakeError, ModelSignature, check_joining
from sluiceway.core.settings import Training
from sluiceway.federated.client import Worker, prepare
from sluiceway.moe import add_lora, moe_layout
from sluiceway.strategies import FedAvg


def adapted(rank: int) -> TinyClassifier:
    model = TinyClassifier().requires_grad_(False)
    experts = moe_layout(model).expert_params
    add_lora(model, {n: p for n, p in model.named_parameters() if n in experts}, rank, 8.0)
    return model


def test_a_worker_with_other_adapters_is_refused() -> None:
    strategy = FedAvg()
    prepare(adapted(4), strategy, 1)
    other = adapted(2)
    prepare(other, FedAvg(), 1)
    with pytest.raises(HandshakeError) as told:
        Worker(other, [TinyText(4, 1)], TinyText(4, 2), strategy, Training())
    message = str(told.value)
    assert "\n" not in message
    assert "lora_B.default.weight (and 3 more)" in message
    assert "the server has float32 [32, 16], the client float32 [32, 8]" in message
    assert message.count(f"torch {torch.__version__}") == 2
    assert message.count("peft 0.21") == 2


def test_cards_travel_as_text_and_name_what_is_missing() -> None:
    server = ModelSignature.of({"a": torch.zeros(2, 3), "b": torch.zeros(4).bfloat16()})
    assert ModelSignature.from_json(server.to_json()) == server
    check_joining(server, ModelSignature.from_json(server.to_json()))
    for client, said in (
        ({"a": torch.zeros(2, 3)}, "differ in b: the server has bfloat16 [4], the client no such"),
        ({"a": torch.zeros(6), "b": torch.zeros(4)}, "differ in a (and 1 more): the server has"),
        (
            {"a": torch.zeros(2, 3), "b": torch.zeros(4).bfloat16(), "c": torch.zeros(1)},
            "differ in c: the server has no such tensor, the client float32 [1]",
        ),
    ):
        with pytest.raises(HandshakeError) as told:
            check_joining(server, ModelSignature.of(client))
        assert said in str(told.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"tensors": 3, "versions": {}}', "null"])
def test_what_is_no_card_is_refused(text: str) -> None:
    with pytest.raises(HandshakeError, match="not a card"):
        ModelSignature.from_json(text)
