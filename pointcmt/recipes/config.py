"""Options as dataclasses, checked: from YAML, JSON and the command line, every value against its type.

One rule for all three sources: an unknown name, a value of another type, one that is not among a
``Literal``'s choices or a number that is not finite is an error that names where it stands, what was given
and what is expected. cattrs does the work; the hooks below make it strict (it would convert otherwise).
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import cattrs
import yaml
from cattrs.errors import BaseValidationError, ForbiddenExtraKeysError

from pointcmt.checkpoint import atomic_write

T = TypeVar("T")
_LARGEST_YAML = 20_000  # nodes, aliases followed
_converter = cattrs.Converter(forbid_extra_keys=True)


def _wrong(value: Any, expected: str) -> ValueError:
    given = repr(value)
    return ValueError(f"is {given if len(given) < 60 else given[:57] + '…'}; expected {expected}")


def _number(value: Any, _: Any) -> float:
    if isinstance(value, str):  # YAML reads 1e-3 as a string
        try:
            value = float(value)
        except ValueError:
            raise _wrong(value, "a number") from None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong(value, "a number")
    if not math.isfinite(value):
        raise _wrong(value, "a finite number")
    return float(value)


def _exactly(kind: type, words: str) -> Any:
    def hook(value: Any, _: Any) -> Any:
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise _wrong(value, words)
        return value

    return hook


def _path(value: Any, _: Any) -> Path:
    if not isinstance(value, str | os.PathLike) or not str(value):
        raise _wrong(value, "a path")
    return Path(value)


def _choice(value: Any, kind: Any) -> Any:
    choices = typing.get_args(kind)
    if value not in choices or type(value) is not type(choices[choices.index(value)]):
        raise _wrong(value, f"one of {', '.join(map(str, choices))}")
    return value


def _items(kind: Any) -> Any:
    inner = typing.get_args(kind)[0]

    def hook(value: Any, _: Any) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple):
            raise _wrong(value, "a list")
        return tuple(_converter.structure(item, inner) for item in value)

    return hook


for _type, _hook in (
    (float, _number),
    (int, _exactly(int, "a whole number")),
    (bool, _exactly(bool, "true or false")),
    (str, _exactly(str, "text")),
    (Path, _path),
):
    _converter.register_structure_hook(_type, _hook)
_converter.register_structure_hook_func(lambda kind: typing.get_origin(kind) is Literal, _choice)
_converter.register_structure_hook_factory(
    lambda kind: typing.get_origin(kind) is tuple and typing.get_args(kind)[1:] == (...,), _items
)


def structure(value: Any, kind: type[T], where: str) -> T:
    """``value``, plain JSON or YAML types, as ``kind``: a dataclass of options, or ``dict[str, float]`` …

    Raises:
        ValueError: what is wrong, one line for each mistake, each with its place below ``where``.
    """
    try:
        return _converter.structure(value, kind)
    except Exception as error:
        raise ValueError("\n".join(_mistakes(error, where))) from error


def _mistakes(error: BaseException, where: str) -> list[str]:
    if not isinstance(error, BaseValidationError):
        if isinstance(error, ForbiddenExtraKeysError):
            known = ", ".join(item.name for item in dataclasses.fields(error.cl))
            names = ", ".join(map(repr, sorted(map(str, error.extra_fields))))
            return [f"{where}: there is no option {names}; expected one of {known}"]
        return [f"{where} {error}" if str(error).startswith("is ") else f"{where}: {error}"]
    found, others = error.group_exceptions()  # type: ignore[attr-defined]
    said = []
    for one, note in found:
        name = getattr(note, "name", None)
        said += _mistakes(one, f"{where}.{name}" if name is not None else f"{where}[{note.index!r}]")
    return said + [line for one in others for line in _mistakes(one, where)]


def override(base: T, values: Mapping[str, Any] | None, where: str) -> T:
    """A copy of a dataclass of options with some fields changed, nested ones by nested mappings.

    Raises:
        ValueError: an unknown field, or a value that it cannot have.
    """
    if values is None:
        return copy.deepcopy(base)
    return structure(_merged(plain(base), values, where), type(base), where)


def _merged(base: dict[str, Any], values: Any, where: str) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} is {values!r}; expected a mapping of options")
    made = dict(base)
    for name, value in values.items():
        inner = base.get(name)
        if not isinstance(inner, dict):
            made[name] = value
        elif value is not None:
            made[name] = _merged(inner, value, f"{where}.{name}")
    return made


def restore(base: T, values: Mapping[str, Any], where: str) -> T:
    """``base`` with what a file of this or another version says; names that are not known here are left out.

    Raises:
        ValueError: a value that its option cannot have.
    """
    known = {item.name for item in dataclasses.fields(base)}  # type: ignore[arg-type]
    return override(base, {name: value for name, value in values.items() if name in known}, where)


def plain(value: Any) -> Any:
    """``value`` as plain JSON types: dataclasses and mappings as objects, paths as strings."""
    return json.loads(json.dumps(value, default=_as_json))


def _as_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, set | frozenset | Mapping):
        return dict(value) if isinstance(value, Mapping) else sorted(value)
    if hasattr(value, "item"):  # a numpy or torch scalar
        return value.item()
    return str(value)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, default=_as_json) + "\n", encoding="utf-8")


_DAMAGED = (
    "it was damaged, or changed by hand: copy it again from where it was made, or delete its run folder and "
    "start the run again"
)


def check_seeds(values: Mapping[str, Any]) -> None:
    """Seeds, at any depth of plain options, are what all generators of random numbers take.

    Raises:
        ValueError: one is not from 0 to 2³² − 1.
    """
    for name, value in values.items():
        if isinstance(value, Mapping):
            check_seeds(value)
        elif name.endswith("seed") and isinstance(value, int) and not 0 <= value < 2**32:
            raise ValueError(
                f"--{name.replace('_', '-')} is {value}; expected at least 0, and less than 2**32 = {2**32}"
            )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; a ValueError that names the file where it is not one."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); {_DAMAGED}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}; expected a JSON object; {_DAMAGED}")
    return value


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, no mapping, a name that stands twice, or one that grows out of all measure by
            its aliases.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no configuration at {path}")
    try:
        text = path.read_text(encoding="utf-8")
        _check_nodes(yaml.compose(text, yaml.SafeLoader), path)
        value = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {value!r:.60}; expected a mapping of sections")
    return value


def _check_nodes(root: yaml.Node | None, path: Path) -> None:
    waiting, count = [root] if root is not None else [], 0
    while waiting:
        node = waiting.pop()
        count += 1
        if count > _LARGEST_YAML:
            raise ValueError(
                f"{path} has more than {_LARGEST_YAML} values when its aliases (*name) are written out; "
                "expected a configuration of a few hundred"
            )
        if isinstance(node, yaml.MappingNode):
            names: set[str] = set()
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode):
                    if key.value in names:
                        line = key.start_mark.line + 1
                        raise ValueError(f"{path}, line {line}: {key.value!r} stands twice in one mapping")
                    names.add(key.value)
                waiting += [key, value]
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value
