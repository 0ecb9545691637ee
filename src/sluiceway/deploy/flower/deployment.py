"""A SuperLink and SuperNodes as processes on this machine, over TLS, every node with its key."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

import tomli_w
from flwr.app.user_config import UserConfigValue

from sluiceway.deploy.flower.certificates import (
    Certificates,
    new_certificates,
    new_node_key,
    secret,
)
from sluiceway.errors import line

#: Seconds in which a SuperLink must be there, and processes must have ended.
START, END = 60.0, 10.0
HERE: Final = "127.0.0.1"
#: Names of processes; the others are SuperNodes, by the names of their keys.
SUPERLINK: Final = "superlink"
SUPEREXEC: Final = "superexec"
#: The name of the SuperLink in Flower's own configuration.
LINK: Final = "trial"


class DeploymentError(Exception):
    """A part of the deployment cannot be started or failed; one line."""


@dataclass
class Deployment:
    """Processes of one Flower deployment; leaving the context ends all of them.

    Each is the first of a process group of its own, so that its helpers end with it.

    Attributes:
        folder: for keys, certificates, the database and logs; private to this user.
        port: of the SuperLink, for everything; chosen by the system.
        fleet: address that SuperNodes dial; the SuperLink's own unless a relay is between.
        processes: by name, "superlink", "superexec", and those of the SuperNodes.
        configs: what each SuperNode was told at last.
        environment: beside that of this process.
    """

    folder: Path
    fleet: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    port: int = field(default_factory=lambda: free_port())
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    configs: dict[str, Mapping[str, str | int | float]] = field(default_factory=dict)

    def __enter__(self) -> Self:
        (self.folder / "flwr").mkdir(parents=True, exist_ok=True)
        self.certificates: Certificates = new_certificates(self.folder)
        secret(self.folder / "executor.secret", secrets.token_hex(32).encode())
        connection = {
            "address": self.address,
            "root-certificates": str(self.certificates.authority),
        }
        config = {"superlink": {"default": LINK, LINK: connection}}
        (self.folder / "flwr" / "config.toml").write_text(tomli_w.dumps(config))
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(*reversed(self.processes))

    @property
    def address(self) -> str:
        return f"{HERE}:{self.port}"

    def start_link(self) -> None:
        """Start the SuperLink with its database, and wait until it answers.

        Raises:
            DeploymentError: it does not.
        """
        paths = self.certificates
        self.start(
            SUPERLINK,
            "flower-superlink",
            *("--host", HERE, "--port", str(self.port)),
            *("--ssl-certfile", paths.certificate, "--ssl-keyfile", paths.key),
            *("--ssl-ca-certfile", paths.authority),
            *("--database", self.folder / "superlink.sqlite", "--isolation", "process"),
            *("--superexec-auth-secret-file", self.folder / "executor.secret"),
            "--enable-supernode-auth",
        )
        self.wait_for_port(SUPERLINK, self.port)

    def start_executor(self) -> None:
        """Start what starts the ServerApp; apart from the SuperLink, so as to outlive it."""
        self.start(
            SUPEREXEC,
            "flower-superexec",
            *("--runtime-api-address", self.address),
            *("--root-certificates", self.certificates.authority),
            *("--superexec-auth-secret-file", self.folder / "executor.secret"),
        )

    def register(self, *names: str) -> None:
        """Make nodes' keys, and tell the SuperLink their public halves under those names.

        Raises:
            DeploymentError: the SuperLink does not take one.
        """

        def one(name: str) -> None:
            _, public = new_node_key(self.folder, name)
            self.flwr("supernode", "register", str(public), LINK, "--name", name)

        # Flower's command takes a second for each, nearly all of it to begin.
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(one, names))

    def start_node(
        self, name: str, config: Mapping[str, str | int | float], key: Path | None = None
    ) -> None:
        """Start a SuperNode.

        Args:
            name: that its key was registered by.
            config: what its ClientApp is told.
            key: another private key than that of the name.
        """
        port = free_port()
        self.configs[name] = config
        told = " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())
        paths = self.certificates
        self.start(
            name,
            "flower-supernode",
            *("--superlink", self.fleet or self.address, "--root-certificates", paths.authority),
            *("--auth-supernode-private-key", key or self.folder / name),
            *("--host", HERE, "--port", str(port), "--node-config", told),
            *("--ssl-certfile", paths.certificate, "--ssl-keyfile", paths.key),
            *("--ssl-ca-certfile", paths.authority),
        )

    def run(self, app: Path, config: Mapping[str, str | int | float | bool]) -> str:
        """Start a run of an app folder with these values of its configuration; its id."""
        told = " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())
        found = self.flwr("run", str(app), LINK, "--run-config", told)
        return str(found["run-id"])

    def status(self, run: str) -> tuple[str, str]:
        """Status of a run, such as "running" or "finished:completed", and details of it."""
        for found in self.flwr("list", LINK, "--run-id", run)["runs"]:
            return found["status"], str(found.get("details", ""))
        raise DeploymentError(f"the SuperLink knows no run {run}")

    def flwr(self, *arguments: str) -> dict[str, Any]:
        """Run Flower's own command; what it says as JSON. Raises DeploymentError."""
        done = self.ask_flwr(*arguments, "--format", "json")
        try:
            found: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
        except ValueError:
            found = {}
        if done.returncode or not found.get("success", True) or not found:
            said = found.get("error-message") or done.stderr.strip() or done.stdout.strip()
            raise DeploymentError(f"flwr {arguments[0]}: {line(str(said))}")
        return found

    def logged(self, run: str) -> str:
        """What the ServerApp of a run has printed."""
        return self.ask_flwr("log", run, LINK, "--show").stdout

    def ask_flwr(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run Flower's own command, which knows this deployment from its configuration."""
        return subprocess.run(
            [command("flwr"), *arguments],
            env=self.variables(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def variables(self) -> dict[str, str]:
        """The environment of all processes: nothing is reported or looked up elsewhere."""
        return {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "FLWR_HOME": str(self.folder / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
            **self.environment,
        }

    def start(self, name: str, program: str, *arguments: str | Path) -> None:
        """Start a process in a group of its own, with a log named after it.

        On Linux it ends, at the latest, with the thread that calls this.
        """
        with self.log(name).open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [command(program), *map(str, arguments)],
                env=self.variables(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=end_with_parent if sys.platform == "linux" else None,
            )

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def kill(self, name: str) -> None:
        """End a process and its helpers as a power cut would."""
        end(self.processes.pop(name), signal.SIGKILL)

    def stop(self, *names: str) -> None:
        """End processes and their helpers, at first by asking."""
        gone = [self.processes.pop(name) for name in names]
        for process in gone:
            end(process, signal.SIGTERM)
        deadline = time.monotonic() + END
        for process in gone:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            end(process, signal.SIGKILL)
            process.wait()

    def ended(self) -> str | None:
        """The name of a process that ended by itself, if there is one."""
        return next((n for n, p in self.processes.items() if p.poll() is not None), None)

    def last_words(self, name: str) -> str:
        """The last line of a log, for a message."""
        said = self.log(name).read_text(errors="replace").strip().splitlines()
        return line(said[-1]) if said else "it said nothing"

    def wait_for_port(self, name: str, port: int) -> None:
        """Wait until somebody listens. Raises DeploymentError."""
        deadline = time.monotonic() + START
        while time.monotonic() < deadline:
            if self.processes[name].poll() is not None:
                break
            with contextlib.suppress(OSError), socket.create_connection((HERE, port), 1):
                return
            time.sleep(0.1)
        raise DeploymentError(f"{name} did not start: {self.last_words(name)}")


def write_app(
    folder: Path, server: str, client: str, config: Mapping[str, UserConfigValue]
) -> None:
    """Make a folder that `flwr run` takes as an app.

    Args:
        folder: new, or with modules of the app in it.
        server, client: where the ServerApp and the ClientApp are, as "module:name".
        config: what `--run-config` may set, and what is meant without it.
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


def try_app(app: Path, nodes: Sequence[Mapping[str, str | int | float]], folder: Path) -> str:
    """Run an app on this machine, on a SuperLink of its own; what it logged.

    Args:
        app: its folder.
        nodes: the configuration of each SuperNode.
        folder: for keys, certificates and logs; still there at the end.

    Raises:
        DeploymentError: the app did not run to its end.
    """
    with Deployment(folder) as flower:
        flower.start_link()
        flower.start_executor()
        names = [f"node-{number}" for number in range(len(nodes))]
        flower.register(*names)
        for name, config in zip(names, nodes, strict=True):
            flower.start_node(name, config)
        run = flower.run(app, {})
        while not (status := flower.status(run))[0].startswith("finished"):
            time.sleep(1)
        if status[0] != "finished:completed":
            raise DeploymentError(line(f"{status[0]}: {status[1]}"))
        return flower.logged(run)


def end_with_parent() -> None:
    """Have the kernel kill this process when the one that started it is gone, however it went."""
    ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # 1: PR_SET_PDEATHSIG


def end(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Send a signal to a process's group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def command(name: str) -> str:
    """A program that was installed with this Python."""
    return str(Path(sys.executable).with_name(name))


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind((HERE, 0))
        return int(listener.getsockname()[1])
