"""A run saved after every round, and continued from there.

Everything random comes from the run's seed, the round and the client, so a checkpoint needs no
generator states: the strategy's tensors, what the clients keep, and the records so far are all.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file

from sluiceway.federated.rounds import Loop, Record


class CheckpointError(ValueError):
    """A checkpoint that cannot be continued from."""


@dataclass
class Checkpoint:
    """Saves a run into a folder; continues from the newest round there if `resume`.

    Attributes:
        folder: holds one folder a round; only the newest `keep` stay.
    """

    folder: Path
    resume: bool = False
    keep: int = 1

    def attach(self, loop: Loop, states: Path) -> None:
        """Restore the loop if there is something to resume, and save after each of its rounds.

        Args:
            states: the folder in which the engine holds the clients' own tensors.

        Raises:
            CheckpointError: the newest checkpoint cannot be read.
        """
        if self.resume and (found := self.saved()):
            self.restore(found[-1], loop, states)
        before = loop.on_round

        def save_then_tell(record: Record) -> None:
            self.save(record.round, loop, states)
            before(record)

        loop.on_round = save_then_tell

    def saved(self) -> list[Path]:
        """The checkpoints there are, oldest first."""
        return sorted(self.folder.glob("round-*")) if self.folder.is_dir() else []

    def save(self, number: int, loop: Loop, states: Path) -> None:
        """Write one checkpoint under a temporary name, then give it its own."""
        made = self.folder / f".new-{number}"
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir(parents=True)
        state = {name: t.contiguous() for name, t in loop.strategy.state_dict().items()}
        save_file(state, made / "strategy.safetensors")
        shutil.copytree(states, made / "clients")
        facts = {
            "records": [record.as_dict() for record in loop.result.records],
            "personal_accuracy": loop.result.personal_accuracy,
        }
        (made / "run.json").write_text(json.dumps(facts))
        final = self.folder / f"round-{number:05d}"
        shutil.rmtree(final, ignore_errors=True)
        os.replace(made, final)
        for old in self.saved()[: -self.keep]:
            shutil.rmtree(old)

    def restore(self, saved: Path, loop: Loop, states: Path) -> None:
        """Put strategy, clients and records back as they were after that round."""
        try:
            facts = json.loads((saved / "run.json").read_text())
            loop.strategy.load_state_dict(load_file(saved / "strategy.safetensors"))
            shutil.copytree(saved / "clients", states, dirs_exist_ok=True)
        except Exception as error:
            raise CheckpointError(f"checkpoint {saved} cannot be read ({error})") from error
        for line in facts["records"]:
            refused = {int(client): why for client, why in line["refused"].items()}
            loop.result.records.append(Record(**line | {"refused": refused}))
        loop.result.personal_accuracy |= {
            int(client): value for client, value in facts["personal_accuracy"].items()
        }
        loop.result.tensors = loop.strategy.tensors
