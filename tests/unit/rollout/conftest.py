"""A world of one process, for what asks torch how many there are."""

import pytest
import torch.distributed as dist

from r1mega.platform import groups


@pytest.fixture
def alone():
    """A world of one process; what an engine of an earlier test left goes first."""
    groups.destroy()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
