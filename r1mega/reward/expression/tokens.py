"""Tokens of a cleaned answer: numbers, LaTeX commands, marked text, letters and operators."""

from __future__ import annotations

import re

from r1mega.reward.expression.text import AND_MARK, CLOSE_TEXT, OPEN_TEXT, OR_MARK
from r1mega.reward.expression.units import HEDGES


class UnreadableError(ValueError):
    """The text is not in the grammar. `final`: nor is it to be tried elsewhere, as it is too large, too deep, or has
    two meanings.
    """

    def __init__(self, message: str, final: bool = False) -> None:
        super().__init__(message)
        self.final = final


FUNCTIONS = frozenset(
    "sin cos tan cot sec csc arcsin arccos arctan arccot sinh cosh tanh ln log lg exp gcd lcm "
    "max min det deg Re Im arg".split()
)
PRODUCT_SIGNS = frozenset(("*", "\\cdot", "\\times", "\\ast"))
_ASCII_WORDS = {
    **{name: "\\" + name for name in FUNCTIONS if name not in ("deg", "Re", "Im", "arg", "det")},
    "sqrt": "\\sqrt",
    "pi": "\\pi",
    "Pi": "\\pi",
    "inf": "\\infty",
    "infty": "\\infty",
    "infinity": "\\infty",
    "oo": "\\infty",
    "abs": "\\abs",
    "theta": "\\theta",
    "alpha": "\\alpha",
    "beta": "\\beta",
    "union": "\\cup",
    "U": "U",
    "asin": "\\arcsin",
    "acos": "\\arccos",
    "atan": "\\arctan",
    "degrees": "\\degree",
    "cbrt": "\\cbrt",
    "binom": "\\binom",
}
_SHORT_WORDS = frozenset("no on to of is if at by or so".split())  # words, not products of letters
_TOKEN = re.compile(
    r"(?P<number>(?:\d{1,3}(?:,\d{3})+(?![\d])(?:\.\d+)?|\d+\.(?=\\(?:overline|dot))|"
    r"\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d{1,4}(?![A-Za-z\d]))?)"
    + r"|(?P<command>\\[A-Za-z]+|\\.)|"
    + OPEN_TEXT
    + "(?P<text>[^"
    + CLOSE_TEXT
    + "]*)"
    + CLOSE_TEXT
    + r"|(?P<word>[A-Za-z]+)|(?P<operator><=|>=|=<|!=|==|=>|[-+*/^_()\[\]{}|!',;:=<>%&.‰"
    + AND_MARK
    + OR_MARK
    + "])"
)
_OPERATOR_SPELLING = {"=<": "<=", "==": "="}


def tokenize(text: str, join_thousands: bool) -> list[str]:
    """Tokens as strings: numbers start with a digit or dot, commands with a backslash, text with the text mark."""
    tokens: list[str] = []
    position = 0
    for match in _TOKEN.finditer(text):
        if text[position : match.start()].strip():
            raise UnreadableError(f"unexpected {text[position : match.start()].strip()[:20]!r}")
        position = match.end()
        kind, value = match.lastgroup, match.group()
        if kind == "number" and "," in value:
            outside = tokens.count("(") + tokens.count("[") <= tokens.count(")") + tokens.count("]")
            if join_thousands and outside:
                tokens.append(value.replace(",", ""))
            else:
                for index, part in enumerate(value.split(",")):
                    tokens += [",", part] if index else [part]
        elif kind == "word":
            tokens += _split_word(value)
        elif kind == "text":
            _refuse_hedge(match["text"].strip())
            tokens.append(OPEN_TEXT + match["text"].strip())
        else:
            tokens.append(_OPERATOR_SPELLING.get(value, value))
    if text[position:].strip():
        raise UnreadableError(f"unexpected {text[position:].strip()[:20]!r}")
    return tokens


def _refuse_hedge(word: str) -> None:
    """'not 0' is no product with 0."""
    if word.lower() in HEDGES:
        raise UnreadableError(f"the word {word!r}")


def _split_word(word: str) -> list[str]:
    """'sqrt' -> command, 'xy' -> x, y; 'Friday', 'ACF' -> one verbal token."""
    _refuse_hedge(word)
    if word in _ASCII_WORDS:
        return [_ASCII_WORDS[word]]
    for suffix in ("pi", "sqrt"):
        if word.endswith(suffix) and len(word) - len(suffix) == 1:
            return [word[0], "\\" + suffix]
    capitalised = (len(word) > 1 and word.isupper()) or (len(word) > 2 and word[0].isupper())
    if len(word) >= 4 or word in _SHORT_WORDS or capitalised:
        return [OPEN_TEXT + word]
    return list(word)
