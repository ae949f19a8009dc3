"""The update phase of an RL step: pack, log-probs of the reference (and the old policy), several optimizer steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from r1mega.algorithm.grpo import grpo_loss
from r1mega.config.stages.rl import RLStage
from r1mega.observe.trace import PhaseTimer
from r1mega.train.packing import Microbatch, plan_packing, split_minibatches
from r1mega.train.policy import Policy, UpdateResult
from r1mega.train.samples import minibatch_weights, pack_samples, policy_tokens
from r1mega.types import TrainingSample
from r1mega.weights.verify import probe_limit

_NO_UPDATE = dict.fromkeys(
    (
        "policy/loss", "policy/kl", "policy/clip_fraction", "policy/entropy", "policy/grad_norm", "logprob/diff_max",
        "policy/importance_capped_fraction", "logprob/diff_mean", "logprob/outlier_fraction", "tokens/update",
    ),
    0.0,
) | {"expert/load_max_over_mean": None, "packing/fill_fraction": None}  # fmt: skip
"""Metrics of a step in which no response carries loss (all rewards failed, or all were truncated and masked)."""


@dataclass(frozen=True, slots=True)
class _Minibatch:
    """One optimizer step's share of this rank, and the figures that all ranks agree on."""

    microbatches: list[Microbatch]
    weights: dict[int, float]
    response_tokens: int


def update_policy(
    policy: Policy, samples: Sequence[TrainingSample], config: RLStage, step: int, timer: PhaseTimer
) -> dict[str, float | None]:
    """Train on one rollout's samples (the same list on every rank); return the step's policy metrics.

    Every sample is used once an inner epoch, in `num_minibatches` optimizer steps of a seeded random partition.
    """
    if not samples:
        return _NO_UPDATE
    algorithm, temperature = config.algorithm, config.rollout.temperature
    tolerance = probe_limit(policy.dtype, config.weights.probe_tolerance, fp8=policy.fp8).tolerance
    results: list[UpdateResult] = []
    with timer.phase("update"):
        minibatches, fill = _plan(samples, config, step, policy)
    everything = [batch for minibatch in minibatches for batch in minibatch.microbatches]
    with timer.phase("logprob"):
        old = reference = None  # on the last pipeline stage, where the loss is; empty on the others
        if algorithm.old_log_probs == "recompute":
            old = [log_probs for log_probs, _ in policy.log_probs(everything, temperature)]
        if algorithm.kl_coefficient > 0:
            with policy.as_reference():
                reference = [log_probs for log_probs, _ in policy.log_probs(everything, temperature, replay=False)]
    with timer.phase("update"):
        offset = 0
        for minibatch in minibatches:

            def loss(index, microbatch, log_probs, entropies, minibatch=minibatch, offset=offset):
                tokens = policy_tokens(
                    microbatch,
                    samples,
                    minibatch.weights,
                    old_log_probs=None if old is None else old[offset + index],
                    reference_log_probs=None if reference is None else reference[offset + index],
                )
                value, stats = grpo_loss(
                    log_probs,
                    tokens,
                    clip_low=algorithm.clip_low,
                    clip_high=algorithm.clip_high,
                    ratio=algorithm.ratio,
                    kl_coefficient=algorithm.kl_coefficient,
                    importance_cap=algorithm.importance_cap,
                    backend=policy.kernels,
                )
                outliers = (log_probs.detach() - tokens.sampler_log_probs).abs() > tolerance
                return value, (stats, entropies.sum(dtype=torch.float64), value.detach().double(), outliers.sum())

            results.append(
                policy.update(
                    minibatch.microbatches,
                    loss,
                    temperature=temperature,
                    total_response_tokens=minibatch.response_tokens,
                )
            )
            offset += len(minibatch.microbatches)
    return _metrics(results, policy.reports) | {
        "packing/fill_fraction": fill,
        "tokens/update": float(config.update.num_epochs * sum(len(s.token_ids) for s in samples)),
    }


def _plan(
    samples: Sequence[TrainingSample], config: RLStage, step: int, policy: Policy
) -> tuple[list[_Minibatch], float]:
    """(this replica's share of each optimizer step, how full its microbatches are)."""
    lengths = [len(sample.token_ids) for sample in samples]
    minibatches, fills = [], []
    for epoch in range(config.update.num_epochs):
        parts = split_minibatches(len(samples), config.update.num_minibatches, f"{config.seed}/{step}/{epoch}")
        parts = [part for part in parts if part]
        plan = plan_packing(
            lengths, parts, config.update.microbatch_tokens, policy.num_replicas, policy.microbatch_multiple
        )
        fills.append(plan.fill_fraction)
        for members, ranks in zip(parts, plan.bins, strict=True):
            minibatches.append(
                _Minibatch(
                    microbatches=[pack_samples(samples, indices) for indices in ranks[policy.replica]],
                    weights=minibatch_weights(
                        samples, members, config.algorithm.loss_aggregation, config.rollout.max_response_tokens
                    ),
                    response_tokens=sum(samples[i].response_length for i in members),
                )
            )
    return minibatches, sum(fills) / len(fills)


def _metrics(results: list[UpdateResult], reports: bool) -> dict[str, float | None]:
    """Add the statistics of microbatches and reporting ranks up. Mismatch: of the first optimizer step only, whose
    forward pass still has the weights that sampled.
    """
    sums = torch.zeros(9, dtype=torch.float64)
    largest = torch.zeros(1, dtype=torch.float64)
    for place, result in enumerate(results):
        for stats, entropy, loss, outliers in result.statistics if reports else ():
            sums[:6] += torch.stack([stats.num_tokens, stats.clipped, stats.kl, stats.truncated, entropy, loss]).cpu()
            if place == 0:
                sums[6] += stats.num_tokens.cpu()
                sums[7] += stats.mismatch_sum.cpu()
                sums[8] += outliers.cpu()
                largest[0] = max(largest[0], stats.mismatch_max.cpu())
    dist.all_reduce(sums)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    tokens, clipped, kl, capped, entropy, loss, first_tokens, mismatch, outliers = sums.tolist()
    loads = [r.expert_load for r in results if r.expert_load is not None]
    return {
        "policy/loss": loss / len(results),
        "policy/kl": kl / max(tokens, 1),
        "policy/clip_fraction": clipped / max(tokens, 1),
        "policy/importance_capped_fraction": capped / max(tokens, 1),
        "policy/entropy": entropy / max(tokens, 1),
        "policy/grad_norm": sum(r.grad_norm for r in results) / len(results),
        "policy/learning_rate": results[-1].lr,
        "logprob/diff_max": float(largest[0]),
        "logprob/diff_mean": mismatch / max(first_tokens, 1),
        "logprob/outlier_fraction": outliers / max(first_tokens, 1),
        "expert/load_max_over_mean": sum(loads) / len(loads) if loads else None,
    }
