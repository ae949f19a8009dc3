"""What the judges of LiveCodeBench, APPS, TACO and LeetCode have imported before an answer runs.

Their starter codes say `List[int]` without an import, and their answers follow. Names come from the same modules in the
same order (lcb_runner/evaluation/testing_util.py imports everything of each; a later one wins, built-ins before all).
"""

from __future__ import annotations

import ast
import builtins
import importlib
import re
from functools import cache

from r1mega.reward.code_values import LONG_NUMBER

_WHOLE = (
    "string re datetime collections heapq bisect copy math random statistics itertools functools operator io sys json"
).split()
_MODULES = (*_WHOLE, "time", "fractions", "typing")
_RECURSION_LIMIT = 50_000  # lcb_runner's
_WORD = re.compile(r"[A-Za-z]\w*")
_LINE_END = re.compile(r"(?<=\n)|(?<=\r)(?!\n)")


@cache
def _provided() -> dict[str, str]:
    """Name -> module that it is an attribute of. A module's own name is not among them."""
    found = {}
    for module in (*_WHOLE, "typing"):
        content = importlib.import_module(module)
        found.update(dict.fromkeys(getattr(content, "__all__", vars(content)), module))
    unwanted = {*vars(builtins), *_MODULES}
    return {name: module for name, module in found.items() if name[0] != "_" and name not in unwanted}


def with_names(source: str) -> str:
    """`source` with one line more that binds those of the provided names that it mentions; its own definitions win.
    A docstring and imports from `__future__` stay before it.

    The line also lifts two limits of CPython as these judges do: digits of a printed integer, depth of recursion. What
    the interpreter of the sandbox lacks (a name of a later Python) stays unbound.
    """
    words = set(_WORD.findall(source))
    modules = [module for module in _MODULES if module in words]
    names = sorted((_provided()[word], word) for word in words & _provided().keys())
    statements = [
        f"__import__('sys').setrecursionlimit({_RECURSION_LIMIT})",
        "getattr(__import__('sys'), 'set_int_max_str_digits', id)(0)",
        *([f"import {', '.join(modules)}"] if modules else []),
    ]
    if names:
        statements.append(
            f"globals().update((n, getattr(__import__(m), n)) for m, n in {names!r} if hasattr(__import__(m), n))"
        )
    line = "; ".join(statements) + "\n"
    lines = _LINE_END.split(source)
    head = "".join(lines[: _head(source)])
    return head + ("" if head.endswith(("\n", "\r")) or not head else "\n") + line + source[len(head) :]


def _head(source: str) -> int:
    """Lines of the docstring and the imports from `__future__`."""
    if "__future__" not in source and not source.lstrip().lstrip("rRuU")[:1] in ("'", '"', "#"):
        return 0
    try:
        body = ast.parse(LONG_NUMBER.sub("0", source)).body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return 0
    end = 0
    for index, statement in enumerate(body):
        docstring = index == 0 and ast.get_docstring(ast.Module(body, []), clean=False) is not None
        future = isinstance(statement, ast.ImportFrom) and statement.module == "__future__"
        if docstring or future or statement.lineno == end:  # what follows on the same line
            end = statement.end_lineno or end
        else:
            break
    return end
