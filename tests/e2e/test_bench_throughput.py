"""The throughput benchmark on made-up inputs: no base model was made before, and the lengths are those asked for."""

import json
import math
import os
from pathlib import Path

import pytest

from r1mega.model.flops import Work, generation_work, model_flops, sequences_work
from tests.e2e.runs import metrics
from tests.processes import REPOSITORY, environment, run

NANO = json.loads((REPOSITORY / "configs/nano/model/config.json").read_text())
SMALL = ("threads=1", "rollout.num_prompts=4", "rollout.group_size=4", "update.num_minibatches=2")


def benchmark(config, directory, *arguments):
    """The summary that it writes, and what it prints."""
    paths = {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'kernels'}"}
    done = run(
        f"configs/nano/{config}.yaml", "--synthetic", "--dir", directory, *arguments,
        program=["tools/bench_throughput.py"], variables=environment() | paths, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    return json.loads((Path(directory) / "throughput.json").read_text()), done.stdout


def test_rl_on_two_ranks_with_given_lengths(tmp_path):
    """Lengths from a file of one number; experts balanced by force, which the generator does not know of."""
    (tmp_path / "lengths").write_text("11\n")
    layout = ("parallel.tp=2", "parallel.ep=2", "model.force_expert_balance=true")
    summary, printed = benchmark(
        "zero", tmp_path / "bench", *SMALL, *layout, "--ranks", 2, "--steps", 1, "--lengths", tmp_path / "lengths",
        "--prompt-tokens", 7, "--peak-tflops", 0.5,
    )  # fmt: skip
    lines = metrics(tmp_path / "bench/run")
    assert [line["step"] for line in lines] == [1, 2]
    flops = model_flops(NANO)
    drawn = generation_work(7, [11] * 4) * 4
    trained = sequences_work([(18, 11)] * 16)
    for line in lines:
        assert line["response/length_mean"] == line["response/length_max"] == 11
        assert line["tokens/update"] == line["tokens/step"] == line["tokens/logprob"] == 16 * 18
        assert line["perf/rollout_flops"] == pytest.approx(flops.forward(drawn))
        assert line["perf/logprob_flops"] == pytest.approx(flops.forward(trained))
        assert line["perf/update_flops"] == pytest.approx(3 * flops.forward(trained))
        assert line["perf/step_flops"] == pytest.approx(flops.forward(drawn) + 4 * flops.forward(trained))
        speed = (
            line["perf/step_flops"] / line["time/step_seconds"] / 2 / 1e12
        )  # by rank 0's time, not the slowest rank's
        assert 0.4 * speed < line["perf/step_tflops_per_gpu"] <= speed * (1 + 1e-9)
        assert line["perf/step_mfu"] == pytest.approx(line["perf/step_tflops_per_gpu"] / 0.5)
        assert line["memory/update_host_peak_bytes"] >= 0.9 * line["memory/rss_bytes"]
        assert 0 < line["reward/mean"] < 1, "random rewards"
        assert line["expert/load_max_over_mean"] < 1.6, "forced balance; the random router's own is above 2"
    assert summary["phases"].keys() == {"rollout", "logprob", "update", "step"}
    assert summary["phases"]["update"]["mfu"] == lines[1]["perf/update_mfu"]
    assert summary["ranks"] == 2 and summary["forward_flops_per_token"] == flops.forward(Work(1, 0, 1))
    assert "tokens/s/GPU" in printed and "update" in printed
    assert not (tmp_path / "bench/run/checkpoints").exists() and not (tmp_path / "bench/run/hf").exists()


def test_sft_with_a_spread_of_lengths(tmp_path):
    summary, printed = benchmark("sft", tmp_path / "bench", "threads=1", "--steps", 2, "--mean", 40, "--cv", 0.5)
    lines = metrics(tmp_path / "bench/run")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(math.isfinite(line["train/loss"]) for line in lines)
    assert summary["phases"].keys() == {"update", "step"} and summary["phases"]["update"]["mfu"] is None
    sample = summary["metrics"]["tokens/update"] / 64  # of 64 samples with a prompt of 16 tokens
    assert 16 + 30 < sample < 16 + 50
    assert "no MFU" in printed
