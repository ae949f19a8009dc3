"""Updates whose experts are dictated (R3) or recorded (R2), with layers recomputed and without, in pipelines too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from r1mega import platform
from r1mega.config.schema import ModelConfig, OptimizerConfig, ParallelConfig, Recompute
from tests.reference import DEEPSEEK
from tests.release import release_models

platform.prepare()

from megatron.core.transformer.moe.router import TopKRouter  # noqa: E402

from r1mega.gpu_check.tensors import gradients_by_name  # noqa: E402
from r1mega.platform import groups  # noqa: E402
from r1mega.train.heads import TokenScores  # noqa: E402
from r1mega.train.packing import Microbatch  # noqa: E402
from r1mega.train.policy import Policy  # noqa: E402
from r1mega.train.samples import pack_samples  # noqa: E402
from r1mega.train.trainer import Trainer  # noqa: E402
from r1mega.types import TrainingSample  # noqa: E402

CONFIG = DEEPSEEK | {"num_hidden_layers": 4}
LAYERS = CONFIG["num_hidden_layers"] - CONFIG["first_k_dense_replace"]
LENGTHS = (9, 14, 6, 11, 8)
"""Of the samples, each a microbatch: an odd number, which interleaved stages fill up."""


def run(cases: list[tuple[dict[str, Any], Recompute, str]]) -> list[list[dict[str, Any]]]:
    """For each layout, recomputation and source of choices ("given": R3; "recorded": R2, with weights that have moved far since;
    "free"), of an update without recomputation and one with: log-probs, how often routers ran, how many different choices they
    made, and how far gradients are from those without, relative to each one's largest.
    """
    groups.init_distributed()
    found = []
    for layout, recompute, source in cases:
        groups.init_parallel(ParallelConfig(**layout), seed=0)
        plain, again = _update(layout, "none", source), _update(layout, recompute, source)
        expected = plain["gradients"]
        for result in (plain, again):
            gradients = result.pop("gradients")
            result["difference"] = max(
                float((gradients[name] - value).abs().max() / value.abs().max().clamp(min=1e-9))
                for name, value in expected.items()
            )
        found.append([plain, again])
        groups.destroy_parallel()
        release_models()
    groups.destroy()
    return found


def _update(layout: dict[str, Any], recompute: Recompute, source: str) -> dict[str, Any]:
    model = ModelConfig(path=Path("unused"), dtype="float32", recompute=recompute)
    policy = Policy(model, CONFIG, ParallelConfig(**layout), seed=1, init_std=0.08)
    trainer = Trainer(policy, OptimizerConfig(lr=0.02), total_steps=9)
    samples = _samples(given=source == "given")
    batches = [pack_samples(samples, [i]) for i in range(len(samples))][policy.replica :: policy.num_replicas]
    if source == "recorded":
        _, batches = policy.recorded_scores(batches, 1.0)
        trainer.update(batches, _loss, total_response_tokens=1)  # afterwards routers would choose otherwise
    captured: dict[str, Any] = {}
    stepping = trainer.optimizer.step

    def step() -> Any:
        captured["gradients"] = gradients_by_name(trainer)
        return stepping()

    trainer.optimizer.step = step
    taken: list[set[str]] = []
    hooks = [
        router.register_forward_hook(lambda _m, _i, outputs: taken.append({str(outputs[1].nonzero().tolist())}))
        for router in _routers(policy)
    ]
    result = trainer.update(batches, _loss, total_response_tokens=1)
    for hook in hooks:
        hook.remove()
    chosen = {choice for one in taken for choice in one}
    return captured | {"log_probs": result.statistics, "runs": len(taken), "kinds": len(chosen)}


def _routers(policy: Policy) -> Iterator[torch.nn.Module]:
    return (module for chunk in policy.chunks for module in chunk.modules() if isinstance(module, TopKRouter))


def _loss(_batch: Microbatch, scores: TokenScores) -> tuple[torch.Tensor, list[float]]:
    return -scores.values.sum(), scores.values.tolist()


def _samples(*, given: bool) -> list[TrainingSample]:
    generator = np.random.default_rng(3)
    samples = []
    for length in LENGTHS:
        scores = generator.random((length - 1, LAYERS, CONFIG["n_routed_experts"]))
        routed = scores.argsort(axis=-1)[..., : CONFIG["num_experts_per_tok"]].astype(np.uint8)
        ids = generator.integers(0, CONFIG["vocab_size"], length).astype(np.int32)
        log_probs = np.zeros(length - 3, np.float32)
        samples.append(TrainingSample(ids, 3, 0.0, log_probs, routed if given else None))
    return samples
