"""What the judges of LiveCodeBench, APPS, TACO and LeetCode have imported before an answer runs.

Their starter codes say `List[int]` without an import, and their answers follow. Names come from the same modules in the
same order (lcb_runner/evaluation/testing_util.py imports everything of each; a later one wins, built-ins before all).
"""

from __future__ import annotations

import builtins
import importlib
import re
from functools import cache

_WHOLE = (
    "string re datetime collections heapq bisect copy math random statistics itertools functools operator io sys json"
).split()
_MODULES = (*_WHOLE, "time", "fractions", "typing")
_RECURSION_LIMIT = 50_000  # lcb_runner's
_WORD = re.compile(r"[A-Za-z]\w*")
_FUTURE = re.compile(r"^from __future__ .*$", re.MULTILINE)


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
    """`source` after one line that binds those of the provided names that it mentions; its own definitions win.

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
    if not (futures := list(_FUTURE.finditer(source))):
        return line + source
    end = futures[-1].end()  # nothing but a docstring may stand before those
    return f"{source[:end]}\n{line}{source[end:].removeprefix(chr(10))}"
