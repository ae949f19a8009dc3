"""Expressions as trees of small immutable nodes, one class a kind; `Node` is any of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, TypeAlias, TypeVar, dataclass_transform

_Kind = TypeVar("_Kind")


@dataclass_transform(frozen_default=True)
def _node(cls: type[_Kind]) -> type[_Kind]:
    """A dataclass that is frozen to the type checker only: a frozen one takes three times as long to make."""
    return dataclass(slots=True, unsafe_hash=True)(cls)


SetKind: TypeAlias = Literal["union", "inter", "minus"]


@_node
class Number:
    """An exact number: 3, 0.25."""

    value: Fraction


@_node
class Symbol:
    """A variable or a constant: x, x_1, \\pi, \\overline{AB}."""

    name: str


@_node
class Text:
    """Words inside an expression; no variable."""

    words: str

    @property
    def name(self) -> str:
        """Its name among those of symbols."""
        return "text:" + self.words.casefold()


@_node
class Sum:
    """Terms; a difference has a Negative among them."""

    items: tuple[Node, ...]


@_node
class Product:
    """left * right."""

    left: Node
    right: Node


@_node
class Quotient:
    """top / bottom."""

    top: Node
    bottom: Node


@_node
class Power:
    """base ^ exponent."""

    base: Node
    exponent: Node


@_node
class Negative:
    """-item."""

    item: Node


@_node
class Function:
    """sin, abs, ! and the like; `log` has its base as a second argument."""

    name: str
    arguments: tuple[Node, ...]


@_node
class Degrees:
    r"""An angle: 30^\circ."""

    item: Node


@_node
class Percent:
    r"""A hundredth: 5\%."""

    item: Node


@_node
class Numeral:
    """Digits of a base: 2B_{12}."""

    digits: str
    base: int


@_node
class Ratio:
    """3:4, and longer ones."""

    items: tuple[Node, ...]


@_node
class Tuple:
    """A point, or with two items an interval; its brackets may differ: (0,1]."""

    opening: str
    closing: str
    items: tuple[Node, ...]

    @property
    def round(self) -> bool:
        return (self.opening, self.closing) == ("(", ")")


@_node
class Set:
    r"""\{1, 2\}, without order."""

    items: tuple[Node, ...]


@_node
class List:
    """Items without brackets. joiner: what stands between them, ',' | 'and' | 'or'."""

    items: tuple[Node, ...]
    joiner: str


@_node
class Matrix:
    """Rows of equal length."""

    rows: tuple[tuple[Node, ...], ...]


@_node
class Relation:
    """A chain: one operator fewer than sides. 'in' and '~' (about) are operators too."""

    operators: tuple[str, ...]
    sides: tuple[Node, ...]


@_node
class SetOperation:
    """A union, an intersection or a difference."""

    kind: SetKind
    items: tuple[Node, ...]


Node: TypeAlias = (
    Number
    | Symbol
    | Text
    | Sum
    | Product
    | Quotient
    | Power
    | Negative
    | Function
    | Degrees
    | Percent
    | Numeral
    | Ratio
    | Tuple
    | Set
    | List
    | Matrix
    | Relation
    | SetOperation
)
E, I = Symbol("e"), Symbol("i")
ONE = Number(Fraction(1))
INFINITY = Symbol("\\infty")
MINUS_INFINITY = Negative(INFINITY)
CONSTANTS = frozenset(("\\pi", "e", "i", "\\infty"))
REALS = Symbol("\\mathbb{R}")
EMPTY_SET = Set(())
FREE_FUNCTIONS = frozenset("fghFGPQ")
"""Names of functions that a problem defines: unknown ones."""


def children(node: Node) -> tuple[Node, ...]:
    """The expressions right below this one."""
    match node:  # the frequent kinds first
        case Number() | Symbol() | Text() | Numeral():
            return ()
        case Product(left, right) | Quotient(left, right) | Power(left, right):
            return (left, right)
        case Negative(item) | Degrees(item) | Percent(item):
            return (item,)
        case Function(arguments=items):
            return items
        case (
            Sum(items) | Ratio(items) | Set(items) | Tuple(items=items) | List(items=items) | SetOperation(items=items)
        ):
            return items
        case Relation(sides=sides):
            return sides
        case Matrix(rows):
            return tuple(cell for row in rows for cell in row)


def replaced(node: Node, by_name: Mapping[str, Node]) -> Node:
    """The expression with others in place of its symbols."""

    def of(child: Node) -> Node:
        return replaced(child, by_name)

    match node:
        case Symbol(name):
            return by_name.get(name, node)
        case Product(left, right) | Quotient(left, right) | Power(left, right):
            return type(node)(of(left), of(right))
        case Negative(item) | Degrees(item) | Percent(item):
            return type(node)(of(item))
        case Sum(items) | Ratio(items) | Set(items):
            return type(node)(tuple(map(of, items)))
        case Function(name, items):
            return Function(name, tuple(map(of, items)))
        case Tuple(opening, closing, items):
            return Tuple(opening, closing, tuple(map(of, items)))
        case List(items, joiner):
            return List(tuple(map(of, items)), joiner)
        case Relation(operators, sides):
            return Relation(operators, tuple(map(of, sides)))
        case SetOperation(kind, items):
            return SetOperation(kind, tuple(map(of, items)))
        case Matrix(rows):
            return Matrix(tuple(tuple(map(of, row)) for row in rows))
    return node


def walk(node: Node) -> list[Node]:
    """The expression and all below it."""
    found = [node]
    for part in found:  # the list grows while it is read
        found.extend(children(part))
    return found
