"""The commands of deployments: `sluiceway deploy ...`, and runs over one on this machine."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from sluiceway.errors import InputError, how_to_install
from sluiceway.experiment.command_line import (
    PLAIN,
    Device,
    Force,
    Out,
    RecipeName,
    Resume,
    Settings,
    new_folder,
    overrides,
    refuse_idle,
    stoppable,
)
from sluiceway.experiment.tables import key_of

#: Engines besides the local one: the extra's name, and the packages that it brings.
EXTRAS: Final = {"nvflare": ("nvflare", "psutil"), "flower": ("flwr", "trustme", "psutil")}
#: The port that NVFlare's own kits use.
PORT: Final = 8002
ADMIN: Final = "admin@sluiceway.local"


def part_of(engine: str, module: str) -> Any:
    """A module of an engine. Raises InputError if its extra is not installed."""
    try:
        return importlib.import_module(f"sluiceway.deploy.{engine}.{module}")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in EXTRAS[engine]:
            raise
        raise InputError(f"the engine {engine} needs its extra: {how_to_install(engine)}") from None


def trial_of(engine: str) -> Callable[..., dict[str, Any]]:
    """What runs a recipe on a deployment of this machine and returns the summary."""
    trial: Callable[..., dict[str, Any]] = part_of(engine, "local_deployment").run_locally
    return trial


deploy = typer.Typer(**PLAIN, help="Run on machines of their own: provision, start, submit.")
nvflare = typer.Typer(**PLAIN, help="NVFlare: mutual TLS, federated and split.")
deploy.add_typer(nvflare, name="nvflare")


@nvflare.command()
def provision(
    server: Annotated[str, typer.Option(metavar="HOST", help="The server, as sites reach it.")],
    sites: Annotated[list[str], typer.Option("--site", metavar="NAME", help="Repeatable.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the kits.")],
    port: Annotated[int, typer.Option(help="On the server, for all traffic.")] = PORT,
    admin: Annotated[str, typer.Option(metavar="NAME", help="Who submits, as a@b.c.")] = ADMIN,
) -> None:
    """Make startup kits for a server, its sites and the one who submits."""
    kits = part_of("nvflare", "kits")
    for kit in kits.provision(out, server, port, sites, admin):
        print(f"{kit.role:6} {kit.name}: {kit.folder}")
    print(f"each kit holds its owner's private key, and {out / 'authority'} the root's alone")
    print("send each kit to its owner and keep no copy; who has the root key can make kits")


@nvflare.command()
def start(
    ctx: typer.Context,
    kit: Annotated[Path, typer.Argument(metavar="KIT")],
    site: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The site's own file.", show_default="none")
    ] = None,
    runs: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Where the server keeps runs.", show_default="runs in the kit"
        ),
    ] = None,
    gate: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS:PORT", help="For split learning.", show_default="the next port"
        ),
    ] = None,
    files: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR",
            help="Folders of the server from which recipes may name files; repeatable.",
            show_default="none",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.py:FUNCTION",
            help="The server's code that makes a recipe's own model.",
            show_default="none",
        ),
    ] = None,
) -> None:
    """Start the server or a site from its kit, the folder KIT; runs until it is ended."""
    from sluiceway.deploy.site import open_site

    starting, kits = part_of("nvflare", "start"), part_of("nvflare", "kits")
    found = kits.read_kit(kit)
    if found.role == "site":
        refuse_idle(ctx, "the server's kit", "runs", "gate", "files", "model")
    if site is not None:
        open_site(site)  # so that its faults are said now
    environment = starting.environment_of(found, site, runs, gate, files or (), model)
    starting.start_here(found, environment)


@nvflare.command()
def submit(
    ctx: typer.Context,
    recipe: RecipeName,
    kit: Annotated[Path, typer.Option(metavar="KIT", help="The admin's.")],
    sites: Annotated[
        str | None,
        typer.Option(metavar="A,B,C", help="By client number.", show_default="all, by name"),
    ] = None,
    wait: Annotated[
        float, typer.Option(metavar="SECONDS", help="How long to wait for server and sites.")
    ] = 60.0,
    settings: Settings = None,
    out: Out = None,
    device: Device = None,
    resume: Resume = False,
    force: Force = False,
) -> None:
    """Submit a recipe to a server, watch the run and fetch its summary.

    RECIPE is the name of a shipped recipe, or a TOML file.
    """
    admin, submitting = part_of("nvflare", "admin"), part_of("nvflare", "submit")
    kits = part_of("nvflare", "kits")
    from sluiceway.experiment.recipe import load_recipe
    from sluiceway.experiment.report import write_report

    given = overrides(settings, device, None)
    if any(key_of(one) == "run.engine" for one in given):
        raise InputError("run.engine has no effect here: what is submitted runs over nvflare")
    if force:
        refuse_idle(ctx, "no --force, which begins anew", "resume")
    chosen = load_recipe(recipe, [*given, "run.engine=nvflare"])
    out = out or new_folder(recipe, chosen)
    with (
        stoppable(f"--out {out} --resume") as progress,
        admin.opened(kits.read_kit(kit), wait) as session,
    ):
        named = sites.split(",") if sites else sorted(session.sites())
        job = submitting.JobSpec(chosen, out.name, named, resume, force, wait)
        submitting.submit(session, job, out, progress.say)
    write_report([out])
    print(f"run folder: {out} (summary.json, report.html); its checkpoints are on the server")
