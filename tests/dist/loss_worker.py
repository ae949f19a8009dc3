"""Every correction and loss variant through `update_policy`, on however many ranks, in each of several layouts."""

from __future__ import annotations

import math
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from r1mega import platform
from r1mega.config.schema import DataConfig, ModelConfig, OptimizerConfig, ParallelConfig, RolloutConfig
from r1mega.config.stages.rl import AlgorithmConfig, RLStage, UpdateConfig
from r1mega.types import KeptIds, TrainingSample
from tests.policy_reference import SETTINGS
from tests.reference import DENSE
from tests.release import release_models

platform.prepare()

from r1mega.observe.trace import PhaseTimer  # noqa: E402
from r1mega.platform import groups  # noqa: E402
from r1mega.train.grpo_update import update_policy  # noqa: E402
from r1mega.train.policy import Policy  # noqa: E402
from r1mega.train.trainer import Trainer  # noqa: E402

MODEL = DENSE | {"model_type": "qwen3", "head_dim": 16, "num_hidden_layers": 2}
RLOO = {"baseline": "leave_one_out", "normalize_std": False}
RECOMPUTE = {"old_log_probs": "recompute"}
VARIANTS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "grpo_recompute": RECOMPUTE,
    "dr_grpo": {"normalize_std": False, "loss_aggregation": "constant"},
    "gspo": {"ratio": "sequence"},
    "cispo": {"surrogate": "cispo"},
    "sapo": {"surrogate": "sapo"},
    "gmpo": {"surrogate": "gmpo"},
    "two_sided": {"dual_clip": 1.25},
    "kl_bias_correction": {"kl_bias_correction": True},
    "kl_in_reward": {"normalize_std": False, "kl_in": "reward"},
    "rloo": RLOO | {"kl_in": "reward"},
    "reinforce++": {"baseline": "none", "normalize_std": False, "whiten": True, "kl_in": "reward"},
    "reinforce++_baseline": {"normalize_std": False, "whiten": True},
    "tis": RECOMPUTE | {"importance_cap": 1.1},
    "sequence_tis": RECOMPUTE | {"importance_cap": 1.5, "importance_level": "sequence"},
    "icepop": RECOMPUTE | {"importance_cap": 1.3, "off_policy": {"mask": "token", "mask_low": 0.8, "mask_high": 1.3}},
    "mis": RECOMPUTE | {
        "importance_cap": 2.0, "importance_level": "sequence",
        "off_policy": {"mask": "sequence", "mask_low": 0.0, "mask_high": 2.0},
    },
    "geometric_mask": RECOMPUTE | {
        "importance_cap": 2.0, "off_policy": {"mask": "geometric", "mask_low": 0.95, "mask_high": 1.2},
    },
    "sequence_masking": {"off_policy": {"max_divergence": 0.05}, "ratio": "sequence"},
    "reject": RECOMPUTE | {"off_policy": {"reject_ratio": 0.45, "reject_kl": 0.12}},
}  # fmt: skip


KEPT = {"kept", "kept_hidden"}
"""One variant more, from logits and from hidden states in one pass: of responses whose tokens were drawn from a few ids each, but
for every fourth response. Where the vocabulary is cut over ranks these alone are run."""


def with_kept(sample: TrainingSample, number: int) -> TrainingSample:
    generator, lists = np.random.default_rng(number), []
    for token in sample.token_ids[sample.prompt_length :]:
        others = generator.choice(MODEL["vocab_size"], generator.integers(0, 12), replace=False)
        lists.append(np.unique(np.append(others, token)))
    kept = KeptIds.of(lists)
    noise = 0.3 * generator.normal(size=len(kept))
    return replace(sample, kept=kept, sampler_log_probs=(noise - np.log(kept.counts)).astype(np.float32))


def make_samples() -> list[TrainingSample]:
    """Three prompts' responses; the sampler's log-probs are off by up to a third."""
    generator, samples = np.random.default_rng(0), []
    for number, (prompt, lengths) in enumerate([(3, (9, 1, 15)), (5, (4, 11, 7)), (2, (3, 8))]):
        for place, length in enumerate(lengths):
            samples.append(
                TrainingSample(
                    token_ids=generator.integers(0, MODEL["vocab_size"], prompt + length).astype(np.int32),
                    prompt_length=prompt,
                    advantage=float((-1) ** (place + number)),
                    sampler_log_probs=(-math.log(MODEL["vocab_size"]) + 0.3 * generator.normal(size=length)).astype(
                        np.float32
                    ),
                    reward=float(place % 2),
                    opens_group=place == 0,
                )
            )
    return samples


def drawn(name: str, shape: torch.Size) -> torch.Tensor:
    """The same weights in any layout."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * 0.03


def make_trainer(layout: dict[str, Any], log_probs: Literal["logits", "hidden"]) -> Trainer:
    model = ModelConfig(path=Path("unused"), dtype="float32", log_probs=log_probs)
    policy = Policy(model, MODEL, ParallelConfig(**layout), seed=1, init_std=0.04)
    policy.load_hf({name: drawn(name, value.shape) for name, value in policy.hf_tensors()})
    policy.take_reference()
    return Trainer(policy, OptimizerConfig(**SETTINGS, lr=1e-5), total_steps=1000)


def run_variants(layouts: list[dict[str, Any]], steps: int = 2) -> list[dict[str, list[dict[str, float | None]]]]:
    """[{variant: the metrics of its steps}] of each layout; one model takes all of the steps, at a tiny learning rate."""
    groups.init_distributed()
    found = []
    for layout in layouts:
        groups.init_parallel(ParallelConfig(**layout), seed=0)
        groups.seed_all(0)
        trainer = make_trainer(layout, "logits")
        samples, metrics = make_samples(), {}
        kept = [with_kept(sample, i) if i % 4 else sample for i, sample in enumerate(samples)]
        every = dict.fromkeys(sorted(KEPT), RECOMPUTE | {"importance_cap": 1.1})
        for name, algorithm in every.items() if layout.get("tp") else (VARIANTS | every).items():
            if name in KEPT:
                trainer = make_trainer(layout, "hidden" if name == "kept_hidden" else "logits")
            config = RLStage(
                stage="zero", run_dir=Path("unused"), model=ModelConfig(path=Path("unused")),
                data=DataConfig(prompts=()), rollout=RolloutConfig(temperature=0.9, max_response_tokens=16),
                update=UpdateConfig(num_minibatches=2, microbatch_tokens=40),
                algorithm=AlgorithmConfig(**({"kl_coefficient": 0.1, "old_log_probs": "rollout"} | algorithm)),
            )  # fmt: skip
            members = kept if name in KEPT else samples
            metrics[name] = [update_policy(trainer, members, config, step, PhaseTimer()) for step in range(steps)]
        found.append(metrics)
        groups.destroy_parallel()
        release_models()
    groups.destroy()
    return found
