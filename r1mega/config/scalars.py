"""What a value that was written is: one reading for files, the command line and the environment.

Numbers are decimal (`1_000`, `1e3`, `-2.5`), or hexadecimal (`0x10`). YAML 1.1 would read `010` as 8 and `1:30` as 90, and `1e3`
as a text: the first two are no numbers here, the third is.
"""

from __future__ import annotations

import re
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Union, get_args, get_origin

from pydantic_core import PydanticCustomError

_DIGITS = r"(?:0|[1-9](?:_?[0-9])*)"
INTEGER = re.compile(rf"[-+]?(?:{_DIGITS}|0x[0-9a-fA-F]+)")
FLOAT = re.compile(rf"[-+]?(?:{_DIGITS}(?:\.[0-9]*(?:[eE][-+]?[0-9]+)?|[eE][-+]?[0-9]+)|\.[0-9]+(?:[eE][-+]?[0-9]+)?)")


def as_meant(value: object, annotation: object) -> object:
    """A value of the type that a key has, from what was written for it: numbers from texts of digits (quoted, or an environment
    variable's), paths with `~` replaced. The rest as it is, for pydantic to judge.

    Raises PydanticCustomError for truth values where numbers are wanted, numbers where truth values are, and texts that are no
    number (`010`, `1:30`).
    """
    kinds = list(_alternatives(annotation))
    if isinstance(value, list | tuple):
        inner = next((get_args(kind) for kind in kinds if get_origin(kind) in (tuple, list)), ())
        return [as_meant(one, inner[0]) for one in value] if inner and inner[-1:] in ((...,), inner[:1]) else value
    if isinstance(value, Mapping):
        inner = next((get_args(kind) for kind in kinds if get_origin(kind) is dict), ())
        return {name: as_meant(one, inner[1]) for name, one in value.items()} if inner else value
    if value is None and Path in kinds and type(None) not in kinds:
        raise PydanticCustomError("home", "must be a path, not null; YAML reads a lone ~ so, the home directory is ~/")
    is_number = not {int, float}.isdisjoint(kinds)
    if isinstance(value, bool):
        if (word := "on" if value else "off") in _words(annotation):
            return word  # YAML takes these for truth values
        if is_number and bool not in kinds:
            raise PydanticCustomError("number", "must be a number, not true or false")
    elif isinstance(value, int | float):
        if bool in kinds and not is_number:
            raise PydanticCustomError("truth_value", "must be true or false, not a number")
    elif isinstance(value, str | Path) and Path in kinds and str not in kinds:
        return _path(Path(value))
    elif isinstance(value, str) and is_number and str not in kinds:
        return _number(value)
    return value


def _alternatives(annotation: object) -> list[object]:
    """The types of a union, without what `Annotated` adds to them."""
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [kind for one in get_args(annotation) for kind in _alternatives(one)]
    if get_origin(annotation) is Literal:
        return [type(one) for one in get_args(annotation)]
    return [annotation]


def _words(annotation: object) -> tuple[object, ...]:
    """The values that a key can have, where they are listed."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    if get_origin(annotation) in (Union, types.UnionType, Annotated):
        return tuple(word for one in get_args(annotation) for word in _words(one))
    return ()


def _number(text: str) -> int | float:
    plain = text.strip().replace("_", "")
    if INTEGER.fullmatch(text.strip()):
        return int(plain, 0)
    if FLOAT.fullmatch(text.strip()):
        return float(plain)
    if re.fullmatch(r"[-+]?0o?[0-9_]+", text.strip()):
        raise PydanticCustomError("number", "must be a decimal number: octal ones and leading zeros are not read")
    raise PydanticCustomError("number", "must be a valid number")


def _path(path: Path) -> Path:
    if not str(path).startswith("~"):
        return path
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise PydanticCustomError("home", "there is no such home directory") from error
