"""Numerical identity testing: two expressions are equal when they agree at random points (Schwartz-Zippel).

Rational expressions are evaluated exactly in a prime field (pi and e as random elements, i as a root of -1), so that
no tolerance is involved. The others are evaluated in doubles to tell different ones apart at once, and confirmed with
60 digits more than their smallest and largest terms are apart when they agree.
"""

from __future__ import annotations

import cmath
import hashlib
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import lru_cache
from typing import Any

from r1mega.reward.expression.exact import (
    INTEGER_FUNCTIONS,
    MAX_EXPONENT,
    NotRationalError,
    TooLargeError,
    UndefinedError,
    exact,
    exact_or_raise,
    symbols,
)
from r1mega.reward.expression.nodes import (
    FREE_FUNCTIONS,
    INFINITY,
    MINUS_INFINITY,
    Degrees,
    E,
    Function,
    I,
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

PRIME = 2**96 - 87  # = 1 mod 4, so that -1 has a root
ROOT_OF_MINUS_ONE = 64928858663283645567976659563
CONFIRM_DIGITS = 64
MAX_DIGITS = 4096
MAX_FACTORIAL = 20_000  # in the prime field, where it takes so many steps
NUM_POINTS = 3
_COARSE = 1e-7  # tolerance of doubles, relative or absolute: they only reject
_GUARD_DIGITS = 20  # of those that confirm: what rounding may have spoilt


# --- prime field ------------------------------------------------------------
@lru_cache(maxsize=4096)
def _random_element(name: str, point: int) -> int:
    return (
        int.from_bytes(
            hashlib.blake2b(f"{name}/{point}".encode("utf-8", "surrogatepass"), digest_size=12).digest(), "big"
        )
        % PRIME
    )


def _modular(node: Node, point: int) -> int:
    match node:
        case Number(value):
            return _residue(value)
        case Symbol("\\infty"):
            raise NotRationalError("infinity")
        case Symbol("i"):
            return ROOT_OF_MINUS_ONE
        case Symbol() | Text():
            return _random_element(node.name, point)
        case Negative(item):
            return -_modular(item, point) % PRIME
        case Sum(items):
            return sum(_modular(item, point) for item in items) % PRIME
        case Product(left, right):
            return _modular(left, point) * _modular(right, point) % PRIME
        case Quotient(top, bottom):
            return _modular(top, point) * _inverse(_modular(bottom, point)) % PRIME
        case Power(base, exponent):
            power = exact_or_raise(exponent)
            if power.denominator != 1 or base == E and abs(power) > MAX_EXPONENT:
                raise NotRationalError("root")
            residue = _modular(base, point)
            return pow(residue if power >= 0 else _inverse(residue), abs(power.numerator), PRIME)
        case Percent(item):
            return _modular(item, point) * pow(100, -1, PRIME) % PRIME
        case Function(name, arguments) if name in FREE_FUNCTIONS:
            residues = ",".join(str(_modular(item, point)) for item in arguments)
            return _random_element(f"{name}({residues})", point)
        case Function("!" | "binom" | "perm" as name, arguments):
            return _modular_factorials(name, [exact_or_raise(item) for item in arguments])
        case Function(name) if name in INTEGER_FUNCTIONS:
            return _residue(exact_or_raise(node))
        case Degrees(item):
            return _modular(item, point) * _random_element("\\pi", point) * pow(180, -1, PRIME) % PRIME
        case _:
            raise NotRationalError(type(node).__name__)


def _residue(value: Fraction) -> int:
    if value.denominator == 1:
        return value.numerator % PRIME
    return value.numerator * pow(value.denominator, -1, PRIME) % PRIME


def _modular_factorials(name: str, numbers: list[Fraction]) -> int:
    """n!, n over k, n! / (n - k)! of numbers whose factorials are too large to be written."""
    whole = [number.numerator for number in numbers if number.denominator == 1 and 0 <= number <= MAX_FACTORIAL]
    if len(whole) < len(numbers) or (len(whole) == 2 and whole[1] > whole[0]):
        raise UndefinedError(name)
    top, *below = whole
    value = _factorial_residue(top)
    if below:
        value = value * _inverse(_factorial_residue(top - below[0])) % PRIME
    return value * _inverse(_factorial_residue(below[0])) % PRIME if name == "binom" else value


@lru_cache(maxsize=1024)
def _factorial_residue(number: int) -> int:
    value = 1
    for factor in range(2, number + 1):
        value = value * factor % PRIME
    return value


def _inverse(value: int) -> int:
    if value == 0:
        raise UndefinedError("division by zero")
    return pow(value, -1, PRIME)


# --- numbers ------------------------------------------------------------
def _real(value: Any) -> float:
    if abs(value.imag) > 1e-12 * max(1.0, abs(value.real)):
        raise UndefinedError("not real")
    return value.real


class _Doubles:
    """Python complex numbers."""

    pi, e, i = cmath.pi, cmath.e, 1j
    functions: dict[str, Callable[..., Any]] = {
        "sin": cmath.sin,
        "cos": cmath.cos,
        "tan": cmath.tan,
        "arcsin": cmath.asin,
        "arccos": cmath.acos,
        "arctan": cmath.atan,
        "sinh": cmath.sinh,
        "cosh": cmath.cosh,
        "tanh": cmath.tanh,
        "ln": cmath.log,
        "exp": cmath.exp,
    }

    def number(self, value: Fraction) -> complex:
        return complex(float(value))

    def note(self, value: complex) -> None:
        """What `_Digits` wants to know of every part; a double has its digits."""

    def floor(self, value: complex) -> int:
        return math.floor(_real(value) + 1e-9)

    def factorial(self, value: complex) -> complex:
        return complex(math.gamma(_real(value) + 1))


class _Digits:
    """mpmath at a number of digits."""

    def __init__(self, digits: int) -> None:
        import mpmath

        self.above = self.below = 0  # digits above and below 1 of the largest and of the smallest value met
        self.context = context = mpmath.mp.clone()
        context.dps = digits
        self.pi, self.e, self.i = context.pi + 0, context.e + 0, context.mpc(0, 1)
        self.functions = {
            "sin": context.sin,
            "cos": context.cos,
            "tan": context.tan,
            "arcsin": context.asin,
            "arccos": context.acos,
            "arctan": context.atan,
            "sinh": context.sinh,
            "cosh": context.cosh,
            "tanh": context.tanh,
            "ln": context.log,
            "exp": context.exp,
        }

    def number(self, value: Fraction) -> Any:
        return self.context.mpf(value.numerator) / value.denominator

    def factorial(self, value: Any) -> Any:
        return self.context.gamma(_real(value) + 1)

    def floor(self, value: Any) -> int:
        return int(self.context.floor(_real(value) + self.context.mpf(10) ** -30))

    def note(self, value: Any) -> None:
        if value != 0 and self.context.isfinite(value):
            place = math.ceil(self.context.mag(value) * 0.302)
            self.above, self.below = max(self.above, place), max(self.below, -place)


_DOUBLES = _Doubles()


@lru_cache(maxsize=16)
def _digits(count: int) -> _Digits:
    return _Digits(count)


_RECIPROCALS = {"cot": "tan", "sec": "cos", "csc": "sin", "arccot": "arctan"}


def _numeric(node: Node, field: Any, values: dict[str, Fraction], log_base: int | None) -> Any:
    def of(child: Node) -> Any:
        value = _numeric(child, field, values, log_base)
        field.note(value)
        return value

    match node:
        case Number(value):
            return field.number(value)
        case Symbol() | Text():
            constant = {"\\pi": field.pi, "e": field.e, "i": field.i}.get(node.name)
            if constant is None and node.name not in values:
                raise UndefinedError(node.name)
            return field.number(values[node.name]) if constant is None else constant
        case Negative(item):
            return -of(item)
        case Sum(items):
            return sum(map(of, items))
        case Product(left, right):
            return of(left) * of(right)
        case Quotient(left, right) | Ratio((left, right)):
            return of(left) / of(right)
        case Power():
            return _numeric_power(node, of)
        case Percent(item):
            return of(item) / 100
        case Degrees(item):
            return of(item) * field.pi / 180
        case Function():
            return _numeric_function(node, field, of, log_base)
        case _:
            raise UndefinedError(f"no value of a {type(node).__name__}")


def _numeric_power(node: Power, of: Callable[[Node], Any]) -> Any:
    exponent = exact(node.exponent)
    base = of(node.base) + 0  # no negative zero: it would choose the other root of a negative number
    if exponent is None:
        return base ** of(node.exponent)
    if abs(exponent) > MAX_EXPONENT:
        raise TooLargeError("too large")
    if exponent.denominator == 1:
        return base**exponent.numerator
    if exponent.denominator % 2 and base.imag == 0 and base.real < 0:  # real odd roots: \sqrt[3]{-8} = -2
        return (-1) ** exponent.numerator * (-base) ** of(node.exponent)
    return base ** of(node.exponent)


def _numeric_function(node: Function, field: Any, of: Callable[[Node], Any], log_base: int | None) -> Any:
    name, arguments = node.name, [of(argument) for argument in node.arguments]
    if name in ("log", "lg"):
        base = field.number(Fraction(10)) if name == "lg" else arguments[1] if len(arguments) > 1 else log_base
        value = field.functions["ln"](arguments[0])
        return (
            value
            if base is None
            else value / field.functions["ln"](base + 0j if isinstance(base, float | int) else base)
        )
    if name in FREE_FUNCTIONS:
        seed = ",".join(f"{complex(a):.9g}" for a in arguments)
        return field.number(Fraction(_random_element(f"{name}({seed})", 0), PRIME) + 1)
    if name in _RECIPROCALS:
        inner = _RECIPROCALS[name]
        return (
            field.functions[inner](1 / arguments[0]) if name == "arccot" else 1 / field.functions[inner](arguments[0])
        )
    if name == "abs":
        return abs(arguments[0]) + 0 * arguments[0]
    if name in ("floor", "ceil"):
        return field.number(Fraction(field.floor(arguments[0]) if name == "floor" else -field.floor(-arguments[0])))
    if name in field.functions and len(arguments) == 1:
        return field.functions[name](arguments[0])
    value = exact(node)
    if value is not None:
        return field.number(value)
    if name == "!":  # of a symbol: the gamma function has the same identities
        return field.factorial(arguments[0])
    if name in ("binom", "perm"):
        n, k = arguments
        chosen = field.factorial(n) / field.factorial(n - k)
        return chosen / field.factorial(k) if name == "binom" else chosen
    raise UndefinedError(f"unknown function {name}")


def _points(names: frozenset[str], count: int) -> Iterator[dict[str, Fraction]]:
    """Values of the symbols: moderate positive ones first, then of both signs, then small ones (for arcsin and the
    like).
    """
    for point in range(count):
        unit = {name: Fraction(_random_element(name, point + 7) >> 40, 2**56) for name in sorted(names)}
        if point % 3 == 0:
            yield {name: value * 3 + Fraction(1, 5) for name, value in unit.items()}
        elif point % 3 == 1:  # of both signs whatever chance says: |x| is not x
            yield {
                name: -3 * value if at % 2 == point // 3 % 2 else 3 * value
                for at, (name, value) in enumerate(unit.items())
            }
        else:
            yield {name: value * Fraction(9, 10) + Fraction(1, 100) for name, value in unit.items()}


def _close(a: complex, b: complex) -> bool:
    return abs(a - b) <= _COARSE * max(1, abs(a), abs(b))


def _confirmed(left: Node, right: Node, values: dict[str, Fraction], log_base: int | None) -> tuple[bool, Any]:
    """Whether the values agree to the last digit that could tell them apart, and the left one. A term of 10^-500 beside
    1 wants more digits than one of 10^-5 (1 + e^{-1000} is not 1). Raises TooLargeError beyond MAX_DIGITS.
    """
    digits = needed = CONFIRM_DIGITS
    while digits <= MAX_DIGITS:
        field = _digits(digits)
        field.above = field.below = 0
        a, b = (_numeric(side, field, values, log_base) for side in (left, right))
        field.note(a)
        field.note(b)
        if digits == CONFIRM_DIGITS:  # later the terms that cancel out are as small as the digits allow
            needed = CONFIRM_DIGITS * math.ceil(1 + max(field.above + field.below - 4, 0) / 16)
        if digits == needed:
            return bool(abs(a - b) <= field.context.mpf(10) ** (field.above + _GUARD_DIGITS - digits)), a
        digits = needed
    raise TooLargeError("too many digits")


def agree(left: Node, right: Node, log_base: int | None = None) -> bool | None:
    """Whether two scalar expressions are equal as functions of their symbols; None when it cannot be told."""
    a, b = exact(left), exact(right)
    if a is not None and b is not None:
        return a == b
    if any(name.startswith("text:") for name in symbols(left) ^ symbols(right)):
        return False  # words are no variables: they do not cancel, and 0 times a word is not 0
    try:
        return all(_modular(left, point) == _modular(right, point) for point in range(NUM_POINTS))
    except TooLargeError:
        return False  # equal ones of that size have equal texts
    except (NotRationalError, UndefinedError, ZeroDivisionError):
        if _divides_by_zero(left) or _divides_by_zero(right):
            return False
    names = symbols(left) | symbols(right)
    agreed = 0
    has_imaginary = I in walk(left)
    for values in _points(names, 9 if names else 1):
        verdict = _agree_at(left, right, values, log_base, has_imaginary or not names)
        if verdict is False:
            return False
        agreed += verdict is True
        if agreed >= NUM_POINTS or (agreed and not names):
            return True
    if agreed == 0 and not has_imaginary and names:
        return _agree_complex(left, right, names, log_base)
    return True if agreed >= 2 else None


def _divides_by_zero(node: Node) -> bool:
    try:
        exact_or_raise(node)
    except ZeroDivisionError:
        return True
    except (NotRationalError, UndefinedError):
        return False
    return False


def _agree_complex(left: Node, right: Node, names: frozenset[str], log_base: int | None) -> bool | None:
    verdicts = [_agree_at(left, right, values, log_base, True) for values in _points(names, 6)]
    return False if False in verdicts else True if verdicts.count(True) >= 2 else None


def _agree_at(
    left: Node, right: Node, values: dict[str, Fraction], log_base: int | None, allow_complex: bool
) -> bool | None:
    try:
        a, b = (complex(_numeric(side, _DOUBLES, values, log_base)) for side in (left, right))
        if cmath.isfinite(a) and cmath.isfinite(b) and not _close(a, b):
            return False if allow_complex or _is_real(a) else None  # nothing is promised outside the gold's real domain
    except OverflowError:
        pass  # too large for doubles
    except (UndefinedError, NotRationalError, ArithmeticError, ValueError, TypeError):
        return None
    try:
        same, value = _confirmed(left, right, values, log_base)
        return same if allow_complex or _is_real(value) else None
    except TooLargeError:
        return False  # equal ones of that size have equal texts
    except (UndefinedError, NotRationalError, ArithmeticError, ValueError, TypeError):
        return None


def _is_real(value: Any) -> bool:
    return bool(abs(value.imag) <= 1e-9 * max(1, abs(value)))


def approximate(node: Node) -> float | None:
    """Real value of a constant expression in double precision, None when it has none. Infinity is a value."""
    if node == INFINITY:
        return math.inf
    if node == MINUS_INFINITY:
        return -math.inf
    try:
        return _real(complex(_numeric(node, _DOUBLES, {}, None)))
    except (UndefinedError, NotRationalError, ArithmeticError, ValueError, TypeError):
        return None
