"""Math rewards on a core: accuracy and speed, side by side with plain math-verify in the same run; and code runs.

    python tools/bench_rewards.py [PAIRS.jsonl] [--limit N] [--without-math-verify] [--without-code]

PAIRS: {"gold", "prediction", "label"} lines. Prints tables in Markdown. Speeds are pairs a second of wall clock on
one core, worker processes included; run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from r1mega.config.rewards import RewardConfig
from r1mega.reward import math as rewards
from r1mega.reward.code import CodeReward
from r1mega.reward.code_problem import Problem, StreamCase, problem_from
from r1mega.reward.compose import RewardScorer
from r1mega.reward.parts import Deferred
from r1mega.reward.pool import WorkerPool
from r1mega.sandbox import LocalBackend
from r1mega.types import Prompt, Response

DEFAULT_PAIRS = Path(__file__).parents[1] / "tests" / "data" / "answer_pairs.jsonl"
PERCENTILES = (50, 99, 99.9)


def grade_with_r1mega(pairs: list[dict]) -> tuple[list[bool], list[float]]:
    """Verdicts and seconds of each pair, one after the other as a command-line run would see them."""
    verdicts, seconds = [], []
    with WorkerPool(num_workers=1) as pool:
        for pair in pairs:
            start = time.perf_counter()
            score = rewards.verify(
                (pair["gold"],), rewards.answer_of(pair["prediction"], bare=True), rewards.MAX_SECONDS
            )
            if isinstance(score, Deferred):
                score = score.finish(pool.submit(score.task).result())
            seconds.append(time.perf_counter() - start)
            verdicts.append(bool(score.value))
    return verdicts, seconds


def grade_with_math_verify(pairs: list[dict]) -> tuple[list[bool], list[float]]:
    """math-verify as its documentation uses it, both sides in a box."""
    from math_verify import parse, verify

    verdicts, seconds = [], []
    for pair in pairs:
        start = time.perf_counter()
        gold, answer = (
            parse(text if "boxed" in text else f"\\boxed{{{text}}}") for text in (pair["gold"], pair["prediction"])
        )
        verdicts.append(bool(verify(gold, answer)))
        seconds.append(time.perf_counter() - start)
    return verdicts, seconds


def num_without_algebra(pairs: list[dict]) -> int:
    """Pairs that r1mega's reader decides alone; the rest it asks of math-verify in a worker process."""
    answers = ((pair["gold"], rewards.answer_of(pair["prediction"], bare=True)) for pair in pairs)
    return sum(answer is None or rewards.decide((gold,), answer).equal is not None for gold, answer in answers)


def row(name: str, pairs: list[dict], grade: Callable[[list[dict]], tuple[list[bool], list[float]]]) -> str:
    verdicts, seconds = grade(pairs)
    missed = sum(pair["label"] and not verdict for pair, verdict in zip(pairs, verdicts, strict=True))
    wrong = sum(verdict and not pair["label"] for pair, verdict in zip(pairs, verdicts, strict=True))
    ordered = sorted(seconds)
    at = [f"{ordered[min(len(ordered) - 1, int(len(ordered) * p / 100))] * 1e3:.2f}" for p in PERCENTILES]
    speed = f"{len(pairs) / sum(seconds):,.0f}"
    return f"| {name} | {wrong} | {missed} | {speed} | {' | '.join(at)} | {ordered[-1] * 1e3:.0f} |"


def step_milliseconds(num_responses: int = 256, repeats: int = 20) -> float:
    """Median time to score the responses of one step on the fast path, format included."""
    rng = random.Random(0)
    prompt, response = Prompt("p", "?", ("17",), "math", "en", ()), Response((1,) * 32, (0.0,) * 32, "stop")
    texts = [
        f"<think>so it is {rng.randrange(99)}</think><answer>{rng.randrange(99)}</answer>" for _ in range(num_responses)
    ]
    with RewardScorer(RewardConfig(), max_response_tokens=64) as scorer:
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            for ticket in [scorer.submit(prompt, response, text) for text in texts]:
                scorer.result(ticket)
            times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def code_rows(repeats: int = 8) -> list[str]:
    """Sandboxed runs a second of wall clock and of CPU, one at a time: programs on standard input, HumanEval's assert
    blocks, whose answer and grader have a sandbox each. Every one must pass.
    """
    reward = CodeReward(LocalBackend(probe=False))
    doubling = Problem(stream_cases=tuple(StreamCase(f"{n}\n", f"{2 * n}\n") for n in range(4)))
    program = "```python\nprint(2 * int(input()))\n```"
    samples = [json.loads(line) for line in (DEFAULT_PAIRS.parent / "humaneval_sample.jsonl").read_text().splitlines()]
    sessions = [
        (f"```python\n{s['prompt']}{s['canonical_solution']}\n```", problem_from(s, s["task_id"])) for s in samples
    ]
    rows = []
    for name, items, runs in (("program on stdin", [(program, doubling)], 4), ("assert block", sessions, 1)):
        wall, cpu = time.perf_counter(), os.times()
        for _ in range(repeats):
            for text, problem in items:
                scored = reward.score(text, problem)
                assert scored.value == 1.0, scored
        wall, after = time.perf_counter() - wall, os.times()
        spent = sum(after[:4]) - sum(cpu[:4])  # of this process and of the children that it has waited for
        count = repeats * len(items) * runs
        rows.append(f"| {name} | {count} | {count / wall:.1f} | {count / spent:.1f} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="?", type=Path, default=DEFAULT_PAIRS)
    parser.add_argument("--limit", type=int, help="a random sample of so many pairs")
    parser.add_argument("--without-math-verify", action="store_true")
    parser.add_argument("--without-code", action="store_true")
    options = parser.parse_args()
    pairs = [json.loads(line) for line in options.pairs.read_text(encoding="utf-8").splitlines()]
    if options.limit:
        pairs = random.Random(0).sample(pairs, min(options.limit, len(pairs)))
    positives = sum(pair["label"] for pair in pairs)
    print(f"{len(pairs)} pairs of {options.pairs.name}: {positives} right, {len(pairs) - positives} wrong\n")
    print("| grader | wrong accepted | right refused | pairs/s | p50 ms | p99 ms | p99.9 ms | max ms |")
    print("|---|---|---|---|---|---|---|---|")
    print(row("r1mega", pairs, grade_with_r1mega))
    if not options.without_math_verify:
        print(row("math-verify", pairs, grade_with_math_verify))
    print(f"\nr1mega's reader decides {num_without_algebra(pairs)} of {len(pairs)} alone")
    print(f"256 responses of a training step on the fast path: {step_milliseconds():.1f} ms")
    if options.without_code:
        return
    sys.stdout.flush()
    print("\n| code, one at a time | runs | runs/s | runs per CPU second |\n|---|---|---|---|")
    print("\n".join(code_rows()))


if __name__ == "__main__":
    main()
