"""Frozen layers computed once: the same training, less of it; and where that would not be so."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from tests.worlds import TinyClassifier, TinyText
from torch import Tensor, nn
from torch.utils.data import Subset

from sluiceway.core.batches import Batch
from sluiceway.core.round_loop import Result
from sluiceway.core.settings import Training
from sluiceway.federated.feature_files import FeatureFiles
from sluiceway.federated.frozen_prefix import FeatureCache, FeatureStore, find_frozen_prefix, ranges
from sluiceway.transport.local import federate, usable_prefix

CPU = torch.device("cpu")


def frozen_below(model: TinyClassifier) -> TinyClassifier:
    """Only the mixture of the last layer and the head are trained."""
    for name, param in model.named_parameters():
        param.requires_grad_("layer.2.intermediate" in name or name.startswith("head"))
    return model


def test_ranges() -> None:
    assert ranges(torch.tensor([5, 0, 9]), torch.tensor([2, 3, 1])).tolist() == [5, 6, 0, 1, 2, 9]


def test_trunk_is_found_and_features_hold_what_enters_the_first_trained_layer() -> None:
    model = frozen_below(TinyClassifier(layers=3)).eval()
    trunk = find_frozen_prefix(model)
    assert trunk is not None
    assert len(trunk.layers) == 2
    data = TinyText(10, 1)
    store = FeatureStore.of(trunk, data, torch.arange(10), CPU, 1 << 20)
    assert store.where == "memory"
    assert len(store.flat) == int(data.mask.sum())  # padding is not kept
    seen: list[Tensor] = []
    top = model.backbone.encoder.layer[2]
    hook = top.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    rows = torch.tensor([7, 2, 5])
    with torch.no_grad():
        model(data.ids[rows], data.mask[rows])
    hook.remove()
    wanted = seen[0] * data.mask[rows].unsqueeze(-1)
    torch.testing.assert_close(store.gather(rows, data.mask[rows]), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("limit", [1 << 20, 0])
def test_training_on_features_is_training(limit: int) -> None:
    clients, test = [TinyText(20, 1), TinyText(0, 2), TinyText(9, 3)], TinyText(30, 4)
    with_cache, without = (frozen_below(TinyClassifier(layers=3)) for _ in range(2))
    cache = FeatureCache(limit)
    one = federate(with_cache, clients, test, rounds=2, features=cache, device="cpu")
    assert {s.where for s in cache.stores.values()} == {"memory" if limit else "file"}
    broken = without.backbone.encoder.layer
    # The same model, its stack hidden from the search: every layer runs in every step.
    without.backbone.encoder.layer = _Unlisted(broken)  # type: ignore[assignment]
    assert find_frozen_prefix(without) is None
    two = federate(without, clients, test, rounds=2, device="cpu")
    assert one.accuracy_by_round == two.accuracy_by_round
    for name, tensor in one.tensors.items():
        torch.testing.assert_close(tensor, two.tensors[name], atol=1e-5, rtol=1e-4)


class _Unlisted(nn.Module):
    """Layers that are iterated like a list but are none."""

    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        for number, layer in enumerate(layers):
            self.add_module(str(number), layer)

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self.children())

    def __getitem__(self, part):  # type: ignore[no-untyped-def]
        return list(self.children())[part]

    def __len__(self) -> int:
        return len(list(self.children()))


class SkipNet(nn.Module):
    """Its input reaches the trained part by a second way, past the frozen layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.stack = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 3)])
        self.stack[0].requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.stack[1](self.stack[0](hidden) + hidden)


class Points:
    def __init__(self, size: int) -> None:
        g = torch.Generator().manual_seed(size)
        self.x = torch.randn(size, 4, generator=g)
        self.labels = (self.x[:, 0] > 0).long()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.labels[index]


def test_a_trunk_that_is_not_all_that_feeds_the_rest_is_not_passed_over() -> None:
    model = SkipNet()
    assert find_frozen_prefix(model) is not None
    assert usable_prefix(model, [Points(5)], CPU) is None


def test_plain_sequential_with_tensor_inputs_and_subsets_share_one_store() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    model[0].requires_grad_(False)
    whole, cache = Points(40), FeatureCache(1 << 20)
    parts = [Subset(whole, range(15)), Subset(whole, range(15, 40))]  # type: ignore[type-var]
    before = model[0].weight.clone()
    result = federate(
        model, parts, whole, rounds=30, features=cache, training=Training(lr=0.1), device="cpu"
    )
    assert len(cache.stores) == 1
    assert torch.equal(model[0].weight, before)
    assert "forward" not in model[0].__dict__  # the model is as it was
    assert result.accuracy > 0.7
    assert model(whole.x).shape == (40, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_options_of_an_example_and_half_precision_run_past_the_trunk(dtype: torch.dtype) -> None:
    class Options(TinyClassifier):
        """Scores each of 2 options [B, 2, S] by itself."""

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            flat = super().forward(input_ids.flatten(0, 1), attention_mask.flatten(0, 1))
            return flat[:, 0].view(-1, 2)

    class Pairs(TinyText):
        def __getitem__(self, index: int) -> tuple[dict[str, Tensor], Tensor]:
            rows = torch.tensor([index, (index + 1) % len(self)])
            inputs = {"input_ids": self.ids[rows], "attention_mask": self.mask[rows]}
            return inputs, self.labels[index] % 2

    model = frozen_below(Options(layers=3)).to(dtype).eval()
    clients = [Pairs(12, 1), Pairs(9, 2)]
    trunk = usable_prefix(model, clients, CPU)
    assert trunk is not None
    (examples, _) = FeatureCache(1 << 20).wrap(trunk, clients, CPU)
    rows = torch.tensor([3, 0, 7])
    plain, known = (Batch.of(data, rows, CPU) for data in (clients[0], examples))
    assert known.features is not None
    assert known.features.shape == (3, 2, 8, 16)
    with torch.no_grad():
        wanted = plain.run(model)
        with trunk.skipped():
            got = known.run(model)
    torch.testing.assert_close(got, wanted, atol=4 * torch.finfo(dtype).eps, rtol=0)


def test_no_trunk_where_the_first_layer_is_trained() -> None:
    assert find_frozen_prefix(TinyClassifier(layers=2)) is None


def test_batches_without_features_are_untouched() -> None:
    data = TinyText(4, 1)
    batch = Batch.of(data, torch.arange(4), CPU)
    assert batch.features is None
    assert batch.mask is not None
    assert batch.mask.shape == (4, 8)


def run_with(files: FeatureFiles, **changes: float) -> Result:
    model = frozen_below(TinyClassifier(layers=3))
    for name, value in changes.items():
        with torch.no_grad():
            model.get_parameter(name.replace("__", ".")).view(-1)[0] += value
    clients = [TinyText(20, 1), TinyText(9, 3)]
    cache = FeatureCache(1 << 20, files)
    return federate(model, clients, TinyText(30, 4), rounds=2, features=cache, device="cpu")


def test_features_on_the_disk_are_used_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = FeatureFiles(tmp_path / "features", 1 << 20)
    first = run_with(files)
    assert (tmp_path / "features").stat().st_mode & 0o777 == 0o700
    kept = {path.name: path.read_bytes() for path in files.folder.iterdir()}
    assert len(kept) == 3  # two clients and the test set
    computed: list[int] = []
    of = FeatureStore.of

    def counting(trunk, examples, *rest):  # type: ignore[no-untyped-def]
        computed.append(len(examples))
        return of(trunk, examples, *rest)

    monkeypatch.setattr(FeatureStore, "of", counting)
    again = run_with(files)
    assert computed == []
    assert again.accuracy_by_round == first.accuracy_by_round
    assert all(torch.equal(again.tensors[name], t) for name, t in first.tensors.items())
    # another trained value changes nothing of it, another frozen one all
    run_with(files, head__bias=1.0)
    assert computed == []
    run_with(files, backbone__encoder__layer__0__attention__self__query__bias=0.5)
    assert sorted(computed) == [9, 20, 30]
    # a damaged file is computed anew
    name = min(kept)
    (files.folder / name).write_bytes(kept[name][:-7])
    computed.clear()
    run_with(files)
    assert len(computed) == 1
    assert (files.folder / name).read_bytes() == kept[name]


def test_the_disk_s_limit_removes_what_was_used_least_recently(tmp_path: Path) -> None:
    files = FeatureFiles(tmp_path, 3000)
    for number, name in enumerate(("a", "b", "c")):
        files.save(name, {"flat": torch.zeros(200)})
        os.utime(tmp_path / name, (number, number))
    assert files.load("a") is not None  # used now
    files.save("d", {"flat": torch.zeros(200)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "c", "d"]
    files.save("huge", {"flat": torch.zeros(1000)})
    assert not (tmp_path / "huge").exists()
    assert files.load("b") is None
