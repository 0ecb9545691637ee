"""LoRA under every strategy: what is averaged is what the adapters do to the model."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.strategies.test_aggregation import several as plain_several
from tests.worlds import TinyClassifier, TinyText, slow
from torch import Tensor, nn

from sluiceway import fedalign
from sluiceway.core.aggregation import aggregate
from sluiceway.core.settings import Training
from sluiceway.federated.client import Worker, prepare
from sluiceway.moe import add_lora, find_adapters, moe_layout
from sluiceway.strategies import FedAlignMoE, FedAvg, Strategy, Update, strategy
from sluiceway.transport.local import federate

pytest.importorskip("peft", reason="the extra [lora] is not installed")
RANK, ALPHA = 4, 6.0  # the rank is the number of experts too: shapes alone do not tell the axes
NAMES = ("fedavg", "fedprox", "fedmoe", "usage", "scaffold", "fedalign-moe")
EXACT = ("frozen-a", "residual")


def adapted(gate: bool = False, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A tiny classifier with adapters on its experts; its gate is trained whole or adapted too."""
    model = TinyClassifier().to(dtype)
    found = moe_layout(model)
    chosen = found.expert_params | (found.gate_params if gate else frozenset())
    model.requires_grad_(False)
    add_lora(model, {n: p for n, p in model.named_parameters() if n in chosen}, RANK, ALPHA)
    for name, param in model.named_parameters():
        whole = name.startswith("head") or (not gate and name in found.gate_params)
        param.requires_grad_(whole or ".lora_" in name)
    with torch.no_grad():  # as after some rounds
        generator = torch.Generator().manual_seed(7)
        for name, param in model.named_parameters():
            if ".lora_B." in name:
                param.copy_(0.1 * torch.randn(param.shape, generator=generator))
    return model


def ready(name: str, clients: int = 5, gate: bool = False, **parameters: object) -> Strategy:
    made = strategy(name, **parameters)
    prepare(adapted(gate), made, clients)
    return made


def update(made: Strategy, client: int, plain: Update) -> Update:
    """The routing report of `plain`, with random values for all that this strategy sends."""
    g = torch.Generator().manual_seed(client)
    sent = {}
    for piece in made.shared_pieces:
        if made.sends(piece, plain.routing):
            old = piece.of(made.tensors)
            sent[piece.key] = old + 0.1 * torch.randn(old.shape, generator=g)
    return Update(client, 1, plain.examples, sent, plain.routing)


def several(made: Strategy) -> list[Update]:
    return [update(made, u.client, u) for u in plain_several()]


def applied(made: Strategy, a: Tensor, b: Tensor, number: int) -> Tensor:
    """What pair `number` adds to its matrix, float64."""
    return made.layout.adapters[number].delta(a.double(), b.double())


def merged_mean(made: Strategy, updates: Sequence[Update], number: int) -> Tensor:
    """The weighted mean of the clients' merged matrices W + scale B A, by a loop in float64."""
    pair = made.layout.adapters[number]
    base = (
        BASE[pair.base.param] if pair.base.index is None else BASE[pair.base.param][pair.base.index]
    )
    top, bottom = torch.zeros_like(base), torch.zeros((), dtype=torch.float64)
    for u in updates:
        a = u.tensors.get(pair.a.key, pair.a.of(made.tensors))
        b = u.tensors.get(pair.b.key, pair.b.of(made.tensors))
        weight = torch.as_tensor(made.weight(u, pair.b), dtype=torch.float64)
        weight = weight.reshape(-1, *[1] * weight.ndim)
        top = top + weight * (base + applied(made, a, b, number))
        bottom = bottom + weight
    old = base + applied(made, pair.a.of(made.tensors), pair.b.of(made.tensors), number)
    return torch.where(bottom > 0, top / bottom.clamp_min(1e-30), old)


BASE = {n: p.detach().double() for g in (False, True) for n, p in adapted(g).named_parameters()}


def merged_now(made: Strategy, number: int) -> Tensor:
    """The server's own merged matrix."""
    pair = made.layout.adapters[number]
    base = pair.base.of({**BASE, **made.tensors}).double()
    return base + applied(made, pair.a.of(made.tensors), pair.b.of(made.tensors), number)


@pytest.mark.parametrize("lora", EXACT)
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_exact_aggregation_is_the_mean_of_the_merged_weights(
    name: str, lora: str, gate: bool
) -> None:
    # By region there is no mean of whole matrices.
    experts = {"experts": "semantic"} if name == "fedalign-moe" else {}
    made = ready(name, gate=gate, lora=lora, **experts)
    twin = ready(name, gate=gate, lora=lora, **experts)
    updates = several(made)
    aggregate(made, updates)
    twin.__dict__ |= {k: v for k, v in made.__dict__.items() if k != "tensors"}  # its weights
    assert len(made.layout.adapters) == 8 + gate
    for number in range(len(made.layout.adapters)):
        wanted = merged_mean(twin, updates, number)
        torch.testing.assert_close(merged_now(made, number), wanted, atol=1e-5, rtol=0)


def test_plain_averaging_is_not_the_mean_of_the_merged_weights() -> None:
    made, twin = (ready("fedavg", lora="average") for _ in range(2))
    updates = several(made)
    aggregate(made, updates)
    off = [(merged_now(made, n) - merged_mean(twin, updates, n)).abs().max() for n in range(8)]
    assert min(off) > 1e-4


@pytest.mark.parametrize("lora", [*EXACT, "average"])
@pytest.mark.parametrize("name", NAMES)
def test_one_client_alone_gets_exactly_its_own_adapters(name: str, lora: str) -> None:
    made = ready(name, clients=1, lora=lora, **({"hold": 0.0} if name == "fedmoe" else {}))
    before = {n: t.clone() for n, t in made.tensors.items()}
    alone = update(made, 0, plain_several()[0])
    aggregate(made, [alone])
    sent = {piece.param for piece in made.shared_pieces}
    for piece in made.shared_pieces:
        assert torch.equal(piece.of(made.tensors), alone.tensors[piece.key]), piece.key
    for param in set(before) - sent:  # A that is frozen, or the matrices below the adapters
        assert torch.equal(made.tensors[param], before[param]), param


def test_an_update_carries_adapters_only() -> None:
    model, made = adapted(), FedAvg()
    prepare(model, made, 1)
    worker = Worker(model, [TinyText(16, 1)], TinyText(4, 2), made, Training())
    sent = worker.train(0, made.broadcast(1), {}, personal=False).tensors
    assert any("lora_B" in key for key in sent)
    assert not any("base_layer." in key.replace("base_layer.lora_", "lora_") for key in sent)
    assert not any("lora_A" in key for key in sent)
    residual = FedAvg(lora="residual")
    prepare(adapted(), residual, 1)
    keys = {piece.key for piece in residual.shared_pieces}
    assert any("lora_A" in key for key in keys)
    assert any(name.endswith("up_proj") for name in residual.broadcast(1).tensors)
    assert not any(key.split("[")[0].endswith("up_proj") for key in keys)


def test_directions_are_those_of_the_products() -> None:
    made = ready("fedalign-moe", lora="residual")
    assert isinstance(made, FedAlignMoE)
    updates = several(made)
    for e in range(4):
        rows = []
        for u in updates:
            row = []
            for number, pair in enumerate(made.layout.adapters):
                if made.layout.owner(pair.b.key) == (0, e):
                    old = pair.a.of(made.tensors), pair.b.of(made.tensors)
                    new = (
                        u.tensors.get(p.key, o) for p, o in zip((pair.a, pair.b), old, strict=True)
                    )
                    row.append(
                        (applied(made, *new, number) - applied(made, *old, number)).flatten()
                    )
            rows.append(torch.cat(row))
        gram = fedalign.DirectionGram(len(rows))
        gram.add(torch.stack(rows))
        wanted = gram.cosine()
        got = made.directions(updates, made.layout.expert(0, e))
        torch.testing.assert_close(got, wanted, atol=1e-9, rtol=0)


@settings(max_examples=30)
@given(
    st.integers(1, 4), st.integers(1, 5), st.integers(1, 6), st.integers(1, 6), st.integers(0, 9)
)
def test_products_are_compared_without_forming_them(
    n: int, r: int, out: int, width: int, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    old_a, old_b = torch.randn(r, width, generator=g), torch.randn(out, r, generator=g)
    new = [(torch.randn(r, width, generator=g), torch.randn(out, r, generator=g)) for _ in range(n)]
    factors = [fedalign.product_change(old_a, old_b, a, b) for a, b in new]
    dense = [(b.double() @ a.double() - old_b.double() @ old_a.double()).flatten() for a, b in new]
    for (left, right), change in zip(factors, dense, strict=True):
        torch.testing.assert_close((left @ right).flatten(), change, atol=1e-6, rtol=0)
    left, right = (torch.stack(f) for f in zip(*factors, strict=True))
    gram = fedalign.product_gram(left, right)
    torch.testing.assert_close(
        gram, torch.stack(dense) @ torch.stack(dense).T, atol=1e-4, rtol=1e-6
    )
    still, _ = fedalign.product_change(old_a, old_b, None, None)
    assert bool((still[:, :r] == 0).all())


@pytest.mark.parametrize("name", [*NAMES, "non-expert", "frozen-gate", "fedadam"])
@pytest.mark.parametrize("lora", ["frozen-a", *slow("residual", "average")])
def test_rounds_of_adapters_train_and_do_not_depend_on_workers(name: str, lora: str) -> None:
    clients, test = [TinyText(30, 1), TinyText(20, 2), TinyText(9, 3)], TinyText(40, 9)
    found = []
    for workers in (1, 2):
        result = federate(
            adapted(gate=True),
            clients,
            test,
            strategy(name, lora=lora),
            rounds=2,
            training=Training(lr=0.02, local_epochs=2),
            device="cpu",
            workers=workers,
            threads=1,
        )
        assert result.rejected == 0
        if name != "fedadam":  # two steps of its server are too few
            assert result.records[-1].train_loss < result.records[0].train_loss
        found.append(result)
    assert found[0].accuracy_by_round == found[1].accuracy_by_round
    for key, tensor in found[0].tensors.items():
        assert torch.equal(found[1].tensors[key], tensor), key


def test_adapters_of_a_dense_model_are_aggregated_exactly_too() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    model = TinyClassifier(experts=0)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["query", "value"]), model)
    assert len(find_adapters(model)) == 4
    made = FedAvg()
    prepare(model, made, 2)
    assert len(made.pairs) == 4
    assert not any("lora_A" in piece.key for piece in made.shared_pieces)
