"""What is read from the source is what the classes have."""

from __future__ import annotations

from typing import Any

import pytest

from sluiceway.core.settings import SplitTraining, Training
from sluiceway.errors import InputError
from sluiceway.experiment.declared import (
    BESIDES,
    Sources,
    fields,
    require_known_keys,
)
from sluiceway.experiment.keys import names_of
from sluiceway.experiment.methods import INNER, method_of
from sluiceway.split.methods import METHODS
from sluiceway.strategies import BASELINES, STRATEGIES

KINDS = {"federated": {**STRATEGIES, **BASELINES}, "split": {**METHODS}}


@pytest.mark.parametrize("kind", ["federated", "split"])
def test_fields_are_those_of_the_classes_in_their_order(kind: str) -> None:
    classes = Sources(kind)
    for cls in [*KINDS[kind].values(), *([Training] if kind == "federated" else [SplitTraining])]:
        found = fields(classes, cls.__name__)
        assert found is not None
        assert list(found.values()) == names_of(cls), cls
    assert BESIDES["federated"] == ("name", *sorted(INNER))


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, table in KINDS.items() for name in table]
)
def test_a_mistyped_parameter_is_said_as_the_class_says_it(kind: str, name: str) -> None:
    table: dict[str, Any] = {"name": name, "mistyped": 1}
    with pytest.raises(InputError) as said:
        require_known_keys(kind, table, {})
    with pytest.raises(InputError) as slow:
        method_of(table, split=kind == "split")
    assert str(said.value) == str(slow.value)


def test_what_is_right_or_not_known_is_left_to_the_classes() -> None:
    require_known_keys("federated", {"name": "fedalign-moe", "lambda": 1, "robust": {}}, {"lr": 1})
    require_known_keys("federated", {"name": "no such", "mu": 1}, {})
    require_known_keys("split", {"name": ["a list"], "mu": 1}, {"front": False})
