"""The example of secure aggregation, in this process: right sums of masked messages."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("flwr", reason="the extra [flower] is not installed")

from flwr.app import Context, Message, RecordDict
from flwr.common import bytes_to_ndarray
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key
from tests.deploy.flower.grid import Node, TestGrid


class KeptContexts(TestGrid):
    """Nodes keep their context from message to message, as SuperNodes do."""

    __test__ = False

    def reply(self, key: str) -> Message | None:
        message = self.waiting.pop(key).unpacked()
        number = message.metadata.dst_node_id
        node = self.nodes[number]
        context = contexts.setdefault(number, Context(7, number, node.config, RecordDict(), {}, 7))
        reply = node.app(message, context)
        found: Any = reply.content.config_records[RECORD_KEY_CONFIGS]
        masked.extend(map(bytes_to_ndarray, found.get(Key.MASKED_PARAMETERS, [])[1:2]))
        return self.packed(reply).unpacked()


contexts: dict[int, Context] = {}
masked: list[Any] = []


@pytest.mark.parametrize("method", ["fedavg", "usage"])
def test_sums_are_those_without_masks(
    method: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[3] / "examples")  # type: ignore[no-untyped-call]
    example = importlib.import_module("secure_sums")
    monkeypatch.setattr(example, "ROUNDS", 1)
    contexts.clear()
    masked.clear()
    nodes = {10 + i: Node(f"{i}", example.client, {"partition-id": i}) for i in range(3)}
    example.serve(KeptContexts(nodes), Context(7, 1, {}, RecordDict(), {}, 7), method)
    off = re.findall(r"off by ([0-9.e+-]+)", capsys.readouterr().out)
    assert len(off) == 1
    # 2^22 steps over [-0.5, 0.5], rounded at random; divided by what clients count.
    assert 0 < float(off[0]) < 1e-4
    # Unmasked, small changes would all be near the middle of the range of 2^22.
    assert len(masked) == 3
    values = np.concatenate([one.reshape(-1) for one in masked])
    assert values.min() >= 0
    assert np.mean(values > 1 << 22) > 0.9
    assert abs(np.mean(values) / 2**32 - 0.5) < 0.1
