"""What updates a policy: gradient buffers, Megatron's distributed optimizer, the learning-rate schedule."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
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
from r1mega.files import write_atomic  # noqa: E402
from r1mega.train.heads import TokenScores  # noqa: E402
from r1mega.train.memory import TrainerMemory  # noqa: E402
from r1mega.train.optimizer import (  # noqa: E402
    SHARDING_METADATA,
    build_optimizer,
    even_steps,
    fill_empty_state,
    learning_rate_schedule,
    parts,
)
from r1mega.train.phases import Phase, PhasePlan, plan_phases  # noqa: E402
from r1mega.train.policy import B, Loss, Policy, S, SumsOver  # noqa: E402

logger = logging.getLogger(__name__)
_KEPT_EVIDENCE = 8  # steps


@dataclass(frozen=True, slots=True)
class UpdateResult(Generic[S]):
    """grad_norm: before clipping; lr: of this step; statistics: what the loss returned, per microbatch, or part of one where
    the loss is a sum over tokens or samples, in order.
    expert_load: max over mean of tokens per expert, averaged over MoE layers (1 is perfect balance; None without experts).
    skipped: the gradient was not finite, and no weight has moved.
    """

    grad_norm: float
    lr: float
    statistics: list[S]
    expert_load: float | None
    skipped: bool = False


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
        self._expert_biases: list[tuple[torch.Tensor, torch.Tensor]] = []  # (of a router, as it was before this step)
        routers = (m for chunk in policy.chunks for m in chunk.modules() if hasattr(m, "get_aux_loss_coeff"))
        configs = {id(router.config): router.config for router in routers}.values()
        self._aux_loss = [(c, c.moe_aux_loss_coeff) for c in configs if c.moe_aux_loss_coeff]
        self._skip_nonfinite, self._skipped = optimizer.skip_nonfinite, 0
        self.evidence: Path | None = None
        """Where to write what a gradient that is not finite came from; None: nowhere."""

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
        sums_over: SumsOver | None = None,
        entropies: bool = True,
    ) -> UpdateResult[S]:
        """One optimizer step on the sum of the microbatches' losses (over all data-parallel ranks).

        total_response_tokens: R summed over this step's microbatches on all data-parallel ranks. Megatron divides
        gradients by it; the loss is multiplied by it first, so that the caller's loss is minimised as it stands.
        mtp_loss: add the loss of the multi-token-prediction layers, if the model has them (pre-training and SFT:
        the tokens are to be imitated); entropies are then not computed. sums_over, entropies: see `Policy.run`.
        When the gradient norm is not finite on any rank, no rank moves a weight, and each replica writes its microbatches
        to `evidence`, of the first few such steps. The step is then left out, or NonFiniteError when optimizer.skip_nonfinite such steps went before it.
        """
        self.scheduler.step(1)  # first, so that a warm-up of n steps starts at lr / n and not at 0
        self.enter("update")
        for chunk in self.ddp_chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

        def scaled(batch: B, scores: TokenScores) -> tuple[torch.Tensor, S]:
            value, statistics = loss(batch, scores)
            return value * total_response_tokens, statistics

        self._weigh_aux_loss(microbatches, total_response_tokens)
        self._must_gather = False  # the forward pass does
        further = mtp_loss and bool(self.policy.megatron_config.mtp_num_layers)
        try:
            statistics = self.policy.run(
                microbatches, scaled, temperature, forward_only=False, mtp_loss=further, sums_over=sums_over,
                entropies=entropies,
            )  # fmt: skip
        finally:
            for config, coefficient in self._aux_loss:
                config.moe_aux_loss_coeff = coefficient
        lr = self.optimizer.param_groups[0]["lr"]
        self.enter("step")
        stepped, grad_norm, _ = self.optimizer.step()
        if not stepped:
            grad_norm = self.optimizer.get_grad_norm()
            for bias, before in self._expert_biases:
                bias.copy_(before)
            self._leave_out(float(grad_norm), microbatches, statistics)
        self._skipped = 0 if stepped else self._skipped
        self._expert_biases = []
        self.optimizer.zero_grad()  # copies in float32, where the buffers are not
        self._must_gather = self._overlaps_gather
        return UpdateResult(float(grad_norm), lr, statistics, self._expert_load, skipped=not stepped)

    def _weigh_aux_loss(self, microbatches: Sequence[B], total_response_tokens: int) -> None:
        """Make the auxiliary loss of the routers the mean over all tokens. Megatron multiplies a microbatch's by its tokens
        (router.py, attach_and_log_load_balancing_loss) and divides gradients by what the loss counts, here response tokens:
        the shorter the responses are beside their prompts, the larger it would be.
        """
        if not self._aux_loss:
            return
        tokens = torch.tensor(float(sum(batch.num_tokens for batch in microbatches if batch.sample_indices)))
        dist.all_reduce(tokens, group=parallel_state.get_data_parallel_group())
        for config, coefficient in self._aux_loss:
            config.moe_aux_loss_coeff = coefficient * total_response_tokens / max(float(tokens), 1.0)

    def _leave_out(self, grad_norm: float, microbatches: Sequence[B], statistics: Sequence[S]) -> None:
        """Count a step whose gradient is not finite, write down what made it, and say so. Raises NonFiniteError."""
        self._skipped += 1
        number = self.scheduler.num_steps
        kept = self.evidence is not None and _is_room(self.evidence, number)
        where = f"; the microbatches and parameters concerned are in {self.evidence}" if kept else ""
        if self.evidence is not None and kept and self.policy.reports:
            self._write_evidence(self.evidence, number, grad_norm, microbatches, statistics)
        told = f"optimizer step {number}: gradient norm {grad_norm}, no weight has moved{where}"
        if self._skipped > self._skip_nonfinite:
            raise NonFiniteError(
                f"{told}. To leave such steps out, start again with optimizer.skip_nonfinite={self._skipped} (so many may follow "
                "each other); against a run that diverges, use a lower optimizer.lr, in another run_dir"
            )
        logger.warning(
            "%s; left out (%d in a row, optimizer.skip_nonfinite = %d)", told, self._skipped, self._skip_nonfinite
        )

    def _write_evidence(
        self, directory: Path, number: int, grad_norm: float, microbatches: Sequence[B], statistics: Sequence[S]
    ) -> None:
        """DIRECTORY/update_NNNNNN_rank_RRRRR.pt, for torch.load: microbatches as dicts of their fields, what the loss said (as
        text) of each, or of each part of one where the loss is a sum over tokens or samples, in order, and the parameters
        whose gradients on this rank are not finite. A disk that does not take it is told.
        """
        broken = [
            name
            for chunk in self.policy.chunks
            for name, parameter in chunk.named_parameters()
            if (gradient := getattr(parameter, "main_grad", None)) is not None
            and gradient.untyped_storage().nbytes()
            and not bool(gradient.isfinite().all())
        ]
        content = io.BytesIO()
        found = {
            "update": number,
            "grad_norm": grad_norm,
            "parameters": broken,
            "statistics": list(map(str, statistics)),
        }
        torch.save(found | {"microbatches": [dataclasses.asdict(batch) for batch in microbatches]}, content)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            write_atomic(directory / f"update_{number:06d}_rank_{dist.get_rank():05d}.pt", content.getvalue())
        except OSError as error:
            logger.warning("%s: could not be written (%s)", directory, error)

    def _finalize_gradients(self, model: list[torch.nn.Module], num_tokens: torch.Tensor | None = None, **kwargs):
        self._expert_load = self._measure_expert_load()  # finalize_model_grads resets the counters
        named = (buffer for chunk in self.policy.chunks for buffer in chunk.named_buffers())
        self._expert_biases = [
            (bias, bias.clone()) for name, bias in named if name.endswith("expert_bias")
        ]  # and moves these
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
        if not is_loading:
            even_steps(state["optimizer"])
        if (reference := self.policy.sharded_reference(metadata)) is not None:
            state["reference"] = reference
        return state

    def load_sharded_state(self, state: dict[str, Any]) -> None:
        """Take over what `sharded_state` described, as dist_checkpointing.load returned it."""
        self.enter("save")
        self.policy.load_sharded(state)
        even_steps(state["optimizer"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])


def _is_room(directory: Path, number: int) -> bool:
    """Whether evidence of this step is kept: that of the first `_KEPT_EVIDENCE` steps is. The same on every rank, whichever
    of them has written.
    """
    numbers = {path.name.split("_")[1] for path in directory.glob("update_*")} - {f"{number:06d}"}
    return len(numbers) < _KEPT_EVIDENCE
