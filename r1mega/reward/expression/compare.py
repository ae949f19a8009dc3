"""Whether two answers are the same: structure first (lists, tuples, intervals, matrices, equations), then values.

The result is True, False or None: None means that this reader cannot tell and symbolic algebra may be asked.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from fractions import Fraction

from r1mega.reward.expression import evaluate, intervals
from r1mega.reward.expression.exact import exact, node_tags, symbols
from r1mega.reward.expression.nodes import INFINITY, Node
from r1mega.reward.expression.prose import symbol_for, without_lead
from r1mega.reward.expression.readings import measured, readings
from r1mega.reward.expression.text import CLOSE_TEXT, OPEN_TEXT, clean
from r1mega.reward.expression.units import Quantity, common_measure, currency
from r1mega.reward.expression.verbal import same_words, unmarked

MIN_ROUNDED_DIGITS = 8  # a decimal stands for an unwritable number only with as many correct significant digits
MAX_LIST_ITEMS = 64

_SPACE = re.compile(r"(?<!\d) +| +(?!\d)")
_BEYOND_READER = re.compile(r"\\[A-Za-z]")
_DECIMAL = re.compile(r"-?\d*\.(\d+)(?:\.\.\.)?")
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
    clocks = [_CLOCK.fullmatch(text) for text in (gold, prediction)]
    if all(clocks) and any(clock[2][0] == "0" for clock in clocks):  # no ratio: 2:08 is not 1:04
        return [*map(int, clocks[0].groups("0"))] == [*map(int, clocks[1].groups("0"))]
    gold, prediction = (symbol_for(unmarked(text)) or text for text in (gold, prediction))
    verbal = same_words(gold, prediction)
    if verbal is not None:
        return verbal
    sides = [measured(text, sign) for text, sign in zip((gold, prediction), signs, strict=True)]
    factors: tuple[Fraction, Fraction] | None = (Fraction(1), Fraction(1))
    units = sides[0].unit, sides[1].unit
    if "rad" in units:  # degrees by their value then: 45 degrees are not 45 rad
        sides = [Quantity(_DEGREES.sub(r"(\1)\\frac{\\pi}{180}", side.body), side.unit, side.scale) for side in sides]
    if units[0] and units[1] and units[0] != units[1]:
        factors = common_measure(*units)
        if factors is None:
            return False
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


def _same_reading(gold: tuple[Node | None, str], other: tuple[Node | None, str]) -> bool | None:
    if gold[0] is None or other[0] is None:
        unread = [text for node, text in (gold, other) if node is None]
        hopeful = all(map(_BEYOND_READER.search, unread)) and _mathematical(gold[1]) and _mathematical(other[1])
        return None if hopeful else False
    same = _same(gold[0], other[0])
    if same is False and _rounded(gold, other):
        return True
    return same


def _mathematical(text: str) -> bool:
    """Whether symbolic algebra could make anything of it: no words, no bare relation, something to compute with."""
    if OPEN_TEXT in text or re.search(r"(?<![\\A-Za-z])[A-Za-z]{4,}|^\s*(?:[<>=]|\\(?:[lg]eq?|neq?)\b)", text):
        return False
    return bool(re.search(r"[\dA-Za-z]", text))


def _rounded(gold: tuple[Node, str], other: tuple[Node, str]) -> bool:
    """One side is the other, which has no finite decimal form, rounded or cut to MIN_ROUNDED_DIGITS or more digits."""
    for (decimal_node, text), (node, _) in ((gold, other), (other, gold)):
        match = _DECIMAL.fullmatch(text.strip())
        if not match or len(text.strip(" .").lstrip("-0.").replace(".", "")) < MIN_ROUNDED_DIGITS:
            continue
        value = exact(node)
        if value is not None and not _terminates(value):
            error = abs(value - exact(decimal_node))
        elif value is None and not symbols(node) and (place := evaluate.approximate(node)) is not None:
            error = abs(Fraction(place) - exact(decimal_node)) if abs(place) < 1e12 else Fraction(1)
        else:
            continue
        return error <= Fraction(6, 10) / 10 ** len(match.group(1)) or (
            "..." in text and error < Fraction(1, 10 ** len(match.group(1)))
        )
    return False


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
    if gold[0] == "rel" and other[0] == "rel":
        return _same_relation(gold, other)
    if gold[0] == other[0] == "list" and _names(gold) and _names(other):
        if _names(gold) == _names(other):
            return _same_unordered(list(gold[1]), list(other[1]))  # a system of assignments keeps its names
        if len({*map(_stem, _names(gold))}) != len({*map(_stem, _names(other))}):
            return False  # values of one unknown are not those of two
    if "tuple" in (gold[0], other[0]) and (_alternatives(gold) or _alternatives(other)):
        return bool(intervals.same_real_set(gold, other))
    gold, other = _value_of(gold), _value_of(other)
    tags = {gold[0], other[0]}
    if "list" in tags or "set" in tags:
        return _same_collection(gold, other)
    if tags == {"tuple", "matrix"}:
        gold, other = _as_rows(gold), _as_rows(other)
        tags = {gold[0], other[0]}
    if tags == {"tuple"} or (tags <= {"tuple", "matrix"} and gold[0] != other[0]):
        return _same_tuple(gold, other)
    if tags == {"matrix"}:
        return len(gold[1]) == len(other[1]) and _all(map(_same_sequence, gold[1], other[1]))
    if tags & {"tuple", "union", "minus", "inter", "rel"} or intervals.REALS in (gold, other):
        return bool(intervals.same_real_set(gold, other)) if "inter" not in tags else None
    if "matrix" in tags:
        scalar = other if gold[0] == "matrix" else gold
        return None if "matrix" in node_tags(scalar) else False  # a product or sum of matrices
    return _same_scalar(gold, other)


def _alternatives(node: Node) -> bool:
    """'1 or 2', 'x = 1, x = 2', 'x > 1 and x < 2': values of one unknown, never the entries of a tuple."""
    if node[0] != "list":
        return False
    names = _names(node)
    bounds = any(item[0] == "rel" and item[1] != ("=",) for item in node[1])
    return bounds or node[2] == "or" or len(set(names)) < len(names)


def _as_rows(node: Node) -> Node:
    """[[1,0],[0,1]] -> a matrix."""
    square = node[0] == "tuple" and all(row[0] == "tuple" and row[1] == "[" for row in (node, *node[3]))
    return ("matrix", tuple(row[3] for row in node[3])) if square else node


def _simplified(node: Node) -> Node:
    """`x \\in S` -> S, `k \\approx 3` -> 3."""
    if node[0] == "rel" and node[1] == ("in",) and _is_name(node[2][0]):
        return node[2][1]
    if node[0] == "rel" and node[1] and set(node[1]) <= {"~"}:
        return node[2][0] if exact(node[2][0]) is not None else node[2][-1]
    return node


def _value_of(node: Node) -> Node:
    """`x = 5` -> 5, `(x, y) = (1, 2)` -> (1, 2), `x = 2 + 3 = 5` -> 5 when the chain is true; assignments of a list
    -> values.
    """
    if node[0] == "list":
        names = _names(node)
        items = sorted(node[1], key=lambda rel: rel[2][0][1]) if names and len(set(names)) == len(names) else node[1]
        return ("list", tuple(map(_value_of, items)), node[2])
    if node[0] != "rel" or set(node[1]) - {"=", "~"}:
        return node
    sides = list(node[2])
    if _is_name(sides[0]):
        sides = sides[1:]
    elif len(sides) == 2 and _is_name(sides[1]) and exact(sides[0]) is not None:
        return sides[0]
    if any(_same(sides[0], side) is not True for side in sides[1:]):
        return node
    return sides[-1]


def _names(node: Node) -> list[str]:
    """Sorted left sides of a list of assignments `x = 1, y = 2`; empty for any other list."""
    if not all(item[0] == "rel" and set(item[1]) == {"="} and item[2][0][0] == "sym" for item in node[1]):
        return []
    return sorted(item[2][0][1] for item in node[1])


def _stem(name: str) -> str:
    """x_1 and x_2 are two values of x."""
    return name.partition("_")[0]


def _is_name(node: Node) -> bool:
    """Left side of an assignment: x, f(x), (x, y), area, AB, P(X = 1)."""
    if node[0] in ("sym", "text"):
        return node not in (INFINITY, ("sym", "\\pi"), ("sym", "e"), ("sym", "i"))
    if node[0] == "fn":
        return node[1] in "fghFGPQ"
    if node[0] == "tuple":
        return all(map(_is_name, node[3]))
    parts = node[1] if node[0] == "mul" else node[1:] if node[0] == "div" else ()
    return bool(parts) and all(map(_is_name, parts))


def _all(verdicts: Iterable[bool | None]) -> bool | None:
    result: bool | None = True
    for verdict in verdicts:
        if verdict is False:
            return False
        result = None if verdict is None else result
    return result


def _same_sequence(left: tuple[Node, ...], right: tuple[Node, ...]) -> bool | None:
    return len(left) == len(right) and _all(map(_same, left, right))


def _same_tuple(gold: Node, other: Node) -> bool | None:
    """Order and brackets count: (0,1] is not [0,1]; a column vector is the tuple of its entries."""
    if gold[0] == other[0] == "tuple" and len(gold[3]) == 2 and gold[1:3] != other[1:3]:
        return False
    entries = [
        node[3] if node[0] == "tuple" else tuple(item for row in node[1] for item in row) for node in (gold, other)
    ]
    for node in (gold, other):
        if node[0] == "matrix" and min(len(node[1]), len(node[1][0])) > 1:
            return False
    return _same_sequence(*entries)


def _same_collection(gold: Node, other: Node) -> bool | None:
    """Order does not matter in sets and lists; a list without braces may also be a tuple, entry by entry."""
    tags = (gold[0], other[0])
    if "tuple" in tags:
        pair = gold if gold[0] == "tuple" else other
        bare = other if pair is gold else gold
        return bare[0] == "list" and pair[1:3] == ("(", ")") and _same_sequence(pair[3], bare[1])
    if all(tag in ("list", "set") for tag in tags):
        left, right = list(gold[1]), list(other[1])
        if "set" in tags:
            left, right = _distinct(left), _distinct(right)
        return _same_unordered(left, right)
    single, many = (gold, other) if tags[1] in ("list", "set") else (other, gold)
    if single[0] in ("union", "minus", "rel"):
        return intervals.same_real_set(single, many) or False
    return _same(single, many[1][0]) if len(many[1]) == 1 and single[0] != "set" else False


def _distinct(items: list[Node]) -> list[Node]:
    kept: list[Node] = []
    for item in items[:MAX_LIST_ITEMS]:
        if not any(_same(item, other) is True for other in kept):
            kept.append(item)
    return kept


def _same_unordered(left: list[Node], right: list[Node]) -> bool | None:
    if len(left) != len(right) or len(left) > MAX_LIST_ITEMS:
        return False
    rest = list(right)
    for item in left:
        likely = [i for i, candidate in enumerate(rest) if (item[0] == "set") == (candidate[0] == "set")]
        index = next((i for i in likely if _same(item, rest[i]) is True), None)
        if index is None:
            return None if any(_same(item, rest[i]) is None for i in likely) else False
        del rest[index]
    return True


def _same_relation(gold: Node, other: Node) -> bool | None:
    """Equations and inequalities up to a constant factor; in one unknown also as sets."""
    mirrored = ("rel", tuple(intervals.MIRRORED.get(op, op) for op in other[1][::-1]), other[2][::-1])
    for version in (other, mirrored):
        same_form = len(gold[2]) == len(version[2]) and gold[1] == version[1]
        if same_form and _all(map(_same, gold[2], version[2])) is True:
            return True
    left, right = gold[2][0], other[2][0]
    if gold[1] == other[1] == ("=",) and {left[0], right[0]} == {"fn", "sym"} and ("sym", "y") in (left, right):
        return _same(gold[2][1], other[2][1])  # f(x) = ... is also written y = ...
    as_sets = intervals.same_real_set(gold, other)
    if as_sets is not None:
        return as_sets and symbols(gold) == symbols(other)
    if len(gold[2]) != 2 or len(other[2]) != 2:
        values = _value_of(gold), _value_of(other)
        return _same(*values) if values != (gold, other) else False
    if any(side[0] in ("tuple", "set", "list", "matrix", "union") for side in gold[2] + other[2]):
        return _same(_value_of(gold), _value_of(other)) if gold[2][0] == other[2][0] else False
    return _proportional(gold, other)


def _proportional(gold: Node, other: Node) -> bool | None:
    """a = b and c = d are one equation when (c - d) / (a - b) is a constant; for inequalities its sign tells the
    direction.
    """
    first, second = (("add", (node[2][0], ("neg", node[2][1]))) for node in (gold, other))
    names = symbols(first)
    if not names or names != symbols(second):
        return False
    place = {name: Fraction(index * 7 + 3, 11) for index, name in enumerate(sorted(names))}
    ratio = ("div", _at(second, place), _at(first, place))
    if evaluate.agree(("mul", (ratio, first)), second) is not True:
        return False
    factor = evaluate.approximate(ratio)
    if factor is None or factor == 0:
        return False
    operator, wanted = other[1][0], gold[1][0]
    if operator in ("=", "!="):
        return operator == wanted
    return operator == (wanted if factor > 0 else intervals.MIRRORED.get(wanted))


def _at(node: Node, place: dict[str, Fraction]) -> Node:
    """The expression with numbers in place of its symbols."""
    return _replaced(node, lambda n: ("num", place[n[1]]) if n[0] == "sym" and n[1] in place else None)


def _replaced(node: Node, change: Callable[[Node], Node | None]) -> Node:
    if not isinstance(node, tuple) or not node:
        return node
    if isinstance(node[0], str):
        changed = change(node)
        if changed is not None:
            return changed
        return (node[0], *(_replaced(child, change) if isinstance(child, tuple) else child for child in node[1:]))
    return tuple(_replaced(child, change) for child in node)


# --- values ------------------------------------------------------------
def _same_scalar(gold: Node, other: Node) -> bool | None:
    while gold[0] == other[0] == "neg":
        gold, other = gold[1], other[1]
    tags = gold[0], other[0]
    if "base" in node_tags(gold) | node_tags(other):
        return _same_in_base(gold, other)
    if tags == ("ratio", "ratio"):
        return _same_ratio(gold, other)
    if tags.count("ratio") == 1 and len((gold if tags[0] == "ratio" else other)[1]) != 2:
        return False
    if INFINITY in (gold, other) or ("neg", INFINITY) in (gold, other):
        return intervals.same_end(gold, other)
    if tags.count("pct") == 1 or tags.count("deg") == 1:
        marked, plain = (gold, other) if gold[0] in ("pct", "deg") else (other, gold)
        # 50% is written for 50 and for 0.5 (but 0.5% not for 0.5), 60 degrees for 60 and for pi/3
        share = other[0] == "pct" and (value := exact(gold)) is not None and abs(value) <= 1
        if not share and _agree(marked[1], plain) is True:
            return True
    return _agree(gold, other)


def _agree(gold: Node, other: Node) -> bool | None:
    same = evaluate.agree(gold, other)
    if same is False and "'log'" in str((gold, other)):
        same = evaluate.agree(gold, other, log_base=10)  # a bare log may be meant to base e or 10
    return same


def _same_in_base(gold: Node, other: Node) -> bool | None:
    if gold[0] == other[0] == "base":
        return gold[1:] == other[1:]
    if gold[0] != "base":  # arithmetic with numerals, or a base that the gold does not have
        return other[0] == "base" and other[2] == 10 and _agree(gold, ("num", Fraction(other[1])))
    digits = str(other[1]) if other[0] in ("num", "sym", "text") else ""
    return digits.upper() == gold[1]


def _same_ratio(gold: Node, other: Node) -> bool | None:
    """Entry by entry, or proportional where the second entry cannot be minutes (2:30 is not 1:15)."""
    entries, others = gold[1], other[1]
    if len(entries) != len(others):
        return False
    if _all(map(_same, entries, others)):
        return True
    values = [[exact(item) for item in side] for side in (entries, others)]
    if any(value is None or value <= 0 for side in values for value in side):
        return False
    if any(len(side) == 2 and 10 <= side[1] < 60 and side[0] < 24 and side[0].denominator == 1 for side in values):
        return False
    return all(a * values[1][0] == b * values[0][0] for a, b in zip(*values, strict=True))
