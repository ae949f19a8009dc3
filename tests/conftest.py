"""One thread and quiet libraries for every test; GPU tests are skipped by name where there is no GPU."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two busy ranks on two cores want one thread each
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402
import torch  # noqa: E402


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
