"""Blocks found by structure, in hand-written models that no table knows."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from tests.moe.conftest import zeroed
from torch import Tensor, nn

from sluiceway.moe import (
    NoExpertsError,
    Observer,
    find_layout,
    moe_layout,
    received_logits,
)
from sluiceway.moe.structural import StructuralFamily

E, K, H, WIDE = 4, 2, 16, 24


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(H, WIDE), nn.Linear(WIDE, H), nn.Linear(H, WIDE)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(E, H, WIDE) / 4)
        self.up_bias = nn.Parameter(torch.randn(E, WIDE))
        self.down = nn.Parameter(torch.randn(E, WIDE, H) / 4)

    def __getitem__(self, e: int) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.relu(x @ self.up[e] + self.up_bias[e]) @ self.down[e]


class Half(nn.Module):
    """Half of all experts."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E, inputs, outputs) / 4)


class Router(nn.Module):
    """Gives what ``kind`` says, of a linear layer's logits."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.proj = nn.Linear(H, E)
        self.kind, self.top_k = kind, K

    def forward(self, x: Tensor) -> object:
        logits = self.proj(x)
        weights, chosen = logits.softmax(-1).topk(K)
        weights = weights / weights.sum(-1, keepdim=True)
        sparse = torch.zeros_like(logits).scatter(-1, chosen, weights)
        return {
            "logits last": (weights, chosen.int(), logits),
            "probabilities": (weights, logits.softmax(-1), chosen),
            "probabilities alone": logits.softmax(-1),
            "both": (logits.softmax(-1), logits),
            "sparse beside": (sparse, {"aux": 0}, logits),
            "reversed": (logits, chosen.flip(-1)),
            "weights only": (weights, chosen),
            "sparse only": (sparse, chosen),
        }[self.kind]


class Block(nn.Module):
    """Dispatches by the choice of its gate's logits, whatever the gate returns."""

    def __init__(self, gate: nn.Module, experts: nn.Module, **more: object) -> None:
        super().__init__()
        self.gate, self.experts = gate, experts
        for name, value in more.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        said = self.gate(x)
        logits = said if isinstance(self.gate, nn.Linear) else self.gate.proj(x)
        del said
        weights, chosen = logits.softmax(-1).topk(K)
        output = torch.zeros_like(x)
        for e in range(E):
            weight = (weights * (chosen == e)).sum(-1, keepdim=True)
            for at in (weight[..., 0] > 0).nonzero():
                i = tuple(at.tolist())
                output[i] = output[i] + weight[i] * self.experts[e](x[i])
        return output


class Beside(Block):
    """The experts' parameters lie in two children of the block, and a bias of the block's own."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(H, E, bias=False), nn.Identity(), topk=K)
        self.experts = None
        self.bias = nn.Parameter(torch.zeros(H))
        self.up, self.down = Half(H, WIDE), Half(WIDE, H)

    def forward(self, x: Tensor) -> Tensor:
        self.__dict__["experts"] = [
            lambda x, e=e: torch.relu(x @ self.up.weight[e]) @ self.down.weight[e] for e in range(E)
        ]
        return super().forward(x)


class Model(nn.Module):
    """Two residual layers with a block each, and a classifier."""

    def __init__(self, make: Callable[[], nn.Module], **config: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(make() for _ in range(2))
        self.head = nn.Linear(H, 2)
        self.config = SimpleNamespace(**config)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def mixtral_like() -> nn.Module:
    return Block(nn.Linear(H, E, bias=False), nn.ModuleList(Expert() for _ in range(E)), top_k=K)


def by_name() -> nn.Module:
    experts = {f"expert_{e}": Expert() for e in range(E)}
    block = Block(nn.Linear(H, E), nn.ModuleDict(experts), num_experts_per_tok=K)
    numbered = [block.experts[f"expert_{e}"] for e in range(E)]
    block.forward = lambda x: Block.forward(  # type: ignore[method-assign]
        SimpleNamespace(gate=block.gate, experts=numbered), x
    )
    return block


MODELS: dict[str, Callable[[], nn.Module]] = {
    "list": lambda: Model(mixtral_like),
    "dict": lambda: Model(by_name),
    "fused": lambda: Model(lambda: Block(nn.Linear(H, E), Fused(), k=K)),
    "config": lambda: Model(lambda: Block(nn.Linear(H, E), Fused()), num_experts_per_tok=K),
    "beside": lambda: Model(Beside),
} | {
    kind: lambda kind=kind: Model(
        lambda: Block(Router(kind), nn.ModuleList(Expert() for _ in range(E)))
    )
    for kind in (
        "logits last",
        "probabilities",
        "probabilities alone",
        "both",
        "sparse beside",
        "reversed",
    )
}


@pytest.fixture(params=list(MODELS))
def model(request: pytest.FixtureRequest) -> nn.Module:
    return MODELS[request.param]()


HIDDEN = torch.randn(3, 5, H, generator=torch.Generator().manual_seed(7))


def test_finds_blocks_and_says_how(model: nn.Module) -> None:
    found = moe_layout(model)
    params = dict(model.named_parameters())
    assert [block.name for block in found.blocks] == ["layers.0", "layers.1"]
    for block in found.blocks:
        assert (block.family.name, block.num_experts, block.top_k) == ("structural", 4, 2)
        assert block.hidden == 16
        assert "router 'gate' [4, 16] beside" in block.found
        assert "k = 2 from " in block.found
        assert all(params[name].shape[0] == E for name in block.gate)
    values = sum(piece.of(params).numel() for b in found.blocks for e in b.pieces for piece in e)
    assert values == sum(params[name].numel() for name in found.expert_params)
    rest = set(params) - found.expert_params - found.gate_params
    assert all(name.startswith("head.") or name.count(".") == 2 for name in rest)  # a block's bias
    # Shapes are enough, and a wrapper changes names alone.
    meta = moe_layout(nn.ModuleDict({"inner": model}).to("meta"))
    assert [f"inner.{block.router}" for block in found.blocks] == [b.router for b in meta.blocks]


def test_explanation() -> None:
    assert moe_layout(MODELS["list"]()).blocks[0].found == (
        "router 'gate' [4, 16] beside 4 modules 'experts.*'; k = 2 from block.top_k; "
        "logits are the router's output, the choice its 2 greatest"
    )
    assert "k = 2 from gate.top_k" in moe_layout(MODELS["both"]()).blocks[0].found
    assert "k = 2 from config.num_experts_per_tok" in moe_layout(MODELS["config"]()).blocks[0].found
    assert "parameters of 'up', 'down' [4, ., .]" in moe_layout(MODELS["beside"]()).blocks[0].found


def test_counts_equal_a_loop(model: nn.Module) -> None:
    found = moe_layout(model)
    mask = torch.tensor([[1] * 5, [1] * 3 + [0] * 2, [1] + [0] * 4])
    with Observer(model, found) as observer, observer.observing(mask):
        model(HIDDEN)
    x = HIDDEN
    for block, routing, step in zip(found.blocks, observer.routing(), observer.last, strict=True):
        layer = model.get_submodule(block.name)
        flat = x.reshape(-1, H)[mask.flatten().bool()]
        gate = layer.gate if isinstance(layer.gate, nn.Linear) else layer.gate.proj
        load, soft = torch.zeros(E), torch.zeros(E)
        for logits in gate(flat):
            soft += logits.softmax(0)
            for e in sorted(range(E), key=lambda e: -float(logits[e]))[:K]:
                load[e] += 1
        assert torch.equal(routing.load.float(), load)
        assert routing.tokens == 9
        torch.testing.assert_close(routing.routing.float(), soft / 9, rtol=1e-5, atol=1e-6)
        assert step is not None
        weight = model.get_parameter(block.gate[0])
        slope = torch.autograd.grad(step.logits.square().sum(), weight, retain_graph=True)[0]
        assert slope.abs().sum() > 0
        values = {name: torch.randn_like(model.get_parameter(name)) for name in block.gate}
        theirs = received_logits(block, model.get_submodule(block.router), values, step.hidden)
        plain = nn.functional.linear(step.hidden, *(values[n] for n in sorted(values)[::-1]))
        torch.testing.assert_close(theirs.softmax(-1), plain.softmax(-1), rtol=1e-4, atol=1e-5)
        x = x + layer(x)


def test_zeroed_expert_changes_exactly_its_tokens(model: nn.Module) -> None:
    found = moe_layout(model)
    params = dict(model.named_parameters())
    for block in found.blocks:
        layer = model.get_submodule(block.name)
        with torch.no_grad():
            said = block.family.read(layer.gate(HIDDEN), block.top_k)
            chosen = torch.zeros(15, E).scatter(1, said.selected, 1.0).bool()
            before = layer(HIDDEN)
            for e in range(E):
                with zeroed(block.expert(e), params):
                    after = layer(HIDDEN)
                assert torch.equal((before != after).any(-1).flatten(), chosen[:, e])


@pytest.mark.parametrize("kind", ["weights only", "sparse only"])
def test_a_router_that_hides_its_logits_is_refused(kind: str) -> None:
    model = Model(lambda: Block(Router(kind), nn.ModuleList(Expert() for _ in range(E))))
    with (
        Observer(model, moe_layout(model)) as observer,
        pytest.raises(ValueError, match=r"router layers\.0\.gate: .*float32 \[3, 5, \d\]"),
        observer.observing(),
    ):
        model(HIDDEN)


def test_reading_edge_cases() -> None:
    row = StructuralFamily("structural", "", num_experts=4, top_k=2, path="gate")
    zero = torch.zeros(3, 4)
    assert torch.equal(row.read_logits((zero,)), zero)  # a gate that starts at zero
    assert row.read_logits(torch.zeros(0, 4)).shape == (0, 4)
    assert row.read(torch.zeros(0, 4), 2).selected.shape == (0, 2)
    certain = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]])
    assert row.read_logits(certain).isfinite().all()
    masked = torch.tensor([[1.0, 2.0, -torch.inf, -torch.inf]])
    with pytest.raises(ValueError, match="no logits or probabilities"):
        row.read_logits(masked)
    with pytest.raises(ValueError, match="it holds no tensor"):
        row.read_logits(None)


def test_k_that_cannot_be_found_is_not_guessed() -> None:
    model = Model(lambda: Block(nn.Linear(H, E), nn.ModuleList(Expert() for _ in range(E))))
    assert find_layout(model) is None
    with pytest.raises(NoExpertsError, match=r"beside 4 modules 'experts\.\*', but k") as error:
        moe_layout(model)
    assert "block 'layers.0': router 'gate' [4, 16]" in str(error.value)
    for wrong in (0, 5, True, 2.0, "2"):
        for layer in model.layers:
            layer.top_k = wrong
        assert find_layout(model) is None
    model.config.top_k = 2  # in a config this is the sampling of text
    assert find_layout(model) is None


def test_two_possible_routers_are_not_guessed() -> None:
    model = Model(mixtral_like)
    for layer in model.layers:
        layer.noise = nn.Linear(H, E)
    with pytest.raises(NoExpertsError, match=r"not clear: 4 modules 'experts\.\*', gate, noise"):
        moe_layout(model)
