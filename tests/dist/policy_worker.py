"""One rank of a policy test: steps of RL and of pre-training through `Trainer`, compared with what one process computed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from r1mega import platform
from r1mega.config.schema import MegatronConfig, ModelConfig, OptimizerConfig, ParallelConfig
from tests.policy_reference import LEARNING_RATE, RATE, SETTINGS, TEMPERATURE, Expected, Step, rounded
from tests.release import release_models

platform.prepare()

from megatron.core import parallel_state  # noqa: E402

from r1mega.checkpoint.hf_state import coordinates, local_entries, model_shape  # noqa: E402
from r1mega.checkpoint.name_rules import to_local  # noqa: E402
from r1mega.checkpoint.store import MODEL_METADATA  # noqa: E402
from r1mega.gpu_check.policy import rl_step  # noqa: E402
from r1mega.gpu_check.tensors import gradients_by_name, make_gradients_whole  # noqa: E402
from r1mega.platform import groups  # noqa: E402
from r1mega.train import trainer as trainer_module  # noqa: E402
from r1mega.train.heads import TokenScores  # noqa: E402
from r1mega.train.optimizer import SHARDING_METADATA  # noqa: E402
from r1mega.train.policy import Policy  # noqa: E402
from r1mega.train.samples import pack_samples  # noqa: E402
from r1mega.train.trainer import Trainer  # noqa: E402
from tests.dist.convert_worker import saves_what_ranks_hold  # noqa: E402


@dataclass(frozen=True, slots=True)
class Case:
    """What is trained ('grpo', or 'labels': cross-entropy with MTP), in which layout; microbatch_tokens: packing target."""

    kind: str
    layout: dict[str, Any]
    model: str = "deepseek"
    microbatch_tokens: int = 40
    ratio: str = "token"
    aux: float = 0.0
    log_probs: str = "logits"
    dtype: str = "float32"
    recompute: str | tuple[str, ...] = "none"
    offload: tuple[str, ...] = ()
    megatron: dict[str, Any] = field(default_factory=dict)  # keys of model.megatron
    kept: bool = False  # tokens were drawn from a few ids each
    overlap: bool = False  # gradients are reduced, and weights gathered, by many small buckets beside the passes

    @property
    def file(self) -> str:
        """Where the expectation of such cases lies."""
        return " ".join([self.model, self.kind, self.ratio, str(self.aux), self.dtype, *["kept"] * self.kept]) + ".pt"

    @property
    def name(self) -> str:
        sizes = [f"{k}{v}" for k, v in self.layout.items()] or ["dp"]
        further = (
            [self.model] * (self.model != "deepseek")
            + [self.ratio] * (self.ratio != "token")
            + ["aux"] * (self.aux > 0)
        )
        further += [self.log_probs] * (self.log_probs != "logits") + [self.dtype] * (self.dtype != "float32")
        if self.recompute != "none":
            further += ["recompute", *([self.recompute] if isinstance(self.recompute, str) else self.recompute)]
        further += ["offload", *self.offload] * bool(self.offload)
        further += [*self.megatron] + ["kept"] * self.kept + ["overlap"] * self.overlap
        return " ".join([self.kind, *sizes, *further])


def run_cases(directory: Path, cases: list[Case]) -> dict[str, dict[str, float]]:
    """{name: measured differences} of every case, one after the other in this process."""
    groups.init_distributed()
    results = {}
    layouts = {str(case.layout): case.layout for case in cases}
    for name, layout in layouts.items():  # each once: making groups takes time
        groups.init_parallel(ParallelConfig(**layout), seed=0)
        for case in (case for case in cases if str(case.layout) == name):
            groups.seed_all(0)
            expected = torch.load(directory / case.file, weights_only=False)
            results[case.name] = compare(expected, take_steps(case, expected))
        groups.destroy_parallel()
        release_models()
    groups.destroy()
    return results


def one_rank(directory: Path, cases: list[Case]) -> None:
    """Make the expectation of cases that transformers has no part for, with one process."""
    for case in cases:
        expected = torch.load(directory / case.file, weights_only=False)
        groups.init_parallel(ParallelConfig(), seed=0)
        wide = dataclasses.replace(case, dtype="float32")
        steps, state = take_steps(wide, expected, keep_gradients=True)
        if case.dtype == "bfloat16":
            rounded_steps, _ = take_steps(case, expected, keep_gradients=True)
            expected.rounded_steps = [Step(**step) for step in rounded_steps]
        expected.steps = [Step(**step) for step in steps]
        expected.state_after = {n: rounded(n, t, case.dtype) for n, t in state.items()}
        torch.save(expected, directory / case.file)
        groups.destroy()


def take_steps(
    case: Case, expected: Expected, keep_gradients: bool = False
) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """(log-probs, loss, gradients, norm of two optimizer steps; the weights after them)."""
    model = ModelConfig(
        path="unused", dtype=case.dtype, expert_bias_update_rate=RATE if expected.config.get("n_routed_experts") else 0.0,
        mtp_loss_coefficient=0.3 if case.kind == "labels" else 0.0, sequence_aux_loss_coefficient=case.aux,
        log_probs=case.log_probs, recompute=case.recompute, offload_modules=case.offload,
        megatron=MegatronConfig(**case.megatron),
    )  # fmt: skip
    policy = Policy(model, expected.config, ParallelConfig(**case.layout), seed=1)
    policy.load_hf(expected.state)
    policy.take_reference()
    settings = OptimizerConfig(
        **SETTINGS, lr=LEARNING_RATE, overlap_grad_reduce=case.overlap, overlap_param_gather=case.overlap
    )
    with small_buckets():
        trainer = Trainer(policy, settings, total_steps=9)
    if case.overlap and parallel_state.is_pipeline_first_stage():  # on others Megatron makes one
        assert any(len(buffer.buckets) > 1 for chunk in trainer.ddp_chunks for buffer in chunk.buffers)
    captured: dict[str, Any] = {}
    stepping = trainer.optimizer.step

    def step() -> Any:
        captured["gradients"] = (
            gradients_by_name(trainer) if keep_gradients else gradients(trainer, expected.steps[len(steps)].gradients)
        )
        return stepping()

    trainer.optimizer.step = step
    steps: list[dict[str, Any]] = []
    samples = expected.samples
    batches = [pack_samples(samples, part) for part in ([0], range(1, len(samples)))]  # one alone, the others together
    lengths = [sample.response_length for sample in samples]
    for number in (1, 2):
        log_probs = list(torch.cat(policy.log_probs(batches, TEMPERATURE)).split(lengths))
        if case.kind == "grpo":
            loss, norm = rl_step(
                trainer, samples, number, microbatch_tokens=case.microbatch_tokens, temperature=TEMPERATURE,
                ratio=case.ratio, kl_coefficient=expected.kl_coefficient,
            )  # fmt: skip
        else:
            loss, norm = labels_step(trainer, samples)
        steps.append({"log_probs": log_probs, "loss": loss, "norm": norm, "gradients": captured["gradients"]})
    if case.overlap:
        model = policy.sharded_weights(SHARDING_METADATA | MODEL_METADATA)
        assert all(
            saves_what_ranks_hold(part, model) for part in trainer.optimizer.chained_optimizers
        )  # of several buckets
    return steps, {name: tensor.clone() for name, tensor in policy.hf_tensors()}


@contextlib.contextmanager
def small_buckets() -> Iterator[None]:
    """Inside, buckets that Megatron makes (where it overlaps) have 20,000 elements, not 40 million."""
    whole = trainer_module.DistributedDataParallelConfig
    trainer_module.DistributedDataParallelConfig = functools.partial(whole, bucket_size=20_000)
    try:
        yield
    finally:
        trainer_module.DistributedDataParallelConfig = whole


def labels_step(trainer: Trainer, samples: list[Any]) -> tuple[float, float]:
    """Mean cross-entropy of the responses plus the MTP loss; two samples a microbatch."""
    policy = trainer.policy
    pairs = [[i, i + 1] for i in range(0, len(samples), 2)]
    batches = [pack_samples(samples, pair) for pair in pairs[policy.replica :: policy.num_replicas]]
    total = sum(s.response_length for s in samples)

    def loss(_batch: Any, scores: TokenScores) -> tuple[torch.Tensor, float]:
        value = -scores.values.sum() / total
        return value, float(value.detach())

    result = trainer.update(batches, loss, total_response_tokens=total, mtp_loss=True)
    value = torch.tensor(sum(result.statistics) if policy.reports else 0.0, dtype=torch.float64)
    dist.all_reduce(value)
    return float(value), result.grad_norm


def gradients(trainer: Trainer, expected: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The largest relative difference of a gradient from its part of the expected one, and its name."""
    make_gradients_whole(trainer)
    place, worst = coordinates(), (0.0, "")
    for chunk in trainer.policy.chunks:
        shape, parameters = model_shape(chunk), dict(chunk.named_parameters())
        for entry, _ in local_entries([chunk]):
            if entry.name not in parameters:
                continue
            rank, ranks = (place.etp_rank, place.etp) if entry.expert is not None else (place.tp_rank, place.tp)
            want = to_local([expected[n] for n in entry.hf_names], entry, shape, rank, ranks)
            difference = (parameters[entry.name].main_grad - want).abs().max()
            scale = max(expected[n].abs().max() for n in entry.hf_names)
            worst = max(worst, (float(difference / scale.clamp(min=1e-6)), entry.name))
    return worst


def compare(expected: Expected, found: tuple[list[dict], dict[str, torch.Tensor]]) -> dict[str, Any]:
    steps, state = found
    result: dict[str, Any] = {}
    for number, (want, have) in enumerate(zip(expected.steps, steps, strict=True), 1):
        pairs = zip(want.log_probs, have["log_probs"], strict=True)
        result[f"log_probs {number}"] = max(float((a - b).abs().max()) for a, b in pairs)
        result[f"loss {number}"] = abs(want.loss - have["loss"])
        result[f"norm {number}"] = abs(want.norm - have["norm"]) / want.norm
        result[f"gradients {number}"], result[f"worst {number}"] = have["gradients"]
    assert state.keys() == expected.state_after.keys()
    result["weights"], result["worst weights"] = max(
        (weight_difference(state[name], value), name) for name, value in expected.state_after.items()
    )
    if expected.dtype == "bfloat16":
        unequal = sum(int((state[name] != value).sum()) for name, value in expected.state_after.items())
        result["unequal weights"] = unequal / sum(value.numel() for value in state.values())
    return result


def weight_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest, in bfloat16 over one spacing: a weight that is nearly between two of its values may become either."""
    difference = (found - expected).abs()
    if found.dtype == torch.bfloat16:
        difference = (difference - 2**-7 * expected.abs()).clamp(min=0)
    return float(difference.max())
