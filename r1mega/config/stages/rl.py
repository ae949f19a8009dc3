"""Stages `zero`, `reasoning_rl` and `align`: GRPO."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from r1mega.config.layout import generator_problems, num_experts
from r1mega.config.model_files import HFConfig
from r1mega.config.precision import generator_precision_problems
from r1mega.config.rewards import RewardConfig
from r1mega.config.schema import (
    DataConfig,
    EvaluateConfig,
    NonNegative,
    PartialRollouts,
    Positive,
    PositiveInt,
    RolloutConfig,
    Section,
    TrainingStage,
    WeightsConfig,
)
from r1mega.config.validate import context_problems, missing_file_problems, weights_problems


class DynamicSampling(Section):
    """Drop groups whose rewards are all equal and sample new prompts in their place (DAPO, section 3.2)."""

    enabled: bool = False
    max_rounds: PositiveInt = 4


Temperature = Annotated[float, Field(gt=0, le=50)]
"""SAPO's: exp(temperature) is to be a float32."""

RatioLevel = Literal["token", "sequence", "geometric"]
"""Of which ratio pi_old / pi_sampler: the token's, the product over its response, or their geometric mean."""


class OffPolicyConfig(Section):
    """What an update leaves out because the sampler's policy was too far from the trainer's (docs/losses.md)."""

    mask: RatioLevel | None = None
    # no policy gradient where the ratio is outside of [mask_low, mask_high]; token: IcePop, sequence or geometric: MIS
    mask_low: NonNegative = 0.5  # the bounds are for ratios of tokens; means and products want their own
    mask_high: Positive = 5.0
    max_divergence: Positive | None = None
    # no policy gradient from bad responses (A < 0) with a larger mean log pi_sampler - log pi: DeepSeek-V3.2's sequence masking
    reject_ratio: Annotated[float, Field(gt=0, lt=1)] | None = None
    reject_kl: Positive | None = None
    # dropped whole, KL term and all: responses with a token whose ratio is below; whose mean k3 of sampler and old is above


class AlgorithmConfig(Section):
    """GRPO and its variants by the field's names (docs/losses.md has each with its keys)."""

    baseline: Literal["group", "leave_one_out", "none"] = "group"  # leave_one_out: RLOO; none: REINFORCE++
    normalize_std: bool = True  # False: Dr.GRPO's (r - mean)
    whiten: bool = False  # advantages to mean 0 and deviation 1 over all tokens of the step: REINFORCE++
    std_epsilon: NonNegative = 1e-6
    surrogate: Literal["clip", "cispo", "sapo", "gmpo"] = "clip"
    sapo_temperatures: tuple[Temperature, Temperature] = (1.0, 1.05)  # of tokens with A > 0, and of the others (paper)
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    clip_high: Positive = 0.2  # larger than clip_low: clip-higher (DAPO); 10 in the paper's stage 2
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    # two-sided clipping: the ratio of a token with A < 0 counts at most so much (delta in INTELLECT-2; c in dual-clip PPO)
    ratio: Literal["token", "sequence"] = "token"  # sequence: GSPO's length-normalised sequence ratio
    loss_aggregation: Literal["sequence", "token", "constant"] = "sequence"
    # sequence: mean of per-response means (GRPO); token: mean over all tokens (DAPO); constant: / max tokens (Dr.GRPO)
    kl_coefficient: NonNegative = 0.001  # paper
    kl_in: Literal["loss", "reward"] = "loss"
    # reward: r - kl_coefficient * sum of log pi_old - log pi_reference over the response, before advantages (RLOO)
    kl_bias_correction: bool = False  # k3 times pi / pi_sampler, whose gradient is unbiased (DeepSeek-V3.2)
    reference_refresh_steps: PositiveInt | None = (
        25  # rollouts (paper: 400 optimizer steps); None: the reference never changes
    )
    old_log_probs: Literal["rollout", "recompute"] = "recompute"
    # rollout: the generator's (exact in float32); recompute: one more forward pass (bfloat16, FP8)
    router_replay: bool = False
    # R2: the update repeats the experts that the policy took as it recomputed the old log-probs (R3: rollout.router_replay)
    importance_cap: Positive | None = None
    # truncated importance sampling min(pi_trainer / pi_sampler, cap); None: off
    importance_level: RatioLevel = "token"
    off_policy: OffPolicyConfig = OffPolicyConfig()
    mask_truncated: bool = False  # responses cut at max_response_tokens carry no loss (DAPO's overlong filtering)
    dynamic_sampling: DynamicSampling = DynamicSampling()

    @property
    def is_of_tokens(self) -> bool:
        """Whether the loss is a sum over tokens of what each token's own log-prob says: no ratio or mask of a sequence."""
        rules = self.off_policy
        levels = {
            self.ratio,
            self.importance_level if self.importance_cap is not None else "token",
            rules.mask or "token",
        }
        of_responses = (rules.max_divergence, rules.reject_ratio, rules.reject_kl)
        return self.surrogate != "gmpo" and levels == {"token"} and all(rule is None for rule in of_responses)


class UpdateConfig(Section):
    """How a rollout becomes optimizer steps."""

    num_minibatches: PositiveInt = 16  # optimizer steps a rollout (paper: of 512 responses each)
    num_epochs: PositiveInt = 1  # paper
    microbatch_tokens: PositiveInt = 8192  # packing target; with parallel.cp each of its ranks has 1/cp of them
    min_microbatches: PositiveInt | None = None
    # of a replica in an optimizer step, as far as there are samples; None: 2 * parallel.pp of a pipeline, else 1


class RLStage(TrainingStage):
    """GRPO: `zero` starts from a base model, `reasoning_rl` from the cold start, `align` from the SFT model, with prompts of
    kind `general` among the others. The loop is the same; which reward judges a prompt follows from its kind.
    """

    stage: Literal["zero", "reasoning_rl", "align"]
    steps: PositiveInt = 650  # rollouts (paper: 10,400 optimizer steps)
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    update: UpdateConfig = UpdateConfig()
    weights: WeightsConfig = WeightsConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    def is_finished_at(self, step: int) -> bool:
        return step == self.steps

    def prompt_data(self) -> list[DataConfig]:
        files = [] if self.evaluate.data is None else [self.evaluate.data]
        return [self.data, *(self.data.model_copy(update={"prompts": (file,)}) for file in files)]

    def generator_problems(self, hf: HFConfig, world: int) -> Iterator[str]:
        """Why the generators cannot be laid out so, or not with what the stage asks of them."""
        rollout = self.rollout
        yield from generator_problems(rollout, world, hf)
        yield from _router_replay_problems(self, hf)
        if rollout.ep > rollout.tp and self.reward.judge.weight > 0 and self.reward.judge.engine == "policy":
            yield (
                f"reward.judge.engine = policy asks each generator for itself, and those of rollout.ep = {rollout.ep} pass the "
                f"model together; set rollout.ep to 1 or rollout.tp = {rollout.tp}, or take another judge"
            )

    def problems(self, hf: dict[str, Any], world: int) -> Iterator[str]:
        """See Stage. Weights, data files, generator, batch sizes, lengths and rewards."""
        yield from weights_problems(self.model.path, hf)
        yield from context_problems(hf, self.data, self.rollout)
        evaluation = [] if self.evaluate.data is None else [("evaluate.data", self.evaluate.data)]
        yield from missing_file_problems([*(("data.prompts", path) for path in self.data.prompts), *evaluation])
        rollout, update, algorithm = self.rollout, self.update, self.algorithm
        yield from self.generator_problems(hf, world)
        yield from generator_precision_problems(rollout, self.model.dtype, self.parallel, hf)
        if world % rollout.tp == 0 and rollout.num_prompts < world // rollout.tp:
            yield (
                f"rollout.num_prompts = {rollout.num_prompts} gives some of the {world // rollout.tp} generators no prompt; "
                f"raise it to at least {world // rollout.tp}"
            )
        if self.weights.strategy == "direct" and rollout.engine != "vllm":
            yield f"weights.strategy = direct wants rollout.engine = vllm, not {rollout.engine}; leave strategy out"
        samples = rollout.num_prompts * rollout.group_size
        if samples % update.num_minibatches:
            yield (
                f"rollout.num_prompts * rollout.group_size = {samples} responses cannot be divided into "
                f"update.num_minibatches = {update.num_minibatches}"
            )
        if self.optimizer.overlap_grad_reduce and self.model.mtp_loss_coefficient:
            yield (
                "optimizer.overlap_grad_reduce waits for a gradient of every weight, and those of multi-token prediction have none "
                "in RL; set model.mtp_loss_coefficient=0, which is the same training"
            )
        replays = rollout.router_replay or algorithm.router_replay
        if self.model.force_expert_balance and (replays or self.weights.probe_tolerance is None):
            yield (
                "model.force_expert_balance: the trainer's experts are drawn, the generator's are not, so that their log-probs "
                "never agree; it is for tools/bench_throughput.py --synthetic. Set model.force_expert_balance=false"
            )
        if rollout.group_size < 2 and algorithm.baseline != "none":
            yield (
                "rollout.group_size = 1: an advantage relative to the group needs at least 2 responses a prompt; raise it, or set "
                "algorithm.baseline=none and algorithm.normalize_std=false"
            )
        longest = self.data.max_prompt_tokens + rollout.max_response_tokens
        if update.microbatch_tokens < longest:
            yield (
                f"update.microbatch_tokens = {update.microbatch_tokens} does not hold the longest sample, "
                f"max_prompt_tokens + max_response_tokens = {longest}; raise it to at least that"
            )
        yield from _kept_problems(rollout)
        yield from _algorithm_problems(algorithm)
        yield from _partial_problems(rollout, algorithm, self.reward)
        yield from self.reward.problems(rollout.max_response_tokens)


def _kept_problems(rollout: RolloutConfig) -> Iterator[str]:
    """Of tokens that are drawn from a part of the vocabulary."""
    if rollout.top_k is not None and rollout.top_k > rollout.max_kept_ids:
        yield (
            f"rollout.top_k = {rollout.top_k}: of each token at most rollout.max_kept_ids = {rollout.max_kept_ids} ids are kept and told "
            "to the trainer; raise max_kept_ids to at least top_k, or lower top_k"
        )
    only = next(
        (key for key in ("top_k", "max_kept_ids") if rollout.cuts_vocabulary and getattr(rollout, key) == 1), None
    )
    if only:
        yield (
            f"rollout.{only} = 1: a token that is the only one kept has probability 1 whatever the weights are, so that nothing is "
            f"learnt; raise {only} to at least 2, or leave it out"
        )
    if not rollout.cuts_vocabulary and rollout.max_kept_ids != RolloutConfig().max_kept_ids:
        yield (
            "rollout.max_kept_ids is of ids that top_p, top_k or min_p keep, and none of them is set; set one, or leave max_kept_ids out"
        )


def _router_replay_problems(config: RLStage, hf: HFConfig) -> Iterator[str]:
    """Of routers that take what others, or they themselves, took before (R3, R2)."""
    rollout, algorithm = config.rollout, config.algorithm
    if rollout.router_replay and (rollout.engine != "vllm" or (hf and not num_experts(hf))):
        yield "rollout.router_replay wants rollout.engine=vllm and a model with experts; set it to false"
    if rollout.router_replay and (rollout.ep > rollout.tp or rollout.dcp > 1):
        yield (
            f"rollout.router_replay: choices of experts are not recorded where generators share experts (rollout.ep = "
            f"{rollout.ep}, rollout.tp = {rollout.tp}) or ranks the KV cache (rollout.dcp = {rollout.dcp}); set it to false"
        )
    if algorithm.router_replay and hf and not num_experts(hf):
        yield "algorithm.router_replay is of models with experts, and this one has none; leave it out"
    if algorithm.router_replay and algorithm.old_log_probs != "recompute":
        yield (
            "algorithm.router_replay repeats the choices of the pass that algorithm.old_log_probs=recompute makes; set that, or "
            "rollout.router_replay=true for the generator's choices"
        )
    if algorithm.router_replay and rollout.router_replay:
        yield (
            "algorithm.router_replay (R2) and rollout.router_replay (R3) say two things about the update's experts; leave one of "
            "them out"
        )
    for key in ("rollout", "algorithm"):
        if getattr(config, key).router_replay and config.model.megatron.moe_router_fusion:
            yield f"{key}.router_replay: the fused router takes no choices; set model.megatron.moe_router_fusion=false"


def _partial_problems(rollout: RolloutConfig, algorithm: AlgorithmConfig, reward: RewardConfig) -> Iterator[str]:
    """Of rollouts that go on over steps."""
    partial = rollout.partial
    if not partial.is_on:
        if partial != PartialRollouts():
            yield "rollout.partial is off at overdraw = 1, and its other keys do nothing; raise overdraw, or leave them out"
        return
    if rollout.engine == "transformers":
        yield "rollout.partial: engine = transformers leaves no response unfinished; set rollout.engine=vllm"
    if partial.every_tokens >= rollout.max_response_tokens:
        shortest = "set every_tokens to less" if rollout.max_response_tokens > 1 else "leave rollout.partial out"
        yield (
            f"rollout.partial.every_tokens = {partial.every_tokens}: no response of at most max_response_tokens = "
            f"{rollout.max_response_tokens} would be left unfinished; {shortest}"
        )
    if partial.max_staleness == 0:
        yield (
            f"rollout.partial.overdraw = {partial.overdraw} with max_staleness = 0: no later step could train on what one leaves "
            "unfinished; raise max_staleness, or leave rollout.partial out"
        )
    elif partial.overdraw > 1 + partial.max_staleness:
        yield (
            f"rollout.partial.overdraw = {partial.overdraw}: steps train on num_prompts groups, so some of so many would be older than "
            f"max_staleness = {partial.max_staleness} allows; set overdraw to at most {1 + partial.max_staleness}, or raise max_staleness"
        )
    if not rollout.durable:
        yield "rollout.partial keeps unfinished responses where rollout.durable keeps finished ones; set durable=true"
    collective = [
        name
        for name, asks in (
            ("judge", reward.judge.engine == "policy"),
            ("helpfulness", reward.helpfulness.backend == "megatron"),
            ("harmlessness", reward.harmlessness.backend == "megatron"),
        )
        if asks and getattr(reward, name).weight > 0
    ]
    if algorithm.dynamic_sampling.enabled and collective:
        yield (
            f"rollout.partial and algorithm.dynamic_sampling want the rewards of a group while others are sampled, and reward."
            f"{collective[0]} takes the generator or all ranks; switch one of them off"
        )
    corrections = [key for key in _against_sampler(algorithm) if key != "kl_bias_correction"]  # that is of the KL alone
    if algorithm.old_log_probs == "recompute" and not corrections:
        yield (
            "rollout.partial: tokens of older weights are compared with recomputed log-probs of the present ones, as if those had "
            "sampled them; set algorithm.importance_cap (or a rule of off_policy), or algorithm.old_log_probs=rollout"
        )


def _against_sampler(algorithm: AlgorithmConfig) -> list[str]:
    """Keys that are on and compare the trainer's log-probs with the sampler's."""
    rules = algorithm.off_policy
    on = {
        "importance_cap": algorithm.importance_cap is not None,
        "kl_bias_correction": algorithm.kl_bias_correction,
        "off_policy.mask": rules.mask is not None,
        "off_policy.max_divergence": rules.max_divergence is not None,
        "off_policy.reject_ratio": rules.reject_ratio is not None,
        "off_policy.reject_kl": rules.reject_kl is not None,
    }
    return [key for key, is_on in on.items() if is_on]


def _algorithm_problems(algorithm: AlgorithmConfig) -> Iterator[str]:
    """Keys that do not go together."""
    rules, against_sampler = algorithm.off_policy, _against_sampler(algorithm)
    of_old = [key for key in against_sampler if key not in ("kl_bias_correction", "off_policy.max_divergence")]
    if of_old and algorithm.old_log_probs != "recompute":
        yield f"algorithm.{of_old[0]} corrects recomputed log-probs: it wants algorithm.old_log_probs=recompute"
    if algorithm.importance_level != "token" and algorithm.importance_cap is None:
        yield (
            f"algorithm.importance_level = {algorithm.importance_level} is of the weight that algorithm.importance_cap bounds: set "
            "importance_cap, or leave importance_level out"
        )
    yield from _mask_problems(rules)
    of_sequences = algorithm.ratio == "sequence" or algorithm.surrogate == "gmpo"
    if rules.mask == "token" and of_sequences:
        yield (
            "algorithm.off_policy.mask = token masks tokens, whose ratio is their sequence's (ratio=sequence, surrogate=gmpo); set "
            "mask=sequence or mask=geometric"
        )
    if algorithm.ratio == "sequence" and algorithm.surrogate in ("cispo", "gmpo"):
        yield f"algorithm.surrogate = {algorithm.surrogate} takes the ratios of tokens; set algorithm.ratio=token"
    if algorithm.dual_clip is not None and algorithm.surrogate != "clip":
        yield f"algorithm.dual_clip is of surrogate=clip, not {algorithm.surrogate}; leave dual_clip out"
    if algorithm.dual_clip is not None and algorithm.dual_clip < 1 + algorithm.clip_high:
        yield (
            f"algorithm.dual_clip = {algorithm.dual_clip} is below 1 + clip_high = {1 + algorithm.clip_high}; raise it to at least "
            "that"
        )
    if algorithm.normalize_std and (algorithm.whiten or algorithm.baseline == "none"):
        key = "whiten" if algorithm.whiten else "baseline = none"
        yield f"algorithm.{key} has no standard deviation of a group in it; set algorithm.normalize_std=false"
    if algorithm.baseline == "none" and algorithm.dynamic_sampling.enabled:
        yield (
            "algorithm.dynamic_sampling drops groups of equal rewards, which with algorithm.baseline = none have advantages like "
            "others; set dynamic_sampling.enabled=false"
        )
    yield from _kl_in_reward_problems(algorithm)


def _mask_problems(rules: OffPolicyConfig) -> Iterator[str]:
    low, high = rules.mask_low, rules.mask_high
    unmasked = OffPolicyConfig()
    if rules.mask is None and (low, high) != (unmasked.mask_low, unmasked.mask_high):
        yield (
            "algorithm.off_policy: mask_low and mask_high bound the ratio that mask names, and it names none; set "
            "off_policy.mask=token, sequence or geometric, or leave both out"
        )
    if rules.mask is not None and not low < 1 < high:
        yield (
            f"algorithm.off_policy: 1, the ratio of equal policies, is not between mask_low = {low} and mask_high = {high}; set "
            "mask_low below 1 and mask_high above it"
        )


def _kl_in_reward_problems(algorithm: AlgorithmConfig) -> Iterator[str]:
    if algorithm.kl_in == "reward" and algorithm.normalize_std and algorithm.kl_coefficient > 0:
        yield (
            "algorithm.kl_in = reward: in a group of equal rewards the KL is all that differs, and the standard deviation would "
            "make advantages of 1 of its noise; set algorithm.normalize_std=false"
        )
    if algorithm.kl_in == "reward" and algorithm.kl_bias_correction:
        yield "algorithm.kl_bias_correction is of a KL term in the loss; set algorithm.kl_in=loss"
    if algorithm.kl_in == "reward" and algorithm.mask_truncated:
        yield (
            "algorithm.kl_in = reward: the KL of a response that algorithm.mask_truncated leaves out is not computed, and its "
            "reward would count in the group without it; set mask_truncated=false or kl_in=loss"
        )
