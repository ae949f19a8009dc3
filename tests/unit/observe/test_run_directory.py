"""The run directory: one owner, config that cannot change under a run, environment, status."""

import os
import platform
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import yaml

from r1mega.config.load import load_config
from r1mega.errors import ConfigError, DataError
from r1mega.observe.environment import git_commit
from r1mega.observe.run import RunDirectory

ROOT = Path(__file__).parents[3]

HOLD = """
import os, sys, time
from r1mega.observe.run import RunDirectory
with RunDirectory(sys.argv[1]).lock():
    child = os.fork()  # a worker that outlives the run must not keep the lock
    if child == 0:
        time.sleep(60)
        os._exit(0)
    print(child, flush=True)
    time.sleep(60)
"""


def test_second_process_is_refused_and_a_dead_one_replaced(tmp_path):
    run = RunDirectory(tmp_path / "run")
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(run.path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    worker = int(holder.stdout.readline())
    try:
        with pytest.raises(ConfigError, match=f"in use by another run .*pid {holder.pid}"), run.lock():
            pytest.fail("two owners")
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        with run.lock():
            assert f"pid {os.getpid()}" in run.lock_file.read_text()
    finally:
        holder.kill()
        os.kill(worker, signal.SIGKILL)
        holder.stdout.close()


def test_lock_excludes_within_the_process_and_is_freed(tmp_path):
    run = RunDirectory(tmp_path)
    with run.lock(), pytest.raises(ConfigError, match="another run of this process"), RunDirectory(tmp_path).lock():
        pytest.fail("two owners")
    with pytest.raises(KeyError), run.lock():
        raise KeyError
    with run.lock():
        pass


def test_run_dir_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be made"), RunDirectory(tmp_path / "file" / "run").lock():
        pass


def test_a_run_whose_disk_became_read_only_can_go_on_where_it_is(tmp_path, monkeypatch):
    """And is not told to begin anew elsewhere alone."""
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ConfigError, match="may not be written; mend its permissions, or mount"):
        RunDirectory(tmp_path).check_place()
    with pytest.raises(ConfigError, match="cannot be made"):
        RunDirectory(tmp_path / "new").check_place()


def test_config_round_trip_and_change(tmp_path):
    run = RunDirectory(tmp_path)
    config = {"stage": "zero", "steps": 10, "rollout": {"group_size": 4, "stop": ["</answer>"]}, "observe": {"a": 1}}
    run.write_config(config)
    assert run.read_config() == config
    run.write_config({**config, "steps": 20, "observe": {"a": 2}})
    assert run.read_config()["steps"] == 20
    run.metrics.write_text('{"step": 1}\n')
    before = run.config.read_bytes()
    with pytest.raises(ConfigError, match=r"rollout\.group_size: 4 -> 8") as error:
        run.write_config({**config, "steps": 30, "rollout": {"group_size": 8, "stop": ["</answer>"]}})
    assert "steps" not in str(error.value) and run.config.read_bytes() == before


def test_a_run_that_made_nothing_may_start_with_a_mended_config(tmp_path):
    """What a first start leaves that ended before its first step: small files, empty ones, TensorBoard's header."""
    run = RunDirectory(tmp_path)
    run.write_config({"stage": "zero", "rollout": {"top_p": 1}})
    run.write_environment()
    run.write_status("failed", 0)
    run.metrics.touch()
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard/events").write_text("header")
    mended = {"stage": "zero", "rollout": {"top_p": 2}}
    run.write_config(mended)
    assert run.read_config() == mended
    (tmp_path / "data").mkdir()  # whose first file was not written
    run.write_config({"stage": "zero", "rollout": {"top_p": 1}})
    run.write_config(mended)
    (tmp_path / "data/train.jsonl").write_text("made from the config")
    with pytest.raises(ConfigError, match=r"top_p: 2 -> 3"):
        run.write_config({"stage": "zero", "rollout": {"top_p": 3}})


def test_a_run_may_go_on_past_a_gradient_that_is_not_finite(tmp_path):
    """As the error advises; another rate is another run, as it says too."""
    run = RunDirectory(tmp_path)
    (tmp_path / "nonfinite").mkdir()
    (tmp_path / "nonfinite/update_000001_rank_00000.pt").write_text("evidence")
    run.write_config({"stage": "zero", "optimizer": {"lr": 1e-6, "skip_nonfinite": 0}})
    run.write_config({"stage": "zero", "optimizer": {"lr": 1e-6, "skip_nonfinite": 1}})
    with pytest.raises(ConfigError, match=r"optimizer\.lr"):
        run.write_config({"stage": "zero", "optimizer": {"lr": 1e-7, "skip_nonfinite": 1}})


@pytest.mark.parametrize("key", [
    "timeouts.startup_seconds", "timeouts.collective_seconds", "timeouts.rollout_seconds", "timeouts.checkpoint_seconds",
    "watchdog.seconds", "rollout.max_kept_ids", "steps", "rollout.kv_cache_bytes", "rollout.max_batched_tokens",
    "update.microbatch_tokens",
])  # fmt: skip
def test_what_errors_in_the_middle_of_a_run_advise_to_set_may_be_set(older_run, tmp_path, key):
    """Of r1mega/platform/groups.py, watchdog.py, rollout/kept.py, vllm_arguments.py, stages/runtime.py; and what a run needs that has
    come to the end of a device's memory.
    """
    file = ROOT / "configs/nano/zero.yaml"
    before, after = (
        load_config(file, [f"run_dir={tmp_path}", *more]).model_dump(mode="json") for more in ([], [f"{key}=4321"])
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(before))
    run = RunDirectory(tmp_path)
    assert run.holds_work()
    run.write_config(after)
    assert run.read_config() != before


def test_the_packing_decides_what_the_auxiliary_loss_is(tmp_path):
    run = RunDirectory(tmp_path)
    run.metrics.write_text('{"step": 1}\n')
    for coefficient in (0.0, 1e-4):
        before, after = (
            {
                "stage": "zero",
                "model": {"sequence_aux_loss_coefficient": coefficient},
                "update": {"microbatch_tokens": n},
            }
            for n in (2048, 1024)
        )
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(before))
        with pytest.raises(ConfigError, match=r"microbatch_tokens: 2048 -> 1024") if coefficient else nullcontext():
            run.write_config(after)


def test_what_cannot_be_looked_at_counts_as_work(tmp_path):
    """A file system's `lost+found`, a link that leads nowhere."""
    run = RunDirectory(tmp_path)
    assert not run.holds_work()
    (tmp_path / "gone").symlink_to(tmp_path / "nothing")
    assert run.holds_work()


def test_a_run_may_go_on_in_another_layout(tmp_path):
    run = RunDirectory(tmp_path)
    run.metrics.write_text('{"step": 1}\n')
    run.write_config({"parallel": {"tp": 1, "dp": None}, "rollout": {"tp": 1, "top_p": 1.0}})
    run.write_config({"parallel": {"tp": 2, "dp": 4}, "rollout": {"tp": 2, "ep": 2, "top_p": 1.0}})
    assert run.read_config()["rollout"]["ep"] == 2
    with pytest.raises(ConfigError, match=r"rollout\.top_p: 1\.0 -> 0\.9") as error:
        run.write_config({"parallel": {"tp": 1}, "rollout": {"tp": 4, "top_p": 0.9}})
    assert "tp: " not in str(error.value)


@pytest.fixture
def older_run(tmp_path):
    """A function: today's config of a run with overrides. The run was written by a program without some keys, and has work."""

    def config(*overrides):
        file = ROOT / "configs/nano/cold_start.yaml"
        return load_config(file, [f"run_dir={tmp_path}", *overrides]).model_dump(mode="json")

    stored = config()
    del stored["model"]["fp8"], stored["timeouts"], stored["filters"]["max_tokens"], stored["rollout"]["temperature"]
    del stored["prompting"][0]["separator"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(stored))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    return config


def test_an_older_run_goes_on_where_keys_that_it_lacks_have_their_defaults(older_run, tmp_path):
    RunDirectory(tmp_path).check_config(
        older_run("timeouts.rollout_seconds=7", "rollout.durable=false")
    )  # no bit depends on them
    RunDirectory(tmp_path).write_config(older_run())
    assert RunDirectory(tmp_path).read_config() == older_run()  # today's keys are stored from now on


@pytest.mark.parametrize(
    ("override", "message"),
    [("model.fp8=blockwise", r"model\.fp8: off -> blockwise"), ("filters.max_tokens=9", r"filters\.max_tokens: None -> 9"),
     ("rollout.temperature=0.5", r"rollout\.temperature: 1\.0 -> 0\.5"), ("seed=5", r"seed: 1 -> 5")],
)  # fmt: skip
def test_a_key_that_an_older_run_lacks_is_a_change_where_it_is_set_otherwise(older_run, tmp_path, override, message):
    with pytest.raises(ConfigError, match=rf"another config:\n  {message}\n.*choose another run_dir"):
        RunDirectory(tmp_path).check_config(older_run(override))


def test_a_key_that_is_gone_is_named_with_its_file_and_the_nearest_one(older_run, tmp_path):
    file = tmp_path / "config.yaml"
    stored = yaml.safe_load(file.read_text())
    stored["rollout"] |= {"group_sise": 4, "old_and_unset": None}
    stored["observe"]["gone"] = stored["engines"] = {"a": 1}
    file.write_text(yaml.safe_dump(stored))
    with pytest.raises(ConfigError) as error:
        RunDirectory(tmp_path).check_config(older_run())
    first, second = str(error.value).splitlines()[1:-1]  # what may change (observe) is no concern
    assert (
        f"{file}: unknown key engines" in first and "(it is {'a': 1}; if what it says still holds, take it out" in first
    )
    assert f"{file}: unknown key rollout.group_sise; did you mean rollout.group_size? (it is 4;" in second
    stored.pop("engines")
    stored["rollout"]["group_size"] = stored["rollout"].pop("group_sise")  # as the message says
    file.write_text(yaml.safe_dump(stored))
    RunDirectory(tmp_path).check_config(older_run("rollout.group_size=4"))


def test_reading_what_is_not_a_run(tmp_path):
    run = RunDirectory(tmp_path)
    with pytest.raises(DataError, match="not a run directory"):
        run.read_config()
    run.config.write_text("a: [")
    with pytest.raises(DataError, match="damaged"):
        run.read_config()
    run.status.write_text('{"state": ')
    with pytest.raises(DataError, match="not JSON"):
        run.read_status()


def test_environment_and_its_starts(tmp_path):
    run = RunDirectory(tmp_path)
    run.write_environment(step=0, world_size=2)
    run.write_environment(step=7, world_size=2, ranks_per_machine=1)
    environment = run.read_environment()
    assert environment["python"] == platform.python_version()
    assert environment["packages"]["torch"] == torch.__version__
    assert (environment["world_size"], environment["ranks_per_machine"]) == (2, 1)
    assert [start["step"] for start in environment["starts"]] == [0, 7]


def test_git_commit_of_a_real_repository(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert git_commit(tmp_path) is None
    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-q", "-m", "first")
    assert git_commit(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "file").write_text("2")
    assert git_commit(tmp_path) == git("rev-parse", "HEAD") + "+changes"


@pytest.mark.parametrize("place", ["missing/place", "."])
def test_a_place_that_cannot_be_said_is_told_and_the_run_goes_on(tmp_path, monkeypatch, caplog, place):
    """In a container the directory may not be there."""
    monkeypatch.setenv("R1MEGA_SAY_RUN_DIR", str(tmp_path / place))
    RunDirectory(tmp_path / "run").say_place()
    assert "the job will not start its ranks again by itself" in caplog.text
    monkeypatch.setenv("R1MEGA_SAY_RUN_DIR", str(tmp_path / "place"))
    RunDirectory(tmp_path / "run").say_place()
    assert (tmp_path / "place").read_text() == f"{tmp_path}/run\n"


def test_status(tmp_path):
    run = RunDirectory(tmp_path)
    run.write_status("finished", 12, {"reward/accuracy": 0.5})
    status = run.read_status()
    assert (status["state"], status["step"], status["metrics"]) == ("finished", 12, {"reward/accuracy": 0.5})
