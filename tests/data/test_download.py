"""Wheels from a package index in a folder, and the hub played by a server of our own.

huggingface_hub reads its settings on import, so each case of the hub runs in its own process.
"""

import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import venv
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tests.data.helpers import write_parquet

from sluiceway.data import DataError, cache_folder, download, wheel_folder, wheel_members
from sluiceway.files import scratch_folder

WheelBuilder = Callable[[str, str, Mapping[str, str | bytes]], Path]
MEMBERS = {"pkg/a.txt": "A", "pkg/model/b.txt": "B", "pkg/model/deep/c.txt": "C"}


def test_members_are_downloaded_once_and_kept(build_wheel: WheelBuilder) -> None:
    wheel = build_wheel("some-pkg", "1.0", MEMBERS)
    first, second = wheel_members("some-pkg", "1.0", ["pkg/a.txt", "pkg/model/b.txt"])
    assert (first.read_text(), second.read_text()) == ("A", "B")
    assert first.is_relative_to(cache_folder() / "wheels" / "some-pkg-1.0")
    wheel.unlink()
    assert wheel_members("some-pkg", "1.0", ["pkg/a.txt"]) == [first]
    kept = [path for path in cache_folder().rglob("*") if path.is_file()]
    assert sorted(kept) == sorted([first, second])


@pytest.mark.slow
def test_a_folder_is_whole_even_after_one_of_its_members(build_wheel: WheelBuilder) -> None:
    build_wheel("some-pkg", "1.0", MEMBERS)
    wheel_members("some-pkg", "1.0", ["pkg/model/deep/c.txt"])
    wheel_folder("some-pkg", "1.0", "pkg/model/deep")
    folder = wheel_folder("some-pkg", "1.0", "pkg/model/")
    files = {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}
    assert files == {"b.txt": "B", "deep/c.txt": "C"}


@pytest.mark.slow
def test_several_may_ask_at_once(build_wheel: WheelBuilder) -> None:
    build_wheel("some-pkg", "1.0", MEMBERS)

    def fetch(i: int) -> Path:
        if i % 2:
            return wheel_folder("some-pkg", "1.0", "pkg")
        return wheel_members("some-pkg", "1.0", ["pkg/a.txt"])[0]

    with ThreadPoolExecutor(4) as pool:
        member, folder, *others = pool.map(fetch, range(4))
    assert others == [member, folder]
    assert (member.read_text(), (folder / "model/deep/c.txt").read_text()) == ("A", "C")
    assert not list(cache_folder().rglob("*.part"))


def test_a_run_that_starts_meanwhile_leaves_the_download_alone(
    build_wheel: WheelBuilder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_wheel("some-pkg", "1.0", MEMBERS)
    temporary = tmp_path / "temporary"
    (temporary / "sluiceway-of-a-killed-run").mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    pip_download = download._pip_download

    def download_while_a_run_starts(requirement: str, folder: Path) -> Path:
        wheel = pip_download(requirement, folder)
        assert folder.parent == temporary
        with scratch_folder():  # removes what killed runs left
            assert not (temporary / "sluiceway-of-a-killed-run").exists()
        return wheel

    monkeypatch.setattr(download, "_pip_download", download_while_a_run_starts)
    (path,) = wheel_members("some-pkg", "1.0", ["pkg/a.txt"])
    assert path.read_text() == "A"


def test_an_installed_package_is_used_at_its_version_only(bare_machine: Path) -> None:
    version = importlib.metadata.version("pytest")
    (path,) = wheel_members("pytest", version, ["pytest/__init__.py"])
    assert path.samefile(pytest.__file__)
    assert wheel_folder("pytest", version, "pytest").samefile(Path(pytest.__file__).parent)
    assert not cache_folder().exists()
    line = r"pip download pytest==0\.0\.1 failed: ERROR: No matching"
    with pytest.raises(DataError, match=line) as caught:
        wheel_members("pytest", "0.0.1", ["pytest/__init__.py"])
    assert "\n" not in str(caught.value)


def test_what_the_wheel_lacks(build_wheel: WheelBuilder) -> None:
    build_wheel("some-pkg", "1.0", MEMBERS)
    with pytest.raises(DataError, match=r"some_pkg-1\.0-py3-none-any\.whl holds no pkg/z\.txt"):
        wheel_members("some-pkg", "1.0", ["pkg/z.txt"])
    with pytest.raises(DataError, match="holds no nothing"):
        wheel_folder("some-pkg", "1.0", "nothing")


def test_pip_is_missing_or_slow(
    bare_machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(download, "PIP_SECONDS", 0.01)
        with pytest.raises(DataError, match=r"pip download some-pkg==1\.0 took over 0\.01 s"):
            wheel_members("some-pkg", "1.0", ["a"])
    venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
    for python, line in {
        tmp_path / "bare" / "bin" / "python": r"failed: .*No module named pip",
        tmp_path / "no-python": "pip cannot be started",
    }.items():
        monkeypatch.setattr(sys, "executable", str(python))
        with pytest.raises(DataError, match=line):
            wheel_members("some-pkg", "1.0", ["a"])


def test_a_wheel_cannot_write_outside_its_folder(tmp_path: Path, build_wheel: WheelBuilder) -> None:
    build_wheel("evil-pkg", "1.0", {"pkg/model/../../../../../out.txt": "!", "pkg/model/a": "A"})
    with pytest.raises(DataError, match=r"no path inside a wheel"):
        wheel_folder("evil-pkg", "1.0", "pkg/model")
    assert not list(tmp_path.rglob("out.txt"))


@pytest.mark.parametrize("member", ["../a", "/etc/passwd", "a/../../b", "a\\..\\b", "C:/a", ""])
def test_paths_that_lead_out_are_refused(bare_machine: Path, member: str) -> None:
    with pytest.raises(DataError, match="no path inside a wheel"):
        wheel_members("some-pkg", "1.0", [member])


def test_a_cache_that_cannot_be_written(
    tmp_path: Path, build_wheel: WheelBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_wheel("some-pkg", "1.0", MEMBERS)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SLUICEWAY_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match="set SLUICEWAY_CACHE to a folder that can be written"):
        wheel_members("some-pkg", "1.0", ["pkg/a.txt"])


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SLUICEWAY_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "sluiceway"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "sluiceway"
    monkeypatch.setenv("SLUICEWAY_CACHE", "~/own")
    assert cache_folder() == tmp_path / "own"


def test_what_pip_says_of_a_failure_of_its_own() -> None:
    trace = "WARNING: slow\nERROR: Exception:\nTraceback (most recent call last):\n  x\nOSError: no"
    assert download._last_error(trace) == "OSError: no"
    assert download._last_error("ERROR: none\nhint\n") == "ERROR: none"
    assert download._last_error("") == "it said nothing"


SHOW = """
import json, sys
from dataclasses import replace
from sluiceway.data import DataError, load_text
from sluiceway.data.text import TEXT_SETS
name, url = sys.argv[1:]
if url:
    known = TEXT_SETS[name]
    TEXT_SETS[name] = replace(known, groups=(known.groups[0], url))
try:
    data = load_text(name)
except DataError as error:
    print(json.dumps({"error": str(error)}))
else:
    print(json.dumps({
        "source": data.source, "names": data.label_names,
        "groups": {name: column.tolist() for name, column in data.train.groups.items()},
        "train": list(zip(data.train.texts, data.train.labels.tolist())),
        "test": list(zip(data.test.texts, data.test.labels.tolist())),
    }))
"""


class Hub(BaseHTTPRequestHandler):
    """Speaks as much of the hub as it takes."""

    files: Mapping[str, bytes] = {}

    def do_GET(self) -> None:
        content = self.files.get(self.path, b"")
        self.send_response(200 if self.path in self.files else 404)
        self.send_header("X-Repo-Commit", "0123456789abcdef0123456789abcdef01234567")
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    names = ["transfer", "oos", "balance"]
    clinc, news = "/datasets/clinc/clinc_oos/resolve/main/plus", "/datasets/SetFit/20_newsgroups"
    columns = {"text": ["send it", "what?", "how much"], "intent": [0, 1, 2]}
    train = write_parquet(tmp_path / "train.parquet", columns, names, "intent").read_bytes()
    columns = {"text": ["eh", "show me"], "intent": [1, 2]}
    test = write_parquet(tmp_path / "test.parquet", columns, names, "intent").read_bytes()
    rows = [("a pill", "sci.med"), ("", "sci.med"), ("no", "alt.x")]
    lines = [json.dumps({"text": text, "label_text": name}).encode() for text, name in rows]
    Hub.files = {
        f"{clinc}/train-00000-of-00001.parquet": train,
        f"{clinc}/test-00000-of-00001.parquet": test,
        "/domains.json": json.dumps({"banking": ["transfer"], "travel": ["balance"]}).encode(),
        "/broken.json": b"[1]",
        "/partial.json": b'{"banking": ["transfer"]}',
        f"{news}/resolve/main/train.jsonl": b"\n".join(lines),
        f"{news}/resolve/main/test.jsonl": lines[0],
    }
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def show(bare_machine: Path, tmp_path: Path) -> Callable[..., dict[str, object]]:
    """`load_text` in a fresh process: what it loaded or said; nothing else may come on stderr."""

    def load(name: str, endpoint: str, groups: str = "", offline: str = "0") -> dict[str, object]:
        environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": offline}
        environment |= {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HOME": str(tmp_path)}
        environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1"}
        command = [sys.executable, "-c", SHOW, name, groups]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert (done.returncode, done.stderr) == (0, "")
        said: dict[str, object] = json.loads(done.stdout)
        return said

    return load


@pytest.mark.slow
def test_from_the_hub_then_from_its_cache(show: Callable, hub: str) -> None:
    fetched = show("clinc150", hub, f"{hub}/domains.json")
    assert fetched == {
        "source": "hub clinc/clinc_oos",
        "names": ["transfer", "balance"],
        "groups": {"domain": [0, 1]},
        "train": [["send it", 0], ["how much", 1]],
        "test": [["show me", 1]],
    }
    assert show("clinc150", hub, f"{hub}/domains.json", offline="1") == fetched


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("nosuch.json", "HTTP Error 404"),
        ("broken.json", "it must be an object"),
        ("partial.json", "no group has the label 'balance'"),
    ],
)
def test_without_the_groups_the_rest_is_loaded(
    show: Callable, hub: str, path: str, why: str
) -> None:
    data = show("clinc150", hub, f"{hub}/{path}")
    assert data["groups"] == {}
    assert f"without domain: {why}" in str(data["source"])
    assert data["train"] == [["send it", 0], ["how much", 1]]


@pytest.mark.slow
def test_rows_without_text_are_counted_in_the_source(show: Callable, hub: str) -> None:
    data = show("20newsgroups", hub)
    assert data["source"] == "hub SetFit/20_newsgroups (1 rows without text left out)"
    assert data["names"] == ["alt.x", "sci.med"]
    assert data["train"] == [["a pill", 1], ["no", 0]]


@pytest.mark.slow
def test_a_hub_that_refuses_or_does_not_answer(show: Callable, hub: str) -> None:
    said = str(show("agnews", hub)["error"])
    assert "the hub (fancyzhx/ag_news: Client error '404 Not Found'" in said
    assert "\n" not in said
    start = time.monotonic()
    said = str(show("agnews", "http://127.0.0.1:9")["error"])
    assert "the hub (http://127.0.0.1:9 does not answer)" in said
    assert time.monotonic() - start < 20
