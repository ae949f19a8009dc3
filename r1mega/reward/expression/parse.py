"""Recursive-descent parser of cleaned answers into `nodes`."""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache

from r1mega.reward.expression.nodes import (
    EMPTY_SET,
    ONE,
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
    SetKind,
    SetOperation,
    Sum,
    Symbol,
    Text,
    Tuple,
    children,
)
from r1mega.reward.expression.text import AND_MARK, OPEN_TEXT, OR_MARK
from r1mega.reward.expression.tokens import FUNCTIONS, UnreadableError, tokenize

MAX_CHARS = 2000
MAX_DIGITS = 1000
MAX_DEPTH = 40
MAX_TOKENS = 800

_RELATIONS = {
    "=": "=",
    "<": "<",
    ">": ">",
    "<=": "<=",
    ">=": ">=",
    "!=": "!=",
    "\\le": "<=",
    "\\leq": "<=",
    "\\leqslant": "<=",
    "\\ge": ">=",
    "\\geq": ">=",
    "\\geqslant": ">=",
    "\\lt": "<",
    "\\gt": ">",
    "\\ne": "!=",
    "\\neq": "!=",
    "\\in": "in",
    "\\approx": "~",
    "\\simeq": "~",
    "\\approxeq": "~",
    "\\doteq": "~",
    "\\equiv": "=",
    "\\colon": ":",
    "=>": "=>",
    "\\to": "=>",
    "\\implies": "=>",
}
_SEPARATORS = {",": "", ";": "", AND_MARK: "and", OR_MARK: "or"}
_SET_OPERATORS: dict[str, SetKind] = {
    "\\cup": "union",
    "\\bigcup": "union",
    "\\cap": "inter",
    "\\setminus": "minus",
    "\\backslash": "minus",
}
_CLOSERS = frozenset(
    f") ] }} \\}} \\rangle \\rfloor \\rceil \\rvert & \\\\ \\end , ; {AND_MARK} {OR_MARK} : + - / ^ _ ! ' % ‰ "
    "\\pm \\mp \\div \\mid \\degree \\circ \\pmod".split()
)
_PRODUCT = frozenset(("*", "\\cdot", "\\times", "\\ast"))
_ACCENTS = frozenset(
    "\\overline \\bar \\vec \\hat \\widehat \\overrightarrow \\tilde \\dot \\angle \\widetilde".split()
)
_LETTERS = frozenset(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu "
    "xi rho sigma tau phi varphi chi psi omega "
    "Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega pi infty ell hbar".split()
)


class Parser:
    """One reading of a list of tokens."""

    def __init__(self, tokens: list[str], sign: int) -> None:
        self.tokens = tokens
        self.at = 0
        self.depth = 0
        self.bars = 0
        self.sign = sign  # how \pm is read: +1 or -1
        self.signed = False  # a \pm was met
        self.joiner = ","  # between the items of the outermost list: ',' | 'and' | 'or'

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self, expected: str | None = None) -> str:
        token = self.peek()
        if not token or (expected is not None and token != expected):
            raise UnreadableError(f"expected {expected or 'more'}, found {token or 'the end'}")
        self.at += 1
        return token

    def raw_group(self) -> str:
        """What the next braces hold, or the next token, unread."""
        start = self.at
        if self.peek() == "{":
            self.at = self.tokens.index("}", self.at) + 1 if "}" in self.tokens[self.at :] else len(self.tokens)
        else:
            self.at += 1
        return "".join(self.tokens[start : self.at]).strip("{}")

    def statement(self) -> list[Node]:
        """Items between commas or semicolons, up to a closing token."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise UnreadableError(f"nested deeper than {MAX_DEPTH}", final=True)
        items: list[Node] = []
        while True:
            while self.peek() in _SEPARATORS:
                if self.depth == 1:
                    self.joiner = _SEPARATORS[self.peek()] or self.joiner
                self.at += 1
            if not self.peek() or self.peek() in (
                ")",
                "]",
                "}",
                "\\}",
                "\\rangle",
                "&",
                "\\\\",
                "\\end",
                ":",
                "\\rvert",
            ):
                break
            items.append(self.relation())
            if self.peek() == "\\pmod":
                self.at += 1
                items = _modulo(items, self.group() if self.peek() == "{" else self.factor())
            if self.peek() not in _SEPARATORS:
                break
        self.depth -= 1
        return items

    def relation(self) -> Node:
        """`a = b`, `a < b <= c`, `x \\in A`; without an operator what stands there."""
        sides = [self.union()]
        operators: list[str] = []
        while self.peek() in _RELATIONS:
            operators.append(_RELATIONS[self.take()])
            if operators[-1] in ("<", ">") and self.peek() == "=":
                operators[-1] += self.take()
            sides.append(self.union())
        return Relation(tuple(operators), tuple(sides)) if operators else sides[0]

    def union(self) -> Node:
        node = self.ratio()
        while self.peek() in _SET_OPERATORS or (self.peek() == "U" and _holds_points(node)):
            kind = _SET_OPERATORS.get(self.take(), "union")
            other = self.ratio()
            goes_on = isinstance(node, SetOperation) and node.kind == kind != "minus"
            node = SetOperation(kind, (*children(node), other) if goes_on else (node, other))
        return node

    def ratio(self) -> Node:
        items = [self.sum()]
        while self.peek() == ":" and self.bars >= 0:
            self.at += 1
            items.append(self.sum())
        return Ratio(tuple(items)) if len(items) > 1 else items[0]

    def sum(self) -> Node:
        """Terms with their signs; \\pm and \\mp are read with the sign of this reading."""
        items: list[Node] = []
        while True:
            negative = False
            while self.peek() in ("+", "-", "\\pm", "\\mp"):
                token = self.take()
                if token in ("\\pm", "\\mp"):
                    self.signed = True
                    token = "-" if (self.sign < 0) == (token == "\\pm") else "+"
                negative ^= token == "-"
            term = self.product()
            items.append(Negative(term) if negative else term)
            if self.peek() not in ("+", "-", "\\pm", "\\mp"):
                return Sum(tuple(items)) if len(items) > 1 else items[0]

    def product(self) -> Node:
        """Factors joined by a sign of multiplication or division, or by standing side by side."""
        node = self.factor()
        while True:
            token = self.peek()
            if token in _PRODUCT:
                self.at += 1
                node = Product(node, self.signed_factor())
            elif token in ("/", "\\div"):
                self.at += 1
                node = self.over(node)
            elif self.starts_factor(token):
                node = self.juxtaposed(node)
            else:
                return node

    def over(self, top: Node) -> Node:
        """A quotient. A mark behind it is of the whole: 1/2\\% is half a percent, 45/2^\\circ 22.5 degrees."""
        under = self.signed_factor()
        if not isinstance(under, (Percent, Degrees)) or isinstance(top, (Percent, Degrees)):
            return Quotient(top, under)
        if self.tokens[self.at - 1] == ")":  # the mark stands within: 1/(2\\%)
            return Quotient(top, under)
        item = under.item
        if self.tokens[self.at - 1] == "‰":  # of a percent the tenth, which is below the line here
            item = _scaled(item, Fraction(100))
        return type(under)(Quotient(top, item))

    def juxtaposed(self, left: Node) -> Node:
        """2x is a product, 3 \\frac12 and 3 1/2 are mixed numbers, 3 5, 3 6/5 and 3.0 1/2 are nothing."""
        mark = self.at
        right = self.factor()
        if self.tokens[mark] == "(" or self.tokens[mark - 1] in (")", "]"):
            return Product(left, right)
        if isinstance(left, Number):
            part = _unmarked(right)
            if isinstance(right, Number) and self.peek() == "/":
                self.at += 1
                part = Quotient(right, _unmarked(right := self.factor()))
            elif self.tokens[mark] != "\\frac":
                part = right
            match part:
                case Quotient(Number(over), Number(under)):
                    written = (self.tokens[mark - 1], *map(str, (over, under)))
                    if not all(map(str.isdigit, written)) or not 0 < over < under:
                        raise UnreadableError("neither a mixed number nor a product", final=True)
                    return _marked(right, Sum((left, part)))
                case Number() | Quotient(Number()) if self.tokens[mark] != "\\frac":
                    raise UnreadableError("two numbers side by side")
        return Product(left, right)

    def signed_factor(self) -> Node:
        if self.peek() in ("-", "+"):
            return Negative(self.signed_factor()) if self.take() == "-" else self.signed_factor()
        return self.factor()

    def starts_factor(self, token: str) -> bool:
        if not token or token in _CLOSERS or token in _RELATIONS or token in _SET_OPERATORS or token == "U":
            return False
        return not (token in ("|", "\\rvert") and self.bars > 0) or token == "\\lvert"

    def factor(self) -> Node:
        """A primary with what follows it: powers, degrees, factorials, percent, primes, subscripts."""
        node = self.primary()
        while True:
            token = self.peek()
            if token == "^":
                self.at += 1
                node = self.power(node)
            elif token in ("\\degree", "\\circ"):
                self.at += 1
                node = self.degrees(node)
            elif token == "!":
                self.at += 1
                node = Function("!", (node,))
            elif token in ("%", "‰"):
                self.at += 1
                node = Percent(node if token == "%" else _scaled(node, Fraction(1, 10)))
            elif token == "'" and isinstance(node, Symbol):
                self.at += 1
                node = Symbol(node.name + "'")
            elif token == "_" and isinstance(node, (Number, Text, Symbol, Function)):
                self.at += 1
                node = self.subscript(node)
            else:
                return node

    def power(self, base: Node) -> Node:
        """After ^: an exponent, degrees (^\\circ) or a prime (^\\prime)."""
        token = self.peek()
        if token == "\\circ" or self.tokens[self.at : self.at + 3] == ["{", "\\circ", "}"]:
            self.at += 1 if token == "\\circ" else 3
            return self.degrees(base)
        if token in ("'", "\\prime"):
            self.at += 1
            return Symbol(f"({base})'")  # a name of its own for the prime of anything
        if token in ("-", "+"):
            return Power(base, self.signed_factor())
        exponent = self.group() if token == "{" else self.primary()
        if self.peek() == "^" and self.tokens[self.at + 1 : self.at + 2] != ["\\circ"]:
            self.at += 1
            exponent = self.power(exponent)  # 2^3^2 is 2^9
        return Power(base, exponent)

    def degrees(self, node: Node) -> Node:
        """45^\\circ, with minutes where they follow: 45^\\circ 30'."""
        if self.peek().isdigit() and self.tokens[self.at + 1 : self.at + 2] == ["'"]:
            minutes = Quotient(Number(Fraction(self.take())), Number(Fraction(60)))
            self.at += 1
            return Degrees(Sum((node, minutes)))
        return Degrees(node)

    def subscript(self, node: Number | Text | Symbol | Function) -> Node:
        """What follows `_`: the base of a numeral, or an index that belongs to the name."""
        start = self.at
        if self.tokens[self.at + 1 : self.at + 2] in (["\\max"], ["\\min"]):
            inner: Node = Text(self.raw_group())
        else:
            inner = self.group() if self.peek() == "{" else Text(self.take())
        label = "".join(self.tokens[start : self.at]).strip("{}")
        if isinstance(node, Number) or (isinstance(node, Text) and label.isdigit()):
            if not label.isdigit() or isinstance(inner, List):
                raise UnreadableError(f"base {label!r} is not a number")
            digits = node.words if isinstance(node, Text) else str(node.value)
            return Numeral(digits.upper(), int(label))
        return Symbol(f"{node.words if isinstance(node, Text) else node.name}_{label}")

    def group(self) -> Node:
        """{...}: LaTeX grouping; with several items a set."""
        self.take("{")
        bars, self.bars = self.bars, 0
        items = self.statement()
        self.bars = bars
        if self.peek() in ("|", ":", "\\mid"):
            self.at += 1
            items = self.statement()
        self.take("}")
        if not items:
            raise UnreadableError("an empty group")
        return items[0] if len(items) == 1 else Set(tuple(items))

    def argument(self) -> Node:
        """Argument of \\frac: a group or a single token; of a number only its first digit (\\frac12)."""
        token = self.peek()
        if token == "{":
            return self.group()
        if token[:1].isdigit() and len(token) > 1 and token.isdigit():
            self.tokens[self.at] = token[1:]
            return Number(Fraction(token[0]))
        if token == "-":
            self.at += 1
            return Negative(self.argument())
        return self.primary()

    def primary(self) -> Node:
        """A number, a name, a command, or what brackets enclose."""
        self.depth += 1
        if self.depth > 2 * MAX_DEPTH:
            raise UnreadableError(f"nested deeper than {MAX_DEPTH}", final=True)
        token = self.take()
        first = token[0]
        if first.isdigit() or (first == "." and len(token) > 1):
            node: Node = _number(token, self)
        elif first == "\\" and len(token) > 1:
            node = _command(self, token)
        elif first == OPEN_TEXT:
            node = Text(token[1:])
        elif token in ("(", "["):
            node = self.bracket(token)
        elif token == "{":
            self.at -= 1
            node = self.group()
        elif token == "|":
            node = self.absolute(("|",))
        elif first.isalpha():
            node = self.letter(token)
        else:
            raise UnreadableError(f"unexpected {token!r}")
        self.depth -= 1
        return node

    def letter(self, token: str) -> Node:
        if token in "fghFGPQ" and self.peek() == "(":
            self.at += 1
            argument = self.bracket("(")
            return Function(token, argument.items if isinstance(argument, Tuple) else (argument,))
        return Symbol(token)

    def bracket(self, opening: str) -> Node:
        """What stands after `opening`, to its end: one thing, a tuple or an interval."""
        bars, self.bars = self.bars, 0
        items = self.statement()
        closing = self.take()
        self.bars = bars
        if closing not in (")", "]"):
            raise UnreadableError(f"{opening} closed by {closing}")
        if not items:
            raise UnreadableError("empty brackets")
        if len(items) == 1:
            if {opening + closing} & {"(]", "[)"}:
                raise UnreadableError(f"{opening} closed by {closing}")
            return items[0]
        return Tuple(opening, closing, tuple(items))

    def absolute(self, closers: tuple[str, ...]) -> Node:
        self.bars += 1
        inner = self.relation()
        self.bars -= 1
        if self.take() not in closers:
            raise UnreadableError("an open |")
        return Function("abs", (inner,))


def _modulo(items: list[Node], modulus: Node) -> list[Node]:
    """n = 1, 2 \\pmod 3: the modulus is of all that stands before it, and of the right sides only."""
    found: list[Node] = []
    for item in items:
        match item:
            case Function("mod"):
                found.append(item)
            case Relation(("=",), (name, Function("mod"))):
                found.append(item)
            case Relation(("=",), (name, residue)):
                found.append(Relation(("=",), (name, Function("mod", (residue, modulus)))))
            case Relation():
                raise UnreadableError("a congruence of more than two sides")
            case _:
                found.append(Function("mod", (item, modulus)))
    return found


def _holds_points(node: Node) -> bool:
    return isinstance(node, (Tuple, Set)) or (isinstance(node, SetOperation) and node.kind == "union")


def _scaled(node: Node, factor: Fraction) -> Node:
    return Number(node.value * factor) if isinstance(node, Number) else Product(node, Number(factor))


def _unmarked(node: Node) -> Node:
    return node.item if isinstance(node, (Percent, Degrees)) else node


def _marked(like: Node, node: Node) -> Node:
    """A mark behind a mixed number is of the whole number: 33\\frac13\\%."""
    return type(like)(node) if isinstance(like, (Percent, Degrees)) else node


def _number(token: str, parser: Parser) -> Number:
    if len(token) > MAX_DIGITS:
        raise UnreadableError(f"a number of more than {MAX_DIGITS} digits", final=True)
    if "." in token and parser.peek() in ("\\overline", "\\dot") and "e" not in token.lower():
        return _repeating(token, parser)
    return Number(Fraction(token))


def _repeating(token: str, parser: Parser) -> Number:
    """0.1\\overline{6}: the digits under the bar repeat for ever."""
    parser.take()
    period = parser.raw_group()
    if not period.isdigit():
        raise UnreadableError("a repeating part that is not digits")
    decimals = len(token.split(".")[1])
    return Number(Fraction(token) + Fraction(int(period), 10**decimals * (10 ** len(period) - 1)))


# --- LaTeX commands ------------------------------------------------------------
def _command(parser: Parser, token: str) -> Node:
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


def _accent(parser: Parser, token: str) -> Node:
    label = parser.raw_group().replace(OPEN_TEXT, "")
    if not label:
        raise UnreadableError(f"{token} of nothing")
    if token == "\\overline" and len(label) == 2 and label.isupper():
        label = "".join(sorted(label))  # a segment has no direction
    return Symbol(f"{token}{{{label}}}")


def _root(parser: Parser, token: str) -> Node:
    degree: Node = Number(Fraction(3 if token == "\\cbrt" else 2))
    if parser.peek() == "[" and token == "\\sqrt":
        parser.at += 1
        degree = parser.sum()
        parser.take("]")
    return Power(parser.group() if parser.peek() == "{" else parser.primary(), Quotient(ONE, degree))


def _function(parser: Parser, name: str) -> Node:
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


def _function_arguments(parser: Parser) -> tuple[Node, ...]:
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
    while parser.starts_factor(parser.peek()) and parser.peek()[1:] not in FUNCTIONS and parser.peek() not in _PRODUCT:
        node = parser.juxtaposed(node)
    return (Negative(node) if negative else node,)


def _braces(parser: Parser) -> Node:
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


def _colon_to_bar(parser: Parser) -> None:
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


def _environment(parser: Parser) -> Node:
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


# --- the whole ------------------------------------------------------------
@lru_cache(maxsize=8192)
def parse(text: str, join_thousands: bool = True) -> Node:
    """Cleaned text -> node. `\\pm` gives both signs as a list. Raises UnreadableError."""
    if len(text) > MAX_CHARS:
        raise UnreadableError(f"longer than {MAX_CHARS} characters", final=True)
    tokens = tokenize(text, join_thousands)
    if len(tokens) > MAX_TOKENS:
        raise UnreadableError(f"more than {MAX_TOKENS} tokens", final=True)
    readings: list[Node] = []
    for sign in (1, -1):
        parser = Parser(list(tokens), sign)
        items = parser.statement()
        if parser.at != len(parser.tokens):
            raise UnreadableError(f"unexpected {parser.peek()!r}")
        if not items:
            raise UnreadableError("nothing to read")
        readings += [item for item in items if item not in readings] if sign < 0 else items
        if not parser.signed:
            break
    return readings[0] if len(readings) == 1 else List(tuple(readings), parser.joiner)
