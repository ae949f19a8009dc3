"""A policy's weights, gradients and optimizer state as tensors on the host, and how far two sets of them are apart."""

from __future__ import annotations

import torch
import torch.distributed as dist

from r1mega import platform

platform.prepare()

from r1mega.checkpoint.hf_state import export_hf  # noqa: E402
from r1mega.train.policy import Policy  # noqa: E402
from r1mega.train.trainer import Trainer  # noqa: E402


def weights(policy: Policy) -> dict[str, torch.Tensor]:
    """Under their HF names, on the host, copied; of a bfloat16 model the optimizer's float32 ones where one rank has them
    whole."""
    mains = {}
    for parameter in _parameters(policy):
        main = getattr(parameter, "main_param", None)
        if main is not None and main.numel() == parameter.numel():
            mains[parameter] = main.detach().view(parameter.shape)
    return _exported(policy, mains)


def gradients_by_name(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The gradient buffers' content under HF names, made whole over the ranks, on the host."""
    make_gradients_whole(trainer)
    policy = trainer.policy
    return _exported(policy, {parameter: vars(parameter)["main_grad"] for parameter in _parameters(policy)})


def make_gradients_whole(trainer: Trainer) -> None:
    """On every rank: the distributed optimizer reduces gradients to shards. A collective call."""
    for chunk in trainer.ddp_chunks:
        for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
            group = buffer.data_parallel_group
            for bucket in buffer.buckets if group.size() > 1 else ():
                own = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, own, group=group)


def _parameters(policy: Policy) -> list[torch.nn.Parameter]:
    return [parameter for chunk in policy.chunks for parameter in chunk.parameters()]


def _exported(policy: Policy, values: dict[torch.nn.Parameter, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The model with other values as its parameters, under HF names, on the host, copied. A collective call.

    The parameters themselves are left alone: data of another dtype would cost them the hooks of Megatron's DDP.
    """
    places = [
        (module, name, parameter)
        for chunk in policy.chunks
        for module in chunk.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]
    try:
        for module, name, parameter in places:
            if parameter in values:
                module._parameters[name] = torch.nn.Parameter(values[parameter], requires_grad=False)
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in export_hf(policy.chunks)}
    finally:
        for module, name, parameter in places:
            module._parameters[name] = parameter


def everything(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Weights, and the optimizer's main weights, moments and step counts, on the host, copied."""
    tensors = weights(trainer.policy)
    for part_index, part in enumerate(getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer])):
        for group_index, group in enumerate(part.optimizer.param_groups):
            tensors[f"optimizer.{part_index}.{group_index}.step"] = torch.as_tensor(group.get("step", 0)).cpu()
            for index, parameter in enumerate(group["params"]):
                prefix = f"optimizer.{part_index}.{group_index}.{index}"
                tensors[f"{prefix}.main"] = parameter.detach().to("cpu", copy=True)
                for name, value in part.optimizer.state[parameter].items():
                    if torch.is_tensor(value):
                        tensors[f"{prefix}.{name}"] = value.detach().to("cpu", copy=True)
    return tensors


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> tuple[float, float, str]:
    """Relative Euclidean distances: (all tensors together, the worst one of those that are not next to nothing, its
    name). Raises KeyError where the names differ."""
    if found.keys() != expected.keys():
        raise KeyError(f"names that one side lacks: {sorted(found.keys() ^ expected.keys())[:9]}")
    squares, norms = {}, {}
    for name, tensor in expected.items():
        squares[name] = float((found[name].double() - tensor.double()).square().sum())
        norms[name] = float(tensor.double().square().sum())
    floor = 1e-6 * max(norms.values())
    worst, name = max(((squares[n] / max(norms[n], floor)) ** 0.5, n) for n in squares)
    return (sum(squares.values()) / max(sum(norms.values()), 1e-300)) ** 0.5, worst, name
