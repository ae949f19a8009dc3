"""The update phase with the kernels against without them, in one run: the same samples through `update_policy`.

    python tools/bench_update.py configs/nano/zero.yaml [key=value ...] [--vocabulary 129280] [--rounds 5]

A policy for each value of model.log_probs (`logits`, `hidden`: the kernels; `reference`: plain torch) is made with the
same random weights; they take turns on the same random samples of the config's sizes (prompts x group, full length).
Prints, for each, the seconds of the log-prob and the update phase (median), their ratio to `reference` (median of the
pairs), and the largest difference of loss, KL and gradient norm from `reference` over all steps.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

CHOICES = ("reference", "logits", "hidden")
COMPARED = ("policy/loss", "policy/kl", "policy/entropy", "policy/grad_norm")


def random_samples(config: Any, vocabulary: int, seed: int) -> list[Any]:
    """As many samples as the config's step has, of its longest prompt and response; sampled by nobody."""
    from r1mega.types import TrainingSample

    generator = np.random.default_rng(seed)
    prompt, response = config.data.max_prompt_tokens, config.rollout.max_response_tokens
    return [
        TrainingSample(
            token_ids=generator.integers(0, vocabulary, prompt + response).astype(np.int32),
            prompt_length=prompt,
            advantage=float(generator.normal()),
            sampler_log_probs=np.full(response, -np.log(vocabulary), dtype=np.float32),
        )
        for _ in range(config.rollout.num_prompts * config.rollout.group_size)
    ]


def measure(config: Any, hf: dict[str, Any], rounds: int) -> dict[str, list[dict[str, float]]]:
    """{choice of model.log_probs: metrics and phase times of each step after the warm-up}."""
    from r1mega.observe.trace import PhaseTimer
    from r1mega.train.grpo_update import update_policy
    from r1mega.train.policy import Policy
    from r1mega.train.trainer import Trainer

    trainers = {}
    for choice in CHOICES:
        model = config.model.model_copy(update={"log_probs": choice})
        policy = Policy(model, hf, config.parallel, seed=config.seed, init_std=0.05)
        if config.algorithm.kl_coefficient > 0:
            policy.take_reference()
        trainers[choice] = Trainer(policy, config.optimizer, total_steps=10**6)
    figures: dict[str, list[dict[str, float]]] = {choice: [] for choice in CHOICES}
    for step in range(1, rounds + 2):
        samples = random_samples(config, hf["vocab_size"], step)
        for choice, trainer in trainers.items():
            timer = PhaseTimer()
            timer.start_step()
            metrics = update_policy(trainer, samples, config, step, timer)
            if step > 1:  # the first warms up
                known = {name: value for name, value in metrics.items() if value is not None}
                figures[choice].append(known | timer.finish_step())
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument("--vocabulary", type=int, help="instead of the model's")
    parser.add_argument("--rounds", type=int, default=5, help="measured steps (after one of warm-up)")
    arguments = parser.parse_intermixed_args()

    from r1mega import platform
    from r1mega.checkpoint.hf import read_config
    from r1mega.config.load import load_config
    from r1mega.platform.validate import validate_platform

    platform.prepare()
    from r1mega.stages.runtime import Runtime

    with tempfile.TemporaryDirectory() as scratch:
        config = load_config(arguments.config, [*arguments.overrides, f"run_dir={scratch}/run"])
        validate_platform(config)
        hf = read_config(config.model.path)
        hf = {**hf, "vocab_size": arguments.vocabulary or hf["vocab_size"]}
        with Runtime.open(config):
            figures = measure(config, hf, arguments.rounds)
    plain = figures["reference"]
    for choice, rows in figures.items():
        seconds = {name: [row[f"time/{name}_seconds"] for row in rows] for name in ("logprob", "update")}
        ratios = [
            sum(row[f"time/{name}_seconds"] for name in seconds) / sum(base[f"time/{name}_seconds"] for name in seconds)
            for row, base in zip(rows, plain, strict=True)
        ]
        apart = max(abs(row[key] - base[key]) for row, base in zip(rows, plain, strict=True) for key in COMPARED)
        print(
            f"{choice:10s} log-prob {statistics.median(seconds['logprob']):7.3f} s   "
            f"update {statistics.median(seconds['update']):7.3f} s   both / reference {statistics.median(ratios):.3f}   "
            f"largest difference {apart:.1e}"
        )


if __name__ == "__main__":
    main()
