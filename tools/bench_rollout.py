"""How long a rollout waits for its longest responses, without and with partial rollouts; for its slowest generator, without and
with work sharing.

    python tools/bench_rollout.py configs/nano/zero.yaml [key=value ...] [--ranks N] [--mean L --cv c | --lengths FILE] [--of work_sharing]

Each turn runs the steps of `tools/bench_throughput.py --synthetic` (random weights, responses of long-tailed drawn lengths,
sampled by the config's generator) once without and once with what is compared, so that a machine that becomes slower does so
for both. Idle: seats of a rollout in which nothing is sampled. A rollout has as many seats as responses that it is at at once, each
for as many tokens as its longest response gets in the step. Waiting: of the time that the slowest rank takes to sample, what the
median one waits for it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from r1mega.config.load import load_config
from r1mega.config.stages.rl import RLStage
from r1mega.errors import ConfigError
from r1mega.observe.metrics import read_metrics

SETTLING_STEPS = 4
"""At the start nothing is carried over yet: these are not measured."""


def measure(arguments: argparse.Namespace, overrides: Sequence[str]) -> list[dict[str, float]]:
    """The measured steps' metrics of one run."""
    with tempfile.TemporaryDirectory() as directory:
        tool = Path(__file__).with_name("bench_throughput.py")
        command = [sys.executable, tool, arguments.config, *arguments.overrides, *overrides, "--synthetic"]
        command += ["--ranks", arguments.ranks, "--steps", arguments.steps + SETTLING_STEPS - 1]
        command += ["--prompt-tokens", arguments.prompt_tokens, "--dir", Path(directory) / "bench"]
        command += ["--lengths", arguments.lengths] if arguments.lengths else ["--mean", arguments.mean]
        command += [] if arguments.lengths else ["--cv", arguments.cv]
        done = subprocess.run(
            [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stdout[-3000:]}")
        return read_metrics(Path(directory) / "bench/run")[SETTLING_STEPS:]


def summarize(lines: Sequence[Mapping[str, float]], responses: float) -> dict[str, float]:
    """Over all steps. responses: that a rollout is at at once, over all generators."""
    tokens, waits = (
        sum(line["tokens/rollout"] for line in lines),
        [line.get("time/rollout_wait_seconds", 0.0) for line in lines],
    )
    worst = [line.get("straggler/rollout_worst_seconds", line["time/rollout_seconds"]) for line in lines]
    median = [line.get("straggler/rollout_median_seconds", line["time/rollout_seconds"]) for line in lines]
    longest = sum(line.get("partial/cut_tokens", line["response/length_max"]) for line in lines)
    return {
        "tokens_per_second": tokens
        / sum(
            max(line["time/rollout_seconds"] + wait, slowest)
            for line, wait, slowest in zip(lines, waits, worst, strict=True)
        ),
        "step_tokens_per_second": tokens / sum(line["time/step_seconds"] for line in lines),
        "waiting_share": 1 - sum(median) / sum(worst),
        "idle_share": 1 - tokens / (longest * responses),
        "length_mean": statistics.mean(line["response/length_mean"] for line in lines),
        "staleness_mean": statistics.mean(line.get("staleness/mean", 0.0) for line in lines),
        "stale_fraction": statistics.mean(line.get("staleness/stale_fraction", 0.0) for line in lines),
        "surplus_share": sum(line.get("partial/surplus_tokens", 0.0) for line in lines) / tokens,
    }


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--turns", type=int, default=3, help="runs without and with")
    parser.add_argument("--steps", type=int, default=8, help="measured steps of a run")
    parser.add_argument("--prompt-tokens", type=int, default=8)
    parser.add_argument("--mean", type=float, default=32.0, help="tokens of a response")
    parser.add_argument("--cv", type=float, default=1.5, help="deviation of lengths over their mean")
    parser.add_argument("--lengths", type=Path, help="a file of whole numbers to draw lengths from")
    parser.add_argument("--of", choices=("partial", "work_sharing"), default="partial", help="what is compared")
    parser.add_argument("--overdraw", type=float, default=2.0)
    parser.add_argument("--max-staleness", type=int, default=4)
    parser.add_argument("--every-tokens", type=int, default=8)
    parser.add_argument("--json", type=Path, help="write all figures here")
    arguments = parser.parse_intermixed_args()
    config = load_config(arguments.config, arguments.overrides)
    if not isinstance(config, RLStage):
        raise ConfigError(f"{arguments.config}: stage {config.stage} has no rollouts")
    responses = config.rollout.num_prompts * config.rollout.group_size
    keys = {
        "overdraw": arguments.overdraw,
        "max_staleness": arguments.max_staleness,
        "every_tokens": arguments.every_tokens,
    }
    off, on, seats = (
        [],
        [f"rollout.partial.{key}={value}" for key, value in keys.items()],
        responses * arguments.overdraw,
    )
    if arguments.of == "work_sharing":
        off, on, seats = ["rollout.work_sharing=false"], [], responses
    turns = []
    for _ in range(arguments.turns):
        without = summarize(measure(arguments, off), responses)
        turns.append((without, summarize(measure(arguments, on), seats)))
    print("| of the turns' medians | without | with | ratio |\n|---|---|---|---|")
    for name in turns[0][0]:
        one, two = (statistics.median(turn[i][name] for turn in turns) for i in range(2))
        ratio = statistics.median(with_[name] / without[name] for without, with_ in turns) if one else float("nan")
        print(f"| {name} | {one:,.3f} | {two:,.3f} | {ratio:.2f} |")
    if arguments.json:
        arguments.json.write_text(json.dumps(turns, indent=1) + "\n")


if __name__ == "__main__":
    main()
