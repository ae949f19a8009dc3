"""Parser of cleaned answers into `nodes`."""

from __future__ import annotations

from functools import lru_cache

from r1mega.reward.expression.commands import command
from r1mega.reward.expression.grammar import Grammar
from r1mega.reward.expression.nodes import List, Node
from r1mega.reward.expression.tokens import UnreadableError, tokenize

MAX_CHARS = 2000
MAX_TOKENS = 800


class Parser(Grammar):
    """The grammar with its LaTeX commands."""

    def command(self, token: str) -> Node:
        return command(self, token)


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
