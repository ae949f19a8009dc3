"""Whether two scalar expressions have one value, and how far a value is worked out."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from fractions import Fraction

from r1mega.reward.expression import evaluate, intervals
from r1mega.reward.expression.exact import exact, symbols
from r1mega.reward.expression.nodes import (
    INFINITY,
    MINUS_INFINITY,
    Degrees,
    Function,
    List,
    Matrix,
    Negative,
    Node,
    Number,
    Numeral,
    Percent,
    Power,
    Product,
    Quotient,
    Ratio,
    Relation,
    Set,
    SetOperation,
    Sum,
    Symbol,
    Text,
    Tuple,
    children,
    walk,
)

MIN_ROUNDED_DIGITS = 8  # a decimal stands for an unwritable number only with as many correct significant digits
_TEN = Number(Fraction(10))
_DECIMAL = re.compile(r"-?\d*\.(\d+)(?:\.\.\.)?")
_CHOICES_OF_A_NUMBER = frozenset("gcd lcm max min abs floor ceil".split())
_DECIMAL_NUMERAL = re.compile(r"[0-9]+(?:/[0-9]+)?")


def equal_values(gold: Node, other: Node) -> bool | None:
    """Whether two scalar expressions are equal, whatever their form."""
    while isinstance(gold, Negative) and isinstance(other, Negative):
        gold, other = gold.item, other.item
    if isinstance(gold, Number) and isinstance(other, Number):
        return gold == other
    if any(isinstance(part, Numeral) for node in (gold, other) for part in walk(node)):
        return _same_in_base(gold, other)
    match gold, other:
        case (Ratio(), Ratio()):
            return _same_ratio(gold, other)
        case (Ratio(items), _) | (_, Ratio(items)) if len(items) != 2:
            return False
        case (Function("mod", left), Function("mod", right)):
            return _same_residue(left, right)
        case (Function("mod"), _) | (_, Function("mod")):
            return False
    if _is_infinite(gold) or _is_infinite(other):
        return intervals.same_end(gold, other)
    if isinstance(gold, Percent) is not isinstance(other, Percent) or (
        isinstance(gold, Degrees) is not isinstance(other, Degrees)
    ):
        # 50% is written for 50 and for 0.5 (but 0.5% not for 0.5), 60 degrees for 60 and for pi/3
        share = isinstance(other, Percent) and (value := exact(gold)) is not None and abs(value) <= 1
        match gold, other:
            case (Percent(bare) | Degrees(bare), plain) | (plain, Percent(bare) | Degrees(bare)):
                if not share and _agree(bare, plain) is True:
                    return True
    return _agree(gold, other)


def _is_infinite(node: Node) -> bool:
    return isinstance(node, (Symbol, Negative)) and node in (INFINITY, MINUS_INFINITY)


def _agree(gold: Node, other: Node) -> bool | None:
    same = evaluate.agree(gold, other)
    if same is False and (_has_log(gold) or _has_log(other)):
        same = evaluate.agree(gold, other, log_base=10)  # a bare log may be meant to base e or 10
    return same


def _has_log(node: Node) -> bool:
    return any(isinstance(part, Function) and part.name == "log" for part in walk(node))


def _same_in_base(gold: Node, other: Node) -> bool | None:
    match gold, other:
        case (Numeral(), Numeral()):
            return gold == other
        case (Numeral(digits), Number(value)):
            return str(value) == digits
        case (Numeral(digits), Symbol(text) | Text(text)):
            return text.upper() == digits
        case (_, Numeral(digits, 10)) if _DECIMAL_NUMERAL.fullmatch(digits):
            return _agree(gold, Number(Fraction(digits)))
    return False  # arithmetic with numerals, or a base that the gold does not have


def _same_ratio(gold: Ratio, other: Ratio) -> bool | None:
    """Entry by entry, or proportional where the second entry cannot be minutes (2:30 is not 1:15)."""
    if len(gold.items) != len(other.items):
        return False
    if all(equal_values(a, b) is True for a, b in zip(gold.items, other.items, strict=True)):
        return True
    entries, others = _positive(gold.items), _positive(other.items)
    if not entries or not others:
        return False
    for side in (entries, others):
        if len(side) == 2 and 10 <= side[1] < 60 and side[0] < 24 and side[0].denominator == 1:
            return False
    return all(a * others[0] == b * entries[0] for a, b in zip(entries, others, strict=True))


def _positive(items: Sequence[Node]) -> list[Fraction]:
    """The values of positive numbers; empty when an item is none."""
    values = [value for item in items if (value := exact(item)) is not None and value > 0]
    return values if len(values) == len(items) else []


def _same_residue(left: tuple[Node, ...], right: tuple[Node, ...]) -> bool | None:
    """4 (mod 7) is 11 (mod 7): one modulus, and a difference that it divides."""
    if evaluate.agree(left[1], right[1]) is not True:
        return False
    residue, other, modulus = exact(left[0]), exact(right[0]), exact(left[1])
    if residue is None or other is None or not modulus:
        return evaluate.agree(left[0], right[0])
    return (residue - other) % modulus == 0


# --- form ------------------------------------------------------------
def is_numeral(node: Node) -> bool:
    """A number as it is written: 5, -0.5, 3/4, 2 1/3, 50%, 45 degrees, 1.5 x 10^3."""
    match node:
        case Number():
            return True
        case Negative(item) | Percent(item) | Degrees(item):
            return is_numeral(item)
        case Quotient(top, Number()):
            return isinstance(top.item if isinstance(top, Negative) else top, Number)
        case Sum((Number(), Quotient(Number(), Number()))):
            return True
        case Product(left, Power(base, Number() | Negative(Number()))):
            return base == _TEN and is_numeral(left)
    return False


def is_worked_out(node: Node) -> bool:
    """Whether an answer is made of numbers as they are written, names and infinities: (3, 1/2), x = 5, [0, \\infty)."""
    if is_numeral(node) or isinstance(node, (Symbol, Text)) or node == MINUS_INFINITY:
        return True
    structure = isinstance(node, (Tuple, Set, List, Matrix, Relation, SetOperation))
    return structure and all(map(is_worked_out, children(node)))


def work_left(node: Node) -> int:
    """How much arithmetic with numbers an answer leaves to the reader: of each sum, difference, product and quotient the
    digits of all but the longest number. 53 + 1 leaves 1, 17 \\times 23 leaves 2; 2^{10}, 10! and \\binom{5}{2} name a
    number as 1024 does. Of a fraction that is an integer the digits of the divisor count (84/2 leaves 1), of \\gcd, \\max,
    a rounding and the like those of the arguments. Of a chain (7 + 8 = 15) the side that is worked out most counts.
    """
    if isinstance(node, Number):
        return 0
    if is_numeral(node):
        return sum(_num_digits(part.bottom) for part in walk(node) if isinstance(part, Quotient) and _is_whole(part))
    parts = children(node)
    if isinstance(node, Relation) and set(node.operators) == {"="}:
        return min(map(work_left, (part for part in parts if not symbols(part))), default=0)
    own = 0
    if isinstance(node, (Sum, Product, Quotient)) and not any(isinstance(part, (Symbol, Text)) for part in walk(node)):
        digits = [_num_digits(part) for part in parts]
        own = sum(digits) - max(digits)
    elif isinstance(node, Function) and node.name in _CHOICES_OF_A_NUMBER and not symbols(node):
        own = sum(map(_num_digits, parts))
    return own + sum(map(work_left, parts))


def _is_whole(node: Node) -> bool:
    value = exact(node)
    return value is not None and value.denominator == 1


def _num_digits(node: Node) -> int:
    """Digits of a number; of anything longer than a number 2."""
    while isinstance(node, (Negative, Percent, Degrees)):
        node = node.item
    return len(str(abs(node.value.numerator))) if isinstance(node, Number) else 2


# --- decimals ------------------------------------------------------------
def rounded(text: str, decimal: Node, other: Node) -> bool:
    """The decimal is the other, which has no finite decimal form, rounded or cut to MIN_ROUNDED_DIGITS or more
    digits.
    """
    match = _DECIMAL.fullmatch(text.strip())
    if not match or len(text.strip(" .").lstrip("-0.").replace(".", "")) < MIN_ROUNDED_DIGITS:
        return False
    written, value = exact(decimal), exact(other)
    if written is None:
        return False
    if value is not None and not _terminates(value):
        error = abs(value - written)
    elif value is None and not symbols(other) and (place := evaluate.approximate(other)) is not None:
        error = abs(Fraction(place) - written) if abs(place) < 1e12 else Fraction(1)
    else:
        return False
    return error <= Fraction(6, 10) / 10 ** len(match.group(1)) or (
        "..." in text and error < Fraction(1, 10 ** len(match.group(1)))
    )


def _terminates(value: Fraction) -> bool:
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1


def is_near(value: Node, decimal: Node) -> bool:
    """Whether a decimal that stands behind `value \\approx` is that value, rounded or cut to the digits it has."""
    written, place = exact(decimal), evaluate.approximate(value)
    if written is None or place is None or abs(place) > 1e12:
        return False
    digits = next((n for n in range(16) if (written * 10**n).denominator == 1), 16)
    shift = 10**digits * Fraction(place)
    return abs(shift - written * 10**digits) <= Fraction(1, 2) or math.trunc(shift) == written * 10**digits
