"""What the documentation shows runs."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pandas as pd
import pytest
import typer

from sluiceway.cli import app
from sluiceway.experiment.recipe import load_recipe
from sluiceway.experiment.tables import shipped_recipes

ROOT = Path(__file__).parents[1]

#: The additions of CONTRIBUTING.md, used from Python.
USED = """
import torch, transformers
import sluiceway
from sluiceway.data import load_text
from sluiceway.moe import moe_layout
from sluiceway.split import Conv4
from tests.moe.conftest import FAMILIES, as_released
from tests.worlds import TinyClassifier, TinyText
from torch.utils.data import TensorDataset

clients = [TinyText(8, 1), TinyText(40, 2)]
strategy = sluiceway.Uniform()
result = sluiceway.federate(TinyClassifier(), clients, TinyText(20, 3), strategy, rounds=1)
assert len(result.records) == 1 and not result.records[0].rejected, result.records

images = TensorDataset(torch.randn(12, 1, 8, 8), torch.arange(12) % 3)
sent = []
for method in (sluiceway.FirstChannels(share=0.25), sluiceway.FirstChannels(share=1)):
    network = Conv4(1, 3, width=4)
    result = sluiceway.split_train(network, "conv1", [images], images, method, rounds=1)
    sent.append(result.bytes_up)
assert sent[0] < sent[1] / 2, sent

block = moe_layout(as_released("flex_olmo")).blocks[0]
assert (block.family.name, block.num_experts, block.top_k) == ("flex_olmo", 4, 3), block
data = load_text("imdb")
assert data.label_names == ("bad", "good") and data.source == "SLUICEWAY_DATA/imdb", data
"""


def blocks(page: str, language: str) -> list[str]:
    """The code of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [block for found, block in fences if found == language]


def insert(path: Path, after: str, line: str) -> None:
    """Put a line after the first line that begins with these words."""
    text = path.read_text(encoding="utf-8")
    found = re.search(rf"^{re.escape(after)}.*\n", text, re.MULTILINE)
    assert found, f"{path} has no line {after!r}"
    path.write_text(text[: found.end()] + line + text[found.end() :], encoding="utf-8")


@pytest.mark.slow
def test_contributing_is_enough_to_add_each_kind(tmp_path: Path, recipe: Path) -> None:
    """A copy of the sources, the steps of CONTRIBUTING.md taken in it."""
    package = tmp_path / "src" / "sluiceway"
    shutil.copytree(ROOT / "src" / "sluiceway", package)
    shutil.copytree(ROOT / "tests", tmp_path / "tests")
    strategy, import_strategy, _, compressor, import_compressor = blocks(
        "CONTRIBUTING.md", "python"
    )
    family, model, data = blocks("CONTRIBUTING.md", "text")
    assert len(strategy.splitlines()) < 30
    (package / "strategies" / "uniform.py").write_text(strategy, encoding="utf-8")
    strategies = package / "strategies" / "__init__.py"
    insert(strategies, "from sluiceway.strategies.usage", import_strategy)
    insert(strategies, "        FedAlignMoE,", "        Uniform,\n")
    (package / "split" / "first_channels.py").write_text(compressor, encoding="utf-8")
    insert(package / "split" / "methods.py", "from sluiceway.split.elements", import_compressor)
    insert(package / "split" / "methods.py", "        Bottleneck,", "        FirstChannels,\n")
    insert(package / "moe" / "families.py", '        Family("mixtral"', family)
    insert(tmp_path / "tests" / "moe" / "conftest.py", '    "mixtral":', model)
    insert(package / "data" / "text.py", "TEXT_SETS = {", data)
    folder = tmp_path / "data" / "imdb"
    folder.mkdir(parents=True)
    for part in ("train", "test"):
        frame = pd.DataFrame({"text": ["fine", "dull"] * 3, "label": ["good", "bad"] * 3})
        frame.to_parquet(folder / f"{part}.parquet")
    paths = {"PYTHONPATH": f"{tmp_path / 'src'}{os.pathsep}{tmp_path}"}
    environment = os.environ | paths | {"SLUICEWAY_DATA": str(tmp_path / "data")}
    run = ["run", str(recipe), "--set", "run.rounds=1", "--out", str(tmp_path / "run")]
    for command in (
        ["-c", USED],
        ["-m", "sluiceway", *run, "--set", "method.name=uniform", "--set", "method.power=0.5"],
    ):
        done = subprocess.run(
            [sys.executable, *command],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    summary = (tmp_path / "run" / "summary.json").read_text(encoding="utf-8")
    assert '"uniform"' in summary


def test_links_of_the_pages_lead_somewhere() -> None:
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            if "://" not in target and target != "recipe-keys.md":
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_pages_hold_no_notes_to_self() -> None:
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"\bTODO\b|\bFIXME\b|\bXXX\b|should say so", text), page.name


def test_who_reads_label_counts_is_said() -> None:
    """A summary, which comes home to whoever submits, has them in every form of run."""
    (row,) = (line for line in lines("docs/deploy.md") if line.startswith("| a site's update"))
    assert "whoever submits" in row
    assert "`summary.json` and in the report, of U-shaped runs too" in row
    (row,) = (line for line in lines("docs/deploy.md") if "client's error" in line)
    assert "paths and label values" in row
    assert row.endswith("| the server, the submitter |")


def lines(page: str) -> list[str]:
    return (ROOT / page).read_text(encoding="utf-8").splitlines()


def commands() -> list[tuple[str, list[str]]]:
    """Every `sluiceway ...` line of the pages' shell blocks, without continuations and remarks."""
    found = []
    for page in (
        "README.md",
        "CONTRIBUTING.md",
        *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")),
    ):
        for block in blocks(page, ""):
            for line in re.sub(r"\\\n\s*", " ", block).splitlines():
                text = re.split(r"\s{3,}|\s#", line.strip())[0]
                if text.startswith("sluiceway "):
                    found.append((page, shlex.split(text)[1:]))
    return found


def test_commands_of_the_pages_parse() -> None:
    """Commands, options and arguments exist; nothing is run."""
    top = typer.main.get_command(app)
    seen = commands()
    assert len(seen) > 25
    for page, words in seen:
        if "|" in " ".join(words) or (words[:1] == ["run"] and "first" in words):
            continue  # alternatives, or methods that the page itself adds
        command, context, rest = top, click.Context(top), list(words)
        while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
            name = rest.pop(0)
            assert name in command.commands, f"{page}: sluiceway {' '.join(words)}"
            command = command.commands[name]
            context = click.Context(command, parent=context)
        try:
            command.make_context(command.name, rest, resilient_parsing=False)
        except click.UsageError as error:
            pytest.fail(f"{page}: sluiceway {' '.join(words)}: {error.format_message()}")
        except (click.exceptions.Exit, SystemExit):
            pass


def test_recipes_and_keys_of_the_pages_are_right() -> None:
    for page, words in commands():
        if words[0] not in ("run", "show") or words[1] not in shipped_recipes():
            continue
        given = [words[n + 1] for n, word in enumerate(words[:-1]) if word == "--set"]
        if "CONTRIBUTING" in page:  # its methods are added there
            continue
        load_recipe(words[1], given)


@pytest.mark.slow
def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / "own_model.py"))
    shown = capsys.readouterr().out
    assert re.search(r"fedavg: 0\.\d+, .*MB up\nfedalign-moe: 0\.\d+", shown)
