"""Recursive-descent parser of cleaned answers into the tuples of `nodes`."""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache

from r1mega.reward.expression.commands import PRODUCT, LatexCommands
from r1mega.reward.expression.nodes import Node
from r1mega.reward.expression.text import AND_MARK, OPEN_TEXT, OR_MARK
from r1mega.reward.expression.tokens import UnreadableError, tokenize

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
    "\\equiv": "=",
    "\\colon": ":",
    "=>": "=>",
    "\\to": "=>",
    "\\implies": "=>",
}
_SEPARATORS = {",": "", ";": "", AND_MARK: "and", OR_MARK: "or"}
_SET_OPERATORS = {
    "\\cup": "union",
    "\\bigcup": "union",
    "\\cap": "inter",
    "\\setminus": "minus",
    "\\backslash": "minus",
}
_CLOSERS = frozenset(
    (
        ")",
        "]",
        "}",
        "\\}",
        "\\rangle",
        "\\rfloor",
        "\\rceil",
        "\\rvert",
        "&",
        "\\\\",
        "\\end",
        ",",
        ";",
        AND_MARK,
        OR_MARK,
        ":",
        "+",
        "-",
        "/",
        "^",
        "_",
        "!",
        "'",
        "%",
        "‰",
        "\\pm",
        "\\mp",
        "\\div",
        "\\mid",
        "\\degree",
        "\\circ",
    )
)


class Parser(LatexCommands):
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

    def statement(self) -> list[Node]:
        """Items between commas or semicolons, up to a closing token."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise UnreadableError(f"nested deeper than {MAX_DEPTH}", over_limit=True)
        items = []
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
            if items and self.peek() in ("|", "\\mid"):
                break
            items.append(self.relation())
            if self.peek() not in _SEPARATORS:
                break
        self.depth -= 1
        return items

    def relation(self) -> Node:
        sides, operators = [self.union()], []
        while self.peek() in _RELATIONS:
            operators.append(_RELATIONS[self.take()])
            if operators[-1] in ("<", ">") and self.peek() == "=":
                operators[-1] += self.take()
            sides.append(self.union())
        return ("rel", tuple(operators), tuple(sides)) if operators else sides[0]

    def union(self) -> Node:
        node = self.ratio()
        while self.peek() in _SET_OPERATORS or (self.peek() == "U" and node[0] in ("tuple", "union", "set")):
            tag = _SET_OPERATORS.get(self.take(), "union")
            other = self.ratio()
            node = (tag, (*node[1], other)) if node[0] == tag and tag != "minus" else (tag, (node, other))
        return node

    def ratio(self) -> Node:
        items = [self.sum()]
        while self.peek() == ":" and self.bars >= 0:
            self.at += 1
            items.append(self.sum())
        return ("ratio", tuple(items)) if len(items) > 1 else items[0]

    def sum(self) -> Node:
        """Terms with their signs; \\pm and \\mp are read with the sign of this reading."""
        items = []
        while True:
            negative = False
            while self.peek() in ("+", "-", "\\pm", "\\mp"):
                token = self.take()
                if token in ("\\pm", "\\mp"):
                    self.signed = True
                    token = "-" if (self.sign < 0) == (token == "\\pm") else "+"
                negative ^= token == "-"
            term = self.product()
            items.append(("neg", term) if negative else term)
            if self.peek() not in ("+", "-", "\\pm", "\\mp"):
                return ("add", tuple(items)) if len(items) > 1 else items[0]

    def product(self) -> Node:
        """Factors joined by a sign of multiplication or division, or by standing side by side."""
        node = self.factor()
        while True:
            token = self.peek()
            if token in PRODUCT:
                self.at += 1
                node = ("mul", (node, self.signed_factor()))
            elif token in ("/", "\\div"):
                self.at += 1
                node = ("div", node, self.signed_factor())
            elif self.starts_factor(token):
                node = self.juxtaposed(node)
            else:
                return node

    def juxtaposed(self, left: Node) -> Node:
        """2x is a product, 3 \\frac12 and 3 1/2 are mixed numbers, 3 5 is nothing."""
        mark = self.at
        right = self.factor()
        if self.tokens[mark] == "(":
            return ("mul", (left, right))
        if left[0] == "num" and left[1].denominator == 1:
            mark_tag, part = (right[0], right[1]) if right[0] in ("pct", "deg") else ("", right)
            if self.tokens[mark] == "\\frac" and part[0] == "div" and part[1][0] == part[2][0] == "num":
                return _marked(mark_tag, ("add", (left, part)))
            if right[0] == "num":
                if self.peek() == "/" and self.tokens[self.at + 1 : self.at + 2] and self.tokens[self.at + 1].isdigit():
                    self.at += 1
                    under = self.factor()
                    mark_tag, under = (under[0], under[1]) if under[0] in ("pct", "deg") else ("", under)
                    return _marked(mark_tag, ("add", (left, ("div", right, under))))
                raise UnreadableError("two numbers side by side")
        elif right[0] == "num" and self.tokens[mark][0].isdigit() and left[0] == "num":
            raise UnreadableError("two numbers side by side")
        return ("mul", (left, right))

    def signed_factor(self) -> Node:
        if self.peek() in ("-", "+"):
            return ("neg", self.signed_factor()) if self.take() == "-" else self.signed_factor()
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
                node = self.minutes(("deg", node))
            elif token == "!":
                self.at += 1
                node = ("fn", "!", (node,))
            elif token in ("%", "‰"):
                self.at += 1
                node = ("pct", node if token == "%" else ("div", node, ("num", Fraction(10))))
            elif token == "'" and node[0] == "sym":
                self.at += 1
                node = ("sym", node[1] + "'")
            elif token == "_" and node[0] in ("num", "text", "sym", "fn"):
                self.at += 1
                node = self.subscript(node)
            else:
                return node

    def power(self, base: Node) -> Node:
        """After ^: an exponent, degrees (^\\circ) or a prime (^\\prime)."""
        token = self.peek()
        if token == "\\circ" or self.tokens[self.at : self.at + 3] == ["{", "\\circ", "}"]:
            self.at += 1 if token == "\\circ" else 3
            return self.minutes(("deg", base))
        if token in ("'", "\\prime"):
            self.at += 1
            return ("sym", f"{base}'")
        if token in ("-", "+"):
            return ("pow", base, self.signed_factor())
        exponent = self.group() if token == "{" else self.primary()
        if self.peek() == "^" and self.tokens[self.at + 1 : self.at + 2] != ["\\circ"]:
            self.at += 1
            exponent = self.power(exponent)  # 2^3^2 is 2^9
        return ("pow", base, exponent)

    def minutes(self, degrees: Node) -> Node:
        """45^\\circ 30'."""
        if self.peek().isdigit() and self.tokens[self.at + 1 : self.at + 2] == ["'"]:
            minutes = ("num", Fraction(self.take()) / 60)
            self.at += 1
            return ("deg", ("add", (degrees[1], minutes)))
        return degrees

    def subscript(self, node: Node) -> Node:
        start = self.at
        inner = self.group() if self.peek() == "{" else ("tokens", self.take())
        label = "".join(self.tokens[start : self.at]).strip("{}")
        if node[0] == "num" or (node[0] == "text" and label.isdigit()):
            if not label.isdigit() or inner[0] == "list":
                raise UnreadableError(f"base {label!r} is not a number")
            digits = node[1] if node[0] == "text" else str(node[1])
            return ("base", digits.upper(), int(label))
        return ("sym", f"{node[1]}_{label}")

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
        return items[0] if len(items) == 1 else ("set", tuple(items))

    def argument(self) -> Node:
        """Argument of \\frac: a group or a single token; of a number only its first digit (\\frac12)."""
        token = self.peek()
        if token == "{":
            return self.group()
        if token[:1].isdigit() and len(token) > 1 and token.isdigit():
            self.tokens[self.at] = token[1:]
            return ("num", Fraction(token[0]))
        if token == "-":
            self.at += 1
            return ("neg", self.argument())
        return self.primary()

    def primary(self) -> Node:
        self.depth += 1
        if self.depth > 2 * MAX_DEPTH:
            raise UnreadableError(f"nested deeper than {MAX_DEPTH}", over_limit=True)
        token = self.take()
        first = token[0]
        if first.isdigit() or (first == "." and len(token) > 1):
            node = _number(token, self)
        elif first == "\\" and len(token) > 1:
            node = self.command(token)
        elif first == OPEN_TEXT:
            node = ("text", token[1:])
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
            return ("fn", token, argument[3] if argument[0] == "tuple" else (argument,))
        return ("sym", token)

    def bracket(self, opening: str) -> Node:
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
        return ("tuple", opening, closing, tuple(items))

    def absolute(self, closers: tuple[str, ...]) -> Node:
        self.bars += 1
        inner = self.relation()
        self.bars -= 1
        if self.take() not in closers:
            raise UnreadableError("an open |")
        return ("fn", "abs", (inner,))


def _marked(tag: str, node: Node) -> Node:
    """A mark behind a mixed number is of the whole number: 33\\frac13\\%."""
    return (tag, node) if tag else node


def _number(token: str, parser: Parser) -> Node:
    if len(token) > MAX_DIGITS:
        raise UnreadableError(f"a number of more than {MAX_DIGITS} digits", over_limit=True)
    if "." in token and parser.peek() in ("\\overline", "\\dot") and "e" not in token.lower():
        return _repeating(token, parser)
    return ("num", Fraction(token))


def _repeating(token: str, parser: Parser) -> Node:
    """0.1\\overline{6}: the digits under the bar repeat for ever."""
    parser.take()
    start = parser.at
    period = "".join(parser.tokens[start : parser._after_group()]).strip("{}")
    if not period.isdigit():
        raise UnreadableError("a repeating part that is not digits")
    decimals = len(token.split(".")[1])
    return ("num", Fraction(token) + Fraction(int(period), 10**decimals * (10 ** len(period) - 1)))


@lru_cache(maxsize=8192)
def parse(text: str, join_thousands: bool = True) -> Node:
    """Cleaned text -> node. `\\pm` gives both signs as a list. Raises UnreadableError."""
    if len(text) > MAX_CHARS:
        raise UnreadableError(f"longer than {MAX_CHARS} characters", over_limit=True)
    tokens = tokenize(text, join_thousands)
    if len(tokens) > MAX_TOKENS:
        raise UnreadableError(f"more than {MAX_TOKENS} tokens", over_limit=True)
    readings = []
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
    return readings[0] if len(readings) == 1 else ("list", tuple(readings), parser.joiner)
