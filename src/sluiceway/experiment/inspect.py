"""A model's mixture-of-experts layout, or a network's cut points, as a table."""

from __future__ import annotations

import torch
from rich.console import Console
from rich.table import Table

from sluiceway.experiment.errors import InputError
from sluiceway.experiment.kinds import network
from sluiceway.experiment.models import load_pretrained
from sluiceway.moe import BlockRow, Layout, NoExpertsError, find_anatomy, layout, upcycle
from sluiceway.split.cut import cut_points


def show_layout(name: str, experts: int, top_k: int, layers: int) -> None:
    """Print blocks, routers, experts, sizes, and what would cross the wire per round.

    Raises:
        InputError: there is no such model.
        NoExpertsError: it has no mixture-of-experts block and `experts` is 0.
    """
    loaded = load_pretrained(name)
    if experts:
        try:
            upcycle(loaded.backbone, layers, experts, top_k)
        except ValueError as error:
            raise InputError(str(error)) from None
    if find_anatomy(loaded.backbone) is None:
        raise NoExpertsError(
            f"{name} is dense: no mixture-of-experts block was found; --experts 8 shows it upcycled"
        )
    found = layout(loaded.backbone)
    console = wide_console()
    console.print(f"{name} from {loaded.source}", highlight=False)
    console.print(blocks_table(found))
    for line in totals(found):
        console.print(line, highlight=False)


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
        why = str(error).splitlines()[0]
        raise InputError(f"--image {image} --width {width}: {why}; write 3x32x32") from None
    table = Table(box=None, pad_edge=False)
    table.add_column("cut at")
    for heading in ("shape", "bytes an example", "client's parameters"):
        table.add_column(heading, justify="right")
    for point in points:
        table.add_row(
            point.name,
            "x".join(map(str, point.shape)),
            f"{point.bytes_per_example:,}",
            f"{point.front_parameters:,}",
        )
    wide_console().print(table)


def blocks_table(found: Layout) -> Table:
    """One row a block."""
    table = Table(box=None, pad_edge=False)
    for heading in ("block", "family", "E", "k", "router", "expert tensors", "MB an expert"):
        table.add_column(heading, overflow="fold")
    for row in found.rows:
        table.add_row(
            row.name,
            row.family,
            str(row.num_experts),
            str(row.top_k),
            *tensors(row),
            f"{row.bytes_per_expert / 1e6:.2f}",
        )
    return table


def tensors(row: BlockRow) -> tuple[str, str]:
    """Router and expert tensors, without the block's own name before theirs."""
    routers = [f"{short(t.name, row)} {list(t.shape)}" for t in row.router]
    experts = [
        f"{short(t.name, row)} {list(t.shape)}"
        + ("" if t.expert_axis is None else f" (expert axis {t.expert_axis})")
        for t in row.experts
    ]
    return "\n".join(routers), "\n".join(experts)


def short(name: str, row: BlockRow) -> str:
    """A parameter's name within its block."""
    return name.removeprefix(f"{row.name}.")


def totals(found: Layout) -> list[str]:
    """The model's sizes, and a round's traffic when experts and gates are trained."""
    moved = found.expert_bytes + found.router_bytes
    return [
        f"parameters {found.parameters / 1e6:.1f} M ({found.bytes / 1e6:.1f} MB), experts "
        f"{found.expert_share:.1%}, routers {found.router_share:.3%}",
        f"across the wire, each client each round and each way, experts and routers trained: "
        f"at most {moved / 1e6:.1f} MB (experts without a token stay)",
    ]
