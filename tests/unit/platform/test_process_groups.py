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
from r1mega.platform import groups

platform.prepare()

WORLD = 512
ZERO = Path(__file__).parents[3] / "configs/deepseek_v3_671b/zero.yaml"
LAYOUT = ParallelConfig(**yaml.safe_load(ZERO.read_text())["parallel"])


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
