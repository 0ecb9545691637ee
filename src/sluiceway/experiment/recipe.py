"""Recipes: TOML files with the tables [run], [data], [model], [method], [train], [compare]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

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

from sluiceway.core.seeds import LARGEST_SEED
from sluiceway.data import CHOICE_NAMES, IMAGE_NAMES, TEXT_NAMES
from sluiceway.data.own_images import MEAN, STD, is_table
from sluiceway.errors import InputError, line, quoted
from sluiceway.experiment.applying import require_applying
from sluiceway.experiment.declared import require_known_keys
from sluiceway.experiment.own_code import is_code, refuse_code
from sluiceway.experiment.own_metrics import require_metric
from sluiceway.experiment.tables import (
    flattened,
    key_of,
    overridden_tables,
    read_tables,
    require_shallow,
    with_current_keys,
)
from sluiceway.experiment.validation import checked, first_fault
from sluiceway.files import listed

if TYPE_CHECKING:  # torch is imported once the other tables are right
    from sluiceway.core.head_start import HeadStart
    from sluiceway.core.settings import Optimisation
    from sluiceway.split.compress import Compressor
    from sluiceway.strategies import Strategy

#: Networks for images, by the name that `model.name` uses.
NETWORKS = ("conv4", "resnet18", "vgg11")

#: Rounds times clients, at most: who takes part in later rounds is looked up in every round.
TURNS_LIMIT: Final = 20_000_000
#: Runs of one comparison, at most: all their recipes are checked before the first.
RUNS_LIMIT: Final = 10_000

#: How tables are checked. The text below a key is its description: in the reference, in
#: `sluiceway keys`, and in error messages.
TABLE = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

#: A name, a path, a word: at most 4,096 characters.
Text = Annotated[str, StringConstraints(max_length=4096)]
Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED)]
#: One file or several.
Files = Text | Annotated[tuple[Text, ...], Field(min_length=1, max_length=10_000)]
#: Of pixels, one number or one for each channel.
Pixels = Annotated[tuple[float, ...], Field(min_length=1, max_length=3)]


def schedule_of(value: Any) -> Any:
    """A schedule by its own name, whichever it is given by."""
    if not isinstance(value, str) or "-" not in value:  # no alias, for which torch is imported
        return value
    from sluiceway.split.schedules import SCHEDULE_ALIASES

    return SCHEDULE_ALIASES.get(value, value)


class Run(BaseModel):
    """What is run, for how long, and where."""

    model_config = TABLE
    kind: Literal["federated", "split"] = "federated"
    """Federated training, of a model of texts or images, or split learning of images."""
    rounds: int = Field(default=10, ge=1, le=99_999)
    """Rounds to train. Times data.clients it is at most 20 million."""
    seed: Seed = 0
    """Everything random comes from it: partition, initial values, who takes part, batches."""
    participation: float = Field(default=1.0, gt=0, le=1)
    """Share of the clients that take part in a round."""
    device: Text = "auto"
    """Where to train: auto (CUDA where there is one), cpu, cuda, cuda:1, ..."""
    engine: Literal["local", "nvflare", "flower"] = "local"
    """What carries messages: this process and its workers, or a deployment on this machine with
    a process for the server and for each site. Flower carries federated runs only."""
    workers: int = Field(default=0, ge=0, le=1024)
    """Federated: worker processes, 0 for one a core, or with device auto or cuda one for each
    visible GPU; on GPUs at most that many."""
    threads: int = Field(default=1, ge=1, le=1024)
    """Torch threads on a CPU, of each worker process; their number changes how sums are rounded."""
    stacked: int = Field(default=0, ge=0, le=100_000)
    """Federated: clients that are trained at once, in one process; 1 for one after the other, 0 for
    that on a CPU, and on one GPU for as many at once as its memory holds, where that can be done.
    For models without dropout and BatchNorm in training; results agree up to rounding."""
    feature_memory_mb: int = Field(default=2048, ge=0, le=1_000_000_000)
    """Federated: memory for the outputs of frozen layers (MB); what exceeds it is kept in a
    file."""
    feature_disk_mb: int = Field(default=1024, ge=0, le=1_000_000_000)
    """Federated: disk for the outputs of frozen layers (MB), kept in the cache folder for later
    runs of the same model on the same data; 0 keeps none."""
    schedule: Annotated[
        Literal["sequential", "parallel", "copies", "u"],
        BeforeValidator(schedule_of),
    ] = "parallel"
    """Split: clients take turns (sequential), train at once with one server model (parallel, also
    splitfed-v2) or with a server model for each client (copies, also splitfed-v1), or keep labels
    and last layers (u)."""
    client_aggregation: Literal["fedavg", "fedprox", "scaffold", "fedadam"] = "fedavg"
    """Split: the strategy that averages the clients' layers after a round."""
    min_clients: int = Field(default=1, ge=1, le=100_000)
    """Usable updates that a round needs."""
    max_retries: int = Field(default=1, ge=0, le=1000)
    """Federated: how often a round with too few usable updates is repeated, with clients drawn
    anew; then the run ends."""
    evaluate_every: int = Field(default=1, ge=1, le=99_999)
    """Federated: rounds from one evaluation of the global model to the next; the last round always
    has one."""
    max_step: float = Field(default=10.0, ge=0, le=1e9)
    """Federated: how many times the usual norm a client's change of the model may have, and the
    global model's step; 0 for any. What is above is left out and named. Usual is the median: of the
    round, or of the newest rounds before where that is larger."""
    leave_one_out: bool = False
    """Federated: leave a client that goes against the others out of a round if the loss on the test
    set is lower without it. Finds lies of a usual length; accuracies are then a little too good,
    and honest clients unlike all others may be left out (docs/runs.md)."""
    personal: int = Field(default=500, ge=0, le=10**9)
    """Federated: test examples on which a client's own model is evaluated after its last training,
    about; 0 for none. With data.local_test it is evaluated on all of its own test part."""
    timeout: float = Field(default=0.0, ge=0)
    """Federated: training time of a client (s) after which the round goes on without it, 0 for no
    limit. Needs the CPU. Deployed: time of a round, or of an answer of a site in split training; 0
    is then a day, and half an hour."""
    checkpoint_every: int = Field(default=1, ge=1, le=99_999)
    """Rounds between checkpoints; the last round has one too."""
    checkpoint_keep: int = Field(default=2, ge=1, le=99_999)
    """How many checkpoints are kept, the newest."""
    metric: str = "accuracy"
    """The measure on the test set by which rounds are compared (the best model, patience) and that
    is shown: accuracy, balanced_accuracy (the mean over classes), macro_f1, auc (of each class
    against the rest, for up to 20 million probabilities), or a function of your own, "file.py:name"
    or "module:name", of labels [N] and probabilities [N, C]; of all of them more is better."""
    keep: Literal["last", "best"] = "last"
    """Which model a run is there for: that of the last round, or of the first of the best rounds by
    run.metric. The last one is kept always."""
    track: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = ()
    """Trackers that are told of every round; each needs its extra. TensorBoard writes into the run
    folder; so do MLflow and Weights & Biases, unless their own variables of the environment
    (MLFLOW_TRACKING_URI, WANDB_API_KEY) say where to send."""
    patience: int = Field(default=0, ge=0, le=99_999)
    """Evaluations without a better run.metric after which the run ends early; 0 for never."""

    @model_validator(mode="after")
    def carried(self) -> Run:
        require_metric(self.metric)
        if self.engine == "flower" and self.kind == "split":
            raise ValueError(
                "run.engine = 'flower' carries federated runs only: split training exchanges a "
                "message for every mini-batch, and a Flower message takes seconds"
            )
        if self.stacked > 1:
            others = {
                "run.kind = 'split'": self.kind == "split",
                f"run.engine = {self.engine!r}": self.engine != "local",
                f"run.workers = {self.workers}": self.workers > 1,
                f"run.timeout = {self.timeout:g}": self.timeout > 0,
            }
            for other in [name for name, given in others.items() if given]:
                raise ValueError(f"run.stacked = {self.stacked} cannot be used with {other}")
        return self


class Data(BaseModel):
    """Which data, and who holds what."""

    model_config = TABLE
    name: Text | None = Field(
        default=None,
        description=f"A known data set. Texts: {', '.join(TEXT_NAMES + CHOICE_NAMES)}. Images: "
        f"{', '.join(IMAGE_NAMES)}.",
    )
    path: Files | None = None
    """Your own data instead, relative to the recipe: tables of texts (parquet, csv, tsv, jsonl,
    json, also gzipped); a folder of PNG and JPEG files with a folder for each class; a parquet
    table with their bytes, or a table with their paths. A pattern as notes/*.csv, or a list, names
    several. Rows without a text, image or label are left out and counted."""
    test_path: Files | None = None
    """Test examples of `path`, in the same form; else a part is held out."""
    encoding: Text = "utf-8"
    """How the tables of `path` are written, but for parquet: utf-8, latin-1, utf-16, ..."""
    text_column: Text = "text"
    """Column of `path` with the texts."""
    label_column: Text = "label"
    """Column of `path` with the labels."""
    image_column: Text | None = None
    """Column of the tables of `path` with the images; by default img or image. In a federated run
    it says that `path` has images."""
    image_shape: (
        Annotated[str, StringConstraints(pattern=r"^[13](x[1-9][0-9]{0,3}){2}$")] | None
    ) = None
    """What images of `path` are made to be, as 3x64x64: channels (1 for grey), height, width; by
    default they must all be like the first. In a federated run it says that `path` has images."""
    mean: Pixels = (MEAN,)
    """Of images of `path`: subtracted from pixels that are scaled to 0..1, one number or one for
    each channel. The same for all clients, so that nobody's pixels decide another's input."""
    std: Annotated[Pixels, Field(min_length=1)] = (STD,)
    """Of images of `path`: what they are divided by then, above 0."""
    test_fraction: float = Field(default=0.2, gt=0, lt=1)
    """Share of `path` that is held out as the test set where there is no `test_path`."""
    classes: tuple[Annotated[int, Field(ge=0, le=65_535)] | Text, ...] | None = Field(
        default=None, min_length=2, max_length=65_536
    )
    """Only examples of these labels, by number or name, which are numbered anew in this order; all
    by default."""
    coarse: int = Field(default=0, ge=0, le=65_535)
    """Labels merged at random (by data.seed) into this many classes, which the encoder has not seen
    as such: there is more to learn than from a class's mean; 0 leaves them as they are. Not with
    sites' own files, whose labels are numbered by the names of the run's classes."""
    limit: int = Field(default=0, ge=0, le=10**12)
    """Training examples at most, a stratified sample; 0 for all."""
    test_limit: int = Field(default=0, ge=0, le=10**12)
    """Test examples at most, a stratified sample; 0 for all."""
    clients: int = Field(default=10, ge=1, le=100_000)
    """Number of clients."""
    partition: Literal["iid", "dirichlet", "pathological", "natural"] = "dirichlet"
    """How examples are divided: evenly, by Dirichlet(alpha) over labels, a few classes for each
    client, or by the values of a column (group)."""
    alpha: float | None = Field(default=None, gt=0)
    """Concentration of the Dirichlet partition: the smaller, the less alike are the clients. With
    "natural" it is optional, over the column's values."""
    classes_per_client: int = Field(default=2, ge=1, le=100_000)
    """Classes of each client in the pathological partition."""
    group: Text | None = None
    """Column of the natural partition, such as domain or subject."""
    max_tokens: int = Field(default=64, ge=3, le=1 << 20)
    """Tokens of a text; longer ones are cut."""
    augment: bool = True
    """Split: random crops and mirror images of training images, where the data set allows; of
    `path` shifts by up to an eighth."""
    validation: float = Field(default=0.0, ge=0, lt=1)
    """Share of the training examples that is held out and tested on in place of the test set, for
    tuning; 0 for none."""
    local_test: float = Field(default=0.0, ge=0, lt=1)
    """Federated: share of each client's own examples that is held out from its training, and on
    which its own model is evaluated in place of the test set's examples (run.personal says
    whether); 0 for none. A site whose file has a test_path is evaluated on that."""
    seed: Seed = 0
    """Decides samples and held-out parts, independently of run.seed."""

    @model_validator(mode="after")
    def one_source(self) -> Data:
        if (self.name is None) == (self.path is None):
            names = ", ".join(TEXT_NAMES + CHOICE_NAMES + IMAGE_NAMES)
            raise ValueError(f"give either data.name (one of {names}) or data.path (a file)")
        if self.partition == "dirichlet" and self.alpha is None:
            raise ValueError("data.partition = 'dirichlet' needs data.alpha, a number above 0")
        if min(self.std) <= 0:
            raise ValueError(f"data.std = {list(self.std)}: must be above 0")
        return self

    @property
    def files(self) -> tuple[str, ...]:
        """What `path` names."""
        return tuple(listed(self.path))

    @property
    def has_images(self) -> bool:
        """Whether a federated run takes these for images: by name, or as the keys say."""
        if self.name is not None:
            return self.name in IMAGE_NAMES
        told = self.image_shape or self.image_column
        return told is not None or not all(is_table(file) for file in self.files)


class Model(BaseModel):
    """Which model, and which of its parameters are trained."""

    model_config = TABLE
    name: Text = "minilm"
    """Texts: minilm, smollm2, a folder, or a name on the Hugging Face hub. Images: conv4, resnet18,
    vgg11, or huggingface, the model that `pretrained` names. Or your own: "file.py:make", relative
    to the recipe, or "module:make", a function that makes it (docs/data.md)."""
    gguf: Text | None = None
    """The file, where the model is in a GGUF file."""
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    """Type of the parameters; auto as they were saved."""
    answer: Literal["head", "likelihood"] = "head"
    """How classes are scored: by a linear head on the mean hidden state, or by the likelihood that
    a language model gives to each ending, or to each label's word after the prompt."""
    head_start: Literal["random", "means", "ridge"] | None = None
    """Federated: how a linear head starts: random, or in closed form from sums over all examples
    that clients send once: class means, the default, or ridge regression. Where no head has a row
    for each class (likelihood, multiple choice, split) it is random."""
    prompt: str = Field(default="{text}\nTopic:", max_length=10_000)
    """With likelihood: what stands around a text, with {text} once."""
    words: list[Text] | None = Field(default=None, max_length=10_000)
    """With likelihood: a word for each label; by default the labels' names."""
    lora: int = Field(default=0, ge=0, le=4096)
    """Rank of LoRA adapters that are trained instead of whole matrices; 0 for none."""
    lora_alpha: float = Field(default=16.0, gt=0)
    """Adapters are scaled by lora_alpha / lora."""
    lora_gate: bool = False
    """Adapters on routers too, which are otherwise trained whole."""
    width: int = Field(default=32, ge=1, le=512)
    """Images: channels of the first layers."""
    pretrained: Text | None = None
    """Split: where the layers before the cut come from: the folder of an earlier split run (of the
    same network and width, its newest checkpoint), a safetensors file with their names, or
    "recipe:NAME", a shipped recipe that is then run first, once on a machine. With
    name = "huggingface" a ResNet, MobileNet or ViT, a folder or a name on the hub, all layers of
    which but the head are pretrained; or the folder of an earlier run of it. With a model of your
    own, split or federated: a safetensors file, whose tensors are taken by their names."""
    image_size: int = Field(default=0, ge=0, le=4096)
    """Images are resized to so many pixels a side, with name = "huggingface"; 0 leaves them."""
    channels_last: bool = False
    """Images: weights of convolutions in the memory layout torch.channels_last, which is faster.
    Results are equal up to rounding only."""
    cut: Text | None = None
    """Split: the last layer that clients hold; `sluiceway inspect conv4` lists them."""
    tail: Text | None = None
    """Split, schedule u: the last layer that the server holds."""
    experts: int = Field(default=8, ge=0, le=512)
    """Experts that each chosen dense feed-forward layer is upcycled into; 0 for none. A
    mixture-of-experts model is used as it is."""
    top_k: int = Field(default=2, ge=1, le=512)
    """Experts a token is sent to, of an upcycled layer."""
    layers: int = Field(default=1, ge=1, le=1024)
    """How many of the last layers are upcycled, or trained where there are no experts."""
    noise: float = Field(default=0.01, ge=0)
    """Noise of the experts' copies, relative to the standard deviation of their weights."""
    scale: bool = False
    """A token's output is scaled by its gate's probabilities; needed for top_k = 1."""
    sliced: bool = False
    """Experts are equal parts of the dense layer instead of copies."""
    skip_padding: bool = False
    """Padding passes by the experts of upcycled layers: faster on a CPU where texts differ in
    length. Results are equal up to rounding only."""
    train: Literal["moe", "experts", "layers", "all"] = "moe"
    """What is trained besides the head: experts and routers (moe), experts alone, everything from
    the first mixture upward (layers), or all."""

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
    """What `sluiceway compare` varies unless the command line says otherwise."""

    model_config = TABLE
    vary: dict[Text, Annotated[list[Any], Field(min_length=1)]] = Field(default_factory=dict)
    """Lists of values by key (`"method.name" = ["fedavg", "fedmoe"]`): numbers, texts, true or
    false, or lists of them; or of a table several keys at once (`method = [{ name = "sl" },
    { name = "random", share = 0.5 }]`). Every combination is run; at most 10,000 runs in all."""
    seeds: list[Seed] = Field(default_factory=lambda: [0], min_length=1)
    """Values of run.seed that each combination is run with."""

    @model_validator(mode="after")
    def plain_values(self) -> Compare:
        for key, values in self.vary.items():
            for value in values:
                several = isinstance(value, dict) and key in Recipe.model_fields
                values_of = list(value.values()) if several else [value]
                parts = [p for v in values_of for p in (v if isinstance(v, list) else [v])]
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

    `method` has `name` (a method that `sluiceway methods` lists, or your own, "file.py:Class",
    relative to the recipe) and the parameters of that strategy. In a federated run it may have a
    table `robust`: `name` ("none" or a robust rule) and the parameters of
    that rule, which hardens the aggregation; and a table `server`: `name` ("none", "momentum",
    "adam" or "yogi") and the parameters of that server optimiser, which steps along what every
    round changed.
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
        split, own = self.run.kind == "split", is_code(self.model.name)
        names = IMAGE_NAMES if split else TEXT_NAMES + CHOICE_NAMES + IMAGE_NAMES
        if self.data.name is not None and self.data.name not in names:
            raise ValueError(
                f"data.name = {quoted(self.data.name)}: a {self.run.kind} run takes "
                f"{', '.join(names)}"
            )
        pretrained = self.model.name == "huggingface" and self.model.pretrained is not None
        if self.images and self.model.name not in NETWORKS and not pretrained and not own:
            what = "a split run takes" if split else "images are for"
            raise ValueError(
                f"model.name = {quoted(self.model.name)}: {what} "
                f"{', '.join(NETWORKS)}, huggingface with model.pretrained, or a network of your "
                'own, "file.py:make"'
            )
        if not self.images and self.model.name in (*NETWORKS, "huggingface"):
            raise ValueError(
                f"model.name = {quoted(self.model.name)} takes images, and the data are texts; "
                "data.image_shape or data.image_column says that data.path has images"
            )
        if self.model.image_size and self.model.name != "huggingface":
            raise ValueError("model.image_size needs model.name = 'huggingface'")
        if self.model.pretrained is not None and not self.images and not own:
            raise ValueError("model.pretrained is for images; others take model.name")
        if self.model.pretrained is not None and not split and self.model.name in NETWORKS:
            raise ValueError(
                f"model.pretrained fills the layers of {self.model.name} before a cut, which a "
                "federated run has none of"
            )
        if split and self.model.cut is None:
            raise ValueError("a split run needs model.cut, the last layer that clients hold")
        if (self.run.schedule == "u") != (self.model.tail is not None):
            raise ValueError("run.schedule = 'u' and model.tail go together, one needs the other")
        if self.model.head_start not in (None, "random") and not self.has_head:
            raise ValueError(
                f"model.head_start = {self.model.head_start!r} is for federated runs in which a "
                "head scores classes (model.answer = 'head', data with labels); here it is 'random'"
            )
        if self.method.get("name") == "central" and self.run.engine != "local":
            raise ValueError(
                f"method.name = 'central' pools all examples, which run.engine = "
                f"{self.run.engine!r} never does; use 'local'"
            )
        private = self.method.get("privacy")
        silent = isinstance(private, Mapping) and private.get("name", "none") != "none"
        for why, given in {
            "run.kind = 'split'": split,
            "run.personal = 0": not self.run.personal,
            "[method.privacy], under which clients tell no accuracy": silent,
        }.items():
            if self.data.local_test and given:
                raise ValueError(
                    f"data.local_test = {self.data.local_test:g} is for the accuracy of clients' "
                    f"own models, of which there is none with {why}"
                )
        if self.run.rounds * self.data.clients > TURNS_LIMIT:
            raise ValueError(
                f"run.rounds = {self.run.rounds} of data.clients = {self.data.clients}: their "
                f"product must be at most {TURNS_LIMIT}"
            )
        return self

    @property
    def has_head(self) -> bool:
        """Whether answers are scored by a linear head that has a row for each class."""
        texts = not self.images and self.data.name not in CHOICE_NAMES
        return texts and self.model.answer == "head" and not is_code(self.model.name)

    @property
    def images(self) -> bool:
        """Whether the examples are images."""
        return self.run.kind == "split" or self.data.has_images

    @property
    def head_start(self) -> HeadStart:
        """How the head starts, the default included."""
        return self.model.head_start or ("means" if self.has_head else "random")

    def built(self) -> Strategy | Compressor:
        """What [method] names: a strategy, or in a split run a compressor. Raises InputError."""
        from sluiceway.experiment.methods import method_of

        return method_of(self.method, split=self.run.kind == "split")

    def training(self) -> Optimisation:
        """What [train] says, a `Training` or a `SplitTraining`. Raises InputError."""
        from sluiceway.core.settings import SplitTraining, Training

        kind = SplitTraining if self.run.kind == "split" else Training
        made: Optimisation = checked("train", kind, self.train, [])
        return made

    def trains_front(self) -> bool:
        """Whether the layers before the cut are trained, in a split run. Raises InputError."""
        from sluiceway.core.settings import SplitTraining

        made = self.training()
        return not isinstance(made, SplitTraining) or made.front

    def resolved(self) -> dict[str, Any]:
        """Every value that the run uses, defaults included, ready to be written as TOML."""
        from sluiceway.experiment.methods import method_table

        tables = self.model_dump(exclude_none=True)
        if self.run.kind == "federated":
            model = tables["model"] | {"head_start": self.head_start}
            # In the order of the keys, so that it reads back as it was.
            tables["model"] = {name: model[name] for name in Model.model_fields if name in model}
        tables["method"] = method_table(self.method, self.built())
        tables["train"] = TypeAdapter(type(self.training())).dump_python(self.training())
        return tables


def load_recipe(
    recipe: str | Path, overrides: Sequence[str] = (), *, alone: bool = True, code: bool = True
) -> Recipe:
    """Read a shipped recipe by name or a TOML file, apply `key=value` overrides, check it.

    Args:
        recipe: the name or the file.
        overrides: as `table.key=value`.
        alone: it is run as it is, and not with some keys varied, so that each must have an effect.
        code: see `recipe_from`.

    Raises:
        InputError: no such recipe, not TOML, larger than `RECIPE_LIMIT`, an unknown key, a value
            out of range, a key that has no effect.
    """
    loaded = recipe_from(overridden_tables(recipe, overrides), code=code)
    if alone:
        require_effects([loaded], recipe, [key_of(override) for override in overrides])
    return loaded


def require_effects(recipes: Sequence[Recipe], file: str | Path, given: Sequence[str]) -> None:
    """Raise InputError for a key that has no effect in any of the recipes; see `applying`.

    Args:
        recipes: what is to be run, made from `file`.
        given: dotted keys that the command line sets or varies.
    """
    written = flattened(with_current_keys(read_tables(file), tell=False))
    defaults = {
        name: {key: info.default for key, info in kind.model_fields.items()}
        for name, kind in (("run", Run), ("data", Data), ("model", Model))
    }
    require_applying([one.model_dump() for one in recipes], written, given, defaults)


def recipe_from(
    tables: Mapping[str, Any], *, code: bool = False, model: str | None = None
) -> Recipe:
    """Check the tables of a recipe.

    Args:
        tables: as TOML has them.
        code: it may name code, which is run: it was written here, not sent by somebody.
        model: code of this machine, named here, that takes the place of its `model.name`.

    Raises:
        InputError: see `load_recipe`; it names code and must not.
    """
    if not isinstance(tables, Mapping):
        raise InputError(f"a recipe is made of tables, not of {quoted(tables)}")
    require_shallow(tables)
    if not code:
        refuse_code(tables, own_model=model is not None)
    if model is not None:
        chosen = tables.get("model", {})
        tables = {**tables, "model": {**chosen, "name": model}}
    try:
        recipe = Recipe.model_validate(with_current_keys(tables))
    except ValidationError as error:
        raise InputError(first_fault(error, Recipe)) from None
    require_known_keys(recipe.run.kind, recipe.method, recipe.train)
    recipe.built()
    recipe.training()
    return recipe
