"""The zero stage end to end: files, metrics, resume after any kind of end, data parallelism, real prompts."""

import json
import math
import os
import signal
import time
from pathlib import Path

import pytest

from r1mega.errors import EXIT_STALLED
from tests.e2e.runs import (
    base_arguments,
    kill_when,
    metrics,
    r1mega,
    run_until_step,
    without_times,
    zero_arguments,
)
from tests.processes import start

NAMES = """step reward/mean reward/accuracy reward/format response/length_mean response/truncated_fraction policy/kl
policy/clip_fraction policy/entropy policy/grad_norm logprob/diff_max logprob/diff_mean expert/load_max_over_mean
time/rollout_seconds time/reward_seconds time/logprob_seconds time/update_seconds time/reshard_seconds time/step_seconds
tokens/rollout_per_second tokens/update_per_second memory/rss_bytes""".split()


@pytest.fixture(scope="module")
def whole_run(nano_base, tmp_path_factory):
    """An uninterrupted run of four steps, in a process of its own: what forks do is compared with it."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    r1mega(*zero_arguments(nano_base, run_dir), real=True)
    return run_dir


def test_run_directory_and_metrics(whole_run):
    for name in ("config.yaml", "environment.json", "samples.jsonl", "status.json", "hf/config.json", "checkpoints"):
        assert (whole_run / name).exists(), name
    lines = metrics(whole_run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert set(NAMES) <= line.keys(), set(NAMES) - line.keys()
        assert all(math.isfinite(line[name]) for name in NAMES)
        assert line["logprob/diff_max"] < 2e-4
        assert line["time/step_seconds"] > 0
    assert json.loads((whole_run / "status.json").read_text())["state"] == "finished"


def test_reference_and_kl(whole_run):
    """The KL is 0 only while policy and reference are equal: before the first update, not after."""
    kl = [line["policy/kl"] for line in metrics(whole_run)]
    assert all(value >= 0 for value in kl)
    assert kl[1] > 0


@pytest.mark.parametrize(
    ("sent", "step", "code"), [(signal.SIGKILL, 3, -9), (signal.SIGTERM, 1, 85), (signal.SIGUSR2, 2, 85)]
)
def test_interrupted_run_equals_uninterrupted_bitwise(nano_base, whole_run, tmp_path, sent, step, code):
    arguments = zero_arguments(nano_base, tmp_path / "run")
    assert run_until_step(step, tmp_path / "run", sent, *arguments) == code
    wanted = "before its end, sbatch --signal=B:USR1@" in (tmp_path / "run.log").read_text()
    assert wanted == (code == 85), "how long a warning it wants"
    r1mega(*arguments)
    assert without_times(metrics(tmp_path / "run")) == without_times(metrics(whole_run))
    assert (tmp_path / "run/samples.jsonl").read_text() == (whole_run / "samples.jsonl").read_text()
    shard = "hf/model.safetensors"
    assert (tmp_path / "run" / shard).read_bytes() == (whole_run / shard).read_bytes()


def test_memory_keys_change_no_bit(nano_base, whole_run, tmp_path):
    """Killed with all of them, and on with fewer: the run that had none."""
    run_dir = tmp_path / "run"
    arguments = zero_arguments(nano_base, run_dir)
    keys = ["grad_offload=true", "optimizer_offload=update", "param_offload=true", "reference_swap=true"]
    assert run_until_step(3, run_dir, signal.SIGKILL, *arguments, *(f"memory.{key}" for key in keys)) == -9
    done = r1mega(*arguments, "memory.param_offload=true")
    assert "from step 2" in done.stdout
    assert without_times(metrics(run_dir)) == without_times(metrics(whole_run))
    name = "hf/model.safetensors"
    assert (run_dir / name).read_bytes() == (whole_run / name).read_bytes()


def test_killed_while_saving_goes_on_from_the_checkpoint_before(nano_base, whole_run, tmp_path):
    """The kill comes when step 4's checkpoint is half-written: step 2's must be whole and be used."""
    run_dir, arguments = tmp_path / "run", zero_arguments(nano_base, tmp_path / "run")
    kill_when(lambda: any(run_dir.glob("checkpoints/step_000004.tmp")), *arguments, log=tmp_path / "log")
    assert not (run_dir / "checkpoints/step_000004").exists()
    done = r1mega(*arguments)
    assert "from step 2" in done.stdout
    assert without_times(metrics(run_dir)) == without_times(metrics(whole_run))
    assert not list(run_dir.glob("checkpoints/*.tmp"))


def test_base_stage_killed_in_the_middle_equals_uninterrupted(nano_base, tmp_path):
    run_dir = tmp_path / "run"
    arguments = base_arguments(run_dir, "checkpoint.every_steps=20")
    kill_when(lambda: any(line["step"] >= 40 for line in metrics(run_dir)), *arguments, log=tmp_path / "log")
    r1mega(*arguments)
    assert without_times(metrics(run_dir)) == without_times(metrics(nano_base))
    name = "hf/model.safetensors"
    assert (run_dir / name).read_bytes() == (nano_base / name).read_bytes()


@pytest.mark.parametrize(
    "layout",
    [
        ["parallel.tp=2", "parallel.ep=2"],
        ["parallel.pp=2", "parallel.vpp=2", "parallel.layers_per_stage=[1,1,1,0]", "rollout.tp=2"],
        pytest.param(["parallel.cp=2"], marks=pytest.mark.slow),
        pytest.param(["parallel.pp=2", "parallel.layers_per_stage=[2,1]"], marks=pytest.mark.slow),
    ],
    ids=["tp2_ep2", "vpp2_generator_tp2", "cp2", "pp2"],
)
def test_sharded_model_agrees_with_one_rank(nano_base, whole_run, tmp_path, layout):
    """Two ranks that share the model: the steps' figures are those of one rank."""
    arguments = zero_arguments(nano_base, tmp_path / "run", "checkpoint.every_steps=4", *layout)
    r1mega(*arguments, num_ranks=2)
    assert_alike(metrics(whole_run), metrics(tmp_path / "run"))


def test_generators_that_share_experts_train_as_one_that_has_all(nano_base, tmp_path):
    """Two with KV caches of their own that pass one set of experts, beside a sharded trainer; routing is not recorded there."""
    one, two = tmp_path / "one", tmp_path / "two"
    short = ("steps=2", "rollout.router_replay=false")
    r1mega(*zero_arguments(nano_base, one, *short))
    r1mega(*zero_arguments(nano_base, two, *short, "rollout.ep=2", "parallel.tp=2", "parallel.ep=2"), num_ranks=2)
    assert_alike(metrics(one), metrics(two))


def test_a_run_goes_on_in_another_layout(nano_base, whole_run, tmp_path):
    """Two steps on one rank, the others on two that share model, generator and experts: the figures of one rank."""
    run_dir, layout = tmp_path / "run", ["parallel.tp=2", "parallel.ep=2", "rollout.tp=2", "rollout.ep=2"]
    assert run_until_step(2, run_dir, signal.SIGTERM, *zero_arguments(nano_base, run_dir)) == 85
    r1mega(*zero_arguments(nano_base, run_dir, *layout), num_ranks=2)
    assert [line["step"] for line in metrics(run_dir)] == [1, 2, 3, 4]
    assert_alike(metrics(whole_run), metrics(run_dir))


def assert_alike(ones, twos):
    """The metrics of one rank, and of several: up to rounding, and with the sampler's log-probs those of the trainer."""
    for one, two in zip(ones, twos, strict=True):
        assert two["logprob/diff_max"] < 2e-4
        for name in ("response/length_mean", "reward/accuracy"):
            assert math.isclose(one[name], two[name], abs_tol=1e-12), name
        for name in ("policy/loss", "policy/kl", "policy/entropy", "policy/grad_norm"):
            assert math.isclose(one[name], two[name], abs_tol=1e-5, rel_tol=1e-4), (name, one[name], two[name])


def test_two_data_parallel_ranks_equal_one(nano_base, whole_run, tmp_path):
    command, *arguments = zero_arguments(nano_base, tmp_path / "run")
    r1mega(command, "--ranks", 2, *arguments, real=True)
    one, two = metrics(whole_run), metrics(tmp_path / "run")
    assert len(one) == len(two) == 4
    for a, b in zip(one, two, strict=True):
        for name in ("reward/mean", "reward/accuracy", "response/length_mean"):
            assert math.isclose(a[name], b[name], abs_tol=1e-12), name
        for name in ("policy/loss", "policy/kl", "policy/grad_norm", "policy/entropy"):
            assert math.isclose(a[name], b[name], abs_tol=1e-5, rel_tol=1e-4), (name, a[name], b[name])


def test_export_evaluated_from_the_command_line_gives_the_figures_of_the_run(nano_base, whole_run, tmp_path):
    """Another process, weights from the exported HF directory: the same responses as the generator in the trainer."""
    inside = [json.loads(line) for line in (whole_run / "evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in inside] == [0, 4]
    r1mega("eval", whole_run, f"{nano_base}/data/eval.jsonl", "--temperature", "1", "--top-p", "1", "--num-prompts", "4",
           "--output", tmp_path / "result.json")  # fmt: skip
    outside = json.loads((tmp_path / "result.json").read_text())["summary"]
    for name in ("eval/accuracy", "eval/format", "eval/length_mean", "eval/truncated_fraction"):
        assert outside[name] == inside[-1][name], name


def test_generate(whole_run):
    question = "which of a 1 b 2 c 3 d 4 makes ? +5 +2 = 10"
    done = r1mega("generate", whole_run, question, "--num-samples", "2", "--max-tokens", "8", real=True)
    assert len(done.stdout.strip().split("\n\n")) == 2


def test_report_is_written(whole_run):
    done = r1mega("report", whole_run)
    assert done.stdout.strip().endswith("report.html")
    assert "plotly" in (whole_run / "report.html").read_text().lower()


def test_finished_run_starts_again_without_changing_anything(whole_run, nano_base):
    before = (whole_run / "metrics.jsonl").read_bytes()
    assert "nothing to do" in r1mega(*zero_arguments(nano_base, whole_run)).stdout
    assert (whole_run / "metrics.jsonl").read_bytes() == before


def test_another_config_in_the_same_run_dir_is_refused(whole_run, nano_base):
    before = (whole_run / "metrics.jsonl").read_bytes()
    done = r1mega(*zero_arguments(nano_base, whole_run, "optimizer.lr=0.5"), check=False)
    assert done.returncode == 2
    assert "optimizer.lr" in done.stdout
    assert "run_dir" in done.stdout
    assert "Traceback" not in done.stdout
    assert (whole_run / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["algorithm.normalize_std=false", "algorithm.loss_aggregation=constant", "rollout.top_p=0.9"],
        ["algorithm.ratio=sequence", "algorithm.clip_low=0.0003", "algorithm.clip_high=0.0004"],
        ["algorithm.old_log_probs=recompute", "algorithm.importance_cap=2.0", "algorithm.loss_aggregation=token"],
        ["algorithm.dynamic_sampling.enabled=true", "algorithm.clip_high=0.28", "reward.overlong.weight=0.5",
         "reward.overlong.buffer_tokens=8", "algorithm.mask_truncated=true", "algorithm.kl_coefficient=0"],
        ["algorithm.surrogate=gmpo", "algorithm.old_log_probs=recompute", "algorithm.importance_cap=2.0",
         "algorithm.importance_level=sequence", "algorithm.off_policy.mask=geometric",
         "algorithm.off_policy.reject_ratio=1e-4"],
        ["algorithm.baseline=leave_one_out", "algorithm.normalize_std=false", "algorithm.whiten=true",
         "algorithm.surrogate=cispo", "algorithm.kl_in=reward", "algorithm.off_policy.max_divergence=1"],
        ["rollout.engine=transformers", "rollout.router_replay=false", "rollout.min_p=0.02", "rollout.top_k=40"],
    ],
    ids=["dr_grpo", "gspo", "recompute_tis", "dapo", "gmpo_mis", "rloo_cispo", "transformers_engine"],
)  # fmt: skip
def test_switches(nano_base, whole_run, tmp_path, overrides):
    r1mega(*zero_arguments(nano_base, tmp_path / "run", "steps=2", *overrides))
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["logprob/diff_max"] < 2e-4 for line in lines)
    assert all(math.isfinite(line["policy/loss"]) for line in lines)
    assert lines[1]["policy/loss"] != metrics(whole_run)[1]["policy/loss"], "the switches change nothing"


def test_real_prompts(nano_base, tmp_path):
    """Questions in the form of GSM8K's file (or that file itself, in the folder that R1MEGA_SHARED_DATA names). The nano
    model cannot solve them; the loop must run on them.
    """
    own = Path(__file__).parents[1] / "data" / "gsm8k_form.jsonl"
    folder = os.environ.get("R1MEGA_SHARED_DATA")
    prompts = Path(folder) / "gsm8k_train.jsonl" if folder else own
    r1mega(*zero_arguments(
        nano_base, tmp_path / "run", "steps=2", f"data.prompts=[{prompts}]", "data.template=r1_zero",
        "data.max_prompt_tokens=900", "data.on_long_prompt=skip", "evaluate.data=null", "update.microbatch_tokens=4096",
        "model.path=" + str(_long_context(nano_base, tmp_path)),
    ))  # fmt: skip
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["logprob/diff_max"] < 2e-4 for line in lines)


def _long_context(base, tmp_path):
    """The same weights with room for longer prompts (rotary positions need no weights)."""
    import shutil

    copy = tmp_path / "long"
    shutil.copytree(base / "hf", copy)
    config = json.loads((copy / "config.json").read_text()) | {"max_position_embeddings": 1024}
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@pytest.mark.slow
def test_a_stopped_rank_is_named_and_the_job_ends(nano_base, tmp_path):
    """`kill -STOP` of rank 1 in the middle of a run, by the launcher of this machine; no key is changed."""
    run_dir = tmp_path / "run"
    arguments = zero_arguments(nano_base, run_dir, "steps=1000")
    with open(tmp_path / "said.txt", "w+") as output:
        process = start(arguments[0], "--ranks", 2, *arguments[1:], output=output, real=True)
        try:
            limit = time.monotonic() + 900
            while not metrics(run_dir) and time.monotonic() < limit:
                time.sleep(0.2)
            os.kill(json.loads((run_dir / "watch/rank_1.json").read_text())["pid"], signal.SIGSTOP)
            assert process.wait(timeout=120) == EXIT_STALLED
        finally:
            process.kill()
        output.seek(0)
        assert "watchdog, rank 0: rank 1 (pid" in output.read()
    assert json.loads((run_dir / "status.json").read_text())["state"] == "failed"
    assert "watchdog.py" in (run_dir / "watch/stacks/rank_0.txt").read_text()
