"""What is said behind an answer of its letters: a range, a domain, that they are integers or constants."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from r1mega.reward.expression.exact import symbols
from r1mega.reward.expression.nodes import (
    ONE,
    Degrees,
    Function,
    Negative,
    Node,
    Power,
    Product,
    Quotient,
    Relation,
    Sum,
    Symbol,
    walk,
)
from r1mega.reward.expression.text import CLOSE_TEXT, OPEN_TEXT

MAX_LETTERS = 3
INTEGERS = frozenset("klmn")  # by their names
PI = Symbol("\\pi")
_ANGLES = frozenset(("x", "t", "\\theta", "\\alpha", "\\phi"))
_HINT = re.compile(r"dots|constant|even|odd|prime|composite|\\(?:in|[gl]e|ne)|[<>]|for|where|with|\bany\b|\bis an?\b")
_WORD = (
    r"(?:for|where|with|as|given|when|since|because|and|all|any|every|each|some|is|are|be|being|the|constants?|integers?|positive|"
    r"even|odd|prime|composite|multiples?\s+of\s+\d+|divisible\s+by\s+\d+|negative|non-?negative|non-?zero|natural|whole|real|rational|complex|numbers?|arbitrary|parameters?|fixed|that|"
    r"an?(?=\s+[a-z]{3}))(?![A-Za-z])"
)
_LETTER = r"(?<![A-Za-z\\])(?:[A-Za-z](?![A-Za-z])|\\(?:alpha|beta|lambda|mu|theta|omega)(?![A-Za-z]))(?:_\{?\w\}?)?"
_LETTERS = rf"{_LETTER}(?:\s*,\s*{_LETTER})*"
_IN = r"(?:\\in(?![A-Za-z]))"
_ORDER = r"(?:\\(?:neq?|[gl]eq?(?:slant)?|[gl]t)(?![A-Za-z])|[<>]=?|!=)"
_SET = (
    r"(?:\\mathbb\s*\{?[ZNQRC]\}?|[ZNQRC](?![A-Za-z]))(?:\s*[_^]\s*(?:\{[^{}]*\}|[+*\d-]))*|"
    r"[\[(][^\[\]()a-zA-Z]*(?:\\(?:infty|pi)[^\[\]()a-zA-Z]*)*[\])]|\\\{(?:[-\d,\s.]|\\[lc]?dots)*\\\}"
)
_BOUND = r"(?:[-+]|\\pm)?\s*(?:\d+(?:\.\d+)?|\\infty(?![A-Za-z])|\\pi(?![A-Za-z])|\\frac\{\d+\}\{\d+\})"
_SERIES = r"\d+(?:\s*,\s*\d+)+\s*,\s*(?:\\[lc]?dots|\.\.\.)"
_CONDITION = (
    rf"(?:(?P<low>{_BOUND}\s*{_ORDER})\s*)?(?P<letters>{_LETTERS})"
    rf"(?:\s*(?:{_IN}\s*(?P<set>{_SET})|(?P<high>{_ORDER}\s*{_BOUND})|(?P<series>=\s*{_SERIES})))?"
)
_CONDITION_PATTERN = re.compile(_CONDITION)
_TAIL = re.compile(rf"(?>[\s,;().{OPEN_TEXT}{CLOSE_TEXT}]|{_WORD}|" + re.sub(r"\?P<\w+>", "?:", _CONDITION) + r")++")
_START = re.compile(rf"[,;({OPEN_TEXT}]|\s(?={_WORD})|(?<=[\d)}}])\s(?={_BOUND}\s*{_ORDER})")
_KIND_OF_INTEGERS = r"(even|odd|prime|composite|(?:multiples?\s+of|divisible\s+by)\s+\S+)"
_KINDS_HINT = re.compile(r"even|odd|prime|composite|multiple|divisible")
_RESTRICTION = re.compile(  # for odd n, where n is prime, n even
    rf"\b(?:for|when|whenever|where|with|if)\b[^=]*?\b{_KIND_OF_INTEGERS}"
    rf"|(?<![A-Za-z\\])[B-Zb-z]\s*(?:is|are|be)?\s*(?:an?)?\s*\b{_KIND_OF_INTEGERS}"
)
_LATE = 3  # n > 5 leaves out more than where a formula begins
_BUILDER = re.compile(r"\\\{(?P<item>[^|:]+?)(?:\\mid|[|:])(?P<condition>.+)\\\}")
_SAID = re.compile(r"\b(?:even|odd|prime|composite|for|where|with|any|all|constants?|integers?|real|parameters?)\b")
_WORDS_OF_SETS = (
    ("N", r"\b(?:positive|natural)\b.*integers?|\bnatural\b"),
    ("Z", r"\bintegers?\b"),
    ("R", r"\breal\b"),
)


class Qualified(NamedTuple):
    """letters: those that the qualifier speaks of. domain: the set that they are from (Z, N, Q, R, C, or as written), ''
    where none is named. bounds: inequalities as they are written, the letter left out.
    """

    body: str
    letters: tuple[str, ...] = ()
    domain: str = ""
    bounds: frozenset[str] = frozenset()
    restrictions: frozenset[str] = frozenset()


def split_qualifier(text: str) -> Qualified:
    """A cleaned answer without its qualifier: '2^{n-1}, n \\ge 1' -> 2^{n-1}. Only where its letters occur before it and
    are not bounded there too (x > 1, x < 5).
    """
    if not _HINT.search(text):
        return Qualified(text, restrictions=_restrictions(text))
    return _split(text)._replace(restrictions=_restrictions(text))


def _restrictions(text: str) -> frozenset[str]:
    if not _KINDS_HINT.search(text):
        return frozenset()
    plain = text.replace(OPEN_TEXT, " ").replace(CLOSE_TEXT, " ")
    return frozenset(next(filter(None, match.groups())) for match in _RESTRICTION.finditer(plain))


def _split(text: str) -> Qualified:
    if builder := _BUILDER.fullmatch(text):
        return _of_builder(builder["item"].strip(), builder["condition"].strip()) or Qualified(text)
    for start in itertools.islice(_START.finditer(text), 32):
        body, tail = text[: start.start()].strip(), text[start.start() :]
        if not body or not _TAIL.fullmatch(tail):
            continue
        found = [match for match in _CONDITION_PATTERN.finditer(_without_words(tail))]
        letters = tuple(dict.fromkeys(name for match in found for name in re.findall(_LETTER, match["letters"])))
        said = any(match["low"] or match["set"] or match["high"] or match["series"] for match in found) or _SAID.search(
            tail
        )
        if not letters or not said or not all(_speaks_of(body, letter) for letter in letters):
            return Qualified(text)
        sets = [re.sub(r"\\mathbb|[\s{}]", "", match["set"]) for match in found if match["set"]]
        words = [name for name, pattern in _WORDS_OF_SETS if re.search(pattern, tail)]
        domain = next(iter(sets or words), "")
        if domain[:1] in ("N", "Z") and re.search(r"[_^]", domain):
            domain = "N"
        bounds = frozenset(bound for match in found for bound in _bounds(match["low"] or "", match["high"] or ""))
        return Qualified(body.rstrip(" ,;("), letters, domain, bounds)
    return Qualified(text)


def _of_builder(item: str, condition: str) -> Qualified | None:
    """{x | x = k\\pi, k \\in Z} and {k\\pi : k \\in Z}; None for the subset of the line that {x : x > 2} is."""
    inside = split_qualifier(condition if condition.startswith(item) else f"{item}, {condition}")
    return inside if inside.domain and item not in inside.letters else None


def _bounds(low: str, high: str) -> Iterator[str]:
    """`1 \\le` before a letter and `\\geq 1` behind it are '>=1'."""
    for text, signs in ((low, ("<=", ">=")), (high, (">=", "<="))):
        match = re.search(_ORDER, text)
        if match:
            command = match.group().lstrip("\\")
            kind = "!=" if command in ("ne", "neq", "!=") else signs[command[0] in "l<"]
            strict = command in ("<", ">", "lt", "gt")
            yield (kind[0] if strict else kind) + re.sub(r"\s", "", text[: match.start()] + text[match.end() :])


def _without_words(tail: str) -> str:
    return re.sub(rf"(?<![A-Za-z\\]){_WORD}|[{OPEN_TEXT}{CLOSE_TEXT}]", " ", tail)


def _speaks_of(body: str, letter: str) -> bool:
    name = re.escape(letter)
    bounded = rf"(?<![A-Za-z\\]){name}\s*(?:{_ORDER}|{_IN})|{_ORDER}\s*{name}(?![A-Za-z])"
    plain = re.sub(
        rf"\\(?!alpha|beta|lambda|mu|theta|omega)[A-Za-z]+|{OPEN_TEXT}[^{CLOSE_TEXT}]*{CLOSE_TEXT}", " ", body
    )
    return letter in plain and not re.search(bounded, body)


def contradict(gold: Qualified, other: Qualified) -> bool:
    """Whether both qualifiers say something and not the same (k \\in Z and k \\in N, x > 0 and x < 0), or the other one
    leaves out what the gold does not: odd n only, n > 5.
    """
    if gold.domain and other.domain and gold.domain != other.domain:
        return True
    if other.restrictions - gold.restrictions:
        return True
    if other.bounds and not gold.bounds:
        return gold.domain == "Z" or bool(set(other.letters) & set("klmn")) and any(map(_begins_late, other.bounds))
    return bool(gold.bounds and other.bounds) and gold.bounds != other.bounds


def _begins_late(bound: str) -> bool:
    start = re.fullmatch(r">=?(\d+)", bound)
    return start is not None and int(start[1]) > _LATE


def renamings(gold: Qualified, other: Qualified, node: Node, other_node: Node) -> Iterator[Mapping[str, Node]]:
    """Ways to call the other answer's letters as the gold does: n\\pi, n \\in Z is k\\pi, k \\in Z. A letter of which nothing is
    said is one of k, l, m, n; where it counts periods it is an integer all the same, which in solutions may be turned
    round and shifted (-n\\pi, (2n - 1)\\pi). A constant of integration is C or c.
    """
    names, others = symbols(node), symbols(other_node)
    if not (names or others):
        return
    if "C" in names ^ others and "c" in names ^ others and _adds(node) ^ _adds(other_node) == {"C", "c"}:
        yield {name: Symbol(name.swapcase()) for name in _adds(other_node)}
    match node, other_node:  # f(x) = 2x is f(t) = 2t
        case (
            Relation(("=",), (Function(name, (Symbol(variable),)), _)),
            Relation(("=",), (Function(other_name, (Symbol(another),)), right)),
        ) if name == other_name and variable != another and variable not in symbols(right):
            yield {another: Symbol(variable)}
    free = sorted((names - others) & INTEGERS), sorted((others - names) & INTEGERS)
    counted = _counter(node), _counter(other_node)
    periods = bool(counted[0] and counted[1])
    letters = gold.letters or (tuple(free[0]) if other.letters or periods else ())
    other_letters = other.letters or (tuple(free[1]) if gold.letters or periods else ())
    if letters and len(letters) == len(other_letters) <= MAX_LETTERS:
        for order in itertools.permutations(letters):
            if order != other_letters:
                yield {old: Symbol(new) for old, new in zip(other_letters, order, strict=True)}
    said = gold.bounds | other.bounds | gold.restrictions | other.restrictions
    solutions = gold.domain == "Z" or (gold.domain == "" and _asks_for_angle(node))
    if periods and not said and solutions and other.domain in ("", "Z"):
        letter = Symbol(counted[0])
        yield {counted[1]: Negative(letter)}
        for item in (letter, Negative(letter)):
            yield {counted[1]: Sum((item, ONE))}
            yield {counted[1]: Sum((item, Negative(ONE)))}


def _adds(node: Node) -> frozenset[str]:
    """C of F(x) + C, of a sum with one variable beside it."""
    if isinstance(node, Relation):
        return _adds(node.sides[-1])
    if not isinstance(node, Sum) or len(variables := symbols(node) - {"C", "c"}) != 1 or min(variables)[0].isupper():
        return frozenset()
    return frozenset(item.name for item in node.items if isinstance(item, Symbol)) & {"C", "c"}


def _asks_for_angle(node: Node) -> bool:
    """x = ..., the solution of an equation, rather than S = ..., a formula."""
    return isinstance(node, Relation) and isinstance(node.sides[0], Symbol) and node.sides[0].name in _ANGLES


def _counter(node: Node) -> str:
    """The letter of k\\pi + \\pi/6, x = 360^\\circ k: the only one of the values, an integer's by its name, a factor of a
    number of turns. '' where there is none.
    """
    values: tuple[Node, ...] = (node,)
    if isinstance(node, Relation):
        subject, values = node.sides[0], node.sides[1:]
        if not isinstance(subject, Symbol) or "_" in subject.name:  # a_k
            return ""
    found = frozenset().union(*map(symbols, values))
    parts = [part for value in values for part in walk(value)]
    if len(found) != 1 or not found <= INTEGERS or any(map(_is_bent, parts)):
        return ""
    products = (part for part in parts if isinstance(part, Product) and symbols(part))
    turns = any(isinstance(one, Degrees) or one == PI for part in products for one in walk(part))
    return next(iter(found)) if turns else ""


def _is_bent(node: Node) -> bool:
    """Whether a letter counts otherwise than in equal steps: n^2, 1/n, \\sin n, n(n + 1)."""
    match node:
        case Power() | Function():
            return bool(symbols(node)) or PI in walk(node)
        case Quotient(_, bottom):
            return bool(symbols(bottom))
        case Product(left, right):
            return bool(symbols(left) and symbols(right))
    return False
