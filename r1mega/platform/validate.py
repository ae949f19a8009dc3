"""Checks of a config against the machine it is to run on. Imports torch, starts no process group."""

from __future__ import annotations

import importlib.util
import json
import logging

import torch

import r1mega_kernels
from r1mega import platform
from r1mega.config.schema import Stage
from r1mega.errors import ConfigError, PlatformError
from r1mega.platform import libraries
from r1mega.platform.fp8 import recipe_problem
from r1mega.platform.generator import vllm_platform
from r1mega.platform.vllm_version import check_version

logger = logging.getLogger(__name__)

FP8_CAPABILITY = (8, 9)
"""From which compute capability on a GPU multiplies e4m3 numbers."""


def _check_kernels(device: str, log_probs: str) -> None:
    """Advantages are computed on the CPU by its kernels whatever computes the log-probs, and wherever."""
    try:
        r1mega_kernels.backend("cpu")
    except r1mega_kernels.PlatformError as error:  # of a package that knows nothing of r1mega's
        raise PlatformError(str(error)) from error
    if device == "cpu" or log_probs == "reference":
        return
    try:
        is_missing = r1mega_kernels.backend(device) == "missing"
    except r1mega_kernels.PlatformError as error:
        raise PlatformError(f"{error} model.log_probs=reference does without.") from error
    if is_missing:
        raise PlatformError(
            "the CUDA kernels are not built: run `python kernels/build.py --cuda` (wants nvcc), or set "
            "model.log_probs=reference"
        )


def validate_platform(config: Stage) -> None:
    """Raises PlatformError for what this machine lacks, ConfigError for a model that its generator has no kernels for.

    What works but badly is a warning. `validate.validate` comes first: the model's config.json is there and is JSON.
    """
    here = platform.current()
    if here.name == "cuda":
        _check_libraries()
    _check_kernels(here.name, config.model.log_probs)
    if config.model.dispatcher != "alltoall" and (here.name == "cpu" or importlib.util.find_spec("deep_ep") is None):
        raise PlatformError(
            f"model.dispatcher = {config.model.dispatcher} needs a GPU and the package deep_ep, which are not both here; set "
            "model.dispatcher=alltoall, or install it from github.com/deepseek-ai/DeepEP"
        )
    if config.model.fp8 != "off":
        if not here.has_transformer_engine:
            raise PlatformError(
                f"model.fp8 = {config.model.fp8} needs Transformer Engine and a GPU, which are not here; set model.fp8=off"
            )
        if (problem := recipe_problem(config.model.fp8)) is not None:
            raise PlatformError(problem)
    if config.model.dtype == "bfloat16" and here.name == "cpu":
        logger.warning(
            "model.dtype = bfloat16 on a CPU is slow and parts trainer and sampler; consider model.dtype=float32"
        )
    rollout = getattr(config, "rollout", None)
    if rollout is None or rollout.engine != "vllm":
        return
    if (quantization := getattr(rollout, "quantization", None)) is not None:
        _check_fp8_kernels(here.name, quantization)
    vllm = vllm_platform()
    check_version(vllm.PACKAGE)
    model = json.loads((config.model.path / "config.json").read_text())
    if getattr(rollout, "kv_cache_dtype", "auto") != "auto" and here.name == "cpu" and "kv_lora_rank" in model:
        raise ConfigError(
            f"rollout.kv_cache_dtype = {rollout.kv_cache_dtype}: vLLM's CPU kernel for latent attention has its cache in "
            "model.dtype; leave kv_cache_dtype out"
        )
    if (refusal := vllm.check_model(model)) is not None:
        raise ConfigError(f"{config.model.path}/config.json: {refusal}; change it, or set rollout.engine=transformers")


def _check_fp8_kernels(device: str, quantization: str) -> None:
    if device == "cpu":
        raise PlatformError(
            f"rollout.quantization = {quantization}: vLLM has FP8 kernels for GPUs (and CPUs with AMX, for which no weights are "
            "pushed here); leave it out"
        )
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) < FP8_CAPABILITY:
        raise PlatformError(
            f"rollout.quantization = {quantization}: a GPU of compute capability {major}.{minor} has no FP8 ({FP8_CAPABILITY[0]}."
            f"{FP8_CAPABILITY[1]} and higher have); leave it out"
        )


def _check_libraries() -> None:
    """Not installed is a choice (local layers); installed and not working is none, and would be a silent one."""
    engine, apex = libraries.transformer_engine(), libraries.apex()
    if engine.state == "broken":
        raise PlatformError(engine.problem)
    if apex.state == "broken":
        logger.warning("%s; gradient accumulation is not fused", apex.problem)
