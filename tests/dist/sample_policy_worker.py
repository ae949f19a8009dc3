"""Updates and reward models whose samples each rank has a part of, against those that have all of them, in several layouts."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from r1mega import platform
from r1mega.config.schema import DataConfig, ModelConfig, ParallelConfig, RolloutConfig
from r1mega.config.stages.rl import AlgorithmConfig, RLStage, UpdateConfig
from tests.reference import DEEPSEEK
from tests.release import release_models

platform.prepare()

from r1mega.checkpoint.hf import write_hf  # noqa: E402
from r1mega.gpu_check.policy import HF, OPTIMIZER, make_samples  # noqa: E402
from r1mega.model.reward_head import SCORE, classifier_config, initial_head  # noqa: E402
from r1mega.observe.trace import PhaseTimer  # noqa: E402
from r1mega.platform import groups  # noqa: E402
from r1mega.train.grpo_update import update_policy  # noqa: E402
from r1mega.train.policy import Policy  # noqa: E402
from r1mega.train.reward_model import PreferenceSample, ShardedRewardModel, preference_scores  # noqa: E402
from r1mega.train.sample_exchange import SampleExchange  # noqa: E402
from r1mega.train.trainer import Trainer  # noqa: E402

WORLD = 4
MODEL = HF | {
    "hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 32, "q_lora_rank": 48, "kv_lora_rank": 32,
    "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 24,
}  # fmt: skip
"""The one that the samples are made for, narrow: what is compared is bits of one code with those of the same code."""
CLASSIFIER = DEEPSEEK | {"architectures": ["DeepseekV3ForCausalLM"], "rope_interleave": True}


def run_layouts(layouts: list[tuple[dict[str, Any], int]], directory: Path) -> list[dict[str, Any]]:
    """For each layout and ranks of a generator: metrics of a step of four updates with all samples here, and with a part, and
    digests of the weights then (None: before); scores of a reward model likewise.
    """
    groups.init_distributed()
    found = []
    for layout, generator_tp in layouts:
        parallel = ParallelConfig(**layout)
        groups.init_parallel(parallel, seed=0)
        metrics, weights, sent = {}, dict[bool | None, str](), 0
        for spread in (False, True):
            groups.seed_all(0)
            trainer = _make_trainer(parallel)
            exchange = SampleExchange.of(trainer.policy, generator_tp)
            weights[None] = _digest(trainer.policy)
            metrics[spread] = _step(trainer, exchange, generator_tp if spread else None)
            weights[spread] = _digest(trainer.policy)
            sent = exchange.bytes_sent
        scores, expected = _scores(parallel, directory)
        found.append({"metrics": metrics, "weights": weights, "sent": sent, "scores": scores, "expected": expected})
        groups.destroy_parallel()
        release_models()
    groups.destroy()
    return found


def _make_trainer(layout: ParallelConfig) -> Trainer:
    model = ModelConfig(path=Path("unused"), dtype="float32", expert_bias_update_rate=0.01)
    policy = Policy(model, MODEL, layout, seed=1, init_std=MODEL["initializer_range"])
    return Trainer(policy, OPTIMIZER, total_steps=9)


def _digest(policy: Policy) -> str:
    """Of all weights, by every bit."""
    digest = hashlib.blake2b()
    for name, value in policy.hf_tensors():
        digest.update(name.encode() + value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _step(trainer: Trainer, exchange: SampleExchange, generator_tp: int | None) -> dict[str, float | None]:
    """generator_tp: None: each rank has all samples."""
    config = RLStage(
        stage="zero", run_dir=Path("unused"), model=ModelConfig(path=Path("unused")), data=DataConfig(prompts=()),
        rollout=RolloutConfig(temperature=0.9),
        update=UpdateConfig(num_minibatches=2, num_epochs=2, microbatch_tokens=128),
        algorithm=AlgorithmConfig(old_log_probs="recompute", kl_coefficient=0.0, normalize_std=False, whiten=True),
    )  # fmt: skip
    samples: Any = make_samples("given")
    if generator_tp:
        count = len(samples) * generator_tp // WORLD
        samples = exchange.index(samples[dist.get_rank() // generator_tp * count :][:count])
    return update_policy(trainer, samples, config, 1, PhaseTimer())


def _scores(parallel: ParallelConfig, directory: Path) -> tuple[list[float], list[float]]:
    """(of this rank's sequences, by the exchange; of the same, where every rank has all)."""
    generator = random.Random(1)
    sequences = [[generator.randrange(3, 90) for _ in range(generator.randrange(2, 15))] for _ in range(11)]
    model = ModelConfig(path=Path("unused"), dtype="float32")
    if not directory.exists():
        policy = Policy(model, CLASSIFIER, parallel, seed=1, init_std=0.05, scalar_head=True)
        state = {name: value.clone() for name, value in policy.hf_tensors()}
        state[SCORE] = initial_head(CLASSIFIER["hidden_size"], seed=5)
        dist.barrier()
        if dist.get_rank() == 0:
            write_hf(directory, state.items(), classifier_config(CLASSIFIER, {"template": "nano", "reads": "summary"}))
        dist.barrier()
    sharded = ShardedRewardModel(directory, model, parallel, capacity=32)
    wanted = range(2 * dist.get_rank(), 2 * dist.get_rank() + 5)  # some on several
    samples = [PreferenceSample((tuple(sequence),), 0.0, ()) for sequence in sequences]
    expected = preference_scores(sharded._policy, samples, 32)[:, 0].tolist()
    return sharded.scores([sequences[i] for i in wanted]), [expected[i] for i in wanted]
