"""A SuperLink and SuperNodes as processes on this machine, over TLS, every node with its key."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

import tomli_w
from flwr.app.user_config import UserConfigValue

from sluiceway.deploy.flower import own_user
from sluiceway.deploy.flower.certificates import new_certificates, new_node_key, write_secret
from sluiceway.deploy.processes import LOOPBACK, Processes, free_port
from sluiceway.errors import line
from sluiceway.transport.tls import Credentials

#: Seconds that a SuperLink has to start.
START_TIMEOUT: Final = 60.0
#: Names of processes; the others are SuperNodes, by the names of their keys.
SUPERLINK: Final = "superlink"
SUPEREXEC: Final = "superexec"
#: The name of the SuperLink in Flower's own configuration.
CONNECTION: Final = "local"


class DeploymentError(Exception):
    """A part of the deployment cannot be started or failed; one line."""


@dataclass
class Deployment(Processes):
    """Processes of one Flower deployment, all of which end with the block.

    Attributes:
        folder: for keys, certificates, the database and logs; private to this user.
        port: of the SuperLink, for everything; chosen by the system.
        fleet: address that SuperNodes connect to; the SuperLink's own unless a relay is between.
        configs: the newest node configuration of each SuperNode.
    """

    folder: Path = field(kw_only=True)
    fleet: str = ""
    port: int = field(default_factory=free_port)
    configs: dict[str, Mapping[str, str | int | float]] = field(default_factory=dict)

    def __enter__(self) -> Self:
        (self.folder / "flwr").mkdir(parents=True, exist_ok=True)
        self.keys: Credentials = new_certificates(self.folder)
        write_secret(self.folder / "executor.secret", secrets.token_hex(32).encode())
        connection = {"address": self.address, "root-certificates": str(self.keys.root)}
        config = {"superlink": {"default": CONNECTION, CONNECTION: connection}}
        (self.folder / "flwr" / "config.toml").write_text(tomli_w.dumps(config))
        return self

    @property
    def address(self) -> str:
        return f"{LOOPBACK}:{self.port}"

    def start_link(self) -> None:
        """Start the SuperLink with its database, and wait until it answers.

        Raises:
            DeploymentError: it does not.
        """
        self.start_flower(
            SUPERLINK,
            "flower-superlink",
            *("--host", LOOPBACK, "--port", self.port, *self.server_keys()),
            *("--database", self.folder / "superlink.sqlite", "--isolation", "process"),
            *("--superexec-auth-secret-file", self.folder / "executor.secret"),
            "--enable-supernode-auth",
        )
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline and self.running[SUPERLINK].poll() is None:
            with contextlib.suppress(OSError), socket.create_connection((LOOPBACK, self.port), 1):
                return
            time.sleep(0.1)
        raise DeploymentError(f"{SUPERLINK} did not start: {self.last_line(SUPERLINK)}")

    def start_executor(self) -> None:
        """Start the process that starts ServerApps; on its own, so as to outlive the SuperLink."""
        self.start_flower(
            SUPEREXEC,
            "flower-superexec",
            *("--runtime-api-address", self.address, "--root-certificates", self.keys.root),
            *("--superexec-auth-secret-file", self.folder / "executor.secret"),
        )

    def register(self, *names: str) -> None:
        """Make nodes' keys, and register their public halves under those names.

        Raises:
            DeploymentError: the SuperLink does not take one.
        """

        def one(name: str) -> None:
            _, public = new_node_key(self.folder, name)
            self.flwr("supernode", "register", str(public), CONNECTION, "--name", name)

        # Flower's command takes a second for each, nearly all of it to start.
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(one, names))

    def start_node(
        self, name: str, config: Mapping[str, str | int | float], key: Path | None = None
    ) -> None:
        """Start a SuperNode.

        Args:
            name: that its key was registered by.
            config: its node configuration.
            key: another private key than that of the name.
        """
        self.configs[name] = config
        self.start_flower(
            name,
            "flower-supernode",
            *("--superlink", self.fleet or self.address, "--root-certificates", self.keys.root),
            *("--auth-supernode-private-key", key or self.folder / name),
            *("--host", LOOPBACK, "--port", free_port(), "--node-config", config_text(config)),
            *self.server_keys(),
        )

    def run(self, app: Path, config: Mapping[str, str | int | float | bool]) -> str:
        """Start a run of an app folder with these values of its configuration; its id."""
        found = self.flwr("run", str(app), CONNECTION, "--run-config", config_text(config))
        return str(found["run-id"])

    def status(self, run: str) -> tuple[str, str]:
        """Status of a run, such as "running" or "finished:completed", and details of it."""
        for found in self.flwr("list", CONNECTION, "--run-id", run)["runs"]:
            return found["status"], str(found.get("details", ""))
        raise DeploymentError(f"the SuperLink knows no run {run}")

    def flwr(self, *arguments: str) -> dict[str, Any]:
        """Run Flower's own command; its output as JSON. Raises DeploymentError."""
        done = self.run_flwr(*arguments, "--format", "json")
        try:
            found: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
        except ValueError:
            found = {}
        if done.returncode or not found.get("success", True) or not found:
            said = found.get("error-message") or done.stderr.strip() or done.stdout.strip()
            raise DeploymentError(f"flwr {arguments[0]}: {line(str(said))}")
        return found

    def logged(self, run: str) -> str:
        """The log of a run's ServerApp."""
        return self.run_flwr("log", run, CONNECTION, "--show").stdout

    def run_flwr(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run Flower's own command, which finds this deployment in its configuration."""
        return subprocess.run(
            [program("flwr"), *arguments],
            env={**os.environ, **self.environment()},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def environment(self) -> dict[str, str]:
        """The environment of all processes: no telemetry, no look-ups elsewhere."""
        return {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "FLWR_HOME": str(self.folder / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
        }

    def server_keys(self) -> list[str | Path]:
        """Arguments for the certificate of a process that others connect to."""
        keys = self.keys
        return [
            *("--ssl-certfile", keys.certificate, "--ssl-keyfile", keys.key),
            *("--ssl-ca-certfile", keys.root),
        ]

    def start_flower(self, name: str, command: str, *arguments: str | int | Path) -> None:
        """Start one of Flower's programs, with a log named after it.

        Its ports answer this user's processes alone, on Linux.
        """
        guard = [sys.executable, "-P", "-m", own_user.__name__] if own_user.TABLE.exists() else []
        words = [*guard, command if guard else program(command), *map(str, arguments)]
        self.start(name, words, self.environment(), self.folder / f"{name}.log")

    def kill(self, name: str) -> None:
        """End a process as a power failure would."""
        self.end(name, how=signal.SIGKILL)


def config_text(config: Mapping[str, str | int | float | bool]) -> str:
    """A configuration in the form of Flower's commands."""
    return " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())


def program(name: str) -> str:
    """The path of a program that was installed with this Python."""
    return str(Path(sys.executable).with_name(name))


def write_app(
    folder: Path, server: str, client: str, config: Mapping[str, UserConfigValue]
) -> None:
    """Make a folder that `flwr run` takes as an app.

    Args:
        folder: new, or with modules of the app in it.
        server, client: of the ServerApp and the ClientApp, as "module:name".
        config: keys that `--run-config` may set, and their defaults.
    """
    app = {
        "publisher": "sluiceway",
        "components": {"serverapp": server, "clientapp": client},
        "config": dict(config),
    }
    project = {
        "name": "sluiceway-app",
        "version": "1.0.0",
        "description": "Federated training with Sluiceway",
        "license": "Apache-2.0",
        "dependencies": [],
    }
    folder.mkdir(exist_ok=True)
    tables = {"project": project, "tool": {"flwr": {"app": app}}}
    (folder / "pyproject.toml").write_text(tomli_w.dumps(tables), encoding="utf-8")
