"""Rational value of a constant expression, exactly, within limits of size; names and kinds that occur in an
expression.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

from r1mega.reward.expression.nodes import Node

MAX_EXPONENT = 100_000
MAX_EXACT_BITS = 4096


class NotRationalError(ValueError):
    """The expression is not rational in its symbols."""


class UndefinedError(ValueError):
    """The expression has no value here (division by zero, too large, unknown meaning)."""


class TooLargeError(UndefinedError):
    """A number too large to be an answer."""


def symbols(node: Node) -> frozenset[str]:
    """Names of the free symbols; pi, e, i and infinity are constants."""
    return frozenset(walk_symbols(node)) - {"\\pi", "e", "i", "\\infty"}


def walk_symbols(node: Any) -> Iterator[str]:
    """Names of symbols, of texts ("text:...") and of unknown functions ("f()"), as often as they occur."""
    if isinstance(node, tuple) and node:
        if node[0] == "sym":
            yield node[1]
        elif node[0] == "text":
            yield "text:" + node[1].casefold()
        elif node[0] == "fn":
            if node[1] in "fghFGPQ":
                yield node[1] + "()"
            yield from itertools.chain.from_iterable(map(walk_symbols, node[2]))
        else:
            for child in node[1:]:
                for item in (
                    child if isinstance(child, tuple) and (not child or isinstance(child[0], tuple)) else (child,)
                ):
                    yield from walk_symbols(item)


def node_tags(node: Any) -> frozenset[str]:
    """Kinds of nodes that occur in an expression."""
    if not isinstance(node, tuple) or not node:
        return frozenset()
    own = frozenset((node[0],)) if isinstance(node[0], str) else node_tags(node[0])
    return own.union(*(node_tags(child) for child in node[1:]))


def exact(node: Node) -> Fraction | None:
    """The rational value of a constant expression, None when it has none or it is too large to be written."""
    try:
        return exact_or_raise(node)
    except (UndefinedError, NotRationalError, ZeroDivisionError):
        return None


def exact_or_raise(node: Node) -> Fraction:
    """The rational value. Raises NotRationalError, ZeroDivisionError and UndefinedError (TooLargeError too)."""
    tag = node[0]
    if tag == "num":
        value = node[1]
    elif tag == "neg":
        value = -exact_or_raise(node[1])
    elif tag == "add":
        value = sum(map(exact_or_raise, node[1]), Fraction(0))
    elif tag == "mul":
        value = exact_or_raise(node[1][0]) * exact_or_raise(node[1][1])
    elif tag == "div" or (tag == "ratio" and len(node[1]) == 2):
        left, right = node[1:] if tag == "div" else node[1]
        value = exact_or_raise(left) / exact_or_raise(right)
    elif tag == "pow":
        value = _exact_power(exact_or_raise(node[1]), exact_or_raise(node[2]))
    elif tag == "pct":
        value = exact_or_raise(node[1]) / 100
    elif tag == "fn" and node[1] in INTEGER_FUNCTIONS:
        value = INTEGER_FUNCTIONS[node[1]](*map(exact_or_raise, node[2]))
    else:
        raise NotRationalError(tag)
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


def _integers(function: Callable[..., int]) -> Callable[..., Fraction]:
    def apply(*values: Fraction) -> Fraction:
        if any(value.denominator != 1 for value in values):
            raise UndefinedError("not an integer")
        return Fraction(function(*(value.numerator for value in values)))

    return apply


INTEGER_FUNCTIONS: dict[str, Callable[..., Fraction]] = {
    "!": _factorial,
    "binom": _binomial,
    "abs": abs,
    "floor": lambda v: Fraction(math.floor(v)),
    "ceil": lambda v: Fraction(math.ceil(v)),
    "gcd": _integers(math.gcd),
    "lcm": _integers(math.lcm),
    "max": max,
    "min": min,
}
