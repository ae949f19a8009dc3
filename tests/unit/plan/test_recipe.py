"""GPU hours of a pipeline against its nodes planned one by one."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from r1mega.cli import app
from r1mega.config.load import load_config
from r1mega.config.pipeline import load_pipeline
from r1mega.config.validate import promised
from r1mega.errors import ConfigError
from r1mega.plan.calibrate import Calibration
from r1mega.plan.command import Job, is_pipeline, plan_job, sample_counts
from r1mega.plan.data_work import SECONDS, DataWork
from r1mega.plan.generator import generator_memory
from r1mega.plan.given import read_model
from r1mega.plan.gpu import Efficiency, gpu_kind
from r1mega.plan.recipe import NodeCost, node_cost, recipe_lines
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
    """Of so many steps and samples that hours are thousands, and one step more or less would show."""
    steps, samples = 10**9, 64 * 10**11
    lines, fits = recipe_lines(recipe, [f"zero.steps={steps}"], JOB, {"sft": samples, "evaluate": 10**12})
    assert fits and is_pipeline(recipe)
    found = figures(lines)
    zero = plan_job(dataclasses.replace(JOB, overrides=["steps=3"])).seconds
    sft = plan_job(dataclasses.replace(JOB, path=NANO / "sft.yaml", gpus=2, lengths=Lengths(None))).seconds
    assert zero is not None and sft is not None
    seconds = [steps * zero.total, 2 * 10**11 * sft.total, cost(recipe, "evaluate", 10**12).seconds]
    hours = [time * gpus / 3600 for time, gpus in zip(seconds, (4, 2, 2), strict=True)]
    assert min(hours) > 1000
    assert found["zero"][1:4] == ["4", f"{steps:,}", "steps"] and found["zero"][-1] == "fits"
    assert found["sft"][1:3] == ["2", f"{2 * 10**11:,}"]
    for name, time, taken in zip(("zero", "sft", "evaluate"), seconds, hours, strict=True):
        assert found[name][-3:-1] == [f"{time / 86400:,.1f}", f"{math.ceil(taken):,}"]
    said = f"{math.ceil(sum(hours)):,} hours of h100-80, {sum(seconds) / 86400:,.1f} days one after the other, for 3 of 4 nodes"
    assert said in lines[-1] and "not planned" in lines[1] and "1 not planned, whether they fit" in lines[-1]


def cost(recipe: Path, name: str, samples: int | None, job: Job = JOB, known: Calibration | None = None) -> NodeCost:
    return node_cost(load_pipeline(recipe, []).nodes[name], job, samples, known)


def test_the_work_on_data_falls_with_the_ranks_and_is_told(recipe):
    """600,000 samples of 8,000 tokens are no time-out on the processors of 256 ranks."""
    whole = DataWork(list(SECONDS), 600_000 * 8000, 256)
    assert whole.hours == pytest.approx(14.8 * 4800 / 256 / 3600) and whole.hours + whole.hours_alone < 1
    assert DataWork(["tokenise"], 4.8e9, 1).hours == pytest.approx(7.6)
    lines, _ = recipe_lines(recipe, ["zero.steps=3"], JOB, {"sft": 600_000})
    sft = plan_job(dataclasses.replace(JOB, path=NANO / "sft.yaml", gpus=2, lengths=Lengths(None))).work
    tokens = 600_000 * sum(prompt + response for prompt, response in sft.samples) / len(sft.samples)
    (told,) = (line for line in lines if line.startswith("data "))
    assert told == DataWork(["tokenise"], tokens, 2).line("sft") and "each of 2 ranks" in told


def test_steps_and_samples_are_multiplied_out(recipe):
    zero = plan_job(dataclasses.replace(JOB, overrides=["steps=3"])).seconds
    sft = plan_job(dataclasses.replace(JOB, path=NANO / "sft.yaml", gpus=2, lengths=Lengths(None))).seconds
    found = cost(recipe, "zero", None)
    assert found.seconds == pytest.approx(3 * zero.total) and found.gpu_hours == pytest.approx(12 * zero.total / 3600)
    found = cost(recipe, "sft", 1000)  # two epochs of 16 batches of 64
    assert found.seconds == pytest.approx(32 * sft.total) and found.gpu_hours == pytest.approx(64 * sft.total / 3600)


@pytest.mark.parametrize("known", [None, Efficiency(overhead_seconds=0.01)])
def test_responses_of_a_node_that_only_generates_are_counted(recipe, known):
    """20,000 of 40 tokens behind prompts of 256, on two generators of one GPU: as many at once as they may hold."""
    path, efficiency = NANO / "evaluate.yaml", known or Efficiency()
    config, gpu = load_config(path), gpu_kind("h100-80")
    hf = read_model(config, path)
    held = generator_memory(hf, getattr(torch, config.model.dtype), config.rollout, gpu.memory_bytes)
    at_once, context = min(config.rollout.max_num_seqs, held.kv_tokens / 276), 276
    step = efficiency.overhead_seconds
    step += (held.weights + at_once * context * held.kv_bytes_per_token) / (gpu.memory_bandwidth * efficiency.memory)
    calibration = None if known is None else Calibration(Path("run"), 1, known, {})
    job = dataclasses.replace(JOB, lengths=Lengths(given=(40,)))
    found = cost(recipe, "evaluate", 20_000, job, calibration)
    assert found.amount == "20,000 responses"
    waited = pytest.approx(20_000 / 2 * 40 / at_once * step, rel=0.02)  # of the last wave some places are free
    assert found.seconds == waited


def test_a_calibrated_recipe_shows_its_constants(recipe, tmp_path):
    """The recorded run of the calibration's tests, as if it had been on a GPU."""
    run = tmp_path / "run"
    shutil.copytree(CONFIGS.parent / "tests/data/plan_run", run)
    shutil.copytree(NANO / "model", run / "model")
    told = json.loads((run / "environment.json").read_text()) | {"gpus": ["NVIDIA H100 80GB HBM3"]}
    (run / "environment.json").write_text(json.dumps(told))
    plain, _ = recipe_lines(recipe, [], JOB, {"evaluate": 10**12})
    lines, _ = recipe_lines(recipe, [], dataclasses.replace(JOB, run=run), {"evaluate": 10**12})
    assert any(line.startswith("calibrated  on 2 steps") for line in lines)
    assert figures(lines)["evaluate"] != figures(plain)["evaluate"]


def test_nodes_that_cannot_be_laid_out_are_named_together(recipe):
    with pytest.raises(ConfigError) as caught:
        recipe_lines(recipe, ["zero.update.microbatch_tokens=8", "sft.microbatch_tokens=8"], JOB, {})
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"zero ({NANO / 'zero.yaml'}): ") and second.startswith(f"sft ({NANO / 'sft.yaml'}): ")


def test_what_a_second_model_rewrites_is_said_to_be_left_out(tmp_path):
    path = tmp_path / "one.yaml"
    source = CONFIGS / "deepseek_v3_671b"
    path.write_text(
        f"{{name: one, dir: runs/one, external: {{models/DeepSeek-V3: {source}/model, data: null, "
        f"runs/deepseek_v3_671b/zero_long/hf: {source}/model}}, "
        f"nodes: {{cold_start: {{config: {source}/cold_start.yaml, ranks: 256}}}}}}"
    )
    assert cost(path, "cold_start", None).amount == "80,000 responses, not their rewriting"


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


@pytest.mark.parametrize("option", ["--gpus", "--gpus-per-node"])
def test_gpus_of_a_pipeline_are_its_own(recipe, option):
    result = CliRunner().invoke(app, ["plan", str(recipe), option, "8"])
    assert isinstance(result.exception, ConfigError) and "ranks_per_machine" in str(result.exception)
