"""`sbatch launch/stage2.sh` on two machines: the metrics of two local ranks, whatever happens on the way; failures named.

The learning rate is small: what is compared are runs, not what they learn.
"""

import contextlib
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.runs import base_arguments, metrics, r1mega, without_times
from tests.processes import REPOSITORY

pytestmark = [pytest.mark.slow, pytest.mark.slurm]
CONFIG = "configs/nano/reasoning_rl.yaml"
PHASES = ("rollout", "reward", "logprob", "update", "reshard", "evaluate", "save")
FAULTS = os.environ.get("R1MEGA_SLURM_FAULTS")
"""`drawn`: a kill and a stop, each in a phase by chance; `all`: both in every phase, and a full disk."""
if FAULTS not in (None, "drawn", "all"):
    raise pytest.UsageError(f"R1MEGA_SLURM_FAULTS={FAULTS}: there are `drawn` and `all`; unset it for neither")
ALL_FAULTS = FAULTS == "all"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("base") / "run"
    r1mega(*base_arguments(run_dir))
    return run_dir


@pytest.fixture(scope="module")
def overrides(base):
    """Of a small stage 2 on that base; run_dir is to be added."""
    return [
        f"model.path={base}/hf", f"data.prompts=[{base}/data/train.jsonl]", "evaluate.data=null", "threads=1", "steps=8",
        "rollout.num_prompts=4", "rollout.group_size=4", "rollout.max_response_tokens=24", "checkpoint.every_steps=1",
        "observe.tensorboard=false",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def local(overrides, tmp_path_factory):
    """The metrics of two local ranks."""
    run_dir = tmp_path_factory.mktemp("local") / "run"
    r1mega("train", CONFIG, f"run_dir={run_dir}", *overrides, num_ranks=2)
    return metrics(run_dir)


@pytest.fixture
def submit(cluster, overrides, tmp_path):
    """Starts stage 2 on two machines with one rank each; the job's number."""

    def start(*more, nodes=2, **variables):
        return cluster.run(
            "sbatch", "--parsable", f"--nodes={nodes}", "--no-kill", "--ntasks-per-node=1", "--gpus-per-node=1", f"--output={tmp_path}/job.out",
            "launch/stage2.sh", CONFIG, f"run_dir={tmp_path}/run", *overrides, *more,
            **{"R1MEGA_PYTHON": sys.executable} | variables, R1MEGA_HOME=str(REPOSITORY), R1MEGA_LOGS=str(tmp_path / "logs"),
            R1MEGA_INTERFACE="lo", PYTHONPATH=f"{REPOSITORY}:{REPOSITORY}/kernels", PYTHONWARNINGS="ignore",
        )  # fmt: skip

    return start


def wait_for_step(run_dir, step, seconds=900):
    limit = time.monotonic() + seconds
    while not any(line["step"] >= step for line in metrics(run_dir)):
        assert time.monotonic() < limit, f"{run_dir} has no step {step} after {seconds} s"
        time.sleep(0.05)


def wait_until(condition, tmp_path, seconds=900):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, f"not within {seconds} s\n{text_of(tmp_path)}"
        time.sleep(0.1)


def text_of(tmp_path):
    """The job's log and those of the ranks, for the message of a failed assertion."""
    logs = [tmp_path / "job.out", *sorted(tmp_path.glob("logs/*/rank-*.log"))]
    return "\n".join(f"--- {log}\n{log.read_text()[-3000:]}" for log in logs if log.exists())


def process_of_rank(job, rank):
    """pid of the stage on that rank of the job."""
    wanted = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={rank}".encode()}
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            if wanted <= {*(directory / "environ").read_bytes().split(b"\0")}:
                command = (directory / "cmdline").read_bytes().split(b"\0")
                if b"train" in command and Path(os.fsdecode(command[0])).name.startswith("python"):
                    return int(directory.name)
        except OSError:  # ended meanwhile
            continue
    raise AssertionError(f"job {job} has no process of rank {rank}")


def test_two_machines_give_the_metrics_of_two_local_ranks(cluster, submit, local, tmp_path):
    """And a second job in the same run directory, on another machine, is refused while they run."""
    number = submit("watchdog.silent_seconds=600")
    wait_for_step(tmp_path / "run", 1)
    first = process_of_rank(number, 0)
    os.kill(first, signal.SIGSTOP)  # else it may be done before the other one asks
    try:
        other = cluster.wait(submit(nodes=1), 300)
    finally:
        os.kill(first, signal.SIGCONT)
    job = cluster.wait(number)
    assert (other["JobState"], other["ExitCode"]) == ("FAILED", "2:0"), text_of(tmp_path)
    assert "in use by another run" in text_of(tmp_path)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "0"), text_of(tmp_path)
    assert without_times(metrics(tmp_path / "run")) == without_times(local) and len(local) == 8
    assert {log.name for log in tmp_path.glob(f"logs/*-{number}/rank-*.log")} == {"rank-0.log", "rank-1.log"}
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["world_size"] == 2


def test_asked_to_stop_and_requeued_it_resumes_with_nothing_lost(cluster, submit, local, tmp_path):
    """First the signal that --signal=B:USR1 sends: save, exit 85, back to the queue. Then a requeue without a warning."""
    number = submit()
    wait_for_step(tmp_path / "run", 1)
    cluster.run("scancel", "--signal=USR1", "--batch", number)
    wait_for_step(tmp_path / "run", 3)
    between = cluster.job(number)
    cluster.run("scontrol", "requeue", number)
    job = cluster.wait(number)
    assert between["Restarts"] == "1", text_of(tmp_path)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "2"), text_of(tmp_path)
    assert without_times(metrics(tmp_path / "run")) == without_times(local)
    assert "state saved, back to the queue" in (tmp_path / "job.out").read_text()
    starts = json.loads((tmp_path / "run" / "environment.json").read_text())["starts"]
    assert len(starts) == 3 and starts[0]["step"] == 0 and starts[1]["step"] >= 1 and starts[2]["step"] >= 2


def test_a_killed_rank_is_named_and_its_machine_left_for_a_spare_one(cluster, submit, local, tmp_path):
    """Within the same job, from the newest checkpoint, nothing lost."""
    number = submit("restart.backoff_seconds=0", nodes=3, R1MEGA_SPARE_NODES="1")
    wait_for_step(tmp_path / "run", 2)
    os.kill(process_of_rank(number, 1), signal.SIGKILL)
    job = cluster.wait(number)
    log = text_of(tmp_path)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "0"), log
    assert "launch: rank 1 failed first (Killed)" in log
    first, second = re.findall(rf"job {number} on (\S+), start", log)
    assert len({*first.split(",")} | {*second.split(",")}) == 3 and f"without {first.split(',')[1]}" in log
    assert without_times(metrics(tmp_path / "run")) == without_times(local)
    (line,) = map(json.loads, (tmp_path / "run/restarts.jsonl").read_text().splitlines())
    assert line["code"] == 137


@pytest.fixture
def inflict(submit, tmp_path):
    """Starts a job to whose ranks those faults happen (tests/slurm/hurt.py), on a machine more than they need; its number."""

    def start(faults, *more):
        file, python = tmp_path / "faults", tmp_path / "python"
        file.write_text("".join(f"{' '.join(map(str, fault))}\n" for fault in faults))
        hurt = f"-m tests.slurm.hurt {file}"
        python.write_text(f'#!/bin/bash\n[ "$2" = r1mega ] && set -- {hurt} "${{@:3}}"\nexec {sys.executable} "$@"\n')
        python.chmod(0o755)
        return submit(
            "restart.backoff_seconds=0", "restart.per_hour=100", "watchdog.silent_seconds=15", *more, nodes=3,
            R1MEGA_SPARE_NODES="1", R1MEGA_PYTHON=str(python),
        )  # fmt: skip

    return start


@contextlib.contextmanager
def disk(directory):
    """A small one in that place, so that it can be full."""
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256m", "none", directory]
    if (done := subprocess.run(mount, capture_output=True, text=True)).returncode != 0:
        pytest.skip(f"no disk can be mounted here: {done.stderr}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", directory], check=True)


def what_happens():
    """(kind, phase, rank) of each fault, one after the other."""
    kills, stops = ([(kind, phase, random.randrange(2)) for phase in PHASES] for kind in ("KILL", "STOP"))
    if ALL_FAULTS:
        return [*itertools.chain.from_iterable(zip(kills, stops, strict=True)), ("FULL", "save", 1)]
    return [random.choice(kills), random.choice(stops)]


def end_of(cluster, number, fault, num_kills, tmp_path):
    """Waits for what docs/faults.md says comes after that fault; (what it is seen by, how the run goes on)."""
    kind, _, rank = fault
    if kind == "KILL":
        said = f"launch: rank {rank} failed first (Killed)"
        found = lambda: re.findall(r"launch: rank .* \(Killed\)", (tmp_path / "job.out").read_text())  # noqa: E731
        wait_until(lambda: len(found()) == num_kills, tmp_path)
        assert found()[-1] == said, text_of(tmp_path)
        return said, "the job, by itself"
    job, log = cluster.wait(number), text_of(tmp_path)
    codes = {"STOP": ("12:0",), "FULL": ("4:0", "11:0")}[kind]
    assert job["JobState"] == "FAILED" and job["ExitCode"] in codes and job["Restarts"] == "0", log
    if kind == "FULL":
        (tmp_path / "run/filler").unlink()
    silent = rf"rank {rank} \(pid \d+ on \S+\) has given no sign for \d+ s \(stopped[^)]*\)"
    assert (found := re.findall(silent if kind == "STOP" else ".*No space left.*", log)), log
    return found[-1], f"a person, after exit code {job['ExitCode'][:-2]}"


@pytest.mark.skipif(FAULTS is None, reason="R1MEGA_SLURM_FAULTS=all or drawn asks for it: minutes for each fault")
@pytest.mark.timeout(7200)
def test_ranks_die_and_stop_in_any_phase_and_nothing_is_lost(cluster, inflict, overrides, base, tmp_path):
    """A dead one has all start again within the job, once without its machine. After a stop (exit code 12) and on a full disk (4)
    somebody submits the job again. -s prints what each fault was seen by.
    """
    faults = what_happens()
    more = [f"steps={2 + 3 * len(faults)}", f"evaluate.data={base}/data/eval.jsonl", "evaluate.num_prompts=2",
            "evaluate.every_steps=1"]  # fmt: skip
    r1mega("train", CONFIG, f"run_dir={tmp_path}/control", *overrides, *more, num_ranks=2)
    with disk(tmp_path / "run") if ALL_FAULTS else contextlib.nullcontext():
        number = inflict(faults, *more)
        for at, fault in enumerate(faults):
            record = tmp_path / f"faults.{at}"
            while not record.exists():
                assert cluster.job(number)["JobState"] in ("PENDING", "RUNNING"), text_of(tmp_path)
                time.sleep(0.3)
            num_kills = [kind for kind, _, _ in faults[: at + 1]].count("KILL")
            seen, by = end_of(cluster, number, fault, num_kills, tmp_path)
            step, began = record.read_text().split()
            print("|", *fault, step, seen, f"{time.time() - float(began):.0f}", by, "|", sep=" | ", flush=True)
            if fault[0] != "KILL":
                number = inflict(faults, *more)
        job = cluster.wait(number)
        ours, restarts = metrics(tmp_path / "run"), (tmp_path / "run/restarts.jsonl").read_text().splitlines()
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "0"), text_of(tmp_path)
    assert without_times(ours) == without_times(metrics(tmp_path / "control"))
    assert [json.loads(line)["code"] for line in restarts] == [137] * num_kills
    log = (tmp_path / "job.out").read_text()
    first, second = re.findall(r"job \d+ on (\S+), start", log)[:2]
    (left,) = {*first.split(",")} - {*second.split(",")}
    assert f"without {left}" in log and first.split(",")[faults[0][2]] == left


def test_the_exit_code_is_that_of_the_rank_that_failed(cluster, submit, tmp_path):
    """A config that cannot work: 2, on whichever rank notices first, not the sum of what the others make of it."""
    job = cluster.wait(submit("rollout.group_size=1"))
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "2:0"), text_of(tmp_path)
    limit = time.monotonic() + 30  # Slurm calls a job over before the last of its output is in its files
    while "rollout.group_size = 1" not in text_of(tmp_path):
        assert time.monotonic() < limit, text_of(tmp_path)
        time.sleep(0.1)
