"""The command `sluiceway`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import click
import typer
from typer.core import TyperGroup

from sluiceway import __version__
from sluiceway.deploy.commands import deploy, trial_of
from sluiceway.errors import BAD_INPUT, line, outcome_of
from sluiceway.experiment.command_line import (
    MORE,
    PLAIN,
    Device,
    Engine,
    Force,
    Out,
    RecipeName,
    Resume,
    Settings,
    is_given,
    new_folder,
    overrides,
    refuse_idle,
    stoppable,
)
from sluiceway.experiment.tables import method_label


class Group(TyperGroup):
    """Says in one line why a command failed, and ends with the exit code of that error."""

    def invoke(self, ctx: click.Context) -> Any:
        code, why = outcome_of(lambda: super(Group, self).invoke(ctx))
        if why:
            print(f"sluiceway: {why}", file=sys.stderr)
        ctx.exit(code)


RunFolder = Annotated[Path, typer.Argument(metavar="RUN")]
Kept = Annotated[
    str | None,
    typer.Option(metavar="last|best", help="Which model.", show_default="as run.keep says"),
]

# Help is plain; with rich installed typer would nevertheless escape brackets in it.
typer.core.HAS_RICH = False
app = typer.Typer(**PLAIN, cls=Group)
app.add_typer(deploy, name="deploy")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    try:
        command = typer.main.get_command(app)
        code: int = command.main(arguments, prog_name="sluiceway", standalone_mode=False)
    except click.ClickException as error:
        at = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else ""
        said = line(error.format_message())
        if isinstance(error, click.NoSuchOption) and not error.possibilities:
            said += f" See `{at or 'sluiceway'} --help`."
        print(f"{at or 'sluiceway'}: {said}", file=sys.stderr)
        return BAD_INPUT
    return code


def say_version(asked: bool) -> None:
    """Print the version and end, if it was asked for."""
    if asked:
        print(f"sluiceway {__version__}")
        raise typer.Exit


@app.callback()
def top(
    version: Annotated[
        bool,
        typer.Option(
            "--version", "-v", callback=say_version, is_eager=True, help="Show the version."
        ),
    ] = False,
) -> None:
    """Train on data that must not leave its owners."""


DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Say what would run, its sizes and bytes; write nothing."),
]


@app.command(epilog=MORE)
def run(
    ctx: typer.Context,
    recipe: RecipeName,
    settings: Settings = None,
    out: Out = None,
    device: Device = None,
    engine: Engine = None,
    resume: Resume = False,
    force: Force = False,
    dry_run: DryRun = False,
) -> None:
    """Train one recipe and leave a run folder.

    RECIPE is the name of a shipped recipe, or a TOML file.
    """
    from sluiceway.experiment.recipe import load_recipe

    chosen = load_recipe(recipe, overrides(settings, device, engine))
    if force:
        refuse_idle(ctx, "no --force, which begins anew", "resume")
    if dry_run:
        refuse_idle(ctx, "no --dry-run, which writes nothing", "resume", "force")
        from sluiceway.experiment.dry_run import described
        from sluiceway.experiment.session import Session

        with stoppable("") as progress:
            print(*described(chosen, Session(), progress), sep="\n")
        return
    from sluiceway.core.waits import announced
    from sluiceway.experiment.report import write_report
    from sluiceway.experiment.run import run as run_here

    out = out or new_folder(recipe, chosen)
    with stoppable(f"--out {out} --resume") as progress:
        how: dict[str, Any] = {"resume": resume, "force": force, "progress": progress}
        if chosen.run.engine == "local":
            _, summary = run_here(chosen, out, **how)
        else:
            summary = trial_of(chosen.run.engine)(chosen, out, **how)
        with announced("writing the report"):
            write_report([out])
    personal, full = summary["mean_personal_accuracy"], summary.get("accuracy_full")
    also = f", personal {personal:.4f}" if personal is not None else ""
    also += f", with nothing dropped {full:.4f}" if full is not None else ""
    if (name := summary["metric"]) != "accuracy" and summary["metric_value"] is not None:
        values = summary["metric_value"], summary["metric_best"]
        also += f", {name} {values[0]:.4f} (best {values[1]:.4f})"
    print(
        f"{method_label(summary['recipe']['method'])}: accuracy {summary['accuracy']:.4f} "
        f"(best {summary['best_accuracy']:.4f}{also}) "
        f"after {summary['rounds']} round{'s' if summary['rounds'] > 1 else ''}, "
        f"{summary['bytes_up'] / 1e6:.1f} MB up, "
        f"{summary['bytes_down'] / 1e6:.1f} MB down, {summary['seconds']:.0f} s"
    )
    print(f"run folder: {out} (summary.json, report.html)")


@app.command(epilog=MORE)
def compare(
    recipe: RecipeName,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=A,B,C",
            help="Values to compare; with several keys every combination. Repeatable.",
            show_default="[compare] of the recipe",
        ),
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(
            metavar="0,1,2",
            help="Seeds that each variant is run with.",
            show_default="[compare] of the recipe",
        ),
    ] = None,
    settings: Settings = None,
    out: Out = None,
    device: Device = None,
    engine: Engine = None,
    dry_run: DryRun = False,
) -> None:
    """Run variants of a recipe over seeds and put them in one table.

    RECIPE is the name of a shipped recipe, or a TOML file.
    """
    from sluiceway.experiment.recipe import load_recipe

    given = overrides(settings, device, engine)
    chosen = load_recipe(recipe, given, alone=False)
    from sluiceway.experiment import compare as comparison

    how = comparison.parse_vary(vary or []) or None, comparison.parse_seeds(seeds)
    if dry_run:
        from sluiceway.experiment.dry_run import compared

        with stoppable("") as progress:
            planned = comparison.planned_runs(recipe, given, *how)
            print(*compared(planned, progress), sep="\n")
        return
    from sluiceway.core.waits import announced
    from sluiceway.experiment.report import write_report

    out = out or new_folder(recipe, chosen)
    with stoppable(f"--out {out}") as progress:
        table = comparison.compare(recipe, given, *how, out, progress=progress)
        with announced("writing the reports"):
            write_report([out])
    print(comparison.markdown(table))
    print(f"comparison folder: {out} (compare.json, compare.md, report.html)")


@app.command(epilog=MORE)
def show(
    recipe: RecipeName,
    settings: Settings = None,
    device: Device = None,
    engine: Engine = None,
) -> None:
    """Show a recipe as TOML with every value, and where each comes from.

    RECIPE is the name of a shipped recipe, or a TOML file.
    """
    from sluiceway.experiment.recipe import load_recipe

    given = overrides(settings, device, engine)
    chosen = load_recipe(recipe, given)
    from sluiceway.experiment.resolved import shown

    print(shown(chosen, recipe, given), end="")


@app.command()
def export(
    run: RunFolder,
    out: Annotated[Path, typer.Argument(metavar="OUT")],
    which: Kept = None,
    merge: Annotated[bool, typer.Option("--merge", help="Merge LoRA adapters.")] = False,
) -> None:
    """Write the trained model of the run folder RUN into the new folder OUT.

    Models of texts become folders for transformers (LoRA an adapter for PEFT, in OUT/adapter),
    networks of images safetensors with a manifest.
    """
    from sluiceway.experiment.export import export as export_model
    from sluiceway.experiment.progress import shown
    from sluiceway.experiment.trained import load

    with shown():
        written = export_model(load(run, which), out, merge=merge)
    print(*written, sep="\n")


@app.command()
def predict(
    run: RunFolder,
    file: Annotated[Path, typer.Argument(metavar="FILE")],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A .csv, .jsonl or .parquet.", show_default="stdout"),
    ] = None,
    which: Kept = None,
    client: Annotated[
        int | None,
        typer.Option(
            help="Whose mask to use, where clients have masks of their own.",
            show_default="the mask common to all",
        ),
    ] = None,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="Where to run.")] = "auto",
) -> None:
    """Predict labels with the trained model of the run folder RUN.

    FILE is a csv, jsonl or parquet of texts, in the column that the run's data.text_column names;
    for a model of images an image, or a folder of images.
    """
    from sluiceway.experiment import predict as predicting
    from sluiceway.experiment.progress import shown
    from sluiceway.experiment.trained import load

    predicting.require_form(out)
    with shown():
        model = load(run, which, device=device)
        if client is not None:
            model.use_mask_of(client)
        inputs = predicting.read_inputs(file, model)
        found = model.predict(inputs.values)
    print(predicting.write(predicting.table(inputs, found), out), end="")
    if said := predicting.agreement(inputs, found):
        print(said, file=sys.stderr)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...")],
) -> None:
    """Write report.html for folders of runs or comparisons."""
    from sluiceway.experiment.report import write_report

    for path in write_report(folders):
        print(path)


@app.command()
def inspect(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL")],
    width: Annotated[int, typer.Option(help="Channels of a network for images.")] = 32,
    image: Annotated[
        str, typer.Option(metavar="CxHxW", help="Its input; of Hugging Face's: as configured.")
    ] = "3x32x32",
    experts: Annotated[int, typer.Option(help="Upcycle first, into this many; 0: no.")] = 0,
    top_k: Annotated[int, typer.Option(help="Experts a token, when upcycling.")] = 2,
    layers: Annotated[int, typer.Option(help="Last layers to upcycle.")] = 1,
    lora: Annotated[int, typer.Option(metavar="RANK", help="Show adapters too; 0: no.")] = 0,
    gguf: Annotated[
        str, typer.Option(metavar="FILE", help="Of a model in a GGUF file.", show_default="none")
    ] = "",
    inversion: Annotated[
        bool, typer.Option("--inversion", help="Rebuild images from what crosses, of a split run.")
    ] = False,
    device: Annotated[
        str, typer.Option(metavar="auto|cpu|cuda", help="Where to rebuild, with --inversion.")
    ] = "cpu",
) -> None:
    """Show routers, experts or cut points of a model, and what would cross.

    MODEL is minilm, smollm2, a folder or a name on the Hugging Face hub, whose weights are not
    read; a network for images: conv4, resnet18, vgg11; or your own, file.py:make (docs/data.md),
    called as for 10 classes: mixtures that were found, and where it can be cut. With --inversion
    it is the folder of a finished split run, and a minute of attack tells how much of its images
    what crosses gives away.
    """
    upcycling = ("experts", "top_k", "layers", "lora", "gguf")
    if inversion:
        refuse_idle(ctx, "no --inversion", "width", "image", *upcycling)
        from sluiceway.experiment.inversion import show_inversion
        from sluiceway.experiment.progress import shown

        with shown():
            show_inversion(Path(model), device)
        return
    refuse_idle(ctx, "--inversion", "device")
    from sluiceway.experiment.inspect import (
        of_images,
        show_blocks,
        show_cuts,
        show_layout,
        show_own,
    )
    from sluiceway.experiment.models import outlined
    from sluiceway.experiment.own_code import is_code
    from sluiceway.experiment.recipe import NETWORKS

    if is_code(model) or model.endswith(".py"):
        refuse_idle(ctx, "a network by name, as conv4", "width")
        refuse_idle(ctx, "a model of texts that is not your code", *upcycling)
        show_own(model, image)
    elif model in NETWORKS:
        refuse_idle(ctx, "a model of texts", *upcycling)
        show_cuts(model, width, image)
    else:
        refuse_idle(ctx, "a network for images, as conv4", "width")
        if not experts:
            refuse_idle(ctx, "--experts above 0", "top_k", "layers")
        found, source = outlined(model, gguf or None)
        if of_images(found):
            refuse_idle(ctx, "a model of texts", *upcycling)
            show_blocks(model, found, source, image if is_given(ctx, "image") else "")
        else:
            refuse_idle(ctx, "a model of images", "image")
            show_layout(
                model, found, source, experts=experts, top_k=top_k, layers=layers, lora=lora
            )


@app.command()
def recipes() -> None:
    """List the recipes that ship."""
    from sluiceway.experiment.listings import show
    from sluiceway.experiment.tables import read_tables, shipped_recipes

    show([(name, str(read_tables(name)["description"])) for name in shipped_recipes()])


@app.command()
def methods(
    kind: Annotated[str | None, typer.Argument(metavar="[federated|split|robust|server]")] = None,
) -> None:
    """List the methods: strategies, compressors, robust rules and server optimisers."""
    from sluiceway.experiment.listings import show_methods

    show_methods(kind)


@app.command()
def keys(
    table: Annotated[str | None, typer.Argument(metavar="[TABLE|METHOD]")] = None,
) -> None:
    """Explain the keys of a recipe: meaning, type, range, default.

    TABLE is run, data, model, train or compare; METHOD one that `sluiceway methods` lists.
    """
    from sluiceway.experiment.listings import show_keys

    show_keys(table)


if __name__ == "__main__":
    sys.exit(main())
