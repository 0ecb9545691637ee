"""A run as it goes on: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from sluiceway.core.round_loop import Record
from sluiceway.experiment.session import Progress


@contextmanager
def shown() -> Iterator[Progress]:
    """Progress for `run` and `compare`, on stderr."""
    console = Console(stderr=True)
    if console.is_terminal:
        with bar(console) as progress:
            yield progress
    else:
        yield Progress(say=line, on_round=lambda record: line(described(record)))


def line(text: str) -> None:
    """One line on stderr at once."""
    print(text, file=sys.stderr, flush=True)


def evaluated(record: Record) -> str:
    """Accuracy and loss, where the round has them."""
    if record.accuracy is None or record.loss is None:
        return ""
    return f"accuracy {record.accuracy:.4f}, loss {record.loss:.3f}, "


def described(record: Record) -> str:
    """A round in words."""
    moved = (record.bytes_up + record.bytes_down) / 1e6
    line = f"round {record.round}: {evaluated(record)}{moved:.1f} MB, {record.seconds:.1f} s"
    for word, faults in (("rejected", record.rejected), ("failed", record.failed)):
        if faults:
            client, why = min(faults.items())
            line += f", {len(faults)} {word} (client {client}: {why})"
    return line + (f", tried {record.retries + 1} times" if record.retries else "")


@contextmanager
def bar(console: Console) -> Iterator[Progress]:
    """A bar with round, accuracy, bytes and time left."""
    columns = (
        TextColumn("round {task.fields[round]}"),
        BarColumn(),
        TextColumn("accuracy {task.fields[accuracy]}  {task.fields[moved]:.1f} MB"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Bar(*columns, console=console) as shown_bar:
        state = {"task": shown_bar.add_task("", total=None, round=0, accuracy="-", moved=0.0)}
        total = {"moved": 0.0, "rounds": 0}

        def say(text: str) -> None:
            shown_bar.console.print(text, markup=False, highlight=False)

        def begin(rounds: int) -> None:
            total.update(moved=0.0, rounds=rounds)
            shown_bar.remove_task(state["task"])
            state["task"] = shown_bar.add_task("", total=rounds, round=0, accuracy="-", moved=0.0)

        def on_round(record: Record) -> None:
            total["moved"] += (record.bytes_up + record.bytes_down) / 1e6
            now: dict[str, Any] = {}
            if record.accuracy is not None:
                now = {"accuracy": f"{record.accuracy:.4f}"}
            shown_bar.update(
                state["task"],
                completed=record.round,
                round=f"{record.round}/{total['rounds']:.0f}",
                moved=total["moved"],
                **now,
            )
            if record.rejected or record.failed:
                say(described(record))

        def on_update(done: int, of: int) -> None:
            finished = shown_bar.tasks[-1].fields.get("round", 0)
            before = float(str(finished).split("/")[0])
            shown_bar.update(state["task"], completed=before + 0.95 * done / of)

        yield Progress(begin=begin, say=say, on_round=on_round, on_update=on_update)
