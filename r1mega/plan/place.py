"""A rank's place in a job that is not there: torch's and Megatron's groups of that one rank, over torch's fake backend.

Nothing is started and nothing sent; sizes and ranks of groups are as in the job.
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch.distributed as dist

from r1mega import platform
from r1mega.config.layout import Layout, process_problems
from r1mega.errors import ConfigError
from r1mega.platform.groups import destroy, make_groups, seed_all


@contextlib.contextmanager
def as_rank(layout: Layout, world: int, rank: int) -> Iterator[None]:
    """In the block, this process is `rank` of `world` in `layout`. Raises ConfigError for a layout that does not divide.

    Not in a process that has joined a job: RuntimeError.
    """
    if dist.is_initialized():
        raise RuntimeError("this process has joined a job: what a rank would hold is planned in another one")
    if problems := list(process_problems(layout, world)):
        raise ConfigError("; ".join(problems))
    platform.prepare()
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    hook = sys.excepthook  # torch puts the rank before every traceback from here on
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    create = parallel_state.create_group

    def own(ranks: Sequence[int], *_: Any, **__: Any) -> Any:
        """Only the groups that this rank is in: of thousands of ranks the others' take minutes."""
        return dist.new_group(list(ranks), backend="fake") if rank in ranks else None

    def gather(found: list[object], mine: object, group: object = None) -> None:
        """What every rank says is what this one says: taking thousands of equal objects apart takes seconds."""
        found[:] = [mine] * len(found)

    gather_objects, rank_groups = dist.all_gather_object, parallel_state.generate_masked_orthogonal_rank_groups
    parallel_state.create_group, dist.all_gather_object = own, gather  # type: ignore[assignment]
    parallel_state.generate_masked_orthogonal_rank_groups = _rank_groups
    try:
        make_groups(layout, timedelta(minutes=1))
        seed_all(0)
        yield
    finally:
        parallel_state.create_group, dist.all_gather_object = create, gather_objects
        parallel_state.generate_masked_orthogonal_rank_groups = rank_groups
        destroy()
        sys.excepthook = hook


def _rank_groups(world: int, sizes: Sequence[int], mask: Sequence[bool]) -> list[list[int]]:
    """Megatron's, whose grids of ranks are the same for every rank of a job."""
    return [list(ranks) for ranks in _known_rank_groups(world, tuple(sizes), tuple(mask))]


@functools.cache
def _known_rank_groups(world: int, sizes: tuple[int, ...], mask: tuple[bool, ...]) -> list[list[int]]:
    """The ranks of each group of a grid of `sizes`, whose first axis is the fastest: those that differ in masked axes alone."""
    axes = list(reversed(range(len(sizes))))
    grid = np.arange(world).reshape([sizes[axis] for axis in axes])
    apart = [place for place, axis in enumerate(axes) if not mask[axis]]
    together = [place for place, axis in enumerate(axes) if mask[axis]]
    return (
        grid.transpose(apart + together)
        .reshape(-1, math.prod(s for s, m in zip(sizes, mask, strict=True) if m))
        .tolist()
    )
