"""The head's closed-form start: the same everywhere, counted and checked; class means alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tests.worlds import TinyClassifier, TinyText, tiny_bert
from torch import Tensor, nn

from sluiceway import fedalign
from sluiceway.core.checkpoints import Checkpoint
from sluiceway.core.guards import Failure, RunFailed
from sluiceway.core.head_start import HeadStart, HeadSums, StartingHead, read_sums, write_sums
from sluiceway.core.parameters import head_of
from sluiceway.core.round_loop import Result
from sluiceway.core.settings import Training
from sluiceway.errors import InputError
from sluiceway.strategies import ClassMeans, FedAvg, Strategy
from sluiceway.transport.local import federate

STARTS: list[HeadStart] = ["means", "ridge"]
CLIENTS = [TinyText(18, 1), TinyText(5, 2), TinyText(0, 3), TinyText(11, 4)]


def trained(start: HeadStart, strategy: Strategy | None = None, **more: object) -> Result:
    model = more.pop("model", None) or TinyClassifier()
    assert isinstance(model, nn.Module)
    how = {"rounds": 2, "threads": 1, "device": "cpu", "training": Training(lr=0.02), **more}
    return federate(model, CLIENTS, TinyText(60, 9), strategy or FedAvg(), head_start=start, **how)


def pooled(model: TinyClassifier, data: TinyText) -> Tensor:
    """What enters the head."""
    with torch.no_grad():
        out = model.backbone(input_ids=data.ids, attention_mask=data.mask).last_hidden_state
    weights = data.mask.unsqueeze(-1)
    found: Tensor = (out * weights).sum(1) / weights.sum(1)
    return found


@pytest.mark.parametrize("start", STARTS)
def test_class_means_is_the_head_of_all_examples_and_no_training(start: HeadStart) -> None:
    result = trained(start, ClassMeans())
    model = TinyClassifier().eval()
    held = [data for data in CLIENTS if len(data)]
    z = torch.cat([pooled(model, data) for data in held])
    sums = fedalign.label_sums(z, torch.cat([data.labels for data in held]), 3)
    if start == "means":
        weight, bias = fedalign.means_head(sums)
    else:
        weight, bias = fedalign.ridge_head(fedalign.gram(z), sums)
    torch.testing.assert_close(result.tensors["head.weight"], weight.float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result.tensors["head.bias"], bias.float(), rtol=1e-4, atol=1e-4)
    first, second = result.records
    assert first.accuracy == second.accuracy
    assert (first.clients, first.train_loss, first.bytes_down) == ([], None, 0)
    assert (first.bytes_up > 0, second.bytes_up) == (True, 0)
    initial = dict(TinyClassifier().named_parameters())
    for name, tensor in result.tensors.items():
        assert name.startswith("head.") or torch.equal(tensor, initial[name])


@pytest.mark.parametrize("start", STARTS)
def test_workers_change_nothing_and_bytes_are_those_of_the_files(
    start: HeadStart, tmp_path: Path
) -> None:
    one, two = trained(start, participation=0.5), trained(start, participation=0.5, workers=2)
    assert [r.loss for r in one.records] == [r.loss for r in two.records]
    for key, tensor in one.tensors.items():
        assert torch.equal(two.tensors[key], tensor), key
    tensors = {"labels": torch.zeros(3, 17)}
    if start == "ridge":
        tensors["gram"] = torch.zeros(17 * 18 // 2)
    sent = sum(write_sums(tmp_path / f"{i}", HeadSums(i, tensors)) for i in (0, 1, 3))
    assert [r.bytes_up for r in one.records] == [r.bytes_up for r in two.records]
    assert trained(start, ClassMeans()).bytes_up == sent
    assert torch.equal(read_sums(tmp_path / "3").tensors["labels"], tensors["labels"])


def test_it_starts_better_than_a_random_head() -> None:
    far = {"rounds": 1, "training": Training(lr=1e-6)}
    means, random = (trained(start, **far).records[0].loss for start in ("means", "random"))
    assert means is not None
    assert random is not None
    assert means < random


def test_a_resumed_run_asks_for_no_sums_again(tmp_path: Path) -> None:
    whole = trained("means", rounds=3, personal_examples=0)
    trained("means", rounds=1, personal_examples=0, checkpoint=Checkpoint(tmp_path))
    again = Checkpoint(tmp_path, resume=True)
    resumed = trained("means", rounds=3, personal_examples=0, checkpoint=again)
    assert resumed.bytes_up == whole.bytes_up
    for key, tensor in whole.tensors.items():
        assert torch.equal(resumed.tensors[key], tensor), key


class Broken(TinyText):
    """Examples that cannot be read; their labels can."""

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], Tensor]:
        raise OSError("disk gone")


def test_a_client_without_sums_is_left_out_and_named() -> None:
    clients = [TinyText(12, 1), Broken(12, 2)]
    found = federate(
        TinyClassifier(), clients, TinyText(30, 9), ClassMeans(), rounds=1, head_start="means"
    )
    assert list(found.records[0].failed) == [1]
    assert "disk gone" in found.records[0].failed[1]
    with pytest.raises(RunFailed, match=r"no client gave sums .* \(client 0: .*disk gone"):
        federate(TinyClassifier(), [Broken(9, 1)], TinyText(9, 2), head_start="means")


def test_sums_are_checked() -> None:
    held = {"head.weight": torch.zeros(2, 3), "head.bias": torch.zeros(2)}
    start = StartingHead("means", held, torch.tensor([[1, 2]]))
    good = HeadSums(0, {"labels": torch.tensor([[1.0, 1, 1, 1], [2, 2, 2, 2]])})
    wrong = {
        "labels has shape": {"labels": torch.zeros(2, 3)},
        "labels is float64": {"labels": good.tensors["labels"].double()},
        "NaN or Inf": {"labels": good.tensors["labels"] * float("nan")},
        "not over the examples": {"labels": 2 * good.tensors["labels"]},
        "gram is missing": dict(good.tensors) | {"gram": torch.zeros(10)},
    }
    for why, tensors in wrong.items():
        assert why in str(start.fault(HeadSums(0, tensors)))
    assert start.fault(good) is None
    new = start.take([Failure(1, "gone", 7), replace(good, nbytes=5)])
    assert (start.nbytes, start.failed) == (12, {1: "gone"})
    assert {name: tuple(t.shape) for name, t in new.items()} == {
        "head.weight": (2, 3),
        "head.bias": (2,),
    }


class Doubled(TinyClassifier):
    """Its logits are not what its head gives."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return 2 * super().forward(input_ids, attention_mask)


def test_heads_are_found_or_refused() -> None:
    assert head_of(TinyClassifier()) == ("head.weight", "head.bias")
    assert head_of(nn.Sequential(nn.ReLU(), nn.Sequential(nn.Linear(3, 2)))) == (
        "1.0.weight",
        "1.0.bias",
    )
    assert head_of(nn.Linear(3, 2, bias=False)) == ("weight",)
    assert head_of(nn.Sequential(nn.Linear(3, 1))) == ()
    assert head_of(nn.Sequential(nn.Linear(3, 4), nn.ReLU())) == ()
    assert head_of(tiny_bert()) == ()
    assert head_of(nn.ReLU()) == ()
    frozen = TinyClassifier()
    frozen.head.requires_grad_(False)
    with pytest.raises(InputError, match="head_start = 'means' needs a model whose last layer"):
        trained("means", model=frozen)
    with pytest.raises(InputError, match="logits are not what its last layer gives"):
        trained("ridge", model=Doubled())
    with pytest.raises(InputError, match="logits are not what its last layer gives"):
        trained("ridge", model=Doubled(), workers=2)
    with pytest.raises(InputError, match="class-means trains nothing"):
        trained("random", ClassMeans())


def test_a_dense_model_of_tensors_and_a_head_without_bias() -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 6, generator=g), torch.arange(40) % 2
    data = torch.utils.data.TensorDataset(x + y[:, None], y)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2, bias=False))
    nn.init.eye_(model[0].weight)
    found = federate(model, [data], data, ClassMeans(), rounds=1, head_start="ridge")
    assert found.accuracy > 0.6
    assert set(found.tensors) == {"0.weight", "0.bias", "1.weight"}


@pytest.mark.parametrize("start", STARTS)
def test_half_precision_keeps_its_type(start: HeadStart) -> None:
    model = TinyClassifier().bfloat16()
    found = trained(start, ClassMeans(), model=model)
    assert found.tensors["head.weight"].dtype == torch.bfloat16
    assert (
        F.cosine_similarity(
            found.tensors["head.weight"].float(),
            trained(start, ClassMeans()).tensors["head.weight"],
        ).min()
        > 0.9
    )
