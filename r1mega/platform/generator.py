"""What a platform owes vLLM, and the choice: `vllm_cuda` where there is a GPU, else `vllm_cpu`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch

from r1mega.config.model_files import HFConfig
from r1mega.platform import current, vllm_cpu, vllm_cuda


class VllmPlatform(Protocol):
    """Prepares, patches, reloads and puts to sleep vLLM. A module is one, its functions the methods.

    worker: vLLM's GPUWorker or CPUWorker of this rank; llm_engine: its LLMEngine.
    """

    @property
    def PACKAGE(self) -> str:
        """What pip calls vLLM here."""

    @property
    def SEVERAL_ENGINES_A_PROCESS(self) -> bool:
        """Whether a process can build another engine after it closed one."""

    @property
    def DEFAULT_KV_CACHE_BYTES(self) -> int | None:
        """None: vLLM measures what is left."""

    @property
    def PARAMETERS_ARE_PLAIN_BEFORE_FINISH(self) -> bool:
        """Whether parameters can be read by HF layout before `finish_*` (else only after it)."""

    @property
    def RETURNS_ROUTED_EXPERTS(self) -> bool:
        """Whether its model runner returns which experts were chosen."""

    def return_routed_experts(self) -> dict[str, object]:
        """Makes the engine that is built next return them, where it can; arguments of vLLM's EngineArgs for that."""

    @property
    def CUTS_KV_CACHE(self) -> bool:
        """Whether vLLM has attention here over a cache that is cut over ranks (decode context parallelism)."""

    def prepare_environment(self) -> None:
        """Sets what vLLM reads at import. Raises PlatformError for a value with which it cannot run in this process."""

    def apply_patches(self) -> None:
        """Idempotent; torch.distributed is initialised. Raises PlatformError for a vLLM that they were not made for."""

    def engine_arguments(
        self, model_config: HFConfig, kv_cache_bytes: int | None, gpu_memory_utilization: float
    ) -> dict[str, Any]:
        """Arguments of vLLM's EngineArgs that this platform alone needs."""

    def scheduler_arguments(self) -> dict[str, object]:
        """Arguments of vLLM's EngineArgs that say which scheduler it takes; {}: its own."""

    def kv_block_tokens(self, model_config: HFConfig) -> int:
        """Tokens a KV-cache block."""

    def check_model(self, model_config: HFConfig) -> str | None:
        """What keeps this model (its config.json) off the platform, or None."""

    def begin_reload(self, worker: Any) -> None:
        """Opens a reload through vLLM's loaders."""

    def load_weights(self, worker: Any, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """One bucket of (HF name, full tensor) into vLLM's loader of this model."""

    def finish_reload(self, worker: Any) -> None:
        """Processes what was loaded for the kernels."""

    def begin_write(self, worker: Any) -> None:
        """Makes all parameters plain, to be written in place."""

    def finish_write(self, worker: Any) -> None:
        """Processes what was written for the kernels."""

    def wake_weights(self, llm_engine: Any, is_asleep: bool) -> None:
        """Weights can be written afterwards; the KV cache stays freed."""

    def free_memory(self, llm_engine: Any, worker: Any, keep_weights: bool) -> Callable[[], None]:
        """Frees the KV cache, and what else a sleep frees here; returns what undoes it (the cache is empty then)."""


def vllm_platform() -> VllmPlatform:
    """That of this machine."""
    return vllm_cuda if current().name == "cuda" else vllm_cpu
