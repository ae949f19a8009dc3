"""Expressions as small tuples.

Tag first: ("num", Fraction) ("sym", name) ("text", words) ("add", items) ("mul", items) ("div", a, b) ("pow", a, b)
("neg", a) ("fn", name, args) ("deg", a) ("pct", a) ("base", digits, base) ("ratio", items) ("tuple", open, close,
items) ("set", items) ("list", items) ("matrix", rows) ("rel", operators, sides) ("union" | "inter" | "minus", items).
"""

from __future__ import annotations

Node = tuple
INFINITY: Node = ("sym", "\\infty")
REALS: Node = ("sym", "\\mathbb{R}")
EMPTY_SET: Node = ("set", ())
