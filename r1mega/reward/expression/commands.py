"""What LaTeX commands begin: fractions, roots, functions, braces, accents, environments."""

from __future__ import annotations

from fractions import Fraction

from r1mega.reward.expression.grammar import Grammar
from r1mega.reward.expression.nodes import (
    EMPTY_SET,
    ONE,
    REALS,
    Function,
    List,
    Matrix,
    Negative,
    Node,
    Number,
    Power,
    Quotient,
    Relation,
    Set,
    Symbol,
    Tuple,
)
from r1mega.reward.expression.text import OPEN_TEXT
from r1mega.reward.expression.tokens import FUNCTIONS, PRODUCT_SIGNS, UnreadableError

_ACCENTS = frozenset(
    "\\overline \\bar \\vec \\hat \\widehat \\overrightarrow \\tilde \\dot \\angle \\widetilde".split()
)
_LETTERS = frozenset(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu "
    "xi rho sigma tau phi varphi chi psi omega "
    "Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega pi infty ell hbar".split()
)


def command(parser: Grammar, token: str) -> Node:
    """What a command (already taken) begins, with its arguments. UnreadableError for an unknown one."""
    name = token[1:]
    if token == "\\frac":
        return Quotient(parser.argument(), parser.argument())
    if token in ("\\sqrt", "\\cbrt"):
        return _root(parser, token)
    if name in FUNCTIONS or token == "\\abs":
        return _function(parser, name)
    if token == "\\{":
        return _braces(parser)
    if token == "\\langle":
        items = parser.statement()
        parser.take("\\rangle")
        return Tuple("(", ")", tuple(items))
    if token in ("\\lvert", "\\vert", "\\mid"):
        return parser.absolute(("\\rvert", "\\vert", "|", "\\mid"))
    if token in ("\\lfloor", "\\lceil"):
        inner = parser.relation()
        parser.take("\\r" + name[1:])
        return Function(name[1:], (inner,))
    if token in ("\\binom", "\\perm"):
        return Function(name, (parser.argument(), parser.argument()))
    if token == "\\begin":
        return _environment(parser)
    if token in ("\\emptyset", "\\varnothing"):
        return EMPTY_SET
    if token in ("\\mathbb", "\\Bbb"):
        return Symbol("\\mathbb{" + parser.raw_group() + "}")
    if token in _ACCENTS:
        return _accent(parser, token)
    if name.isalpha() and name in _LETTERS:
        return Symbol(token.replace("\\var", "\\"))
    raise UnreadableError(f"unknown command {token}")


def _accent(parser: Grammar, token: str) -> Node:
    label = parser.raw_group().replace(OPEN_TEXT, "")
    if not label:
        raise UnreadableError(f"{token} of nothing")
    if token == "\\overline" and len(label) == 2 and label.isupper():
        label = "".join(sorted(label))  # a segment has no direction
    return Symbol(f"{token}{{{label}}}")


def _root(parser: Grammar, token: str) -> Node:
    degree: Node = Number(Fraction(3 if token == "\\cbrt" else 2))
    if parser.peek() == "[" and token == "\\sqrt":
        parser.at += 1
        degree = parser.sum()
        parser.take("]")
    return Power(parser.group() if parser.peek() == "{" else parser.primary(), Quotient(ONE, degree))


def _function(parser: Grammar, name: str) -> Node:
    """\\sin^2 x, \\log_2(8), \\sin^{-1} x (the inverse): the name is taken, exponent and base follow."""
    exponent: Node | None = None
    base: Node | None = None
    while parser.peek() in ("^", "_"):
        if parser.take() == "^":
            exponent = parser.group() if parser.peek() == "{" else parser.signed_factor()
        else:
            base = parser.group() if parser.peek() == "{" else parser.argument()
    arguments = _function_arguments(parser)
    if exponent == Negative(ONE) and name in ("sin", "cos", "tan"):
        return Function("arc" + name, arguments)
    applied = Function(name, arguments if base is None else (*arguments, base))
    return applied if exponent is None else Power(applied, exponent)


def _function_arguments(parser: Grammar) -> tuple[Node, ...]:
    """A bracketed argument ends the application; without brackets it reaches over a juxtaposed product: \\sin
    3x.
    """
    if parser.peek() in ("(", "["):
        inner = parser.bracket(parser.take())
        return inner.items if isinstance(inner, Tuple) else (inner,)
    if parser.peek() == "{":
        return (parser.group(),)
    negative = parser.peek() == "-" and parser.take() == "-"
    node = parser.factor()
    while (
        parser.starts_factor(parser.peek())
        and parser.peek()[1:] not in FUNCTIONS
        and parser.peek() not in PRODUCT_SIGNS
    ):
        node = parser.juxtaposed(node)
    return (Negative(node) if negative else node,)


def _braces(parser: Grammar) -> Node:
    """After \\{: a set of items, or the condition of a set builder over the reals."""
    _colon_to_bar(parser)
    bars, parser.bars = parser.bars, 1  # a bar after an item begins a condition
    items = parser.statement()
    parser.bars = bars
    if parser.peek() in ("|", ":", "\\mid"):  # set builder: the condition is the set
        parser.at += 1
        condition = parser.statement()
        parser.take("\\}")
        match items[:1]:
            case [Symbol()]:
                pass
            case [Relation(sides=(*_, last))] if last == REALS:
                pass
            case _:  # numbers of another kind, points, or nothing
                raise UnreadableError("a set of something else than real numbers")
        return condition[0] if len(condition) == 1 else List(tuple(condition), "and")
    parser.take("\\}")
    return Set(tuple(items))


def _colon_to_bar(parser: Grammar) -> None:
    """The colon of {x : x > 2} and {x \\in \\mathbb{R} : x > 2} begins a condition, it is no ratio."""
    if not parser.peek().isalpha():
        return
    for at in range(parser.at + 1, len(parser.tokens)):
        if parser.tokens[at] in ("\\}", ",", ";", "|", "\\mid"):
            return
        if at == parser.at + 1 and parser.tokens[at] not in (":", "\\in"):
            return
        if parser.tokens[at] == ":":
            parser.tokens[at] = "|"
            return


def _environment(parser: Grammar) -> Node:
    """After \\begin: a matrix, or a system of equations, up to \\end{...}."""
    name = parser.raw_group().replace(OPEN_TEXT, "")
    if name == "array" and parser.peek() == "{":
        parser.raw_group()
    rows: list[list[Node]] = [[]]
    while parser.peek() != "\\end":
        if parser.peek() == "&":
            parser.at += 1
        elif parser.peek() == "\\\\":
            parser.at += 1
            rows.append([])
        elif parser.peek() in (",", ";"):
            parser.at += 1
        else:
            rows[-1].append(parser.relation())
    parser.at += 1
    parser.raw_group()
    rows = [row for row in rows if row]
    cells = [cell for row in rows for cell in row]
    if (
        cells
        and name in ("cases", "array", "aligned", "gathered")
        and all(isinstance(cell, Relation) for cell in cells)
    ):
        return List(tuple(cells), "and")  # a system of equations
    if name not in ("pmatrix", "bmatrix", "matrix", "array", "smallmatrix", "Bmatrix"):
        raise UnreadableError(f"unknown environment {name}")
    if not rows or len({len(row) for row in rows}) != 1:
        raise UnreadableError("rows of a matrix differ in length")
    return Matrix(tuple(map(tuple, rows)))
