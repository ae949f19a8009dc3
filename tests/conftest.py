"""One thread and quiet libraries for every test; GPU tests are skipped by name where there is no GPU."""

import gc
import os
import resource

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two busy ranks on two cores want one thread each
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

from tests.release import num_threads, release_models  # noqa: E402

MANY_THREADS = 200


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="module", autouse=True)
def nothing_old_collected_again():
    """Collections of a module's tests do not go through what was there before it: a million objects of imported libraries, most
    of a second each time. vLLM collects often, and thaws everything when an engine is closed.
    """
    if not torch.distributed.is_initialized():
        release_models()  # they would not be found any more
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_models_left():
    """Models of earlier tests go once their groups' threads are many; those of a test that keeps its groups stay."""
    yield
    if num_threads() > MANY_THREADS and not torch.distributed.is_initialized():
        release_models()


@pytest.fixture
def many_descriptors():
    """Every file opened in the test has a descriptor above 1023, as in a rank with a thousand sockets."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2048:
        pytest.skip(f"no more than {hard} open files are allowed (ulimit -Hn)")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    opened = [os.open(os.devnull, os.O_RDONLY)]
    while opened[-1] < 1024:
        opened.append(os.dup(opened[0]))
    yield
    for descriptor in opened:
        os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
