"""The command: run, compare, report, inspect, recipes, deploy."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from rich.markup import escape
from rich.table import Table

from sluiceway import __version__
from sluiceway.deploy.commands import add_deploy, trial_of
from sluiceway.errors import BAD_INPUT, outcome_of

if TYPE_CHECKING:
    from sluiceway.experiment.recipe import Recipe
    from sluiceway.experiment.session import Progress


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage block."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    args = parser().parse_args(arguments)
    code, line = outcome_of(lambda: args.action(args))
    if line:
        print(f"sluiceway: {line}", file=sys.stderr)
    return code


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    top = OneLineParser(
        prog="sluiceway", description="Train on data that must not leave its owners."
    )
    top.add_argument("--version", action="version", version=f"sluiceway {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND", parser_class=OneLineParser)

    def add(name: str, action: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=action.__doc__, description=action.__doc__)
        command.set_defaults(action=action)
        return command

    run = add("run", run_command)
    run.add_argument("recipe", help="a shipped recipe's name, or a TOML file")
    add_settings(run)
    run.add_argument("--resume", action="store_true", help="continue the run that is in --out")
    run.add_argument("--force", action="store_true", help="replace the run that is in --out")

    compare = add("compare", compare_command)
    compare.add_argument("recipe", help="a shipped recipe's name, or a TOML file")
    compare.add_argument("--vary", action="append", default=[], metavar="KEY=A,B,C")
    compare.add_argument("--seeds", metavar="0,1,2", help="seeds to run each variant with")
    add_settings(compare)

    report = add("report", report_command)
    report.add_argument("folders", nargs="+", type=Path, metavar="DIR")

    inspect = add("inspect", inspect_command)
    inspect.add_argument(
        "model",
        help="minilm, smollm2, a folder or a hub name; for images conv4, resnet18 or vgg11",
    )
    inspect.add_argument("--width", type=int, default=32, help="of a network for images")
    inspect.add_argument("--image", default="3x32x32", metavar="CxHxW", help="what it is shown")
    inspect.add_argument("--experts", type=int, default=0, help="upcycle first, into this many")
    inspect.add_argument("--top-k", type=int, default=2)
    inspect.add_argument("--layers", type=int, default=1, help="last layers to upcycle")
    inspect.add_argument("--lora", type=int, default=0, metavar="RANK", help="show adapters too")
    inspect.add_argument("--gguf", default="", metavar="FILE", help="of a model in a GGUF file")

    add("recipes", recipes_command)
    add_deploy(commands, add_settings, OneLineParser)
    return top


def add_settings(command: argparse.ArgumentParser) -> None:
    """What run and compare share."""
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    command.add_argument("--out", type=Path, metavar="DIR", help="folder for the results")
    command.add_argument("--device", metavar="auto|cpu|cuda")
    command.add_argument("--engine", metavar="local|nvflare|flower")


def overrides(args: argparse.Namespace) -> list[str]:
    """--set, --device and --engine as `key=value`."""
    settings: list[str] = list(args.settings)
    settings += [f"run.device={args.device}"] if args.device else []
    settings += [f"run.engine={args.engine}"] if args.engine else []
    return settings


def run_command(args: argparse.Namespace) -> None:
    """Train one recipe and leave a run folder."""
    from sluiceway.experiment.progress import shown
    from sluiceway.experiment.recipe import load_recipe
    from sluiceway.experiment.report import write_report
    from sluiceway.experiment.run import run

    recipe = load_recipe(args.recipe, overrides(args))
    out = args.out or new_folder(args.recipe, recipe)
    with shown() as progress, stoppable(progress, f"; continue with --out {out} --resume"):
        how = {"resume": args.resume, "force": args.force, "progress": progress}
        if recipe.run.engine == "local":
            _, summary = run(recipe, out, **how)
        else:
            summary = trial_of(recipe.run.engine)(recipe, out, **how)
    write_report([out])
    personal, full = summary["mean_personal_accuracy"], summary.get("accuracy_full")
    beside = f", personal {personal:.4f}" if personal is not None else ""
    beside += f", with nothing dropped {full:.4f}" if full is not None else ""
    print(
        f"{summary['method']}: accuracy {summary['accuracy']:.4f} "
        f"(best {summary['best_accuracy']:.4f}{beside}) "
        f"after {summary['rounds']} rounds, {summary['bytes_up'] / 1e6:.1f} MB up, "
        f"{summary['bytes_down'] / 1e6:.1f} MB down, {summary['seconds']:.0f} s"
    )
    print(f"run folder: {out} (summary.json, report.html)")


def compare_command(args: argparse.Namespace) -> None:
    """Run variants of a recipe over seeds and put them in one table."""
    from sluiceway.experiment.compare import compare, markdown, parse_vary
    from sluiceway.experiment.progress import shown
    from sluiceway.experiment.recipe import load_recipe
    from sluiceway.experiment.report import write_report

    out = args.out or new_folder(args.recipe, load_recipe(args.recipe, overrides(args)))
    with shown() as progress, stoppable(progress, f"; continue with --out {out}"):
        table = compare(
            args.recipe,
            overrides(args),
            parse_vary(args.vary) or None,
            parse_seeds(args.seeds),
            out,
            progress=progress,
        )
    write_report([out])
    print(markdown(table))
    print(f"comparison folder: {out} (compare.json, compare.md, report.html)")


@contextlib.contextmanager
def stoppable(progress: Progress, hint: str) -> Iterator[None]:
    """Ctrl-C and SIGTERM end what is inside between two steps, with a hint how to go on."""
    from sluiceway.core.signals import graceful_stop

    try:
        with graceful_stop(progress.say):
            yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(hint) from None


def parse_seeds(text: str | None) -> list[int] | None:
    """`0,1,2` as numbers. Raises InputError."""
    from sluiceway.errors import InputError

    if text is None:
        return None
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        seeds = [-1]
    if min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise InputError(f"--seeds {text}: give different whole numbers from 0, such as 0,1,2")
    return seeds


def new_folder(name: str, recipe: Recipe) -> Path:
    """A folder below runs/ that does not exist yet."""
    stem = f"{Path(name).stem}-{recipe.method['name']}-seed{recipe.run.seed}"
    number = 1
    while (path := Path("runs") / (stem if number == 1 else f"{stem}-{number}")).exists():
        number += 1
    return path


def report_command(args: argparse.Namespace) -> None:
    """Write report.html for runs or comparisons."""
    from sluiceway.experiment.report import write_report

    for path in write_report(args.folders):
        print(path)


def inspect_command(args: argparse.Namespace) -> None:
    """Show a model's routers and experts, or a network's cut points, and what would cross."""
    from sluiceway.experiment.inspect import show_cuts, show_layout
    from sluiceway.experiment.recipe import NETWORKS

    if args.model in NETWORKS:
        show_cuts(args.model, args.width, args.image)
        return
    show_layout(args.model, args.experts, args.top_k, args.layers, args.lora, args.gguf)


def recipes_command(args: argparse.Namespace) -> None:
    """List the recipes that ship."""
    from sluiceway.experiment.inspect import wide_console
    from sluiceway.experiment.tables import read_tables, shipped_recipes

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    for name in shipped_recipes():
        table.add_row(name, escape(read_tables(name)["description"]))
    wide_console().print(table)


if __name__ == "__main__":
    sys.exit(main())
