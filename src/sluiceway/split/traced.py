"""Cutting a module of any kind in two, by the graph of its forward that torch.fx traces  [ours].

The first half computes the output of the named layer and what that needs; the second computes the
rest. They are halves only if nothing else crosses: a skip may lie inside either half, not over the
cut. Both hold the model's own layers under the model's own names.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

Forward = Callable[..., Tensor]


class Traced(nn.Sequential):
    """A part of a module: its layers under their names there, and a forward of its own.

    Layers that a method adds run before the others or behind them.

    Args:
        run: from (self, x) to what the part gives.
        first, last: names of layers that run before and behind it.
    """

    def __init__(self, run: Forward, first: Iterable[str] = (), last: Iterable[str] = ()) -> None:
        super().__init__()
        # Names that no layer has.
        self._part, self._ahead, self._behind = run, tuple(first), tuple(last)

    def forward(self, x: Tensor) -> Tensor:
        """What the part of the module gives for x."""
        for name in self._ahead:
            x = self._modules[name](x)
        x = self._part(self, x)
        for name in self._behind:
            x = self._modules[name](x)
        return x

    def with_layers(self, first: Mapping[str, nn.Module], last: Mapping[str, nn.Module]) -> Traced:
        """The same with more layers at its ends."""
        more = Traced(self._part, (*first, *self._ahead), (*self._behind, *last))
        more._modules.update({**first, **self._modules, **last})
        more._parameters, more._buffers = self._parameters, self._buffers
        more._non_persistent_buffers_set = self._non_persistent_buffers_set
        more.training = self.training
        return more


def is_chain(module: nn.Module) -> bool:
    """An nn.Sequential, or a subclass that runs like one."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


class _Within(fx.Tracer):
    """Traces into nn.Sequential and into what holds the named layer, and into nothing else."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        holds = self.name.startswith(f"{module_qualified_name}.")
        return not (holds or (is_chain(m) and len(m._modules)))


def graph_of(model: nn.Module, name: str = "") -> fx.Graph:
    """The graph of the model's forward on its first argument; the others have their defaults.

    Args:
        name: what holds this layer is looked into.

    Raises:
        ValueError: torch.fx cannot trace it.
    """
    try:
        takes = list(inspect.signature(model.forward).parameters.values())
        plain = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        defaults = {p.name: p.default for p in takes[1:] if p.kind in plain}
        graph = _Within(name).trace(model, defaults or None)
    except Exception as error:
        why = str(error).partition("\n")[0]
        raise ValueError(
            f"{type(model).__name__} cannot be cut: torch.fx cannot trace its forward ({why}); "
            "sluiceway.chained(model, ...) cuts by functions"
        ) from error
    nodes = list(graph.nodes)
    others = {node for node in nodes[1:] if node.op == "placeholder"}
    for node in reversed(nodes):  # arguments that have their defaults, and what was checked of them
        checks = node.target is torch._assert or others & set(node.all_input_nodes)
        if node.op != "output" and not node.users and (checks or node in others):
            graph.erase_node(node)
    return graph


def traced_cut(model: nn.Module, name: str) -> tuple[Traced, Traced]:
    """The halves of a module behind a layer.

    Args:
        model: not changed.
        name: of the last layer of the front, at any depth: "block2.conv1".

    Raises:
        ValueError: its forward cannot be traced; there is no such layer; it is the last one, or
            used more than once; more than its output crosses (the message names what).
    """
    graph = graph_of(model, name)
    nodes = list(graph.nodes)
    calls = [n for n in nodes if n.op == "call_module" and f"{n.target}.".startswith(f"{name}.")]
    if not name or not calls:
        raise ValueError(f"cut: {name!r} is no layer of the network; {places(graph)}")
    at = calls[-1]
    if sum(n.op == "call_module" and n.target == at.target for n in nodes) > 1:
        raise ValueError(f"cut: {name!r} is used more than once; {places(graph)}")
    before = ancestors(at)
    behind = [n for n in nodes if n not in before and n.op != "placeholder"]
    if [n.op for n in behind if n.op != "get_attr"] == ["output"]:
        raise ValueError(f"cut: {name!r} is the last layer; {places(graph)}")
    if over := crossing(graph, at, before):
        raise ValueError(
            f"cut: behind {name!r} more crosses than its output: {', '.join(over)} also go on "
            f"there; {places(graph)}"
        )
    front = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        if node in before:
            copied[node] = front.node_copy(node, lambda n: copied[n])
    front.output(copied[at])
    back = fx.Graph()
    value = back.placeholder("x")
    moved: dict[fx.Node, fx.Node] = {at: value}
    for node in nodes:
        if node is at or (node in before and not is_batch_size(node, at)):
            continue
        if is_batch_size(node, at):
            moved[node] = back.call_method("size", (value, 0))
        elif node.op == "output":
            back.output(fx.node.map_arg(node.args[0], lambda n: moved[n]))
        elif node.op != "placeholder" and not is_shape(node):
            moved[node] = back.node_copy(node, lambda n: moved[n])
    return half_of(model, front), half_of(model, back)


def ancestors(at: fx.Node) -> set[fx.Node]:
    """A node and all that it is computed from."""
    found, left = {at}, [at]
    while left:
        for node in left.pop().all_input_nodes:
            if node not in found:
                found.add(node)
                left.append(node)
    return found


def crossing(graph: fx.Graph, at: fx.Node, before: set[fx.Node]) -> list[str]:
    """What of the front, besides the output of `at`, the rest needs; by name."""
    found: dict[str, None] = {}
    for node in graph.nodes:
        # The batch size is that of what crosses.
        if node in before or is_batch_size(node, at) or is_shape(node):
            continue
        for used in node.all_input_nodes:
            if used is at or is_batch_size(used, at):
                continue
            if used in before or used.op == "placeholder" or is_shape(used):
                found[said(used)] = None
    return list(found)


def is_shape(node: fx.Node) -> bool:
    """Whether a node is `x.shape` or `x.size()` of the input."""
    of_input = bool(node.args) and isinstance(node.args[0], fx.Node)
    if not of_input or cast(fx.Node, node.args[0]).op != "placeholder":
        return False
    return (node.op, node.target, node.args[1:]) in (
        ("call_function", getattr, ("shape",)),
        ("call_method", "size", ()),
    )


def is_batch_size(node: fx.Node, at: fx.Node) -> bool:
    """Whether a node is the number of examples, as `x.size(0)` or `x.shape[0]` of the input."""
    if not node.args or not isinstance(node.args[0], fx.Node) or node is at:
        return False
    of = node.args[0]
    if node.op == "call_method" and node.target == "size":
        return of.op == "placeholder" and node.args[1:] == (0,)
    item = node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem"
    return item and is_shape(of) and node.args[1:] == (0,)


def said(node: fx.Node) -> str:
    """A node for people: its layer, the function, or the input."""
    if node.op == "placeholder":
        return f"the input {node.name}"
    return str(node.target) if node.op == "call_module" else node.name


def cut_nodes(graph: fx.Graph) -> list[fx.Node]:
    """The layers behind which a graph can be cut, in order."""
    nodes = list(graph.nodes)
    calls = [n for n in nodes if n.op == "call_module"]
    targets = [n.target for n in calls]
    found = []
    for node in calls:
        before = ancestors(node)
        last = all(n in before or n.op in ("output", "get_attr") for n in nodes)
        if targets.count(node.target) == 1 and not last and not crossing(graph, node, before):
            found.append(node)
    return found


def places(graph: fx.Graph) -> str:
    """Where a graph can be cut, as the end of a message."""
    known = ", ".join(str(node.target) for node in cut_nodes(graph))
    return f"it can be cut at: {known or 'nothing'}"


def half_of(model: nn.Module, graph: fx.Graph) -> Traced:
    """The part of a model that a graph computes, with the model's layers."""
    code = graph.python_code("self")
    space = dict(code.globals)
    exec(compile(code.src, "<cut>", "exec"), space)  # what torch.fx.GraphModule does too
    half = Traced(space["forward"])
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            put(model, half, str(node.target))
    half.training = model.training
    return half


def put(model: nn.Module, half: nn.Module, name: str) -> None:
    """Give the half the model's layer, parameter or buffer of that name, under it."""
    *path, last = name.split(".")
    for part in path:
        model = model.get_submodule(part)
        if part not in half._modules:
            half._modules[part] = nn.Module()
            half._modules[part].training = model.training  # type: ignore[union-attr]
        half = half.get_submodule(part)
    if last in model._modules:
        half._modules[last] = model._modules[last]
    elif last in model._parameters:
        half._parameters[last] = model._parameters[last]
    elif last in model._buffers:
        half.register_buffer(
            last, model._buffers[last], last not in model._non_persistent_buffers_set
        )
    else:  # a tensor or a constant that the forward made
        setattr(half, last, getattr(model, last))


class _Used(TorchFunctionMode):
    """Collects the ids of all tensors that functions are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        left = [*args, *(kwargs or {}).values()]
        while left:
            value = left.pop()
            if isinstance(value, Tensor):
                self.ids.add(id(value))
            elif isinstance(value, list | tuple):
                left += value
        return func(*args, **(kwargs or {}))


def chained(
    model: nn.Module, *functions: str | Callable[[Any, Tensor], Tensor], example: Tensor
) -> nn.Sequential:
    """A module as a chain of its own methods, to be cut between them.

    For a forward that torch.fx cannot trace. `model(x)` must be what the functions give one after
    another; each layer belongs to the function that uses it.

    Args:
        model: its layers are used, not copied.
        functions: names of methods of the model, or functions of (model, x), two or more; the
            chain's layers are called like them.
        example: a batch that the model takes, [B, ...] with B >= 2, to see which layers each uses.

    Raises:
        ValueError: fewer than two functions, or a layer with parameters is used by two.
    """
    if len(functions) < 2:
        raise ValueError("chained: give two functions or more, of (model, x)")
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    owners: dict[int, str] = {}
    for each in functions:
        run = getattr(type(model), each) if isinstance(each, str) else each
        name = each if isinstance(each, str) else each.__name__
        with torch.no_grad(), _Used() as used:
            example = run(model.eval(), example)
        part = pruned(model, used.ids)
        for full, tensor in [*part.named_parameters(), *part.named_buffers()]:
            if owners.setdefault(id(tensor), name) != name:
                raise ValueError(f"chained: {full} is used by {owners[id(tensor)]} and {name}")
        holder = Traced(_Method(run))
        holder._modules["model"] = part
        parts[name] = holder
    model.train()
    return nn.Sequential(parts)


class _Method:
    """Runs a function of (model, x) on the model that a part holds."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor]) -> None:
        self.run = run

    def __call__(self, holder: nn.Module, x: Tensor) -> Tensor:
        return self.run(holder._modules["model"], x)


def pruned(module: nn.Module, used: set[int]) -> nn.Module:
    """A module without the layers whose tensors are not used; what is left is shared."""
    own = [*module._parameters.values(), *module._buffers.values()]
    if not any(True for _ in module.children()):
        return module
    kept = object.__new__(type(module))
    kept.__dict__.update(module.__dict__)
    kept._modules = {}
    for name, child in module._modules.items():
        if child is None:
            continue
        tensors = [*child.parameters(), *child.buffers()]
        if not tensors:
            kept._modules[name] = child
        elif any(id(tensor) in used for tensor in tensors):
            kept._modules[name] = pruned(child, used)
    if not any(id(tensor) in used for tensor in own if tensor is not None):
        kept._parameters, kept._buffers = {}, {}
    return kept
