"""LaTeX commands of the parser: fractions, roots, functions, accents, braces, environments."""

from __future__ import annotations

from fractions import Fraction

from r1mega.reward.expression.nodes import EMPTY_SET, REALS, Node
from r1mega.reward.expression.text import OPEN_TEXT
from r1mega.reward.expression.tokens import FUNCTIONS, UnreadableError

PRODUCT = frozenset(("*", "\\cdot", "\\times", "\\ast"))
_ACCENTS = frozenset(
    "\\overline \\bar \\vec \\hat \\widehat \\overrightarrow \\tilde \\dot \\angle \\widetilde".split()
)
_LETTERS = frozenset(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu "
    "xi rho sigma tau phi varphi chi psi omega "
    "Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega pi infty ell hbar".split()
)


class LatexCommands:
    """The part of `parse.Parser` that reads commands; the grammar around them (peek, take, statement, ...) is the
    parser's.
    """

    def command(self, token: str) -> Node:
        """What a command (already taken) begins, with its arguments. UnreadableError for an unknown one."""
        name = token[1:]
        if token == "\\frac":
            return ("div", self.argument(), self.argument())
        if token in ("\\sqrt", "\\cbrt"):
            return self.root(token)
        if name in FUNCTIONS or token == "\\abs":
            return self.function(name)
        if token == "\\{":
            return self.braces()
        if token == "\\langle":
            items = self.statement()
            self.take("\\rangle")
            return ("tuple", "(", ")", tuple(items))
        if token in ("\\lvert", "\\vert", "\\mid"):
            return self.absolute(("\\rvert", "\\vert", "|", "\\mid"))
        if token in ("\\lfloor", "\\lceil"):
            inner = self.relation()
            self.take("\\r" + name[1:])
            return ("fn", name[1:], (inner,))
        if token in ("\\binom", "\\dbinom", "\\tbinom"):
            return ("fn", "binom", (self.argument(), self.argument()))
        if token == "\\begin":
            return self.environment()
        if token in ("\\emptyset", "\\varnothing"):
            return EMPTY_SET
        if token in ("\\mathbb", "\\Bbb"):
            return ("sym", "\\mathbb{" + "".join(self.tokens[self.at : self._after_group()]).strip("{}") + "}")
        if token in _ACCENTS:
            return self.accent(token)
        if name.isalpha() and name in _LETTERS:
            return ("sym", token.replace("\\var", "\\"))
        raise UnreadableError(f"unknown command {token}")

    def _after_group(self) -> int:
        if self.peek() == "{":
            self.at = self.tokens.index("}", self.at) + 1 if "}" in self.tokens[self.at :] else len(self.tokens)
        else:
            self.at += 1
        return self.at

    def accent(self, token: str) -> Node:
        start = self.at
        label = "".join(self.tokens[start : self._after_group()]).strip("{}").replace(OPEN_TEXT, "")
        if not label:
            raise UnreadableError(f"{token} of nothing")
        if token == "\\overline" and len(label) == 2 and label.isupper():
            label = "".join(sorted(label))  # a segment has no direction
        return ("sym", f"{token}{{{label}}}")

    def root(self, token: str) -> Node:
        degree: Node = ("num", Fraction(3 if token == "\\cbrt" else 2))
        if self.peek() == "[" and token == "\\sqrt":
            self.at += 1
            degree = self.sum()
            self.take("]")
        return ("pow", self.group() if self.peek() == "{" else self.primary(), ("div", ("num", Fraction(1)), degree))

    def function(self, name: str) -> Node:
        """\\sin^2 x, \\log_2(8), \\sin^{-1} x (the inverse): the name is taken, exponent and base follow."""
        exponent = base = None
        while self.peek() in ("^", "_"):
            if self.take() == "^":
                exponent = self.group() if self.peek() == "{" else self.signed_factor()
            else:
                base = self.group() if self.peek() == "{" else self.argument()
        arguments = self.function_arguments()
        if exponent == ("neg", ("num", Fraction(1))) and name in ("sin", "cos", "tan"):
            return ("fn", "arc" + name, arguments)
        node: Node = ("fn", name, arguments if base is None else (*arguments, base))
        return ("pow", node, exponent) if exponent is not None else node

    def function_arguments(self) -> tuple[Node, ...]:
        """A bracketed argument ends the application; without brackets it reaches over a juxtaposed product: \\sin
        3x.
        """
        if self.peek() in ("(", "["):
            inner = self.bracket(self.take())
            return inner[3] if inner[0] == "tuple" else (inner,)
        if self.peek() == "{":
            return (self.group(),)
        negative = self.peek() == "-" and self.take() == "-"
        node = self.factor()
        while self.starts_factor(self.peek()) and self.peek()[1:] not in FUNCTIONS and self.peek() not in PRODUCT:
            node = self.juxtaposed(node)
        return (("neg", node) if negative else node,)

    def braces(self) -> Node:
        """After \\{: a set of items, or the condition of a set builder over the reals."""
        self._colon_to_bar()
        bars, self.bars = self.bars, 1  # a bar after an item begins a condition
        items = self.statement()
        self.bars = bars
        if self.peek() in ("|", ":", "\\mid"):  # set builder: the condition is the set
            self.at += 1
            condition = self.statement()
            self.take("\\}")
            of_reals = items[0][0] == "sym" or (items[0][0] == "rel" and items[0][2][-1] == REALS)
            if not of_reals:  # numbers of another kind, or points
                raise UnreadableError("a set of something else than real numbers")
            return condition[0] if len(condition) == 1 else ("list", tuple(condition), "and")
        self.take("\\}")
        return ("set", tuple(items))

    def _colon_to_bar(self) -> None:
        """The colon of {x : x > 2} and {x \\in \\mathbb{R} : x > 2} begins a condition, it is no ratio."""
        if not self.peek().isalpha():
            return
        for at in range(self.at + 1, len(self.tokens)):
            if self.tokens[at] in ("\\}", ",", ";", "|", "\\mid"):
                return
            if at == self.at + 1 and self.tokens[at] not in (":", "\\in"):
                return
            if self.tokens[at] == ":":
                self.tokens[at] = "|"
                return

    def environment(self) -> Node:
        """After \\begin: a matrix, or a system of equations, up to \\end{...}."""
        name = "".join(self.tokens[self.at : self._after_group()]).strip("{}").replace(OPEN_TEXT, "")
        if name == "array" and self.peek() == "{":
            self._after_group()
        rows: list[list[Node]] = [[]]
        while self.peek() != "\\end":
            if self.peek() == "&":
                self.at += 1
            elif self.peek() == "\\\\":
                self.at += 1
                rows.append([])
            elif self.peek() in (",", ";"):
                self.at += 1
            else:
                rows[-1].append(self.relation())
        self.at += 1
        self._after_group()
        rows = [row for row in rows if row]
        cells = [cell for row in rows for cell in row]
        if cells and name in ("cases", "array", "aligned", "gathered") and all(cell[0] == "rel" for cell in cells):
            return ("list", tuple(cells), "and")  # a system of equations
        if name not in ("pmatrix", "bmatrix", "matrix", "array", "smallmatrix", "Bmatrix"):
            raise UnreadableError(f"unknown environment {name}")
        if not rows or len({len(row) for row in rows}) != 1:
            raise UnreadableError("rows of a matrix differ in length")
        return ("matrix", tuple(map(tuple, rows)))
