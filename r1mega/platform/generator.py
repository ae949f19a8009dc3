"""Chooses the vLLM side of the platform: `vllm_cuda` where there is a GPU, else `vllm_cpu`."""

from __future__ import annotations

from types import ModuleType

from r1mega.platform import current, vllm_cpu, vllm_cuda


def vllm_platform() -> ModuleType:
    """The module whose functions prepare, patch, reload and put to sleep the vLLM of this machine."""
    return vllm_cuda if current().name == "cuda" else vllm_cpu
