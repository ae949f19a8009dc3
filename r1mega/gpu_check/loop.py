"""Steps that run the project's own commands: the tests marked `gpu`, and a few steps of RL on the nano model."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

from r1mega.gpu_check.findings import Context, Findings
from r1mega.gpu_check.runner import ROOT
from r1mega.observe.metrics import WRITTEN_AS_NULL, read_metrics

TOLD = (
    "logprob/diff_max", "logprob/diff_mean", "policy/grad_norm", "tokens/rollout_per_second", "tokens/update_per_second"
)  # fmt: skip
"""Figures of the worst, or largest, step."""


def gpu_tests(context: Context, findings: Findings) -> None:
    """`pytest -m gpu tests/gpu`: every test passes, and some ran."""
    done = _run(["-m", "pytest", "-q", "-m", "gpu", "tests/gpu", "-p", "no:cacheprovider"])
    last = [line for line in done.stdout.splitlines() if line.strip()][-1]
    findings.notes.append(last)
    findings.holds("all tests passed", done.returncode == 0 and "passed" in last and "skipped" not in last, last)


def reinforcement_learning(context: Context, findings: Findings) -> None:
    """A short base stage, then steps of `zero` from it, both by `r1mega train`; finite metrics, digests and probes held."""
    base, run, cuda = context.work / "base", context.work / "zero", context.device == "cuda"
    dtype = "bfloat16" if cuda else "float32"
    steps = 6 if cuda else 2
    common = (f"model.dtype={dtype}", "observe.tensorboard=false", "threads=1")
    _train(findings, "configs/nano/base.yaml", f"run_dir={base}", "steps=200" if cuda else "steps=60",
           "optimizer.decay_steps=20", "task.num_train_prompts=64", "task.num_eval_prompts=16", *common)  # fmt: skip
    more = ("algorithm.old_log_probs=recompute", "rollout.router_replay=false") if cuda else ()
    printed = _train(findings, "configs/nano/zero.yaml", f"run_dir={run}", f"model.path={base}/hf", f"steps={steps}",
           f"data.prompts=[{base}/data/train.jsonl]", f"evaluate.data={base}/data/eval.jsonl", "rollout.num_prompts=8",
           "rollout.group_size=4", "rollout.max_response_tokens=32", "evaluate.num_prompts=8", "checkpoint.every_steps=3",
           *common, *more)  # fmt: skip
    judge_run(findings, run, printed, steps, 0.05 if cuda else 2e-5)


def judge_run(findings: Findings, run: Path, printed: str, steps: int, limit: float) -> None:
    """What a run left and printed. limit: of the mean difference of trainer and sampler, nats."""
    lines = read_metrics(run)
    numbers = [line["step"] for line in lines]
    findings.holds("a line for every step", numbers == list(range(1, steps + 1)), str(numbers))
    # a value that is not finite stands in the file as one that does not apply
    findings.holds("every metric is finite", WRITTEN_AS_NULL not in printed, WRITTEN_AS_NULL)
    for name in TOLD:
        values = [line[name] for line in lines]
        findings.figure(name, math.nan if None in values else max(values))
        if name == "logprob/diff_mean":
            findings.at_most("mean difference of trainer and sampler", float(findings.figures[name]), limit)


def _train(findings: Findings, config: str, *overrides: str) -> str:
    """What it printed."""
    done = _run(["-m", "r1mega", "train", config, *overrides])
    findings.holds(f"{config} ends with 0", done.returncode == 0, f"exit code {done.returncode}")
    if done.returncode:
        raise RuntimeError(f"{config} ended with {done.returncode}: {done.stdout[-300:]}")
    return done.stdout


def _run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """In the repository; its output is also this step's."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        errors="replace",
    )  # fmt: skip
    print(done.stdout[-8000:], flush=True)
    return done
