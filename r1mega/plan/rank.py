"""What one rank holds: weights, gradients and optimizer state in bytes, activations in bytes a token.

Nothing here is a formula of the model. The policy and its trainer are built as a run builds them, for a rank of the layout,
on tensors without memory (`shapes`), and a microbatch goes through layers forward and backward; what lives is counted.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from r1mega import platform

platform.prepare()  # before the first import of megatron

from megatron.core.transformer.transformer_layer import TransformerLayer  # noqa: E402

from r1mega.config.layout import num_experts  # noqa: E402
from r1mega.config.schema import ModelConfig, OptimizerConfig, ParallelConfig  # noqa: E402
from r1mega.model.architecture import Architecture  # noqa: E402
from r1mega.model.families import architecture_of  # noqa: E402
from r1mega.plan.fused import buildable, is_quantised, keep_as_on_gpu, quantised_bytes  # noqa: E402
from r1mega.plan.offload import Offload, offloading  # noqa: E402
from r1mega.plan.place import as_rank  # noqa: E402
from r1mega.plan.shapes import ShapesOnly, first_columns  # noqa: E402
from r1mega.train.optimizer import fill_empty_state  # noqa: E402
from r1mega.train.packing import Microbatch, build_microbatch  # noqa: E402
from r1mega.train.phases import pinned_bytes  # noqa: E402
from r1mega.train.policy import Policy, state_of  # noqa: E402
from r1mega.train.trainer import Trainer  # noqa: E402

LONGEST = 8192
"""Tokens of a rank that are sent through; activations of a longer microbatch are so many times those of this one. They are
proportional to tokens, but for gradients of whole weights, and from here on these are not at the peak.
"""


Kind = tuple[bool, bool]
"""Of a decoder layer: (whether it has experts, whether it computes in FP8). Layers of one kind keep the same."""


def kind_of(layer: int, architecture: Architecture, model: ModelConfig) -> Kind:
    """Of a decoder layer, from 0."""
    return architecture.has_experts(layer), is_quantised(layer + 1, architecture.num_layers, model)


@dataclass(frozen=True, slots=True)
class Static:
    """Bytes of a rank. main_params: the optimizer's float32 copies; 0 where the weights are float32 themselves.

    In host memory: reference: the reference's weights, pinned one by one; cpu_adam: what an Adam on the CPU has there beside
    main parameters and moments: float32 gradients, pinned, and what was pinned of the weights to copy them.
    quantised: on the device while layers compute in FP8: copies of their weights, of rows and of columns.
    """

    weights: int
    gradients: int
    main_params: int
    exp_avg: int
    exp_avg_sq: int
    num_parameters: int
    num_expert_parameters: int
    reference: int
    cpu_adam: int = 0
    quantised: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.main_params + self.exp_avg + self.exp_avg_sq


@dataclass(frozen=True, slots=True)
class Activations:
    """Bytes of a microbatch of `tokens` (of all ranks of cp together), on the fullest expert rank.

    kept: from forward to backward, of one microbatch in one chunk; working: beside what is kept, at the worst moment of a
    forward and backward pass; forward: at the worst moment of a pass without gradients; layers: kept by one layer of each
    kind of which that is known. moved: of what `model.offload_modules` has in host memory instead of kept; pinned: what that
    takes there.
    """

    tokens: int
    kept: float
    working: float
    forward: float
    layers: Mapping[Kind, float]
    moved: float = 0.0
    pinned: float = 0.0

    def scaled(self, tokens: int) -> Activations:
        """Of another number of tokens."""
        times = tokens / self.tokens
        layers = {kind: kept * times for kind, kept in self.layers.items()}
        return Activations(
            tokens, self.kept * times, self.working * times, self.forward * times, layers,
            self.moved * times, self.pinned * times,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class RankMemory:
    """activations: of each chunk (virtual pipeline stage) of the rank."""

    static: Static
    activations: tuple[Activations, ...]


def measure(
    hf: Mapping[str, Any],
    model: ModelConfig,
    parallel: ParallelConfig,
    optimizer: OptimizerConfig | None,
    *,
    world: int,
    rank: int,
    imbalance: float = 1.0,
    tokens: int,
    labels: bool = False,
    on_gpu: bool = True,
) -> RankMemory:
    """Of `rank` among `world`. optimizer: None: weights alone, of a model that is only asked.

    imbalance: tokens of this rank's experts over the mean. tokens: of the microbatch that is sent through.
    labels: they are known, so that layers of multi-token prediction, where `model` has them, have their loss.
    on_gpu: layers keep what they keep on a GPU (`plan/fused.py`: fused norms, activations and attention, FP8), not what the
    layers of a CPU keep.
    A rank is measured once in a process, and so is a layer whose activations hang on nothing else that was asked.
    Raises ConfigError for a layout that does not fit.
    """
    # dispatchers of other libraries, which are not here, send the same tokens; what of their buffers stays is not known
    anywhere = model.model_copy(update={"path": Path(), "dispatcher": "alltoall"})
    sent = min(tokens, LONGEST * parallel.tp * parallel.cp)
    asked = _Asked(json.dumps(hf), anywhere, imbalance, sent, labels, on_gpu)
    measured = _measured(asked, parallel, optimizer, world, rank)
    return RankMemory(measured.static, tuple(one.scaled(tokens) for one in measured.activations))


@dataclass(frozen=True, slots=True)
class _Asked:
    """hf: config.json as text; tokens: of the microbatch that is sent through."""

    hf: str
    model: ModelConfig
    imbalance: float
    tokens: int
    labels: bool
    on_gpu: bool


@functools.cache
def _measured(
    asked: _Asked, parallel: ParallelConfig, optimizer: OptimizerConfig | None, world: int, rank: int
) -> RankMemory:
    hf = json.loads(asked.hf)
    route = Routes.of(hf, parallel, rank, asked.imbalance) if num_experts(hf) else None
    with as_rank(parallel, world, rank), ShapesOnly(route, fused_norms=asked.on_gpu) as mode:
        policy = Policy(buildable(asked.model), hf, parallel, seed=0)
        offload = Offload(asked.model.megatron.min_offloaded_tensor_size)
        if asked.on_gpu:
            for chunk in policy.chunks:
                keep_as_on_gpu(chunk, asked.model, offload)
        for parameter in itertools.chain(*(chunk.parameters() for chunk in policy.chunks)):
            parameter.register_post_accumulate_grad_hook(_forget_gradient)  # it is added to a buffer that stays
        batch = build_microbatch([[0] * asked.tokens], [1], [0])
        key = (asked, parallel.tp, parallel.sp, parallel.cp, parallel.ep, parallel.etp)
        mtp_loss = asked.labels and bool(policy.megatron_config.mtp_num_layers)
        one = _Pass(policy, batch, mode, asked.model, mtp_loss, offload)
        with offloading(policy.chunks, asked.model.offload_modules if asked.on_gpu else (), offload):
            activations = tuple(_activations(one, index, key) for index in range(len(policy.chunks)))
        quantised = sum(quantised_bytes(chunk, asked.model) for chunk in policy.chunks) if asked.on_gpu else 0
        return RankMemory(dataclasses.replace(_static(policy, optimizer), quantised=quantised), activations)


@dataclass(frozen=True, slots=True)
class Routes:
    """A router's choices: `imbalance` times their share go to the experts of this rank, the others' are spread evenly."""

    experts: range
    count: int
    chosen: int
    imbalance: float

    @classmethod
    def of(cls, hf: Mapping[str, Any], parallel: ParallelConfig, rank: int, imbalance: float) -> Routes:
        """imbalance is cut to what the chosen experts of every token allow."""
        model = architecture_of(hf).experts
        assert model is not None
        local = model.count // parallel.ep
        first = rank // parallel.etp % parallel.ep * local
        most = min(1.0, local / model.chosen) * model.count / local
        return cls(range(first, first + local), model.count, model.chosen, min(imbalance, most))

    def __call__(self, rows: int, columns: int, k: int) -> torch.Tensor:
        """[rows, k] int64, different in a row. Of groups of experts: the first."""
        if (columns, k) != (self.count, self.chosen):
            return first_columns(rows, columns, k)
        local = len(self.experts)
        share = self.imbalance * k * local / columns  # of a token's choices
        ends = (torch.arange(1, rows + 1) * share).round().long()
        here = ends.diff(prepend=ends.new_zeros(1))[:, None]  # choices of each token that stay on this rank
        place = torch.arange(k)[None]
        own = self.experts.start + (ends[:, None] - here + place) % local
        spread = torch.arange(rows)[:, None] * k + place
        others = (self.experts.stop + spread % max(1, columns - local)) % columns
        return torch.where(place < here, own, others)


def _forget_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


@dataclass(frozen=True, slots=True)
class _Pass:
    """A microbatch on its way through a policy; model: what its layers do as; mtp_loss: with that of multi-token prediction."""

    policy: Policy
    batch: Microbatch
    mode: ShapesOnly
    model: ModelConfig
    mtp_loss: bool
    offload: Offload

    def forward(self, index: int) -> torch.Tensor:
        """Through one chunk."""
        policy, config = self.policy, self.policy.megatron_config
        chunk = policy.chunks[index]
        if not chunk.pre_process:
            tokens = self.batch.num_tokens // config.context_parallel_size
            tokens //= config.tensor_model_parallel_size if config.sequence_parallel else 1
            if self.mtp_loss and chunk.post_process and not chunk.mtp_process:
                tokens *= 1 + config.mtp_num_layers  # those of another stage, behind the decoder's
            grad = torch.is_grad_enabled()
            chunk.set_input_tensor(torch.empty(tokens, 1, config.hidden_size, dtype=policy.dtype, requires_grad=grad))
        return policy.forward(policy.modules[index], self.batch, mtp_loss=self.mtp_loss)[0]

    def kind(self, layer: TransformerLayer) -> Kind:
        """Of a decoder layer."""
        return hasattr(layer.mlp, "experts"), is_quantised(layer.layer_number, layer.config.num_layers, self.model)


@dataclass(frozen=True, slots=True)
class _Kept:
    """Bytes of a microbatch: from forward to backward on the device, and in host memory (see Activations)."""

    kept: int
    moved: int
    pinned: int

    def beyond(self, other: _Kept) -> _Kept:
        return _Kept(self.kept - other.kept, self.moved - other.moved, self.pinned - other.pinned)


_ends: dict[Hashable, tuple[int, _Kept, int]] = {}
"""Of a chunk with one layer of each of its kinds: (bytes of a forward pass at its worst, what it keeps, working)."""
_further: dict[Hashable, _Kept] = {}
"""Of another layer of a kind."""


def _activations(one: _Pass, index: int, key: Hashable) -> Activations:
    """Of one chunk: one layer of each kind is run, and again with another of its kind for what each of those adds.

    key: all that a layer's activations hang on; of what was run with it nothing is run again.
    """
    chunk = one.policy.chunks[index]
    decoder = chunk.decoder
    layers, number = decoder.layers, decoder.num_layers_per_pipeline_rank
    kinds: dict[Kind, list[Any]] = {}
    for layer in layers:
        kinds.setdefault(one.kind(layer), []).append(layer)

    def choose(*chosen: Any) -> None:
        decoder.layers, decoder.num_layers_per_pipeline_rank = torch.nn.ModuleList(chosen), len(chosen)

    one_each = [same[0] for same in kinds.values()]
    end = (key, chunk.pre_process, chunk.post_process, chunk.mtp_process, tuple(kinds))
    try:
        if end not in _ends:
            choose(*one_each)
            forward = _forward_peak(one, index)
            _ends[end] = (forward, *_kept(one, index, backward=True))
        forward, kept, working = _ends[end]
        for kind, same in kinds.items():
            if len(same) > 1 and (key, kind) not in _further:
                choose(*one_each, same[0])
                _further[key, kind] = _kept(one, index, backward=False)[0].beyond(kept)
    finally:
        decoder.layers, decoder.num_layers_per_pipeline_rank = layers, number
    each = {kind: _further[key, kind].kept for kind in kinds if (key, kind) in _further}
    more = [(len(same) - 1, _further[key, kind]) for kind, same in kinds.items() if len(same) > 1]
    unknown = [kind for kind in kinds if kind not in each]
    if len(unknown) == 1 and not (chunk.post_process or chunk.mtp_process):
        each[unknown[0]] = kept.kept - sum(each.values())
    # those of one layer are on the device while they are on their way there, or back before they are wanted
    alone = kept.moved - sum(layer.moved for _, layer in more)  # of kinds with one layer
    under_way = max([alone, *(layer.moved for _, layer in more)])
    return Activations(
        one.batch.num_tokens, kept.kept + sum(n * layer.kept for n, layer in more), working + under_way, forward, each,
        kept.moved + sum(n * layer.moved for n, layer in more), kept.pinned + sum(n * layer.pinned for n, layer in more),
    )  # fmt: skip


def _kept(one: _Pass, index: int, *, backward: bool) -> tuple[_Kept, int]:
    """(what a microbatch keeps from forward to backward; bytes of the most that is there beside, at any time of both).

    Two microbatches go forward: what the second adds is kept, and not what modules remember of the last one they saw.
    """
    chunk, mode = one.policy.chunks[index], one.mode
    before = mode.live_bytes
    first = one.forward(index)
    freed = 0 if chunk.post_process else first.untyped_storage().nbytes()  # when it has been sent
    once = mode.live_bytes - before
    moved, pinned = one.offload.moved, one.offload.pinned
    mode.restart_peak()
    second = one.forward(index)
    kept = mode.live_bytes - before - once - freed
    found = _Kept(kept, one.offload.moved - moved, one.offload.pinned - pinned)
    if backward:
        second.backward(torch.empty_like(second))
    working = mode.peak_bytes - before - freed - 2 * kept
    del first, second
    chunk.set_input_tensor(None)
    return found, working


def _forward_peak(one: _Pass, index: int) -> int:
    mode = one.mode
    before = mode.live_bytes
    mode.restart_peak()
    with torch.no_grad():
        one.forward(index)
    one.policy.chunks[index].set_input_tensor(None)
    return mode.peak_bytes - before


def _static(policy: Policy, optimizer: OptimizerConfig | None) -> Static:
    """The trainer is made here: activations are counted before."""
    for module in itertools.chain(*(chunk.modules() for chunk in policy.chunks)):
        if hasattr(module, "_maintain_float32_expert_bias"):
            module._maintain_float32_expert_bias()  # as each router does when it is first asked
    parameters = [parameter for chunk in policy.chunks for parameter in chunk.parameters()]
    experts = sum(p.numel() for p in parameters if not getattr(p, "allreduce", True))
    pinned = sum(
        pinned_bytes(value.numel() * value.itemsize) for chunk in policy.chunks for _, value in state_of(chunk)
    )
    numbers = (sum(p.numel() for p in parameters), experts, pinned)
    if optimizer is None:
        return Static(_bytes(parameters), 0, 0, 0, 0, *numbers)
    trainer = Trainer(policy, optimizer, total_steps=1)
    fill_empty_state(trainer.optimizer)
    buffers = [b for chunk in trainer.ddp_chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    parts = getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer])
    updated = [p for part in parts for group in part.optimizer.param_groups for p in group["params"]]
    states = [state for part in parts for state in part.optimizer.state.values()]
    weights = [*parameters, *(b for chunk in policy.chunks for b in chunk.buffers())]
    mains = [*updated, *(state["master_param"] for state in states if "master_param" in state)]
    held = {tensor.untyped_storage()._cdata for tensor in weights}
    return Static(
        _bytes(weights),
        _bytes(buffer.grad_data for buffer in buffers),
        _bytes(p for p in mains if p.untyped_storage()._cdata not in held),
        _bytes(state["exp_avg"] for state in states),
        _bytes(state["exp_avg_sq"] for state in states),
        *numbers,
        sum(pinned_bytes(4 * p.numel()) + pinned_bytes(policy.dtype.itemsize * p.numel()) for p in updated),
    )


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Of their storages, each counted once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())
