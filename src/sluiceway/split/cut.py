"""Cutting a network in two at a named layer.

A chain is cut between its layers: an `nn.Sequential`, nested ones included ("features.3"), or a
module whose forward calls its children one after another and does nothing else. Any other module
is cut by the graph of its forward (see `traced`). The halves keep the model's names and share its
parameters, so that their state dicts together are the model's.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, fx, nn

from sluiceway.split.traced import Traced, ancestors, cut_nodes, graph_of, is_chain, traced_cut


@dataclass(frozen=True)
class CutPoint:
    """A place where a network can be cut: behind the named layer.

    Attributes:
        name: of the last layer of the front.
        shape: of what crosses, without the batch: (C,), (C, L) or (C, H, W).
        bytes_per_example: of that in float32, in one direction, without headers.
        front_parameters: how many numbers the front trains.
    """

    name: str
    shape: tuple[int, ...]
    bytes_per_example: int
    front_parameters: int


def cut(model: nn.Module, name: str) -> tuple[nn.Sequential, nn.Sequential]:
    """The two halves of a network.

    Args:
        model: not changed.
        name: the last layer of the front: a layer's name, or that of a nested `nn.Sequential` for
            the last layer in it.

    Returns:
        Front and back. `back(front(x))` is `model(x)`; parameters and buffers are the model's own,
        under the model's names.

    Raises:
        ValueError: the name is unknown or that of the last layer, or more than that layer's output
            crosses (the message lists where it can be cut); the forward cannot be traced; a
            parameter is used on both sides.
    """
    chain = _as_chain(model)
    inside = chain is not None and any(
        name.startswith(f"{layer}.") and name in dict(model.named_modules())
        for layer, _ in _layers(chain)
    )
    if chain is None or inside:
        halves = traced_cut(model, name)
        _require_apart(*halves)
        return halves
    names = [layer for layer, _ in _layers(chain)]
    known = names[:-1]
    last = next((layer for layer in reversed(names) if f"{layer}.".startswith(f"{name}.")), None)
    if last is None or last == names[-1]:
        why = "is the last layer" if last else "is no layer of the network"
        raise ValueError(f"cut: {name!r} {why}; it can be cut at: {', '.join(known) or 'nothing'}")
    front, back = _halves(chain, last.split("."))
    _require_apart(front, back)
    return front, back


@torch.no_grad()
def cut_points(model: nn.Module, example: Tensor) -> list[CutPoint]:
    """Where a network can be cut, in order, and what would cross there.

    Runs the network once, in evaluation mode; the model is left as it was.

    Args:
        model: of any kind; of one that is no chain only its own children are looked at.
        example: a batch as the network takes it, [B, ...], B at least 1.

    Returns:
        One point per layer whose output is [B, C], [B, C, L] or [B, C, H, W], but for the last.

    Raises:
        ValueError: the model's forward cannot be traced.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    chain = _as_chain(model)
    points, seen = [], set[nn.Parameter]()
    try:
        values = _values(model, example) if chain is None else _chain_values(chain, example)
        for name, layers, value in values:
            seen = {p for layer in layers for p in layer.parameters()}
            if not isinstance(value, Tensor) or not 2 <= value.dim() <= 4:
                continue
            shape = tuple(value.shape[1:])
            trained = sum(p.numel() for p in seen if p.requires_grad)
            points.append(CutPoint(name, shape, 4 * prod(shape), trained))
    finally:
        for module, training in modes.items():
            module.training = training
    return points


#: A layer to cut behind, the layers of the front, and what the front gives.
_Value = tuple[str, list[nn.Module], object]


def _chain_values(chain: nn.Sequential, value: Tensor) -> Iterator[_Value]:
    """Of every layer of a chain but the last."""
    front = []
    for name, layer in list(_layers(chain))[:-1]:
        value = layer(value)
        front.append(layer)
        yield name, front, value


def _values(model: nn.Module, example: Tensor) -> Iterator[_Value]:
    """Of every layer behind which nothing but its output crosses."""
    graph = graph_of(model)
    places = cut_nodes(graph)
    held: dict[fx.Node, object] = {}

    class Values(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            found = super().run_node(n)
            if n in places:
                held[n] = found
            return found

    Values(model, graph=graph).run(example)
    for node in places:
        front = [
            model.get_submodule(str(n.target)) for n in ancestors(node) if n.op == "call_module"
        ]
        yield str(node.target), front, held[node]


def _layers(chain: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Layers of a chain with their full names, in the order they run."""
    # Not named_children(): that leaves out a module's second appearance.
    for name, child in chain._modules.items():
        assert child is not None
        if is_chain(child) and len(child._modules):
            yield from _layers(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


class _Calls(fx.Tracer):
    """Traces which layers a forward calls, and does not look into them."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not is_chain(m)


def _as_chain(model: nn.Module) -> nn.Sequential | None:
    """The model as a chain under its own names, which share its layers; None if it is none.

    Its forward is traced, since the order of children and what is done between them is only known
    from there.
    """
    if is_chain(model):
        assert isinstance(model, nn.Sequential)
        return model
    children = OrderedDict((k, child) for k, child in model._modules.items() if child is not None)
    chain = nn.Sequential(children)
    chain.training = model.training
    if isinstance(model, Traced):
        return None
    try:
        nodes = list(_Calls().trace(model).nodes)
    except Exception:  # said by graph_of
        return None
    calls = nodes[1:-1]
    in_line = all(
        node.op == "call_module" and node.args == (before,) and not node.kwargs
        for before, node in zip(nodes, calls, strict=False)
    )
    if not calls or not in_line or nodes[-1].args != (calls[-1],):
        return None
    names = [name for name, _ in _layers(chain)]
    return chain if [node.target for node in calls] == names else None


def _halves(chain: nn.Module, path: list[str]) -> tuple[nn.Sequential, nn.Sequential]:
    """Children up to the layer at `path`, and those behind it; nested chains are cut in two."""
    front: OrderedDict[str, nn.Module] = OrderedDict()
    back: OrderedDict[str, nn.Module] = OrderedDict()
    side = front
    for name, child in chain._modules.items():
        assert child is not None
        if name == path[0]:
            side = back
            first, rest = _halves(child, path[1:]) if path[1:] else (child, nn.Sequential())
            front[name] = first
            if len(rest._modules):
                back[name] = rest
        else:
            side[name] = child
    halves = nn.Sequential(front), nn.Sequential(back)
    for half in halves:
        half.training = chain.training  # of the container alone: layers keep their own
    return halves


def _require_apart(front: nn.Module, back: nn.Module) -> None:
    """Each number is trained on one side only: two copies would drift apart."""
    ours = {id(t) for t in (*front.parameters(), *front.buffers())}
    for kind in (back.named_parameters(), back.named_buffers()):
        for name, tensor in kind:
            if id(tensor) in ours:
                raise ValueError(f"cut: {name} is used on both sides; cut before or after both")
