"""Tests that are Python text, made such that they run as they stand: what pytest would call is called."""

from __future__ import annotations

import ast

from r1mega.errors import DataError
from r1mega.reward.code_values import LONG_NUMBER


def runnable_tests(tests: str, entry: str | None, where: str) -> str:
    """Functions test_...() that take nothing are called, and those of classes Test...; and check(candidate) where nobody
    does. entry: the function under test. Raises DataError with `where` for what needs pytest or unittest, and for tests
    that assert nothing.
    """
    tests = _without_pytest(_without_solution(tests, where), where)
    body = ast.parse(LONG_NUMBER.sub("0", tests)).body
    called = {ast.unparse(node.func) for line in body for node in ast.walk(line) if isinstance(node, ast.Call)}
    for function in body:
        if isinstance(function, ast.ClassDef) and function.name not in called:
            tests += _calls_of(function, where)
        if not isinstance(function, ast.FunctionDef):
            continue
        needs = len(function.args.posonlyargs + function.args.args) - len(function.args.defaults)
        if function.name == "check" and "check" not in called:
            if not entry:
                raise DataError(f"{where}: check() is never called; give 'entry_point', the name of the function")
            tests += f"\n\ncheck({entry})\n"
        elif function.name.startswith("test_") and needs == 0:
            tests += f"\n{function.name}()"
        elif function.name.startswith("test_") and function.name + "(" not in tests.replace(
            f"def {function.name}(", ""
        ):
            raise DataError(f"{where}: {function.name}() takes arguments (pytest's); write its cases out as asserts")
    if "assert" not in tests:
        raise DataError(f"{where}: the tests assert nothing, any answer would pass")
    return tests


def _calls_of(group: ast.ClassDef, where: str) -> str:
    """Calls of the methods test_...() of a class of tests, each on an object of its own, as pytest does."""
    methods = {node.name: node for node in group.body if isinstance(node, ast.FunctionDef)}
    named = [name for name in methods if name.startswith("test_")]
    if not named:
        return ""
    bases = [ast.unparse(base) for base in group.bases if ast.unparse(base) != "object"]
    arguments = [name for name in named if len(methods[name].args.args) > 1 or methods[name].decorator_list]
    others = [name for name in methods if name in ("__init__", "setup_class", "teardown_class", "setUp", "tearDown")]
    if found := bases + arguments + others:
        raise DataError(
            f"{where}: class {group.name} needs pytest or unittest ({', '.join(found)}); write its cases out as asserts"
        )
    lines = []
    for name in named:
        before, after = (f"_case.{step}(); " for step in ("setup_method", "teardown_method"))
        calls = (before if "setup_method" in methods else "") + f"_case.{name}()"
        lines.append(f"\n_case = {group.name}(); {calls}" + ("; " + after if "teardown_method" in methods else ""))
    return "".join(lines)


def _without_pytest(tests: str, where: str) -> str:
    """Tests that only import pytest, without it; those that use it are refused."""
    if "pytest" not in tests:
        return tests
    tree = ast.parse(LONG_NUMBER.sub("0", tests))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import) and node.names[0].name == "pytest"]
    used = [ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "pytest"]
    used += [f"from {n.module}" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module == "pytest"]
    if used:
        raise DataError(f"{where}: the tests use {used[0]}, which is not there; write its cases out as asserts")
    lines = tests.split("\n")
    for node in imports:
        line = lines[node.lineno - 1]
        if line.strip() == "import pytest":
            lines[node.lineno - 1] = line.replace("import pytest", "pass")
    return "\n".join(lines)


def _without_solution(tests: str, where: str) -> str:
    """Tests without imports from `solution` (KodCode's): the sandbox gives the names itself, others are bound."""
    lines = tests.encode("utf-8", "surrogatepass").split(b"\n")
    for node in list(ast.walk(ast.parse(LONG_NUMBER.sub("0", tests))))[::-1]:
        if isinstance(node, ast.Import) and any(alias.name == "solution" for alias in node.names):
            raise DataError(f"{where}: 'import solution' has no module; write 'from solution import' and the names")
        if not isinstance(node, ast.ImportFrom) or node.module != "solution" or node.end_lineno is None:
            continue
        bound = [f"{alias.asname} = {alias.name}" for alias in node.names if alias.asname not in (None, alias.name)]
        first, last = node.lineno - 1, node.end_lineno - 1
        line = (
            lines[first][: node.col_offset] + ("; ".join(bound) or "pass").encode() + lines[last][node.end_col_offset :]
        )
        lines[first : last + 1] = [line] + [b""] * (last - first)
    return b"\n".join(lines).decode("utf-8", "surrogatepass")
