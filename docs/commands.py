"""Run the shell blocks of the pages, line by line, in a temporary folder: `make docs-commands`.

`sluiceway run` and `compare` are made tiny; everything else is run as it stands. A line that cannot
be run on one machine without a hub or a GPU is skipped, and says why.

    python docs/commands.py [README.md docs/runs.md ...]
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
PAGES: Final = ("README.md", "docs/index.md", "docs/runs.md", "docs/models.md", "docs/deploy.md")
PAGES_TOO: Final = ("docs/flower.md", "CONTRIBUTING.md", "examples/flower/README.md")
#: Pages whose blocks a test runs as a whole.
TESTED: Final = "docs/data.md: by tests/test_paths.py"

#: Why a line is not run here, by what it has.
SKIPPED: Final = {
    "make ": "it is how everything here was installed",
    "pip install": "it is how everything here was installed",
    "git clone": "it is how everything here was installed",
    "provision|start|submit": "alternatives; docs/data.md has each",
    "nvflare start": "several machines; tests/test_paths.py does it on one",
    "nvflare submit": "several machines; tests/test_paths.py does it on one",
    "microsoft/": "it needs the Hugging Face hub",
    "method.name=uniform": "a method that the page adds; tests/test_docs.py runs it",
    "method.name=first": "a method that the page adds; tests/test_docs.py runs it",
    "flower-": "several machines; tests/deploy/flower does it on one",
    "flwr ": "several machines; tests/deploy/flower does it on one",
    "export FLWR": "several machines; tests/deploy/flower does it on one",
    "[superlink": "a file",
    "default = ": "a file",
    "address = ": "a file",
    "root-certificates = ": "a file",
}
#: What makes a run tiny, and one of texts besides.
TINY: Final = "--set run.rounds=1 --set data.limit=200 --set data.test_limit=40"
TEXTS: Final = "--set data.max_tokens=12 --set run.personal=20"
#: Data that the first lines of other blocks would have left.
BEFORE: Final = """
import csv
from PIL import Image
with open("new.csv", "w", newline="") as file:
    csv.writer(file).writerows([["text"], ["the first"], ["the second"]])
with open("notes.csv", "w", newline="") as file:
    notes = [[f"word{n % 7} and word{n % 3}", f"kind{n % 3}"] for n in range(300)]
    csv.writer(file).writerows([["text", "label"], *notes])
from pathlib import Path
Path("new").mkdir()
for n in range(3):
    Image.new("L", (28, 28), 80 * n).save(f"new/{n}.png")
from sluiceway.experiment.models import model_place
from shutil import copytree
copytree(model_place("minilm").where, "my-model")
"""


def lines_of(page: str) -> list[str]:
    """The commands of a page's shell blocks, without remarks and with their continuations."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = []
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    for language, block in fences:
        if language not in ("", "sh") or "┌" in block:  # a drawing
            continue
        # A remark is behind # or, in a list of commands, behind three spaces.
        lines = re.sub(r"\\\n\s*", "", block).splitlines()
        commands = [re.split(r"\s{3,}|\s+#", line.strip())[0] for line in lines]
        found += [command for command in commands if command]
    return found


def tiny(command: str) -> str:
    """The command on few examples, with one seed."""
    words = command.split()
    if words[:2] not in (["sluiceway", "run"], ["sluiceway", "compare"]):
        return command
    texts = "split" not in command and "cifar10" not in command
    short = re.sub("--seeds [0-9,]+", "", command) if words[1] == "compare" else command
    seeds = " --seeds 0" if words[1] == "compare" else ""
    return f"{short} {TINY}{seeds}{' ' + TEXTS if texts and 'mmlu' not in command else ''}"


def shell(command: str, folder: Path) -> str:
    """Run a command; returns "" or the last line of what it said of its failure."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PATH": path}
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=os.environ | quiet,
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    said = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
    return said[-1] if done.returncode else ""


def main(pages: list[str]) -> int:
    """Run the pages' lines; returns how many failed."""
    failed = 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        made = [
            f"{sys.executable} -c '{BEFORE}'",
            *(f"sluiceway run quickstart --out runs/{name}" for name in ("a", "b", "first")),
            "sluiceway run split-quickstart --out runs/scans",
        ]
        for command in made:
            if why := shell(tiny(command), folder):
                print(f"FAILED before all: {why}")
                return 1
        for page in pages:
            for command in lines_of(page):
                why = next((why for part, why in SKIPPED.items() if part in command), "")
                if why:
                    print(f"skipped  {page}: {command}: {why}", flush=True)
                    continue
                if found := re.search(r"--out (\S+)|export \S+ (\S+)", command):
                    shutil.rmtree(folder / (found[1] or found[2]), ignore_errors=True)
                why = shell(tiny(command), folder)
                no_data = "SLUICEWAY_DATA" in why
                failed += bool(why) and not no_data
                word = "skipped " if no_data else "FAILED  " if why else "ran     "
                print(f"{word} {page}: {command}{': ' + why if why else ''}", flush=True)
    print(f"{failed} failed; {TESTED}")
    return failed


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:] or [*PAGES, *PAGES_TOO]), 1))
