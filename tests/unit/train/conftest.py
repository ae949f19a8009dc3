"""One rank without others: groups for a policy, one thread."""

import pytest
import torch

from r1mega.config.schema import ParallelConfig
from r1mega.platform import groups


@pytest.fixture
def one_rank():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    groups.init_parallel(ParallelConfig(), seed=0)
    yield
    groups.destroy()
    torch.set_num_threads(threads)
