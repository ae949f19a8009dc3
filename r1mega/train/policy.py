"""The model: Megatron-core GPTModel chunks of this rank, and a head that reads what they give.

Everything that knows about Megatron's schedules is here: passes over microbatches, forward or with gradients, whose
outputs a head turns into log-probs (or scores) of tokens. What updates the weights is `train.trainer`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch
import torch.distributed as dist

from r1mega import platform

platform.prepare()  # before the first import of megatron

from megatron.core import parallel_state  # noqa: E402
from megatron.core.fp8_utils import get_fp8_align_size  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.transformer.module import Float16Module  # noqa: E402

from r1mega.checkpoint.hf import HFTensors  # noqa: E402
from r1mega.checkpoint.hf_state import export_hf, load_hf  # noqa: E402
from r1mega.checkpoint.store import is_checkpoint, load_weights  # noqa: E402
from r1mega.config.layout import least_microbatches  # noqa: E402
from r1mega.config.schema import ModelConfig, ParallelConfig  # noqa: E402
from r1mega.model.build import build_model, packed_seq_params  # noqa: E402
from r1mega.model.output_layer import bypass_output_layer  # noqa: E402
from r1mega.model.reward_head import attach_scalar_head  # noqa: E402
from r1mega.platform.watchdog import tick  # noqa: E402
from r1mega.train.heads import (  # noqa: E402
    CrossEntropyHead,
    Head,
    HiddenHead,
    LogitsHead,
    ScoreHead,
    TokenScores,
)
from r1mega.train.packing import Microbatch, build_microbatch  # noqa: E402
from r1mega.train.padding import ZeroedPadding  # noqa: E402
from r1mega.train.router_replay import Replay  # noqa: E402
from r1mega.train.sample_plan import Reads, Routing  # noqa: E402
from r1mega.train.shard import Cut, Shard, shard  # noqa: E402

B = TypeVar("B", bound=Microbatch)
S = TypeVar("S")

Loss = Callable[[B, TokenScores], tuple[torch.Tensor, S]]
"""(microbatch, scores of its R rows) -> (its part of the loss, statistics to collect). What the loss compares the scores
with, the microbatch carries. Both are whole, whatever the parallel layout, and on the model's device."""
SumsOver = Literal["tokens", "samples"]
"""What a loss is a sum over, of each one's scores alone; see `Policy.run`."""

_Value = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]
Records = list[list[torch.Tensor]]
"""By chunk and microbatch: [routers, tokens that a layer sees, top-k], in host memory."""


class Policy:
    """Forward passes; weights in and out by HF names; a reference copy of the weights on demand."""

    def __init__(
        self,
        model: ModelConfig,
        hf_config: dict[str, Any],
        parallel: ParallelConfig,
        *,
        seed: int,
        init_std: float | None = None,
        scalar_head: bool = False,
    ):
        """scalar_head: score sequences instead of predicting tokens."""
        self.dtype, self.device = getattr(torch, model.dtype), platform.current().device
        self.fp8 = model.fp8 != "off"
        self.settle: Callable[[], None] = lambda: None
        """What a trainer has left to do before weights are read."""
        self._chunks: Sequence[GPTModel] = build_model(hf_config, parallel, model, seed=seed, init_std=init_std)
        if scalar_head:
            attach_scalar_head(self.chunks)
        self.megatron_config = config = self.chunks[0].config
        self.modules: list[torch.nn.Module] = list(self.chunks)
        """The chunks as the schedules call them: wrapped for the dtype, and by a trainer for the gradients."""
        if self.dtype == torch.bfloat16:
            self.modules = [Float16Module(config, chunk) for chunk in self.chunks]
        # heads widen what they read themselves, and hidden states must stay in the dtype of the output layer's weight
        self._narrow = {"fp32_output": False} if self.dtype == torch.bfloat16 else {}
        self._forward_backward = get_forward_backward_func()
        self._place_in_layout()
        self.kernels = "reference" if model.log_probs == "reference" else None
        self._head = self._make_head(model, scalar_head)
        self._replay = Replay(self.chunks)
        self.routed_columns = self._replay.columns
        """The MoE layers of this rank, as numbers among those of the whole model: whose routed experts it replays."""
        self.routing = Routing(config.num_moe_experts or 1, config.moe_router_topk if config.num_moe_experts else 0)
        self._zeroing = ZeroedPadding(self.chunks) if self.fp8 else None
        self.has_trainer = False
        self._reference: list[dict[str, torch.Tensor]] | None = None

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
        ends = [chunk.pre_process or getattr(chunk, "mtp_process", False) for chunk in self._chunks]
        has_loss = any(chunk.post_process for chunk in self._chunks)
        cut = Cut() if self.reports else self._cut  # that rank writes down what made a gradient that is not finite
        self.reads = Reads(any(ends) or has_loss, has_loss, cut.cp, cut.cp_rank)
        """What of a sample this rank reads."""
        self.microbatch_multiple = config.pipeline_model_parallel_size if len(self.chunks) > 1 else 1
        """Best number of microbatches a step: multiples of this; others are filled up with empty ones."""
        self.min_microbatches = least_microbatches(config.pipeline_model_parallel_size)

    def _make_head(self, model: ModelConfig, scalar_head: bool) -> Head:
        """What reads the output of the last pipeline stage (it is not asked on the others)."""
        if scalar_head:
            return ScoreHead()
        layer = bypass_output_layer(self.chunks[-1]) if model.log_probs == "hidden" else None
        if layer is None:
            return LogitsHead(self._tensor_group, self.kernels)
        return HiddenHead(
            layer.weight, self.chunks[-1].unpadded_vocab_size, self._tensor_group,
            reduce_hidden_grad=not self.megatron_config.sequence_parallel,
        )  # fmt: skip

    @property
    def chunks(self) -> Sequence[GPTModel]:
        """This rank's part of the model, with its weights whole. A collective call after an update that overlaps."""
        self.settle()
        return self._chunks

    # ------------------------------------------------------------------ passes

    @torch.no_grad()
    def scores(
        self, microbatches: Sequence[Microbatch], temperature: float = 1.0, *, replay: bool = True,
        entropies: bool = False,
    ) -> list[TokenScores]:  # fmt: skip
        """Of each microbatch's rows, whole on every rank of the last pipeline stage; elsewhere [].

        replay: take the experts that the microbatches name. entropies: of the predictions too.
        """
        if not replay:
            microbatches = [dataclasses.replace(batch, routed_experts=None, own_experts=None) for batch in microbatches]
        return self.run(
            microbatches, lambda _, scores: (scores.values.sum(), scores), temperature, forward_only=True,
            entropies=entropies,
        )  # fmt: skip

    @torch.no_grad()
    def recorded_scores(self, microbatches: Sequence[B], temperature: float) -> tuple[list[TokenScores], list[B]]:
        """`scores` with the experts that the routers choose, and the microbatches that name those: `run` repeats them."""
        records: Records = [[] for _ in self.modules]
        scores = self.run(
            microbatches, lambda _, scores: (scores.values.sum(), scores), temperature, forward_only=True, records=records,
            entropies=False,
        )  # fmt: skip
        by_batch = zip(*records, strict=True)  # of fillers too, which come last
        return scores, [
            dataclasses.replace(batch, own_experts=chosen)
            for batch, chosen in zip(microbatches, by_batch, strict=False)
        ]

    def log_probs(self, microbatches: Sequence[Microbatch], temperature: float = 1.0) -> list[torch.Tensor]:
        """`scores(...).values`, on every rank of all pipeline stages. A collective call of them."""
        scored = [scores.values for scores in self.scores(microbatches, temperature)]
        if self.megatron_config.pipeline_model_parallel_size == 1:
            return scored
        everywhere = [torch.empty(batch.rows.numel(), device=self.device) for batch in microbatches]
        if scored:
            everywhere = [values.contiguous() for values in scored]
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        for values in everywhere:
            dist.broadcast(values, last, group=parallel_state.get_pipeline_model_parallel_group())
        return everywhere

    def sequence_log_probs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probs of tokens 1.. of each sequence given those before (len - 1 values each), on every rank; the sequences
        are one microbatch.
        """
        (packed,) = self.log_probs([build_microbatch(sequences, [1] * len(sequences), range(len(sequences)))])
        return [part.tolist() for part in torch.split(packed, [len(s) - 1 for s in sequences])]

    def run(
        self,
        microbatches: Sequence[B],
        loss: Loss[B, S],
        temperature: float,
        *,
        forward_only: bool,
        mtp_loss: bool = False,
        sums_over: SumsOver | None = None,
        records: Records | None = None,
        entropies: bool = True,
    ) -> list[S]:
        """A pass over microbatches, with gradients of the loss unless `forward_only`; the statistics of each where the loss
        is: on the last pipeline stage, elsewhere []. mtp_loss: add that of the multi-token-prediction layers. sums_over: the
        loss is a sum over tokens or over samples, of each one's scores alone, and may be asked for parts of a microbatch (of
        whole samples), each with its statistics. records: a list for each chunk, to which what its routers took is appended.
        entropies: False where the loss reads none.
        """
        fillers: list[None] = [None] * (-len(microbatches) % self.microbatch_multiple)
        if forward_only:
            self.settle()
        one = _Pass(self, loss, temperature, mtp_loss, sums_over, records, entropies)
        self._check_weights()
        modules = self.modules
        iterators = [iter([*microbatches, *fillers]) for _ in modules]  # one a virtual pipeline stage
        with self._replay.cleared():
            self._forward_backward(
                forward_step_func=one.forward,
                data_iterator=iterators if len(modules) > 1 else iterators[0],
                model=modules if len(modules) > 1 else modules[0],
                num_microbatches=len(microbatches) + len(fillers),
                seq_length=max(b.num_tokens for b in microbatches),  # of pipelines with a fixed length, which none is
                micro_batch_size=1,
                forward_only=forward_only,
            )
        return one.statistics

    def _number(self, module: torch.nn.Module) -> int:
        """Of one of `modules`, or of the chunk inside of it, which a schedule that takes plans gives."""
        pairs = enumerate(zip(self.modules, self._chunks, strict=True))
        return next(number for number, pair in pairs if any(one is module for one in pair))

    def is_last(self, module: torch.nn.Module) -> bool:
        """Whether a head reads the output of this one of `modules`."""
        return self._chunks[self._number(module)].post_process

    def forward(
        self, module: torch.nn.Module, batch: Microbatch, *, mtp_loss: bool, records: Records | None = None,
        as_plan: bool = False,
    ) -> tuple[Any, Shard]:  # fmt: skip
        """One of `modules` on this rank's part of a microbatch: (its output [1, t, ...] or, within a pipeline, what goes to
        the next stage; the part). mtp_loss: the output of the last stage is cross-entropies. records: see `run`. as_plan:
        what Megatron's schedule is to run comes instead of the output.
        """
        part = shard(batch, self._cut)
        packed = packed_seq_params(part.cu_seqlens, part.padding)
        chunk = self._number(module)
        self._replay.begin(chunk, part.routed_experts, batch.own_experts, record=records is not None)
        if self._zeroing is not None:
            self._zeroing.padding = part.padding
        labels = {}
        if mtp_loss:  # with labels Megatron adds the MTP loss itself and returns cross-entropies
            mask = torch.zeros(1, part.tokens.numel(), device=self.device).index_fill_(1, part.rows, 1.0)
            labels = {"labels": part.labels[None], "loss_mask": mask}
        given = (part.tokens[None], part.positions[None], None)
        if as_plan:
            return self._chunks[chunk].build_schedule_plan(*given, **labels, packed_seq_params=packed), part
        output = module(*given, **labels, packed_seq_params=packed, **self._narrow)
        if records is not None:
            records[chunk].append(self._replay.recorded(chunk))
        return output, part

    def read(
        self, output: torch.Tensor, part: Shard, num_rows: int, temperature: float, *, mtp_loss: bool,
        entropies: bool = True,
    ) -> TokenScores:  # fmt: skip
        """The scores of all R rows of a microbatch from what `forward` returned on the last pipeline stage."""
        head = CrossEntropyHead() if mtp_loss else self._head
        scores = head.scores(output[0], part, temperature, entropies=entropies)
        return scores.joined(part, num_rows, self._context_group)

    @property
    def one_pass_head(self) -> HiddenHead | None:
        """The head that finds a loss that is a sum (`SumsOver`) and its gradient in one pass, where there is one: each
        context-parallel rank has rows of its own and computes the loss of all.
        """
        return self._head if isinstance(self._head, HiddenHead) and self._context_group is None else None

    # ------------------------------------------------------------------ weights

    def load_hf(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy HF-named tensors in (all of them; CheckpointError lists what is missing, extra or misshapen). Not of a
        policy that has a trainer.
        """
        self._check_untrained()
        load_hf(self.chunks, tensors)

    def _check_untrained(self) -> None:
        if self.has_trainer:
            raise RuntimeError("the trainer's optimizer has copies of the weights: load them before it is made")

    def load_pretrained(self, directory: Path) -> None:
        """Take over the weights of an HF directory, or of a checkpoint that `r1mega convert --to-megatron` made."""
        if is_checkpoint(directory):
            self._check_untrained()
            load_weights(directory, self.chunks)
        else:
            self.load_hf(HFTensors(directory))

    def hf_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(HF name, full tensor) for the whole model, in a fixed order, one at a time. A collective call."""
        self._check_weights()
        return export_hf(self.chunks)

    def _check_weights(self) -> None:
        """Reading a tensor without memory ends the process."""
        if any(value.numel() and not value.untyped_storage().nbytes() for c in self.chunks for value in c.parameters()):
            raise RuntimeError("the weights are in host memory: Trainer.enter() a phase that has them on the device")

    def take_reference(self) -> None:
        """Make the present weights the reference model (a copy in host memory, this rank's shards only)."""
        self._check_weights()
        if self._reference is None:
            self._reference = [{name: _host_memory(value) for name, value in state_of(chunk)} for chunk in self.chunks]
        for chunk, reference in zip(self.chunks, self._reference, strict=True):  # pinned memory is never given back
            for name, value in state_of(chunk):
                reference[name].copy_(value.detach())

    @contextlib.contextmanager
    def as_reference(self) -> Iterator[None]:
        """Inside, the model computes with the reference weights; no update may happen there."""
        if self._reference is None:
            raise RuntimeError("take_reference() comes first")
        own = []
        try:
            for chunk, reference in zip(self.chunks, self._reference, strict=True):
                for name, value in state_of(chunk):
                    own.append((value, value.data))
                    value.data = reference[name].to(value.device, non_blocking=True)
            yield
        finally:
            for value, data in own:
                value.data = data

    # ------------------------------------------------------------------ checkpoints

    def sharded_weights(self, metadata: dict[str, Any]) -> dict[str, Any]:
        """Megatron's sharded state of each chunk; metadata: Megatron's, how it is laid out."""
        self._check_weights()
        return {f"model{i}": c.sharded_state_dict(metadata=metadata) for i, c in enumerate(self.chunks)}

    def sharded_reference(self, metadata: dict[str, Any]) -> dict[str, Any] | None:
        """The same of the reference weights; None when none were taken."""
        if self._reference is None:
            return None
        return {
            f"model{i}": _renamed(c.sharded_state_dict(prefix="", metadata=metadata), reference)
            for i, (c, reference) in enumerate(zip(self.chunks, self._reference, strict=True))
        }

    def load_sharded(self, state: Mapping[str, Any]) -> None:
        """Take over what `sharded_weights` ("model") and `sharded_reference` ("reference") described, as
        dist_checkpointing.load returned it.
        """
        for i, chunk in enumerate(self.chunks):
            chunk.load_state_dict(state["model"][f"model{i}"])
        for i, reference in enumerate(self._reference or ()):
            for name, value in reference.items():
                value.copy_(state["reference"][f"model{i}"][name])


@dataclass(slots=True)
class _Pass(Generic[B, S]):
    """What Megatron's schedules call, once a microbatch and chunk: the forward step, then the loss of its output."""

    policy: Policy
    loss: Loss[B, S]
    temperature: float
    mtp_loss: bool
    sums_over: SumsOver | None
    records: Records | None
    entropies: bool
    statistics: list[S] = field(default_factory=list)

    def forward(
        self, batches: Iterator[B | None], module: torch.nn.Module, return_schedule_plan: bool = False
    ) -> tuple[Any, Callable[[torch.Tensor], _Value]]:
        """(output, its loss as a function). None among the batches: an empty one, which fills their number up.
        return_schedule_plan: Megatron's name of `Policy.forward`'s `as_plan`.
        """
        forward = functools.partial(self.policy.forward, as_plan=return_schedule_plan)
        batch = next(batches)
        tick("microbatch")
        if batch is None:
            filler = build_microbatch([], [], ()).to(self.policy.device)
            output, part = forward(module, filler, mtp_loss=self.mtp_loss, records=self.records)
            offsets = None
        else:
            offsets = batch.row_offsets() if self.sums_over == "samples" else None  # before it is on a device
            batch = batch.to(self.policy.device, kept=self.policy.is_last(module))
            output, part = forward(module, batch, mtp_loss=self.mtp_loss, records=self.records)
        return output, functools.partial(self.value, batch, part, offsets)

    def value(self, batch: B | None, part: Shard, offsets: list[int] | None, output: torch.Tensor) -> _Value:
        """(loss, rows of this rank, nothing for Megatron to report). offsets: of the samples' rows, where they count."""
        head = self.policy.one_pass_head if self.sums_over is not None and not self.mtp_loss else None
        if head is not None and offsets and max(map(operator.sub, offsets[1:], offsets), default=0) > head.chunk_tokens:
            head = None  # all logits of a sample that is longer than a chunk would be held
        if batch is not None and head is not None:
            whole = offsets is not None
            value, found = head.loss(
                output[0], part, self.temperature,
                lambda scores, rows: self.loss(batch.of_rows(rows, of_samples=whole), scores), offsets, entropies=self.entropies,
            )  # fmt: skip
            self.statistics += found
        else:
            num_rows = 0 if batch is None else batch.rows.numel()
            scores = self.policy.read(
                output, part, num_rows, self.temperature, mtp_loss=self.mtp_loss, entropies=self.entropies
            )
            if batch is None:
                value = scores.values.sum()  # of nothing
            else:
                value, statistics = self.loss(batch, scores)
                self.statistics.append(statistics)
        return value, torch.tensor(part.rows.numel(), dtype=torch.int), {}


def state_of(chunk: GPTModel) -> Iterator[tuple[str, torch.Tensor]]:
    """What a reference is a copy of: parameters, and the router's expert bias (a buffer that decides routing)."""
    yield from chunk.named_parameters()
    yield from ((name, b) for name, b in chunk.named_buffers() if name.endswith("expert_bias"))


def _host_memory(value: torch.Tensor) -> torch.Tensor:
    """Room for a copy, pinned where it is of a GPU, which then reads it while it computes."""
    return torch.empty(value.shape, dtype=value.dtype, device="cpu", pin_memory=value.is_cuda)


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
