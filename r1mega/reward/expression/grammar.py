"""The grammar of cleaned answers, by recursive descent: lists, relations, sums, products, factors, brackets."""

from __future__ import annotations

from fractions import Fraction

from r1mega.reward.expression.nodes import (
    Degrees,
    Function,
    List,
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
from r1mega.reward.expression.tokens import PRODUCT_SIGNS, UnreadableError

MAX_DIGITS = 1000
MAX_DEPTH = 40

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
_ENDS = frozenset(") ] } \\} \\rangle & \\\\ \\end : \\rvert".split())


class Grammar:
    """One reading of a list of tokens. `command` is the parser's."""

    def __init__(self, tokens: list[str], sign: int) -> None:
        self.tokens = tokens
        self.at = 0
        self.depth = 0
        self.bars = 0
        self.sign = sign  # how \pm is read: +1 or -1
        self.signed = False  # a \pm was met
        self.joiner = ","  # between the items of the outermost list: ',' | 'and' | 'or'

    def peek(self) -> str:
        """The next token, '' at the end."""
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self, expected: str | None = None) -> str:
        """The next token, which is then behind. UnreadableError where it is another than the expected one, or none."""
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
            if not self.peek() or self.peek() in _ENDS:
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
        """Sets with \\cup, \\cap or \\setminus between them; U between intervals."""
        node = self.ratio()
        while self.peek() in _SET_OPERATORS or (self.peek() == "U" and _holds_points(node)):
            kind = _SET_OPERATORS.get(self.take(), "union")
            other = self.ratio()
            goes_on = isinstance(node, SetOperation) and node.kind == kind != "minus"
            node = SetOperation(kind, (*children(node), other) if goes_on else (node, other))
        return node

    def ratio(self) -> Node:
        """`a : b : c`, or one sum."""
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
            if token in PRODUCT_SIGNS:
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
        """A factor behind a sign of multiplication, which may have a sign of its own."""
        if self.peek() in ("-", "+"):
            return Negative(self.signed_factor()) if self.take() == "-" else self.signed_factor()
        return self.factor()

    def starts_factor(self, token: str) -> bool:
        """Whether a token that stands beside a factor begins another one."""
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
            node = self.command(token)
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

    def command(self, token: str) -> Node:
        """What a LaTeX command (already taken) begins."""
        raise NotImplementedError

    def letter(self, token: str) -> Node:
        """A symbol, or f(...) of a function that a problem defines."""
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
        """What stands after a bar, to the next one."""
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


def _number(token: str, parser: Grammar) -> Number:
    if len(token) > MAX_DIGITS:
        raise UnreadableError(f"a number of more than {MAX_DIGITS} digits", final=True)
    if "." in token and parser.peek() in ("\\overline", "\\dot") and "e" not in token.lower():
        return _repeating(token, parser)
    return Number(Fraction(token))


def _repeating(token: str, parser: Grammar) -> Number:
    """0.1\\overline{6}: the digits under the bar repeat for ever."""
    parser.take()
    period = parser.raw_group()
    if not period.isdigit():
        raise UnreadableError("a repeating part that is not digits")
    decimals = len(token.split(".")[1])
    return Number(Fraction(token) + Fraction(int(period), 10**decimals * (10 ** len(period) - 1)))
