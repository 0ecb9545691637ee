"""Which device is meant where none is named."""

import inspect

import pytest
import torch

from sluiceway.core.device import chosen_device
from sluiceway.split.training import split_train
from sluiceway.transport.local import federate


@pytest.mark.parametrize("there", [False, True])
def test_one_default_for_both_kinds_of_runs(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    for train in (federate, split_train):
        default = inspect.signature(train).parameters["device"].default
        assert chosen_device(default) == ("cuda" if there else "cpu")
    assert chosen_device("cuda:1") == chosen_device(torch.device("cuda:1")) == "cuda:1"
