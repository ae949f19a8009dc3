"""Stages `zero`, `reasoning_rl` and `align`: GRPO. `RLTrainer.step` reads like the recipe; each arrow is a record of types.py."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

from r1mega.checkpoint.hf import read_config
from r1mega.config.rewards import PreferenceReward
from r1mega.config.stages.rl import RLStage
from r1mega.data.cursor import CursorState, PromptCursor
from r1mega.data.prompts import load_prompts
from r1mega.data.tokenizer import load_tokenizer
from r1mega.errors import CheckpointError, ConfigError
from r1mega.model.flops import model_flops
from r1mega.observe.trace import profile_step
from r1mega.platform.groups import wait_for_all
from r1mega.reward.compose import RewardScorer
from r1mega.rollout.build import build_engine, engine_settings
from r1mega.rollout.journal import open_journal
from r1mega.rollout.partial import build_collector
from r1mega.rollout.sampler import GroupSampler, sampling_settings
from r1mega.rollout.shared_scoring import share_scoring
from r1mega.stages.in_loop_evaluation import Evaluation
from r1mega.stages.phases import Phases
from r1mega.stages.rl_metrics import group_metrics, pool_metrics, work_metrics
from r1mega.stages.runtime import Runtime
from r1mega.train.grpo_update import update_policy
from r1mega.train.phases import plan_phases
from r1mega.train.policy import Policy
from r1mega.train.reward_model import ShardedRewardModel
from r1mega.train.sample_exchange import SampleExchange
from r1mega.train.samples import training_samples
from r1mega.train.trainer import Trainer
from r1mega.types import RolloutGroup
from r1mega.weights.sync import WeightSync


class RLTrainer:
    """Policy, generator and rewards of one run, and the step that ties them together."""

    def __init__(self, config: RLStage, runtime: Runtime, *, init_std: float | None = None):
        """init_std: random weights (of this deviation) instead of those of model.path: for benchmarks."""
        self.config, self.timer = config, runtime.timer
        self.hf_config = read_config(config.model.path)
        self.flops = model_flops(self.hf_config)
        self.tokenizer = load_tokenizer(config.model.path)
        prompts = load_prompts(config.data, self.tokenizer)
        self.policy = Policy(config.model, self.hf_config, config.parallel, seed=config.seed, init_std=init_std)
        if init_std is None:
            self.policy.load_pretrained(config.model.path)
        if config.algorithm.kl_coefficient > 0:
            self.policy.take_reference()
        num_updates = config.steps * config.update.num_minibatches * config.update.num_epochs
        plan = plan_phases(config.memory, sleep=config.rollout.sleep, cpu_adam=config.optimizer.cpu_offload)
        self.trainer = Trainer(self.policy, config.optimizer, total_steps=num_updates, plan=plan)
        self.cursor = PromptCursor(len(prompts), config.seed)
        self.start, progress = runtime.restore(self.trainer, self.hf_config, config.steps)
        if self.start:
            self._restore_cursor(progress["cursor"])
        self.trainer.enter("rollout")  # the generator measures the memory that is left
        rollout = config.rollout
        settings = engine_settings(
            config.model.path, config.model.dtype, config.data.max_prompt_tokens + rollout.max_response_tokens + 1, rollout,
            bucket_bytes=config.weights.bucket_bytes, return_routed_experts=rollout.router_replay,
            quantization=rollout.quantization, kv_cache_dtype=rollout.kv_cache_dtype,
        )  # fmt: skip
        self.engine = build_engine(settings, rollout.engine)
        self.phases = Phases(plan, self.trainer, self.engine)
        self.phases.enter("reshard")  # reward models are built while the generator sleeps
        self.scorer = RewardScorer(
            config.reward, max_response_tokens=config.rollout.max_response_tokens, engine=self.engine,
            tokenizer=self.tokenizer, sharded=self._sharded_reward_model,
        )  # fmt: skip
        self.sampling = sampling_settings(rollout, self.tokenizer, trains=True)
        self.journal = open_journal(rollout, runtime.run_dir, self.start)
        scorer = share_scoring(self.scorer, rollout.tp, everywhere=self.scorer.asks_generator)
        sampler = GroupSampler(
            self.engine, self.tokenizer, scorer, self.sampling, rollout.group_size, self.timer, self.journal
        )
        self.collector = build_collector(sampler, prompts, self.cursor, config, progress.get("open_groups"))
        wait_for_all("startup", "the models and generators of all ranks")
        self.exchange = SampleExchange.of(self.policy, rollout.tp)
        self.sync = WeightSync(self.policy, self.engine, config.weights, self.hf_config, [p.token_ids for p in prompts])
        self.push()

    def step(self, step: int) -> tuple[dict[str, Any], Sequence[RolloutGroup]]:
        """One step of the recipe; its metrics, and this rank's groups."""
        config = self.config
        self.scorer.step = step
        if not self.phases.generator_has_weights:
            self.push(again=True)  # a checkpoint was written in their place
        rollout = self.collector.collect(step)  # rollout; each response is scored while others are still sampled
        self.phases.enter("logprob")  # the generator sleeps: the push replaces all of its weights
        samples = self.exchange.index(training_samples(rollout.groups, config.algorithm))  # advantage; who has what
        metrics = update_policy(self.trainer, samples, config, step, self.timer)  # each its share: log-prob, update
        refresh = config.algorithm.reference_refresh_steps
        if config.algorithm.kl_coefficient > 0 and refresh is not None and step % refresh == 0:
            self.policy.take_reference()
        metrics |= self.push()  # reshard, and its proof
        metrics |= group_metrics(rollout.sampled, contributes=rollout.is_first) | rollout.metrics()
        metrics |= pool_metrics(self.scorer.activity())
        metrics |= work_metrics(self.flops, rollout.sampled, samples.known, config, contributes=rollout.is_first)
        return metrics, rollout.groups

    def push(self, *, again: bool = False) -> dict[str, float]:
        """The policy's weights into the generator, which then is awake; metrics of the proof. again: as last time."""
        with self.timer.phase("reshard"):
            self.phases.enter("reshard")
            return self.sync.push(self.phases.weights_arrived, again=again)

    def _sharded_reward_model(self, section: PreferenceReward) -> Callable[[Sequence[list[int]]], list[float]]:
        config = self.config
        if section.model is None:
            raise ConfigError("a reward model spread over the ranks needs its `model`, a directory")
        model = ShardedRewardModel(section.model, config.model, config.parallel, section.microbatch_tokens)

        def scores(sequences: Sequence[list[int]]) -> list[float]:
            with self.phases.within("score"):
                return model.scores(sequences)

        return scores

    def _restore_cursor(self, state: CursorState) -> None:
        try:
            self.cursor.load_state_dict(state)
        except ValueError as error:
            raise CheckpointError(
                f"data.prompts is not what the run began with: {error}; use another run_dir"
            ) from error

    def progress(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the policy."""
        return {"cursor": self.cursor.state_dict(), "open_groups": self.collector.state()}

    def close(self) -> None:
        """Stop the reward workers, free the generator, bring what it sampled to disk."""
        with contextlib.ExitStack() as stack:  # all of them, whichever fails
            for part in (self.journal, self.engine, self.scorer):
                stack.callback(part.close)


def run(config: RLStage, runtime: Runtime) -> int:
    """Train to `config.steps` and export RUN_DIR/hf. Returns the exit code."""
    rl = RLTrainer(config, runtime)
    try:
        evaluation = Evaluation(config, runtime, rl.engine, rl.tokenizer, rl.scorer, rl.sampling, rl.phases, rl.start)
        if rl.start == 0:
            evaluation.run(0)
        make_room = functools.partial(rl.phases.enter, "save")
        for step in runtime.steps(rl.trainer, rl.start, config.steps, rl.progress, before_save=make_room):
            with profile_step(runtime.run_dir, step, runtime.rank):
                metrics, groups = rl.step(step)
            metrics |= rates(metrics, rl.timer.finish_step())
            metrics |= evaluation.run(step) if evaluation.is_due(step) else {}
            runtime.write_metrics(step, metrics)
            runtime.write_samples(step, groups)
            del groups  # or a rank holds what two steps sampled
    finally:
        rl.close()
    rl.trainer.enter("save")  # also where there was no step left to do
    exported = runtime.export(rl.policy, rl.hf_config, tokenizer_from=config.model.path)
    return runtime.finished({"checkpoint": str(exported)})


def rates(metrics: dict[str, Any], times: dict[str, float]) -> dict[str, float]:
    """The step's times, and tokens per second of its two big phases."""
    return times | {
        "tokens/rollout_per_second": metrics["tokens/rollout"] / max(times["time/rollout_seconds"], 1e-9),
        "tokens/update_per_second": metrics["tokens/update"] / max(times["time/update_seconds"], 1e-9),
    }
