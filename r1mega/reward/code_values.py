"""Values of a code task's record as other tools write them: JSON in a text, packed tests, limits with their units.

Each raises DataError with `where`, which names file, line and key.
"""

from __future__ import annotations

import ast
import base64
import binascii
import io
import json
import math
import pickle
import re
import reprlib
import zlib
from collections.abc import Mapping
from decimal import Decimal

from r1mega.errors import DataError

_DIGITS = 4300  # CPython reads and writes longer integers only when it is told to
LONG_NUMBER = re.compile(rf"\d{{{_DIGITS},}}")
_BLANK = " \t\r\n\ufeff"
_MOST_LAYERS = 3  # of JSON in a text in a text
_QUANTITY = re.compile(r"\s*(\d+(?:\.\d*)?)\s*([a-z]*)\.?(?:\s+per\s+test(?:\s+case)?)?\s*", re.IGNORECASE)
_SECONDS = {"": 1.0, "s": 1.0, "sec": 1.0, "secs": 1.0, "second": 1.0, "seconds": 1.0}
_SECONDS |= {"ms": 1e-3, "msec": 1e-3, "millisecond": 1e-3, "milliseconds": 1e-3}
_MEGABYTES = {"": 1.0, "mb": 1.0, "mib": 1.0, "megabyte": 1.0, "megabytes": 1.0}
_MEGABYTES |= {
    "gb": 1024.0,
    "gib": 1024.0,
    "gigabyte": 1024.0,
    "gigabytes": 1024.0,
    "kb": 1 / 1024,
    "kilobytes": 1 / 1024,
}


class _Shown(reprlib.Repr):
    """CPython refuses to write an integer of more than 4300 digits."""

    def repr_int(self, x: int, level: int) -> str:
        return f"<an integer of {x.bit_length()} bits>" if abs(x) >> 8000 else super().repr_int(x, level)


shown = _Shown().repr
"""A value in an error: short, whatever it is."""


def parse_json(text: str | bytes) -> object:
    """json.loads for integers of any length. Raises ValueError, for what is nested too deeply too."""
    try:
        return json.loads(text, parse_int=lambda digits: int(digits if len(digits) < _DIGITS else Decimal(digits)))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def as_data(value: object) -> object:
    """The list, object or text that a text holds as JSON or as a Python literal; any other value as it is."""
    for _ in range(_MOST_LAYERS):
        if not isinstance(value, str) or value.lstrip(_BLANK)[:1] not in ("[", "{", '"'):
            return value
        try:
            found = parse_json(value.lstrip(_BLANK))
        except ValueError:
            try:
                found = ast.literal_eval(value.strip(_BLANK))
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                return value
        if not isinstance(found, list | dict | str):
            return value
        value = found
    return value


def as_text(value: object, where: str) -> str:
    """Standard input or output: a text, a number, or lines of these (as APPS has them)."""
    if isinstance(value, list) and not any(isinstance(line, list) for line in value):
        return "\n".join(as_text(line, where) for line in value)
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(Decimal(value)) if abs(value) >> 8000 else str(value)
    if isinstance(value, float) and math.isfinite(value):
        return str(value)
    raise DataError(f"{where} must be a text, or a list of lines, found {shown(value)}")


def python_source(value: object, where: str) -> str:
    """Trusted code of the record, which must at least be Python."""
    if not isinstance(value, str):
        raise DataError(f"{where} must be a text, found {shown(value)}")
    try:
        ast.parse(LONG_NUMBER.sub("0", value))  # the sandbox reads integers of any length
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise DataError(f"{where}: not Python ({error})") from error
    return value


def json_value(text: str, where: str) -> object:
    """An argument or result of a function call, read from JSON. DataError, with the place, for what is none."""
    try:
        return parse_json(text)
    except ValueError as error:
        raise DataError(f"{where} of a function call must be JSON ({error}), found {shown(text)}") from error


def arguments_of(value: object, where: str) -> tuple[object, ...]:
    """Of one call. APPS: a list, where the keys of a first object are integers if they can be (JSON has texts alone).
    lcb_runner: a text, a JSON value a line.
    """
    if isinstance(value, str):
        return tuple(json_value(line, where) for line in value.split("\n") if line.strip())
    if not isinstance(value, list):
        raise DataError(f"{where} must be a list of arguments, or a text with one a line, found {shown(value)}")
    if value and isinstance(first := value[0], dict) and first and all(re.fullmatch(r"-?\d{1,18}", k) for k in first):
        return ({int(key): item for key, item in first.items()}, *value[1:])
    return tuple(value)


def is_given(value: object) -> bool:
    """Whether a limit says anything: tables have "" and "None" for none."""
    return value is not None and not (isinstance(value, str) and value.strip().lower() in ("", "none", "null"))


def seconds(value: object, where: str) -> float:
    """A number, "2 seconds" (TACO), "1.5 seconds per test" (Codeforces), or {"seconds", "nanos"} (code_contests)."""
    value = as_data(value)
    if isinstance(value, Mapping):
        parts = [value.get("seconds") or 0, value.get("nanos") or 0]
        if all(isinstance(part, int | float) for part in parts):
            return _quantity(parts[0] + parts[1] / 1e9, {}, 1e6, where)
    return _quantity(value, _SECONDS, 1e6, where)


def megabytes(value: object, most: float, where: str) -> float:
    """A number of the key's own unit, or "256 megabytes" (TACO)."""
    return _quantity(value, _MEGABYTES, most, where)


def _quantity(value: object, units: Mapping[str, float], most: float, where: str) -> float:
    number = value
    if isinstance(value, str) and (found := _QUANTITY.fullmatch(value)) and found[2].lower() in units:
        number = float(found[1]) * units[found[2].lower()]
    if not isinstance(number, int | float) or isinstance(number, bool) or not 0 < number < most:
        raise DataError(f"{where} must be a positive number, found {shown(value)}")
    return float(number)


# --- packed tests -----------------------------------------------------------------------------------------------------


class _TextUnpickler(pickle.Unpickler):
    """A pickle may name any function to call: none is allowed here, the files hold one text."""

    def find_class(self, module: str, name: str) -> object:
        raise pickle.UnpicklingError(f"a pickle that wants {module}.{name} is not test cases")


def packed_tests(value: object, where: str) -> object:
    """Tests as they are, as JSON in a text, or as LiveCodeBench packs that text: pickled, deflated, in base 64."""
    if not isinstance(value, str):
        return value
    try:
        if isinstance(data := as_data(value), list | dict):
            return data
        text: object = value
        if value.lstrip(_BLANK)[:1] not in ("[", "{"):
            text = _TextUnpickler(io.BytesIO(zlib.decompress(base64.b64decode(value, validate=True)))).load()
        if not isinstance(text, str | bytes):
            raise ValueError(f"holds a {type(text).__name__}, not a text")
        return parse_json(text)
    except (ValueError, binascii.Error, zlib.error, pickle.UnpicklingError, EOFError) as error:
        raise DataError(f"{where} is neither JSON nor packed JSON ({error})") from error
