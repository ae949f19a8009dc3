"""The update phase of an RL step: pack, log-probs of the reference (and the old policy), several optimizer steps."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from r1mega.algorithm.grpo import grpo_loss, sequence_sum
from r1mega.algorithm.off_policy import OffPolicyMetrics, OffPolicyRules, corrected
from r1mega.config.stages.rl import AlgorithmConfig, RLStage
from r1mega.observe.trace import PhaseTimer
from r1mega.train.heads import TokenScores
from r1mega.train.packing import PackingPlan, plan_packing, split_minibatches
from r1mega.train.policy import Policy
from r1mega.train.sample_exchange import StepSamples
from r1mega.train.samples import PolicyMicrobatch, minibatch_weights, pack_for_loss, step_advantages
from r1mega.train.trainer import Trainer, UpdateResult
from r1mega.types import SampleSummary, TrainingSample
from r1mega.weights.verify import probe_limit
from r1mega_kernels import GRPOMetrics

_NO_UPDATE = dict.fromkeys(
    (
        "policy/loss", "policy/kl", "policy/clip_fraction", "policy/entropy", "policy/grad_norm", "logprob/diff_max",
        "policy/importance_capped_fraction", "policy/skipped_updates", "logprob/diff_mean", "logprob/outlier_fraction", "tokens/update",
        "policy/masked_fraction", "policy/rejected_fraction",
    ),
    0.0,
) | dict.fromkeys(("expert/load_max_over_mean", "packing/fill_fraction", "policy/effective_sample_fraction",
                 "logprob/kept_ids"))  # fmt: skip
"""Metrics of a step in which no response carries loss (all rewards failed, or all were truncated and masked)."""


@dataclass(frozen=True, slots=True)
class _Minibatch:
    """One optimizer step's share of this rank, and the figure that all ranks agree on."""

    microbatches: list[PolicyMicrobatch]
    response_tokens: int


@dataclass(frozen=True, slots=True)
class _Statistics:
    """Of one microbatch or a part of it, scalars. off_policy: where rules are on; outliers: tokens further from the sampler's
    log-prob than a probe allows.
    """

    tokens: GRPOMetrics
    off_policy: OffPolicyMetrics | None
    entropy: torch.Tensor
    loss: torch.Tensor
    outliers: torch.Tensor


def update_policy(
    trainer: Trainer, samples: StepSamples | Sequence[TrainingSample], config: RLStage, step: int, timer: PhaseTimer
) -> dict[str, float | None]:
    """Train on one rollout's samples; return the step's policy metrics.

    samples: a list is of all samples and the same on every rank; otherwise each rank gets those that it trains on. Every
    sample is used once an inner epoch, in `num_minibatches` optimizer steps of a seeded random partition.
    """
    if not isinstance(samples, StepSamples):
        samples = StepSamples.everywhere(samples)
    if not len(samples):
        return _NO_UPDATE
    policy = trainer.policy
    limit = probe_limit(
        policy.dtype, config.weights.probe_tolerance, fp8=policy.fp8, fp8_generator=config.rollout.computes_in_fp8
    )
    loss = functools.partial(
        _loss,
        algorithm=config.algorithm,
        rules=_rules(config.algorithm),
        tolerance=limit.tolerance,
        kernels=policy.kernels,
    )
    with timer.phase("update"):
        minibatches, fill = _plan(samples, config, step, policy)
    with timer.phase("logprob"):
        minibatches = _with_log_probs(trainer, minibatches, config)
        if config.algorithm.whiten or config.algorithm.kl_in == "reward":
            minibatches = _with_step_advantages(minibatches, samples.known, config.algorithm, policy)
    with timer.phase("update"):
        results = [
            trainer.update(
                minibatch.microbatches,
                loss,
                temperature=config.rollout.temperature,
                total_response_tokens=minibatch.response_tokens,
                sums_over="tokens" if config.algorithm.is_of_tokens else "samples",
            )
            for minibatch in minibatches
        ]
    return _metrics(results, policy.reports, _rules(config.algorithm).is_on) | {
        "packing/fill_fraction": fill,
        "tokens/update": float(config.update.num_epochs * sum(s.num_tokens for s in samples.known)),
        "logprob/kept_ids": _kept_ids(samples.known),
    }


def _kept_ids(samples: Sequence[SampleSummary]) -> float | None:
    """That a response token was drawn from, in the mean over samples that tell; None: none does."""
    told = [sample for sample in samples if sample.num_kept]
    return sum(s.num_kept for s in told) / sum(s.response_length for s in told) if told else None


def _with_log_probs(trainer: Trainer, minibatches: Sequence[_Minibatch], config: RLStage) -> list[_Minibatch]:
    """Microbatches with the log-probs of old and reference weights, as far as the loss asks for them, on the last pipeline
    stage, where the loss is; with algorithm.router_replay with the experts that the old weights took, on all of them.
    """
    policy = trainer.policy
    batches = [batch for minibatch in minibatches for batch in minibatch.microbatches]
    temperature = config.rollout.temperature
    old: list[torch.Tensor] = []
    reference: list[torch.Tensor] = []
    if config.algorithm.old_log_probs == "recompute" and config.algorithm.router_replay:
        scored, batches = policy.recorded_scores(batches, temperature)
        old = [scores.values for scores in scored]
    elif config.algorithm.old_log_probs == "recompute":
        old = [scores.values for scores in policy.scores(batches, temperature)]
    if config.algorithm.kl_coefficient > 0:
        with trainer.as_reference():
            reference = [scores.values for scores in policy.scores(batches, temperature, replay=False)]
    if old:
        pairs = zip(batches, old, strict=True)
        batches = [dataclasses.replace(batch, old_log_probs=log_probs) for batch, log_probs in pairs]
    if reference:
        pairs = zip(batches, reference, strict=True)
        batches = [dataclasses.replace(batch, reference_log_probs=log_probs) for batch, log_probs in pairs]
    return _refilled(minibatches, batches)


def _refilled(minibatches: Sequence[_Minibatch], batches: Sequence[PolicyMicrobatch]) -> list[_Minibatch]:
    """The minibatches with these microbatches, of all of them in order, in place of their own."""
    rest = iter(batches)
    return [
        dataclasses.replace(minibatch, microbatches=list(itertools.islice(rest, len(minibatch.microbatches))))
        for minibatch in minibatches
    ]


def _with_step_advantages(
    minibatches: Sequence[_Minibatch], samples: Sequence[SampleSummary], algorithm: AlgorithmConfig, policy: Policy
) -> list[_Minibatch]:
    """Microbatches with the advantages that only the whole step has. A collective call where KL is in the reward."""
    batches = [batch for minibatch in minibatches for batch in minibatch.microbatches]
    penalties = None
    if algorithm.kl_in == "reward" and algorithm.kl_coefficient > 0:
        found = torch.zeros(2, len(samples), dtype=torch.float64)  # sums over the response, in how many epochs
        for batch in batches if policy.reports else ():
            tokens, places = batch.policy_tokens, torch.tensor(batch.sample_indices, dtype=torch.int64)
            if tokens.reference_log_probs is None:
                raise RuntimeError("the reference's log-probs come first")
            gaps = (tokens.old_log_probs.cpu() - tokens.reference_log_probs.cpu()).double()
            found[0].index_add_(0, places, sequence_sum(gaps, tokens))
            found[1, places] += 1
        dist.all_reduce(found)
        penalties = algorithm.kl_coefficient * found[0] / found[1].clamp(min=1)
    advantages = torch.tensor(step_advantages(samples, algorithm, penalties), dtype=torch.float32)
    batches = [
        dataclasses.replace(batch, advantages=advantages[list(batch.sample_indices)][batch.sequence_ids])
        for batch in batches
    ]
    return _refilled(minibatches, batches)


def _rules(algorithm: AlgorithmConfig) -> OffPolicyRules:
    section = algorithm.off_policy
    return OffPolicyRules(
        algorithm.importance_cap, algorithm.importance_level, section.mask, section.mask_low, section.mask_high,
        section.max_divergence, section.reject_ratio, section.reject_kl,
    )  # fmt: skip


def _loss(
    batch: PolicyMicrobatch,
    scores: TokenScores,
    *,
    algorithm: AlgorithmConfig,
    rules: OffPolicyRules,
    tolerance: float,
    kernels: str | None,
) -> tuple[torch.Tensor, _Statistics]:
    log_probs, entropies = scores.values, scores.entropies
    if entropies is None:
        raise TypeError("GRPO is for a model that predicts tokens: its head gives entropies")
    tokens, off_policy = batch.policy_tokens, None
    if rules.is_on:
        tokens, off_policy = corrected(tokens, log_probs, rules)
    value, stats = grpo_loss(
        log_probs,
        tokens,
        clip_low=algorithm.clip_low,
        clip_high=algorithm.clip_high,
        ratio=algorithm.ratio,
        surrogate=algorithm.surrogate,
        dual_clip=algorithm.dual_clip,
        sapo_temperatures=algorithm.sapo_temperatures,
        kl_coefficient=algorithm.kl_coefficient if algorithm.kl_in == "loss" else 0.0,
        kl_bias_correction=algorithm.kl_bias_correction,
        importance_cap=algorithm.importance_cap if algorithm.importance_level == "token" else None,
        backend=kernels,
    )
    outliers = (log_probs.detach() - batch.sampler_log_probs).abs() > tolerance
    return value, _Statistics(
        stats, off_policy, entropies.detach().sum(dtype=torch.float64), value.detach().double(), outliers.sum()
    )


def _plan(samples: StepSamples, config: RLStage, step: int, policy: Policy) -> tuple[list[_Minibatch], float]:
    """(this replica's share of each optimizer step, how full its microbatches are). Fetches the samples of that share; who
    trains on which follows from lengths alone.
    """
    lengths = [sample.num_tokens for sample in samples.known]
    plans: list[tuple[list[list[int]], PackingPlan]] = []
    for epoch in range(config.update.num_epochs):
        parts = split_minibatches(len(samples), config.update.num_minibatches, f"{config.seed}/{step}/{epoch}")
        parts = [part for part in parts if part]
        plan = plan_packing(
            lengths, parts, config.update.microbatch_tokens, policy.num_replicas, policy.microbatch_multiple,
            config.update.min_microbatches or policy.min_microbatches,
        )  # fmt: skip
        plans.append((parts, plan))
    bins = [ranks for _, plan in plans for ranks in plan.bins]
    samples.fetch([
        [index for ranks in bins for members in ranks[replica] for index in members]
        for replica in range(policy.num_replicas)
    ])  # fmt: skip
    minibatches = []
    for members, ranks in zip((part for parts, _ in plans for part in parts), bins, strict=True):
        weights = minibatch_weights(
            samples.known, members, config.algorithm.loss_aggregation, config.rollout.max_response_tokens
        )
        minibatches.append(
            _Minibatch(
                microbatches=[pack_for_loss(samples, indices, weights) for indices in ranks[policy.replica]],
                response_tokens=sum(samples.known[i].response_length for i in members),
            )
        )
    return minibatches, sum(plan.fill_fraction for _, plan in plans) / len(plans)


def _metrics(results: list[UpdateResult[_Statistics]], reports: bool, corrects: bool) -> dict[str, float | None]:
    """Add the statistics of microbatches and reporting ranks up. Mismatch: of the first optimizer step only, whose
    forward pass still has the weights that sampled (with rollout.partial the newest tokens). corrects: whether rules for the sampler are on.
    """
    sums = torch.zeros(13, dtype=torch.float64)
    largest = torch.zeros(1, dtype=torch.float64)
    for place, result in enumerate(results):
        for found in result.statistics if reports else ():
            stats = found.tokens
            sums[:5] += torch.stack([stats.num_tokens, stats.clipped, stats.kl, found.entropy, found.loss]).cpu()
            if (off := found.off_policy) is not None:
                sums[8:] += torch.stack([off.masked, off.rejected, off.capped, off.weights, off.squares]).cpu()
            if place == 0:
                sums[5] += stats.num_tokens.cpu()
                sums[6] += stats.mismatch_sum.cpu()
                sums[7] += found.outliers.cpu()
                largest[0] = max(largest[0], stats.mismatch_max.detach().cpu())
    dist.all_reduce(sums)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    tokens, clipped, kl, entropy, loss, first_tokens, mismatch, outliers, *off_policy = sums.tolist()
    masked, rejected, capped, weights, squares = off_policy
    loads = [r.expert_load for r in results if r.expert_load is not None]
    return {
        "policy/loss": loss / len(results),
        "policy/kl": kl / max(tokens, 1),
        "policy/clip_fraction": clipped / max(tokens, 1),
        "policy/importance_capped_fraction": capped / max(tokens, 1),
        "policy/masked_fraction": masked / max(tokens, 1),
        "policy/rejected_fraction": rejected / max(tokens, 1),
        "policy/effective_sample_fraction": weights**2 / ((tokens * squares) or 1) if corrects else None,
        "policy/entropy": entropy / max(tokens, 1),
        "policy/grad_norm": sum(r.grad_norm for r in results) / len(results),
        "policy/skipped_updates": float(sum(r.skipped for r in results)),
        "policy/learning_rate": results[-1].lr,
        "logprob/diff_max": float(largest[0]),
        "logprob/diff_mean": mismatch / max(first_tokens, 1),
        "logprob/outlier_fraction": outliers / max(first_tokens, 1),
        "expert/load_max_over_mean": sum(loads) / len(loads) if loads else None,
    }
