"""Cutting: the two parts are the model, whatever it is made of."""

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sluiceway.split import Conv4, chained, cut, cut_points, resnet18, vgg11
from sluiceway.split.traced import Traced

NETWORKS = [
    pytest.param(lambda: Conv4(3, 10, width=4), "conv2", id="conv4"),
    pytest.param(lambda: resnet18(4), "layer2_1", id="resnet18"),
    pytest.param(lambda: vgg11(4), "conv3", id="vgg11"),
]


class Wrapped(nn.Module):
    """A chain in a module of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU())
        self.tail = nn.Sequential(nn.Flatten(), nn.Linear(6 * 16, 5))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.tail(self.features(x))
        return out


class Residual(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.tail(self.features(x) * 2)
        return out


class Odd(nn.Module):
    """Two layers, with a forward of any kind; it is none of the chain `first`, `second`."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


@pytest.mark.parametrize(("make", "name"), NETWORKS)
def test_halves_compose_to_the_model_exactly(make, name: str) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    model, x = make(), torch.randn(4, 3, 32, 32)
    for point in cut_points(model, x):
        front, back = cut(model, point.name)
        model.eval()
        assert torch.equal(back(front(x)), model(x))
    model.train()
    front, back = cut(model, name)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    back(front(x)).square().sum().backward()
    split = [p.grad.clone() for p in (*front.parameters(), *back.parameters())]
    after = {k: v.clone() for k, v in model.state_dict().items()}
    model.zero_grad()
    model.load_state_dict(state)
    model(x).square().sum().backward()
    whole = [p.grad for p in model.parameters()]
    assert len(split) == len(whole)
    assert all(torch.equal(a, b) for a, b in zip(split, whole, strict=True))
    assert all(torch.equal(after[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize(("make", "name"), NETWORKS)
def test_halves_share_the_models_state_by_its_names(make, name: str) -> None:  # type: ignore[no-untyped-def]
    model = make()
    front, back = cut(model, name)
    pieces = {**front.state_dict(), **back.state_dict()}
    assert list(pieces) == list(model.state_dict())
    assert all(pieces[k].data_ptr() == v.data_ptr() for k, v in model.state_dict().items())
    assert not set(front.state_dict()) & set(back.state_dict())
    assert list(front._modules)[-1] == name


@pytest.mark.parametrize(
    ("name", "front_names"),
    [
        ("features.1", ["features.0.weight", "features.0.bias"]),
        ("tail.0", None),
        ("features", None),
    ],
)
def test_nested_and_wrapped(name: str, front_names: list[str] | None) -> None:
    model, x = Wrapped(), torch.randn(2, 3, 8, 8)
    front, back = cut(model, name)
    assert torch.equal(back(front(x)), model(x))
    assert {**front.state_dict(), **back.state_dict()}.keys() == model.state_dict().keys()
    if front_names is not None:
        assert list(front.state_dict()) == front_names
    assert len(list(front.parameters())) == {"features.1": 2}.get(name, 4)


def test_cut_again_gives_three_parts() -> None:
    model, x = Conv4(3, 10, width=4).eval(), torch.randn(2, 3, 32, 32)
    front, rest = cut(model, "conv1")
    middle, end = cut(rest, "conv4")
    assert list(end._modules) == ["head"]
    assert torch.equal(end(middle(front(x))), model(x))


@pytest.mark.parametrize("name", ["conv9", "head", "", "conv", "conv1.nothing"])
def test_unknown_and_last_names_list_the_others(name: str) -> None:
    with pytest.raises(ValueError, match=r"cut at: conv1, conv2, conv3, conv4$"):
        cut(Conv4(1, 10, width=4), name)


REFUSED = {
    "a decision": (
        lambda m, x: x if x.sum() > 0 else -x,
        "Odd cannot be cut: torch.fx cannot trace",
    ),
    "another order": (
        lambda m, x: m.first(m.second(x)),
        "'first' is the last layer; .* at: second",
    ),
    "over the cut": (lambda m, x: m.second(m.first(x)) + x, "the input x also go on there"),
    "unused": (lambda m, x: m.second(x), "'first' is no layer of the network; .* at: nothing"),
    "twice": (lambda m, x: m.second(m.first(m.first(x))), "'first' is used more than once"),
    "a shape": (lambda m, x: m.second(m.first(x)).expand(x.shape), "getattr_1 also go on there"),
}


@pytest.mark.parametrize(("run", "line"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_cut_is_said(run: Callable[[Any, Tensor], Tensor], line: str) -> None:
    with pytest.raises(ValueError, match=line) as caught:
        cut(Odd(run), "first")
    assert "\n" not in str(caught.value)


class Skips(nn.Module):
    """Skips on both sides of `narrow`, none over it; a parameter, a buffer and flat shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.first = nn.Conv2d(4, 4, 3, padding=1)
        self.narrow = nn.Conv2d(4, 6, 3, padding=1, stride=2)
        self.last = nn.Conv2d(6, 6, 3, padding=1)
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("shift", torch.tensor(0.1), persistent=False)
        self.blocks = nn.ModuleList([nn.Linear(96, 96), nn.Linear(96, 96)])
        self.head = nn.Linear(96, 3)

    def forward(self, x: Tensor, double: bool = False) -> Tensor:
        count = x.shape[0]
        x = self.stem(x)
        x = torch.relu(x + self.first(x) * self.scale)
        x = self.narrow(x)
        x = x + self.last(x) + self.shift
        x = x.view(count, -1)
        for block in self.blocks:
            x = x + block(x)
        out: Tensor = self.head(x * 2 if double else x)
        return out


@pytest.mark.parametrize("name", ["stem", "stem.0", "narrow", "blocks.1"])
def test_any_module_is_cut_where_one_value_crosses(name: str) -> None:
    torch.manual_seed(0)
    model, x = Skips(), torch.randn(5, 1, 8, 8)
    if name == "blocks.1":
        with pytest.raises(ValueError, match=r"more crosses than its output: add_3 also go"):
            cut(model, name)
        return
    front, back = cut(model, name)
    pieces = {**front.state_dict(), **back.state_dict()}
    assert pieces.keys() == model.state_dict().keys()
    assert not front.state_dict().keys() & back.state_dict().keys()
    assert all(pieces[n].data_ptr() == t.data_ptr() for n, t in model.state_dict().items())
    state = {n: t.clone() for n, t in model.state_dict().items()}
    out = back(front(x))
    out.square().sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    after = {n: t.clone() for n, t in model.state_dict().items()}
    model.load_state_dict(state)
    model.zero_grad()
    whole = model(x)
    whole.square().sum().backward()
    assert torch.equal(out, whole)
    assert all(torch.equal(grads[n], p.grad) for n, p in model.named_parameters())
    assert all(torch.equal(after[n], t) for n, t in model.state_dict().items())
    copies = copy.deepcopy(front).eval(), copy.deepcopy(back).eval()
    with torch.no_grad():
        next(model.parameters()).zero_()
    assert not torch.equal(copies[1](copies[0](x)), model.eval()(x))


def test_a_traced_half_is_cut_again_and_takes_layers() -> None:
    model, x = Skips().eval(), torch.randn(2, 1, 8, 8)
    front, rest = cut(model, "stem")
    middle, end = cut(rest, "narrow")
    assert torch.equal(end(middle(front(x))), model(x))
    names = [n.partition(".")[0] for n in (*middle.state_dict(), *end.state_dict())]
    assert list(dict.fromkeys(names)) == ["scale", "first", "narrow", "last", "blocks", "head"]
    assert isinstance(middle, Traced)
    longer = middle.with_layers({"a": nn.ReLU()}, {"b": nn.Sigmoid()})
    assert torch.equal(longer(front(x)), torch.sigmoid(middle(front(x))))
    assert list(longer._modules) == ["a", "first", "narrow", "b"]


def test_a_block_is_cut_inside() -> None:
    model, x = resnet18(4).eval(), torch.randn(2, 3, 16, 16)
    front, back = cut(Conv4(3, 10, width=4).eval(), "conv1.bn")
    assert len(front.state_dict()) == 6
    assert back(front(x)).shape == (2, 10)
    with pytest.raises(ValueError, match=r"'layer1_1\.conv1' more crosses .*: stem also go"):
        cut(model, "layer1_1.conv1")


def test_cut_points_of_any_module() -> None:
    points = cut_points(Skips(), torch.randn(2, 1, 8, 8))
    assert [(p.name, p.shape, p.front_parameters) for p in points] == [
        ("stem.0", (4, 8, 8), 40),
        ("stem.1", (4, 8, 8), 48),
        ("stem.2", (4, 8, 8), 48),
        ("narrow", (6, 4, 4), 48 + 148 + 222),
    ]


class Decides(Skips):
    """A forward that torch.fx cannot trace."""

    def encode(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.narrow(x + self.first(x) if x.sum() > 0 else x)

    def classify(self, x: Tensor) -> Tensor:
        out: Tensor = self.head((x + self.last(x)).flatten(1) * self.scale)
        return out

    def forward(self, x: Tensor, double: bool = False) -> Tensor:
        return self.classify(self.encode(x))


def test_functions_make_a_chain() -> None:
    model, x = Decides(), torch.randn(2, 1, 8, 8)
    with pytest.raises(ValueError, match=r"sluiceway\.chained\(model, \.\.\.\) cuts by functions"):
        cut(model, "narrow")
    chain = chained(model, "encode", "classify", example=x)
    front, back = cut(chain.eval(), "encode")
    assert torch.equal(back(front(x)), model.eval()(x))
    assert {n.split(".")[2] for n in front.state_dict()} == {"stem", "first", "narrow"}
    assert {n.split(".")[2] for n in back.state_dict()} == {"last", "head", "scale"}
    apart = copy.deepcopy(front)
    with torch.no_grad():
        model.narrow.weight.zero_()
    assert not torch.equal(apart(x), front(x))
    with pytest.raises(ValueError, match=r"narrow\.weight is used by encode and <lambda>"):
        chained(model, "encode", lambda m, h: m.narrow(h[:, :4]), example=x)
    with pytest.raises(ValueError, match="two functions or more"):
        chained(model, "forward", example=x)


def test_what_is_used_on_both_sides_is_refused() -> None:
    tied, relu = nn.Linear(4, 4), nn.ReLU()
    model = nn.Sequential(OrderedDict(a=tied, b=relu, c=tied, d=relu, e=nn.Linear(4, 2)))
    with pytest.raises(ValueError, match=r"c\.weight is used on both sides"):
        cut(model, "b")
    front, back = cut(model, "d")
    x = torch.randn(3, 4)
    assert torch.equal(back(front(x)), model(x))
    norm = nn.BatchNorm1d(4, affine=False)
    model = nn.Sequential(norm, nn.Linear(4, 4), norm, nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"2\.running_mean is used on both sides"):
        cut(model, "1")


def test_halves_are_in_the_models_mode() -> None:
    for model in (Conv4(1, 2, 4), Wrapped()):
        name = "conv1" if isinstance(model, Conv4) else "features.1"
        for mode in (True, False):
            assert [half.training for half in cut(model.train(mode), name)] == [mode, mode]


def test_cut_points_by_hand() -> None:
    points = cut_points(Conv4(3, 10, width=32), torch.randn(2, 3, 32, 32))
    # 27 w + 2 w; + 9 w^2 + 2 w; + 18 w^2 + 4 w; + 36 w^2 + 4 w
    assert [(p.name, p.shape, p.bytes_per_example, p.front_parameters) for p in points] == [
        ("conv1", (32, 16, 16), 32768, 928),
        ("conv2", (32, 8, 8), 8192, 10208),
        ("conv3", (64, 4, 4), 4096, 28768),
        ("conv4", (64, 4, 4), 4096, 65760),
    ]
    points = cut_points(resnet18(64), torch.randn(1, 3, 32, 32))
    shapes = [(64, 32, 32)] * 3 + [(128, 16, 16)] * 2 + [(256, 8, 8)] * 2 + [(512, 4, 4)] * 2
    assert [p.shape for p in points] == shapes
    assert [p.bytes_per_example for p in points[::2]] == [262144, 262144, 131072, 65536, 32768]
    assert points[-1].front_parameters == 11_168_832  # ResNet-18 without its last layer
    points = cut_points(vgg11(8), torch.randn(1, 3, 28, 28))
    sides = [(8, 14), (16, 7), (32, 7), (32, 4), (64, 4), (64, 2), (64, 2), (64, 1)]
    assert [p.bytes_per_example for p in points] == [4 * c * s * s for c, s in sides]


def test_cut_points_leave_the_model_as_it_was() -> None:
    model = Conv4(1, 10, width=4)
    model.conv1.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    cut_points(model, torch.randn(2, 1, 28, 28))
    assert [m.training for m in model] == [False, True, True, True, True]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    front, _ = cut(model, "conv2")
    assert [m.training for m in front] == [False, True]


@pytest.mark.parametrize("side", [8, 28, 32])
@pytest.mark.parametrize("make", [lambda: Conv4(1, 7, 4), lambda: resnet18(4, 1, 7)])
def test_networks_take_sides(make, side: int) -> None:  # type: ignore[no-untyped-def]
    assert make()(torch.randn(2, 1, side, side)).shape == (2, 7)


def test_networks_learn() -> None:
    torch.manual_seed(0)
    labels = torch.arange(8) % 2
    x = torch.randn(8, 1, 16, 16) + labels.view(-1, 1, 1, 1)
    for model in (Conv4(1, 2, 4), resnet18(4, 1, 2), vgg11(4, 1, 2)):
        optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(30):
            optimiser.zero_grad()
            loss = nn.functional.cross_entropy(model(x), labels)
            loss.backward()
            optimiser.step()
        assert loss < 0.1
