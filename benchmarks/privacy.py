"""What defences of a split run cost in accuracy, and what an attacker still rebuilds.

    python benchmarks/privacy.py [--out runs/privacy] [--set data.limit=5000] [--only A,B]

Fashion-MNIST, conv4 cut behind conv2, 5 clients, 6 rounds, one seed. The attack is that of
`sluiceway inspect RUN --inversion`. Prints a Markdown table; runs that are there are not run again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from sluiceway.experiment.inversion import invert
from sluiceway.experiment.recipe import load_recipe
from sluiceway.experiment.run import run

#: By name: settings of the recipe fashion-split.
DEFENCES = {
    "sl": ["method.name=sl"],
    "sl, noise 0.5": ["method.name=sl", "method.noise=0.5"],
    "sl, noise 1": ["method.name=sl", "method.noise=1"],
    "sl, noise 2": ["method.name=sl", "method.noise=2"],
    "sl, nopeek 1": ["method.name=sl", "train.nopeek=1"],
    "sl, nopeek 5": ["method.name=sl", "train.nopeek=5"],
    "acp-sl": [],
    "acp-sl, noise 1": ["method.noise=1"],
    "acp-sl, nopeek 1": ["train.nopeek=1"],
}


def main() -> None:
    """Run what is missing, attack it, and print a row each."""
    arguments = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    arguments.add_argument("--out", type=Path, default=Path("runs/privacy"))
    arguments.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments.add_argument("--only", metavar="A;B", help="these rows")
    args = arguments.parse_args()
    print("| | accuracy | MSE | SSIM |\n|---|---|---|---|")
    names = args.only.split(";") if args.only else list(DEFENCES)
    for name in names:
        folder = args.out / name.replace(", ", "-").replace(" ", "-")
        if not (folder / "summary.json").exists():
            settings = ["run.rounds=6", "run.device=cpu", *args.set, *DEFENCES[name]]
            run(load_recipe("fashion-split", settings), folder, force=True)
        accuracy = json.loads((folder / "summary.json").read_text())["accuracy"]
        found = invert(folder)
        mse, similar = found.decoder.mse, found.decoder.ssim
        print(f"| {name} | {accuracy:.3f} | {mse:.4f} | {similar:.2f} |", flush=True)
    mean = found.class_mean
    print(f"| class mean, nothing seen | | {mean.mse:.4f} | {mean.ssim:.2f} |")


if __name__ == "__main__":
    main()
