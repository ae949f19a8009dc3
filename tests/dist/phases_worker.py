"""One rank of the tests of memory phases: steps of a trainer by a plan, and what takes memory in each phase."""

from __future__ import annotations

import ctypes
import hashlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from r1mega import platform

platform.prepare()

from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer  # noqa: E402

from r1mega.checkpoint.manifest import read_manifest  # noqa: E402
from r1mega.checkpoint.store import CheckpointStore  # noqa: E402
from r1mega.config.schema import MemoryConfig  # noqa: E402
from r1mega.platform import groups  # noqa: E402
from r1mega.train.memory import HostCopy  # noqa: E402
from r1mega.train.packing import build_microbatch  # noqa: E402
from r1mega.train.phases import PHASES, Phase, plan_phases  # noqa: E402
from r1mega.train.trainer import Trainer  # noqa: E402
from tests.checkpoints import DEEPSEEK, MTP  # noqa: E402
from tests.dist.convert_worker import PROMPT, SEQUENCES, make_trainer, update  # noqa: E402

STEPS = 2


def trials(
    layout: dict[str, int],
    dtype: str,
    memories: list[dict[str, Any]],
    directory: Path,
    keys: dict[str, bool] | None = None,
) -> list[dict[str, Any]]:
    """What `trial` finds with each of these `memory` sections. keys: of the optimizer."""
    groups.init_distributed()
    found = []
    for number, memory in enumerate(memories):
        found.append(trial(layout, dtype, memory, directory / str(number), keys or {}))
        groups.destroy_parallel()
    groups.destroy()
    return found


def trial(
    layout: dict[str, int], dtype: str, memory: dict[str, Any], directory: Path, keys: dict[str, bool]
) -> dict[str, Any]:
    """Steps as RL takes them, a checkpoint (with all keys: of every phase): bytes counted and planned, results, weights, digests of files."""
    plan = plan_phases(MemoryConfig(**memory), cpu_adam=keys.get("cpu_offload", False))
    config = DEEPSEEK if keys.get("overlap_grad_reduce") else MTP  # with MTP, RL gives not every weight a gradient
    trainer = make_trainer(config, layout, dtype, init_std=0.02, plan=plan, **keys)
    policy = trainer.policy
    policy.take_reference()
    counted: dict[str, set[int]] = {}
    watch(trainer, counted)
    batch = build_microbatch([sequence[:8] for sequence in SEQUENCES[:2]], [PROMPT] * 2, range(2))
    results: list[Any] = []
    for _ in range(STEPS):
        trainer.enter("rollout")
        trainer.enter("score")
        trainer.enter("evaluate")
        trainer.enter("logprob")
        with trainer.as_reference():  # first: no pass with the weights has been before it
            count(trainer, "reference", counted)
            results.append([values.tolist() for values in policy.log_probs([batch])])
        results.append(policy.sequence_log_probs(SEQUENCES[:2]))
        results.append(update(trainer))
        count(trainer, "step", counted)
        trainer.enter("reshard")
    weights = hashlib.sha256()
    for _, value in policy.hf_tensors():
        weights.update(value.clone().view(torch.uint8).numpy().data)  # of a copy: numpy pins what it sees
    store = CheckpointStore(directory, keep=len(PHASES), architecture={})
    files = {}
    saved_in = PHASES if all(memory.get(key) for key in MemoryConfig.model_fields) else PHASES[:1]
    for step, phase in enumerate(saved_in):
        trainer.enter(phase)
        path = store.save(step, trainer.sharded_state(is_loading=False), {})
        dist.barrier()
        files[phase] = {
            name: record for name, record in read_manifest(path)["files"].items() if name.endswith(".distcp")
        }
    sizes = sizes_of(trainer, moment_bytes=2 if keys.get("precision_aware") else 4)
    planned = {phase: plan.device_bytes(phase, sizes) for phase in PHASES}
    return {
        "counted": counted,
        "planned": planned,
        "results": results,
        "weights": weights.hexdigest(),
        "files": files,
        "sizes": sizes,
    }


ALL = {"grad_offload": True, "optimizer_offload": "update", "param_offload": True, "reference_swap": True}


def resident() -> tuple[dict[Phase, int], dict[Phase, float]]:
    """(bytes of this process's memory, bytes planned on the device, here the CPU, and in host memory together), by phase."""
    ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD: what is freed goes back to the system
    groups.init_distributed()
    plan = plan_phases(MemoryConfig(**ALL))
    trainer = make_trainer(DEEPSEEK | {"vocab_size": 60_000}, {}, "bfloat16", init_std=0.02, plan=plan)
    trainer.policy.take_reference()
    found: dict[Phase, int] = {}
    for _ in range(2):  # what host memory keeps is there from the second time on
        for phase in ("rollout", "logprob", "update", "step", "reshard", "save"):
            trainer.enter(phase)
            if phase in ("update", "step"):
                for chunk in trainer.ddp_chunks:
                    chunk.zero_grad_buffer()  # memory is taken when it is first written
            found[phase] = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        update(trainer)
    sizes = sizes_of(trainer, moment_bytes=4)
    groups.destroy()
    return found, {phase: plan.device_bytes(phase, sizes) + plan.host_bytes(phase, sizes) for phase in found}


def steps(directory: Path, number: int, kill_in: Phase | None) -> tuple[list[Any], str]:
    """(loss and gradient norm of the steps up to `number` that a run does from its last checkpoint on, digest of its weights).

    kill_in: the process ends in the last step while parts move into this phase.
    """
    groups.init_distributed()
    trainer = make_trainer(DEEPSEEK, {"ep": 2}, "bfloat16", init_std=0.02, plan=plan_phases(MemoryConfig(**ALL)))
    trainer.policy.take_reference()
    store = CheckpointStore(directory, keep=2, architecture={})
    start, results = 0, []
    if (path := store.latest()) is not None:
        state, progress = store.load(path, trainer.sharded_state(is_loading=True))
        trainer.load_sharded_state(state)
        start = progress["step"]
    for step in range(start + 1, number + 1):
        enter = trainer._memory.enter

        def killed(phase: Phase, enter: Callable[[Phase], None] = enter, step: int = step) -> None:
            if (step, phase) == (number, kill_in):
                HostCopy._pieces = end_after_one  # type: ignore[method-assign]
            enter(phase)

        trainer._memory.enter = killed  # type: ignore[method-assign]
        trainer.enter("rollout")
        trainer.enter("logprob")
        results.append(trainer.policy.sequence_log_probs(SEQUENCES[:1]))
        results.append(update(trainer))
        store.save(step, trainer.sharded_state(is_loading=False), {})
    weights = hashlib.sha256()
    for _, value in trainer.policy.hf_tensors():
        weights.update(value.clone().view(torch.uint8).numpy().data)
    groups.destroy()
    return results, weights.hexdigest()


PIECES = HostCopy._pieces


def end_after_one(copy: HostCopy) -> Iterator[Any]:
    """`HostCopy._pieces`, which a kill ends after the first."""
    yield next(PIECES(copy))
    os.kill(os.getpid(), signal.SIGKILL)


def watch(trainer: Trainer, counted: dict[str, set[int]]) -> None:
    """Count whenever a phase has been entered."""
    enter = trainer.enter

    def watched(phase: Phase) -> None:
        enter(phase)
        if phase != "reference":  # whose weights are not there yet
            count(trainer, phase, counted)

    trainer.enter = watched  # type: ignore[method-assign]


def count(trainer: Trainer, phase: Phase, counted: dict[str, set[int]]) -> None:
    """Not before the first optimizer step, which makes the moments."""
    if all(part.optimizer.state for part in trainer.optimizer.chained_optimizers if part.optimizer):
        counted.setdefault(phase, set()).add(device_bytes(trainer))


def device_bytes(trainer: Trainer) -> int:
    """Of all storages that parameters, gradients and the optimizer's tensors have; the reference's where it is in use."""
    tensors: list[torch.Tensor | None] = []
    for chunk in trainer.ddp_chunks:
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            tensors += [buffer.param_data, buffer.grad_data]
        for param in chunk.parameters():
            tensors += [param, param.grad, param.main_grad, getattr(param, "main_param", None)]
            tensors.append(getattr(param, "decoupled_grad", None))
    for part in trainer.optimizer.chained_optimizers:
        if part.optimizer is not None and not isinstance(
            part.optimizer, HybridDeviceOptimizer
        ):  # whose all is the host's
            for param in (param for group in part.optimizer.param_groups for param in group["params"]):
                tensors += [param, param.grad, getattr(param, "decoupled_grad", None)]
                tensors += [*part.optimizer.state.get(param, {}).values()]
    storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors if t is not None}
    return sum(storage.nbytes() for storage in storages.values())


def sizes_of(trainer: Trainer, moment_bytes: int) -> dict[str, int]:
    """Bytes of each part on this rank, by the places of parameters in Megatron's buffers."""
    sizes = dict.fromkeys(("weights", "gradients", "main_params", "exp_avg", "exp_avg_sq"), 0)
    for chunk in trainer.ddp_chunks:
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            sizes["weights"] += buffer.numel * buffer.param_dtype.itemsize
            sizes["gradients"] += buffer.numel * buffer.grad_dtype.itemsize
            ranks, rank = buffer.data_parallel_group.size(), buffer.data_parallel_group.rank()
            own = 0
            for start, end, bucket in buffer.param_index_map.values():
                first, last = buffer.bucket_indices[bucket]
                share = (last - first) // ranks
                low = first + rank * share
                own += max(0, min(end, low + share) - max(start, low))
            sizes["exp_avg"] += moment_bytes * own
            sizes["exp_avg_sq"] += moment_bytes * own
            sizes["main_params"] += 4 * own if buffer.param_dtype == torch.bfloat16 else 0
    # what `as_reference` puts in the place of parameters, which are without the buffers' padding
    sizes["reference"] = sum(p.numel() * p.itemsize for chunk in trainer.policy.chunks for p in chunk.parameters())
    return sizes
