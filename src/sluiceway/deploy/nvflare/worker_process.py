"""Where a site works: a process of its own, so that one that dies takes nothing along."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class SiteProcess:
    """Starts the site's process when there is something to do, and ends it when asked.

    Attributes:
        command: that starts it; see `worker`.
    """

    command: Sequence[str]
    _process: subprocess.Popen[str] | None = field(default=None, init=False)

    def ask(self, what: str, facts: Any, message: Path | None, folder: Path) -> dict[str, Any]:
        """What the site answers, see `worker.answered`; also if its process ends meanwhile."""
        process = self.ready()
        assert process.stdin is not None
        assert process.stdout is not None
        asked = {
            "what": what,
            "facts": facts,
            "message": str(message) if message else None,
            "folder": str(folder),
        }
        try:
            process.stdin.write(json.dumps(asked) + "\n")
            process.stdin.flush()
            said: dict[str, Any] = json.loads(process.stdout.readline())
        except (OSError, ValueError):  # it closed its end, in the middle of a line or before
            code = process.wait()
            how = f"by signal {-code}" if code < 0 else f"with code {code}"
            return {"lost": f"its process ended {how}"}
        return said

    def ready(self) -> subprocess.Popen[str]:
        """The process; a new one if there is none or it has ended."""
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        return self._process

    def end(self) -> None:
        """End the process, whatever it does; the next `ask` starts another."""
        process = self._process
        if process is not None and process.poll() is None:
            process.kill()
            process.wait()
