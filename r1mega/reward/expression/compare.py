"""Whether two answers are the same: structure first (lists, tuples, intervals, matrices, equations), then values.

The result is True, False or None: None means that this reader cannot tell and symbolic algebra may be asked.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fractions import Fraction

from r1mega.reward.expression import evaluate, intervals
from r1mega.reward.expression.exact import exact, symbols
from r1mega.reward.expression.nodes import (
    CONSTANTS,
    FREE_FUNCTIONS,
    INFINITY,
    MINUS_INFINITY,
    REALS,
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
from r1mega.reward.expression.prose import symbol_for, without_lead
from r1mega.reward.expression.readings import Reading, measured, readings
from r1mega.reward.expression.text import CLOSE_TEXT, OPEN_TEXT, clean
from r1mega.reward.expression.units import Quantity, common_measure, currency
from r1mega.reward.expression.verbal import same_words, unmarked

MIN_ROUNDED_DIGITS = 8  # a decimal stands for an unwritable number only with as many correct significant digits
MAX_LIST_ITEMS = 64

_SPACE = re.compile(r"(?<!\d) +| +(?!\d)")
_BEYOND_READER = re.compile(r"\\[A-Za-z]")
_DECIMAL = re.compile(r"-?\d*\.(\d+)(?:\.\.\.)?")
_DECIMAL_NUMERAL = re.compile(r"[0-9]+(?:/[0-9]+)?")
_DEGREES = re.compile(r"^(.*)\^\{?\\circ\s*\}?$")
_CLOCK = re.compile(r"(\d{1,2}) ?: ?(\d\d)(?: ?: ?(\d\d))?")
_OTHER_KIND = re.compile(r"(?:%|\^\s*\{?\s*\\circ\s*\}?|\d_\s*\{?\d+\}?)\s*$")  # shares, angles, numerals of a base
_OF_DEGREES = frozenset(("rad", "celsius", "fahrenheit"))
_RATIO_IN_WORDS = re.compile(rf"(?<=\d)\s*{OPEN_TEXT}?\s*(?:to|比)\s*{CLOSE_TEXT}?\s*(?=\d)")


def same_answer(gold: str, prediction: str) -> bool | None:
    """Compare two raw answers (no box, no tags around them). Raises UnreadableError with over_limit set for outsized
    ones.
    """
    signs = currency(gold), currency(prediction)
    gold, prediction = clean(without_lead(gold)), clean(without_lead(prediction))
    gold = _RATIO_IN_WORDS.sub(":", gold)
    if ":" in gold:
        prediction = _RATIO_IN_WORDS.sub(":", prediction)
    if not prediction:
        return False
    if _SPACE.sub("", gold) == _SPACE.sub("", prediction):
        return signs[0] is None or signs[1] is None or signs[0] == signs[1]
    clock, other_clock = _CLOCK.fullmatch(gold), _CLOCK.fullmatch(prediction)
    if clock and other_clock and "0" in (clock[2][0], other_clock[2][0]):  # no ratio: 2:08 is not 1:04
        return [*map(int, clock.groups("0"))] == [*map(int, other_clock.groups("0"))]
    gold, prediction = (symbol_for(unmarked(text)) or text for text in (gold, prediction))
    verbal = same_words(gold, prediction)
    if verbal is not None:
        return verbal
    sides = [measured(text, sign) for text, sign in zip((gold, prediction), signs, strict=True)]
    factors = Fraction(1), Fraction(1)
    unit, other_unit = sides[0].unit, sides[1].unit
    if "rad" in (unit, other_unit):  # degrees by their value then: 45 degrees are not 45 rad
        sides = [Quantity(_DEGREES.sub(r"(\1)\\frac{\\pi}{180}", side.body), side.unit, side.scale) for side in sides]
    if unit and other_unit and unit != other_unit:
        measure = common_measure(unit, other_unit)
        if measure is None:
            return False
        factors = measure
    for marked, other in (sides, sides[::-1]):
        if other.unit and other.unit not in _OF_DEGREES and _OTHER_KIND.search(marked.body):
            return False
    verdict: bool | None = False
    for gold_reading in readings(gold, sides[0], factors[0]):
        for reading in readings(prediction, sides[1], factors[1]):
            same = _same_reading(gold_reading, reading)
            if same:
                return True
            verdict = None if same is None else verdict
    return verdict


def _same_reading(gold: Reading, other: Reading) -> bool | None:
    if gold.node is None or other.node is None:
        unread = [reading.text for reading in (gold, other) if reading.node is None]
        hopeful = all(map(_BEYOND_READER.search, unread)) and _mathematical(gold.text) and _mathematical(other.text)
        return None if hopeful else False
    same = _same(gold.node, other.node)
    if same is False and (_rounded(gold.text, gold.node, other.node) or _rounded(other.text, other.node, gold.node)):
        return True
    return same


def _mathematical(text: str) -> bool:
    """Whether symbolic algebra could make anything of it: no words, no bare relation, something to compute with."""
    if OPEN_TEXT in text or re.search(r"(?<![\\A-Za-z])[A-Za-z]{4,}|^\s*(?:[<>=]|\\(?:[lg]eq?|neq?)\b)", text):
        return False
    return bool(re.search(r"[\dA-Za-z]", text))


def _rounded(text: str, decimal: Node, other: Node) -> bool:
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


# --- structure ------------------------------------------------------------
def _same(gold: Node, other: Node) -> bool | None:
    if gold == other:
        return True
    gold, other = _simplified(gold), _simplified(other)
    if isinstance(gold, Relation) and isinstance(other, Relation):
        return _same_relation(gold, other)
    if isinstance(gold, List) and isinstance(other, List):
        names, other_names = _names(gold), _names(other)
        if names and names == other_names:
            return _same_unordered(gold.items, other.items)  # a system of assignments keeps its names
        if names and other_names and len({*map(_stem, names)}) != len({*map(_stem, other_names)}):
            return False  # values of one unknown are not those of two
    if (isinstance(gold, Tuple) and _alternatives(other)) or (isinstance(other, Tuple) and _alternatives(gold)):
        return bool(intervals.same_real_set(gold, other))
    gold, other = _value_of(gold), _value_of(other)
    if _is_collection(gold) or _is_collection(other):
        return _same_collection(gold, other)
    if isinstance(gold, Tuple) and isinstance(other, Matrix):
        gold = _as_rows(gold)
    elif isinstance(gold, Matrix) and isinstance(other, Tuple):
        other = _as_rows(other)
    match gold, other:
        case (Matrix(rows), Matrix(others)):
            return len(rows) == len(others) and _all(map(_same_sequence, rows, others))
        case (Tuple() | Matrix(), Tuple() | Matrix()):
            return _same_tuple(gold, other)
    if _is_real_set(gold) or _is_real_set(other):
        beyond = any(isinstance(node, SetOperation) and node.kind == "inter" for node in (gold, other))
        return None if beyond else bool(intervals.same_real_set(gold, other))
    if isinstance(gold, Matrix) or isinstance(other, Matrix):
        scalar = other if isinstance(gold, Matrix) else gold
        return None if _has(scalar, Matrix) else False  # a product or sum of matrices
    return _same_scalar(gold, other)


def _is_collection(node: Node) -> bool:
    return isinstance(node, (List, Set))


def _is_real_set(node: Node) -> bool:
    return isinstance(node, (Tuple, SetOperation, Relation)) or (isinstance(node, Symbol) and node == REALS)


def _is_infinite(node: Node) -> bool:
    return isinstance(node, (Symbol, Negative)) and node in (INFINITY, MINUS_INFINITY)


def _has(node: Node, kind: type[Node]) -> bool:
    return any(isinstance(part, kind) for part in walk(node))


def _alternatives(node: Node) -> bool:
    """'1 or 2', 'x = 1, x = 2', 'x > 1 and x < 2': values of one unknown, never the entries of a tuple."""
    if not isinstance(node, List):
        return False
    names = _names(node)
    bounds = any(isinstance(item, Relation) and item.operators != ("=",) for item in node.items)
    return bounds or node.joiner == "or" or len(set(names)) < len(names)


def _as_rows(node: Tuple) -> Tuple | Matrix:
    """[[1,0],[0,1]] -> a matrix."""
    rows = [row.items for row in node.items if isinstance(row, Tuple) and row.opening == "["]
    return Matrix(tuple(rows)) if node.opening == "[" and len(rows) == len(node.items) else node


def _simplified(node: Node) -> Node:
    """`x \\in S` -> S, `k \\approx 3` -> 3."""
    if isinstance(node, Relation):
        match node.operators, node.sides:
            case ("in",), (name, whole) if _is_name(name):
                return whole
            case operators, (first, *_, last) if set(operators) == {"~"}:
                return first if exact(first) is not None else last
    return node


def _value_of(node: Node) -> Node:
    """`x = 5` -> 5, `(x, y) = (1, 2)` -> (1, 2), `x = 2 + 3 = 5` -> 5 when the chain is true; assignments of a list
    -> values.
    """
    if isinstance(node, List):
        assignments = _assignments(node)
        items = node.items
        if assignments and len({name for name, _ in assignments}) == len(assignments):
            items = tuple(item for _, item in assignments)
        return List(tuple(map(_value_of, items)), node.joiner)
    if not isinstance(node, Relation) or set(node.operators) - {"=", "~"}:
        return node
    first, *rest = node.sides
    if _is_name(first):
        first, *rest = rest
    elif len(rest) == 1 and _is_name(rest[0]) and exact(first) is not None:
        return first
    if any(_same(first, side) is not True for side in rest):
        return node
    return node.sides[-1]


def _assignments(node: List) -> list[tuple[str, Node]]:
    """Name and item of each `x = 1` of a list of nothing else, sorted by name; empty for any other list."""
    found: list[tuple[str, Node]] = []
    for item in node.items:
        match item:
            case Relation(operators, (Symbol(name), *_)) if set(operators) == {"="}:
                found.append((name, item))
            case _:
                return []
    return sorted(found, key=lambda pair: pair[0])


def _names(node: List) -> list[str]:
    """Left sides of a list of assignments, sorted."""
    return [name for name, _ in _assignments(node)]


def _stem(name: str) -> str:
    """x_1 and x_2 are two values of x."""
    return name.partition("_")[0]


def _is_name(node: Node) -> bool:
    """Left side of an assignment: x, f(x), (x, y), area, AB, P(X = 1)."""
    match node:
        case Text():
            return True
        case Symbol(name):
            return name not in CONSTANTS
        case Function(name):
            return name in FREE_FUNCTIONS
        case Tuple(items=items):
            return all(map(_is_name, items))
        case Product(left, right) | Quotient(left, right):
            return _is_name(left) and _is_name(right)
    return False


def _all(verdicts: Iterable[bool | None]) -> bool | None:
    result: bool | None = True
    for verdict in verdicts:
        if verdict is False:
            return False
        result = None if verdict is None else result
    return result


def _same_sequence(left: tuple[Node, ...], right: tuple[Node, ...]) -> bool | None:
    return len(left) == len(right) and _all(map(_same, left, right))


def _same_tuple(gold: Tuple | Matrix, other: Tuple | Matrix) -> bool | None:
    """Order and brackets count: (0,1] is not [0,1]; a column vector is the tuple of its entries."""
    match gold, other:
        case (Tuple(items=(_, _)), Tuple()) if (gold.opening, gold.closing) != (other.opening, other.closing):
            return False
    for node in (gold, other):
        if isinstance(node, Matrix) and min(len(node.rows), len(node.rows[0])) > 1:
            return False
    return _same_sequence(children(gold), children(other))


def _same_collection(gold: Node, other: Node) -> bool | None:
    """Order does not matter in sets and lists; a list without braces may also be a tuple, entry by entry."""
    match gold, other:
        case (Tuple() as pair, bare) | (bare, Tuple() as pair):
            return isinstance(bare, List) and pair.round and _same_sequence(pair.items, bare.items)
        case (List(), List()):
            return _same_unordered(gold.items, other.items)
        case (List() | Set(), List() | Set()):
            return _same_unordered(_distinct(gold.items), _distinct(other.items))
        case (single, List() | Set() as many) | (List() | Set() as many, single):
            if isinstance(single, Relation) or (isinstance(single, SetOperation) and single.kind != "inter"):
                return intervals.same_real_set(single, many) or False
            return _same(single, many.items[0]) if len(many.items) == 1 else False
    return False


def _distinct(items: Sequence[Node]) -> list[Node]:
    kept: list[Node] = []
    for item in items[:MAX_LIST_ITEMS]:
        if not any(_same(item, other) is True for other in kept):
            kept.append(item)
    return kept


def _same_unordered(left: Sequence[Node], right: Sequence[Node]) -> bool | None:
    if len(left) != len(right) or len(left) > MAX_LIST_ITEMS:
        return False
    rest = list(right)
    for item in left:
        likely = [i for i, candidate in enumerate(rest) if isinstance(item, Set) is isinstance(candidate, Set)]
        index = next((i for i in likely if _same(item, rest[i]) is True), None)
        if index is None:
            return None if any(_same(item, rest[i]) is None for i in likely) else False
        del rest[index]
    return True


def _same_relation(gold: Relation, other: Relation) -> bool | None:
    """Equations and inequalities up to a constant factor; in one unknown also as sets."""
    mirrored = Relation(tuple(intervals.MIRRORED.get(op, op) for op in other.operators[::-1]), other.sides[::-1])
    for version in (other, mirrored):
        same_form = len(gold.sides) == len(version.sides) and gold.operators == version.operators
        if same_form and _all(map(_same, gold.sides, version.sides)) is True:
            return True
    match gold, other:  # f(x) = ... is also written y = ...
        case (Relation(("=",), (Function(), left)), Relation(("=",), (Symbol("y"), right))) | (
            Relation(("=",), (Symbol("y"), left)),
            Relation(("=",), (Function(), right)),
        ):
            return _same(left, right)
    as_sets = intervals.same_real_set(gold, other)
    if as_sets is not None:
        return as_sets and symbols(gold) == symbols(other)
    if len(gold.sides) != 2 or len(other.sides) != 2:
        values = _value_of(gold), _value_of(other)
        return _same(*values) if values != (gold, other) else False
    if any(map(_is_structured, gold.sides + other.sides)):
        return _same(_value_of(gold), _value_of(other)) if gold.sides[0] == other.sides[0] else False
    return _proportional(gold, other)


def _is_structured(side: Node) -> bool:
    union = isinstance(side, SetOperation) and side.kind == "union"
    return union or isinstance(side, (Tuple, Set, List, Matrix))


def _proportional(gold: Relation, other: Relation) -> bool | None:
    """a = b and c = d are one equation when (c - d) / (a - b) is a constant; for inequalities its sign tells the
    direction.
    """
    first, second = (Sum((node.sides[0], Negative(node.sides[1]))) for node in (gold, other))
    names = symbols(first)
    if not names or names != symbols(second):
        return False
    place = {name: Fraction(index * 7 + 3, 11) for index, name in enumerate(sorted(names))}
    ratio = Quotient(_at(second, place), _at(first, place))
    if evaluate.agree(Product(ratio, first), second) is not True:
        return False
    factor = evaluate.approximate(ratio)
    if factor is None or factor == 0:
        return False
    operator, wanted = other.operators[0], gold.operators[0]
    if operator in ("=", "!="):
        return operator == wanted
    return operator == (wanted if factor > 0 else intervals.MIRRORED.get(wanted))


def _at(node: Node, place: dict[str, Fraction]) -> Node:
    """A scalar expression with numbers in place of its symbols."""

    def at(child: Node) -> Node:
        return _at(child, place)

    match node:
        case Symbol(name):
            return Number(place[name]) if name in place else node
        case Sum(items) | Ratio(items):
            return type(node)(tuple(map(at, items)))
        case Product(left, right) | Quotient(left, right) | Power(left, right):
            return type(node)(at(left), at(right))
        case Negative(item) | Degrees(item) | Percent(item):
            return type(node)(at(item))
        case Function(name, arguments):
            return Function(name, tuple(map(at, arguments)))
    return node


# --- values ------------------------------------------------------------
def _same_scalar(gold: Node, other: Node) -> bool | None:
    while isinstance(gold, Negative) and isinstance(other, Negative):
        gold, other = gold.item, other.item
    if isinstance(gold, Number) and isinstance(other, Number):
        return gold == other
    if _has(gold, Numeral) or _has(other, Numeral):
        return _same_in_base(gold, other)
    match gold, other:
        case (Ratio(), Ratio()):
            return _same_ratio(gold, other)
        case (Ratio(items), _) | (_, Ratio(items)) if len(items) != 2:
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
    if _all(map(_same, gold.items, other.items)):
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
