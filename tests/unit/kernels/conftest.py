"""Every test of the compiled kernels needs g++: without it they are skipped by name, the reference's tests are not."""

from __future__ import annotations

import shutil

import pytest
import torch

import r1mega_kernels


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["native", "reference"])
def implementation(request) -> str:
    """Both implementations, each against float64."""
    if request.param == "native" and r1mega_kernels.backend("cpu") == "reference":
        if shutil.which("g++"):
            pytest.fail("g++ is here and the CPU library is not built: run `python kernels/build.py`")
        pytest.skip("no g++, so no compiled CPU kernels")
    return request.param


@pytest.fixture
def native(request) -> str:
    """'native', where it can be built."""
    if r1mega_kernels.backend("cpu") == "reference":
        if shutil.which("g++"):
            pytest.fail("g++ is here and the CPU library is not built: run `python kernels/build.py`")
        pytest.skip("no g++, so no compiled CPU kernels")
    return "native"
