"""Stages `zero` and `reasoning_rl`: GRPO. The loop in `run` reads like the recipe; each arrow is a record of types.py."""

from __future__ import annotations

from typing import Any

from r1mega.checkpoint.hf import HFTensors, read_config, write_hf
from r1mega.config.schema import RLStage
from r1mega.data.cursor import PromptCursor
from r1mega.data.prompts import load_prompts
from r1mega.data.tokenizer import load_tokenizer
from r1mega.reward.compose import RewardScorer
from r1mega.rollout.build import build_engine
from r1mega.rollout.groups import GroupCollector
from r1mega.rollout.sampler import GroupSampler, stop_settings
from r1mega.stages.evaluation import Evaluation
from r1mega.stages.rl_metrics import group_metrics
from r1mega.stages.runtime import Runtime
from r1mega.train.grpo_update import update_policy
from r1mega.train.policy import Policy
from r1mega.train.samples import gather_samples, training_samples
from r1mega.types import SamplingSettings
from r1mega.weights.sync import WeightSync


def run(config: RLStage, runtime: Runtime) -> int:
    """Train to `config.steps` and export RUN_DIR/hf. Returns the exit code."""
    timer = runtime.timer
    tokenizer = load_tokenizer(config.model.path)
    prompts = load_prompts(config.data, tokenizer)
    hf_config = read_config(config.model.path)
    policy = Policy(
        config.model, hf_config, config.parallel, config.optimizer,
        total_steps=config.steps * config.update.num_minibatches * config.update.num_epochs, seed=config.seed,
    )  # fmt: skip
    policy.load_hf(HFTensors(config.model.path))
    if config.algorithm.kl_coefficient > 0:
        policy.take_reference()
    cursor = PromptCursor(len(prompts), config.seed)
    start, progress_state = runtime.restore(policy, hf_config)
    if start:
        cursor.load_state_dict(progress_state["cursor"])

    engine = build_engine(config.rollout, config.model, config.weights, config.data.max_prompt_tokens)
    stop_ids, stop_strings = stop_settings(config.rollout.stop, tokenizer)
    sampling = SamplingSettings(
        temperature=config.rollout.temperature, top_p=config.rollout.top_p,
        max_tokens=config.rollout.max_response_tokens, stop_token_ids=stop_ids, stop_strings=stop_strings,
    )  # fmt: skip
    sync = WeightSync(policy, engine, config.weights, hf_config, [prompt.token_ids for prompt in prompts])
    with RewardScorer(config.reward, max_response_tokens=config.rollout.max_response_tokens) as scorer:
        sampler = GroupSampler(engine, tokenizer, scorer, sampling, config.rollout.group_size, timer)
        collector = GroupCollector(sampler, prompts, cursor, config)
        evaluation = Evaluation(config, engine, tokenizer, scorer, sampling, runtime)
        sync.push()
        if start == 0:
            evaluation.run(0)
        with runtime.progress(total=config.steps, done=start):
            for step in range(start + 1, config.steps + 1):
                timer.start_step()
                groups = collector.collect(step)  # rollout, reward
                if config.rollout.sleep:
                    engine.sleep()
                samples = gather_samples(training_samples(groups, config.algorithm), collector.contributes)
                metrics = update_policy(policy, samples, config, step, timer)  # log-prob, update
                refresh = config.algorithm.reference_refresh_steps
                if config.algorithm.kl_coefficient > 0 and refresh is not None and step % refresh == 0:
                    policy.take_reference()
                with timer.phase("reshard"):
                    metrics |= sync.push()  # reshard, and its proof
                metrics |= group_metrics(groups, contributes=collector.contributes) | collector.metrics()
                metrics |= evaluation.run(step) if evaluation.due(step) else {}
                metrics |= _rates(metrics, timer.finish_step())
                runtime.write_metrics(step, metrics)
                runtime.write_samples(step, groups)
                stopping = runtime.stop_requested()
                if step % config.checkpoint.every_steps == 0 or step == config.steps or stopping:
                    runtime.save(policy, step, {"cursor": cursor.state_dict()})
                if stopping and step < config.steps:
                    return runtime.stopped(step)
    engine.close()
    write_hf(
        runtime.run_dir / "hf", policy.hf_tensors(), hf_config,
        tokenizer_from=config.model.path, write=runtime.is_main,
    )  # fmt: skip
    return runtime.finished({"checkpoint": str(runtime.run_dir / "hf")} | evaluation.summary())


def _rates(metrics: dict[str, Any], times: dict[str, float]) -> dict[str, float]:
    return times | {
        "tokens/rollout_per_second": metrics["tokens/rollout"] / max(times["time/rollout_seconds"], 1e-9),
        "tokens/update_per_second": metrics["tokens/update"] / max(times["time/update_seconds"], 1e-9),
    }
