"""The commands of deployments: `sluiceway deploy ...`, and runs over one on this machine."""

from __future__ import annotations

import argparse
import importlib
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

#: Engines beside the embedded one: the extra's name, and the packages that it brings.
EXTRAS: Final = {"nvflare": ("nvflare", "psutil"), "flower": ("flwr", "cryptography")}
#: The port that NVFlare's own kits use.
PORT: Final = 8002
ADMIN: Final = "admin@sluiceway.local"


def part_of(engine: str, module: str) -> Any:
    """A module of an engine. Raises InputError if its extra is not installed."""
    from sluiceway.errors import InputError

    try:
        return importlib.import_module(f"sluiceway.deploy.{engine}.{module}")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in EXTRAS[engine]:
            raise
        raise InputError(
            f"the engine {engine} needs its extra: pip install 'sluiceway[{engine}]'"
        ) from None


def trial_of(engine: str) -> Callable[..., dict[str, Any]]:
    """What runs a recipe on a deployment of this machine and returns the summary."""
    trial: Callable[..., dict[str, Any]] = part_of(engine, "local_deployment").run_trial
    return trial


def add_deploy(
    commands: Any, settings: Callable[[argparse.ArgumentParser], None], parser: type
) -> None:
    """Add `deploy` to the command.

    Args:
        commands: of the command, as argparse has them.
        settings: adds what `run` and `compare` share.
        parser: class of the parsers.
    """
    deploy = commands.add_parser("deploy", help=deploy_help(), description=deploy_help())
    engines = deploy.add_subparsers(required=True, metavar="ENGINE", parser_class=parser)
    nvflare = engines.add_parser("nvflare", help="NVFlare: mutual TLS, federated and split")
    steps = nvflare.add_subparsers(required=True, metavar="STEP", parser_class=parser)

    def add(name: str, action: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        step: argparse.ArgumentParser = steps.add_parser(
            name, help=action.__doc__, description=action.__doc__
        )
        step.set_defaults(action=action)
        return step

    step = add("provision", provision_command)
    step.add_argument("--server", required=True, metavar="HOST", help="its name, as sites reach it")
    step.add_argument("--port", type=int, default=PORT, help="on the server, for all traffic")
    step.add_argument("--site", action="append", required=True, metavar="NAME", dest="sites")
    step.add_argument("--admin", default=ADMIN, metavar="NAME", help="who submits, as a@b.c")
    step.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the kits")

    step = add("start", start_command)
    step.add_argument("kit", type=Path, metavar="KIT", help="folder of the server or of a site")
    step.add_argument("--site", type=Path, metavar="FILE", help="the site's own file")
    step.add_argument("--runs", type=Path, metavar="DIR", help="where the server keeps runs")
    step.add_argument(
        "--gate", metavar="ADDRESS:PORT", help="for split learning; else the next port"
    )

    step = add("submit", submit_command)
    step.add_argument("recipe", help="a shipped recipe's name, or a TOML file")
    step.add_argument("--kit", type=Path, required=True, metavar="KIT", help="the admin's")
    step.add_argument("--sites", metavar="A,B,C", help="by client number; else all, by name")
    step.add_argument(
        "--wait", type=float, default=60.0, metavar="SECONDS", help="for the server and sites"
    )
    settings(step)
    step.add_argument("--resume", action="store_true", help="continue the run of that name")
    step.add_argument("--force", action="store_true", help="replace the run of that name")


def deploy_help() -> str:
    return "Run on machines of their own: provision, start, submit."


def provision_command(args: argparse.Namespace) -> None:
    """Make startup kits for a server, its sites and the one who submits."""
    kits = part_of("nvflare", "kits")
    for kit in kits.provision(args.out, args.server, args.port, args.sites, args.admin):
        print(f"{kit.role:6} {kit.name}: {kit.folder}")
    print(f"keep {args.out / 'authority'} to yourself: who has it can make kits")


def start_command(args: argparse.Namespace) -> None:
    """Start the server or a site from its kit; runs until it is ended."""
    starting, kits = part_of("nvflare", "start"), part_of("nvflare", "kits")
    kit = kits.read_kit(args.kit)
    if args.site is not None:
        check_site(args.site)
    starting.start_here(kit, starting.environment_of(kit, args.site, args.runs, args.gate))


def check_site(path: Path) -> None:
    """Raise InputError unless a site's file can be used."""
    from sluiceway.errors import InputError

    try:
        tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path} is not TOML: {error}") from None


def submit_command(args: argparse.Namespace) -> None:
    """Submit a recipe to a server, watch the run and bring its summary home."""
    desk, submitting = part_of("nvflare", "admin"), part_of("nvflare", "submit")
    kits = part_of("nvflare", "kits")
    from sluiceway.cli import new_folder, overrides, stoppable
    from sluiceway.experiment.progress import shown
    from sluiceway.experiment.recipe import load_recipe
    from sluiceway.experiment.report import write_report

    recipe = load_recipe(args.recipe, [*overrides(args), "run.engine=nvflare"])
    out = args.out or new_folder(args.recipe, recipe)
    with (
        shown() as progress,
        stoppable(progress, f"; continue with --out {out} --resume"),
        desk.opened(kits.read_kit(args.kit), args.wait) as session,
    ):
        sites = args.sites.split(",") if args.sites else sorted(session.sites())
        order = submitting.JobSpec(recipe, out.name, sites, args.resume, args.force, args.wait)
        submitting.submit(session, order, out, progress.say)
    write_report([out])
    print(f"run folder: {out} (summary.json, report.html); its checkpoints are on the server")
