"""The generator that a config asks for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from r1mega.config.schema import Dtype, RolloutConfig
from r1mega.rollout.engine import EngineSettings
from r1mega.types import GenerationEngine

if TYPE_CHECKING:
    from r1mega.config.stages.evaluate import GeneratorConfig

EngineName = Literal["vllm", "transformers"]


def engine_settings(
    path: Path,
    dtype: Dtype,
    max_model_len: int,
    rollout: RolloutConfig | GeneratorConfig,
    **more: Any,
) -> EngineSettings:
    """Of the model at `path` (its tokenizer is there too) by a config's `rollout` section. more: other fields of EngineSettings."""
    return EngineSettings(
        path,
        max_model_len,
        dtype,
        max_num_seqs=rollout.max_num_seqs,
        max_batched_tokens=rollout.max_batched_tokens,
        kv_cache_bytes=rollout.kv_cache_bytes,
        gpu_memory_utilization=rollout.gpu_memory_utilization,
        tp=rollout.tp,
        ep=rollout.ep,
        dcp=rollout.dcp,
        tokenizer_path=path,
        **more,
    )


def build_engine(settings: EngineSettings, name: EngineName) -> GenerationEngine:
    """The generator of that name (`rollout.engine`). Raises as its class does."""
    if name == "transformers":
        from r1mega.rollout.transformers_engine import TransformersEngine

        return TransformersEngine(settings)
    from r1mega.rollout.vllm_engine import VllmEngine

    return VllmEngine(settings)


@contextlib.contextmanager
def open_engine(settings: EngineSettings, name: EngineName) -> Iterator[GenerationEngine]:
    """`build_engine`; closed at the end."""
    engine = build_engine(settings, name)
    try:
        yield engine
    finally:
        engine.close()
