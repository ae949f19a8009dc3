"""Megatron's distributed Adam, its learning-rate schedule, its state before the first step and on its way to a checkpoint."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from r1mega import platform

platform.prepare()  # before the first import of megatron

from megatron.core.dist_checkpointing.dict_utils import nested_values  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory  # noqa: E402
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories  # noqa: E402
from megatron.core.optimizer import DistributedOptimizer, get_megatron_optimizer  # noqa: E402
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig  # noqa: E402
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer  # noqa: E402
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler  # noqa: E402

from r1mega.checkpoint.torch_dist import Stored  # noqa: E402
from r1mega.config.schema import OptimizerConfig  # noqa: E402
from r1mega.errors import PlatformError  # noqa: E402

SHARDING_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
"""How optimizer state is laid out in checkpoints: loadable into any other parallel layout. To be saved, parameter after
parameter is made whole on one of the ranks that hold it (`shard_state`); to be loaded, each rank reads its own shards."""

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
        for replaced in ("sharded_param_state_fully_reshardable", "load_parameter_state_from_fully_reshardable"):
            if not hasattr(part, replaced):
                raise PlatformError(f"megatron-core has changed: its optimizer has no {replaced} to replace")
        if config.cpu_offload and part.optimizer is not None:
            for group in part.optimizer.param_groups:  # classes, which a checkpoint cannot hold; `defaults` has them
                del group["cpu_optimizer_cls"], group["gpu_optimizer_cls"]
        if config.precision_aware and part.optimizer is not None:
            # Transformer Engine's own makes float32 copies of all moments, and Megatron asks for the groups alone
            part.optimizer.state_dict = functools.partial(torch.optim.Optimizer.state_dict, part.optimizer)
        part.sharded_param_state_fully_reshardable = functools.partial(shard_state, part)
        part.load_parameter_state_from_fully_reshardable = functools.partial(read_state, part)
    optimizer.prepare_grads = functools.partial(_prepare_finite, optimizer.prepare_grads, optimizer.get_grad_norm)
    return optimizer


@torch.no_grad()
def _prepare_finite(prepare: Callable[[], bool], norm: Callable[[], float]) -> bool:
    """Megatron's `prepare_grads`, at whose True its `step` returns with everything as it was: here also when the gradients'
    norm is not finite, on any rank (megatron-core 0.16.1, optimizer.py:524, looks at those of float16 alone).
    """
    found = prepare() or not math.isfinite(float(norm()))
    flag = torch.tensor(float(found))
    dist.all_reduce(flag, dist.ReduceOp.MAX)  # on a CPU tensor: over gloo, on either platform
    return bool(flag)


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


def even_steps(state: dict[Any, Any]) -> None:
    """Give all parameter groups of an optimizer's sharded state the number of steps that the furthest of them has.

    Steps are in what all ranks have in common, which the first rank writes: an optimizer that has no parameters there (that of
    the experts, where the first pipeline stage has none) has never counted one, and the ranks that have some would start Adam's
    bias correction anew. So is a checkpoint mended that was written without.
    """
    chained = [state] if "optimizer" in state else state.values()
    groups = [group for part in chained for group in part["optimizer"]["param_groups"]]
    steps = [group["step"] for group in groups if "step" in group]
    for group in groups if steps else ():
        group["step"] = max(steps)


def own_state(optimizer: DistributedOptimizer, param: torch.Tensor) -> dict[str, torch.Tensor]:
    """This rank's share of a parameter's main parameter and moments, [elements] each, as they are stored: what
    DistributedOptimizer._get_main_param_and_optimizer_states copies to float32 where it is stored in another type.
    """
    group, place = optimizer.model_param_group_index_map[param]
    updated = optimizer.optimizer.param_groups[group]["params"][place]
    state = optimizer.optimizer.state[updated]
    main = updated if updated.dtype == torch.float32 else state["master_param"]
    return {"param": main.detach(), "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}


def shard_state(
    optimizer: Any, model_state: dict[str, Any], is_loading: bool = False, metadata: object = None
) -> dict[int, dict[str, Any]]:
    """What DistributedOptimizer.sharded_param_state_fully_reshardable returns (megatron-core 0.16.1, distrib_optimizer.py:1404):
    {place of a parameter in the order of the buffers: {"param" | "exp_avg" | "exp_avg_sq": described as the parameter is in
    model_state, float32 in host memory}}, of those parameters that this rank saves; is_loading: of all, shapes alone (on
    torch's meta device).

    Megatron's gathers whole buffers on the first rank of a data-parallel group: 32 bytes an element of the group while it
    does, 12 to be written. Here each rank gathers the parameters whose middle it holds, 12 bytes an element of those, and
    writes them; it needs a block beside. Nothing is allocated on the device.
    """
    found, _ = extract_sharded_tensors_and_factories(model_state)
    described = {item.data: item for item in nested_values(found)}
    group = optimizer.data_parallel_group_gloo
    state: dict[int, dict[str, Any]] = {}
    pieces = itertools.chain.from_iterable(_pieces(buffer, group.size()) for buffer in optimizer.buffers)
    for index, (param, places) in enumerate(pieces):
        item, owner = described[param], _owner(places)
        mine = is_loading or owner == group.rank()
        whole = {key: torch.empty(param.numel(), device="meta" if is_loading else "cpu") for key in _STATE if mine}
        if not is_loading:
            _gather(optimizer, param, places, owner, whole)
        replica = {} if is_loading else {"replica_id": (*item.replica_id[:-1], 0)}  # one rank of the group has it
        kind = {} if isinstance(item, ShardedTensorFactory) else {"dtype": torch.float32}
        if mine:
            state[index] = {
                key: dataclasses.replace(
                    item, key=f"optimizer.state.{key}.{item.key}", data=value.view(item.data.shape), **replica, **kind
                )
                for key, value in whole.items()
            }
    return state


Places = dict[int, tuple[int, int]]
"""Elements [first, last) of a flattened parameter, by the rank of the data-parallel group that holds them."""


def _pieces(buffer: Any, ranks: int) -> Iterator[tuple[torch.Tensor, Places]]:
    """Of each parameter of a gradient buffer: rank r holds the r-th of equal shares of each bucket."""
    for param, (start, end, bucket) in buffer.param_index_map.items():
        low, high = buffer.bucket_indices[bucket]
        share = (high - low) // ranks
        bounds = ((r, max(start, low + r * share), min(end, low + (r + 1) * share)) for r in range(ranks))
        yield param, {r: (first - start, last - start) for r, first, last in bounds if first < last}


def _owner(places: Places) -> int:
    """The rank that holds the middle: all own about as much as they hold."""
    middle = max(last for _, last in places.values()) // 2
    return next(rank for rank, (first, last) in places.items() if first <= middle < last)


def _gather(
    optimizer: DistributedOptimizer, param: torch.Tensor, places: Places, owner: int, whole: dict[str, torch.Tensor]
) -> None:
    """Fill the owner's `whole` ([elements] each; {} elsewhere) in messages of a block. All ranks of the group call it."""
    group = optimizer.data_parallel_group_gloo
    own = own_state(optimizer, param) if group.rank() in places else {}
    for key in _STATE:
        for rank, (start, end) in places.items():
            if rank == owner == group.rank():
                # what is of another type or device is copied once more on its way
                for first, last in _blocks(end - start):
                    whole[key][start + first : start + last].copy_(own[key][first:last])
            elif group.rank() in (rank, owner):
                for first, last in _blocks(end - start):
                    if group.rank() == rank:
                        dist.send(own[key][first:last].to("cpu", torch.float32), group=group, group_dst=owner)
                    else:
                        dist.recv(whole[key][start + first : start + last], group=group, group_src=rank)


@torch.no_grad()
def read_state(optimizer: DistributedOptimizer, stored: dict[int, dict[str, Stored]]) -> None:
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


def _blocks(count: int) -> Iterator[tuple[int, int]]:
    for first in range(0, count, _BLOCK):
        yield first, min(count, first + _BLOCK)
