"""A run as it goes on: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from sluiceway.core.round_loop import Record
from sluiceway.core.waits import PATIENCE, listening
from sluiceway.experiment.session import Progress


@contextmanager
def shown() -> Iterator[Progress]:
    """Progress for `run` and `compare`, on stderr."""
    console = Console(stderr=True)
    if console.is_terminal:
        with bar(console) as progress:
            yield progress
    else:
        with plain() as progress:
            yield progress


@contextmanager
def plain() -> Iterator[Progress]:
    """A line for each round; in a long one for what is waited for, ever more seldom."""
    state = {"round": 1, "began": time.monotonic(), "next": PATIENCE}

    def on_round(record: Record) -> None:
        line(described(record))
        state.update(round=record.round + 1, began=time.monotonic(), next=PATIENCE)

    def begin(rounds: int) -> None:
        state.update(round=1, began=time.monotonic(), next=PATIENCE)

    def on_update(done: int, of: int) -> None:
        passed = time.monotonic() - state["began"]
        if passed >= state["next"] and done < of:
            state["next"] = 2 * passed
            line(f"round {state['round']:.0f}: {done} of {of} clients")

    with listening(lambda what, done, of: line(f"{what}: {done} of {of}")):
        yield Progress(begin=begin, say=line, on_round=on_round, on_update=on_update)


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
        TextColumn("{task.description} {task.fields[round]}"),
        BarColumn(),
        TextColumn("{task.fields[told]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Bar(*columns, console=console) as shown_bar:
        state = {"task": shown_bar.add_task("round", total=None, round=0, told="")}
        total = {"moved": 0.0, "rounds": 0, "accuracy": 0.0}
        waits: dict[str, TaskID] = {}

        def say(text: str) -> None:
            shown_bar.console.print(text, markup=False, highlight=False)

        def begin(rounds: int) -> None:
            total.update(moved=0.0, rounds=rounds)
            shown_bar.remove_task(state["task"])
            state["task"] = shown_bar.add_task("round", total=rounds, round=0, told="")

        def on_round(record: Record) -> None:
            total["moved"] += (record.bytes_up + record.bytes_down) / 1e6
            if record.accuracy is not None:
                total["accuracy"] = record.accuracy
            shown_bar.update(
                state["task"],
                completed=record.round,
                round=f"{record.round}/{total['rounds']:.0f}",
                told=f"accuracy {total['accuracy']:.4f}  {total['moved']:.1f} MB",
            )
            if record.rejected or record.failed:
                say(described(record))

        def on_update(done: int, of: int) -> None:
            task = next(one for one in shown_bar.tasks if one.id == state["task"])
            before = float(str(task.fields["round"]).split("/")[0])
            shown_bar.update(state["task"], completed=before + 0.95 * done / of)

        def on_wait(what: str, done: int, of: int) -> None:
            if done == of:
                shown_bar.remove_task(waits.pop(what))
            elif what not in waits:
                waits[what] = shown_bar.add_task(what, total=of, round="", told="")
            if what in waits:
                shown_bar.update(waits[what], completed=done, told=f"{done} of {of}")

        with listening(on_wait):
            yield Progress(begin=begin, say=say, on_round=on_round, on_update=on_update)
