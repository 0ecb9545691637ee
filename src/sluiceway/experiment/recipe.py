"""Recipes: TOML files with the tables [run], [data], [model], [method], [train], [compare]."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from sluiceway.data import CHOICE_NAMES, IMAGE_NAMES, TEXT_NAMES
from sluiceway.experiment.errors import InputError, checked, first_fault
from sluiceway.experiment.methods import method_of, method_table
from sluiceway.federated.client import Optimisation, Training
from sluiceway.split.compress import Compressor
from sluiceway.strategies import Strategy

#: Networks for images, by the name that `model.name` uses.
NETWORKS = ("conv4", "resnet18", "vgg11")

TABLE = ConfigDict(extra="forbid", frozen=True)


class Run(BaseModel):
    """What is run, for how long, and where.

    kind: "federated" or "split". rounds: >= 1. seed: >= 0. participation: share of clients a
    round, (0, 1]. device: "auto", "cpu", "cuda", ... engine: "local". min_clients: usable updates
    that a round needs, >= 1. checkpoint_every: rounds between checkpoints, >= 1; checkpoint_keep:
    how many stay, >= 1.

    Federated runs: workers: processes, 0 for one a core (one on a GPU). threads: torch threads a
    worker. feature_memory_mb: of frozen layers' outputs that may be held in memory, the rest goes
    to a file. repeats: how often a round with too few usable updates is played again. timeout:
    seconds that a client may train before the round goes on without it, 0 for any; needs the CPU.
    Split runs: form: "sequential", "parallel" (one server model), "copies" (a server
    model per client) or "u" (labels stay). fronts: the strategy that averages clients' layers.
    """

    model_config = TABLE
    kind: Literal["federated", "split"] = "federated"
    rounds: int = Field(default=10, ge=1)
    seed: int = Field(default=0, ge=0)
    participation: float = Field(default=1.0, gt=0, le=1)
    device: str = "auto"
    engine: Literal["local"] = "local"
    workers: int = Field(default=0, ge=0)
    threads: int = Field(default=1, ge=1)
    feature_memory_mb: int = Field(default=2048, ge=0)
    form: Literal["sequential", "parallel", "copies", "u"] = "parallel"
    fronts: Literal["fedavg", "fedprox", "scaffold", "fedadam"] = "fedavg"
    min_clients: int = Field(default=1, ge=1)
    repeats: int = Field(default=1, ge=0)
    timeout: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    checkpoint_every: int = Field(default=1, ge=1)
    checkpoint_keep: int = Field(default=2, ge=1)


class Data(BaseModel):
    """Which data, and who holds what.

    name: a known data set, or path: a file of one's own (parquet, csv, jsonl) with text_column
    and label_column, and test_path or a held-out test_fraction. limit, test_limit: caps on the
    examples, stratified, 0 for none. clients: >= 1. partition: "iid", "dirichlet" (alpha > 0),
    "pathological" (classes_per_client) or "natural" (group: a column; with alpha also a Dirichlet
    over its values). seed: of the caps and the hold-out. max_tokens: of a text. augment: random
    crops and mirror images of training images.
    """

    model_config = TABLE
    name: str | None = None
    path: str | None = None
    test_path: str | None = None
    text_column: str = "text"
    label_column: str = "label"
    test_fraction: float = Field(default=0.2, gt=0, lt=1)
    limit: int = Field(default=0, ge=0)
    test_limit: int = Field(default=0, ge=0)
    clients: int = Field(default=10, ge=1)
    partition: Literal["iid", "dirichlet", "pathological", "natural"] = "dirichlet"
    alpha: float | None = Field(default=None, gt=0)
    classes_per_client: int = Field(default=2, ge=1)
    group: str | None = None
    max_tokens: int = Field(default=64, ge=3)
    augment: bool = True
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def one_source(self) -> Data:
        if (self.name is None) == (self.path is None):
            names = ", ".join(TEXT_NAMES + CHOICE_NAMES + IMAGE_NAMES)
            raise ValueError(f"give either data.name (one of {names}) or data.path (a file)")
        if self.partition == "dirichlet" and self.alpha is None:
            raise ValueError("data.partition = 'dirichlet' needs data.alpha, a number above 0")
        return self


class Model(BaseModel):
    """Which model, and what of it is trained.

    Texts: name: "minilm", "smollm2", a folder, or a name on the Hugging Face hub; gguf: the file's
    name, of a model in a GGUF file. dtype: of the parameters, "auto" as saved. answer: "head", a
    linear layer on the mean hidden state, or "likelihood": a language model says which ending, or
    which label word (words; default the labels' names) after the prompt, is likeliest. lora: rank
    of adapters that are trained instead of whole matrices, 0 for none, with scale lora_alpha /
    lora; lora_gate: on routers too, which are else trained whole. experts: number of experts
    that each chosen dense feed-forward layer is copied into, 0 to take the model as it is. top_k:
    experts a token. layers: how many of the last layers become mixtures. noise: of the copies,
    relative to their weights' deviation. scale: a token's output is scaled by its gate's
    probabilities, needed for top_k = 1. train: "moe" the mixture blocks and the head, "experts",
    "layers" everything from the first mixture upward, "all".

    Images: name: "conv4", "resnet18" or "vgg11"; width: channels of the first layers. cut: the last
    layer that clients hold. tail: in a U-shape, the last layer that the server holds.
    """

    model_config = TABLE
    name: str = "minilm"
    gguf: str | None = None
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    answer: Literal["head", "likelihood"] = "head"
    prompt: str = "{text}\nTopic:"
    words: list[str] | None = None
    lora: int = Field(default=0, ge=0)
    lora_alpha: float = Field(default=16.0, gt=0)
    lora_gate: bool = False
    width: int = Field(default=32, ge=1)
    cut: str | None = None
    tail: str | None = None
    experts: int = Field(default=8, ge=0)
    top_k: int = Field(default=2, ge=1)
    layers: int = Field(default=1, ge=1)
    noise: float = Field(default=0.01, ge=0)
    scale: bool = False
    train: Literal["moe", "experts", "layers", "all"] = "moe"

    @model_validator(mode="after")
    def one_text(self) -> Model:
        try:
            shown = self.prompt.format(text="\0")
        except (KeyError, IndexError, ValueError):
            shown = ""
        if shown.count("\0") != 1:
            raise ValueError(f"model.prompt = {self.prompt!r}: it must have {{text}} once")
        return self


class Compare(BaseModel):
    """What `sluiceway compare` varies when it is not told: key = list of values; and the seeds."""

    model_config = TABLE
    vary: dict[str, list[Any]] = Field(default_factory=dict)
    seeds: list[int] = Field(default_factory=lambda: [0], min_length=1)


class Recipe(BaseModel):
    """A whole run.

    `method` has `name` and the parameters of that strategy. In a federated run it may have a table
    `robust`: `name` ("none", "median", "trimmed-mean" or "norm-clipping") and the parameters of
    that rule, which hardens the aggregation.
    """

    model_config = TABLE
    description: str = ""
    run: Run = Field(default_factory=Run)
    data: Data
    model: Model = Field(default_factory=Model)
    method: dict[str, Any] = Field(default_factory=lambda: {"name": "fedavg"})
    train: dict[str, Any] = Field(default_factory=dict)
    compare: Compare = Field(default_factory=Compare)

    @model_validator(mode="after")
    def one_kind(self) -> Recipe:
        split = self.run.kind == "split"
        names = IMAGE_NAMES if split else TEXT_NAMES + CHOICE_NAMES
        if self.data.name is not None and self.data.name not in names:
            raise ValueError(
                f"data.name = {self.data.name!r}: a {self.run.kind} run takes {', '.join(names)}"
            )
        if split and self.data.path is not None:
            raise ValueError("data.path takes texts; a split run takes data.name")
        if split and self.model.name not in NETWORKS:
            raise ValueError(
                f"model.name = {self.model.name!r}: a split run takes {', '.join(NETWORKS)}"
            )
        if split and self.model.cut is None:
            raise ValueError("a split run needs model.cut, the last layer that clients hold")
        if (self.run.form == "u") != (self.model.tail is not None):
            raise ValueError("run.form = 'u' and model.tail go together, one needs the other")
        return self

    def built(self) -> Strategy | Compressor:
        """What [method] names: a strategy, or in a split run a compressor. Raises InputError."""
        return method_of(self.method, split=self.run.kind == "split")

    def training(self) -> Optimisation:
        """What [train] says; a `Training` in a federated run. Raises InputError."""
        kind = Optimisation if self.run.kind == "split" else Training
        made: Optimisation = checked("train", kind, self.train, [])
        return made

    def resolved(self) -> dict[str, Any]:
        """Every value that the run uses, defaults included, ready to be written as TOML."""
        tables = self.model_dump(exclude_none=True)
        tables["method"] = method_table(self.method, self.built())
        tables["train"] = TypeAdapter(type(self.training())).dump_python(self.training())
        return tables


def load_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a shipped recipe by name or a TOML file, apply `key=value` overrides, check it.

    Raises:
        InputError: no such recipe, not TOML, an unknown key, a value out of range.
    """
    return recipe_from(overridden_tables(recipe, overrides))


def overridden_tables(recipe: str | Path, overrides: Sequence[str]) -> dict[str, Any]:
    """The raw tables of a recipe with `key=value` overrides, not checked yet. Raises InputError."""
    tables = read_tables(recipe)
    for override in overrides:
        key, _, value = override.partition("=")
        set_key(tables, key.strip(), parsed(value.strip()), override)
    return tables


def recipe_from(tables: Mapping[str, Any]) -> Recipe:
    """Check the tables of a recipe. Raises InputError."""
    try:
        recipe = Recipe(**tables)
    except ValidationError as error:
        raise InputError(first_fault(error, "", known_keys())) from None
    recipe.built()
    recipe.training()
    return recipe


def known_keys() -> dict[str, list[str]]:
    """Keys by table; "" has the tables themselves."""
    nested: dict[str, type[BaseModel]] = {
        "run": Run,
        "data": Data,
        "model": Model,
        "compare": Compare,
    }
    return {"": list(Recipe.model_fields)} | {
        table: list(cls.model_fields) for table, cls in nested.items()
    }


def read_tables(recipe: str | Path) -> dict[str, Any]:
    """The raw tables of a recipe by name or path. Raises InputError."""
    shipped = shipped_recipes()
    path = shipped.get(str(recipe)) or Path(recipe)
    if not path.is_file():
        raise InputError(
            f"no recipe {str(recipe)!r}: not a file, and the shipped ones are {', '.join(shipped)}"
        )
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not TOML: {error}") from None


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with Sluiceway, by name."""
    folder = Path(str(resources.files("sluiceway") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def set_key(tables: dict[str, Any], key: str, value: Any, said: str) -> None:
    """Set `table.key` (or deeper) in place."""
    *path, last = key.split(".")
    if not last or not path or "=" not in said:
        raise InputError(f"cannot set {said!r}; write table.key=value, such as data.alpha=0.1")
    for part in path:
        tables = tables.setdefault(part, {})
        if not isinstance(tables, dict):
            raise InputError(f"cannot set {key}: {part} is not a table")
    tables[last] = value


def parsed(value: str) -> Any:
    """A value as TOML reads it; what TOML does not read is a string."""
    try:
        return tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return value
