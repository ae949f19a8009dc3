"""Whether two answers are the same: structure first (lists, tuples, intervals, matrices, equations), then values.

The result is True, False or None: None means that this reader cannot tell and symbolic algebra may be asked.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction

from r1mega.reward.expression import evaluate, intervals, names
from r1mega.reward.expression.exact import symbols
from r1mega.reward.expression.nodes import (
    FREE_FUNCTIONS,
    REALS,
    Degrees,
    Function,
    List,
    Matrix,
    Negative,
    Node,
    Number,
    Percent,
    Product,
    Quotient,
    Relation,
    Set,
    SetOperation,
    Sum,
    Symbol,
    Tuple,
    children,
    replaced,
    walk,
)
from r1mega.reward.expression.prose import symbol_for, without_lead
from r1mega.reward.expression.qualifiers import Qualified, contradict, renamings, split_qualifier
from r1mega.reward.expression.readings import Reading, measured, readings
from r1mega.reward.expression.text import CLOSE_TEXT, OPEN_TEXT, clean
from r1mega.reward.expression.units import Quantity, common_measure, currency
from r1mega.reward.expression.values import equal_values, is_numeral, is_worked_out, rounded, work_left
from r1mega.reward.expression.verbal import choice_and_value, same_choice, same_words, unmarked

MAX_LIST_ITEMS = 64
MAX_WORK = 1

_SPACE = re.compile(r"(?<!\d) +| +(?!\d)")
_BEYOND_READER = re.compile(r"\\[A-Za-z]")
_LETTER_BEHIND = re.compile(r"(.*[\d}])\s*\(([A-J])\)\s*", re.DOTALL)  # 42 (C)
_LETTER_AND_VALUE = re.compile(r"[\s(]*([A-J])[\s)]*[,;:=-]\s*([^A-Za-z]*\d[^A-Za-z]*)")  # C, 42
_TO_BE_COMPUTED = re.compile(r"\\(?:sum|prod|i*int|oint|lim)(?![A-Za-z])")
_DEGREES = re.compile(r"^(.*)\^\{?\\circ\s*\}?$")
_CLOCK = re.compile(r"(\d{1,2}) ?: ?(\d\d)(?: ?: ?(\d\d))?")
_HALF_OF_DAY = re.compile(rf"\s*{OPEN_TEXT}?\s*[ap]\.?\s?m\b\.?\s*{CLOSE_TEXT}?$", re.IGNORECASE)
_OTHER_KIND = re.compile(r"(?:%|\^\s*\{?\s*\\circ\s*\}?|\d_\s*\{?\d+\}?)\s*$")  # shares, angles, numerals of a base
_OF_DEGREES = frozenset(("rad", "celsius", "fahrenheit"))
_RATIO_IN_WORDS = re.compile(rf"(?<=\d)\s*{OPEN_TEXT}?\s*(?:to|比)\s*{CLOSE_TEXT}?\s*(?=\d)")


def same_answer(gold: str, prediction: str, max_work: int = MAX_WORK) -> bool | None:
    """Compare two raw answers (no box, no tags around them). max_work: how much arithmetic
    (`values.work_left`) the prediction may leave undone where the gold is worked out. Raises UnreadableError with
    final set for outsized and ambiguous ones.
    """
    if (choice := choice_and_value(gold)) is not None:
        return _same_choice_or_value(*choice, prediction, max_work)
    signs = currency(gold), currency(prediction)
    gold, prediction = clean(without_lead(gold)), clean(without_lead(prediction))
    gold = _RATIO_IN_WORDS.sub(":", gold)
    if ":" in gold:
        prediction = _RATIO_IN_WORDS.sub(":", prediction)
    if not prediction:
        return False
    if _SPACE.sub("", gold) == _SPACE.sub("", prediction):
        return signs[0] is None or signs[1] is None or signs[0] == signs[1]
    if (same_time := _same_time(gold, prediction)) is not None:
        return same_time
    gold, prediction = (symbol_for(unmarked(text)) or text for text in (gold, prediction))
    verbal = same_words(gold, prediction)
    if verbal is not None:
        return verbal
    qualified = split_qualifier(gold), split_qualifier(prediction)
    if contradict(*qualified):
        return False
    return _same_quantity(qualified, signs, max_work)


def _same_time(gold: str, prediction: str) -> bool | None:
    """Of two times of day; None for what may be ratios. 2:08 is none (and not 1:04), nor is 7:30 PM."""
    time = _HALF_OF_DAY.sub("", prediction)
    clock, other_clock = _CLOCK.fullmatch(gold), _CLOCK.fullmatch(time)
    if not clock or not other_clock or ("0" not in (clock[2][0], other_clock[2][0]) and time == prediction):
        return None
    return [*map(int, clock.groups("0"))] == [*map(int, other_clock.groups("0"))]


def _same_choice_or_value(letter: str, value: str, prediction: str, max_work: int) -> bool | None:
    """A gold of letter and value: either is right, both are where they agree."""
    answer = clean(without_lead(prediction))
    chosen = choice_and_value(prediction)
    if chosen is None and (behind := _LETTER_BEHIND.fullmatch(prediction)):
        chosen = behind[2], behind[1]
    if chosen is None and (both := _LETTER_AND_VALUE.fullmatch(answer)):
        chosen = both[1], both[2]
    if chosen is None and same_choice(letter, answer.strip("{} ")):
        return True
    if chosen is None:
        return same_answer(value, prediction, max_work)
    return chosen[0] == letter and same_answer(value, chosen[1], max_work)


def _same_quantity(
    qualified: tuple[Qualified, Qualified], signs: tuple[str | None, str | None], max_work: int
) -> bool | None:
    """Compare two cleaned answers that are to be computed, in every way that they can be read."""
    gold, prediction = qualified[0].body, qualified[1].body
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
    for gold_reading in readings(gold, sides[0], factors[0], lenient=True):
        for reading in readings(prediction, sides[1], factors[1]):
            for version in (reading, *_renamed(qualified, gold_reading, reading)):
                same = _same_reading(gold_reading, version)
                if same:
                    return _is_finished(gold_reading, version, max_work)
                verdict = None if same is None else verdict
    return verdict


def _renamed(qualified: tuple[Qualified, Qualified], gold: Reading, other: Reading) -> Iterator[Reading]:
    if gold.node is not None and other.node is not None:
        for by_name in renamings(*qualified, gold.node, other.node):
            yield Reading(replaced(other.node, by_name), other.text)


def _is_finished(gold: Reading, other: Reading, max_work: int) -> bool:
    """Whether an answer of the right value is one: the question's arithmetic handed back is none."""
    if gold.node is None or other.node is None or not is_worked_out(gold.node):
        return True
    wanted, value = names.value_of(gold.node), names.value_of(other.node)
    scalars = is_numeral(wanted) and not isinstance(value, (Relation, List, Tuple, Set))
    if scalars and any(not name.startswith("text:") for name in symbols(names.meant_beside(value, wanted))):
        return False  # x - x
    return work_left(other.node) <= max(max_work, work_left(gold.node))


def _same_reading(gold: Reading, other: Reading) -> bool | None:
    if gold.node is None or other.node is None:
        unread = [reading.text for reading in (gold, other) if reading.node is None]
        hopeful = all(map(_BEYOND_READER.search, unread)) and _mathematical(gold.text) and _mathematical(other.text)
        if gold.node is not None and _TO_BE_COMPUTED.search(other.text):
            return False  # the question handed back
        return None if hopeful else False
    same = _same(gold.node, other.node)
    if same is False and (rounded(gold.text, gold.node, other.node) or rounded(other.text, other.node, gold.node)):
        return True
    return same


def _mathematical(text: str) -> bool:
    """Whether symbolic algebra could make anything of it: no words, no bare relation, something to compute with."""
    if OPEN_TEXT in text or re.search(r"(?<![\\A-Za-z])[A-Za-z]{4,}|^\s*(?:[<>=]|\\(?:[lg]eq?|neq?)\b)", text):
        return False
    return bool(re.search(r"[\dA-Za-z]", text))


# --- structure ------------------------------------------------------------
def _same(gold: Node, other: Node) -> bool | None:
    if gold == other:
        return True
    (gold, decimal), (other, other_decimal) = names.versions(gold), names.versions(other)
    if (decimal is None) is not (other_decimal is None):  # 'exact \\approx decimal' on one side: either may be meant
        for gold_version, version in ((gold, other_decimal if _is_decimal(gold) else None), (decimal, other)):
            if gold_version is not None and version is not None and _same(gold_version, version):
                return True
    gold, other = _member_of(gold), _member_of(other)
    gold, other = names.spread(gold, other, distances=True), names.spread(other, gold)
    groups, other_groups = names.groups(gold), names.groups(other)
    if groups or other_groups:
        return _same_groups(gold, groups, other, other_groups)
    if isinstance(gold, Relation) and isinstance(other, Relation):
        return _same_relation(gold, other)
    return _same_unnamed(gold, other)


def _same_unnamed(gold: Node, other: Node) -> bool | None:
    if (isinstance(gold, Tuple) and _alternatives(other)) or (isinstance(other, Tuple) and _alternatives(gold)):
        return bool(intervals.same_real_set(gold, other))
    gold, other = names.value_of(gold), names.value_of(other)
    gold, other = names.meant_beside(gold, other), names.meant_beside(other, gold)
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
        return None if beyond else not _is_question(gold, other) and bool(intervals.same_real_set(gold, other))
    if isinstance(gold, Matrix) or isinstance(other, Matrix):
        scalar = other if isinstance(gold, Matrix) else gold
        return None if _has(scalar, Matrix) else False  # a product or sum of matrices
    return equal_values(gold, other)


def _is_decimal(node: Node) -> bool:
    """1.41, x = -0.5: written with a point. The 3 of `\\pi \\approx 3` is not for a gold of 3."""
    node = names.value_of(node)
    while isinstance(node, (Negative, Percent, Degrees)):
        node = node.item
    return isinstance(node, Number) and node.value.denominator != 1


def _is_collection(node: Node) -> bool:
    return isinstance(node, (List, Set))


def _is_real_set(node: Node) -> bool:
    return isinstance(node, (Tuple, SetOperation, Relation)) or (isinstance(node, Symbol) and node == REALS)


def _has(node: Node, kind: type[Node]) -> bool:
    return any(isinstance(part, kind) for part in walk(node))


def _is_question(gold: Node, other: Node) -> bool:
    """|x - 1| < 2 for (-1, 3) is still to be solved."""

    def shifted(node: Node) -> bool:
        return any(isinstance(part, Function) and part.name == "abs" and _has(part, Sum) for part in walk(node))

    return shifted(other) and not shifted(gold)


def _alternatives(node: Node) -> bool:
    """'1 or 2', 'x = 1, x = 2', 'x > 1 and x < 2': values of one unknown, never the entries of a tuple."""
    if not isinstance(node, List):
        return False
    found = [name for name, _ in names.assignments(node)]
    bounds = any(isinstance(item, Relation) and item.operators != ("=",) for item in node.items)
    return bounds or node.joiner == "or" or len(set(found)) < len(found)


def _same_groups(
    gold: Node, groups: list[dict[Node, Node]], other: Node, other_groups: list[dict[Node, Node]]
) -> bool | None:
    """Values of named unknowns: by name where both sides name them alike, else in order. Several groups are tuples then,
    and x_1 = 1, x_2 = 2 are two roots.
    """
    if groups and other_groups:
        alike = [names.named_alike(groups[0], group) for group in other_groups]
        if groups[0].keys() == alike[0].keys():
            return _same_unordered([_by_name(group) for group in groups], [_by_name(group) for group in alike])
    both = [group[0] for group in (groups, other_groups) if group]
    if len({len(names.stems(group)) for group in both}) > 1:
        return False  # values of one unknown are not those of two
    if max(len(groups), len(other_groups)) > 1 or any(len(names.stems(group)) < len(group) for group in both):
        return _same_unnamed(gold, other)
    if groups and other_groups:
        sides = [names.values_in_order(group, natural=False) for group in both]
        return _same_sequence(tuple(sides[0]), tuple(sides[1]))
    bare = names.value_of(gold if other_groups else other)
    point = isinstance(bare, Tuple) and bare.round
    column = isinstance(bare, Matrix) and len(bare.rows[0]) == 1
    if not point and not column and not (isinstance(bare, List) and bare.joiner != "or"):
        return False
    natural = bool(other_groups) or (isinstance(gold, List) and not isinstance(bare, List))
    values = tuple(names.values_in_order(both[0], natural))
    return _same_sequence(children(bare), values) if other_groups else _same_sequence(values, children(bare))


def _by_name(group: Mapping[Node, Node]) -> Node:
    return Tuple("(", ")", tuple(names.value_of(group[name]) for name in sorted(group, key=repr)))


def _as_rows(node: Tuple) -> Tuple | Matrix:
    """[[1,0],[0,1]] -> a matrix."""
    rows = [row.items for row in node.items if isinstance(row, Tuple) and row.opening == "["]
    return Matrix(tuple(rows)) if node.opening == "[" and len(rows) == len(node.items) else node


def _member_of(node: Node) -> Node:
    """`x \\in S` -> S."""
    match node:
        case Relation(("in",), (name, whole)) if names.is_name(name):
            return whole
    return node


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
        case (Tuple() as pair, Set((one,))) | (Set((one,)), Tuple() as pair):
            return _same(pair, one)
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
        return as_sets and _unknown(gold) == _unknown(other) and not _is_question(gold, other)
    if len(gold.sides) != 2 or len(other.sides) != 2:
        values = names.value_of(gold), names.value_of(other)
        return _same(*values) if values != (gold, other) else False
    if any(map(_is_structured, gold.sides + other.sides)):
        return _same(names.value_of(gold), names.value_of(other)) if gold.sides[0] == other.sides[0] else False
    return False if names.is_solved(gold) else _proportional(gold, other)


def _unknown(node: Node) -> frozenset[str]:
    """The names of a set's condition, of functions too; of f(x) > 2 only y, of f(1) = 2 the value itself."""
    places = [part for part in walk(node) if isinstance(part, Function) and part.name in FREE_FUNCTIONS]
    arguments = [argument for part in places for argument in part.arguments if not isinstance(argument, Relation)]
    if places and not any(map(symbols, arguments)):
        return frozenset(map(repr, places))
    found = symbols(node) | {part.name for part in walk(node) if isinstance(part, Function) and part.name != "abs"}
    return frozenset("y") if any(name.endswith("()") for name in found) else found


def _is_structured(side: Node) -> bool:
    union = isinstance(side, SetOperation) and side.kind == "union"
    return union or isinstance(side, (Tuple, Set, List, Matrix))


def _proportional(gold: Relation, other: Relation) -> bool | None:
    """a = b and c = d are one equation when (c - d) / (a - b) is a constant; for inequalities its sign tells the
    direction.
    """
    first, second = (Sum((node.sides[0], Negative(node.sides[1]))) for node in (gold, other))
    unknowns = symbols(first)
    if not unknowns or unknowns != symbols(second):
        return False
    place = {name: Number(Fraction(index * 7919 + 104729, 1009)) for index, name in enumerate(sorted(unknowns))}
    ratio = Quotient(replaced(second, place), replaced(first, place))
    if evaluate.agree(Product(ratio, first), second) is not True:
        return False
    factor = evaluate.approximate(ratio)
    if factor is None or factor == 0:
        return False
    operator, wanted = other.operators[0], gold.operators[0]
    if operator in ("=", "!="):
        return operator == wanted
    return operator == (wanted if factor > 0 else intervals.MIRRORED.get(wanted))
