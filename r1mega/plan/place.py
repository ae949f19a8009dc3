"""A rank's place in a job that is not there: torch's and Megatron's groups of that one rank, over torch's fake backend.

Nothing is started and nothing sent; sizes and ranks of groups are as in the job.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch.distributed as dist

from r1mega import platform
from r1mega.config.layout import Layout, process_problems
from r1mega.errors import ConfigError
from r1mega.platform.groups import destroy, seed_all


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

    gather_objects = dist.all_gather_object
    parallel_state.create_group, dist.all_gather_object = own, gather  # type: ignore[assignment]
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            virtual_pipeline_model_parallel_size=layout.vpp if (layout.vpp or 1) > 1 else None,
            context_parallel_size=layout.cp,
            expert_model_parallel_size=layout.ep,
            expert_tensor_parallel_size=layout.etp,
            create_gloo_process_groups=True,
        )
        seed_all(0)
        yield
    finally:
        parallel_state.create_group, dist.all_gather_object = create, gather_objects
        destroy()
        sys.excepthook = hook
