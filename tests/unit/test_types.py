"""`Any` in annotations is what the type checker cannot see through: there may be less of it, and no more."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
ALLOWED = {
    "checkpoint": 83,
    "config": 42,
    "data": 23,
    "doctor": 2,
    "evaluate": 11,
    "files": 2,
    "gpu_check": 24,
    "kernels": 4,
    "model": 69,
    "observe": 67,
    "plan": 41,
    "platform": 71,
    "reward": 31,
    "rollout": 18,
    "sandbox": 9,
    "stages": 33,
    "tools": 43,
    "train": 30,
    "types": 1,
    "weights": 17,
}
"""Package (or module) -> how often its annotations say Any. Numbers go down only."""


def annotations(tree: ast.AST) -> Iterator[ast.expr]:
    """Of parameters, results and variables."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.returns is not None:
            yield node.returns
        elif isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
            yield node.annotation


def times_any(source: str) -> int:
    names = (node for annotation in annotations(ast.parse(source)) for node in ast.walk(annotation))
    return sum(isinstance(node, ast.Name) and node.id == "Any" for node in names)


def package(path: Path) -> str:
    """`r1mega/reward/expression/parse.py` -> `reward`; outside of r1mega the top folder."""
    top, *rest = path.relative_to(REPOSITORY).parts
    return Path(rest[0]).stem if top == "r1mega" else top


def test_any_becomes_rarer():
    found: Counter[str] = Counter()
    for top in ("r1mega", "kernels", "tools"):
        for path in (REPOSITORY / top).rglob("*.py"):
            found[package(path)] += times_any(path.read_text())
    more = {
        name: f"{found[name]} times, {ALLOWED.get(name, 0)} allowed"
        for name in found
        if found[name] > ALLOWED.get(name, 0)
    }
    assert not more, "say what it is, not Any"
    less = {name: f"write {found[name]} for {count}" for name, count in ALLOWED.items() if found[name] < count}
    assert not less, "fewer than in ALLOWED above: bring it down"


def test_any_is_found_wherever_an_annotation_stands():
    source = """
x: dict[str, Any] = {}
def f(a: Any, *b: Any, c: int, **d: list[Any]) -> tuple[Any, Any]:
    y: Any
    return Any  # this one is a value
class C:
    z: Callable[..., Any]
"""
    assert times_any(source) == 8
    assert times_any("def f(a: int) -> None: ...") == 0
