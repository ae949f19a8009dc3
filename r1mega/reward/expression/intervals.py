"""Subsets of the real line as sorted intervals: `(0,1) \\cup \\{2\\}`, `x > 3`, `0 \\le x < 1`, `\\mathbb{R}
\\setminus \\{0\\}`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from r1mega.reward.expression.evaluate import agree, approximate
from r1mega.reward.expression.exact import symbols
from r1mega.reward.expression.nodes import EMPTY_SET, INFINITY, REALS, Node

_MINUS_INFINITY: Node = ("neg", INFINITY)
MIRRORED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "!=": "!=", "=": "="}


@dataclass(frozen=True, slots=True)
class Interval:
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
        raise NotRealSetError(str(node[0]))
    return value


def real_set(node: Node) -> tuple[Interval, ...]:
    """The intervals of a set expression in order, joined where they touch. Raises NotRealSetError."""
    tag = node[0]
    if node == REALS or (tag == "text" and node[1] == "R"):
        parts = [Interval(_MINUS_INFINITY, False, INFINITY, False)]
    elif tag == "tuple" and len(node[3]) == 2:
        parts = [Interval(node[3][0], node[1] == "[", node[3][1], node[2] == "]")]
        if _place(parts[0].low) > _place(parts[0].high):
            raise NotRealSetError("the ends are in the wrong order")
    elif tag == "set":
        parts = [Interval(item, True, item, True) for item in node[1]]
    elif tag in ("union", "list"):
        parts = [interval for item in node[1] for interval in real_set(item)]
    elif tag == "minus":
        parts = _difference(real_set(node[1][0]), real_set(node[1][1]))
    elif tag == "rel":
        parts = _from_relation(node)
    else:
        raise NotRealSetError(tag)
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


def _difference(whole: tuple[Interval, ...], removed: tuple[Interval, ...]) -> list[Interval]:
    """Removal of points; other differences are not needed for answers."""
    parts = list(whole)
    for point in removed:
        if point.low != point.high:
            raise NotRealSetError("a difference of intervals")
        place = _place(point.low)
        cut = []
        for part in parts:
            if _place(part.low) < place < _place(part.high):
                cut += [
                    Interval(part.low, part.low_closed, point.low, False),
                    Interval(point.low, False, part.high, part.high_closed),
                ]
            else:
                cut.append(part)
        parts = cut
    return parts


def _from_relation(node: Node) -> list[Interval]:
    """x > 3, 3 < x, 0 <= x < 1, x \\ne 0, x \\in S."""
    operators, sides = node[1], node[2]
    if operators == ("in",) and sides[0][0] == "sym":
        return list(real_set(sides[1]))
    if len(sides) == 2 and sides[1][0] == "sym" and not symbols(sides[0]) and operators[0] in MIRRORED:
        operators, sides = (MIRRORED[operators[0]],), (sides[1], sides[0])
    if len(sides) == 2 and sides[0][0] == "sym" and symbols(sides[0]) and not symbols(sides[1]):
        bound, closed = sides[1], operators[0].endswith("=")
        if operators[0] in (">", ">="):
            return [Interval(bound, closed, INFINITY, False)]
        if operators[0] in ("<", "<="):
            return [Interval(_MINUS_INFINITY, False, bound, closed)]
        if operators[0] == "!=":
            return _difference(real_set(REALS), real_set(("set", (bound,))))
    if len(sides) == 3 and sides[1][0] == "sym" and symbols(sides[1]) and not (symbols(sides[0]) | symbols(sides[2])):
        if set(operators) <= {"<", "<="}:
            return [Interval(sides[0], operators[0] == "<=", sides[2], operators[1] == "<=")]
        if set(operators) <= {">", ">="}:
            return [Interval(sides[2], operators[1] == ">=", sides[0], operators[0] == ">=")]
    raise NotRealSetError("relation")


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
