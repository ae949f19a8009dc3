"""One rank of the tests of FP8 checkpoints: several runs in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.dist.convert_worker import resume_run, save_run

DTYPE = "bfloat16"


def save_and_resume(base: Path, config: dict[str, Any], source: Path, recipes: list[str]) -> dict[str, Any]:
    """{recipe: what `resume_run` finds in the layout that saved}; the runs are left under base / recipe."""
    found = {}
    for recipe in recipes:
        save_run(base / recipe, config, {}, source, DTYPE, False, recipe)
        found[recipe] = resume_run(base / recipe, config, DTYPE, [({}, 2), ({}, 0)], recipe)
    return found


def resume(base: Path, config: dict[str, Any], layout: dict[str, int], recipes: dict[str, str]) -> dict[str, Any]:
    """{recipe that saved: what `resume_run` finds}. recipes: recipe that saved -> recipe that goes on."""
    return {
        saved: resume_run(base / saved, config, DTYPE, [(layout, 2)], then)[f"{layout} from 2"]
        for saved, then in recipes.items()
    }
