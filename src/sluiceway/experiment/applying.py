"""Keys that have no effect are refused by name: else a sweep over one gives equal rows in silence.

A key of another kind of run is refused wherever it stands, unless it has its default there. One
that another key's value makes idle is refused where the command line gives it, for a recipe may
well keep it for variants that use it. Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sluiceway.errors import InputError, quoted
from sluiceway.experiment.own_code import is_code

#: The tables of a checked recipe.
Tables = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Condition:
    """When keys have an effect.

    Attributes:
        keys: dotted, separated by spaces.
        needs: what must hold, for people.
        holds: whether it does.
    """

    keys: str
    needs: str
    holds: Callable[[Tables], bool]


def of_kind(kind: str) -> Callable[[Tables], bool]:
    """Whether a recipe is of a kind."""
    return lambda tables: tables["run"]["kind"] == kind


def has(key: str, *values: Any) -> Callable[[Tables], bool]:
    """Whether a key has one of these values; with none given, any but 0, false and none."""
    table, _, name = key.partition(".")

    def holds(tables: Tables) -> bool:
        found = tables[table].get(name)
        return found in values if values else bool(found)

    return holds


#: Keys that one kind of run has no use for.
KINDS: Final = (
    Condition(
        "run.workers run.stacked run.feature_memory_mb run.feature_disk_mb run.max_retries "
        "run.evaluate_every run.max_step run.leave_one_out run.personal data.coarse "
        "data.max_tokens "
        "model.gguf model.dtype model.answer model.prompt model.words model.lora "
        "model.lora_alpha model.lora_gate model.experts model.top_k model.layers model.noise "
        "model.scale model.sliced model.skip_padding model.train",
        "run.kind = 'federated'",
        of_kind("federated"),
    ),
    Condition(
        "run.schedule run.client_aggregation data.augment model.cut model.tail",
        "run.kind = 'split'",
        of_kind("split"),
    ),
)
NETWORKS: Final = ("conv4", "resnet18", "vgg11", "huggingface")
#: Keys of networks for images.
IMAGES: Final = Condition(
    "model.width model.pretrained model.channels_last model.image_size",
    'a network for images: model.name = "conv4", ..., or your own',
    lambda tables: tables["model"]["name"] in NETWORKS or is_code(tables["model"]["name"]),
)
#: Keys that another key makes idle.
OTHERS: Final = (
    Condition(
        "model.gguf model.dtype model.answer model.prompt model.words model.lora model.lora_alpha "
        "model.lora_gate model.experts model.top_k model.layers model.noise model.scale "
        "model.sliced model.skip_padding model.train",
        'a model of texts that is not your own code: model.name = "minilm", a folder, ...',
        lambda tables: (
            not (tables["model"]["name"] in NETWORKS or is_code(tables["model"]["name"]))
        ),
    ),
    Condition("data.max_tokens", "texts", lambda tables: tables["model"]["name"] not in NETWORKS),
    Condition(
        "run.timeout",
        "run.kind = 'federated', or sites: run.engine = 'nvflare'",
        lambda tables: of_kind("federated")(tables) or tables["run"]["engine"] != "local",
    ),
    Condition(
        "data.alpha", "data.partition = 'dirichlet'", has("data.partition", "dirichlet", "natural")
    ),
    Condition(
        "data.classes_per_client",
        "data.partition = 'pathological'",
        has("data.partition", "pathological"),
    ),
    Condition("data.group", "data.partition = 'natural'", has("data.partition", "natural")),
    Condition(
        "data.text_column data.label_column data.test_path data.test_fraction data.encoding "
        "data.image_column data.image_shape data.mean data.std",
        "data.path",
        has("data.path"),
    ),
    Condition(
        "data.test_fraction",
        "no data.test_path",
        lambda tables: not tables["data"].get("test_path"),
    ),
    Condition("model.lora_alpha model.lora_gate", "model.lora above 0", has("model.lora")),
    Condition(
        "model.top_k model.noise model.scale model.sliced model.skip_padding",
        "model.experts above 0",
        has("model.experts"),
    ),
    Condition(
        "model.prompt model.words", "model.answer = 'likelihood'", has("model.answer", "likelihood")
    ),
    Condition("train.momentum", "train.optimizer = 'sgd'", has("train.optimizer", "sgd")),
    Condition(
        "train.local_epochs",
        "train.local_steps = 0",
        lambda tables: not tables["train"].get("local_steps"),
    ),
)


def require_applying(
    recipes: Sequence[Tables], written: Collection[str], given: Collection[str], defaults: Tables
) -> None:
    """Raise InputError for a key that has no effect in any of the recipes.

    Args:
        recipes: checked tables of what is to be run, one at least.
        written: dotted keys that the recipe's file has.
        given: dotted keys that the command line sets or varies.
        defaults: the tables of a recipe that says nothing.
    """
    for conditions, keys in (((*KINDS, IMAGES), {*written, *given}), (OTHERS, {*given})):
        for condition in conditions:
            for key in condition.keys.split():
                table, _, name = key.partition(".")
                idle = key in keys and not any(condition.holds(one) for one in recipes)
                if not idle:
                    continue
                value = recipes[0][table].get(name)
                if key in given or value != defaults[table].get(name):
                    raise InputError(
                        f"{key} = {quoted(value)} has no effect here: it needs {condition.needs}"
                    )
