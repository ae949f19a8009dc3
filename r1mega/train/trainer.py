"""What updates a policy: gradient buffers, Megatron's distributed optimizer, the learning-rate schedule."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic

import torch
import torch.distributed as dist

from r1mega import platform

platform.prepare()  # before the first import of megatron

from megatron.core import parallel_state  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)

from r1mega.checkpoint.store import MODEL_METADATA  # noqa: E402
from r1mega.config.schema import MemoryConfig, OptimizerConfig  # noqa: E402
from r1mega.errors import NonFiniteError  # noqa: E402
from r1mega.train.heads import TokenScores  # noqa: E402
from r1mega.train.memory import TrainerMemory  # noqa: E402
from r1mega.train.optimizer import (  # noqa: E402
    SHARDING_METADATA,
    build_optimizer,
    fill_empty_state,
    learning_rate_schedule,
    parts,
)
from r1mega.train.phases import Phase, PhasePlan, plan_phases  # noqa: E402
from r1mega.train.policy import B, Loss, Policy, S  # noqa: E402


@dataclass(frozen=True, slots=True)
class UpdateResult(Generic[S]):
    """grad_norm: before clipping; lr: of this step; statistics: what the loss returned, per microbatch;
    expert_load: max over mean of tokens per expert, averaged over MoE layers (1 is perfect balance; None without experts).
    """

    grad_norm: float
    lr: float
    statistics: list[S]
    expert_load: float | None


class Trainer:
    """Optimizer steps on a policy, and the whole state of a run in checkpoints.

    policy: with its weights, of which the optimizer keeps float32 copies from here on.
    """

    def __init__(self, policy: Policy, optimizer: OptimizerConfig, *, total_steps: int, plan: PhasePlan | None = None):
        """plan: what is where in which phase; None: all stays on the device. Raises RuntimeError for a policy that has a
        trainer.
        """
        if policy.has_trainer:
            raise RuntimeError("the policy has a trainer, whose optimizer keeps copies of its weights; use that one")
        self.policy = policy
        config = policy.megatron_config
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=optimizer.grad_reduce_in_fp32,
            use_distributed_optimizer=True,
            overlap_grad_reduce=optimizer.overlap_grad_reduce,
            overlap_param_gather=optimizer.overlap_param_gather,
        )
        self.ddp_chunks = [DistributedDataParallel(config, ddp_config, module) for module in policy.modules]
        policy.modules, policy.has_trainer = list(self.ddp_chunks), True
        self.optimizer = build_optimizer(optimizer, self.ddp_chunks, policy.dtype)
        self.scheduler = learning_rate_schedule(self.optimizer, optimizer, total_steps)
        self._memory = TrainerMemory(plan or plan_phases(MemoryConfig()), self.ddp_chunks, parts(self.optimizer))
        config.grad_scale_func = self.optimizer.scale_loss
        config.finalize_model_grads_func = self._finalize_gradients
        if optimizer.overlap_grad_reduce:
            self._overlap_reduction()
        self._overlaps_gather = self._must_gather = optimizer.overlap_param_gather  # Megatron's first pass would gather
        policy.settle = self._gather_weights
        self._expert_load: float | None = None

    def _overlap_reduction(self) -> None:
        """What Megatron's schedules ask for: gradients are reduced in the last microbatch's backward pass, and not before."""
        waiting = [chunk.no_sync for chunk in self.ddp_chunks]
        starting = [chunk.start_grad_sync for chunk in self.ddp_chunks]
        config, single = self.policy.megatron_config, len(self.ddp_chunks) == 1
        config.no_sync_func = waiting[0] if single else waiting
        config.grad_sync_func = starting[0] if single else starting

    def _gather_weights(self) -> None:
        """Make weights whole that the last step left to the next update's forward pass. A collective call, if it did."""
        if self._must_gather:
            for chunk in self.ddp_chunks:
                chunk.start_param_sync(force_sync=True)
            self._must_gather = False

    def enter(self, phase: Phase) -> None:
        """Move weights, gradients and optimizer state to where the plan wants them in this phase; a new trainer has all on
        the device. What changes or saves state enters its phase itself. A collective call after an update that overlaps.
        """
        if phase not in ("update", "step"):
            self._gather_weights()
        self._memory.enter(phase)

    @contextlib.contextmanager
    def as_reference(self) -> Iterator[None]:
        """`Policy.as_reference`, in the phase of that name; afterwards it is `logprob`."""
        self.enter("reference")
        try:
            with self.policy.as_reference():
                yield
        finally:
            self.enter("logprob")

    def update(
        self,
        microbatches: Sequence[B],
        loss: Loss[B, S],
        *,
        temperature: float = 1.0,
        total_response_tokens: int,
        mtp_loss: bool = False,
        of_tokens: bool = False,
    ) -> UpdateResult[S]:
        """One optimizer step on the sum of the microbatches' losses (over all data-parallel ranks).

        total_response_tokens: R summed over this step's microbatches on all data-parallel ranks. Megatron divides
        gradients by it; the loss is multiplied by it first, so that the caller's loss is minimised as it stands.
        mtp_loss: add the loss of the multi-token-prediction layers, if the model has them (pre-training and SFT:
        the tokens are to be imitated); entropies are then not computed. of_tokens: see `Policy.run`.
        Raises NonFiniteError when the gradient norm is not finite; the weights are then lost, the last checkpoint is not.
        """
        self.scheduler.step(1)  # first, so that a warm-up of n steps starts at lr / n and not at 0
        self.enter("update")
        for chunk in self.ddp_chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

        def scaled(batch: B, scores: TokenScores) -> tuple[torch.Tensor, S]:
            value, statistics = loss(batch, scores)
            return value * total_response_tokens, statistics

        self._must_gather = False  # the forward pass does
        further = mtp_loss and bool(self.policy.megatron_config.mtp_num_layers)
        statistics = self.policy.run(
            microbatches, scaled, temperature, forward_only=False, mtp_loss=further, of_tokens=of_tokens
        )
        lr = self.optimizer.param_groups[0]["lr"]
        self.enter("step")
        stepped, grad_norm, _ = self.optimizer.step()
        self.optimizer.zero_grad()  # copies in float32, where the buffers are not
        self._must_gather = self._overlaps_gather
        if not stepped or not math.isfinite(float(grad_norm)):
            raise NonFiniteError(
                f"gradient norm {float(grad_norm)}: lower optimizer.lr, or look for broken samples in samples.jsonl"
            )
        return UpdateResult(float(grad_norm), lr, statistics, self._expert_load)

    def _finalize_gradients(self, model: list[torch.nn.Module], num_tokens: torch.Tensor | None = None, **kwargs):
        self._expert_load = self._measure_expert_load()  # finalize_model_grads resets the counters
        finalize_model_grads(model, num_tokens, **kwargs)

    def _measure_expert_load(self) -> float | None:
        """Max over mean of tokens per expert, averaged over the MoE layers of all pipeline stages."""
        counters = [
            module.local_tokens_per_expert
            for chunk in self.policy.chunks
            for module in chunk.modules()
            if getattr(module, "local_tokens_per_expert", None) is not None
        ]
        sums = torch.zeros(2, device=self.policy.device)  # of ratios, of layers
        if counters:
            tokens = torch.stack(counters).clone()
            dist.all_reduce(tokens, group=parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True))
            ratios = tokens.max(dim=1).values / tokens.mean(dim=1).clamp(min=1e-9)
            sums = torch.stack([ratios.sum(), torch.full_like(sums[0], len(ratios))])
        dist.all_reduce(sums, group=parallel_state.get_pipeline_model_parallel_group())
        ratio, layers = sums.tolist()
        return ratio / layers if layers else None

    # ------------------------------------------------------------------ checkpoints

    def sharded_state(self, *, is_loading: bool) -> dict[str, Any]:
        """Megatron's sharded state of model, optimizer, learning-rate schedule and reference weights, in the phase `save`:
        whichever it was before, the state is the same.
        """
        self.enter("save")
        if not is_loading:
            fill_empty_state(self.optimizer)
        metadata = SHARDING_METADATA | MODEL_METADATA  # Megatron keeps its process groups in there
        model = self.policy.sharded_weights(metadata)
        state: dict[str, Any] = {
            "model": model,
            "optimizer": self.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata),
            "scheduler": self.scheduler.state_dict(),
        }
        if (reference := self.policy.sharded_reference(metadata)) is not None:
            state["reference"] = reference
        return state

    def load_sharded_state(self, state: dict[str, Any]) -> None:
        """Take over what `sharded_state` described, as dist_checkpointing.load returned it."""
        self.enter("save")
        self.policy.load_sharded(state)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
