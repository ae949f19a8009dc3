"""GPU hours of a pipeline against its nodes planned one by one."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from r1mega.cli import app
from r1mega.config.load import load_config
from r1mega.config.validate import promised
from r1mega.errors import ConfigError
from r1mega.plan.command import Job, is_pipeline, plan_job, sample_counts
from r1mega.plan.given import read_model
from r1mega.plan.recipe import recipe_lines
from r1mega.plan.workload import Lengths

CONFIGS = Path(__file__).parents[3] / "configs"
NANO = CONFIGS / "nano"
JOB = Job(NANO / "zero.yaml", [], 4, "h100-80", Lengths(40), 1.0, per_node=8)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """Three nodes; base makes what the others start from."""
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(f"""
name: small
dir: runs/small
nodes:
  base: {{config: {NANO}/base.yaml}}
  zero: {{config: {NANO}/zero.yaml, ranks: 4, overrides: {{steps: 3}}}}
  sft: {{config: {NANO}/sft.yaml, ranks: 2, overrides: {{epochs: 2}}}}
  evaluate: {{config: {NANO}/evaluate.yaml, ranks: 2, overrides: {{others: []}}}}
""")
    return path


def figures(lines: list[str]) -> dict[str, list[str]]:
    return {words[0]: words for line in lines if (words := line.split())}


def test_hours_are_those_of_the_nodes(recipe):
    lines, fits = recipe_lines(recipe, [], JOB, {"sft": 1000, "evaluate": 20_000})
    assert fits and is_pipeline(recipe)
    found = figures(lines)
    zero = plan_job(dataclasses.replace(JOB, overrides=["steps=3"])).seconds
    sft = plan_job(dataclasses.replace(JOB, path=NANO / "sft.yaml", gpus=2, lengths=Lengths(None))).seconds
    assert zero is not None and sft is not None
    assert found["zero"][1:4] == ["4", "3", "steps"] and found["zero"][-1] == "fits"
    steps = 2 * math.ceil(1000 / 64)
    assert found["sft"][1:3] == ["2", str(steps)]
    assert found["zero"][-2] == str(math.ceil(3 * zero.total * 4 / 3600))
    assert found["sft"][-2] == str(math.ceil(steps * sft.total * 2 / 3600))
    assert "3 of 4 nodes" in lines[-1] and "not planned" in lines[1]


def test_what_hangs_on_data_says_what_to_tell(recipe):
    lines, _ = recipe_lines(recipe, [], JOB, {})
    assert "--samples sft=N" in lines[3] and "--samples evaluate=N" in lines[4] and "1 of 4 nodes" in lines[-1]
    with pytest.raises(ConfigError, match="--samples zero: wants one of base, sft, evaluate"):
        recipe_lines(recipe, [], JOB, {"zero": 5})


def test_a_model_that_an_earlier_node_makes_is_planned_as_what_that_starts_from():
    path = CONFIGS / "deepseek_v3_671b/evaluate.yaml"
    config = load_config(path, ["model.path=runs/x/hf"])
    assert read_model(config, path)["model_type"] == "deepseek_v3"
    with promised({Path("runs/x"): CONFIGS / "deepseek_v3_671b/student"}):
        assert read_model(config, path)["model_type"] == "qwen2"


@pytest.mark.parametrize("given", ["sft", "sft=0", "=3", "sft=many"])
def test_samples_want_a_node_and_a_number(given):
    assert sample_counts(["sft=3", "b=4"]) == {"sft": 3, "b": 4}
    with pytest.raises(ConfigError, match=f"--samples {given}"):
        sample_counts([given])


def test_what_is_of_one_stage_is_refused_for_a_pipeline(recipe):
    for words in ([str(recipe), "--search"], [str(NANO / "sft.yaml"), "--samples", "sft=3"]):
        result = CliRunner().invoke(app, ["plan", *words])
        assert isinstance(result.exception, ConfigError) and "pipeline" in str(result.exception)
