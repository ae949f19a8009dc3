"""Subsets of the real line as sorted intervals: `(0,1) \\cup \\{2\\}`, `x > 3`, `0 \\le x < 1`, `\\mathbb{R}
\\setminus \\{0\\}`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

from r1mega.reward.expression.evaluate import agree, approximate
from r1mega.reward.expression.exact import symbols
from r1mega.reward.expression.nodes import (
    EMPTY_SET,
    FREE_FUNCTIONS,
    INFINITY,
    MINUS_INFINITY,
    REALS,
    Function,
    List,
    Negative,
    Node,
    Relation,
    Set,
    SetOperation,
    Sum,
    Symbol,
    Text,
    Tuple,
)

MIRRORED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "!=": "!=", "=": "="}


@dataclass(frozen=True, slots=True)
class Interval:
    """A part of the real line; its ends may be infinite."""

    low: Node
    low_closed: bool
    high: Node
    high_closed: bool

    @property
    def sort_key(self) -> tuple[float, bool]:
        return (_place(self.low), not self.low_closed)


class NotRealSetError(ValueError):
    """The expression is not a subset of the real line with known ends."""


def _place(node: Node) -> float:
    value = approximate(node)
    if value is None or math.isnan(value):
        raise NotRealSetError(type(node).__name__)
    return value


def real_set(node: Node) -> tuple[Interval, ...]:
    """The intervals of a set expression in order, joined where they touch. Raises NotRealSetError."""
    match node:
        case Symbol(REALS.name) | Text("R"):
            parts = [Interval(MINUS_INFINITY, False, INFINITY, False)]
        case Tuple(opening, closing, (low, high)):
            parts = [Interval(low, opening == "[", high, closing == "]")]
            if _place(low) > _place(high):
                raise NotRealSetError("the ends are in the wrong order")
        case Set(items):
            parts = [Interval(item, True, item, True) for item in items]
        case SetOperation("union", items):
            parts = [interval for item in items for interval in real_set(item)]
        case SetOperation("minus", (some, others)):
            parts = _common(real_set(some), _complement(real_set(others)))
        case List():
            parts = _from_list(node)
        case Relation():
            parts = _from_relation(node)
        case _:
            raise NotRealSetError(type(node).__name__)
    return _joined(parts)


def _joined(parts: list[Interval]) -> tuple[Interval, ...]:
    joined: list[Interval] = []
    for part in sorted(parts, key=lambda p: p.sort_key):
        if joined:
            last = joined[-1]
            gap = _place(part.low) - _place(last.high) if _place(last.high) != _place(part.low) else 0.0
            if gap < 0 or (gap == 0 and (part.low_closed or last.high_closed)):
                inside = _place(part.high) < _place(last.high)
                high, closed = (last.high, last.high_closed) if inside else (part.high, part.high_closed)
                if _place(part.high) == _place(last.high):
                    closed = part.high_closed or last.high_closed
                joined[-1] = Interval(last.low, last.low_closed, high, closed)
                continue
        joined.append(part)
    return tuple(joined)


def _complement(parts: tuple[Interval, ...]) -> list[Interval]:
    """What is left of the line."""
    gaps: list[Interval] = []
    low: Node = MINUS_INFINITY
    closed = False
    for part in parts:
        gaps.append(Interval(low, closed, part.low, not part.low_closed))
        low, closed = part.high, not part.high_closed
    return [gap for gap in (*gaps, Interval(low, closed, INFINITY, False)) if _holds_any(gap)]


def _common(some: Iterable[Interval], others: Iterable[Interval]) -> list[Interval]:
    """Intersection."""
    found = []
    for a, b in itertools.product(some, others):
        low = max((a, b), key=lambda part: (_place(part.low), not part.low_closed))
        high = min((a, b), key=lambda part: (_place(part.high), part.high_closed))
        found.append(Interval(low.low, low.low_closed, high.high, high.high_closed))
    return [part for part in found if _holds_any(part)]


def _holds_any(part: Interval) -> bool:
    low, high = _place(part.low), _place(part.high)
    return low < high or (low == high and part.low_closed and part.high_closed)


def _from_list(node: List) -> list[Interval]:
    """'x < 2 or x > 5' as a union, 'x > 2 and x < 5' as an intersection; with a comma whichever holds anything."""
    sets = [real_set(item) for item in node.items]
    union = [interval for parts in sets for interval in parts]
    if not any(isinstance(item, Relation) for item in node.items):
        return union
    if len({symbols(item) for item in node.items}) != 1:
        raise NotRealSetError("several unknowns")
    if node.joiner == "or":
        return union
    both: list[Interval] = list(sets[0])
    for parts in sets[1:]:
        both = _common(both, parts)
    return both if both or node.joiner == "and" else union


def _is_unknown(node: Node) -> bool:
    """x, or f(x) of a range."""
    name = isinstance(node, Symbol) or (isinstance(node, Function) and node.name in FREE_FUNCTIONS)
    return name and bool(symbols(node))


def _is_distance(node: Node) -> bool:
    return isinstance(node, Function) and node.name == "abs" and bool(symbols(node))


def _has_range(node: Node) -> bool:
    """x, f(x), |x|, \\sin x, a + b between two bounds. 3x - 1 is an inequality to be solved."""
    return (isinstance(node, (Symbol, Function)) and bool(symbols(node))) or len(symbols(node)) > 1


def _from_relation(node: Relation) -> list[Interval]:
    """x > 3, 3 < x, 0 <= x < 1, 0 < f(x) < 1, 1 < |x| < 2, x \\ne 0, x \\in S."""
    match node:
        case Relation(("in",), (name, whole)) if _is_unknown(name):
            return list(real_set(whole))
        case Relation((operator,), (left, right)):
            if (_is_unknown(right) or _is_distance(right)) and not symbols(left) and operator in MIRRORED:
                operator, left, right = MIRRORED[operator], right, left
            if not symbols(right):
                return _from_bound(operator, left, right)
        case Relation((first, second), (low, middle, high)) if _has_range(middle):
            upwards, downwards = {first, second} <= {"<", "<="}, {first, second} <= {">", ">="}
            if (upwards or downwards) and not (symbols(low) | symbols(high)):
                if _is_distance(middle):
                    return _common(_from_bound(MIRRORED[first], middle, low), _from_bound(second, middle, high))
                if upwards:
                    return [Interval(low, first == "<=", high, second == "<=")]
                return [Interval(high, second == ">=", low, first == ">=")]
    raise NotRealSetError("relation")


def _from_bound(operator: str, left: Node, bound: Node) -> list[Interval]:
    """x > 3, |x| < 3 with a number behind the operator."""
    if isinstance(left, Function) and left.name == "abs":
        return _from_distance(operator, left.arguments[0], bound)
    if _is_unknown(left):
        closed = operator.endswith("=")
        if operator in (">", ">="):
            return [Interval(bound, closed, INFINITY, False)]
        if operator in ("<", "<="):
            return [Interval(MINUS_INFINITY, False, bound, closed)]
        if operator == "!=":
            return _complement(real_set(Set((bound,))))
        if operator == "=":
            return [Interval(bound, True, bound, True)]
    raise NotRealSetError("relation")


def _from_distance(operator: str, inner: Node, radius: Node) -> list[Interval]:
    """|x| < r, |x - c| > r, |x| = r."""
    terms = inner.items if isinstance(inner, Sum) else (inner,)
    shift = [Negative(term) for term in terms if not _is_unknown(term)]
    if len(shift) != len(terms) - 1 or any(map(symbols, shift)) or operator not in MIRRORED:
        raise NotRealSetError("a distance")
    low, high = (Sum((end, *shift)) for end in (Negative(radius), radius))
    within = Interval(low, operator in ("<=", ">"), high, operator in ("<=", ">"))
    if _place(radius) < 0 and operator in ("<", "<=", "="):
        return []
    if _place(radius) < 0:
        raise NotRealSetError("a negative distance")
    if operator in ("=", "!="):
        ends = [Interval(low, True, low, True), Interval(high, True, high, True)]
        return ends if operator == "=" else _complement(_joined(ends))
    return [within] if operator[0] == "<" else _complement((within,))


def same_real_set(left: Node, right: Node) -> bool | None:
    """Whether two expressions are the same subset of the reals; None when one of them is not such a set."""
    try:
        first, second = real_set(left), real_set(right)
    except NotRealSetError:
        return None
    if left == EMPTY_SET or right == EMPTY_SET:
        return first == second
    return len(first) == len(second) and all(map(_same_interval, first, second))


def _same_interval(a: Interval, b: Interval) -> bool:
    return (
        (a.low_closed, a.high_closed) == (b.low_closed, b.high_closed)
        and same_end(a.low, b.low)
        and same_end(a.high, b.high)
    )


def same_end(a: Node, b: Node) -> bool:
    """Equality of two ends, infinite ones included."""
    if a == b:
        return True
    place_a, place_b = approximate(a), approximate(b)
    if place_a is not None and place_b is not None and (math.isinf(place_a) or math.isinf(place_b)):
        return place_a == place_b
    return agree(a, b) is True
