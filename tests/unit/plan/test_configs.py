"""Every shipped config for GPUs fits, and its comment and docs/plan.md say of it what the planner says."""

from __future__ import annotations

from pathlib import Path

import pytest

from r1mega.config.pipeline import load_pipeline
from tools.plan_configs import CONFIGS, Row, rows, stated, table

FOR_GPUS = [path for path in sorted(CONFIGS.glob("*/*.yaml")) if path.parent.name not in ("nano", "smollm2")]
DOCUMENT = Path(__file__).parents[3] / "docs/plan.md"


def as_stated(row: Row) -> None:
    assert row.stated == row.figures and row.stated.endswith("; fits"), (
        f"{row.path}: python tools/plan_configs.py --write"
    )


def test_every_config_says_what_it_is_made_for():
    pipelines = [path for path in FOR_GPUS if path.name == "r1.yaml"]
    assert [path for path in FOR_GPUS if stated(path) is None] == pipelines
    for path in pipelines:
        for name, node in load_pipeline(path).nodes.items():
            if name != "evaluate_student":  # another model under evaluate.yaml
                said = stated(path.parent / f"{name}.yaml")
                assert said is not None and said[0] == node.ranks, (path, name)


def test_two_of_them():
    """A stage that trains and one that only generates."""
    chosen = [CONFIGS / "moonlight_16b/distill.yaml", CONFIGS / "deepseek_v3_671b/evaluate.yaml"]
    planned = list(rows(chosen))
    assert [row.path for row in planned] == chosen
    shown = DOCUMENT.read_text().splitlines()
    for row, line in zip(planned, table(planned)[2:], strict=True):
        as_stated(row)
        assert line in shown


@pytest.mark.slow
@pytest.mark.heavy
def test_all_of_them():
    planned = list(rows())
    assert len(planned) == sum(stated(path) is not None for path in FOR_GPUS)
    for row in planned:
        as_stated(row)
    assert "\n".join(table(planned)) in DOCUMENT.read_text()
