"""Startup kits: who gets what, and what they allow."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("nvflare", reason="the extra nvflare is not installed")

from sluiceway.cli import main
from sluiceway.deploy.nvflare.kits import CLASSES, localise, provision, read_kit
from sluiceway.deploy.nvflare.names import require_name
from sluiceway.deploy.nvflare.start import command_of, environment_of, lock
from sluiceway.errors import InputError

ADMIN = "admin@sluiceway.local"


def test_later_sites_get_kits_of_the_same_root(tmp_path: Path) -> None:
    first = provision(tmp_path, "localhost", 8002, ["north"], ADMIN)
    again = provision(tmp_path, "localhost", 8002, ["north", "south"], ADMIN)
    assert [kit.role for kit in again] == ["server", "admin", "site", "site"]
    assert len({kit.keys.root.read_bytes() for kit in (*first, *again)}) == 1
    assert len({kit.keys.certificate.read_bytes() for kit in again}) == 4
    assert {kit.address for kit in again} == {("localhost", 8002)}
    assert again[2].keys.key.read_bytes() == first[2].keys.key.read_bytes()


def test_a_kit_allows_our_classes_and_no_code(tmp_path: Path) -> None:
    for kit in provision(tmp_path, "localhost", 8002, ["north"], ADMIN):
        if kit.role == "admin":
            continue
        resources = json.loads((kit.folder / "local" / "resources.json").read_text())
        assert resources["class_list_enforcement_mode"] == "enforce"
        assert resources["class_allow_list"] == list(CLASSES)
        rights = json.loads((kit.folder / "local" / "authorization.json").read_text())
        assert list(rights["permissions"]) == ["project_admin"]
        assert rights["permissions"]["project_admin"]["byoc"] == "none"


def test_the_authority_keeps_no_key_but_the_root(tmp_path: Path) -> None:
    kits = provision(tmp_path, "localhost", 8002, ["north"], ADMIN)
    own = [kit.keys.key.read_text().strip() for kit in kits]
    kept = [path for path in (tmp_path / "authority").rglob("*") if path.is_file()]
    texts = [path.read_text(errors="replace").replace("\\n", "\n") for path in kept]
    assert not any(key in text for key in own for text in texts)
    assert sum(text.count("PRIVATE KEY-----") for text in texts) == 2  # begin and end of one


def test_a_kit_runs_once_at_a_time(tmp_path: Path) -> None:
    site = provision(tmp_path, "localhost", 8002, ["north"], ADMIN)[2]
    held = lock(site)
    with pytest.raises(InputError, match="is started already"):
        lock(site)
    os.close(held)
    os.close(lock(site))


@pytest.mark.parametrize("name", ["../other", "/etc", "a/b", ".", "..", "", "a\nb", "x" * 300])
def test_names_that_are_no_folders_of_runs(name: str) -> None:
    with pytest.raises(InputError, match="cannot be the name of a run"):
        require_name(name)
    assert require_name("agnews method.name=fedavg-1") == "agnews method.name=fedavg-1"


def test_a_server_keeps_its_jobs_wherever_its_kit_is(tmp_path: Path) -> None:
    server = provision(tmp_path / "kits", "localhost", 8002, ["north"], ADMIN)[0]
    moved = tmp_path / "moved"
    server.folder.rename(moved)
    localise(read_kit(moved))
    text = (moved / "local" / "resources.json").read_text()
    assert str(moved / "jobs") in text
    assert str(moved / "snapshots") in text
    assert str(tmp_path / "kits") not in text


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server, admin, site = provision(tmp_path, "localhost", 8002, ["north"], ADMIN)
    with pytest.raises(InputError, match="needs its site file"):
        environment_of(site)
    with pytest.raises(InputError, match="give ADDRESS:PORT"):
        environment_of(server, endpoint="8003")
    with pytest.raises(InputError, match="it submits"):
        command_of(admin)
    for arguments in (
        ["start", str(tmp_path / "none")],
        ["start", str(site.folder), "--site", str(tmp_path / "none.toml")],
        ["submit", "quickstart", "--kit", str(server.folder)],
        ["provision", "--server", "local host", "--site", "a", "--out", str(tmp_path / "other")],
    ):
        assert main(["deploy", "nvflare", *arguments]) == 2
        assert capsys.readouterr().err.count("\n") == 1


@pytest.fixture
def silent(tmp_path: Path) -> Iterator[Path]:
    """An admin's kit of a server that accepts connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        made = provision(tmp_path, "localhost", server.getsockname()[1], ["north"], ADMIN)
        yield made[1].folder


def submitting(kit: Path, *more: str) -> subprocess.Popen[str]:
    command = ["deploy", "nvflare", "submit", "quickstart", "--kit", str(kit), *more]
    return subprocess.Popen(
        [sys.executable, "-m", "sluiceway", *command],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


@pytest.mark.slow
def test_submitting_to_who_says_nothing_ends_in_time(silent: Path) -> None:
    process = submitting(silent, "--wait", "1")
    # To wait is a second, and a try takes 5; the rest is for starting on a busy machine.
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert said.strip().count("\n") == 0
    assert "no session with the server" in said


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [1.0, 5.0])
def test_ctrl_c_just_after_submit_is_one_line(silent: Path, seconds: float) -> None:
    process = submitting(silent, "--wait", "100")
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    # A shell says 130 for both: where C code that is importing meets the signal, Python ends by it.
    assert process.returncode in (130, -signal.SIGINT)
    assert "Traceback" not in said
    assert said.strip().splitlines()[-1].startswith("sluiceway: stopped")
