"""The search against all of its candidates, one by one, and what it prints against the command that reads it."""

from __future__ import annotations

import dataclasses
import itertools
import shlex
import statistics
from pathlib import Path

import pytest

from r1mega.config.load import load_config
from r1mega.errors import ConfigError
from r1mega.plan.candidates import uneven_stages
from r1mega.plan.command import Job, search_lines
from r1mega.plan.given import read_model
from r1mega.plan.gpu import gpu_kind
from r1mega.plan.memory import SPARE_BYTES, phase_memory, stage_ranks
from r1mega.plan.search import Search
from r1mega.plan.seconds import moving_seconds
from r1mega.plan.workload import Lengths

CONFIGS = Path(__file__).parents[3] / "configs"
SFT = CONFIGS / "nano/sft.yaml"


class Some(Search):
    """Every 37th candidate: the others take the same way, and time."""

    def candidates(self):
        return itertools.islice(super().candidates(), 0, None, 37)


class All(Some):
    """Nothing is passed over."""

    def _too_large(self, config):
        return False


def some(gpu, kind=Some):
    config = load_config(SFT, ["microbatch_tokens=1024"])
    return kind(config, read_model(config, SFT), 4, gpu, Lengths(80, 0.3), 1.5, 8)


@pytest.mark.slow
def test_the_search_finds_what_looking_at_all_finds():
    kind = gpu_kind("h100-80")
    search = some(kind, All)
    taken = []
    for one in search.trained():
        ranks = tuple(stage_ranks(one.config, search.hf, 4, one.work, 1.5))
        for held in search._held(one.config):
            size = max(p.total for p in phase_memory(held, ranks, None))
            moving = moving_seconds(held, search.hf, 4, kind, one.work.minibatches)
            taken.append((one.seconds + moving, size))
    middle = statistics.median(size for _, size in taken)
    fitting = [seconds for seconds, size in taken if size <= middle]
    assert 1 < len(fitting) < len(taken)
    found = some(dataclasses.replace(kind, memory_bytes=middle + SPARE_BYTES)).run()
    assert found[0].seconds == min(fitting)
    assert [p.seconds for p in found] == sorted(p.seconds for p in found)
    assert all(proposal.fullest.total <= middle for proposal in found)
    for proposal in found:  # pasted behind the config that was given, they are the config that was found
        assert load_config(SFT, ["microbatch_tokens=1024", *proposal.overrides]) == proposal.config


def test_nothing_fits_a_gpu_without_memory():
    none = some(dataclasses.replace(gpu_kind("h100-80"), memory_bytes=SPARE_BYTES))
    assert none.run() == []


def test_the_command_prints_words_for_the_shell():
    said: list[str] = []
    job = Job(SFT, ["seed=3"], 1, "h100-80", Lengths(80), 1.5, per_node=8)
    lines, found = search_lines(job, said.append)
    assert found and lines[0].split()[1] == "s" and any("measured 1:" in line for line in said)
    path, first, *overrides = shlex.split(lines[1])
    assert Path(path) == SFT and first == "seed=3" and load_config(SFT, overrides)
    with pytest.raises(ConfigError, match="trains nothing"):
        search_lines(dataclasses.replace(job, path=CONFIGS / "nano/evaluate.yaml"), said.append)


def test_stages_of_unequal_length():
    assert uneven_stages(60, 4) is None
    assert uneven_stages(61, 16) == (3, *[4] * 14, 2)
    assert uneven_stages(27, 2) == (14, 13)
    for layers, stages in itertools.product(range(2, 70), range(2, 20)):
        counts = uneven_stages(layers, stages)
        if layers >= stages and counts is not None:
            assert len(counts) == stages and sum(counts) == layers and min(counts[:-1]) > 0 <= counts[-1]
            assert max(counts) == -(-(layers + 1) // stages)
