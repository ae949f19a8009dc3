"""The trained model: Megatron-core GPTModel chunks under DDP and the distributed optimizer.

Everything that knows about Megatron's schedules is here: a forward pass that yields log-probs of response tokens, and
an update that takes a loss of them. What the loss is, is the caller's business.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from megatron.core.fp8_utils import get_fp8_align_size  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region  # noqa: E402
from megatron.core.transformer.module import Float16Module  # noqa: E402

from r1mega.checkpoint.hf import HFTensors  # noqa: E402
from r1mega.checkpoint.hf_state import export_hf, load_hf  # noqa: E402
from r1mega.checkpoint.store import MODEL_METADATA, is_checkpoint, load_weights  # noqa: E402
from r1mega.config.schema import ModelConfig, OptimizerConfig, ParallelConfig  # noqa: E402
from r1mega.errors import NonFiniteError  # noqa: E402
from r1mega.model.build import build_model, packed_seq_params  # noqa: E402
from r1mega.model.reward_head import attach_scalar_head  # noqa: E402
from r1mega.train.optimizer import (  # noqa: E402
    SHARDING_METADATA,
    build_optimizer,
    fill_empty_state,
    learning_rate_schedule,
)
from r1mega.train.packing import Microbatch, build_microbatch  # noqa: E402
from r1mega.train.padding import ZeroedPadding  # noqa: E402
from r1mega.train.router_replay import Replay  # noqa: E402
from r1mega.train.shard import Cut, Shard, join_rows, shard  # noqa: E402
from r1mega_kernels import grouped_log_prob, linear_log_prob  # noqa: E402

LossFunction = Callable[[int, Microbatch, torch.Tensor, torch.Tensor], tuple[torch.Tensor, Any]]
"""(index of the microbatch, microbatch, log_probs [R], entropies [R]) -> (loss sum, statistics to collect)."""


@dataclass(frozen=True, slots=True)
class UpdateResult:
    """grad_norm: before clipping; lr: of this step; statistics: what the loss function returned, per microbatch;
    expert_load: max over mean of tokens per expert, averaged over MoE layers (1 is perfect balance; None without experts).
    """

    grad_norm: float
    lr: float
    statistics: list[Any]
    expert_load: float | None


class Policy:
    """Forward, backward, step; weights in and out by HF names; a reference copy of the weights on demand."""

    def __init__(
        self,
        model: ModelConfig,
        hf_config: dict[str, Any],
        parallel: ParallelConfig,
        optimizer: OptimizerConfig | None,
        *,
        total_steps: int,
        seed: int,
        init_std: float | None = None,
        scalar_head: bool = False,
    ):
        """scalar_head: score sequences instead of predicting tokens. The "log-probs" of a microbatch's rows are then the
        scores at those positions, without entropies (NaN). optimizer: None for a model that is never updated."""
        self.dtype, self.device = getattr(torch, model.dtype), platform.current().device
        self.fp8 = model.fp8 != "off"
        self.chunks = build_model(hf_config, parallel, model, seed=seed, init_std=init_std)
        if scalar_head:
            attach_scalar_head(self.chunks)
        self._scalar_head = scalar_head
        self.megatron_config = config = self.chunks[0].config
        wrapped = [Float16Module(config, c) for c in self.chunks] if self.dtype == torch.bfloat16 else self.chunks
        self.ddp_chunks, self.optimizer = wrapped, None
        # the kernels widen logits themselves, and hidden states must stay in the dtype of the output layer's weight
        self._narrow = {"fp32_output": False} if self.dtype == torch.bfloat16 else {}
        if optimizer is not None:
            self._prepare_updates(optimizer, total_steps)
        self._forward_backward = get_forward_backward_func()
        self._place_in_layout()
        self._head = _bypass_output_layer(self.chunks[-1]) if model.log_probs == "hidden" else None
        self.kernels = "reference" if model.log_probs == "reference" else None
        self._replay = Replay(self.chunks)
        self._zeroing = ZeroedPadding(self.chunks) if self.fp8 else None
        self._reference: list[dict[str, torch.Tensor]] | None = None
        self._expert_load: float | None = None

    def _prepare_updates(self, optimizer: OptimizerConfig, total_steps: int) -> None:
        """Gradient buffers, Adam over them, the learning-rate schedule."""
        config = self.megatron_config
        ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
        self.ddp_chunks = [DistributedDataParallel(config, ddp_config, chunk) for chunk in self.ddp_chunks]
        self.optimizer = build_optimizer(optimizer, self.ddp_chunks, self.dtype)
        self.scheduler = learning_rate_schedule(self.optimizer, optimizer, total_steps)
        config.grad_scale_func = self.optimizer.scale_loss
        config.finalize_model_grads_func = self._finalize_gradients

    def _place_in_layout(self) -> None:
        """What callers and this class need to know of the parallel groups."""
        config, ps = self.megatron_config, parallel_state
        tp, cp = config.tensor_model_parallel_size, config.context_parallel_size
        self._tensor_group = ps.get_tensor_model_parallel_group() if tp > 1 else None
        self._context_group = ps.get_context_parallel_group() if cp > 1 else None
        self._cut = Cut(
            cp, ps.get_context_parallel_rank(), tp, ps.get_tensor_model_parallel_rank(), config.sequence_parallel,
            align=get_fp8_align_size(config.fp8_recipe) if self.fp8 else 1,
        )  # fmt: skip
        self.replica, self.num_replicas = ps.get_data_parallel_rank(), ps.get_data_parallel_world_size()
        """Which data-parallel share of the samples this rank trains on, of how many."""
        self.reports = self._cut.tp_rank == 0 and self._cut.cp_rank == 0 and ps.is_pipeline_last_stage()
        """True on one rank of each replica: statistics are complete there, and to be added up over those ranks only."""
        self.microbatch_multiple = config.pipeline_model_parallel_size if len(self.chunks) > 1 else 1
        """Best number of microbatches a step: multiples of this; others are filled up with empty ones."""

    # ------------------------------------------------------------------ forward, update

    @torch.no_grad()
    def log_probs(
        self,
        microbatches: Sequence[Microbatch],
        temperature: float = 1.0,
        *,
        everywhere: bool = False,
        replay: bool = True,
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(log_probs [R], entropies [R]) of the response tokens of each microbatch, whole on every rank of the last
        pipeline stage; elsewhere [], or with `everywhere` the same. replay: take the experts that the microbatches name.
        """
        if not replay:
            microbatches = [dataclasses.replace(batch, routed_experts=None) for batch in microbatches]
        results = self._run(
            microbatches, lambda _i, _mb, lp, ent: (lp.sum(), (lp, ent)), temperature, forward_only=True
        )
        if not everywhere or self.megatron_config.pipeline_model_parallel_size == 1:
            return results
        received = []
        for index, batch in enumerate(microbatches):
            both = torch.empty(2, batch.rows.numel(), device=self.device)
            if results:
                both = torch.stack(results[index])
            dist.broadcast(
                both, parallel_state.get_pipeline_model_parallel_last_rank(),
                group=parallel_state.get_pipeline_model_parallel_group(),
            )  # fmt: skip
            received.append((both[0], both[1]))
        return received

    def sequence_log_probs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probs of tokens 1.. of each sequence given those before (len - 1 values each), on every rank; the sequences
        are one microbatch.
        """
        batch = build_microbatch(sequences, [1] * len(sequences), range(len(sequences)))
        packed, _ = self.log_probs([batch], everywhere=True)[0]
        return [part.tolist() for part in torch.split(packed, [len(s) - 1 for s in sequences])]

    def update(
        self,
        microbatches: Sequence[Microbatch],
        loss_function: LossFunction,
        *,
        temperature: float = 1.0,
        total_response_tokens: int,
        mtp_loss: bool = False,
    ) -> UpdateResult:
        """One optimizer step on the sum of the microbatches' losses (over all data-parallel ranks).

        total_response_tokens: R summed over this step's microbatches on all data-parallel ranks. Megatron divides
        gradients by it; the loss is multiplied by it first, so that the caller's loss is minimised as it stands.
        mtp_loss: add the loss of the multi-token-prediction layers, if the model has them (pre-training and SFT:
        the tokens are to be imitated); entropies are then not computed (NaN).
        Raises NonFiniteError when the gradient norm is not finite; the weights are then lost, the last checkpoint is not.
        """
        self.scheduler.step(1)  # first, so that a warm-up of n steps starts at lr / n and not at 0
        for chunk in self.ddp_chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

        def scaled(index: int, microbatch: Microbatch, log_probs: torch.Tensor, entropies: torch.Tensor):
            loss, statistics = loss_function(index, microbatch, log_probs, entropies)
            return loss * total_response_tokens, statistics

        further = mtp_loss and bool(self.megatron_config.mtp_num_layers)
        statistics = self._run(microbatches, scaled, temperature, forward_only=False, mtp_loss=further)
        lr = self.optimizer.param_groups[0]["lr"]
        stepped, grad_norm, _ = self.optimizer.step()
        if not stepped or not math.isfinite(float(grad_norm)):
            raise NonFiniteError(
                f"gradient norm {float(grad_norm)}: lower optimizer.lr, or look for broken samples in samples.jsonl"
            )
        return UpdateResult(float(grad_norm), lr, statistics, self._expert_load)

    def _run(
        self,
        microbatches: Sequence[Microbatch],
        function: LossFunction,
        temperature: float,
        *,
        forward_only: bool,
        mtp_loss: bool = False,
    ) -> list[Any]:
        fillers = [build_microbatch([], [], ())] * (-len(microbatches) % self.microbatch_multiple)
        collected: dict[int, Any] = {}

        def forward_step(iterator: Iterator[tuple[int, Microbatch]], model: torch.nn.Module):
            index, batch = next(iterator)
            batch = batch.to(self.device)
            part = shard(batch, self._cut)
            packed = packed_seq_params(part.cu_seqlens, part.padding)
            self._replay.set(self.ddp_chunks.index(model), part.routed_experts)
            if self._zeroing is not None:
                self._zeroing.padding = part.padding
            if mtp_loss:  # with labels Megatron adds the MTP loss itself and returns cross-entropies [1, t]
                mask = torch.zeros(1, part.tokens.numel(), device=self.device).index_fill_(1, part.rows, 1.0)
                output = model(
                    part.tokens[None], part.positions[None], None,
                    labels=part.labels[None], loss_mask=mask, packed_seq_params=packed, **self._narrow,
                )  # fmt: skip
            else:
                output = model(part.tokens[None], part.positions[None], None, packed_seq_params=packed, **self._narrow)

            def loss(output: torch.Tensor):
                log_probs, entropies = self._score(output[0], batch, part, temperature, mtp_loss)
                if index < len(microbatches):
                    value, collected[index] = function(index, batch, log_probs, entropies)
                else:
                    value = log_probs.sum()  # of nothing: a filler
                return value, torch.tensor(part.rows.numel(), dtype=torch.int), {}

            return output, loss

        chunks = self.ddp_chunks
        iterators = [iter(enumerate([*microbatches, *fillers])) for _ in chunks]  # one a virtual pipeline stage
        with self._replay.cleared():
            self._forward_backward(
                forward_step_func=forward_step,
                data_iterator=iterators if len(chunks) > 1 else iterators[0],
                model=chunks if len(chunks) > 1 else chunks[0],
                num_microbatches=len(microbatches) + len(fillers),
                seq_length=max(b.num_tokens for b in microbatches),  # of pipelines with a fixed length, which none is
                micro_batch_size=1,
                forward_only=forward_only,
            )
        return list(collected.values())

    def _score(
        self, output: torch.Tensor, batch: Microbatch, part: Shard, temperature: float, is_cross_entropy: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs and entropies [R] of a microbatch's response tokens from this rank's output: logits [t, vocabulary],
        hidden states [t, hidden], cross-entropies [t] or scores [t, 1] (entropies are then NaN).
        """
        where = (part.labels, temperature, part.rows, self._tensor_group)
        if self._scalar_head:
            log_probs = output.index_select(0, part.rows)[:, 0].float()
            entropies = torch.full_like(log_probs, math.nan)
        elif is_cross_entropy:
            log_probs = -output.index_select(0, part.rows).float()
            entropies = torch.full_like(log_probs, math.nan)
        elif self._head is None:
            log_probs, entropies, _ = grouped_log_prob(output, *where, backend=self.kernels)
        else:
            log_probs, entropies, _ = linear_log_prob(
                output, self._head.weight, *where, backend=self.kernels, vocab_size=self.chunks[-1].unpadded_vocab_size,
                reduce_hidden_grad=not self.megatron_config.sequence_parallel,
            )  # fmt: skip
        if self._context_group is None:
            return log_probs, entropies
        joined = join_rows(torch.stack([log_probs, entropies], 1), part.places, batch.rows.numel(), self._context_group)
        return joined[:, 0], joined[:, 1]

    def _finalize_gradients(self, model: list[torch.nn.Module], num_tokens: torch.Tensor | None = None, **kwargs):
        self._expert_load = self._measure_expert_load()  # finalize_model_grads resets the counters
        finalize_model_grads(model, num_tokens, **kwargs)

    def _measure_expert_load(self) -> float | None:
        """Max over mean of tokens per expert, averaged over the MoE layers of all pipeline stages."""
        counters = [
            module.local_tokens_per_expert
            for chunk in self.chunks
            for module in chunk.modules()
            if getattr(module, "local_tokens_per_expert", None) is not None
        ]
        sums = torch.zeros(2, device=self.device)  # of ratios, of layers
        if counters:
            tokens = torch.stack(counters).clone()
            dist.all_reduce(tokens, group=parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True))
            ratios = tokens.max(dim=1).values / tokens.mean(dim=1).clamp(min=1e-9)
            sums = torch.stack([ratios.sum(), torch.full_like(sums[0], len(ratios))])
        dist.all_reduce(sums, group=parallel_state.get_pipeline_model_parallel_group())
        ratio, layers = sums.tolist()
        return ratio / layers if layers else None

    # ------------------------------------------------------------------ weights

    def load_hf(self, tensors: Any) -> None:
        """Copy HF-named tensors in (all of them; CheckpointError lists what is missing, extra or misshapen)."""
        load_hf(self.chunks, tensors)
        if self.optimizer is not None:
            self.optimizer.reload_model_params()

    def load_pretrained(self, directory: Path) -> None:
        """Take over the weights of an HF directory, or of a checkpoint that `r1mega convert --to-megatron` made."""
        if is_checkpoint(directory):
            load_weights(directory, self.chunks)
            self.optimizer.reload_model_params()
        else:
            self.load_hf(HFTensors(directory))

    def hf_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(HF name, full tensor) for the whole model, in a fixed order, one at a time. A collective call."""
        return export_hf(self.chunks)

    def take_reference(self) -> None:
        """Make the present weights the reference model (a copy in host memory, this rank's shards only)."""
        self._reference = [
            {name: value.detach().to("cpu", copy=True) for name, value in _state(chunk)} for chunk in self.chunks
        ]

    @contextlib.contextmanager
    def as_reference(self) -> Iterator[None]:
        """Inside, the model computes with the reference weights; no update may happen there."""
        if self._reference is None:
            raise RuntimeError("take_reference() comes first")
        own = []
        try:
            for chunk, reference in zip(self.chunks, self._reference, strict=True):
                for name, value in _state(chunk):
                    own.append((value, value.data))
                    value.data = reference[name].to(value.device, non_blocking=True)
            yield
        finally:
            for value, data in own:
                value.data = data

    # ------------------------------------------------------------------ checkpoints

    def sharded_state(self, *, is_loading: bool) -> dict[str, Any]:
        """Megatron's sharded state of model, optimizer, learning-rate schedule and reference weights."""
        if not is_loading:
            fill_empty_state(self.optimizer)
        metadata = SHARDING_METADATA | MODEL_METADATA  # Megatron keeps its process groups in there
        model = {f"model{i}": c.sharded_state_dict(metadata=metadata) for i, c in enumerate(self.chunks)}
        state: dict[str, Any] = {
            "model": model,
            "optimizer": self.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata),
            "scheduler": self.scheduler.state_dict(),
        }
        if self._reference is not None:
            state["reference"] = {
                f"model{i}": _renamed(c.sharded_state_dict(prefix="", metadata=metadata), reference)
                for i, (c, reference) in enumerate(zip(self.chunks, self._reference, strict=True))
            }
        return state

    def load_sharded_state(self, state: dict[str, Any]) -> None:
        """Take over what `sharded_state` described, as dist_checkpointing.load returned it."""
        for i, chunk in enumerate(self.chunks):
            chunk.load_state_dict(state["model"][f"model{i}"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self._reference is not None:
            for i, reference in enumerate(self._reference):
                for name, value in reference.items():
                    value.copy_(state["reference"][f"model{i}"][name])


def _bypass_output_layer(chunk: torch.nn.Module) -> torch.nn.Module | None:
    """Make a last pipeline stage return its final hidden states (of all tokens, also under sequence parallelism); the
    layer whose weight is left for `linear_log_prob`.
    """
    layer = getattr(chunk, "output_layer", None)
    if layer is None:
        return None

    def forward(hidden: torch.Tensor, *_args: Any, **_kwargs: Any) -> tuple[torch.Tensor, None]:
        # backward: each rank's gradient is of its part of the vocabulary, they are added up while they are scattered
        return gather_from_sequence_parallel_region(hidden) if chunk.config.sequence_parallel else hidden, None

    layer.forward = forward
    if (masking := getattr(chunk, "vocabulary_mask", None)) is not None:
        masking.remove()  # `linear_log_prob` leaves the rows that pad the vocabulary out itself
    return layer


def _state(chunk: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, and the router's expert bias (a buffer that decides routing)."""
    yield from chunk.named_parameters()
    yield from ((name, b) for name, b in chunk.named_buffers() if name.endswith("expert_bias"))


def _renamed(sharded: dict[str, Any], values: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The same sharding for other values under keys of their own, so that both fit in one checkpoint."""
    kept = {}
    for name, item in sharded.items():
        if name in values:
            item.data = values[name]
            item.key = f"reference.{item.key}"
            kept[name] = item
    if kept.keys() != values.keys():
        raise RuntimeError(f"the model's sharded state lacks {sorted(values.keys() - kept.keys())}")
    return kept
