"""Rooms import from floors below them, as docs/architecture.md draws them, and no two modules import each other."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
NOT_A_ROOM = {"__main__"}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = (REPOSITORY / "r1mega").rglob("*.py")
    return {
        ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): path for path in found
    }


def imports(module: str, tree: ast.AST, names: Mapping[str, Path]) -> Iterator[tuple[str, int]]:
    """(module of r1mega, line) of every import, those in functions and for type checkers too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.partition(".")[0] == "r1mega":
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in names else node.module, node.lineno
        elif isinstance(node, ast.ImportFrom) and node.level:
            raise AssertionError(f"{module}:{node.lineno}: a relative import")
        elif isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names if alias.name.partition(".")[0] == "r1mega")


def room(module: str) -> str:
    """The package or top module below r1mega; of r1mega itself ''."""
    return module.partition(".")[2].partition(".")[0]


def floors(text: str) -> dict[str, int]:
    """Number of each room's floor, the lowest 0, from the picture in the document."""
    picture = re.search(r"^## Floors$.*?^```$(.*?)^```$", text, re.M | re.S)
    assert picture is not None, "docs/architecture.md: no picture under 'Floors'"
    rows = [re.split(r"\s{3,}", line)[0].split() for line in picture[1].strip().splitlines()]
    return {name: len(rows) - 1 - row for row, names in enumerate(rows) for name in names}


def violations(found: Mapping[str, list[tuple[str, int]]], floor: Mapping[str, int]) -> list[str]:
    """Imports that do not lead to a lower floor, as `file:line: why`."""
    wrong = []
    for module, targets in found.items():
        if room(module) in NOT_A_ROOM or not room(module):
            continue
        for target, line in targets:
            if room(target) and room(target) != room(module) and floor[room(target)] >= floor[room(module)]:
                wrong.append(f"{module}:{line} imports {target}, which is not below it")
    return wrong


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Modules that reach themselves, one list a circle (the first found through each module)."""
    found: list[list[str]] = []
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            found.append([*path[path.index(module) :], module])
        elif module not in done:
            for target in sorted(graph.get(module, ())):
                visit(target, [*path, module])
            done.add(module)

    for module in sorted(graph):
        visit(module, [])
    return found


@pytest.fixture(scope="module")
def found() -> dict[str, list[tuple[str, int]]]:
    names = modules()
    return {module: list(imports(module, ast.parse(path.read_text()), names)) for module, path in names.items()}


def test_every_room_has_a_floor(found):
    drawn = floors((REPOSITORY / "docs/architecture.md").read_text())
    assert {room(module) for module in found} - {""} - NOT_A_ROOM == set(drawn)


def test_imports_lead_down(found):
    assert violations(found, floors((REPOSITORY / "docs/architecture.md").read_text())) == []


def test_no_two_modules_import_each_other(found):
    assert circles({module: {target for target, _ in targets} - {module} for module, targets in found.items()}) == []


def test_files_are_of_a_length_to_be_read():
    folders = ("r1mega", "kernels", "tests", "tools")
    lines = {path: path.read_text().count("\n") for folder in folders for path in (REPOSITORY / folder).rglob("*.py")}
    assert len(lines) > 300
    assert {str(path): count for path, count in lines.items() if count > 450} == {}, "split it by subject"


def test_an_import_that_leads_up_is_named():
    below = {"r1mega.data.prompts": [("r1mega.reward.math", 3), ("r1mega.config.load", 4)]}
    floor = {"reward": 2, "data": 1, "config": 0}
    assert violations(below, floor) == ["r1mega.data.prompts:3 imports r1mega.reward.math, which is not below it"]
    assert violations({"r1mega.data.prompts": [("r1mega.config.load", 4)]}, floor) == []
    same_floor = violations({"r1mega.data.prompts": [("r1mega.reward.math", 3)]}, {"data": 1, "reward": 1})
    assert len(same_floor) == 1


def test_a_circle_is_named():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c", "b"]]
    assert circles({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}}) == []


def test_imports_are_found_wherever_they_stand():
    source = "import r1mega.a.b\nfrom r1mega.a import b, C\ndef f():\n    from r1mega.d import e\n"
    names = {name: Path() for name in ("r1mega.a", "r1mega.a.b", "r1mega.d")}
    expected = [("r1mega.a.b", 1), ("r1mega.a.b", 2), ("r1mega.a", 2), ("r1mega.d", 4)]
    assert sorted(imports("m", ast.parse(source), names)) == sorted(expected)


def test_no_file_reads_beside_the_repository():
    """Data that it does not carry are in the folder that R1MEGA_SHARED_DATA names (tests/machine.py)."""
    beside = re.compile(r"\.\./" + "shared|" + r"parents\[\d\] / ." + "shared")
    folders = ("r1mega", "kernels", "tests", "tools", "launch", "configs", "docs")
    files = [path for folder in folders for path in (REPOSITORY / folder).rglob("*.*") if path.suffix != ".so"]
    texts = {path: path.read_text(errors="ignore") for path in files if path.is_file() and path.suffix != ".pyc"}
    assert len(texts) > 300
    assert [str(path) for path, text in texts.items() if beside.search(text)] == []
