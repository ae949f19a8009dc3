"""Stages `zero`, `reasoning_rl` and `align`: GRPO."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from r1mega.config.layout import generator_problems, num_experts
from r1mega.config.megatron import recomputes_routing
from r1mega.config.rewards import RewardConfig
from r1mega.config.schema import (
    DataConfig,
    EvaluateConfig,
    NonNegative,
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


class AlgorithmConfig(Section):
    """GRPO and its variants by the field's names."""

    normalize_std: bool = True  # False: Dr.GRPO's (r - mean)
    std_epsilon: NonNegative = 1e-6
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    clip_high: Positive = 0.2  # larger than clip_low: clip-higher (DAPO); 10 in the paper's stage 2
    ratio: Literal["token", "sequence"] = "token"  # sequence: GSPO's length-normalised sequence ratio
    loss_aggregation: Literal["sequence", "token", "constant"] = "sequence"
    # sequence: mean of per-response means (GRPO); token: mean over all tokens (DAPO); constant: / max tokens (Dr.GRPO)
    kl_coefficient: NonNegative = 0.001  # paper
    reference_refresh_steps: PositiveInt | None = 400  # paper; None: the reference never changes
    old_log_probs: Literal["rollout", "recompute"] = "recompute"
    # rollout: the generator's (exact in float32); recompute: one more forward pass (bfloat16, FP8)
    importance_cap: Positive | None = None
    # truncated importance sampling min(pi_trainer / pi_sampler, cap); None: off. Wants rollout.top_p = 1
    mask_truncated: bool = False  # responses cut at max_response_tokens carry no loss (DAPO's overlong filtering)
    dynamic_sampling: DynamicSampling = DynamicSampling()

    @property
    def is_of_tokens(self) -> bool:
        """Whether the loss is a sum over tokens of what each token's own log-prob says: no ratio or mask of a sequence."""
        return self.ratio == "token"


class UpdateConfig(Section):
    """How a rollout becomes optimizer steps."""

    num_minibatches: PositiveInt = 16  # optimizer steps a rollout (paper)
    num_epochs: PositiveInt = 1  # paper
    microbatch_tokens: PositiveInt = 8192  # packing target; with parallel.cp each of its ranks has 1/cp of them
    min_microbatches: PositiveInt | None = None
    # of a replica in an optimizer step, as far as there are samples; None: 2 * parallel.pp of a pipeline, else 1


class RLStage(TrainingStage):
    """GRPO: `zero` starts from a base model, `reasoning_rl` from the cold start, `align` from the SFT model, with prompts of
    kind `general` among the others. The loop is the same; which reward judges a prompt follows from its kind.
    """

    stage: Literal["zero", "reasoning_rl", "align"]
    steps: PositiveInt = 10400  # paper
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

    def problems(self, hf: dict[str, Any], world: int) -> Iterator[str]:
        """See Stage. Weights, data files, generator, batch sizes, lengths and rewards."""
        yield from weights_problems(self.model.path, hf)
        yield from context_problems(hf, self.data, self.rollout)
        evaluation = [] if self.evaluate.data is None else [("evaluate.data", self.evaluate.data)]
        yield from missing_file_problems([*(("data.prompts", path) for path in self.data.prompts), *evaluation])
        rollout, update, algorithm = self.rollout, self.update, self.algorithm
        yield from generator_problems(rollout, world, hf)
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
        if rollout.router_replay and (rollout.engine != "vllm" or (hf and not num_experts(hf))):
            yield "rollout.router_replay wants rollout.engine=vllm and a model with experts; set it to false"
        if rollout.router_replay and recomputes_routing(self.model):
            yield (
                f"rollout.router_replay: with model.recompute = {self.model.recompute} routers would choose twice, which is not "
                "built; set router_replay=false, or recompute parts of a layer other than moe"
            )
        if rollout.router_replay and self.model.megatron.moe_router_fusion:
            yield "rollout.router_replay: the fused router takes no choices; set model.megatron.moe_router_fusion=false"
        if self.optimizer.overlap_grad_reduce and self.model.mtp_loss_coefficient:
            yield (
                "optimizer.overlap_grad_reduce waits for a gradient of every weight, and those of multi-token prediction have none "
                "in RL; set model.mtp_loss_coefficient=0, which is the same training"
            )
        if self.model.force_expert_balance and (rollout.router_replay or self.weights.probe_tolerance is None):
            yield (
                "model.force_expert_balance: the trainer's experts are drawn, the generator's are not, so that their log-probs "
                "never agree; it is for tools/bench_throughput.py --synthetic. Set model.force_expert_balance=false"
            )
        if rollout.group_size < 2:
            yield "rollout.group_size = 1: an advantage relative to the group needs at least 2 responses a prompt"
        longest = self.data.max_prompt_tokens + rollout.max_response_tokens
        if update.microbatch_tokens < longest:
            yield (
                f"update.microbatch_tokens = {update.microbatch_tokens} does not hold the longest sample, "
                f"max_prompt_tokens + max_response_tokens = {longest}; raise it to at least that"
            )
        if algorithm.importance_cap is not None and algorithm.old_log_probs != "recompute":
            yield "algorithm.importance_cap corrects recomputed log-probs: it wants algorithm.old_log_probs=recompute"
        if rollout.top_p < 1 and (algorithm.old_log_probs == "rollout" or algorithm.importance_cap is not None):
            # neither with nor without the kept mass in the ratio is the update a gradient: tests/unit/algorithm/test_top_p.py
            without = " and leave algorithm.importance_cap out" if algorithm.importance_cap is not None else ""
            yield (
                f"rollout.top_p = {rollout.top_p}: the generator's log-probs are of the tokens that top_p keeps, the trainer's of "
                "all, and a ratio of the two is of neither; set rollout.top_p=1, or give such ratios up: set "
                f"algorithm.old_log_probs=recompute{without}"
            )
        yield from self.reward.problems(rollout.max_response_tokens)
