"""What each strategy makes of updates, against loops in float64 and by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fedalign.loops import loop_weights
from tests.worlds import TinyClassifier
from torch import Tensor

from sluiceway import fedalign
from sluiceway.core.aggregation import aggregate
from sluiceway.core.parameters import exchanged
from sluiceway.federated.client import trained_layout
from sluiceway.moe import BlockRouting, MoELayout, NoExpertsError, moe_layout
from sluiceway.strategies import STRATEGIES, FedAlignMoE, Strategy, Update, strategy
from sluiceway.strategies.matching import reordered

E, K, D = 4, 2, 16
OFF = {"align": False, "consistency": False, "adaptive": False, "semantic": False}
ALIGNED = {"align": True, "gate": "consistency"}


def world() -> tuple[dict[str, Tensor], MoELayout]:
    """Initial tensors of a tiny classifier with one mixture block, and where its experts are."""
    model = TinyClassifier()
    tensors = {n: t.detach().clone() for n, t in exchanged(model).items()}
    return tensors, trained_layout(moe_layout(model), set(tensors))


TENSORS, LAYOUT = world()


def ready(name: str, clients: int = 5, **parameters: object) -> Strategy:
    made = strategy(name, **parameters)
    made.setup(TENSORS, LAYOUT, clients)
    return made


def routing(generator: torch.Generator, absent: Sequence[int] = ()) -> BlockRouting:
    load = torch.randint(1, 50, (E,), generator=generator).double()
    load[list(absent)] = 0
    r = torch.rand(E, generator=generator).double()
    region = torch.randn(E, D, generator=generator) * (load > 0)[:, None]
    margin = torch.rand(E, generator=generator).double()
    return BlockRouting(load, r / r.sum(), margin, region, tokens=int(load.sum()))


def update(client: int, examples: int = 10, absent: Sequence[int] = (), seed: int = 0) -> Update:
    """A random update whose absent experts were not used."""
    g = torch.Generator().manual_seed(1000 * seed + client)
    made = {}
    for piece in LAYOUT.pieces(TENSORS):
        owner = LAYOUT.owner(piece.key)
        if owner is None or owner[1] not in absent:
            old = piece.of(TENSORS)
            made[piece.key] = old + 0.1 * torch.randn(old.shape, generator=g)
    return Update(client, 1, examples, made, [routing(g, absent)])


def several(seed: int = 0) -> list[Update]:
    return [
        update(0, 10, seed=seed),
        update(1, 3, absent=[2], seed=seed),
        update(2, 25, absent=[0, 2], seed=seed),
        update(3, 1, absent=[2, 3], seed=seed),
    ]


def mean_by_loop(updates: list[Update], weight: Callable[[Update, str], float | Tensor]) -> dict:
    """Weighted mean of every piece in float64; absent pieces count with the old value."""
    found = {}
    for piece in LAYOUT.pieces(TENSORS):
        old = piece.of(TENSORS).double()
        top, bottom = torch.zeros_like(old), 0.0
        for u in updates:
            w = weight(u, piece.key)
            w = w.reshape(-1, *[1] * (old.ndim - 1)) if isinstance(w, Tensor) else w
            top = top + w * u.tensors.get(piece.key, old).double()
            bottom = bottom + w
        kept = torch.as_tensor(bottom) > 0
        found[piece.key] = torch.where(kept, top / torch.as_tensor(bottom).clamp_min(1e-30), old)
    return found


def assert_pieces(made: Strategy, wanted: dict[str, Tensor]) -> None:
    for piece in LAYOUT.pieces(TENSORS):
        torch.testing.assert_close(
            piece.of(made.tensors).double(), wanted[piece.key], atol=1e-6, rtol=1e-5
        )


def load_of(u: Update, key: str) -> float:
    owner = LAYOUT.owner(key)
    return u.examples if owner is None else float(u.routing[owner[0]].load[owner[1]])


def test_fedavg_is_the_example_weighted_mean_with_absent_experts_unchanged() -> None:
    made, updates = ready("fedavg"), several()
    aggregate(made, updates)
    assert_pieces(made, mean_by_loop(updates, lambda u, key: u.examples))


def test_fedavg_by_hand() -> None:
    made = ready("fedavg")
    old = TENSORS["head.bias"]
    all_pieces = {p.key: p.of(TENSORS) for p in LAYOUT.pieces(TENSORS)}
    g = torch.Generator().manual_seed(0)
    updates = [
        Update(0, 1, 1, all_pieces | {"head.bias": torch.full_like(old, 4.0)}, [routing(g)]),
        Update(1, 1, 3, all_pieces | {"head.bias": torch.full_like(old, 8.0)}, [routing(g)]),
    ]
    aggregate(made, updates)
    assert made.tensors["head.bias"].tolist() == [7.0, 7.0, 7.0]  # (1 * 4 + 3 * 8) / 4


def test_usage_weighs_experts_by_their_tokens() -> None:
    made, updates = ready("usage"), several()
    aggregate(made, updates)
    assert_pieces(made, mean_by_loop(updates, load_of))


def test_fedmoe_averages_over_holders_and_gate_rows_follow() -> None:
    made, updates = ready("fedmoe", hold=0.0), several()
    aggregate(made, updates)

    def weight(u: Update, key: str) -> float | Tensor:
        held = (u.routing[0].load > 0).double()
        if key in LAYOUT.gate_params:
            return u.examples * held
        owner = LAYOUT.owner(key)
        return u.examples * (1.0 if owner is None else float(held[owner[1]]))

    wanted = mean_by_loop(updates, weight)
    assert_pieces(made, wanted)
    for piece in LAYOUT.expert(0, 2):  # held by client 0 alone: copied
        assert torch.equal(piece.of(made.tensors), updates[0].tensors[piece.key])


def test_fedmoe_leaves_what_nobody_holds() -> None:
    made = ready("fedmoe", hold=0.0)
    aggregate(made, [update(0, absent=[1]), update(1, absent=[1, 2])])
    for piece in LAYOUT.expert(0, 1):
        assert torch.equal(piece.of(made.tensors), piece.of(TENSORS))
    (gate,) = LAYOUT.blocks[0].gate
    assert torch.equal(made.tensors[gate][1], TENSORS[gate][1])


def test_fedmoe_holder_needs_a_share_of_the_uniform_load() -> None:
    made = ready("fedmoe", hold=0.5)
    some = BlockRouting(
        torch.tensor([40.0, 4.0, 8.0, 0.0]), torch.ones(4) / 4, torch.ones(4), None, tokens=26
    )
    # 52 routed tokens, half of the uniform share is 6.5
    assert made.holds(some).tolist() == [1, 0, 1, 0]  # type: ignore[attr-defined]
    kept = [made.sends(LAYOUT.expert(0, e)[0], [some]) for e in range(E)]
    assert kept == [True, False, True, False]


def test_an_expert_nobody_used_stays_as_it_was() -> None:
    for name in ("fedavg", "usage", "fedmoe", "fedalign-moe"):
        made = ready(name)
        aggregate(made, [update(0, absent=[3]), update(1, absent=[3])])
        for piece in LAYOUT.expert(0, 3):
            assert torch.equal(piece.of(made.tensors), piece.of(TENSORS)), name


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("fedavg", {}),
        ("fedprox", {}),
        ("fedmoe", {"hold": 0.0}),
        ("usage", {}),
        ("fedalign-moe", {"gate": "consistency", "align": True}),
        ("fedalign-moe", {"gate": "average"}),
        ("fedalign-moe", {"gate": "consistency", "consistency": False}),
    ],
)
def test_one_client_alone_gets_exactly_its_own_tensors(name: str, parameters: dict) -> None:
    made, alone = ready(name, clients=1, **parameters), update(0, examples=7)
    aggregate(made, iter([alone]))
    for piece in LAYOUT.pieces(TENSORS):
        assert torch.equal(piece.of(made.tensors), alone.tensors[piece.key]), piece.key


def test_fedalign_with_every_switch_off_is_fedavg_bit_for_bit() -> None:
    off, plain = ready("fedalign-moe", **OFF), ready("fedavg")
    for seed in range(3):
        aggregate(off, several(seed))
        aggregate(plain, several(seed))
    for name, tensor in plain.tensors.items():
        assert torch.equal(off.tensors[name], tensor), name


@settings(max_examples=20)
@given(st.permutations(range(4)), st.sampled_from(sorted(STRATEGIES)))
def test_the_order_of_updates_changes_nothing_beyond_rounding(order: list[int], name: str) -> None:
    one, other = ready(name), ready(name)
    for seed in range(2):
        updates = several(seed)
        aggregate(one, updates)
        aggregate(other, [updates[i] for i in order])
    for key, tensor in one.tensors.items():
        torch.testing.assert_close(other.tensors[key], tensor, atol=2e-6, rtol=1e-5)


def fedalign_by_loop(
    updates: list[Update], r_g: Tensor | None, weights: str
) -> tuple[dict, Tensor]:
    """Docs/methods.md in plain loops and float64: weights, aggregate, new global routing."""
    n = len(updates)
    r = [u.routing[0].routing.double() for u in updates]
    if r_g is None:
        total = sum(u.examples for u in updates)
        r_g = sum(u.examples / total * r[i] for i, u in enumerate(updates))
    w = torch.zeros(n, E, dtype=torch.float64)
    for e in range(E):
        s = [float(r[i][e] * r_g[e] * updates[i].routing[0].margin[e]) for i in range(n)]
        for i in range(n):
            w[i, e] = s[i] / sum(s)
    new_r = sum(w[i] * r[i] for i in range(n))
    load = torch.stack([u.routing[0].load.double() for u in updates])
    region = torch.stack([u.routing[0].region.double() for u in updates])
    mu = (load[..., None] * region).sum((0, 1)) / load.sum()
    expert = torch.zeros(n, E, dtype=torch.float64)
    for e in range(E):
        active = [i for i in range(n) if load[i, e] > 0]
        value = {}
        for i in active:
            for j in active:
                a, b = (
                    torch.cat(
                        [
                            (updates[c].tensors[p.key] - p.of(TENSORS)).double().flatten()
                            for p in LAYOUT.expert(0, e)
                        ]
                    )
                    for c in (i, j)
                )
                d = float(a @ b / (a.norm() * b.norm()))
                x, y = region[i, e] - mu, region[j, e] - mu
                value[i, j] = max(float(x @ y / (x.norm() * y.norm())), 0.0) * max(d, 0.0)
        pairs = [value[i, j] for i in active for j in active if i < j]
        mean = sum(pairs) / len(pairs) if pairs else 0.0
        tau = mean - math.sqrt(sum((p - mean) ** 2 for p in pairs) / len(pairs)) if pairs else 0.0
        q = load[:, e] / load[:, e].sum().clamp_min(1)
        near = {
            (i, j): 1.0 if i == j else value[i, j] if value[i, j] >= tau - 1e-9 else 0.0
            for i in active
            for j in active
        }
        for i in active:
            of_i = sum(near[i, j] * q[j] for j in active)
            for j in active:
                if weights == "select":
                    expert[i, e] += q[i] * near[i, j] * q[j]
                else:  # the update of j has a share in what stands for i's
                    expert[j, e] += q[i] * near[i, j] * q[j] / of_i
        expert[:, e] /= expert[:, e].sum().clamp_min(1e-30)

    def weight(u: Update, key: str) -> float | Tensor:
        row = updates.index(u)
        if key in LAYOUT.gate_params:
            return w[row]
        owner = LAYOUT.owner(key)
        return u.examples if owner is None else float(expert[row, owner[1]])

    return mean_by_loop(updates, weight), new_r / new_r.sum()


@pytest.mark.parametrize("weights", ["select", "smooth"])
def test_fedalign_moe_is_what_the_documentation_says_over_two_rounds(weights: str) -> None:
    made = ready("fedalign-moe", **ALIGNED, experts="semantic", weights=weights)
    updates = several()
    wanted, r_g = fedalign_by_loop(updates, None, weights)
    aggregate(made, iter(updates))
    assert_pieces(made, wanted)
    assert isinstance(made, FedAlignMoE)
    torch.testing.assert_close(made.routing[0], r_g)
    sent = made.broadcast(2).extra["routing/0"]
    torch.testing.assert_close(sent.double(), r_g, atol=1e-6, rtol=1e-5)


def test_each_ablation_step_changes_the_aggregate() -> None:
    """Every server-side switch acts: adaptive alone lives on the client."""
    seen = []
    for on in ([], ["align"], ["align", "consistency"], ["align", "consistency", "semantic"]):
        made = ready("fedalign-moe", **(OFF | dict.fromkeys(on, True)), gate="consistency")
        aggregate(made, several())
        seen.append(torch.cat([t.flatten() for t in made.tensors.values()]))
    for i, one in enumerate(seen):
        for other in seen[i + 1 :]:
            assert not torch.equal(one, other)


def test_fedadam_is_the_papers_recursion() -> None:
    made = ready("fedadam", lr=0.1, beta1=0.5, beta2=0.75, tau=0.01)
    old = {n: t.double() for n, t in TENSORS.items()}
    m = {n: torch.zeros_like(t) for n, t in old.items()}
    v = {n: torch.zeros_like(t) for n, t in old.items()}
    for seed in range(3):
        updates = [update(0, 10, seed=seed), update(1, 30, seed=seed)]
        aggregate(made, updates)
        for name in old:
            pieces = LAYOUT.pieces([name])
            mean = sum(
                u.examples / 40 * torch.stack([u.tensors[p.key].double() for p in pieces])
                for u in updates
            ).reshape(old[name].shape)
            d = mean - old[name]
            m[name] = 0.5 * m[name] + 0.5 * d
            v[name] = 0.75 * v[name] + 0.25 * d * d
            old[name] = old[name] + 0.1 * m[name] / (v[name].sqrt() + 0.01)
    for name, tensor in made.tensors.items():
        torch.testing.assert_close(tensor.double(), old[name], atol=1e-5, rtol=1e-4)


def test_private_parts_do_not_cross() -> None:
    made = ready("non-expert")
    assert not LAYOUT.expert_params & set(made.broadcast(1).tensors)
    local = ready("fedalign-moe", gate="local")
    assert not LAYOUT.gate_params & set(local.broadcast(1).tensors)


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_state_dict_continues_exactly(name: str) -> None:
    made, fresh = ready(name), ready(name)
    aggregate(made, several(0))
    fresh.load_state_dict({k: t.clone() for k, t in made.state_dict().items()})
    aggregate(made, several(1))
    aggregate(fresh, several(1))
    for key, tensor in made.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], tensor), key


@pytest.mark.parametrize("name", ["usage", "fedmoe", "non-expert", "frozen-gate", "fedalign-moe"])
def test_a_dense_model_is_refused_where_experts_are_needed(name: str) -> None:
    with pytest.raises(NoExpertsError, match=f"{name} needs a mixture-of-experts model"):
        strategy(name).setup({"w": torch.zeros(2)}, MoELayout(()), 2)


def test_low_precision_parameters_are_averaged_in_float32() -> None:
    made = strategy("fedavg")
    made.setup({"w": torch.zeros(4, dtype=torch.bfloat16)}, MoELayout(()), 3)
    values = [1.0, 1.0078125, 1.0]  # neighbours in bfloat16
    aggregate(
        made, [Update(i, 1, 1, {"w": torch.full((4,), x).bfloat16()}) for i, x in enumerate(values)]
    )
    assert made.tensors["w"].dtype == torch.bfloat16
    wanted = torch.tensor(sum(values) / 3).bfloat16()
    assert made.tensors["w"].tolist() == [float(wanted)] * 4


def test_the_gate_is_combined_row_by_row_as_the_mathematics_says() -> None:
    made, updates = ready("fedalign-moe", **ALIGNED), several()
    assert isinstance(made, FedAlignMoE)
    aggregate(made, updates)
    (gate,) = LAYOUT.blocks[0].gate
    sent = torch.stack([u.tensors[gate] for u in updates])
    r = torch.stack([u.routing[0].routing for u in updates])
    margin = torch.stack([u.routing[0].margin for u in updates])
    weights = loop_weights(r, r.mean(0), margin)
    wanted = torch.einsum("ne,ned->ed", weights, sent.double()).float()
    torch.testing.assert_close(made.tensors[gate], wanted, atol=1e-6, rtol=1e-5)


def test_directions_are_compared_on_a_sample() -> None:
    updates, pieces = several(), LAYOUT.expert(0, 1)
    gram = fedalign.DirectionGram(len(updates))
    gram.add(
        torch.stack(
            [
                torch.cat([(u.tensors[p.key] - p.of(TENSORS)).flatten() for p in pieces])
                for u in updates
            ]
        )
    )
    exact = gram.cosine()
    whole, part = (ready("fedalign-moe", sample=n) for n in (0, 300))
    assert isinstance(whole, FedAlignMoE)
    assert isinstance(part, FedAlignMoE)
    torch.testing.assert_close(whole.directions(updates, pieces), exact, atol=1e-6, rtol=0)
    sampled = part.directions(updates, pieces)
    assert not torch.equal(sampled, exact)
    torch.testing.assert_close(sampled, exact, atol=4 / math.sqrt(300), rtol=0)


@given(st.integers(1, 10**7), st.integers(0, 10**5), st.integers(1, 4096))
def test_the_stride_of_a_sample_meets_every_column(size: int, sample: int, width: int) -> None:
    stride = FedAlignMoE(sample=sample).stride(size, (7, width))
    assert math.gcd(stride, width) == 1
    assert stride >= (size // sample if sample else 1)
    if sample == 0:
        assert stride == 1


def with_regions(u: Update) -> Update:
    """Experts that serve distant regions, the same on all clients."""
    centres = 5 * torch.eye(E, D)
    return replace(u, routing=[replace(report, region=centres) for report in u.routing])


@pytest.mark.parametrize("order", [[1, 2, 0, 3], [3, 2, 1, 0]])
@pytest.mark.parametrize("absent", [[], [2]])
def test_matched_by_meaning_is_as_if_nothing_had_changed_places(
    order: list[int], absent: list[int]
) -> None:
    honest = [with_regions(update(c, 5 + c, absent if c == 1 else ())) for c in range(5)]
    made = ready("fedalign-moe", match="meaning")
    wanted = ready("fedalign-moe", experts="semantic")
    moved = [
        reordered(u, made.layout.blocks[0], torch.tensor(order)) if u.client == 1 else u
        for u in honest
    ]
    assert (set(moved[1].tensors) != set(honest[1].tensors)) == (order[2] != 2 and absent != [])
    aggregate(made, moved)
    aggregate(wanted, honest)
    for name, tensor in wanted.tensors.items():
        assert torch.equal(made.tensors[name], tensor), name
    apart = ready("fedalign-moe", experts="semantic")
    aggregate(apart, moved)
    assert any(not torch.equal(apart.tensors[name], t) for name, t in wanted.tensors.items())
