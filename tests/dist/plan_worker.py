"""One rank of a test of the planner: what a policy and its trainer really hold, counted without the planner."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from r1mega import platform
from r1mega.config.schema import ModelConfig, OptimizerConfig, ParallelConfig
from tests.release import release_models

platform.prepare()

from r1mega.platform import groups  # noqa: E402
from r1mega.train.optimizer import fill_empty_state  # noqa: E402
from r1mega.train.packing import build_microbatch  # noqa: E402
from r1mega.train.policy import Policy  # noqa: E402
from r1mega.train.trainer import Trainer  # noqa: E402


@dataclass(frozen=True, slots=True)
class Case:
    """A model in a layout; tokens: of the microbatch that goes forward."""

    layout: dict[str, Any]
    dtype: str = "float32"
    recompute: str | tuple[str, ...] = "none"
    tokens: int = 64
    optimizer: OptimizerConfig = OptimizerConfig()
    mtp: bool = False  # labels are known, and layers of multi-token prediction have their loss

    @property
    def model(self) -> ModelConfig:
        mtp = 0.3 if self.mtp else 0.0
        return ModelConfig(path="unused", dtype=self.dtype, recompute=self.recompute, mtp_loss_coefficient=mtp)


def run_cases(config: dict[str, Any], cases: list[Case]) -> list[dict[str, Any]]:
    """Bytes that this rank holds, of every case."""
    groups.init_distributed()
    found = []
    for case in cases:
        parallel = ParallelConfig(**case.layout)
        groups.init_parallel(parallel, seed=0)
        found.append(held(config, case, parallel))
        groups.destroy_parallel()
        release_models()
    groups.destroy()
    return found


def held(config: dict[str, Any], case: Case, parallel: ParallelConfig) -> dict[str, Any]:
    policy = Policy(case.model, config, parallel, seed=1, init_std=0.02)
    kept = [kept_bytes(policy, index, case) for index in range(len(policy.chunks))]
    trainer = Trainer(policy, case.optimizer, total_steps=1)
    fill_empty_state(trainer.optimizer)
    weights, gradients = {}, 0
    for chunk, wrapped in zip(policy.chunks, trainer.ddp_chunks, strict=True):
        for tensor in [*chunk.parameters(), *chunk.buffers()]:
            weights[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        buffers = [*wrapped.buffers, *wrapped.expert_parallel_buffers]
        gradients += sum(buffer.grad_data.numel() * buffer.grad_data.element_size() for buffer in buffers)
    state = {"main_params": 0, "exp_avg": 0, "exp_avg_sq": 0}
    for part in getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer]):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.untyped_storage().data_ptr() not in weights:
                    state["main_params"] += parameter.numel() * parameter.element_size()
                for name, held in part.optimizer.state[parameter].items():
                    state["main_params" if name == "master_param" else name] += held.numel() * held.element_size()
    policy.take_reference()
    pinned = [2 ** math.ceil(math.log2(t.numel() * t.itemsize)) for part in policy._reference for t in part.values()]
    return {"weights": sum(weights.values()), "gradients": gradients, **state, "reference": sum(pinned), "kept": kept}


def kept_bytes(policy: Policy, index: int, case: Case) -> int:
    """Of a forward pass through a chunk: storages that autograd saves, parameters apart."""
    parameters = {p.untyped_storage().data_ptr() for chunk in policy.chunks for p in chunk.parameters()}
    chunk, layout = policy.chunks[index], policy.megatron_config
    batch = build_microbatch([[1] * case.tokens], [1], [0])
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage
        return tensor

    if not chunk.pre_process:
        tokens = case.tokens // layout.context_parallel_size
        tokens //= layout.tensor_model_parallel_size if layout.sequence_parallel else 1
        tokens *= 1 + (case.mtp and chunk.post_process and not chunk.mtp_process)
        received = torch.randn(tokens, 1, layout.hidden_size, dtype=policy.dtype, requires_grad=True)
        chunk.set_input_tensor(received)
        saved[received.untyped_storage().data_ptr()] = received.untyped_storage()  # schedules hold it until then
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output, _ = policy.forward(policy.modules[index], batch, mtp_loss=case.mtp)
    if chunk.post_process:  # what a head reads it keeps, too
        saved[output.untyped_storage().data_ptr()] = output.untyped_storage()
    return total(saved.values())


def total(storages: Iterable[torch.UntypedStorage]) -> int:
    return sum(storage.nbytes() for storage in storages)
