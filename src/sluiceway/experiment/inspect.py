"""A model's mixture-of-experts layout, or a network's cut points, as a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from sluiceway.errors import InputError, first_line, how_to_install, line, quoted
from sluiceway.experiment.builders import network
from sluiceway.experiment.own_code import fault, is_code, placed
from sluiceway.experiment.own_model import call
from sluiceway.experiment.vision import KINDS, Picture, chain_of
from sluiceway.moe import (
    Block,
    MoELayout,
    NoExpertsError,
    add_lora,
    find_adapters,
    find_layout,
    moe_layout,
    upcycle,
)
from sluiceway.moe.search import unrecognised
from sluiceway.split.cut import CutPoint, cut_points


def show_layout(
    name: str,
    model: nn.Module,
    source: str,
    *,
    experts: int = 0,
    top_k: int = 2,
    layers: int = 1,
    lora: int = 0,
) -> None:
    """Print blocks, routers, experts, sizes, and what would cross the wire per round.

    Args:
        name, model, source: a model of texts as `outlined` gives it for that name.
        experts: experts to upcycle a dense model into, 0 for none; with top_k, layers.
        lora: rank of adapters on the experts, 0 for none.

    Raises:
        InputError: it cannot be upcycled, or has no such adapters.
        NoExpertsError: it has no mixture-of-experts block and `experts` is 0.
    """
    if experts:
        try:
            upcycle(model, layers, experts, top_k)
        except ValueError as error:
            raise InputError(str(error)) from None
    try:
        layout = moe_layout(model)
    except NoExpertsError as error:
        raise NoExpertsError(f"{name}: {error}; --experts 8 shows a dense model upcycled") from None
    console = wide_console()
    console.print(f"{name} from {source}", highlight=False)
    params = dict(model.named_parameters())
    console.print(blocks_table(layout, params))
    for said in [*layout_reasons(layout), *totals(layout, params)]:
        console.print(said, highlight=False)
    if lora:
        said = f"the same with adapters of rank {lora} on the experts, routers whole:"
        console.print(said, adapters_table(model, lora), sep="\n", highlight=False)


def of_images(model: nn.Module) -> bool:
    """Whether it is a vision model of Hugging Face that split learning can cut."""
    config: Any = model.config
    return config.model_type in KINDS


def show_blocks(name: str, model: nn.Module, source: str, image: str) -> None:
    """Print where a vision model of Hugging Face can be cut, with a head for 10 classes.

    Args:
        name, model, source: as `outlined` gives it for that name.
        image: "CxHxW" of its images; "" for the size in its configuration, 224 x 224 if it has
            none.

    Raises:
        InputError: the shape cannot be read, or the model takes no such images.
    """
    config: Any = model.config
    own = getattr(config, "image_size", 224)
    sides = own if isinstance(own, list | tuple) else (own, own)
    shape = image_shape(image) if image else (config.num_channels, *sides)
    ones, zeros = (1.0,) * config.num_channels, (0.0,) * config.num_channels
    with torch.device("meta"):
        chain = chain_of(model, 10, Picture(scale=ones, shift=zeros))
        try:
            points = cut_points(chain, torch.zeros(1, *shape))
        except (ValueError, RuntimeError) as error:
            raise InputError(f"--image {image}: {first_line(error)}") from None
    told = f"{name} from {source}, with a head for 10 classes"
    said = f"{told}, on images {'x'.join(map(str, shape))}"
    wide_console().print(said, highlight=False)
    show_points(points)


def show_own(name: str, image: str) -> None:
    """Print parameters, mixtures and cut points of what the user's function makes for 10 classes.

    Args:
        name: "file.py:make" or "module:make", relative to the working folder.
        image: "CxHxW", the shape it is called with; a model of texts comes with its tokenizer and
            is not run.

    Raises:
        InputError: there is no such file or function, it fails, or what it makes cannot be used.
    """
    if not is_code(name):
        found = Path(name).is_file()
        why = "it needs the function's name" if found else f"there is no file {line(name, 200)}"
        raise InputError(f"{quoted(name)}: {why}; write {line(name, 200)}:make")
    shape = image_shape(image)
    made = call(placed("model.name", name, Path.cwd()), 0, classes=10, shape=shape)
    of_texts = isinstance(made, tuple) and len(made) == 2
    model = made[0] if of_texts else made
    if not isinstance(model, nn.Module):
        raise InputError(
            f"{quoted(name)} makes {type(model).__name__}; expected a torch.nn.Module, or for "
            "texts a pair of a model and its tokenizer"
        )
    layout = find_layout(model)
    points: list[CutPoint] = []
    if not of_texts:
        try:
            points = cut_points(model, torch.zeros(2, *shape))
        except Exception as error:  # the user's forward may raise anything
            if layout is None:
                why = f"{quoted(name)} on images {list(shape)}: {fault(error)}"
                raise InputError(why) from None
    params = dict(model.named_parameters())
    count, trained = (
        sum(p.numel() for p in params.values() if p.requires_grad or every) for every in (1, 0)
    )
    console = wide_console()
    console.print(f"{name}: {count:,} parameters, {trained:,} trained", highlight=False)
    if layout is not None:
        console.print(blocks_table(layout, params))
        for said in [*layout_reasons(layout), *totals(layout, params)]:
            console.print(said, highlight=False)
    if points:
        show_points(points)
    elif layout is None:
        seen = unrecognised(model)
        said = "no mixture of experts was found"
        said += f"; it has experts that are not recognised: {seen}" if seen else ""
        console.print(said, highlight=False)


def image_shape(image: str) -> tuple[int, ...]:
    """(C, H, W) of "CxHxW". Raises InputError."""
    sides = image.split("x")
    if len(sides) != 3 or not all(side.isdecimal() and int(side) for side in sides):
        raise InputError(f"--image {line(image, 80)}: write 3x32x32")
    return tuple(map(int, sides))


def layout_reasons(layout: MoELayout) -> list[str]:
    """Why blocks of no known family were taken for mixtures."""
    return [
        f"found by structure: {why}"
        for why in sorted({block.found for block in layout.blocks if block.found})
    ]


def wide_console() -> Console:
    """A console for tables: a terminal's own width, and wide where the output is kept."""
    console = Console()
    if not console.is_terminal:
        console.width = 160
    return console


def show_cuts(name: str, width: int, image: str) -> None:
    """Print where a network for images can be cut, and what crosses there for each example.

    Raises:
        InputError: the image's shape cannot be read, or the network cannot take it.
    """
    try:
        shape = [int(side) for side in image.split("x")]
        model = network(name, width, shape, classes=10, seed=0)
        points = cut_points(model, torch.zeros(1, *shape))
    except (ValueError, RuntimeError) as error:
        why = first_line(error)
        raise InputError(f"--image {image} --width {width}: {why}; write 3x32x32") from None
    show_points(points)


def show_points(points: Iterable[CutPoint]) -> None:
    """Print places to cut at, and what crosses there for each example."""
    rows = [
        (
            point.name,
            "x".join(map(str, point.shape)),
            f"{point.bytes_per_example:,}",
            f"{point.front_parameters:,}",
        )
        for point in points
    ]
    numbers = ("shape", "bytes an example", "client's parameters")
    wide_console().print(plain_table(("cut at",), numbers, rows))


def plain_table(
    words: Sequence[str], numbers: Sequence[str], rows: Iterable[Sequence[str]]
) -> Table:
    """A table without lines: columns of words on the left, then columns of numbers."""
    table = Table(box=None, pad_edge=False)
    for heading in words:
        table.add_column(heading, overflow="fold")
    for heading in numbers:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def blocks_table(layout: MoELayout, params: Mapping[str, Tensor]) -> Table:
    """One row a block; of experts in modules of their own, expert 0 stands for all."""
    words = ("block", "family", "E", "k", "router", "expert tensors")
    numbers = ("parameters an expert", "MB an expert")
    return plain_table(words, numbers, (block_row(block, params) for block in layout.blocks))


def block_row(block: Block, params: Mapping[str, Tensor]) -> list[str]:
    """A block's row in `blocks_table`."""

    def shown(name: str) -> str:
        return f"{name.removeprefix(f'{block.name}.')} {list(params[name].shape)}"

    expert = block.expert(0)
    values = [piece.of(params) for piece in expert]
    axes = ["" if piece.index is None else f" (expert axis {piece.axis})" for piece in expert]
    return [
        block.name,
        block.family.name,
        str(block.num_experts),
        str(block.top_k),
        "\n".join(shown(name) for name in block.gate),
        "\n".join(shown(p.param) + axis for p, axis in zip(expert, axes, strict=True)),
        f"{sum(value.numel() for value in values):,}",
        f"{sum(value.nbytes for value in values) / 1e6:.2f}",
    ]


def totals(layout: MoELayout, params: Mapping[str, Tensor]) -> list[str]:
    """The model's sizes, and a round's traffic when experts and gates are trained."""
    count = sum(param.numel() for param in params.values())
    size = sum(param.nbytes for param in params.values())
    experts, routers = (
        [params[name] for name in names] for names in (layout.expert_params, layout.gate_params)
    )
    shares = [sum(param.numel() for param in group) / count for group in (experts, routers)]
    moved = sum(param.nbytes for param in (*experts, *routers))
    return [
        f"parameters {count / 1e6:.1f} M ({size / 1e6:.1f} MB), experts {shares[0]:.1%}, "
        f"routers {shares[1]:.3%}",
        f"across the wire, each client each round and each way, experts and routers trained: "
        f"at most {moved / 1e6:.1f} MB (experts without a token stay)",
    ]


def adapters_table(model: nn.Module, rank: int) -> Table:
    """What a client sends and gets in a round with adapters on all experts, by `method.lora`."""
    gates = moe_layout(model).gate_params
    params = dict(model.named_parameters())
    routers = sum(params[name].nbytes for name in gates)
    experts = {n: p for n, p in params.items() if n in moe_layout(model).expert_params}
    try:
        add_lora(model, experts, rank, rank)
    except ImportError:
        raise InputError(f"--lora needs a package: {how_to_install('lora')}") from None
    except ValueError as error:
        raise InputError(str(error)) from None
    params = dict(model.named_parameters())
    a, b, base = (
        sum(params[name].nbytes for name in {getattr(pair, part).param for pair in pairs})
        for pairs in [find_adapters(model)]
        for part in ("a", "b", "base")
    )
    traffic = {"frozen-a": (b, a + b), "residual": (a + b, a + b + base), "average": (a + b, a + b)}
    rows = [
        (name, *(f"{(size + routers) / 1e6:.2f}" for size in sizes))
        for name, sizes in traffic.items()
    ]
    return plain_table(("method.lora",), ("MB up", "MB down"), rows)
