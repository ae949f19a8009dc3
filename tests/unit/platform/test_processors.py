"""Which processors a rank computes on, by what Linux says of its GPU and what the launcher has left."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
from types import SimpleNamespace

import pytest
import torch

from r1mega.platform import groups, processors

SOCKETS = [set(range(48)), set(range(48, 96))]


@pytest.fixture
def near(monkeypatch, tmp_path):
    """This process's GPU is at 0002:b7:00.0, near those processors, and the launcher has left it these; the affinities it asks for."""

    def arrange(local, allowed, socket=(), refused=None):
        monkeypatch.setattr(processors, "PCI_DEVICES", tmp_path)
        monkeypatch.setattr(processors, "PROCESSORS", tmp_path)
        for processor in socket:
            (tmp_path / f"cpu{processor}/topology").mkdir(parents=True)
            (tmp_path / f"cpu{processor}/topology/core_siblings_list").write_text(f"{processors.as_list(socket)}\n")
        properties = SimpleNamespace(pci_domain_id=2, pci_bus_id=0xB7, pci_device_id=0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        if local is not None:
            (tmp_path / "0002:b7:00.0").mkdir()
            (tmp_path / "0002:b7:00.0/local_cpulist").write_text(f"{local}\n")
        asked = {}

        def choose(thread, chosen):
            if refused is not None:
                raise refused
            asked[thread] = chosen

        monkeypatch.setattr(os, "sched_getaffinity", lambda _: allowed)
        monkeypatch.setattr(os, "sched_setaffinity", choose)
        processors.stay_near(torch.device("cuda", 3))
        return asked

    return arrange


@pytest.mark.parametrize(
    ("local", "allowed", "chosen"),
    [("48-95", SOCKETS[0] | SOCKETS[1], SOCKETS[1]), ("48-95", set(range(40, 60)), set(range(48, 60))), ("0-47", SOCKETS[0], None),
     ("0-95", SOCKETS[0], None)],
    ids=["all left", "some of both", "bound there", "one node"],
)  # fmt: skip
def test_all_threads_of_a_rank_stay_on_the_node_of_its_gpu(near, local, allowed, chosen):
    asked = near(local, allowed)
    assert {frozenset(each) for each in asked.values()} == ({frozenset(chosen)} if chosen else set())
    assert chosen is None or os.getpid() in asked


def test_a_socket_of_several_nodes_is_used_whole(near):
    """Of the eight nodes of two sockets (NPS4) four may have all of the GPUs: the others' processors would compute nothing."""
    asked = near("12-23", SOCKETS[0] | SOCKETS[1], SOCKETS[0])
    assert {frozenset(each) for each in asked.values()} == {frozenset(SOCKETS[0])}


def test_a_system_that_lets_no_process_choose_ends_no_run(near, caplog):
    """As a container's filter of system calls may."""
    near("48-95", SOCKETS[0] | SOCKETS[1], refused=PermissionError(1, "Operation not permitted"))
    assert "not kept on the processors near it ([Errno 1] Operation not permitted)" in caplog.text


def test_threads_that_were_there_before_go_along(near, monkeypatch):
    """By Linux's own count."""
    before = {thread: os.sched_getaffinity(int(thread)) for thread in os.listdir("/proc/self/task")}
    one = min(os.sched_getaffinity(0))
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one processor: there is nothing to choose")
    setters = os.sched_setaffinity, os.sched_getaffinity
    end = threading.Event()
    waiting = threading.Thread(target=end.wait)
    waiting.start()
    try:
        for thread, chosen in near(str(one), os.sched_getaffinity(0)).items():
            setters[0](thread, chosen)
        assert {frozenset(setters[1](int(thread))) for thread in os.listdir("/proc/self/task")} == {frozenset({one})}
    finally:
        end.set()
        waiting.join()
        for thread, allowed in before.items():
            with contextlib.suppress(ProcessLookupError):
                setters[0](int(thread), allowed)


@pytest.mark.parametrize(
    ("local", "said"),
    [("48-95", "cuda:3 is near the processors 48-95, and this process may use 0-47 alone: .*srun --cpu-bind=none"),
     (None, "processors near it are not known .*0002:b7:00.0/local_cpulist")],
)  # fmt: skip
def test_a_binding_that_cannot_be_is_told_and_left_alone(near, caplog, local, said):
    with caplog.at_level(logging.WARNING):
        assert near(local, SOCKETS[0]) == {}
    assert caplog.messages and re.search(said, caplog.messages[0])


def test_a_rank_of_a_gpu_is_bound_when_it_joins(monkeypatch):
    joined = []
    monkeypatch.setattr(groups.platform, "current", lambda: SimpleNamespace(name="cuda", device="cuda:1"))
    monkeypatch.setattr(groups.dist, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(processors, "stay_near", joined.append)
    monkeypatch.setenv("RANK", "x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(AttributeError, match="distributed_backend"):  # what comes next
        groups.init_distributed()
    assert joined == ["cuda:1"]


@pytest.mark.parametrize(
    ("mine", "others", "count"),
    [(range(12), [range(12 * i, 12 * i + 12) for i in range(1, 8)], 12), (range(96), [range(96)] * 7, 12),
     (range(48), [range(48)] * 3 + [range(48, 96)] * 4, 12), (range(8), [range(4)], 6), ([1], [[1]] * 3, 1), (range(2), [], 2)],
    ids=["bound by srun", "not bound", "by NUMA node", "partly shared", "fewer than ranks", "alone"],
)  # fmt: skip
def test_a_rank_computes_on_its_share_of_what_it_may_use(mine, others, count):
    """Not on the twelfth of what srun has divided among the ranks already."""
    assert processors.share(mine, [mine, *others]) == count


def test_lists_are_those_of_linux():
    assert processors.parse_list("0-3,8,10-11\n") == {0, 1, 2, 3, 8, 10, 11} and processors.parse_list("\n") == set()
    assert processors.as_list({11, 0, 1, 2, 3, 8, 10}) == "0-3,8,10-11"
