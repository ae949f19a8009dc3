"""Left sides: what an answer gives a value to, and the values of several unknowns."""

from __future__ import annotations

from collections.abc import Mapping

from r1mega.reward.expression.exact import exact, symbols
from r1mega.reward.expression.nodes import (
    CONSTANTS,
    FREE_FUNCTIONS,
    Function,
    List,
    Negative,
    Node,
    Number,
    Product,
    Quotient,
    Relation,
    Set,
    Symbol,
    Text,
    Tuple,
    children,
)
from r1mega.reward.expression.values import equal_values, is_near, is_numeral

COORDINATES = frozenset(map(Symbol, "xyz"))
_COMPLEX = frozenset("zw")  # |z| = 2 is a circle
_PLANE = frozenset("xy")  # an equation between them is a curve


def is_name(node: Node) -> bool:
    """Left side of an assignment: x, f(x), (x, y), area, AB, P(X = 1)."""
    match node:
        case Text():
            return True
        case Symbol(name):
            return name not in CONSTANTS
        case Function(name):
            return name in FREE_FUNCTIONS
        case Tuple(items=items):
            return all(map(is_name, items))
        case Product(left, right) | Quotient(left, right):
            return is_name(left) and is_name(right)
    return False


def is_quantity(node: Node) -> bool:
    """A name, or what is made of names: |z|, \\cos t, V_1 : V_2, AB^2, a + b. x + y and x^2 belong to equations."""
    return is_name(node) or (
        not isinstance(node, (Relation, Tuple, List)) and bool(symbols(node)) and not _loose(node) & _PLANE
    )


def _loose(node: Node) -> frozenset[str]:
    """The names outside of functions."""
    match node:
        case Symbol(name):
            return frozenset((name,))
        case Function(name) if name != "abs":
            return frozenset()
    return frozenset().union(*map(_loose, children(node)))


def is_solved(relation: Relation) -> bool:
    """x = 4, x > 1, r = A / (2\\pi), |z| = 5: a quantity on one side and what it is on the other. A curve is none."""
    if len(relation.sides) != 2 or symbols(relation) >= _PLANE:
        return False
    for subject, value in (relation.sides, relation.sides[::-1]):
        names = {f"{subject.name}()"} if isinstance(subject, Function) and is_name(subject) else symbols(subject)
        if is_quantity(subject) and not names & symbols(value) and (is_name(subject) or not symbols(value)):
            return True
    return False


def value_of(node: Node) -> Node:
    """`x = 5` -> 5, `(x, y) = (1, 2)` -> (1, 2), `|z| = 5` -> 5, `x = 2 + 3 = 5` -> 5 when the chain is true; of a list
    its values, of several groups of assignments a list of tuples.
    """
    if isinstance(node, List):
        found = groups(node)
        if len(found) > 1:
            return List(tuple(Tuple("(", ")", tuple(map(value_of, group.values()))) for group in found), node.joiner)
        return List(tuple(map(_entry, node.items)), node.joiner)
    if not isinstance(node, Relation) or set(node.operators) != {"="}:
        return node
    first, *rest = node.sides
    if is_name(first) or (is_quantity(first) and not any(map(symbols, rest))):
        first, *rest = rest
    elif len(rest) == 1 and is_quantity(rest[0]) and exact(first) is not None:
        return first
    sides = (first, *rest)
    if any(first != side and equal_values(first, side) is not True for side in rest):
        return node
    return next(filter(is_numeral, sides), sides[-1])


def _entry(item: Node) -> Node:
    """An item of a list: the solution of a system is one."""
    if isinstance(item, List) and len(group := groups(item)) == 1:
        return Tuple("(", ")", tuple(map(value_of, group[0].values())))
    return value_of(item)


def assignments(node: Node) -> list[tuple[Node, Node]]:
    """What is given a value and the item of each `x = 1`, `f(1) = 2`, `a + b = 3` of a list of nothing else; of
    `(x, y) = (1, 2)` those of its entries. Empty for anything else.
    """
    found: list[tuple[Node, Node]] = []
    for item in node.items if isinstance(node, List) else (node,):
        if not isinstance(item, Relation) or set(item.operators) != {"="}:
            return []
        entries = _entries(item)
        for part in entries:
            subject, *values = part.sides
            if not (_is_scalar_name(subject) or (is_quantity(subject) and not any(map(symbols, values)))):
                return []
            found.append((subject, part))
    return found


def _entries(item: Relation) -> list[Relation]:
    """(x, y) = (1, 2) as x = 1 and y = 2; any other relation itself."""
    points = [side.items for side in item.sides if isinstance(side, Tuple) and side.round]
    if len(points) < len(item.sides) or len({len(point) for point in points}) > 1:
        return [item]
    return [Relation(item.operators, sides) for sides in zip(*points, strict=True)]


def _is_scalar_name(node: Node) -> bool:
    return is_name(node) and not isinstance(node, Tuple)


def groups(node: Node) -> list[dict[Node, Node]]:
    """The assignments of a list by what is given a value, each once in a group: p = 5, q = 2; p = 7, q = 2 are two
    groups. Empty for values of one unknown (x = 1, x = 2) and for anything else.
    """
    found = assignments(node)
    if len(numbered := _numbered(found)) > 1:
        return numbered
    size = len({name for name, _ in found})
    if size < 2 or len(found) % size:
        return []
    parts = [dict(found[start : start + size]) for start in range(0, len(found), size)]
    return parts if all(len(part) == size for part in parts) else []


def _numbered(found: list[tuple[Node, Node]]) -> list[dict[Node, Node]]:
    """x_1, y_1 and x_2, y_2 are two groups of x and y."""
    parts: dict[str, dict[Node, Node]] = {}
    for name, item in found:
        stem, _, number = name.name.partition("_") if isinstance(name, Symbol) else ("", "", "")
        parts.setdefault(number, {})[Symbol(stem)] = item
    alike = len({frozenset(part) for part in parts.values()}) == 1 and sum(map(len, parts.values())) == len(found)
    return list(parts.values()) if alike and "" not in parts and len(next(iter(parts.values()))) > 1 else []


def stems(group: Mapping[Node, Node]) -> set[Node]:
    """x_1 and x_2 are two values of x."""
    return {Symbol(name.name.partition("_")[0]) if isinstance(name, Symbol) else name for name in group}


def named_alike(group: Mapping[Node, Node], other: Mapping[Node, Node]) -> Mapping[Node, Node]:
    """The other group under the names of the first where they only differ in writing: b + a for a + b."""
    if group.keys() == other.keys() or all(isinstance(name, Symbol) for name in other):
        return other
    return {next((own for own in group if own == name or equal_values(own, name)), name): other[name] for name in other}


def values_in_order(group: Mapping[Node, Node], natural: bool) -> list[Node]:
    """The values as they were written; natural: those of coordinates as in a point."""
    names = sorted(group, key=repr) if natural and group.keys() <= COORDINATES else list(group)
    return [value_of(group[name]) for name in names]


def spread(node: Node, other: Node, distances: bool = False) -> Node:
    """Beside a point, or values of several unknowns: x = y = 2 as x = 2, y = 2. distances: beside several values |x| = 2 as
    x = -2 or x = 2. Anything else itself.
    """
    match node:
        case Relation(operators, (Function("abs", (Symbol(name) as unknown,)), distance)) | Relation(
            operators, (distance, Function("abs", (Symbol(name) as unknown,)))
        ) if distances and operators == ("=",) and name not in _COMPLEX and (exact(distance) or 0) > 0:
            if isinstance(other, (List, Set)) and len(other.items) > 1:
                return List(tuple(Relation(("=",), (unknown, end)) for end in (Negative(distance), distance)), "or")
        case Relation(operators, (*unknowns, value)) if set(operators) == {"="} and len(unknowns) > 1:
            plain = all(isinstance(name, Symbol) and is_name(name) for name in unknowns) and not symbols(value)
            if plain and (isinstance(other, Tuple) or groups(other)):
                return List(tuple(Relation(("=",), (name, value)) for name in unknowns), ",")
    return node


def meant_beside(node: Node, other: Node) -> Node:
    """P(7,2) and A(1,2) are points beside a point, P(7,2) is a number of arrangements beside a number."""
    match node:
        case Function("P" | "Q" | "F" | "G", items) if isinstance(other, Tuple) and other.round and len(items) > 1:
            return Tuple("(", ")", items)
        case Product(Symbol(name), Tuple() as point) if isinstance(other, Tuple) and point.round and name[:1].isupper():
            return point
        case Function("P", (Number(), Number()) as items) if exact(other) is not None:
            return Function("perm", items)
    return node


def versions(node: Node) -> tuple[Node, Node | None]:
    """The exact part and the decimal of `exact \\approx decimal` where the decimal fits; of `k \\approx 3` the 3."""
    if not isinstance(node, Relation) or "~" not in node.operators:
        return node, None
    at = node.operators.index("~")
    if set(node.operators[at:]) != {"~"} or set(node.operators[:at]) - {"="}:
        return node, None
    last, decimal = node.sides[at], node.sides[-1]
    if at == 0 and is_quantity(last):
        return decimal, None
    if not is_near(last, decimal):
        return node, None
    return Relation(node.operators[:at], node.sides[: at + 1]) if at else last, decimal
