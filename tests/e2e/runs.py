"""Running `r1mega` as a user does, and reading what it leaves."""

import json
import signal
import time
from pathlib import Path

import pytest

from tests.processes import REPOSITORY, run, start

RATES = tuple(
    f"perf/{part}_{rate}" for part in ("rollout", "logprob", "update", "step") for rate in ("tokens", "tflops", "mfu")
)
TIMES = (
    "time/",
    "tokens/rollout_per_second",
    "tokens/update_per_second",
    "memory/",
    "reward_pool/",
    "straggler/",
    "partial/surplus_tokens",
    *RATES,
)


def r1mega(*arguments, check=True, **options):
    """Run to the end; the completed process, its output in the failure message when check fails. Options: see `run`."""
    done = run(*arguments, **options)
    if check and done.returncode != 0:
        pytest.fail(f"r1mega {' '.join(map(str, arguments))} ended with {done.returncode}:\n{done.stdout[-6000:]}")
    return done


def run_until_step(step, run_dir, sent, *arguments, timeout=900, real=False):
    """Start, send a signal once metrics.jsonl holds `step`, wait; the exit code."""
    with open(run_dir.with_suffix(".log"), "w") as log:
        process = start(*arguments, output=log, real=real)
    limit = time.monotonic() + timeout
    while time.monotonic() < limit and process.poll() is None:
        if any(line["step"] >= step for line in metrics(run_dir)):
            process.send_signal(sent)
            break
        time.sleep(0.02)
    code = process.wait(timeout)
    assert code in (-signal.SIGKILL, 85), f"{code}\n{run_dir.with_suffix('.log').read_text()[-6000:]}"
    return code


def kill_when(condition, *arguments, log, timeout=900):
    """Start, and kill -9 the moment `condition()` holds."""
    with open(log, "w") as out:
        process = start(*arguments, output=out)
        limit = time.monotonic() + timeout
        while time.monotonic() < limit and process.poll() is None and not condition():
            time.sleep(0.002)
        process.kill()
        process.wait(timeout)
    assert process.returncode == -signal.SIGKILL, Path(log).read_text()[-6000:]


def metrics(run_dir):
    """Whole lines of metrics.jsonl, as dicts."""
    path = Path(run_dir) / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def without_times(lines):
    return [{k: v for k, v in line.items() if not k.startswith(TIMES)} for line in lines]


def zero_arguments(base, run_dir, *overrides):
    """`r1mega train` arguments of a small zero run on that base."""
    return (
        "train", "configs/nano/zero.yaml", f"run_dir={run_dir}", f"model.path={base}/hf",
        f"data.prompts=[{base}/data/train.jsonl]", f"evaluate.data={base}/data/eval.jsonl", "threads=1", "steps=4",
        "rollout.num_prompts=4", "rollout.group_size=4", "rollout.max_response_tokens=24", "evaluate.num_prompts=4",
        "checkpoint.every_steps=2", "observe.tensorboard=false", "algorithm.reference_refresh_steps=3", *overrides,
    )  # fmt: skip


def base_arguments(run_dir, *overrides):
    """`r1mega train` arguments of a small base run."""
    return (
        "train", "configs/nano/base.yaml", f"run_dir={run_dir}", "steps=60", "threads=1", "optimizer.decay_steps=20",
        "task.num_train_prompts=64", "task.num_eval_prompts=16", *overrides,
    )  # fmt: skip


SMALL = [
    "overrides.threads=1", "base.steps=60", "base.optimizer.decay_steps=20", "base.task.num_train_prompts=64",
    "base.task.num_eval_prompts=16", "zero.steps=3", "zero.rollout.num_prompts=4", "zero.rollout.group_size=4",
    "zero.rollout.max_response_tokens=24", "zero.evaluate.num_prompts=4", "zero.checkpoint.every_steps=2",
    "zero.observe.tensorboard=false",
]  # fmt: skip
PIPELINE = f"""
name: small
dir: runs/nano
nodes:
  base: {{config: {REPOSITORY}/configs/nano/base.yaml}}
  zero: {{config: {REPOSITORY}/configs/nano/zero.yaml}}
"""
"""Base and zero, with those overrides a minute; base as `base_arguments` has it."""


def lineage(directory, node):
    """What is recorded of a node of a pipeline."""
    return json.loads((directory / node / "lineage.json").read_text())
