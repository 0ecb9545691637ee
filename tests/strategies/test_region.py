"""Experts and gates averaged in least squares over their tokens, against loops in float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from tests.federated.small import one_round, tiny
from tests.strategies.test_aggregation import LAYOUT, TENSORS, D, E, assert_pieces, several
from tests.worlds import TinyClassifier
from torch import Tensor

from sluiceway import fedalign
from sluiceway.core.aggregation import Aggregation, aggregate
from sluiceway.core.guards import fault
from sluiceway.core.settings import Training
from sluiceway.errors import InputError
from sluiceway.federated.client import prepare
from sluiceway.moe import add_lora, moe_layout
from sluiceway.strategies import FedAlignMoE, Update

F = 32  # inner width
FORMS = [
    {"moments": "full"},
    {"moments": "full", "down": "moments", "gate": "region"},
    {"moments": "low-rank", "rank": 5, "gate": "region"},
    {"moments": "low-rank", "rank": 3, "down": "moments"},
    {"moments": "diagonal", "gate": "region"},
    {"moments": "update", "rank": 0, "gate": "region"},
    {"moments": "update", "rank": 0, "down": "moments"},
    {"moments": "full", "down": "mean"},
]


def region(**parameters: object) -> FedAlignMoE:
    """A strategy whose experts are averaged by region, set up."""
    made = FedAlignMoE(**{"experts": "region", "moments": "full", "least_tokens": 0, **parameters})  # type: ignore[arg-type]
    made.setup(TENSORS, LAYOUT, 5)
    return made


def with_moments(made: FedAlignMoE, update: Update) -> Update:
    """The update with moments of random tokens, of the experts that it used."""
    g = torch.Generator().manual_seed(update.client)
    sent: dict[str, Tensor] = {}
    for source, (one, inputs) in made.sources.items():
        if one.expert is None or update.routing[0].load[one.expert] > 0:
            rows = torch.randn(20, one.width, generator=g) + 0.5
            packed = made.packed_moment(one, inputs, rows, torch.rand(20, generator=g), 50.0)
            sent[f"moment/{source}"] = packed.bfloat16()
    return replace(update, extra=sent)


def dense(packed: Tensor, size: int) -> Tensor:
    """A sent moment as a matrix, off-diagonals times 0.9, by loops."""
    packed = packed.double()
    matrix = torch.zeros(size, size).double()
    whole = int((2 * packed.numel()) ** 0.5) if packed.ndim == 1 else 0
    for a in range(size):
        for b in range(size):
            low, high = min(a, b), max(a, b)
            if packed.ndim == 1:
                value = packed[low * whole - low * (low - 1) // 2 + high - low]
            elif a == b:
                value = packed[-1, a]
            else:
                value = (packed[:-1, a] * packed[:-1, b]).sum()
            matrix[a, b] = value * (1 if a == b else 0.9)
    return matrix


def combined_by_loop(
    updates: list[Update], weight: str, bias: str | None, source: str | None
) -> tuple[Tensor, Tensor | None]:
    """old + (sum_i Delta_i A_i)(sum_i A_i)^-1 of one map [out, in]; A from the change if None."""

    def joined(tensors: Mapping[str, Tensor]) -> Tensor:
        matrix = tensors[weight].double()
        return matrix if bias is None else torch.cat([matrix, tensors[bias].double()[:, None]], 1)

    old = joined({p.key: p.of(TENSORS) for p in LAYOUT.pieces(TENSORS)})
    total = torch.zeros(old.shape[1], old.shape[1]).double()
    moved = torch.zeros_like(old)
    for u in updates:
        if weight not in u.tensors:
            continue
        change = joined(u.tensors) - old
        if source is None:
            owner = LAYOUT.owner(weight)
            share = float(u.routing[0].load[owner[1]]) / u.routing[0].tokens if owner else 1.0
            matrix = change.T @ change
            matrix = share * matrix / matrix.trace()
            matrix = 0.9 * matrix + 0.1 * matrix.diagonal().diag()
        else:
            matrix = dense(u.extra[f"moment/{source}"], old.shape[1])
        total += u.examples * matrix
        moved += u.examples * change @ matrix
    new = old + moved @ torch.linalg.inv(total)
    return (new, None) if bias is None else (new[:, :-1], new[:, -1])


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_experts_and_gate_are_combined_as_a_loop_says(form: dict[str, object]) -> None:
    made = region(**form)
    updates = [with_moments(made, u) for u in several()]
    aggregate(made, updates)
    by_key = {p.key: p.of(made.tensors).double() for p in LAYOUT.pieces(TENSORS)}
    block = LAYOUT.blocks[0]
    estimated = form["moments"] == "update"
    for e in (0, 1, 3):
        names = {p.param.rpartition(".")[2]: p.key for p in block.expert(e)}
        source = None if estimated else f"0/{e}/hidden"
        if form["moments"] != "diagonal":
            up, bias = combined_by_loop(updates, names["up_proj"], names["up_bias"], source)
            torch.testing.assert_close(by_key[names["up_proj"]], up, atol=1e-4, rtol=1e-3)
            torch.testing.assert_close(by_key[names["up_bias"]], bias, atol=1e-4, rtol=1e-3)
        used = [u for u in updates if names["down_proj"] in u.tensors]
        share = [float(u.routing[0].load[e]) / u.routing[0].tokens for u in used]
        if form.get("down", "diagonal") == "diagonal" and estimated:
            old = next(p for p in block.expert(e) if p.key == names["down_proj"]).of(TENSORS)
            changes = [(u.tensors[names["down_proj"]] - old).double() for u in used]
            columns = [c.square().sum(0) / c.square().sum() for c in changes]
            squares = [
                u.examples * s * torch.cat([c, torch.ones(1)])
                for u, s, c in zip(used, share, columns, strict=True)
            ]
        elif form.get("down", "diagonal") == "diagonal":
            squares = [u.examples * u.extra[f"moment/0/{e}/inner"][0].double() for u in used]
        elif form["down"] == "mean":
            squares = [
                torch.full((F + 1,), u.examples * s).double()
                for u, s in zip(used, share, strict=True)
            ]
        else:
            continue
        pairs = list(zip(used, squares, strict=True))
        down = sum(u.tensors[names["down_proj"]].double() * s[:F] for u, s in pairs)
        down = down / sum(s[:F] for _, s in pairs)
        torch.testing.assert_close(by_key[names["down_proj"]], down, atol=1e-5, rtol=1e-4)
        bias = sum(u.tensors[names["down_bias"]].double() * s[F] for u, s in pairs)
        bias = bias / sum(s[F] for _, s in pairs)
        torch.testing.assert_close(by_key[names["down_bias"]], bias, atol=1e-5, rtol=1e-4)
    for piece in block.expert(2):  # of the first client alone
        assert torch.equal(piece.of(made.tensors), updates[0].tensors[piece.key])
    if form.get("gate") == "region" and form["moments"] != "diagonal":
        (gate,) = block.gate
        wanted, _ = combined_by_loop(updates, gate, None, None if estimated else "0/gate/hidden")
        torch.testing.assert_close(by_key[gate], wanted, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_one_client_alone_gets_its_own_back_and_order_changes_nothing(
    form: dict[str, object],
) -> None:
    alone = region(**form, align=False, consistency=False)
    (update, *_) = updates = [with_moments(alone, u) for u in several()]
    aggregate(alone, [update])
    for piece in LAYOUT.pieces(TENSORS):
        assert torch.equal(piece.of(alone.tensors), update.tensors[piece.key]), piece.key
    made, turned = region(**form), region(**form)
    aggregate(made, updates)
    aggregate(turned, updates[::-1])
    assert_pieces(turned, {p.key: p.of(made.tensors).double() for p in LAYOUT.pieces(TENSORS)})


def test_it_streams_and_memory_is_two_sums() -> None:
    made = region()
    assert not Aggregation(made, 1).holds
    updates = [with_moments(made, u) for u in several()]
    made.begin(1)
    made.accumulate(updates[0])
    held = {name: t.shape for name, t in (made.regions.weighted | made.regions.total).items()}
    for update in updates[1:]:
        made.accumulate(update)
    assert held == {n: t.shape for n, t in (made.regions.weighted | made.regions.total).items()}


def test_without_moments_the_mean_by_tokens_stands() -> None:
    """As where a rule has taken them away."""
    made, updates = region(down="mean"), several()
    aggregate(made, updates)
    key = next(p.key for p in LAYOUT.expert(0, 1) if "up_proj" in p.key)
    held = [u for u in updates if key in u.tensors]
    weights = [u.examples * float(u.routing[0].load[1]) / u.routing[0].tokens for u in held]
    wanted = sum(w * u.tensors[key].double() for w, u in zip(weights, held, strict=True))
    piece = next(p for p in LAYOUT.expert(0, 1) if p.key == key)
    torch.testing.assert_close(
        piece.of(made.tensors).double(), wanted / sum(weights), atol=1e-6, rtol=1e-5
    )


def test_updates_with_wrong_moments_are_refused() -> None:
    made = region()
    (update, *_) = (with_moments(made, u) for u in several())
    routing = [replace(block, region=None) for block in update.routing]
    update = replace(update, routing=routing, metrics={"loss": 1.0})
    assert fault(update, made, 1, [0]) is None
    name = "moment/0/1/hidden"
    packed = update.extra[name]
    wrong: dict[str, Mapping[str, Tensor]] = {
        "is missing": {k: v for k, v in update.extra.items() if k != name},
        "below zero": {**update.extra, name: -packed},
        "NaN": {**update.extra, name: packed * float("nan")},
        "has shape": {**update.extra, name: packed[:-1]},
        "expected bfloat16": {**update.extra, name: packed.float()},
        "not to be sent": {**update.extra, "moment/0/9/hidden": packed},
    }
    for why, extra in wrong.items():
        found = fault(replace(update, extra=extra), made, 1, [0])
        assert found is not None
        assert why in found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_client_sends_the_moments_of_its_tokens(dtype: torch.dtype) -> None:
    """Of a round of one step, against a loop over the tokens that reach the block."""
    seen: list[Tensor] = []
    model = tiny(dtype, dropout=0.0)
    layout = moe_layout(model)
    router = model.get_submodule(layout.blocks[0].router)
    outputs: list[tuple[Tensor, ...]] = []
    masks: list[Tensor] = []

    def hook(_m: object, args: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled():
            seen.append(args[0].detach().reshape(-1, D).double())
            outputs.append(output)

    router.register_forward_hook(hook)
    model.register_forward_pre_hook(
        lambda m, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    made = FedAlignMoE(experts="region", moments="full", gate="region", align=False, least_tokens=0)
    _, update = one_round(model, made, Training(batch_size=64), personal_examples=0)
    assert fault(replace(update, client=0), made, 1, [0]) is None
    assert set(update.extra) == set(made.client_extra())
    (rows,), ((_, weights, indices),) = seen, outputs
    hidden = update.routing[0]
    counted = masks[0].flatten().bool()
    assert int(counted.sum()) == hidden.tokens
    for e in range(E):
        share = weights.detach().masked_fill(indices != e, 0).sum(1).double() * counted
        inputs = fedalign.with_one(rows)
        wanted = fedalign.second_moment(inputs, share, hidden.tokens)
        sent = fedalign.unpacked_triangle(update.extra[f"moment/0/{e}/hidden"]).double()
        torch.testing.assert_close(sent, wanted, atol=0.02, rtol=0.02)
    wanted = fedalign.second_moment(rows, counted.double(), hidden.tokens)
    sent = fedalign.unpacked_triangle(update.extra["moment/0/gate/hidden"]).double()
    torch.testing.assert_close(sent, wanted, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("epochs", [1, 3])
def test_of_few_tokens_neither_region_nor_moments_are_told(epochs: int) -> None:
    """Tokens count once, however often they are trained on."""
    whole = FedAlignMoE(experts="region", moments="full", least_tokens=0)
    _, update = one_round(tiny(dropout=0.0), whole, Training(local_epochs=1))
    least = int(update.routing[0].load.median()) + 1
    made = FedAlignMoE(experts="region", moments="full", least_tokens=least)
    training = Training(local_epochs=epochs, lr=1e-12)
    _, update = one_round(tiny(dropout=0.0), made, training)
    load = update.routing[0].load / epochs
    assert 0 < int((load < least).sum()) < E
    for e in range(E):
        assert (f"moment/0/{e}/hidden" in update.extra) == bool(load[e] >= least)
        assert (f"moment/0/{e}/inner" in update.extra) == bool(load[e] >= least)
    semantic = FedAlignMoE(experts="semantic", least_tokens=least)
    _, update = one_round(tiny(dropout=0.0), semantic, training)
    told = update.routing[0].region
    assert told is not None
    assert torch.equal(told.any(1), load >= least)


def test_a_map_of_which_one_client_tells_no_moment_is_the_mean_by_tokens() -> None:
    made, whole, plain = (
        region(down="mean", least_tokens=4),
        region(down="mean"),
        region(down="mean"),
    )
    updates = [with_moments(made, u) for u in several()]
    aggregate(whole, updates)
    aggregate(plain, several())
    name = "moment/0/1/hidden"
    at = next(i for i, u in enumerate(updates) if name in u.extra)
    rest = {key: value for key, value in updates[at].extra.items() if key != name}
    updates[at] = replace(updates[at], extra=rest)
    aggregate(made, updates)
    first = {piece.key for piece in LAYOUT.expert(0, 1)}
    for piece in LAYOUT.pieces(TENSORS):
        as_here = plain if piece.key in first else whole
        assert torch.equal(piece.of(made.tensors), piece.of(as_here.tensors)), piece.key
    up = next(p for p in LAYOUT.expert(0, 1) if "up_proj" in p.key)
    assert not torch.equal(up.of(plain.tensors), up.of(whole.tensors))


def lora_model() -> TinyClassifier:
    pytest.importorskip("peft", reason="the extra [lora] is not installed")
    model = TinyClassifier()
    chosen = {
        name: p
        for name, p in model.named_parameters()
        if name in moe_layout(model).expert_params and name.endswith("proj")
    }
    add_lora(model, chosen, 2, 4.0)
    return model


def test_lora_pairs_are_combined_on_their_product() -> None:
    """B minimises the error of B A x, as the loop over x in the full space says."""
    model = lora_model()
    made = FedAlignMoE(
        experts="region", moments="full", align=False, consistency=False, least_tokens=0
    )
    prepare(model, made, 2)
    one = next(one for one, _ in made.sources.values())
    assert one.pair is not None
    g = torch.Generator().manual_seed(0)
    updates = []
    tokens = []
    a = one.pair.a.of(made.tensors)
    for client, template in enumerate(several()[:2]):
        sent = {
            p.key: p.of(made.tensors) + 0.1 * torch.randn(p.of(made.tensors).shape, generator=g)
            for p in made.shared_pieces
        }
        rows = torch.randn(40, a.shape[1], generator=g)
        weights = torch.ones(40)
        tokens.append(rows.double())
        packed = made.packed_moment(one, 2, rows @ a.T, weights, 40.0)
        extra = {f"moment/{one.source}": packed}
        updates.append(Update(client, 1, 10, sent, template.routing, extra=extra))
    old = one.weight.of(made.tensors).double().clone()
    aggregate(made, updates)
    # The same with A's inputs, x, and the matrix of 0.9 off the diagonal of A x.
    total, moved = torch.zeros(2, 2).double(), torch.zeros_like(old)
    for u, x in zip(updates, tokens, strict=True):
        z = x @ a.double().T
        matrix = z.T @ z / 40
        matrix = 0.9 * matrix + 0.1 * matrix.diagonal().diag()
        total += 10 * matrix
        moved += 10 * (u.tensors[one.weight.key].double() - old) @ matrix
    wanted = old + moved @ torch.linalg.inv(total)
    torch.testing.assert_close(one.weight.of(made.tensors).double(), wanted, atol=1e-4, rtol=1e-3)


def test_lora_with_a_trained_a_is_refused() -> None:
    with pytest.raises(InputError, match=r'lora = "frozen-a"'):
        prepare(lora_model(), FedAlignMoE(experts="region", lora="residual"), 2)


def test_switches_and_presets() -> None:
    assert FedAlignMoE().experts == "region"
    assert FedAlignMoE(lora="residual").experts == "semantic"
    assert FedAlignMoE(match="meaning").experts == "semantic"
    assert FedAlignMoE(semantic=False).experts == "mean"
    assert FedAlignMoE(semantic=True).experts == "semantic"
    assert FedAlignMoE(experts="region", semantic=False).experts == "region"
    paper = FedAlignMoE(preset="paper")
    assert (paper.experts, paper.weights, paper.reference) == ("semantic", "select", "marginal")
    assert FedAlignMoE(preset="paper", reference="conditional").reference == "conditional"
    assert FedAlignMoE(preset="paper", semantic=False).experts == "mean"
    with pytest.raises(ValueError, match="semantic = true"):
        FedAlignMoE(experts="region", semantic=True)
    with pytest.raises(ValueError, match="meaning"):
        FedAlignMoE(experts="region", match="meaning")
