"""Where the boxes and lines of a pipeline's picture go: columns by depth, a row by a parent's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 176, 62
GAP_X, GAP_Y = 40, 26
MARGIN = 6


@dataclass(frozen=True, slots=True)
class Box:
    """Upper left corner, in pixels."""

    name: str
    x: int
    y: int


@dataclass(frozen=True, slots=True)
class Picture:
    """lines: SVG paths, each from the right side of a parent to the left side of its child."""

    width: int
    height: int
    boxes: list[Box]
    lines: list[tuple[str, str, str]]  # parent, child, path


def lay_out(parents: Mapping[str, Sequence[str]]) -> Picture:
    """parents: by node, nodes in an order in which each comes after its parents."""
    column: dict[str, int] = {}
    reach: dict[str, int] = {}  # the last column that a node and its lines take up in its row
    for name, before in parents.items():
        column[name] = reach[name] = 1 + max((column[parent] for parent in before), default=-1)
        for parent in before:
            reach[parent] = max(reach[parent], column[name] - 1)
    row: dict[str, int] = {}
    taken: set[tuple[int, int]] = set()
    for name, before in parents.items():
        columns = range(column[name], reach[name] + 1)
        place = row[before[-1]] if before else 0
        while any((c, place) in taken for c in columns):
            place += 1
        row[name] = place
        taken |= {(c, place) for c in columns}
    boxes = {
        name: Box(name, MARGIN + column[name] * (WIDTH + GAP_X), MARGIN + row[name] * (HEIGHT + GAP_Y))
        for name in parents
    }
    lines = [(parent, name, _line(boxes[parent], boxes[name])) for name, before in parents.items() for parent in before]
    return Picture(
        2 * MARGIN + (max(column.values(), default=0) + 1) * (WIDTH + GAP_X) - GAP_X,
        2 * MARGIN + (max(row.values(), default=0) + 1) * (HEIGHT + GAP_Y) - GAP_Y,
        list(boxes.values()),
        lines,
    )


def _line(start: Box, end: Box) -> str:
    """Level to the gap before the child's column, then a curve."""
    x, y = start.x + WIDTH, start.y + HEIGHT // 2
    bend, to = end.x - GAP_X, end.y + HEIGHT // 2
    level = f"L{bend},{y} " if bend > x else ""
    return f"M{x},{y} {level}C{bend + GAP_X // 2},{y} {bend + GAP_X // 2},{to} {end.x},{to}"
