"""Groups on one gloo device: options as torch makes them, whatever it is called with."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch.distributed as dist
from torch.distributed.distributed_c10d import ProcessGroupGloo

from r1mega.platform import gloo


@pytest.fixture(autouse=True)
def own_devices(monkeypatch):
    monkeypatch.setattr(ProcessGroupGloo, "__init__", gloo._init)
    monkeypatch.setattr(gloo, "_first", {})


def options(**named):
    try:
        found = ProcessGroupGloo(dist.HashStore(), 0, 1, **named).options
    except RuntimeError as error:
        return str(error)
    return len(found._devices), found._threads, found._timeout


@pytest.mark.parametrize("interfaces", [None, "", "lo", "lo,lo", "lo,", ",lo", "x", "lo,absent"])
def test_interfaces_are_those_that_torch_takes(monkeypatch, interfaces):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    if interfaces is not None:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", interfaces)
    expected = options(timeout=timedelta(seconds=5))
    gloo.share_device()
    assert [options(timeout=timedelta(seconds=5)) for _ in range(3)] == [expected] * 3


@pytest.mark.parametrize("named", [{}, {"timeout": timedelta(0)}, {"timeout": timedelta(milliseconds=5)}])
def test_timeouts_are_those_of_each_group(monkeypatch, named):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    expected = options(**named)
    gloo.share_device()
    options(timeout=timedelta(seconds=7))
    assert options(**named) == expected


def test_options_of_a_caller_are_his(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    own = ProcessGroupGloo._Options()
    own._devices, own._threads = [ProcessGroupGloo.create_device(interface="lo")], 1
    gloo.share_device()
    options()
    assert options(options=own)[1] == 1


def test_without_the_options_torch_makes_its_own(monkeypatch):
    monkeypatch.delattr(ProcessGroupGloo, "_Options")
    gloo.share_device()
    assert ProcessGroupGloo.__init__ is gloo._init


def test_groups_that_connect_late_have_devices_of_their_own(monkeypatch):
    """On one device two ranks of several such groups wait for each other for good."""
    monkeypatch.setenv("TORCH_GLOO_LAZY_INIT", "1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    gloo.share_device()
    options()
    assert not gloo._first
