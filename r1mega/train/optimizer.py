"""Megatron's distributed Adam, its learning-rate schedule, its state before the first step and on its way to a checkpoint."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from r1mega import platform

platform.prepare()  # before the first import of megatron

from megatron.core.optimizer import DistributedOptimizer, get_megatron_optimizer  # noqa: E402
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig  # noqa: E402
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer  # noqa: E402
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler  # noqa: E402

from r1mega.checkpoint.torch_dist import Stored  # noqa: E402
from r1mega.config.schema import OptimizerConfig  # noqa: E402
from r1mega.errors import PlatformError  # noqa: E402

SHARDING_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,
    "chained_optim_avoid_prefix": True,
}
"""How optimizer state is laid out in checkpoints: loadable into any other parallel layout, gathered over gloo in host
memory (megatron-core's other way gathers whole fp32 buffers on the GPU, beside the model). It is not gathered to be loaded:
each rank reads its own shards."""

_STATE = ("param", "exp_avg", "exp_avg_sq")
_BLOCK = 2**24
"""Elements of one message of gathered state: 64 MiB, which is all the memory that a rank needs beside the result."""


def build_optimizer(config: OptimizerConfig, ddp_chunks: Sequence[torch.nn.Module], dtype: torch.dtype) -> Any:
    """Adam over the gradient buffers of DDP-wrapped model chunks, its state shared out over the data-parallel ranks."""
    on_gpu = platform.current().name == "cuda"
    moments = (config.exp_avg_dtype, config.exp_avg_sq_dtype) if config.precision_aware else ("float32", "float32")
    narrow = config.precision_aware and not config.grad_reduce_in_fp32
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.beta1,
            adam_beta2=config.beta2,
            adam_eps=config.eps,
            clip_grad=config.clip_grad,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=True,
            optimizer_cpu_offload=config.cpu_offload,
            optimizer_offload_fraction=1.0,
            # CPU Adam: no main parameters on the device
            use_precision_aware_optimizer=config.cpu_offload or config.precision_aware,
            main_grads_dtype=dtype if narrow else torch.float32,
            exp_avg_dtype=getattr(torch, moments[0]),
            exp_avg_sq_dtype=getattr(torch, moments[1]),
            store_param_remainders=False,  # checkpoints hold whole main parameters
            pin_cpu_grads=on_gpu,
            pin_cpu_params=on_gpu,
        ),
        ddp_chunks,
        use_gloo_process_groups=True,
    )
    for part in parts(optimizer):
        if not hasattr(part, "get_parameter_state_dp_zero"):
            raise PlatformError(
                "megatron-core has changed: its optimizer has no get_parameter_state_dp_zero to replace"
            )
        if not hasattr(part, "load_parameter_state_from_fully_reshardable"):
            raise PlatformError(
                "megatron-core has changed: its optimizer has no load_parameter_state_from_fully_reshardable"
            )
        if config.cpu_offload and part.optimizer is not None:
            for group in part.optimizer.param_groups:  # classes, which a checkpoint cannot hold; `defaults` has them
                del group["cpu_optimizer_cls"], group["gpu_optimizer_cls"]
        if config.precision_aware and part.optimizer is not None:
            # Transformer Engine's own makes float32 copies of all moments, and Megatron asks for the groups alone
            part.optimizer.state_dict = functools.partial(torch.optim.Optimizer.state_dict, part.optimizer)
        part.get_parameter_state_dp_zero = functools.partial(gather_state, part)
        part.load_parameter_state_from_fully_reshardable = functools.partial(read_state, part)
    return optimizer


def parts(optimizer: Any) -> Sequence[Any]:
    """Megatron's distributed optimizers in it: one of the dense weights, one of the experts."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def learning_rate_schedule(optimizer: Any, config: OptimizerConfig, total_steps: int) -> OptimizerParamScheduler:
    """Warm-up, then constant, or a decay over the last `decay_steps` steps (warmup-stable-decay)."""
    longest = max(1, total_steps - config.warmup_steps)
    decay = min(config.decay_steps or longest, longest)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.warmup_steps,
        lr_decay_steps=max(total_steps, config.warmup_steps + 1),
        lr_decay_style="constant" if config.schedule == "constant" else "WSD",
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=total_steps,
        wd_incr_style="constant",
        wsd_decay_steps=decay,
        lr_wsd_decay_style=None if config.schedule == "constant" else config.schedule,
        use_checkpoint_opt_param_scheduler=False,  # a run that goes on with more steps decays over those
        override_opt_param_scheduler=True,
    )


def fill_empty_state(optimizer: Any) -> None:
    """Give an optimizer that has not stepped yet its state of zeros: without it Megatron cannot save it."""
    for part in parts(optimizer):
        if part.optimizer.state or not any(group["params"] for group in part.optimizer.param_groups):
            continue
        rates = [(group, group["lr"], group["weight_decay"]) for group in part.optimizer.param_groups]
        for group, _, _ in rates:
            group["lr"] = group["weight_decay"] = 0.0  # the step that makes the state must not move a weight
        if part.config.use_precision_aware_optimizer and not isinstance(part.optimizer, HybridDeviceOptimizer):
            for param in (param for group, _, _ in rates for param in group["params"]):
                part.optimizer.initialize_state(param, False)
        else:
            part._init_optimizer_states_with_dummy_values()
        for group, lr, weight_decay in rates:
            group["lr"], group["weight_decay"], group["step"] = lr, weight_decay, 0
        if isinstance(part.optimizer, HybridDeviceOptimizer):
            for state in part.optimizer.state.values():
                state["step"].zero_()


def own_state(optimizer: DistributedOptimizer, param: torch.Tensor) -> dict[str, torch.Tensor]:
    """This rank's share of a parameter's main parameter and moments, [elements] each, as they are stored: what
    DistributedOptimizer._get_main_param_and_optimizer_states copies to float32 where it is stored in another type.
    """
    group, place = optimizer.model_param_group_index_map[param]
    updated = optimizer.optimizer.param_groups[group]["params"][place]
    state = optimizer.optimizer.state[updated]
    main = updated if updated.dtype == torch.float32 else state["master_param"]
    return {"param": main.detach(), "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}


def gather_state(
    optimizer: Any, use_gloo_comm: bool = True, empty_data: bool = False, return_on_all_ranks: bool = False
) -> dict[Any, Any] | None:
    """What DistributedOptimizer.get_parameter_state_dp_zero returns (megatron-core 0.16.1, distrib_optimizer.py:977), for
    gloo only: {buffer: {dtype: {"param" | "exp_avg" | "exp_avg_sq": [elements] float32, ...}}} in host memory.

    Whole on the first data-parallel rank, None on the others; empty_data: shapes alone (on torch's meta device), on all.

    Megatron's own makes the result, the rank's shards of all three, one key's shards of all ranks, and their
    concatenation: 32 bytes an element where the group is one rank (experts), 12 of them the result. Here it is the
    result, and a block on the ranks that send. Nothing is allocated on the device.
    """
    if not use_gloo_comm:
        raise NotImplementedError(f"{SHARDING_METADATA} gathers over gloo")
    group = optimizer.data_parallel_group_gloo
    whole = empty_data or group.rank() == 0
    if whole != (return_on_all_ranks or group.rank() == 0):
        raise NotImplementedError(f"{SHARDING_METADATA} returns state on one rank when it saves, on all when it loads")
    gathered: dict[Any, Any] = {"buckets_coalesced": True}
    for index, ranges in enumerate(optimizer.gbuf_ranges):
        buffer, ((dtype, bucket_ranges),) = optimizer.buffers[index], ranges.items()
        device = "meta" if empty_data else "cpu"
        state: dict[str, Any] = (
            {key: torch.zeros(buffer.numel_unpadded, device=device) for key in _STATE} if whole else {}
        )
        start = 0
        for bucket, bucket_range in zip(buffer.buckets, bucket_ranges, strict=True):
            size = bucket.numel_unpadded
            if not empty_data:
                parts = {key: state[key][start : start + size] if whole else None for key in _STATE}
                _gather_bucket(optimizer, bucket_range["param_map"], bucket.grad_data.numel(), size, parts, group)
            start += size
        gathered[index] = {dtype: state | ({"numel_unpadded": buffer.numel_unpadded} if whole else {})}
    return gathered if whole else None


@torch.no_grad()
def read_state(optimizer: Any, stored: dict[int, dict[str, Stored]]) -> None:
    """What DistributedOptimizer.load_parameter_state_from_fully_reshardable does (megatron-core 0.16.1,
    distrib_optimizer.py:2070), but each rank reads no more than its own shards, a block at a time.

    stored: by the parameter's place in the order of the buffers, as `sharded_state_dict(is_loading=True)` described them.
    """
    index = 0
    for buffer, ranges in zip(optimizer.buffers, optimizer.gbuf_ranges, strict=True):
        (bucket_ranges,) = ranges.values()
        local = {param: part["param"] for bucket in bucket_ranges for param, part in bucket["param_map"].items()}
        for param in buffer.param_index_map:
            if param in local:
                own = own_state(optimizer, param)
                for key in _STATE:
                    stored[index][key].copy_into(own[key], local[param].start)
            index += 1
    if isinstance(optimizer.optimizer, HybridDeviceOptimizer):
        optimizer.optimizer._sync_hdo_state_to_sub_optimizers()


def _gather_bucket(
    optimizer: Any, params: dict[Any, Any], padded: int, size: int, parts: dict[str, torch.Tensor | None], group: Any
) -> None:
    """Fill the first rank's `parts` ([size] each; None elsewhere). Rank r holds the r-th of equal shares of `padded`."""
    share = padded // group.size()
    for rank in range(group.size()):
        here = min(share, max(0, size - rank * share))  # the last ranks' shares may be padding
        for key, part in parts.items():
            for first, last in _blocks(here):
                if part is not None:
                    target = part[rank * share + first : rank * share + last]
                elif rank == group.rank():
                    target = torch.zeros(last - first, device="cpu")
                else:
                    continue
                if rank == group.rank():
                    _copy_own(optimizer, params, key, first, target)
                    if rank > 0:
                        dist.send(target, group=group, group_dst=0)
                elif part is not None:
                    dist.recv(target, group=group, group_src=rank)


def _blocks(count: int) -> Iterator[tuple[int, int]]:
    for first in range(0, count, _BLOCK):
        yield first, min(count, first + _BLOCK)


def _copy_own(optimizer: Any, params: dict[Any, Any], key: str, first: int, target: torch.Tensor) -> None:
    """Elements [first, first + len(target)) of this rank's share of a bucket."""
    last = first + target.numel()
    for param, ranges in params.items():
        begin, end = ranges["gbuf_local"].start, ranges["gbuf_local"].end
        low, high = max(begin, first), min(end, last)
        if low < high:
            own = own_state(optimizer, param)[key]
            target[low - first : high - first].copy_(own[low - begin : high - begin])
