"""Process groups: torch.distributed and Megatron's parallel groups for one layout."""

from __future__ import annotations

import os
import random
import socket
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from r1mega import platform
from r1mega.config.layout import Layout, process_problems
from r1mega.errors import ConfigError

TIMEOUT = timedelta(minutes=30)


def init_distributed() -> None:
    """Join the job that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT name, or be a job of one process. Idempotent.

    The variables are set for a single process too: libraries in the same process (vLLM's external launcher) read them.
    """
    if dist.is_initialized():
        return
    here = platform.current()
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ["MASTER_PORT"] = str(_free_port())
    os.environ.setdefault("LOCAL_RANK", "0")
    if here.name == "cuda":
        torch.cuda.set_device(here.device)
    alone = os.environ["WORLD_SIZE"] == "1"  # then nobody needs to find anybody: no port that could be taken
    dist.init_process_group(
        here.distributed_backend,
        timeout=TIMEOUT,
        device_id=here.device if here.name == "cuda" else None,
        **({"store": dist.HashStore(), "rank": 0, "world_size": 1} if alone else {}),
    )


def init_parallel(layout: Layout, seed: int) -> None:
    """init_distributed, Megatron's groups for `layout`, and random seeds (each pipeline stage and TP rank its own).

    Raises ConfigError when the world size does not fit the layout.
    """
    platform.prepare()
    init_distributed()
    for problem in process_problems(layout, dist.get_world_size()):
        raise ConfigError(problem)
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if (layout.vpp or 1) > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        create_gloo_process_groups=True,
    )
    seed_all(seed)


def seed_all(seed: int) -> None:
    """Seed Python, torch and Megatron's generators: equal on ranks that hold the same weights, else different."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    stage_seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(stage_seed)
    torch.manual_seed(stage_seed)
    model_parallel_cuda_manual_seed(stage_seed, force_reset_rng=True)


def destroy() -> None:
    """Take down Megatron's groups and torch.distributed; nothing happens when there are none."""
    import sys

    if "megatron.core.parallel_state" in sys.modules:
        parallel_state: Any = sys.modules["megatron.core.parallel_state"]
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
    if "megatron.core.transformer.moe.moe_utils" in sys.modules:  # the scale is a class's, and of the last schedule's shape
        sys.modules["megatron.core.transformer.moe.moe_utils"].MoEAuxLossAutoScaler.main_loss_backward_scale = None
    if dist.is_initialized():
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
