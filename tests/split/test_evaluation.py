"""What is reported is the network as deployed: the mask and the rounding of training."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from tests.split.small import (
    SGD,
    Pictures,
    accuracy_of,
    local,
    masked,
    normed,
    records,
    set_up,
    train,
)
from torch import Tensor, nn
from torch.nn import functional

from sluiceway.split import (
    ACPSL,
    BatchId,
    Bottleneck,
    Compressor,
    L1Channels,
    Quantized,
    RandomChannels,
    TopK,
    cut,
)
from sluiceway.split.deployed import DeployedNetwork, Link
from sluiceway.split.mask_selector import ALL


def test_the_mask_of_training_is_the_mask_of_evaluation() -> None:
    sets, test = [Pictures(60, 1), Pictures(20, 2)], Pictures(300, 6)
    built = set_up(normed(), "conv1", sets, L1Channels(share=0.25, ramp_rounds=0), test)
    for number in (1, 2, 3):
        record = built.run_round(number, [0, 1])
        assert record.mask == local(built)[0].mask.tolist()  # type: ignore[union-attr]
    mask = built.masks.mask(ALL)
    assert mask is not None
    assert int(mask.sum()) == record.kept == 2
    assert record.accuracy_full == accuracy_of(
        nn.Sequential(built.model.front, built.model.back), test
    )
    assert record.accuracy == accuracy_of(masked(built.model.front, mask, built.model.back), test)
    # With other masks the accuracy is another: it was none of them that was reported.
    others = [
        accuracy_of(masked(built.model.front, mask.roll(k), built.model.back), test)
        for k in (1, 2, 3)
    ]
    assert record.accuracy not in others


def test_rounding_is_evaluated_and_the_full_accuracy_is_without() -> None:
    test, model = Pictures(300, 6), normed()
    method = Quantized(quantize="int4", quantize_gradient="int8")
    result = train(method, [Pictures(60, 1)], model=model, test=test, rounds=2, training=SGD)
    last = records(result.records)[-1]
    front, back = cut(model, "conv1")
    with torch.no_grad():
        # Rounding has a scale for each batch: those of the evaluation, 64 examples each.
        parts = [
            back(method.open(method.up(front(x), BatchId(0, 0, 0))[0]).values)
            for x in test.tensors[0].split(64)
        ]
    right = (torch.cat(parts).argmax(1) == test.labels).double().mean()
    assert last.accuracy == float(right)
    assert last.accuracy_full == accuracy_of(model, test)


def test_rounding_at_the_second_cut_of_a_u_shape_is_evaluated_too() -> None:
    test, method = Pictures(300, 6), Quantized(quantize="int4", quantize_gradient="int8")
    built = set_up(
        normed(),
        "conv1",
        [Pictures(60, 1)],
        method,
        test,
        schedule="u",
        tail_at="conv4",
        training=SGD,
    )
    record = built.run_round(1, [0])
    front, middle, tail = built.model.front, built.model.back, built.model.tail
    assert tail is not None

    def crossed(values: Tensor) -> Tensor:
        return method.open(method.up(values, BatchId(0, 0, 0))[0]).values

    with torch.no_grad():
        parts = [tail(crossed(middle(crossed(front(x))))) for x in test.tensors[0].split(64)]
        once = [tail(middle(crossed(front(x)))) for x in test.tensors[0].split(64)]
    loss = float(functional.cross_entropy(torch.cat(parts), test.labels))
    assert record.loss == pytest.approx(loss, rel=1e-5)
    assert loss != pytest.approx(float(functional.cross_entropy(torch.cat(once), test.labels)))


def test_masks_of_their_own_are_evaluated_each_for_its_client() -> None:
    sets, test = [Pictures(60, 1), Pictures(20, 2)], Pictures(200, 6)
    method = ACPSL(share=0.25, ramp_rounds=0, masks="client", margin=0, every=1, growth=1)
    built = set_up(normed(), "conv1", sets, method, test)
    for number in (1, 2, 3):
        record = built.run_round(number, [0, 1])
    masks = [built.masks.mask(i) for i in (0, 1)]
    assert masks[0] is not None
    assert masks[1] is not None
    assert not torch.equal(masks[0], masks[1])
    found = [
        accuracy_of(masked(built.model.front, m, built.model.back), test)
        for m in masks
        if m is not None
    ]
    assert record.accuracy == pytest.approx(0.75 * found[0] + 0.25 * found[1])
    assert record.mask is None
    assert record.scores is None


@pytest.mark.parametrize(
    "method",
    [
        ACPSL(ratio=32, deployed_ratio=4, warmup=0),
        Compressor(quantize="int4", deployed_quantize="dct", deployed_ratio=4),
        Compressor(deployed_quantize="int4"),
        TopK(share=0.05, deployed_share=0.5),
        Bottleneck(quantize="int4", deployed_quantize="fp16"),
        RandomChannels(share=0.25, quantize="dct", deployed_ratio=4, warmup=0, ramp_rounds=0),
    ],
    ids=lambda method: method.name,
)
def test_a_model_is_evaluated_and_comes_out_as_it_is_to_be_used(method: Compressor) -> None:
    test, sets = Pictures(200, 6), [Pictures(60, 1)]
    as_trained = replace(
        method, **{f.name: None for f in fields(method) if f.name.startswith("deployed_")}
    )
    runs = [
        train(m, sets, model=normed(), test=test, rounds=2, training=SGD)
        for m in (method, as_trained)
    ]
    found, plain = (records(run.records)[-1] for run in runs)
    # Training is the same: the layers, and every byte of it.
    assert (found.accuracy_full, found.bytes_up) == (plain.accuracy_full, plain.bytes_up)
    network = runs[0].model
    assert isinstance(network, DeployedNetwork)
    values = network.front(test.tensors[0])
    link = network.links[str(network.client)]
    assert isinstance(link, Link)
    logits, crossed = [], 0
    for part in values.split(64):
        sent = part if link.basis is None else link.basis.forward(part)
        message, _ = method.deployed.up(sent, BatchId(0, 0, 0), mask=link.mask, training=False)
        opened = method.deployed.open(bytes(message)).values
        opened = opened if link.basis is None else link.basis.inverse(opened)
        logits.append(network.back(opened))
        crossed = crossed or len(bytes(message))
    right = (torch.cat(logits).argmax(1) == test.labels).double().mean()
    assert found.accuracy == float(right)
    assert found.bytes_per_prediction == crossed / 64
    assert plain.bytes_per_prediction < found.bytes_per_prediction or method.quantize == "none"


def test_in_a_u_shape_a_prediction_is_what_crosses_both_cuts() -> None:
    test, method = Pictures(64, 6), Quantized(quantize="int4", deployed_quantize="int8")
    how = {"schedule": "u", "tail_at": "conv4", "training": SGD}
    built = set_up(normed(), "conv1", [Pictures(60, 1)], method, test, **how)
    record = built.run_round(1, [0])
    values = built.model.front(test.tensors[0])
    up = method.deployed.up(values, BatchId(0, 0, 0))[0]
    down = method.up(built.model.back(method.deployed.open(up).values), BatchId(0, 0, 0))[0]
    assert record.bytes_per_prediction == (len(bytes(up)) + len(bytes(down))) / 64


def test_a_ratio_of_use_without_a_budget_is_refused() -> None:
    with pytest.raises(ValueError, match=r"deployed_ratio: only bits, step, dct, slfac fill a"):
        Compressor(quantize="int8", deployed_ratio=8)
    with pytest.raises(ValueError, match="sends elements, which have no positions"):
        TopK(deployed_quantize="dct")
