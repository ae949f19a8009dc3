"""A rank of the test of the planner over Transformer Engine's layers: what they keep from forward to backward."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.pipeline_parallel.fine_grained_activation_offload import PipelineOffloadManager

from r1mega.config.schema import MegatronConfig, ModelConfig, OptimizerConfig, ParallelConfig
from r1mega.platform import groups
from r1mega.train.packing import build_microbatch
from r1mega.train.policy import Policy
from r1mega.train.trainer import Trainer
from tests.dist.plan_worker import total
from tests.release import release_models

SMALLEST = 4096
"""Numbers of a tensor that is offloaded."""


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """A model in a layout; skip: layers at either end without FP8; tokens: of the microbatch that goes forward."""

    layout: dict[str, Any]
    fp8: str = "off"
    recompute: str | tuple[str, ...] = "none"
    mtp: bool = False
    skip: tuple[int, int] = (0, 0)
    tokens: int = 256
    offload: tuple[str, ...] = ()

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(
            path="unused", fp8=self.fp8, recompute=self.recompute, mtp_loss_coefficient=0.1 if self.mtp else 0.0,
            fp8_skip_first_layers=self.skip[0], fp8_skip_last_layers=self.skip[1], offload_modules=self.offload,
            megatron=MegatronConfig(min_offloaded_tensor_size=SMALLEST),
        )  # fmt: skip


class Flash(torch.autograd.Function):
    """What a fused attention keeps: its arguments, its result and a number a row and head."""

    @staticmethod
    def forward(ctx, query, key, value):
        out = query.new_empty((*query.shape[:-1], value.shape[-1]))
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out.flatten(-2)

    @staticmethod
    def backward(ctx, grad):
        query, key, value, _, _ = ctx.saved_tensors
        return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)


def run_cases(config: dict[str, Any], cases: list[Case]) -> list[dict[str, Any]]:
    """By case: bytes kept by a chunk, and those of weights that were quantised, after a pass without gradients and after one with."""
    groups.init_distributed()
    found = []
    for case in cases:
        parallel = ParallelConfig(**case.layout)
        groups.init_parallel(parallel, seed=0)
        policy = Policy(case.model, config, parallel, seed=1, init_std=0.02)
        found.append(kept(policy, case))
        del policy
        release_models()
        groups.destroy_parallel()
    groups.destroy()
    return found


def workspaces(policy: Policy) -> Iterator[torch.Tensor]:
    """What Transformer Engine's layers have of their weights in FP8: numbers and scales."""
    for chunk in policy.chunks:
        for module in chunk.modules():
            for held in getattr(module, "_fp8_workspaces", {}).values():
                yield from (v for v in vars(held).values() if torch.is_tensor(v))


def quantised_bytes(policy: Policy) -> int:
    """Of these."""
    return total({t.untyped_storage()._cdata: t.untyped_storage() for t in workspaces(policy)}.values())


def kept(policy: Policy, case: Case) -> dict[str, Any]:
    """Storages that autograd saves in a forward pass, parameters apart. Attention is a fused one's."""
    for chunk in policy.chunks:
        for module in chunk.modules():
            if hasattr(module, "core_attention"):
                module.core_attention.forward = lambda q, k, v, *_, **__: Flash.apply(q, k, v)
    batch = build_microbatch([[1] * case.tokens], [1], [0])
    policy.log_probs([batch])
    asked = quantised_bytes(policy)
    PipelineOffloadManager.reset_instance()
    # columns would come in the backward pass alone, of copies that are there
    for module in (module for chunk in policy.chunks for module in chunk.modules()):
        getattr(module, "_fp8_workspaces", {}).clear()
    found, moved = [], []
    for index in range(len(policy.chunks)):
        chunk, layout = policy.chunks[index], policy.megatron_config
        saved: dict[int, torch.Tensor] = {}  # by storages, not by addresses: those of emptied ones are taken again

        def pack(tensor: torch.Tensor, saved: dict[int, torch.Tensor] = saved) -> torch.Tensor:
            saved[tensor.untyped_storage()._cdata] = tensor
            return tensor

        if not chunk.pre_process:
            tokens = case.tokens // layout.context_parallel_size
            tokens //= layout.tensor_model_parallel_size if layout.sequence_parallel else 1
            chunk.set_input_tensor(torch.randn(tokens, 1, layout.hidden_size, dtype=policy.dtype, requires_grad=True))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output, _ = policy.forward(policy.modules[index], batch, mtp_loss=case.mtp)
        if chunk.post_process:
            saved[output.untyped_storage()._cdata] = output
        apart = {t.untyped_storage()._cdata for t in [*chunk.parameters(), *workspaces(policy)]}
        stays = {key: t for key, t in saved.items() if key not in apart}
        if case.offload:
            handler = PipelineOffloadManager.get_instance().cur_forward_chunk()
            groups_of = [group._tensors.values() for group in handler.offload_groups]
            left = [t for tensors in groups_of for t in tensors if torch.is_tensor(t)]
            stays |= {t.untyped_storage()._cdata: t for t in left if t.untyped_storage()._cdata not in apart}
            moved.append(sum(t[1].nbytes for tensors in groups_of for t in tensors if isinstance(t, tuple)))
        found.append(total(t.untyped_storage() for t in stays.values()))
    quantised = quantised_bytes(policy)
    Trainer(policy, OptimizerConfig(), total_steps=1).enter("rollout")
    PipelineOffloadManager.reset_instance()
    return {
        "kept": found,
        "moved": moved,
        "asked": asked,
        "quantised": quantised,
        "left": len(list(workspaces(policy))),
    }
