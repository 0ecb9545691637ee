"""A run as it goes on: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

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


#: Seconds between two plain lines about the same thing: at first, and in a long run.
GAPS: Final = (5.0, 60.0)


class Seldom:
    """Whether it is time for another plain line, of what is told again and again, by its name.

    The time between two lines doubles within `GAPS`: an hour of waits takes about as many lines.
    """

    def __init__(self) -> None:
        self.next: dict[str, float] = {}
        self.gap: dict[str, float] = {}

    def __call__(self, what: str) -> bool:
        now = time.monotonic()
        if now < self.next.get(what, now):
            return False
        gap = self.gap.get(what, GAPS[0])
        self.next[what], self.gap[what] = now + gap, min(2 * gap, GAPS[1])
        return True


@contextmanager
def plain() -> Iterator[Progress]:
    """Lines for rounds and for what is waited for; short rounds share a line every few seconds."""
    state = {"round": 1, "rounds": 0, "began": time.monotonic(), "told": -math.inf}
    is_time = Seldom()

    def on_round(record: Record) -> None:
        now = time.monotonic()
        ends = record.round == state["rounds"]
        if ends or record.rejected or record.failed or now - state["told"] >= PATIENCE:
            line(described(record))
            state["told"] = now
        state.update(round=record.round + 1, began=now)

    def begin(rounds: int) -> None:
        state.update(round=1, rounds=rounds, began=time.monotonic(), told=-math.inf)

    def on_update(done: int, of: int) -> None:
        if done < of and time.monotonic() - state["began"] >= PATIENCE and is_time("clients"):
            line(f"round {state['round']:.0f}: {done} of {of} clients")

    def on_wait(what: str, done: int, of: int) -> None:
        if done < of and is_time(what):
            line(what if of == 1 else f"{what}: {done} of {of}")

    with listening(on_wait):
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
                total_known = of if of > 1 else None
                waits[what] = shown_bar.add_task(what, total=total_known, round="", told="")
            if what in waits and of > 1:
                shown_bar.update(waits[what], completed=done, told=f"{done} of {of}")

        with listening(on_wait):
            yield Progress(begin=begin, say=say, on_round=on_round, on_update=on_update)
