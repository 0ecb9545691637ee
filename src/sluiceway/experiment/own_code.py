"""The user's own code, named in a recipe: "file.py:name", or "module:name" of what is installed.

A recipe that is read here, from a file or the command line, may name code of this machine. One that
came from elsewhere never may: see `refuse_code`.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import re
import shutil
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from sluiceway.errors import InputError, first_line, quoted

#: "folder/net.py:make", "package.module:make".
_CODE = re.compile(r"(?P<where>.+\.py|[A-Za-z_][\w.]*):(?P<name>[A-Za-z_]\w*)")
#: Keys whose values may be code.
CODE_KEYS: Final = ("model.name", "method.name", "run.metric")
#: Keys whose values are files or folders, relative to the recipe.
PATH_KEYS: Final = ("data.path", "data.test_path")
#: Keys whose values may be files or folders; a name of another kind stays.
MAYBE_PATH_KEYS: Final = ("model.name", "model.pretrained")


def is_code(value: Any) -> bool:
    """Whether a value of a recipe names code."""
    return isinstance(value, str) and _CODE.fullmatch(value) is not None


def short_name(value: str) -> str:
    """A value for people: of code the name alone."""
    return value.rpartition(":")[2] if is_code(value) else value


def code_file(value: Any) -> Path | None:
    """The file of the code that a value names; None for a module's, and for what is no code."""
    where = value.rpartition(":")[0] if is_code(value) else ""
    return Path(where) if where.endswith(".py") else None


def values_at(tables: Mapping[str, Any], keys: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """Of these dotted keys, those that a recipe's tables have, with their values."""
    for key in keys:
        table, _, name = key.partition(".")
        if isinstance(held := tables.get(table), Mapping) and name in held:
            yield key, held[name]


def changed(
    tables: Mapping[str, Any], keys: Iterable[str], change: Callable[[str, Any], Any]
) -> dict[str, Any]:
    """A copy of a recipe's tables with (key, value) -> value taken at these dotted keys."""
    found = {name: dict(t) if isinstance(t, Mapping) else t for name, t in tables.items()}
    for key, value in values_at(tables, keys):
        table, _, name = key.partition(".")
        found[table][name] = change(key, value)
    return found


def placed(key: str, value: Any, base: Path) -> Any:
    """A recipe's value with what it names found relative to the recipe's folder.

    Args:
        key: dotted, as "data.path"; of other keys values stay as they are.
        value: as it was written.
        base: the folder of the recipe; for values of the command line the working folder.
    """
    if isinstance(value, list | tuple):
        return type(value)(placed(key, each, base) for each in value)
    if not isinstance(value, str) or not value:
        return value
    if key in PATH_KEYS:
        return str((base / Path(value).expanduser()).absolute())
    if key in CODE_KEYS and (found := _CODE.fullmatch(value)):
        where = found["where"]
        if not where.endswith(".py"):
            file = base / f"{where.replace('.', '/')}.py"
            return f"{file.absolute()}:{found['name']}" if file.is_file() else value
        return f"{(base / Path(where).expanduser()).absolute()}:{found['name']}"
    if key in MAYBE_PATH_KEYS:
        there = base / value
        with contextlib.suppress(OSError):  # a name may be longer than any file's
            if ("/" in value or there.is_file()) and there.exists():
                return str(there.absolute())
    return value


def without_folders(tables: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's tables as others may see them: files and code by their names alone."""
    keys = (*PATH_KEYS, *CODE_KEYS, "model.pretrained")
    return changed(tables, keys, lambda key, value: _without_folder(value, key in PATH_KEYS))


def _without_folder(value: Any, path: bool) -> Any:
    if isinstance(value, list | tuple):
        return [_without_folder(each, path) for each in value]
    named = isinstance(value, str) and (path or is_code(value) or Path(value).is_absolute())
    return Path(value).name if named else value


def copy_code(tables: Mapping[str, Any], out: Path) -> list[str]:
    """Copy the files of the code that a recipe names into a folder; their names."""
    names = []
    for _, value in values_at(tables, CODE_KEYS):
        if (file := code_file(value)) is not None and file.name not in names:
            shutil.copy(file, out / file.name)
            names.append(file.name)
    return names


def load_code(key: str, value: str) -> Any:
    """What a value of a recipe names: a function or class. Runs the file that it is in.

    Args:
        key: of the recipe, for errors.
        value: see `is_code`.

    Raises:
        InputError: there is no such file, module or name, or running it fails.
    """
    found = _CODE.fullmatch(value)
    assert found is not None
    where, name = found["where"], found["name"]
    said = f"{key} = {quoted(value)}"
    path = Path(where)
    if where.endswith(".py") and not path.is_file():
        raise InputError(f"{said}: there is no file {path}")
    try:
        module = _module_of(path) if where.endswith(".py") else importlib.import_module(where)
    except (Exception, SystemExit) as error:
        raise InputError(f"{said}: {fault(error)}") from None
    if not hasattr(module, name):
        raise InputError(f"{said}: {path.name} has no {name}")
    return getattr(module, name)


def fault(error: BaseException) -> str:
    """What went wrong in the user's code, and in which line of which file."""
    frames = traceback.extract_tb(error.__traceback__)
    here = str(Path(__file__).parents[1])
    own = [f for f in frames if not f.filename.startswith((here, "<frozen"))]
    place = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {first_line(error)}{place}"


def _module_of(path: Path) -> ModuleType:
    """The file as a module, run once for each state of the file.

    Its folder is the last on `sys.path`, so that it may import its neighbours. Its name is its own
    where no other module has it, so that other processes can import it as well.
    """
    stat = path.stat()
    state = (str(path), stat.st_mtime_ns, stat.st_size)
    name = path.stem
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    known = sys.modules.get(name)
    if getattr(known, "__sluiceway__", (None,))[0] != str(path):
        spec = None if known else importlib.util.find_spec(name)
        if known or spec is None or spec.origin != str(path):
            name = f"{name}_{abs(hash(str(path))):x}"
            known = sys.modules.get(name)
    if known is not None and getattr(known, "__sluiceway__", None) == state:
        return known
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    module.__dict__["__sluiceway__"] = state
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def refuse_code(tables: Mapping[str, Any], *, own_model: bool = False) -> None:
    """Raise InputError for a recipe from elsewhere that names code.

    Args:
        own_model: the model is made by code of this machine, whatever the recipe names.
    """
    for key, value in values_at(tables, CODE_KEYS):
        if not is_code(value) or (own_model and key == "model.name"):
            continue
        hint = (
            "; the server names its own (start --model), a site in its file (model)"
            if key == "model.name"
            else ""
        )
        raise InputError(
            f"{key} = {quoted(short_name(str(value)))} is code of whoever wrote the recipe, "
            f"which is run nowhere else{hint}"
        )


def code_by_name(tables: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's tables with files of code by their names alone, as they are sent."""
    return changed(
        tables, CODE_KEYS, lambda _, value: Path(value).name if is_code(value) else value
    )
