"""Recipes: what ships is sound, and what is wrong is said in one line."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from pydantic import TypeAdapter

from sluiceway.core.round_loop import Rounds
from sluiceway.core.settings import Training
from sluiceway.errors import InputError
from sluiceway.experiment import tables
from sluiceway.experiment.compare import compare
from sluiceway.experiment.keys import keys_of, names_of
from sluiceway.experiment.methods import methods
from sluiceway.experiment.recipe import (
    Data,
    Model,
    Run,
    load_recipe,
    recipe_from,
)
from sluiceway.experiment.reference import TABLES, reference
from sluiceway.experiment.tables import parsed, shipped_recipes
from sluiceway.split import METHODS
from sluiceway.strategies import ROBUST, STRATEGIES, FedAlignMoE, Momentum

FEDERATED = {"quickstart", "agnews", "banking77", "clinc150-domains", "mmlu", "hellaswag"}
SPLIT = {
    "mnist-pretrain",
    "split-quickstart",
    "fashion-split",
    "cifar10-split",
    "cifar10-pretrain",
    "cifar10-pretrained",
}
CLIENTS = dict.fromkeys(SPLIT, 5) | {"cifar10-pretrain": 1, "mnist-pretrain": 1}


def test_the_shipped_recipes() -> None:
    assert set(shipped_recipes()) == FEDERATED | SPLIT


@pytest.mark.parametrize("name", sorted(FEDERATED | SPLIT))
def test_a_shipped_recipe_resolves_and_reads_back(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.description
    assert recipe.data.clients == CLIENTS.get(name, 10)
    resolved = recipe.resolved()
    again = recipe_from(tomllib.loads(tomli_w.dumps(resolved)))
    assert again.resolved() == resolved
    if name in FEDERATED:
        assert resolved["method"]["lambda"] == 0.1
    elif CLIENTS[name] > 1:
        assert (resolved["method"]["name"], resolved["method"]["share"]) == ("acp-sl", 0.125)


def test_old_keys_are_accepted_and_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "_told", set())
    own = tmp_path / "own.toml"
    own.write_text(
        '[run]\nkind = "split"\nform = "copies"\n[data]\nname = "mnist5k"\n'
        'alpha = 1.0\n[model]\nname = "conv4"\ncut = "conv1"\n[method]\nname = "sl"\n'
    )
    run = load_recipe(own, ["run.fronts=scaffold"]).run
    assert (run.schedule, run.client_aggregation) == ("copies", "scaffold")
    assert load_recipe("quickstart", ["run.repeats=3"]).run.max_retries == 3
    for name, schedule in {"splitfed-v1": "copies", "splitfed-v2": "parallel"}.items():
        overrides = ["run.schedule=u", f"run.form={name}"]  # the later one counts
        assert load_recipe(own, overrides).run.schedule == schedule
    assert sorted(capsys.readouterr().err.splitlines()) == [
        "note: run.form is now run.schedule",
        "note: run.fronts is now run.client_aggregation",
        "note: run.repeats is now run.max_retries",
    ]
    with pytest.raises(InputError, match=r"run\.form is the old name of run\.schedule; give one"):
        recipe_from({"run": {"form": "u", "schedule": "u"}})


def test_every_key_is_described_and_in_the_reference() -> None:
    text = reference()
    for table, cls in TABLES.items():
        for key in keys_of(cls):
            assert key.text, key
            assert f"| `{table}.{key.name}` | {key.limits()} |" in text
    assert "`method.lambda` | number, >= 0 | `0.1` | Weight of the regulariser" in text
    assert "`train.checkpointing` | true or false | `false` | Gradient checkpointing:" in text
    for method in methods():
        assert method.text.endswith(".")
        assert all(len(key.text) > 10 for key in keys_of(method.cls)), method.name
        assert f'name = "{method.name}"`\n\n{method.text}' in text
        assert [key.name for key in keys_of(method.cls)] == names_of(method.cls)


def test_overrides_reach_every_table() -> None:
    recipe = load_recipe(
        "agnews",
        ["data.alpha=0.5", "method.name=fedprox", "method.mu=0.3", "train.lr=2e-4", "run.seed=7"],
    )
    assert recipe.data.alpha == 0.5
    method = {"name": "fedprox", "lora": "frozen-a", "head": "examples", "mu": 0.3}
    assert recipe.resolved()["method"] == method
    assert recipe.training().lr == 2e-4
    assert recipe.run.seed == 7


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", 3), ("0.1", 0.1), ("1e-4", 1e-4), ("true", True), ("fedavg", "fedavg"), ("[1]", [1])],
)
def test_values_are_read_as_toml_or_as_words(text: str, value: object) -> None:
    assert parsed(text) == value


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("data.alhpa=1", r"unknown key data\.alhpa; allowed in \[data\]: name, path"),
        ("data.alpha=0", r"data\.alpha = 0: must be greater than 0"),
        ("data.alpha=-1", r"data\.alpha = -1: must be greater than 0"),
        ("run.rounds=0", r"run\.rounds = 0: must be greater than or equal to 1"),
        ("run.rounds=many", r"run\.rounds = 'many': must be a valid integer"),
        ("run.kind=central", r"run\.kind = 'central': must be 'federated' or 'split'"),
        ("data.name=cifar10", r"model\.name = 'minilm': images are for conv4, resnet18"),
        ("data.partition=fair", r"data\.partition = 'fair': must be 'iid', 'dirichlet'"),
        ("method.name=fedsgd", r"method\.name = 'fedsgd'; allowed: fedavg, fedprox"),
        ("method.mu=1", r"unknown key method\.mu; allowed in \[method\]: name, privacy, robust"),
        ("method.name=[1]", r"method\.name = \[1\]; allowed: fedavg"),
        ("method.robust=median", r"method\.robust = 'median': must be a table with a name"),
        ("method.robust.name=mean", r"method\.robust\.name = 'mean'; allowed: none, median, trim"),
        ("method.robust.share=0.1", r"method\.robust\.name = None; allowed: none, median"),
        ("method.server=momentum", r"method\.server = 'momentum': must be a table with a name"),
        ("method.server.name=sgd", r"method\.server\.name = 'sgd'; allowed: none, momentum, adam"),
        ("method.server.beta=0.7", r"method\.server\.name = None; allowed: none, momentum"),
        ("method.lambda=-1", r"method\.lambda = -1: must be greater than or equal to 0"),
        ("method.gate=open", r"method\.gate = 'open': must be 'consistency', 'average'"),
        ("train.lr=0", r"train\.lr = 0: must be greater than 0"),
        ("train.rl=1", r"unknown key train\.rl; allowed in \[train\]: lr, batch_size"),
        ("models.name=x", r"unknown key models; allowed: description, run, data"),
        ("alpha=1", r"cannot set 'alpha=1'; write table\.key=value"),
        ("data.alpha", r"cannot set 'data\.alpha'; write table\.key=value"),
        ("data.alpha.x=1", r"cannot set data\.alpha\.x: alpha is not a table"),
    ],
)
def test_a_wrong_override_is_one_line(override: str, line: str) -> None:
    with pytest.raises(InputError, match=line) as caught:
        load_recipe("agnews", [override])
    assert "\n" not in str(caught.value)


def test_data_has_one_source() -> None:
    with pytest.raises(InputError, match=r"give either data\.name \(one of 20newsgroups"):
        recipe_from({"data": {"name": "agnews", "path": "x.csv"}})


@pytest.mark.parametrize(
    "table",
    [{"name": "none"}, {"name": "momentum", "beta": 0.7, "lr": 1.0}],
)
def test_a_server_optimiser_goes_with_the_method_and_reads_back(table: dict[str, object]) -> None:
    recipe = load_recipe("agnews", [f"method.server.{key}={value}" for key, value in table.items()])
    made, resolved = recipe.built(), recipe.resolved()
    assert isinstance(made, FedAlignMoE)
    assert made.server == (None if table["name"] == "none" else Momentum(beta=0.7))
    assert resolved["method"]["server"] == table
    again = recipe_from(tomllib.loads(tomli_w.dumps(resolved)))
    assert again.resolved() == resolved
    assert load_recipe("agnews", ["method.server.name=yogi"]).resolved()["method"]["server"] == {
        "name": "yogi",
        "lr": 0.01,
        "beta1": 0.9,
        "beta2": 0.99,
        "tau": 0.001,
    }


@pytest.mark.parametrize(
    ("name", "override", "line"),
    [
        ("momentum", "beta=1", r"method\.server\.beta = 1: must be less than 1"),
        ("momentum", "lr=0", r"method\.server\.lr = 0: must be greater than 0"),
        ("momentum", "tau=1", r"unknown key method\.server\.tau; allowed .*: name, beta, lr"),
        ("none", "lr=1", r"unknown key method\.server\.lr; allowed in \[method\.server\]: name$"),
    ],
)
def test_a_wrong_server_optimiser_is_one_line(name: str, override: str, line: str) -> None:
    with pytest.raises(InputError, match=line):
        load_recipe("agnews", [f"method.server.name={name}", f"method.server.{override}"])


def test_a_method_with_an_optimiser_of_its_own_takes_no_other() -> None:
    with pytest.raises(InputError, match=r"method\.server: fedadam has a server optimiser of its"):
        load_recipe("agnews", ["method.name=fedadam", "method.server.name=momentum"])


ROBUST_TABLES: list[dict[str, object]] = [
    {"name": "none"},
    {"name": "median"},
    {"name": "trimmed-mean", "share": 0.2},
    {"name": "norm-clipping"},
    {"name": "norm-clipping", "limit": 0.5},
]


@pytest.mark.parametrize("table", ROBUST_TABLES)
def test_a_robust_rule_goes_with_the_method_and_reads_back(table: dict[str, object]) -> None:
    recipe = load_recipe("agnews", [f"method.robust.{key}={value}" for key, value in table.items()])
    made, resolved = recipe.built(), recipe.resolved()
    assert isinstance(made, FedAlignMoE)
    rule = ROBUST.get(str(table["name"]))
    assert [type(found) for found in made.rules] == ([rule] if rule else [])
    assert resolved["method"]["robust"] == table
    assert {k: v for k, v in resolved["method"].items() if k != "robust"} == (
        load_recipe("agnews").resolved()["method"]
    )
    again = recipe_from(tomllib.loads(tomli_w.dumps(resolved)))
    assert again.resolved() == resolved
    built = again.built()
    assert isinstance(built, FedAlignMoE)
    assert (built, built.rules) == (made, made.rules)


def test_a_robust_rules_defaults_are_resolved() -> None:
    resolved = load_recipe("agnews", ["method.robust.name=trimmed-mean"]).resolved()
    assert resolved["method"]["robust"] == {"name": "trimmed-mean", "share": 0.1}


@pytest.mark.parametrize(
    ("name", "override", "line"),
    [
        ("median", "share=0.1", r"unknown key method\.robust\.share; allowed .*robust\]: name$"),
        ("trimmed-mean", "share=0.5", r"method\.robust\.share = 0\.5: must be less than 0\.5"),
        ("trimmed-mean", "cut=2", r"unknown key method\.robust\.cut; allowed .*: name, share$"),
        ("norm-clipping", "limit=0", r"method\.robust\.limit = 0: must be greater than 0"),
        ("norm-clipping", "limit=inf", r"method\.robust\.limit = inf: must be a finite number"),
        ("none", "share=0.1", r"unknown key method\.robust\.share; allowed .*robust\]: name$"),
    ],
)
def test_a_wrong_robust_rule_is_one_line(name: str, override: str, line: str) -> None:
    with pytest.raises(InputError, match=line):
        load_recipe("agnews", [f"method.robust.name={name}", f"method.robust.{override}"])


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "method.robust.name=median",
            r"unknown key method\.robust; allowed in \[method\]: name",
        ),
        ("data.name=agnews", r"data\.name = 'agnews': a split run takes cifar10, fashion-mnist"),
        ("model.name=minilm", r"model\.name = 'minilm': a split run takes conv4, resnet18, vgg11"),
        ("run.schedule=u", r"run\.schedule = 'u' and model\.tail go together"),
        ("run.form=ring", r"run\.schedule = 'ring': must be 'sequential', 'parallel', 'copies' or"),
        (
            "method.name=fedavg",
            r"method\.name = 'fedavg'; allowed: sl, acp-sl, random, random-",
        ),
        ("method.share=0", r"method\.share = 0: must be greater than 0"),
        ("method.quantize=int2", r"method\.quantize = 'int2': must be 'none', 'fp16', 'int8'"),
        ("train.max_grad_norm=1", r"unknown key train\.max_grad_norm; allowed in \[train\]: lr"),
    ],
)
def test_a_wrong_override_of_a_split_recipe_is_one_line(override: str, line: str) -> None:
    with pytest.raises(InputError, match=line):
        load_recipe("fashion-split", [override])


def test_a_recipe_that_is_not_there_or_not_toml(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no recipe 'nosuch': not a file, and the shipped ones"):
        load_recipe("nosuch")
    broken = tmp_path / "broken.toml"
    broken.write_text("[run\n")
    with pytest.raises(InputError, match="is not TOML"):
        load_recipe(broken)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("data.alpha=inf", r"^data\.alpha = inf: must be a finite number \("),
        ("train.lr=nan", r"^train\.lr = nan: must be a finite number \("),
        ("method.lambda=1e999", r"^method\.lambda = inf: must be a finite number \("),
        ("data.alpha=1" + "0" * 400, r"^data\.alpha = 10{79}\.\.\.: must be a valid number \("),
        ("run.seed=9223372036854775808", r"must be less than or equal to 9223372036854775807 \("),
        ("run.seed=0x" + "f" * 9000, r"^run\.seed = int too large to be shown: must be less"),
        ("run.seed=" + "9" * 5000, r"^run\.seed = '9{79}\.\.\.: unable to parse"),
        ("run.rounds=100000", r"must be less than or equal to 99999 \("),
        ("model.prompt='{text:>999999999}'", r"it must have \{text\} once$"),
        ("model.prompt='" + "x" * 10_001 + "'", r"must have at most 10000 characters \("),
        ("model.words=3", r"^model\.words = 3: must be a valid list \("),
        ("model.name=" + "x" * 5000, r"^model\.name = 'x{79}\.\.\.: must have at most 4096"),
        ("method.name=[1]", r"^method\.name = \[1\]; allowed: fedavg"),
        ("method.__dataclass_self__=1", r"^unknown key method\.__dataclass_self__; allowed"),
        ("compare.vary.x=[{b = 1}]", r"x = \{'b': 1\}; expected a number, a text"),
        ("compare.vary.x=[]", r"^compare\.vary\.x = \[\]: must have at least 1 item"),
        ("compare.seeds=[-1]", r"^compare\.seeds\.0 = -1: must be greater"),
        ("run.rounds=1\nx=2", r"^run\.rounds = '1\\nx=2': must be a valid integer"),
        ("run.rounds=" + "[" * 5000, r"^run\.rounds = '\[{79}\.\.\.: must be a valid integer"),
        ("run.a\nb\x1b=3", r"^unknown key run\.a\\nb\\x1b; allowed in \[run\]: kind"),
        ("a." * 100 + "b=1", r"^tables and lists are more than 16 deep in each other$"),
        ("x.y=" + "1" * 20_000, r"it has 20004 characters, the limit is 16384$"),
    ],
)
def test_extremes_are_one_line(override: str, line: str) -> None:
    with pytest.raises(InputError, match=line) as caught:
        load_recipe("agnews", [override])
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


def test_many_rounds_of_many_clients() -> None:
    with pytest.raises(InputError, match=r"rounds = 99999 of data\.clients = 1000: their product"):
        load_recipe("agnews", ["run.rounds=99999", "data.clients=1000"])
    load_recipe("agnews", ["run.rounds=5000", "data.clients=3400"])


def test_a_comparison_of_too_many_runs() -> None:
    many = ", ".join(map(str, range(200)))
    vary = f"compare.vary={{'run.seed'=[{many}], 'data.seed'=[{many}]}}"
    with pytest.raises(InputError, match="a comparison of 40000 runs; at most 10000"):
        load_recipe("agnews", [vary, "compare.seeds=[0]"])
    lists = {"run.seed": list(range(200)), "data.seed": list(range(200))}
    with pytest.raises(InputError, match="a comparison of 40000 runs"):
        compare("agnews", vary=lists, seeds=[0])


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"\xff\xfe", r"is not TOML: 'utf-8' codec"),
        (b"x=" + b"[" * 50_000, r"is not TOML: tables and lists are too deep in each other$"),
        (b"a." * 100_000 + b"b = 1", r"has a line with more than 100 dots$"),
        (b"#" * (256 * 1024 + 1), r"is larger than 262144 bytes, the limit of a recipe$"),
        (b"x=" + b"9" * 5000, r"is not TOML: Exceeds the limit"),
        (b"run = 3\ndata = 4", r"must be a valid dictionary"),
        (b"[" + b"a." * 90 + b"b]\nc = 1", r"^tables and lists are more than 16 deep"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, content: bytes, line: str) -> None:
    path = tmp_path / "x.toml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=line) as caught:
        load_recipe(path)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "a\nb", "\udc80", "/", "/dev/zero"])
def test_a_path_that_is_no_file(name: str) -> None:
    with pytest.raises(InputError) as caught:
        load_recipe(name)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "tables",
    [None, [], {1: 2}, {"data": {1: 2}}, {"data": {"name": "agnews", "alpha": 10**5000}}],
)
def test_tables_of_every_kind(tables: Any) -> None:
    with pytest.raises(InputError):
        recipe_from(tables)


def numbers_of(kind: Any) -> dict[str, Any]:
    """JSON schemas of the integer parameters by name."""
    fields = TypeAdapter(kind).json_schema()["properties"].items()
    return {name: field for name, field in fields if field.get("type") == "integer"}


@pytest.mark.parametrize(
    "kind", [Run, Data, Model, Training, Rounds, *STRATEGIES.values(), *METHODS.values()]
)
def test_every_integer_has_an_upper_bound(kind: Any) -> None:
    assert all("maximum" in field for field in numbers_of(kind).values())
