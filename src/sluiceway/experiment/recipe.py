"""Recipes: TOML files with the tables [run], [data], [model], [method], [train], [compare]."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from math import prod
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Final, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from sluiceway.core.settings import Optimisation, Training
from sluiceway.data import CHOICE_NAMES, IMAGE_NAMES, TEXT_NAMES
from sluiceway.errors import InputError, line, quoted
from sluiceway.experiment.methods import method_of, method_table
from sluiceway.experiment.validation import checked, first_fault
from sluiceway.split.compress import Compressor
from sluiceway.split.schedules import SCHEDULE_ALIASES
from sluiceway.strategies import Strategy
from sluiceway.strategies.base import LARGEST_SEED

#: Networks for images, by the name that `model.name` uses.
NETWORKS = ("conv4", "resnet18", "vgg11")

#: Largest recipe file and largest `key=value`, in bytes and characters.
RECIPE_LIMIT: Final = 256 << 10
OVERRIDE_LIMIT: Final = 16 << 10
#: Tables and lists in each other, at most; and dots in a line, for reading a key of n parts takes
#: time by n^2.
DEPTH_LIMIT: Final = 16
DOTS_LIMIT: Final = 100
#: Rounds times clients, at most: who takes part in later rounds is looked up in every round.
TURNS_LIMIT: Final = 20_000_000
#: Runs of one comparison, at most: all their recipes are checked before the first.
RUNS_LIMIT: Final = 10_000

#: Old names of keys, which are taken too.
OLD_KEYS: Final = {"run.form": "run.schedule", "run.fronts": "run.client_aggregation"}

TABLE = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

#: A name, a path, a word: at most 4,096 characters.
Text = Annotated[str, StringConstraints(max_length=4096)]
Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED)]


class Run(BaseModel):
    """What is run, for how long, and where.

    kind: "federated" or "split". rounds: 1 to 99,999; times data.clients at most 20 million. seed:
    in [0, 2^63). participation: share of clients a round, (0, 1]. device: "auto", "cpu", "cuda",
    ... engine: "local", or "nvflare" or "flower" for a deployment of it on this machine, a process
    for the server and each site. min_clients: usable updates that a round needs, >= 1.
    checkpoint_every: rounds between checkpoints, >= 1; checkpoint_keep: how many stay, >= 1.

    Federated runs: workers: processes, at most 1,024, 0 for one a core (one on a GPU). threads:
    torch threads a worker, 1 to 1,024. feature_memory_mb: of frozen layers' outputs that may be
    held in memory, at most 10^9, the rest goes to a file. repeats: how often a round with too few
    usable updates is played again, at most 1,000. timeout: seconds that a client may train before
    the round goes on without it, 0 for any; needs the CPU.

    Split runs: schedule: "sequential", "parallel" (one server model; also "splitfed-v2"), "copies"
    (a server model per client; also "splitfed-v1") or "u" (labels stay). client_aggregation: the
    strategy that averages clients' layers. Their old names are form and fronts.
    """

    model_config = TABLE
    kind: Literal["federated", "split"] = "federated"
    rounds: int = Field(default=10, ge=1, le=99_999)
    seed: Seed = 0
    participation: float = Field(default=1.0, gt=0, le=1)
    device: Text = "auto"
    engine: Literal["local", "nvflare", "flower"] = "local"
    workers: int = Field(default=0, ge=0, le=1024)
    threads: int = Field(default=1, ge=1, le=1024)
    feature_memory_mb: int = Field(default=2048, ge=0, le=1_000_000_000)
    schedule: Annotated[
        Literal["sequential", "parallel", "copies", "u"],
        BeforeValidator(lambda v: SCHEDULE_ALIASES.get(v, v) if isinstance(v, str) else v),
    ] = "parallel"
    client_aggregation: Literal["fedavg", "fedprox", "scaffold", "fedadam"] = "fedavg"
    min_clients: int = Field(default=1, ge=1, le=100_000)
    repeats: int = Field(default=1, ge=0, le=1000)
    timeout: float = Field(default=0.0, ge=0)
    checkpoint_every: int = Field(default=1, ge=1, le=99_999)
    checkpoint_keep: int = Field(default=2, ge=1, le=99_999)

    @model_validator(mode="after")
    def carried(self) -> Run:
        if self.engine == "flower" and self.kind == "split":
            raise ValueError(
                "run.engine = 'flower' carries federated runs only: split training exchanges a "
                "message for every mini-batch, and a Flower message takes seconds"
            )
        return self


class Data(BaseModel):
    """Which data, and who holds what.

    name: a known data set, or path: a file of one's own (parquet, csv, jsonl) with text_column
    and label_column, and test_path or a held-out test_fraction. limit, test_limit: caps on the
    examples, stratified, at most 10^12, 0 for none. clients: 1 to 100,000. partition: "iid",
    "dirichlet" (alpha > 0), "pathological" (classes_per_client, 1 to 100,000) or "natural" (group:
    a column; with alpha also a Dirichlet over its values). validation: share of the training
    examples that is held out and tested on in place of the test set, [0, 1); 0 for none. seed: of
    the caps and the hold-outs, in [0, 2^63). max_tokens: of a text, 3 to 2^20. augment: random
    crops and mirror images of training images. Names and paths have at most 4,096 characters.
    """

    model_config = TABLE
    name: Text | None = None
    path: Text | None = None
    test_path: Text | None = None
    text_column: Text = "text"
    label_column: Text = "label"
    test_fraction: float = Field(default=0.2, gt=0, lt=1)
    limit: int = Field(default=0, ge=0, le=10**12)
    test_limit: int = Field(default=0, ge=0, le=10**12)
    clients: int = Field(default=10, ge=1, le=100_000)
    partition: Literal["iid", "dirichlet", "pathological", "natural"] = "dirichlet"
    alpha: float | None = Field(default=None, gt=0)
    classes_per_client: int = Field(default=2, ge=1, le=100_000)
    group: Text | None = None
    max_tokens: int = Field(default=64, ge=3, le=1 << 20)
    augment: bool = True
    validation: float = Field(default=0.0, ge=0, lt=1)
    seed: Seed = 0

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
    which label word (words, at most 10,000; default the labels' names) after the prompt (at most
    10,000 characters, with {text} once), is likeliest. lora: rank of adapters that are trained
    instead of whole matrices, at most 4,096, 0 for none, with scale lora_alpha / lora; lora_gate:
    on routers too, which are else trained whole. experts: number of experts that each chosen dense
    feed-forward layer is copied into, at most 512, 0 to take the model as it is. top_k: experts a
    token. layers: how many of the last layers become mixtures, at most 1,024. noise: of the copies,
    relative to their weights' deviation. scale: a token's output is scaled by its gate's
    probabilities, needed for top_k = 1. sliced: experts are equal parts of the layer, not copies of
    it. train: "moe" the mixture blocks and the head, "experts",
    "layers" everything from the first mixture upward, "all".

    Images: name: "conv4", "resnet18" or "vgg11"; width: channels of the first layers, at most 512.
    cut: the last layer that clients hold. tail: in a U-shape, the last layer that the server holds.
    """

    model_config = TABLE
    name: Text = "minilm"
    gguf: Text | None = None
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    answer: Literal["head", "likelihood"] = "head"
    prompt: str = Field(default="{text}\nTopic:", max_length=10_000)
    words: list[Text] | None = Field(default=None, max_length=10_000)
    lora: int = Field(default=0, ge=0, le=4096)
    lora_alpha: float = Field(default=16.0, gt=0)
    lora_gate: bool = False
    width: int = Field(default=32, ge=1, le=512)
    cut: Text | None = None
    tail: Text | None = None
    experts: int = Field(default=8, ge=0, le=512)
    top_k: int = Field(default=2, ge=1, le=512)
    layers: int = Field(default=1, ge=1, le=1024)
    noise: float = Field(default=0.01, ge=0)
    scale: bool = False
    sliced: bool = False
    train: Literal["moe", "experts", "layers", "all"] = "moe"

    @model_validator(mode="after")
    def one_text(self) -> Model:
        try:
            fields = [part[1:] for part in Formatter().parse(self.prompt) if part[1] is not None]
        except ValueError:
            fields = []
        # A width, as in {text:>999999999}, would make a text of that many characters.
        if fields != [("text", "", None)]:
            raise ValueError(f"model.prompt = {quoted(self.prompt)}: it must have {{text}} once")
        return self


class Compare(BaseModel):
    """What `sluiceway compare` varies when it is not told: key = list of values; and the seeds.

    Values are numbers, texts, true or false, or lists of them; at most 10,000 runs in all.
    """

    model_config = TABLE
    vary: dict[Text, Annotated[list[Any], Field(min_length=1)]] = Field(default_factory=dict)
    seeds: list[Seed] = Field(default_factory=lambda: [0], min_length=1)

    @model_validator(mode="after")
    def plain_values(self) -> Compare:
        for key, values in self.vary.items():
            for value in values:
                parts = value if isinstance(value, list) else [value]
                if not all(isinstance(part, str | int | float) for part in parts):
                    raise ValueError(
                        f"compare.vary has {line(key, 80)} = {quoted(value)}; expected a number, "
                        "a text, true or false, or a list of them"
                    )
        require_few(self.vary, self.seeds)
        return self


def require_few(vary: Mapping[str, Sequence[Any]], seeds: Sequence[int]) -> None:
    """Raise ValueError for a comparison of too many runs."""
    count = prod(map(len, vary.values())) * len(seeds)
    if count > RUNS_LIMIT:
        raise ValueError(f"a comparison of {quoted(count)} runs; at most {RUNS_LIMIT} can be made")


class Recipe(BaseModel):
    """A whole run.

    `method` has `name` and the parameters of that strategy. In a federated run it may have a table
    `robust`: `name` ("none", "median", "trimmed-mean" or "norm-clipping") and the parameters of
    that rule, which hardens the aggregation.
    """

    model_config = TABLE
    description: str = Field(default="", max_length=10_000)
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
                f"data.name = {quoted(self.data.name)}: a {self.run.kind} run takes "
                f"{', '.join(names)}"
            )
        if split and self.data.path is not None:
            raise ValueError("data.path takes texts; a split run takes data.name")
        if split and self.model.name not in NETWORKS:
            raise ValueError(
                f"model.name = {quoted(self.model.name)}: a split run takes {', '.join(NETWORKS)}"
            )
        if split and self.model.cut is None:
            raise ValueError("a split run needs model.cut, the last layer that clients hold")
        if (self.run.schedule == "u") != (self.model.tail is not None):
            raise ValueError("run.schedule = 'u' and model.tail go together, one needs the other")
        if self.run.rounds * self.data.clients > TURNS_LIMIT:
            raise ValueError(
                f"run.rounds = {self.run.rounds} of data.clients = {self.data.clients}: their "
                f"product must be at most {TURNS_LIMIT}"
            )
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
        InputError: no such recipe, not TOML, larger than `RECIPE_LIMIT`, an unknown key, a value
            out of range.
    """
    return recipe_from(overridden_tables(recipe, overrides))


def overridden_tables(recipe: str | Path, overrides: Sequence[str]) -> dict[str, Any]:
    """The raw tables of a recipe with `key=value` overrides, not checked yet. Raises InputError."""
    tables = with_current_keys(read_tables(recipe))
    for override in overrides:
        if len(override) > OVERRIDE_LIMIT:
            raise InputError(
                f"cannot set {quoted(override)}: it has {len(override)} characters, "
                f"the limit is {OVERRIDE_LIMIT}"
            )
        key, _, value = override.partition("=")
        set_key(tables, key.strip(), parsed(value.strip()), override)
    return tables


def recipe_from(tables: Mapping[str, Any]) -> Recipe:
    """Check the tables of a recipe. Raises InputError."""
    if not isinstance(tables, Mapping):
        raise InputError(f"a recipe is made of tables, not of {quoted(tables)}")
    require_shallow(tables)
    try:
        recipe = Recipe.model_validate(with_current_keys(tables))
    except ValidationError as error:
        raise InputError(first_fault(error, "", known_keys())) from None
    recipe.built()
    recipe.training()
    return recipe


def with_current_keys(tables: Mapping[str, Any]) -> dict[str, Any]:
    """The tables with the keys that `OLD_KEYS` lists under their current names."""
    found = dict(tables)
    for old, new in OLD_KEYS.items():
        (name, before), after = old.split("."), new.partition(".")[2]
        table = found.get(name)
        if isinstance(table, Mapping) and before in table and after not in table:
            found[name] = {after if key == before else key: v for key, v in table.items()}
    return found


def require_shallow(tables: Mapping[str, Any]) -> None:
    """Raise InputError for what is nested deeper than any recipe: to print it could fail."""
    level: list[Any] = [tables]
    for _ in range(DEPTH_LIMIT):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, Mapping) else outer)
            if isinstance(inner, Mapping | list | tuple)
        ]
        if not level:
            return
    raise InputError(f"tables and lists are more than {DEPTH_LIMIT} deep in each other")


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
    name = line(str(path))
    try:
        if not path.is_file():
            raise InputError(
                f"no recipe {quoted(str(recipe))}: not a file, and the shipped ones are "
                f"{', '.join(shipped)}"
            )
        with path.open("rb") as file:
            content = file.read(RECIPE_LIMIT + 1)
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror}") from None
    if len(content) > RECIPE_LIMIT:
        raise InputError(f"{name} is larger than {RECIPE_LIMIT} bytes, the limit of a recipe")
    if any(part.count(b".") > DOTS_LIMIT for part in content.splitlines()):
        raise InputError(f"{name} has a line with more than {DOTS_LIMIT} dots")
    try:
        return tables_of(content.decode())
    except ValueError as error:
        raise InputError(f"{name} is not TOML: {line(str(error))}") from None


def tables_of(text: str) -> dict[str, Any]:
    """TOML as tables. Raises ValueError."""
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("tables and lists are too deep in each other") from None


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with Sluiceway, by name."""
    folder = Path(str(resources.files("sluiceway") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def set_key(tables: dict[str, Any], key: str, value: Any, said: str) -> None:
    """Set `table.key` (or deeper) in place."""
    *path, last = OLD_KEYS.get(key, key).split(".")
    if not last or not path or "=" not in said:
        raise InputError(
            f"cannot set {quoted(said)}; write table.key=value, such as data.alpha=0.1"
        )
    for part in path:
        tables = tables.setdefault(part, {})
        if not isinstance(tables, dict):
            raise InputError(f"cannot set {line(key, 80)}: {line(part, 80)} is not a table")
    tables[last] = value


def parsed(value: str) -> Any:
    """A value as TOML reads it; what TOML does not read is a string."""
    try:
        found = tables_of(f"value = {value}") if value.count(".") <= DOTS_LIMIT else {}
    except ValueError:
        return value
    return found["value"] if list(found) == ["value"] else value
