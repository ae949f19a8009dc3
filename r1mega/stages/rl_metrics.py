"""What a step's groups say: means over all responses of all ranks; and what the step had to compute."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.distributed as dist

from r1mega.config.stages.rl import RLStage
from r1mega.data.language import mixes_languages
from r1mega.model.flops import ModelFlops, Work, generation_work, sequences_work
from r1mega.reward.compose import Activity
from r1mega.reward.reflection import reflects
from r1mega.rollout.groups import carries_signal
from r1mega.types import RewardStatus, RolloutGroup, SampleSummary


def group_metrics(groups: Sequence[RolloutGroup], *, contributes: bool) -> dict[str, float]:
    """Reward, response and group metrics over all ranks; `contributes` is False on ranks that hold copies."""
    sums: defaultdict[str, float] = defaultdict(float)
    longest = 0
    for group in groups if contributes else ():
        sums["groups"] += 1
        sums["without_signal"] += not carries_signal(group)
        for response, text, reward in zip(group.responses, group.texts, group.rewards, strict=True):
            sums["responses"] += 1
            sums["tokens"] += len(response.token_ids)
            sums["truncated"] += response.finish_reason == "length"
            sums["reflecting"] += reflects(text)
            sums["mixed"] += mixes_languages(text)
            longest = max(longest, len(response.token_ids))
            if reward.status == RewardStatus.OK and reward.value is not None:
                sums["scored"] += 1
                sums["value"] += reward.value
                sums["square"] += reward.value**2
                for part, value in reward.parts.items():
                    sums[f"part:{part}"] += value
                    sums[f"count:{part}"] += 1
    sums, longest = _over_ranks(sums, longest)
    responses, scored = max(sums["responses"], 1), max(sums["scored"], 1)
    mean = sums["value"] / scored
    return {
        "reward/mean": mean,
        "reward/std": max(sums["square"] / scored - mean**2, 0.0) ** 0.5,
        "reward/excluded_fraction": 1.0 - sums["scored"] / responses,
        **{
            f"reward/{name[5:]}": total / sums[f"count:{name[5:]}"]
            for name, total in sums.items()
            if name.startswith("part:")
        },
        "response/length_mean": sums["tokens"] / responses,
        "response/length_max": float(longest),
        "response/truncated_fraction": sums["truncated"] / responses,
        "response/reflection_fraction": sums["reflecting"] / responses,
        "response/mixed_language_fraction": sums["mixed"] / responses,
        "group/no_signal_fraction": sums["without_signal"] / max(sums["groups"], 1),
        "tokens/rollout": float(sums["tokens"]),
    }


def pool_metrics(activity: Activity) -> dict[str, float]:
    """What scoring took in the step: counts over all ranks, the longest queue and the slowest rank's times."""
    values = dataclasses.asdict(activity)
    names = list(values)
    counts = torch.tensor([float(values[name]) for name in names], dtype=torch.float64)
    largest = counts.clone()
    if dist.get_world_size() > 1:
        dist.all_reduce(counts)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    worst = ("queue_max", "p50_seconds", "p99_seconds")
    pairs = zip(names, counts.tolist(), largest.tolist(), strict=True)
    return {f"reward_pool/{name}": most if name in worst else total for name, total, most in pairs}


def work_metrics(
    flops: ModelFlops,
    sampled: Sequence[RolloutGroup],
    samples: Sequence[SampleSummary],
    config: RLStage,
    *,
    contributes: bool,
) -> dict[str, float]:
    """Model FLOPs of the step's phases over all ranks, and the tokens of those that `tokens/...` does not have yet.

    sampled: this rank's groups, dropped ones included; samples: those of all ranks, all of them, the same on each.
    """
    drawn = Work()
    for group in sampled if contributes else ():
        drawn += generation_work(len(group.prompt.token_ids), (len(response.token_ids) for response in group.responses))
    rollout = torch.tensor(flops.forward(drawn), dtype=torch.float64)
    dist.all_reduce(rollout)
    batch = sequences_work((s.num_tokens, s.response_length) for s in samples)
    trained = batch * config.update.num_epochs
    scored = trained * ((config.algorithm.old_log_probs == "recompute") + (config.algorithm.kl_coefficient > 0))
    work = {"rollout": float(rollout), "logprob": flops.forward(scored), "update": flops.training(trained)}
    return {
        **{f"perf/{phase}_flops": value for phase, value in work.items()},
        "perf/step_flops": sum(work.values()),
        "tokens/logprob": float(scored.tokens),
        "tokens/step": float(batch.tokens),
    }


def _over_ranks(sums: defaultdict[str, float], longest: int) -> tuple[defaultdict[str, float], int]:
    if dist.get_world_size() == 1:
        return sums, longest
    names: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(names, sorted(sums))
    union = sorted({name for part in names for name in part})
    values = torch.tensor([float(sums[name]) for name in union], dtype=torch.float64)
    dist.all_reduce(values)
    top = torch.tensor([longest])
    dist.all_reduce(top, dist.ReduceOp.MAX)
    return defaultdict(float, zip(union, values.tolist(), strict=True)), int(top)
