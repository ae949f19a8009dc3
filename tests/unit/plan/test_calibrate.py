"""Constants of the time model from a run: a recorded one (configs/nano/zero.yaml for three steps on two cores), and a made-up one."""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path

import pytest
import torch

from r1mega.config.load import load_config
from r1mega.errors import ConfigError
from r1mega.observe.run import RunDirectory
from r1mega.plan.calibrate import calibrated, fit, lines
from r1mega.plan.generator import generator_memory
from r1mega.plan.gpu import Efficiency, gpu_kind
from r1mega.plan.seconds import plan_seconds
from r1mega.plan.workload import Lengths, replicas_work

REPOSITORY = Path(__file__).parents[3]
GPU = gpu_kind("h100-80")


@pytest.fixture
def run(tmp_path):
    """The recorded run's directory, with the model's config.json where a planner finds it, as if it had been on a GPU."""
    shutil.copytree(REPOSITORY / "tests/data/plan_run", tmp_path / "run")
    ran_on(tmp_path / "run", "NVIDIA H100 80GB HBM3")
    shutil.copytree(REPOSITORY / "configs/nano/model", tmp_path / "run/model")
    return tmp_path / "run"


def ran_on(run: Path, *gpus: str) -> None:
    environment = json.loads((run / "environment.json").read_text())
    (run / "environment.json").write_text(json.dumps(environment | {"gpus": gpus}))


def change(run: Path, **metrics: float) -> None:
    """In every step."""
    lines = [json.dumps(step | metrics) for step in recorded(run)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def recorded(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_recorded_run(run):
    found = calibrated(run, GPU, per_node=8)
    assert found.steps == 2 and list(found.phases) == ["rollout", "logprob", "update", "reshard"]
    for phase, (measured, _) in found.phases.items():
        assert measured == statistics.median(step[f"time/{phase}_seconds"] for step in recorded(run)[1:])
    assert 0 < found.efficiency.matmul < 1e-3  # of a GPU's peak: it ran on a CPU
    (_, first, *phases) = lines(found, GPU)
    assert "on 2 steps" in first and len(phases) == 4
    assert f"{found.phases['update'][1] / found.phases['update'][0] - 1:+.0%}" in phases[2]
    for phase in ("rollout", "logprob", "update"):  # two constants for three phases: each is nearly met
        measured, planned = found.phases[phase]
        assert planned == pytest.approx(measured, rel=0.5)


def test_what_a_save_wrote_in_its_seconds(run):
    assert calibrated(run, GPU, per_node=8).save_bandwidth is None
    (run / "checkpoints/step_000002").mkdir(parents=True)
    (run / "checkpoints/step_000002/data").write_bytes(bytes(3000))
    RunDirectory(run).write_pace(10.0, 1.5, 18)
    found = calibrated(run, GPU, per_node=8)
    assert found.save_bandwidth == 2000 and "GB/s a node measured" in list(lines(found, GPU))[-1]


def test_a_save_of_two_machines_whatever_the_plan_has(run):
    environment = json.loads((run / "environment.json").read_text()) | {"world_size": 2, "ranks_per_machine": 1}
    (run / "environment.json").write_text(json.dumps(environment))
    (run / "checkpoints/step_000002").mkdir(parents=True)
    (run / "checkpoints/step_000002/data").write_bytes(bytes(3000))
    RunDirectory(run).write_pace(10.0, 1.5, 18)
    assert calibrated(run, GPU, per_node=8).save_bandwidth == 1000


def test_constants_that_made_the_seconds_are_found_again(run):
    """rollout, log-probs and update of a run whose phases take exactly what the model says with other constants."""
    config, hf = load_config(run / "config.yaml"), json.loads((run / "model/config.json").read_text())
    step = recorded(run)[1]
    prompt = round(step["tokens/step"] / 256 - step["response/length_mean"])
    work = replicas_work(config, Lengths(step["response/length_mean"], prompt=prompt), 1)
    generator = generator_memory(hf, torch.float32, config.rollout, GPU.memory_bytes)
    truth = Efficiency(matmul=0.37, overhead_seconds=0.0012)
    phases = plan_seconds(
        config, hf, 1, GPU, work, generator, imbalance=1.0, per_node=8, efficiency=truth
    ).phases  # fmt: skip
    made = step | {f"time/{phase}_seconds": seconds for phase, seconds in phases.items()}
    (run / "metrics.jsonl").write_text(json.dumps(made) + "\n")
    found = calibrated(run, GPU, per_node=8)
    assert found.efficiency == truth and found.steps == 1
    assert all(planned == pytest.approx(measured, rel=0.01) for measured, planned in found.phases.values())


def test_no_constant_is_less_than_nothing():
    """Seconds that only a negative overhead, or a GPU beyond its peak, would explain."""
    slower = fit([(lambda e: 1 / e.matmul, 8.0), (lambda e: 1 / e.matmul + 100 * e.overhead_seconds, 4.0)])
    assert slower.overhead_seconds == 0 and slower.matmul == pytest.approx(1 / 4.8, rel=0.02)
    faster = fit([(lambda e: 1 / e.matmul, 0.5), (lambda e: 1 / e.matmul + e.overhead_seconds, 3.0)])
    assert faster == Efficiency(1.0, overhead_seconds=2)  # and not the 2.5 of a GPU at twice its peak


def test_a_constant_that_nothing_hangs_on_stays():
    assert fit([(lambda e: 1 / e.matmul, 4.0)]) == Efficiency(0.25)
    assert fit([(lambda e: e.overhead_seconds, 2.0)]) == Efficiency(overhead_seconds=2)


def test_phases_that_no_share_explains_are_said(run):
    said = "no share of the peak explains these phases"
    assert said not in "".join(lines(calibrated(run, GPU, per_node=8), GPU))
    change(run, **{"time/update_seconds": 1e-6, "time/logprob_seconds": 1e-6})
    assert said in "".join(lines(calibrated(run, GPU, per_node=8), GPU))  # beyond the peak
    change(run, **{"time/update_seconds": 1.0, "time/logprob_seconds": 10.0})
    assert said in "".join(lines(calibrated(run, GPU, per_node=8), GPU))  # a ratio that no constant gives


@pytest.mark.parametrize("gpus", [(), ("NVIDIA A100-SXM4-80GB",), ("NVIDIA H100 80GB HBM3", "NVIDIA H200")])
def test_a_run_on_other_gpus_is_refused(run, gpus):
    ran_on(run, *gpus)
    with pytest.raises(ConfigError, match="the plan is for h100-80; give a run on H100"):
        calibrated(run, GPU, per_node=8)


def test_h20_is_not_h200(run):
    ran_on(run, "NVIDIA H200")
    assert calibrated(run, gpu_kind("h200"), per_node=8).steps == 2
    with pytest.raises(ConfigError, match="it ran on NVIDIA H200, and the plan is for h20"):
        calibrated(run, gpu_kind("h20"), per_node=8)


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        ({"tokens/rollout": 8000.0}, "512 responses"),  # two rounds of dynamic sampling
        ({"tokens/step": 3000.0}, "12 tokens of each of 256 trained on"),  # samples were dropped
        ({"response/length_mean": 0.0}, "no response/length_mean above 0 in step 2"),
    ],
)
def test_a_run_that_no_plan_describes_is_refused(run, metrics, said):
    change(run, **metrics | ({"response/length_mean": 15.625} if "tokens/rollout" in metrics else {}))
    with pytest.raises(ConfigError, match=f"--calibrate .*{said}"):
        calibrated(run, GPU, per_node=8)


@pytest.mark.parametrize("pace", ["", "[]", "{}", '{"save_seconds": 0}', '{"save_seconds": null}'])
def test_a_save_of_which_nothing_is_known_is_left_out(run, pace):
    (run / "checkpoints/step_000002").mkdir(parents=True)
    (run / "checkpoints/step_000002/data").write_bytes(bytes(3000))
    (run / "pace.json").write_text(pace)
    assert calibrated(run, GPU, per_node=8).save_bandwidth is None


@pytest.mark.parametrize(
    "environment",
    [
        "[]",
        "3",
        '{"world_size": 1, "gpus": 3}',
        '{"world_size": "1", "gpus": ["H100"]}',
        '{"world_size": 1, "gpus": [null]}',
    ],
)
def test_an_environment_that_nobody_wrote_is_refused(run, environment):
    (run / "environment.json").write_text(environment)
    with pytest.raises(ConfigError, match="--calibrate .*not the directory of a run"):
        calibrated(run, GPU, per_node=8)


@pytest.mark.parametrize("missing", ["config.yaml", "environment.json", "metrics.jsonl", "model/config.json"])
def test_what_is_no_run_is_said(run, missing):
    (run / missing).unlink()
    with pytest.raises(ConfigError, match="--calibrate"):
        calibrated(run, GPU, per_node=8)
