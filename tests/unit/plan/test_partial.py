"""Partial rollouts as the planner plays them, against a token by token simulation that is written down here."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from r1mega.config.load import load_config
from r1mega.config.schema import PartialRollouts
from r1mega.plan import partial as played
from r1mega.plan.decoding import partial_seconds, rollout_seconds
from r1mega.plan.generator import generator_memory
from r1mega.plan.gpu import gpu_kind
from r1mega.plan.partial import played_steps
from r1mega.plan.samples import MADE_BYTES, planned_samples
from r1mega.plan.workload import Lengths, workload

CONFIGS = Path(__file__).parents[3] / "configs"


def by_hand(partial: PartialRollouts, lengths: list[int], prompts: int, steps: int) -> list[tuple[int, int, int]]:
    """(tokens sampled, tokens carried in, tokens left) of each step of groups of one response, a token at a time; what must be
    trained on in a step is waited for."""
    drawn, waiting, found = iter(lengths), [], []
    for step in range(steps):
        while len(waiting) < partial.overdraw * prompts:
            waiting.append({"length": next(drawn), "done": 0, "born": step})
        carried, sampled, token = sum(g["done"] for g in waiting if g["done"] < g["length"]), 0, 0
        while True:
            whole = [g for g in waiting if g["done"] == g["length"]]
            late = [g for g in waiting if g["born"] + partial.max_staleness == step and g not in whole]
            if token % partial.every_tokens == 0 and len(whole) >= prompts and not late:
                break
            for group in waiting:
                if group["done"] < group["length"]:
                    group["done"] += 1
                    sampled += 1
            token += 1
        for group in whole[:prompts]:
            waiting.remove(group)
        found.append((sampled, carried, sum(group["done"] for group in waiting)))
    return found


@pytest.mark.parametrize(("overdraw", "staleness", "every"), [(2, 4, 8), (1.5, 1, 4), (3, 2, 1)])
def test_steps_are_those_of_a_run(monkeypatch, overdraw, staleness, every):
    monkeypatch.setattr(played, "BIN", 1)  # every token is looked at
    partial = PartialRollouts(overdraw=overdraw, max_staleness=staleness, every_tokens=every)
    responses = tuple(int(n) for n in np.random.default_rng(1).lognormal(3, 1, 50) + 1)
    steps = played_steps(partial, responses, 8, 1, 3)
    numbers = np.random.default_rng(3)  # the same draws: a step asks for as many as it lacks
    needed = [math.ceil(8 * overdraw), *[8] * 2 * len(steps)]
    drawn = [int(n) for size in needed for n in numbers.choice(np.array(responses), (size, 1)).flatten()]
    expected = by_hand(partial, drawn, 8, 2 * len(steps))
    found = [(sum(n for n, _ in step.running), step.carried, step.left) for step in steps]
    assert found == expected[len(steps) :]


def test_what_a_step_leaves_takes_no_time_and_some_memory():
    """Of a few long responses: without them a step is shorter, with them unfinished a rank has more."""
    path = CONFIGS / "moonlight_16b/zero.yaml"
    hf = json.loads((path.parent / "model/config.json").read_text())
    gpu, found = gpu_kind("h100-80"), {}
    for overdraw in (1, 2):
        config = load_config(path, [f"rollout.partial.overdraw={overdraw}", "algorithm.old_log_probs=rollout"])
        work = workload(config, Lengths(1300, 1.5), 8)
        memory = generator_memory(hf, torch.bfloat16, config.rollout, gpu.memory_bytes)
        roomy = dataclasses.replace(memory, kv_cache=1e12)  # all run at once
        rollout = config.rollout.model_copy(update={"max_num_seqs": 4096})
        of = partial_seconds if overdraw > 1 else rollout_seconds
        found[overdraw] = of(rollout, torch.bfloat16, hf, 8, gpu, work, roomy), planned_samples(config, hf, 8, work)
    assert found[2][0] < 0.8 * found[1][0]
    left = max(
        step.left
        for step in played_steps(
            config.rollout.partial, tuple(work.responses), config.rollout.num_prompts, config.rollout.group_size, 0
        )
    )
    assert left > 0.1 * sum(work.responses)
    assert found[2][1].made == pytest.approx(found[1][1].made + MADE_BYTES * left / (8 / config.rollout.tp))
