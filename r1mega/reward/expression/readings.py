"""The ways in which one cleaned answer can be read: thousands or lists, repeating decimals, with its unit taken off."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

from r1mega.reward.expression.exact import exact
from r1mega.reward.expression.nodes import Node, Number, Product
from r1mega.reward.expression.parse import parse
from r1mega.reward.expression.text import other_thousands
from r1mega.reward.expression.tokens import UnreadableError
from r1mega.reward.expression.units import Quantity, split_unit
from r1mega.reward.expression.values import is_numeral

_VALUE_OF_SOMETHING = re.compile(
    r"(?:[^=<>_]|_\{[^{}]*\}|_)*[A-Za-z](?:[^=<>_]|_\{[^{}]*\}|_)*=([^=<>A-Za-z]*(?:\\(?:frac|sqrt|pi|cdot|times)[^=<>A-Za-z]*)*)"
)
_DECIMAL_DOTS = re.compile(r"(\.\d+)\.\.\.$")
_GOES_ON = re.compile(r"(-?)(\d*\.\d*?)(?:(\d)\3{2,}\.\.\.|(\d{2,12})\4+\.\.\.|\((\d{1,12})\))")


class Reading(NamedTuple):
    """node: None where the text cannot be read. text: what was read, empty when a factor was put to it."""

    node: Node | None
    text: str


def measured(text: str, sign: str | None) -> Quantity:
    """The text apart from its unit; `sign` is the unit where the text names none."""
    quantity = split_unit(text)
    return quantity if quantity.unit is not None or sign is None else Quantity(quantity.body, sign, quantity.scale)


def readings(text: str, quantity: Quantity, factor: Fraction, lenient: bool = False) -> list[Reading]:
    """The text parsed in each way it can be meant (`70,110` is a number and a list); None where it cannot be read.
    lenient: then the value of `what cannot be read = value`.
    """
    body = quantity.body
    factor *= quantity.scale
    results: list[Reading] = []
    versions = [(body, join) for join in ((True, False) if re.search(r"\d,\d{3}", body) else (True,))]
    if re.search(r"\d[.,']\d", body) and (other := other_thousands(body)) is not None:
        versions.append((other, True))
    for version, join in versions:
        try:
            node = _repeating(version) or parse(_DECIMAL_DOTS.sub(r"\1", version), join)
            if factor != 1:
                value = exact(node) if is_numeral(node) else None
                node = Product(node, Number(factor)) if value is None else Number(value * factor)
            results.append(Reading(node, version if factor == 1 else ""))
        except UnreadableError as error:
            if error.final:
                raise
    if not results and lenient and (match := _VALUE_OF_SOMETHING.fullmatch(body)):
        return readings(match[1], Quantity(match[1], quantity.unit, quantity.scale), factor / quantity.scale)
    return results or [Reading(None, text)]


def _repeating(body: str) -> Node | None:
    """0.333..., 0.1212... (one digit written three times, several twice) and 0.(3) go on for ever."""
    match = _GOES_ON.fullmatch(body)
    if not match:
        return None
    sign, start, *periods = match.groups()
    period = next(filter(None, periods))
    value = Fraction(start) + Fraction(int(period), 10 ** len(start.partition(".")[2]) * (10 ** len(period) - 1))
    return Number(-value if sign else value)
