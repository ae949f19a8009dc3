"""Process groups of 512 ranks, made by torch and Megatron themselves on torch's fake backend: nothing is sent.

What it does not cover: NCCL. On a rank outside a new group, torch asks the world's NCCL backend to split; something that
counts stands there. Members split in ProcessGroupNCCL, which no CPU has.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from torch.distributed import distributed_c10d
from torch.testing._internal.distributed import fake_pg  # noqa: F401  registers the backend

from r1mega import platform
from r1mega.config.schema import ParallelConfig, TimeoutsConfig
from r1mega.errors import StragglerError
from r1mega.platform import groups

platform.prepare()

WORLD = 512
ZERO = Path(__file__).parents[3] / "configs/deepseek_v3_671b/zero.yaml"
LAYOUT = ParallelConfig(**(yaml.safe_load(ZERO.read_text())["parallel"] | {"tp": 2, "ep": 32}))


class Splits:
    """Where torch would find NCCL's communicator of the world; counts what it is asked."""

    def __init__(self):
        self.num_splits = 0

    def perform_nocolor_split(self, _device):
        self.num_splits += 1


@pytest.fixture
def splits(monkeypatch):
    found = Splits()
    monkeypatch.setattr(distributed_c10d, "_get_split_source", lambda _group: found)
    return found


@pytest.fixture
def world(monkeypatch):
    """What init_process_group and new_group are called with, in a world of 512 ranks of which this is number 5."""
    groups.destroy()
    calls = []
    init, new_group = dist.init_process_group, dist.new_group

    def init_here(backend, **options):
        calls.append(("init", None, options))
        init(backend, store=dist.HashStore(), rank=5, world_size=WORLD, **options)

    def new_group_here(ranks=None, **options):
        calls.append(("new", tuple(ranks), dict(options)))
        if options.get("backend") == "gloo":
            options["backend"] = "fake"
        return new_group(ranks, **options)

    here = platform.Platform("cuda", torch.device("cuda", 0), "cpu:fake,cuda:fake", False, False)
    monkeypatch.setattr(platform, "current", lambda: here)
    monkeypatch.setattr(dist, "init_process_group", init_here)
    monkeypatch.setattr(dist, "new_group", new_group_here)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _device: None)
    monkeypatch.setattr(groups.processors, "stay_near", lambda _device: None)
    monkeypatch.setattr(groups, "_start_nccl", lambda device: calls.append(("start", None, {"device": device})))
    for name, value in (("RANK", "5"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", str(WORLD))):
        monkeypatch.setenv(name, value)
    yield calls
    groups.destroy()


def test_no_group_splits_the_world(world, splits):
    groups.init_parallel(LAYOUT, 0, TimeoutsConfig(collective_seconds=90))
    (_, _, options), (second, _, _), *_ = world
    assert "device_id" not in options
    assert second == "start"  # before any group: the world's own communicator, by all
    assert dist.group.WORLD.bound_device_id is None
    made = [ranks for kind, ranks, _ in world if kind == "new"]
    assert splits.num_splits == 0
    # every one of these, made anywhere, would have been a split on every rank (2,866 in megatron-core 0.16.1)
    assert len(made) > 2500
    assert sum(len(ranks) == 1 for ranks in made) > 0.7 * len(made)
    assert 4 <= len({ranks for ranks in made if 5 in ranks and len(ranks) > 1}) <= 8  # that this rank ever talks to
    limits = {options["timeout"] for kind, _, options in world if kind == "new" and options.get("backend") != "gloo"}
    assert limits == {timedelta(seconds=90)}


def test_the_count_is_of_what_torch_does_with_a_bound_device(world, splits):
    groups.init_distributed()
    dist.group.WORLD.bound_device_id = torch.device("cuda", 0)  # what device_id= does
    dist.new_group([0, 1])
    assert splits.num_splits == 1
    dist.new_group([2, 3], backend="gloo")  # gloo's alone: its members do not split, the others do
    assert splits.num_splits == 2
    dist.new_group([4, 5], backend="gloo")
    assert splits.num_splits == 2


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("count", [0, 1, 5, 8])
def test_generators_share_what_there_is(monkeypatch, tp, count):
    """By brute force over the ranks: each item belongs to one generator, whose first rank answers for it."""
    world, items = 8, []
    monkeypatch.setattr(groups.dist, "get_world_size", lambda: world)
    for rank in range(world):
        monkeypatch.setattr(groups.dist, "get_rank", lambda rank=rank: rank)
        place = groups.GeneratorPlace.of_this_rank(tp)
        assert (place.replica, place.num_replicas) == (rank // tp, world // tp)
        items += place.block(count) if place.is_first else ()
    assert items == list(range(count))


GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/"


@pytest.mark.parametrize(
    "error",
    [RuntimeError(GLOO + "pair.cc:553] Connection closed by peer [10.0.0.1]:22204. This is typically caused by a remote worker crashing."),
     RuntimeError(GLOO + "unbound_buffer.cc:78] Timed out waiting 5000ms for recv operation to complete"),
     RuntimeError("Application timeout caused pair closure"),
     dist.DistStoreError("wait timeout after 3000ms, keys: /default_pg/0//1//cpu//0/1"),
     dist.DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?"),
     dist.DistNetworkError("Broken pipe"),
     dist.DistBackendError("NCCL error in: ... ncclRemoteError: remote process exited or there was a network error")],
    ids=["gloo closed", "gloo late", "gloo after that", "store late", "store gone", "store gone, sent", "NCCL"],
)  # fmt: skip
def test_a_peer_that_is_lost_is_told_by_what_libraries_say(error):
    """As torch 2.13 did, of ranks that were killed or came too late (of NCCL: by its source)."""
    with pytest.raises(StragglerError, match="another rank ended, or did not answer in time"), groups.peers_named():
        raise error


@pytest.mark.parametrize(
    "error",
    [RuntimeError("judge http://10.0.0.9:8000: Connection refused"), RuntimeError("wandb: Broken pipe"),
     RuntimeError(GLOO + "pair.cc:454] op.preamble.length <= op.nbytes. 8 vs 4"),
     dist.DistNetworkError("The server socket has failed to listen on any local network address. EADDRINUSE"),
     dist.DistBackendError("NCCL error in: ... ncclUnhandledCudaError: Call to CUDA function failed.")],
    ids=["a service", "a pipe", "sizes", "port taken", "GPU"],
)  # fmt: skip
def test_an_error_of_its_own_is_not_a_lost_peer(error):
    """Nobody else's log would say why, and another start would not mend it."""
    with pytest.raises(type(error)) as caught, groups.peers_named():
        raise error
    assert caught.value is error


def test_where_a_rank_was_is_a_place_in_this_program():
    """Also where the repository, with the libraries in its .venv, lies in a directory of the package's name."""
    names = {"raise_as_torch": "/home/u/r1mega/.venv/lib/torch/distributed/c10d_logger.py", "step": groups.__file__}
    code = "def step():\n    raise_as_torch()\n"
    scope = {}
    raising = 'def raise_as_torch():\n    raise RuntimeError("Application timeout caused pair closure")\n'
    exec(compile(raising, names["raise_as_torch"], "exec"), scope)
    exec(compile(code, names["step"], "exec"), scope)
    with pytest.raises(StragglerError, match=r"while this one was in step \(.*groups\.py:2\)"), groups.peers_named():
        scope["step"]()
