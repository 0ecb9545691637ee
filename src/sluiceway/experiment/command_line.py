"""What the commands share: options, the folder of a run, and how a run is stopped. No torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from click.core import ParameterSource

from sluiceway.errors import InputError
from sluiceway.experiment.own_code import short_name
from sluiceway.experiment.tables import shipped_recipes

if TYPE_CHECKING:
    from sluiceway.experiment.recipe import Recipe
    from sluiceway.experiment.session import Progress

#: Settings of every group of commands: plain help, no boxes, and tracebacks as Python writes them.
PLAIN: Final[dict[str, Any]] = {
    "rich_markup_mode": None,
    "pretty_exceptions_enable": False,
    "context_settings": {"help_option_names": ["-h", "--help"]},
}
MORE: Final = "Every key of a recipe is explained by `sluiceway keys`, every method by `methods`."


def recipe_names(incomplete: str) -> list[str]:
    """Shipped recipes for the shell's completion."""
    return [name for name in shipped_recipes() if name.startswith(incomplete)]


#: Arguments are explained in the docstrings: typer 0.20 loses their help with click 8.5.
RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", autocompletion=recipe_names)]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Set a key, as data.alpha=0.1. Repeatable.",
        show_default="the recipe's",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Folder for the results.", show_default="below runs/"),
]
Device = Annotated[
    str | None,
    typer.Option(metavar="auto|cpu|cuda", help="Sets run.device.", show_default="the recipe's"),
]
Engine = Annotated[
    str | None,
    typer.Option(
        metavar="local|nvflare|flower", help="Sets run.engine.", show_default="the recipe's"
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run that is in --out.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the run that is in --out.")]


def is_given(ctx: typer.Context, name: str) -> bool:
    """Whether the command line gives the option of that parameter."""
    return ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE


def refuse_idle(ctx: typer.Context, needs: str, *names: str) -> None:
    """Raise InputError for the first of these options that the command line gives.

    Args:
        needs: what would have to be so for them to have an effect.
        names: as the command's parameters are called.
    """
    for name in names:
        if is_given(ctx, name):
            option = name.replace("_", "-")
            raise InputError(f"--{option} has no effect here: it needs {needs}")


def overrides(settings: list[str] | None, device: str | None, engine: str | None) -> list[str]:
    """--set, --device and --engine as `key=value`."""
    given = {"run.device": device, "run.engine": engine}
    return [*(settings or []), *(f"{key}={value}" for key, value in given.items() if value)]


def new_folder(name: str, recipe: Recipe) -> Path:
    """A folder below runs/ that does not exist yet."""
    stem = f"{Path(name).stem}-{short_name(recipe.method['name'])}-seed{recipe.run.seed}"
    number = 1
    while (path := Path("runs") / (stem if number == 1 else f"{stem}-{number}")).exists():
        number += 1
    return path


@contextlib.contextmanager
def stoppable(hint: str) -> Iterator[Progress]:
    """Progress on stderr; Ctrl-C and SIGTERM end what is inside between two steps.

    Args:
        hint: how to continue, for the line that says it was stopped.
    """
    from sluiceway.core.signals import graceful_stop
    from sluiceway.experiment.progress import shown

    try:
        with shown() as progress, graceful_stop(progress.say):
            yield progress
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"; continue with {hint}") from None
