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
from typing import TypedDict

from r1mega.reward.code_values import LONG_NUMBER

_WHOLE = (
    "string re datetime collections heapq bisect copy math random statistics itertools functools operator io sys json"
).split()
_MODULES = (*_WHOLE, "time", "fractions", "typing")
_NODE = "{0} = type('{0}', (), {{'__init__': lambda self, val=0, {1}=None: self.__dict__.update(val=val, {2})}})"
NODES = {
    "ListNode": _NODE.format("ListNode", "next", "next=next"),
    "TreeNode": _NODE.format("TreeNode", "left=None, right", "left=left, right=right"),
}
"""LeetCode's classes, which its starter codes have as a comment."""
_RECURSION_LIMIT = 50_000  # lcb_runner's
_WORD = re.compile(r"[A-Za-z]\w*")
_LINE_END = re.compile(r"(?<=\n)|(?<=\r)(?!\n)")


class Nodes(TypedDict):
    """What of a call are LeetCode's nodes: the class of each parameter and of the result, a list of it in brackets."""

    parameters: list[tuple[str, str | None]]
    result: str | None


def nodes_of(starter: str, function: str) -> Nodes | None:
    """Of a starter code's function by its annotations; None where nothing is a node. Raises ValueError for one that changes
    nodes in place.
    """
    try:
        tree = ast.parse(starter)
    except (SyntaxError, ValueError):
        try:
            tree = ast.parse(starter.rstrip() + " pass")  # a head without a body
        except (SyntaxError, ValueError):
            return None
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == function:
            parameters = [(one.arg, _kind(one.annotation)) for one in node.args.args if one.arg != "self"]
            result = _kind(node.returns)
            if not result and not any(kind for _, kind in parameters):
                return None
            if isinstance(node.returns, ast.Constant) and node.returns.value is None:
                raise ValueError(f"{function} changes its nodes in place, which is not seen here; leave the line out")
            return {"parameters": parameters, "result": result}
    return None


def _kind(annotation: ast.expr | None) -> str | None:
    said = ast.unparse(annotation) if annotation else ""
    name = next((name for name in NODES if re.search(rf"\b{name}\b", said)), None)
    depth = len(re.findall(r"\b[Ll]ist\[", said))
    return None if name is None else "[" * depth + name + "]" * depth


@cache
def _provided() -> dict[str, str]:
    """Name -> module that it is an attribute of. A module's own name is not among them."""
    found = {}
    for module in (*_WHOLE, "typing"):
        content = importlib.import_module(module)
        found.update(dict.fromkeys(getattr(content, "__all__", vars(content)), module))
    unwanted = {*vars(builtins), *_MODULES}
    return {name: module for name, module in found.items() if name[0] != "_" and name not in unwanted}


def with_names(source: str, nodes: Nodes | None = None) -> str:
    """`source` with one line more that binds those of the provided names that it mentions; its own definitions win.
    A docstring and imports from `__future__` stay before it. nodes: of `nodes_of`, whose classes are needed whatever it mentions.

    The line also lifts two limits of CPython as these judges do: digits of a printed integer, depth of recursion. What
    the interpreter of the sandbox lacks (a name of a later Python) stays unbound.
    """
    words = set(_WORD.findall(f"{source} {nodes}"))
    modules = [module for module in _MODULES if module in words]
    names = sorted((_provided()[word], word) for word in words & _provided().keys())
    statements = [
        f"__import__('sys').setrecursionlimit({_RECURSION_LIMIT})",
        "getattr(__import__('sys'), 'set_int_max_str_digits', id)(0)",
        *([f"import {', '.join(modules)}"] if modules else []),
    ]
    statements += [definition for name, definition in NODES.items() if name in words]
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
