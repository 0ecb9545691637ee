"""Runs that are killed, stopped, started twice, or left without room on the disk."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from benchmarks.resume import KEYS, command, state
from filelock import FileLock

from sluiceway.__main__ import was_interrupted
from sluiceway.cli import main
from sluiceway.core.signals import Stopped, check_stop, graceful_stop

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Ctrl-C is heard, here and in child processes, even if the tests run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(params=["federated", "split"])
def run(request: pytest.FixtureRequest) -> list[str]:
    """Arguments of `sluiceway run` but for the folder."""
    if request.param == "federated":
        recipe = request.getfixturevalue("recipe")
        return [str(recipe), "--set", "run.rounds=40", "--set", "run.workers=2"]
    pytest.importorskip("sklearn")
    recipe = request.getfixturevalue("split_recipe")
    return [str(recipe), "--set", "run.rounds=40", "--set", "method.name=acp-sl"]


@pytest.fixture(scope="module")
def wholes() -> dict[str, Path]:
    """Folders of runs that nothing happened to, by their kind."""
    return {}


@pytest.fixture
def whole(
    request: pytest.FixtureRequest,
    run: list[str],
    wholes: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The folder of `run` if nothing happens to it."""
    kind: str = request.node.callspec.params["run"]
    if kind not in wholes:
        wholes[kind] = tmp_path_factory.mktemp("whole") / kind
        assert main(["run", *run, "--out", str(wholes[kind])]) == 0
    return wholes[kind]


def start(arguments: Sequence[str], **how: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "sluiceway", "run", *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **how)  # type: ignore[call-overload]


def last_line(process: subprocess.Popen[str], code: int) -> str:
    """The last line that a process says, once it has ended with that exit code."""
    assert process.stderr is not None
    said = process.stderr.read().strip().splitlines()
    assert process.wait(timeout=60) == code
    return said[-1]


def wait_for(process: subprocess.Popen[str], said: str) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith(said):
            return
    raise AssertionError(f"it never said {said!r}")


def require_same(one: Path, other: Path) -> None:
    first, second = (json.loads((f / "summary.json").read_text()) for f in (one, other))
    for key in KEYS:
        assert first[key] == second[key], key
    lines = [
        [json.loads(line) | {"seconds": 0} for line in (f / "metrics.jsonl").open()]
        for f in (one, other)
    ]
    assert lines[0] == lines[1]


def saved_rounds(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").glob("round-*"))


def test_killed_and_resumed_is_the_whole_run_bit_for_bit(
    run: list[str], whole: Path, tmp_path: Path
) -> None:
    """Its process alone is killed, and then all of them at once, as when a machine stops."""
    out = tmp_path / "killed"
    for kill in (os.kill, os.killpg):
        before = saved_rounds(out)
        process = subprocess.Popen(
            command(run, out), stderr=subprocess.DEVNULL, start_new_session=True
        )
        while saved_rounds(out) == before:
            assert process.poll() is None
            time.sleep(0.02)
        kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not (out / "summary.json").exists()
    assert main(["run", *run, "--out", str(out), "--resume"]) == 0
    assert state(out) == state(whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_between_steps_and_saves(
    run: list[str], whole: Path, number: signal.Signals, tmp_path: Path
) -> None:
    part = ["--out", str(tmp_path / "part")]
    seldom = ["--set", "run.checkpoint_every=100"]
    # A group of its own, and the signal to all of it, as from a terminal or a scheduler.
    process = start([*run, *part, *seldom], start_new_session=True)
    wait_for(process, "round 1:")
    os.killpg(process.pid, number)
    assert process.stderr is not None
    said = process.stderr.read()
    assert process.wait(timeout=60) == 130
    assert "Traceback" not in said
    assert "stopping after this step" in said
    assert f"sluiceway: stopped; continue with --out {tmp_path / 'part'} --resume" in said
    assert list((tmp_path / "part" / "checkpoints").glob("round-*"))
    assert not (tmp_path / "part" / "summary.json").exists()
    assert main(["run", *run, *part, "--resume"]) == 0
    require_same(whole, tmp_path / "part")


def test_the_second_signal_stops_at_once() -> None:
    with graceful_stop():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped):
            check_stop()
        with pytest.raises(KeyboardInterrupt) as caught:
            os.kill(os.getpid(), signal.SIGINT)
        assert not isinstance(caught.value, Stopped)
    check_stop()  # what was asked of that run is not asked of the next


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    before = signal.getsignal(signal.SIGINT)
    done: list[bool] = []

    def inside() -> None:
        with graceful_stop():
            check_stop()
            done.append(True)

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert done == [True]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_finished_run_is_let_go_and_continued_by_more_rounds_only(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run = ["run", str(recipe), "--out", str(out)]
    assert main(run) == 0
    FileLock(out / ".lock").acquire(timeout=0).lock.release()
    metrics = out / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-20])  # as if the last line had been cut short
    assert main([*run, "--resume", "--set", "run.rounds=5", "--set", "run.workers=2"]) == 0
    assert json.loads((out / "summary.json").read_text())["rounds"] == 5
    assert [json.loads(line)["round"] for line in metrics.open()] == [1, 2, 3, 4, 5]
    assert main([*run, "--resume"]) == 2
    assert "holds a run of 5 rounds; run.rounds = 3 is less" in capsys.readouterr().err


# -- no room on the disk ---------------------------------------------------------------------------


def small_files(size: int) -> Callable[[], None]:
    """No file of the process may become longer, as on a disk that is full."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


def test_no_room_for_a_checkpoint(run: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = [*run, "--set", "run.rounds=5"]
    if "run.workers=2" in run:  # its state is longer than its messages, which need room as well
        run = [*run, "--set", "method.name=fedadam"]
    assert main(["run", *run, "--set", "run.rounds=2", "--out", str(out)]) == 0
    saved = max((out / "checkpoints").glob("round-*"))
    largest = max(path.stat().st_size for path in saved.rglob("*.safetensors"))
    process = start([*run, "--out", str(out), "--resume"], preexec_fn=small_files(largest - 1000))
    said = last_line(process, 1)
    assert said.startswith("sluiceway: cannot save round 3 to")
    assert "File too large" in said
    assert "round-00002 is intact, --resume continues from it" in said
    assert not list((out / "checkpoints").glob(".*"))
    assert main(["run", *run, "--out", str(out), "--resume"]) == 0
    assert main(["run", *run, "--out", str(tmp_path / "whole")]) == 0
    two = [json.loads((f / "summary.json").read_text()) for f in (out, tmp_path / "whole")]
    assert two[0]["accuracy_by_round"] == two[1]["accuracy_by_round"]


def test_no_room_for_messages(recipe: Path, tmp_path: Path) -> None:
    more = ["--set", "run.workers=2"]  # whose messages are files
    process = start(
        [str(recipe), "--out", str(tmp_path / "out"), *more], preexec_fn=small_files(5000)
    )
    said = last_line(process, 1)
    assert said.startswith("sluiceway: cannot write a message to")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_no_room_for_metrics(
    run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run = [*run, "--set", "run.rounds=4"]
    out.mkdir()
    (out / "metrics.jsonl").symlink_to("/dev/full")
    assert main(["run", *run, "--out", str(out)]) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("sluiceway: cannot write to")
    assert "No space left on device" in said
    assert list((out / "checkpoints").glob("round-*"))
    (out / "metrics.jsonl").unlink()
    assert main(["run", *run, "--out", str(out), "--resume"]) == 0
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 4


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(recipe: Path, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    assert main(["run", str(recipe), "--out", str(locked / "out")]) == 1


def test_a_file_is_no_folder(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text("")
    assert main(["run", str(recipe), "--out", str(tmp_path / "out")]) == 2
    assert "is not a folder" in capsys.readouterr().err


@pytest.mark.parametrize("every", [1, 100])
def test_a_folder_has_one_run_and_does_not_come_back_if_it_is_deleted_meanwhile(
    run: list[str], every: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run = [*run, "--set", f"run.checkpoint_every={every}", "--set", "run.rounds=4000"]
    process = start([*run, "--out", str(out)])
    wait_for(process, "round 1:")
    for flag in ("--resume", "--force"):
        assert main(["run", *run, "--out", str(out), flag]) == 2
        assert f"another run is writing to {out}" in capsys.readouterr().err
    os.rename(out, tmp_path / "elsewhere")
    said = last_line(process, 1)
    assert said.startswith("sluiceway: ")
    assert "was deleted while the run went on" in said
    assert not out.exists()


# -- whatever the clock and the language -----------------------------------------------------------


def test_locale_and_clock_change_nothing(run: list[str], tmp_path: Path) -> None:
    recipe = Path(run[0])
    recipe.write_text('description = "Zürich ✓"\n' + recipe.read_text(), encoding="utf-8")
    settings = [*run, "--set", "run.rounds=2", "--out"]
    here, there = tmp_path / "here-über", tmp_path / "there-über"
    assert main(["run", *settings, str(here)]) == 0
    # Of another locale than C a program has its encoding alone, and that is UTF-8 here.
    surroundings = {"LC_ALL": "C", "TZ": "Pacific/Kiritimati", "PYTHONUTF8": "0"}
    last_line(start([*settings, str(there)], env=os.environ | surroundings), 0)
    found = [
        json.loads((out / "summary.json").read_text(encoding="utf-8")) for out in (here, there)
    ]
    for key in KEYS:
        assert found[0][key] == found[1][key]
    assert [one["recipe"]["description"] for one in found] == ["Zürich ✓"] * 2


def test_time_is_taken_from_a_clock_that_nobody_sets(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = iter(range(10**6, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: float(next(ticks)))
    assert main(["run", str(recipe), "--out", str(tmp_path / "out")]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert 0 < summary["seconds"] < 600


def test_what_importing_makes_of_ctrl_c_is_known_for_it() -> None:
    def imported() -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise RuntimeError("Error calling __set_name__")  # noqa: B904

    with pytest.raises(RuntimeError) as caught:
        imported()
    assert was_interrupted(caught.value)
    assert not was_interrupted(RuntimeError("of itself"))
