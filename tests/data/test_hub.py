"""The hub and its cache, against a server of our own that speaks as much of the hub as it takes.

huggingface_hub reads its settings on import, so each case runs in a process of its own.
"""

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHOW = """
import json, sys
from sluiceway.data import DataError, load_text
if len(sys.argv) > 2:
    from dataclasses import replace
    from sluiceway.data.text import TEXT_SETS
    known = TEXT_SETS[sys.argv[1]]
    TEXT_SETS[sys.argv[1]] = replace(known, groups=(known.groups[0], sys.argv[2]))
try:
    data = load_text(sys.argv[1])
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


def parquet(texts: list[str], intents: list[int], names: list[str]) -> bytes:
    table = pa.table({"text": texts, "intent": intents})
    features = {"intent": {"names": names, "_type": "ClassLabel"}}
    metadata = json.dumps({"info": {"features": features}})
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({"huggingface": metadata}), buffer)
    return buffer.getvalue()


def jsonl(*rows: tuple[str, int, str]) -> bytes:
    keys = ("text", "label", "label_text")
    return "\n".join(json.dumps(dict(zip(keys, row, strict=True))) for row in rows).encode()


DOMAINS = {"banking": ["transfer"], "travel": ["balance", "other"]}
INTENTS = ["transfer", "oos", "balance"]
FILES = {
    "/datasets/clinc/clinc_oos/resolve/main/plus/train-00000-of-00001.parquet": parquet(
        ["send it", "what?", "how much"], [0, 1, 2], INTENTS
    ),
    "/datasets/clinc/clinc_oos/resolve/main/plus/test-00000-of-00001.parquet": parquet(
        ["eh", "show me"], [1, 2], INTENTS
    ),
    "/data/domains.json": json.dumps(DOMAINS).encode(),
    "/data/broken.json": b"[1]",
    "/datasets/SetFit/20_newsgroups/resolve/main/train.jsonl": jsonl(
        ("a pill", 1, "sci.med"), ("", 1, "sci.med"), ("no", 0, "alt.x")
    ),
    "/datasets/SetFit/20_newsgroups/resolve/main/test.jsonl": jsonl(("a cure", 1, "sci.med")),
}


class Hub(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        content = FILES.get(self.path, b"")
        self.send_response(200 if self.path in FILES else 404)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def show(name: str, endpoint: str, *groups: str, **settings: str) -> tuple[dict[str, object], str]:
    """`load_text` in a fresh process: what it loaded or said, and its stderr."""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1", **settings}
    done = subprocess.run(
        [sys.executable, "-c", SHOW, name, *groups], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def test_from_the_hub_then_from_its_cache(bare_machine: Path, tmp_path: Path, hub: str) -> None:
    cache = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HOME": str(tmp_path)}
    domains = f"{hub}/data/domains.json"
    fetched, _ = show("clinc150", hub, domains, **cache)
    assert fetched == {
        "source": "hub clinc/clinc_oos",
        "names": ["transfer", "balance"],
        "groups": {"domain": [0, 1]},
        "train": [["send it", 0], ["how much", 1]],
        "test": [["show me", 1]],
    }
    again, _ = show("clinc150", hub, domains, HF_HUB_OFFLINE="1", **cache)
    assert again == fetched


@pytest.mark.parametrize(
    ("path", "why"), [("nosuch.json", "HTTP Error 404"), ("broken.json", "must be an object")]
)
def test_without_the_groups_the_rest_is_loaded(
    bare_machine: Path, tmp_path: Path, hub: str, path: str, why: str
) -> None:
    cache = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HOME": str(tmp_path)}
    data, _ = show("clinc150", hub, f"{hub}/data/{path}", **cache)
    assert data["groups"] == {}
    assert f"without domain: {why}" in str(data["source"]).replace("it must", "must")
    assert data["train"] == [["send it", 0], ["how much", 1]]


def test_rows_without_text_are_counted_in_the_source(
    bare_machine: Path, tmp_path: Path, hub: str
) -> None:
    data, _ = show("20newsgroups", hub, HF_HUB_CACHE=str(tmp_path / "hub"), HF_HOME=str(tmp_path))
    assert data["source"] == "hub SetFit/20_newsgroups (1 rows without text left out)"
    assert data["names"] == ["alt.x", "sci.med"]
    assert data["train"] == [["a pill", 1], ["no", 0]]


def test_a_hub_that_refuses_is_a_place_looked_at(
    bare_machine: Path, tmp_path: Path, hub: str
) -> None:
    said, stderr = show("agnews", hub, HF_HUB_CACHE=str(tmp_path / "hub"), HF_HOME=str(tmp_path))
    assert "the hub (fancyzhx/ag_news: Client error '404 Not Found'" in str(said["error"])
    assert "\n" not in str(said["error"])
    assert stderr == ""


def test_a_hub_that_does_not_answer_costs_little_and_no_noise(
    bare_machine: Path, tmp_path: Path
) -> None:
    cache = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HOME": str(tmp_path)}
    start = time.monotonic()
    said, stderr = show("agnews", "http://127.0.0.1:9", **cache)
    assert "the hub (http://127.0.0.1:9 does not answer)" in str(said["error"])
    assert stderr == ""
    assert time.monotonic() - start < 20
