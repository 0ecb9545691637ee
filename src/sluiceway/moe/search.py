"""Finding mixture-of-experts blocks that no table knows, by their structure.

A block is a module with two kinds of children side by side: a router, whose only parameters are a
matrix [E, H], E >= 2, and perhaps a bias [E]; and E experts that read width H. Experts are either
a ``ModuleList`` or ``ModuleDict`` of E feed-forward networks with the same parameters, or fused
parameters [E, ., .], in one child or in several beside the router.

A classifier beside identical layers looks much like that, so more is asked for: experts have no
attention, convolutions or embeddings, routers are not called like output layers, a whole
transformers model is no block, and k, the experts chosen per token, is read from an attribute of
router, block or config. Without k there is no block, only a note for the error message.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from sluiceway.moe.adapters import unwrapped
from sluiceway.moe.structural import STRUCTURAL, StructuralFamily

_TOP_K = (
    "top_k",
    "topk",
    "k",
    "moe_top_k",
    "router_top_k",
    "num_experts_per_tok",
    "num_experts_per_token",
    "num_selected_experts",
    "num_activated_experts",
    "n_activated_experts",
    "n_activated",
    "experts_per_token",
    "experts_top_k",
)
# In a config these may mean the sampling of text.
_NOT_OF_CONFIGS = ("top_k", "topk", "k")
_OUTPUT = re.compile(r"head|classif|score|logit|pool|embed|^out|^fc\d*$|^norm", re.I)
_HINT = re.compile(r"expert|moe|mixture|rout|gate|gating|switch|sparse", re.I)
# In a config how many experts there are, and not how many a token gets or all share.
_COUNT = re.compile(r"^(moe_)?(num|n)_(local_|routed_)?experts$")
_PART = re.compile(r"(Experts?|Router|MoE|Moe|MoeBlock|MoEBlock|MoeMLP|SparseMLP)$")
_ATTENTION = re.compile(r"attention|attn", re.I)


@dataclass(frozen=True)
class Match:
    """A block found by its structure: its module name, the module, how it is read, and why."""

    name: str
    block: nn.Module
    family: StructuralFamily
    found: str


@dataclass(frozen=True)
class Search:
    """What a search found.

    Attributes:
        matches: the blocks, in order of appearance.
        near: one sentence for every place that looks like a block but is not one.
    """

    matches: tuple[Match, ...]
    near: tuple[str, ...]

    @property
    def nothing(self) -> str:
        """Half a sentence on why there is no match."""
        if self.near:
            return "; ".join(self.near[:3])
        return (
            "none was found by structure (a router [E, H] beside E feed-forward modules, or beside "
            "parameters with leading axis E)"
        )


@dataclass(frozen=True)
class _Router:
    path: str  # in the block
    module: nn.Module
    experts: int
    hidden: int


@dataclass(frozen=True)
class _Experts:
    path: str  # in the block; "" if several children hold them
    names: str  # as shown
    count: int
    widths: frozenset[int]  # any of which may be the width that they read


def search(model: nn.Module) -> Search:
    """Look for blocks by structure; the model may be wrapped or on the meta device."""
    matches: list[Match] = []
    near: list[str] = []
    configs: dict[str, Any] = {}
    for name, module in model.named_modules():
        above = configs[name.rpartition(".")[0]] if name else None
        configs[name] = getattr(module, "config", None) or above
        # Experts may be networks of any kind: what is inside one is no block of its own.
        if any(_inside(name, match) for match in matches):
            continue
        found = _block(name, module, configs[name])
        if isinstance(found, Match):
            matches.append(found)
        elif found is not None:
            near.append(found)
    return Search(tuple(matches), tuple(near))


def without_adapters(module: nn.Module) -> Iterator[nn.Module]:
    """The module and all in it, but for PEFT's wrappers and what they add."""
    module = unwrapped(module)
    yield module
    for child in module.children():
        yield from without_adapters(child)


def own_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Parameters without those of adapters."""
    return [p for inner in without_adapters(module) for p in inner.parameters(recurse=False)]


def unrecognised(model: nn.Module) -> str | None:
    """What says that a model in which no block was found has experts; None if nothing does.

    Its configuration, or one in it, names more than one expert, or a module's class is called like
    a mixture's part.
    """
    config: Any = getattr(model, "config", None)
    values = config.to_dict() if hasattr(config, "to_dict") else {}
    seen = [f"config.{name} = {count}" for name, count in _expert_counts(values)]
    for name, module in model.named_modules():
        kind = type(module).__name__
        whole = any(c.__name__ == "PreTrainedModel" for c in type(module).__mro__)
        if _PART.search(kind) and not whole and not _gives_one_value(module):
            seen.append(f"{name or 'the model'} is a {kind}")
            break
    return ", ".join(seen[:3]) or None


def _gives_one_value(module: nn.Module) -> bool:
    """Whether its last linear layer has one output: such a router says yes or no, of no experts."""
    linear = [m for m in without_adapters(module) if isinstance(m, nn.Linear)]
    return bool(linear) and linear[-1].out_features == 1


def _expert_counts(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, int]]:
    """Numbers of experts above one in a configuration and those in it."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _expert_counts(value, f"{prefix}{key}.")
        elif _COUNT.search(str(key)) and type(value) is int and value > 1:
            yield f"{prefix}{key}", value


def _inside(name: str, match: Match) -> bool:
    parts = [part for part in (match.name, match.family.experts or match.family.router) if part]
    return f"{name}.".startswith(f"{'.'.join(parts)}.")


def _block(name: str, module: nn.Module, config: Any) -> Match | str | None:
    """The block in ``module``; or a sentence on what is missing; or None."""
    if any(kind.__name__ == "PreTrainedModel" for kind in type(module).__mro__):
        return None
    pairs = [
        (router, experts)
        for child, inner in module.named_children()
        for router in _routers(child, inner)
        for experts in _experts_beside(module, child, router.experts)
        if router.hidden in experts.widths
    ]
    if not pairs:
        return None
    router, experts = pairs[0]
    hinted = any(_HINT.search(n) for n in (type(module).__name__, router.path, experts.path))
    where = f"block {name or type(module).__name__!r}: " if name else ""
    said = f"router {router.path!r} [{router.experts}, {router.hidden}] beside {experts.names}"
    if len(pairs) > 1:
        rivals = ", ".join(sorted({pair[0].path for pair in pairs} | {p[1].names for p in pairs}))
        return f"{where}which is the router and which the experts is not clear: {rivals}"
    source = _top_k(router, module, config)
    if source is None:
        missing = f"{where}{said}, but k, the experts chosen per token, is in none of "
        return missing + f"{', '.join(_TOP_K)} of router, block and config" if hinted else None
    top_k, origin = source
    family = StructuralFamily(
        name=STRUCTURAL,
        router_class="",
        router=router.path,
        experts=experts.path,
        num_experts=router.experts,
        top_k=top_k,
        path=f"{name}.{router.path}" if name else router.path,
        linear=isinstance(unwrapped(router.module), nn.Linear),
    )
    logits = (
        f"logits are the router's output, the choice its {top_k} greatest"
        if family.linear
        else "logits, and the choice if it is there, are looked for in the router's output"
    )
    return Match(name, module, family, f"{said}; k = {top_k} from {origin}; {logits}")


def _routers(path: str, module: nn.Module) -> Iterator[_Router]:
    """The module, or else modules inside it, with one matrix [E, H], maybe a bias [E], only."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict) or _OUTPUT.search(path.split(".")[-1]):
        return
    shapes = [tuple(param.shape) for param in own_parameters(module)]
    matrices = [shape for shape in shapes if len(shape) == 2 and shape[0] > 1]
    if len(matrices) == 1 and matrices[0][0] >= 2:
        experts, hidden = matrices[0]
        small = ((experts, hidden), (experts,), (1, experts))
        if all(shape in small for shape in shapes) and len(shapes) <= 2:
            yield _Router(path, module, experts, hidden)
            return
    if len(matrices) > 1:
        for child, inner in module.named_children():
            yield from _routers(f"{path}.{child}", inner)


def _experts_beside(block: nn.Module, router: str, count: int) -> Iterator[_Experts]:
    """Containers of ``count`` experts among the block's children other than the router."""
    fused: list[tuple[str, frozenset[int]]] = []
    for child, module in block.named_children():
        if child == router:
            continue
        module = unwrapped(module)
        if isinstance(module, nn.ModuleList | nn.ModuleDict):
            widths = _module_widths(module, count)
            if widths:
                yield _Experts(child, f"{count} modules '{child}.*'", count, widths)
        elif widths := _fused_widths(module, count):
            fused.append((child, widths))
    if len(fused) == 1:
        child, widths = fused[0]
        yield _Experts(child, f"parameters of {child!r} [{count}, ., .]", count, widths)
    elif fused:
        names = ", ".join(repr(child) for child, _ in fused)
        every = frozenset(width for _, widths in fused for width in widths)
        yield _Experts("", f"parameters of {names} [{count}, ., .]", count, every)


def _module_widths(modules: nn.ModuleList | nn.ModuleDict, count: int) -> frozenset[int]:
    """Widths that the experts read; empty if these are not ``count`` equal networks."""
    children = dict(modules.named_children())
    numbered = [int(found[1]) for name in children if (found := re.search(r"(\d+)$", name))]
    if len(children) != count or sorted(numbered) != list(range(count)):
        return frozenset()
    forms = {tuple(p.shape for p in own_parameters(m)) for m in children.values()}
    if len(forms) != 1 or not all(_is_feed_forward(m) for m in children.values()):
        return frozenset()
    first = next(iter(children.values()))
    linear = [m.in_features for m in without_adapters(first) if isinstance(m, nn.Linear)]
    other = [w for param in own_parameters(first) if param.ndim == 2 for w in param.shape]
    return frozenset(linear or other)


def _is_feed_forward(expert: nn.Module) -> bool:
    """Matrices and vectors only, no attention, embedding, recurrence or list of layers."""
    for module in without_adapters(expert):
        if isinstance(module, nn.Embedding | nn.EmbeddingBag | nn.RNNBase | nn.ModuleList):
            return False
        if _ATTENTION.search(type(module).__name__):
            return False
    return all(param.ndim <= 2 for param in own_parameters(expert))


def _fused_widths(module: nn.Module, count: int) -> frozenset[int]:
    """Widths of the fused parameters [count, ., .]; empty if there is something else as well."""
    widths: set[int] = set()
    for inner in without_adapters(module):
        own = list(inner.parameters(recurse=False))
        builtin = type(inner).__module__.startswith("torch.nn.modules.")
        listed = isinstance(inner, nn.ParameterList | nn.ParameterDict)
        # torch's own parameters of three axes are convolutions and bilinear forms.
        if own and builtin and not listed:
            return frozenset()
        if _ATTENTION.search(type(inner).__name__):
            return frozenset()
        for param in own:
            if param.shape[:1] != (count,):
                return frozenset()
            if param.ndim == 3:
                widths.update(param.shape[1:])
    return frozenset(widths)


def _top_k(router: _Router, block: nn.Module, config: Any) -> tuple[int, str] | None:
    """(k, where it stands), or None."""
    inner = unwrapped(router.module)
    # A composite configuration has that of its texts inside.
    texts = config.get_text_config() if hasattr(config, "get_text_config") else config
    places = ((inner, router.path), (block, "block"), (config, "config"), (texts, "text config"))
    for place, origin in places:
        for name in _TOP_K:
            if "config" in origin and name in _NOT_OF_CONFIGS:
                continue
            value = getattr(place, name, None)
            if type(value) is int and 1 <= value <= router.experts:
                return value, f"{origin}.{name}"
    return None
