"""Updates whose experts are dictated (R3) or recorded (R2), with layers recomputed and without, in pipelines too."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
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
Map = list[list[int]]
"""(token, expert) of what a router took of a microbatch."""
LENGTHS = (9, 14, 6, 11, 8)
"""Of the samples, each a microbatch: an odd number, which interleaved stages fill up."""


def run(cases: list[tuple[dict[str, Any], Recompute, str]]) -> list[list[dict[str, Any]]]:
    """For each layout, recomputation and source of choices ("given": R3; "late": R3, the first two samples without; "recorded":
    R2, with weights that have moved far since; "free": the same weights, and no choices), of an update without recomputation and
    one with: log-probs; what routers took, by router and microbatch (taken: in forward passes; again: in backward passes;
    asked: what was given, or taken in the recorded pass, and found: the same of the update); the microbatches whose choices a
    router held at the last forward pass (held: without gradients, then in the update); how far gradients are from those without, relative to each one's largest.
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
    samples = _samples(num_free={"given": 0, "late": 2}.get(source, len(LENGTHS)))
    batches = [pack_samples(samples, [i]) for i in range(len(samples))][policy.replica :: policy.num_replicas]
    recorded_maps: list[list[Map]] | None = None
    if source in ("recorded", "free"):
        with _watched(policy) as watched:
            _, recorded = policy.recorded_scores(batches, 1.0)
        recorded_maps = watched.taken
        batches = recorded if source == "recorded" else batches
        trainer.update(batches, _loss, total_response_tokens=1)  # afterwards routers would choose otherwise
    with _watched(policy) as watched:
        policy.scores(batches)
    held = [watched.held]
    captured: dict[str, Any] = {}
    stepping = trainer.optimizer.step

    def step() -> Any:
        captured["gradients"] = gradients_by_name(trainer)
        return stepping()

    trainer.optimizer.step = step
    with _watched(policy) as watched:
        result = trainer.update(batches, _loss, total_response_tokens=1)
    asked, found = _asked(policy, samples, watched.taken)
    if recorded_maps is not None:
        asked, found = ([maps[: len(batches)] for maps in of] for of in (recorded_maps, watched.taken))
    return captured | {
        "log_probs": result.statistics, "taken": watched.taken, "again": watched.again, "held": [*held, watched.held],
        "asked": asked, "found": found,
    }  # fmt: skip


def _routers(policy: Policy) -> list[TopKRouter]:
    return [module for chunk in policy.chunks for module in chunk.modules() if isinstance(module, TopKRouter)]


@dataclass
class _Watched:
    """See `run`."""

    taken: list[list[Map]]
    again: list[list[Map]]
    held: int = 0


@contextlib.contextmanager
def _watched(policy: Policy) -> Iterator[_Watched]:
    routers = _routers(policy)
    watched = _Watched([[] for _ in routers], [[] for _ in routers])

    def after(place: int, router: TopKRouter, _inputs: Any, outputs: Any) -> None:
        again = torch._C._current_graph_task_id() != -1
        (watched.again if again else watched.taken)[place].append(outputs[1].nonzero().tolist())
        if not again:
            megatrons = router.router_replay.replay_backward_list if router.router_replay is not None else []
            watched.held = len(megatrons) + max(len(one.follows) for one in policy._replay._all())

    hooks = [router.register_forward_hook(functools.partial(after, i)) for i, router in enumerate(routers)]
    yield watched
    for hook in hooks:
        hook.remove()


def _asked(
    policy: Policy, samples: list[TrainingSample], taken: list[list[Map]]
) -> tuple[list[list[Map]], list[list[Map]]]:
    """What R3 asks for of each router of this rank, by sample with choices, and what was taken; not of a sample's last token."""
    first = CONFIG["first_k_dense_replace"]
    mine = samples[policy.replica :: policy.num_replicas]
    asked, found = [], []
    for router, maps in zip(_routers(policy), taken, strict=True):
        column = router.layer_number - 1 - first
        pairs = [
            (s.routed_experts[:, column], one)
            for s, one in zip(mine, maps, strict=False)
            if s.routed_experts is not None
        ]
        asked.append([[[row, int(e)] for row, chosen in enumerate(rows) for e in sorted(chosen)] for rows, _ in pairs])
        found.append([[one for one in taken if one[0] < len(rows)] for rows, taken in pairs])
    return asked, found


def _loss(_batch: Microbatch, scores: TokenScores) -> tuple[torch.Tensor, list[float]]:
    return -scores.values.sum(), scores.values.tolist()


def _samples(*, num_free: int) -> list[TrainingSample]:
    generator = np.random.default_rng(3)
    samples = []
    for index, length in enumerate(LENGTHS):
        scores = generator.random((length - 1, LAYERS, CONFIG["n_routed_experts"]))
        routed = scores.argsort(axis=-1)[..., : CONFIG["num_experts_per_tok"]].astype(np.uint8)
        ids = generator.integers(0, CONFIG["vocab_size"], length).astype(np.int32)
        log_probs = np.zeros(length - 3, np.float32)
        samples.append(TrainingSample(ids, 3, 0.0, log_probs, routed if index >= num_free else None))
    return samples
