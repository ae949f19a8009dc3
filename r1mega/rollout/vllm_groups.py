"""Process groups of a vLLM generator: the job's, vLLM's own, and which of them hold a tensor together."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist

from r1mega.config.model_files import HFConfig
from r1mega.errors import GenerationError, StragglerError
from r1mega.weights.layout import GeneratorRank, divided_names


def ensure_process_group() -> None:
    """vLLM's external launcher wants a world group and torchrun's variables; a single process makes its own."""
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise GenerationError(
                "several processes were launched but torch.distributed is not initialised; "
                "initialise the trainer's process groups before the generator"
            )
        dist.init_process_group(
            "gloo" if not torch.cuda.is_available() else "cpu:gloo,cuda:nccl",
            store=dist.HashStore(),
            rank=0,
            world_size=1,
        )
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for name, value in (
        ("RANK", rank),
        ("LOCAL_RANK", rank),
        ("WORLD_SIZE", world_size),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", 29500),
    ):
        os.environ.setdefault(name, str(value))  # the address is not used: the world group exists


@contextlib.contextmanager
def rank_within(ranks: int) -> Iterator[None]:
    """RANK as vLLM (config/parallel.py, external launcher) counts attention groups by it: within one generator, not the job."""
    rank = os.environ["RANK"]
    os.environ["RANK"] = str(int(rank) % ranks)
    try:
        yield
    finally:
        os.environ["RANK"] = rank


def shared_names(config: HFConfig, place: GeneratorRank) -> list[tuple[list[str], Callable[[torch.Tensor], None]]]:
    """The HF tensors of which a rank holds a part, by the ranks that hold the others: with the sum over those."""
    from vllm.distributed import parallel_state

    def sums(group: Callable[[], parallel_state.GroupCoordinator]) -> Callable[[torch.Tensor], None]:
        return lambda tensor: dist.all_reduce(tensor, group=group().cpu_group)

    names = divided_names(config, place)
    spread = [name for name in names if place.ep > 1 and ".mlp.experts." in name]
    cut = [name for name in names if name not in set(spread)] if place.tp > 1 else []
    found = ((cut, parallel_state.get_tp_group), (spread, parallel_state.get_ep_group))
    return [(part, sums(group)) for part, group in found if part]


class SharedPasses:
    """What attention groups that share experts agree on before each pass of the model: whether there is one, and whether a group
    has failed. group: of the CPU, one rank of each of them; its time-out is how long a group waits for the others; ranks: of the job.
    """

    def __init__(self, group: dist.ProcessGroup, ranks: Sequence[int]):
        self._group, self._ranks = group, tuple(ranks)

    @classmethod
    def of_this_rank(cls) -> SharedPasses:
        """By vLLM's data-parallel group."""
        from vllm.distributed.parallel_state import get_dp_group

        group = get_dp_group()
        return cls(group.cpu_group, group.ranks)

    def go_on(self, is_busy: bool) -> tuple[bool, int | None]:
        """(whether any group has something to sample, the rank of the job that failed). A call that all make, in step.

        Raises StragglerError, naming the ranks, where one did not come in time or ended.
        """
        return self._agree(is_busy, failed=0)

    def tell_failure(self) -> None:
        """Instead of `go_on`, by a group that cannot: the others learn it there. Raises as that does."""
        self._agree(True, failed=dist.get_rank() + 1)

    def _agree(self, is_busy: bool, failed: int) -> tuple[bool, int | None]:
        state = torch.tensor([is_busy, failed])
        try:
            dist.all_reduce(state, dist.ReduceOp.MAX, group=self._group)
        except RuntimeError as error:
            ranks = ", ".join(map(str, self._ranks))
            raise StragglerError(
                f"the generators of ranks {ranks} share experts and pass the model together (rollout.ep above rollout.tp), and one of "
                f"them did not come to the next pass ({error}). If it ended, its own log says why; if it is only slow, raise "
                "timeouts.rollout_seconds"
            ) from error
        busy, told = state.tolist()
        return bool(busy), told - 1 if told else None


def destroy_vllm_groups() -> None:
    """Takes vLLM's own groups down; the default group and the trainer's stay. (vLLM's `destroy_distributed_environment`
    would take the default group with it.)"""
    from vllm.distributed import parallel_state

    parallel_state.destroy_model_parallel()
    if parallel_state._WORLD is not None:
        parallel_state._WORLD.destroy()
    parallel_state._WORLD = parallel_state._NODE_COUNT = None
