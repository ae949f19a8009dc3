"""Rational value of a constant expression, exactly, within limits of size; names that occur in an expression."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

from r1mega.reward.expression.nodes import (
    CONSTANTS,
    FREE_FUNCTIONS,
    Function,
    Negative,
    Node,
    Number,
    Percent,
    Power,
    Product,
    Quotient,
    Ratio,
    Sum,
    Symbol,
    Text,
    walk,
)

MAX_EXPONENT = 100_000
MAX_EXACT_BITS = 4096


class NotRationalError(ValueError):
    """The expression is not rational in its symbols."""


class UndefinedError(ValueError):
    """The expression has no value here (division by zero, too large, unknown meaning)."""


class TooLargeError(UndefinedError):
    """A number too large to be an answer."""


def symbols(node: Node) -> frozenset[str]:
    """Names of the free symbols, of texts ("text:...") and of unknown functions ("f()")."""
    names = set()
    for part in walk(node):
        if isinstance(part, (Symbol, Text)):
            names.add(part.name)
        elif isinstance(part, Function) and part.name in FREE_FUNCTIONS:
            names.add(part.name + "()")
    return frozenset(names - CONSTANTS)


def exact(node: Node) -> Fraction | None:
    """The rational value of a constant expression, None when it has none or it is too large to be written."""
    try:
        return exact_or_raise(node)
    except (UndefinedError, NotRationalError, ZeroDivisionError):
        return None


def exact_or_raise(node: Node) -> Fraction:
    """The rational value. Raises NotRationalError, ZeroDivisionError and UndefinedError (TooLargeError too)."""
    match node:
        case Number(value):
            pass
        case Negative(item):
            value = -exact_or_raise(item)
        case Sum(items):
            value = sum(map(exact_or_raise, items), Fraction(0))
        case Product(left, right):
            value = exact_or_raise(left) * exact_or_raise(right)
        case Quotient(left, right) | Ratio((left, right)):
            value = exact_or_raise(left) / exact_or_raise(right)
        case Power(base, exponent):
            value = _exact_power(exact_or_raise(base), exact_or_raise(exponent))
        case Percent(item):
            value = exact_or_raise(item) / 100
        case Function(name, arguments) if name in INTEGER_FUNCTIONS:
            value = INTEGER_FUNCTIONS[name](*map(exact_or_raise, arguments))
        case _:
            raise NotRationalError(type(node).__name__)
    if value.numerator.bit_length() + value.denominator.bit_length() > MAX_EXACT_BITS:
        raise TooLargeError("too large")
    return value


def _exact_power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        if base < 0 or exponent.denominator > 64:
            raise NotRationalError("root")
        root = Fraction(
            _integer_root(base.numerator, exponent.denominator), _integer_root(base.denominator, exponent.denominator)
        )
        return _exact_power(root, Fraction(exponent.numerator))
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if abs(exponent) > MAX_EXPONENT or bits * abs(exponent) > MAX_EXACT_BITS:
        raise TooLargeError("too large")
    return base**exponent.numerator


def _integer_root(value: int, degree: int) -> int:
    guess = math.isqrt(value) if degree == 2 else round(value ** (1 / degree)) if value.bit_length() < 1000 else -1
    if guess < 0 or guess**degree != value:
        raise NotRationalError("root")
    return guess


def _factorial(value: Fraction) -> Fraction:
    if value.denominator != 1 or not 0 <= value <= 400:
        raise UndefinedError("factorial")
    return Fraction(math.factorial(value.numerator))


def _binomial(n: Fraction, k: Fraction) -> Fraction:
    if n.denominator != 1 or k.denominator != 1 or not 0 <= k <= n <= 2000:
        raise UndefinedError("binomial")
    return Fraction(math.comb(n.numerator, k.numerator))


def _arrangements(n: Fraction, k: Fraction) -> Fraction:
    if n.denominator != 1 or k.denominator != 1 or not 0 <= k <= n <= 400:
        raise UndefinedError("arrangements")
    return Fraction(math.perm(n.numerator, k.numerator))


def _integers(function: Callable[..., int]) -> Callable[..., Fraction]:
    def apply(*values: Fraction) -> Fraction:
        if any(value.denominator != 1 for value in values):
            raise UndefinedError("not an integer")
        return Fraction(function(*(value.numerator for value in values)))

    return apply


INTEGER_FUNCTIONS: dict[str, Callable[..., Fraction]] = {
    "!": _factorial,
    "binom": _binomial,
    "perm": _arrangements,
    "abs": abs,
    "floor": lambda v: Fraction(math.floor(v)),
    "ceil": lambda v: Fraction(math.ceil(v)),
    "gcd": _integers(math.gcd),
    "lcm": _integers(math.lcm),
    "max": max,
    "min": min,
}
