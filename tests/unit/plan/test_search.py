"""The search against all of its candidates, one by one, and what it prints against the command that reads it."""

from __future__ import annotations

import dataclasses
import itertools
import math
import shlex
import statistics
from pathlib import Path
from typing import ClassVar

import pytest

from r1mega.config.load import load_config
from r1mega.errors import ConfigError
from r1mega.plan import parameters, rank
from r1mega.plan.bounds import SURE, Chunk
from r1mega.plan.candidates import candidates, memory_choices, standalone_stages, uneven_stages, with_capacity
from r1mega.plan.command import Job, search_lines
from r1mega.plan.given import read_model
from r1mega.plan.gpu import gpu_kind
from r1mega.plan.memory import SPARE_BYTES, phase_memory, stage_ranks
from r1mega.plan.report import proposed
from r1mega.plan.search import Search, Trained
from r1mega.plan.seconds import moving_seconds
from r1mega.plan.workload import Lengths, workload

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
        for held in memory_choices(one.config):
            size = max(p.total for p in phase_memory(held, search.hf, ranks, None))
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


@pytest.mark.parametrize("own", [{}, {"vpp": 1}, {"dp": 4}, {"vpp": 1, "dp": 4}])
def test_a_layout_is_a_candidate_once(own):
    config = load_config(SFT, [f"parallel.{key}={value}" for key, value in own.items()])
    plain = load_config(SFT)
    found, wanted = (list(candidates(one, read_model(one, SFT), 4)) for one in (config, plain))
    assert found[0] == config and found[1:] == wanted[1:]
    assert len({one.model_dump_json() for one in wanted}) == len(wanted)


def test_microbatches_of_candidates_hold_what_a_run_asks_of_them():
    """One and two of the longest samples, which are pairs where a reward model compares."""
    path = CONFIGS / "nano/reward_helpful.yaml"
    config = load_config(path, ["objective=pairwise", "data.max_tokens=100", "microbatch_tokens=1000"])
    found = {one.microbatch_tokens for one in candidates(config, read_model(config, path), 1)}
    assert found == {200, 400, 1000}
    for tokens in found:
        taken = with_capacity(config, tokens).problems({}, 1)
        assert not [problem for problem in taken if problem.startswith("microbatch_tokens")]


def test_a_microbatch_of_a_reward_model_holds_whole_pairs():
    path = CONFIGS / "nano/reward_helpful.yaml"
    keys = ["batch_size=8", "data.max_tokens=100", "microbatch_tokens=250"]
    of = {
        objective: workload(load_config(path, [*keys, f"objective={objective}"]), Lengths(given=(100,)), replicas=2)
        for objective in ("pairwise", "pointwise")
    }
    assert {name: (one.microbatches, one.microbatch_tokens, len(one.samples)) for name, one in of.items()} == {
        "pairwise": (4, 200, 16), "pointwise": (2, 200, 8)
    }  # fmt: skip
    with pytest.raises(ConfigError, match="does not fit"):
        workload(load_config(path, [*keys[:2], "microbatch_tokens=150"]), Lengths(given=(100,)), replicas=2)


def test_nothing_fits_a_gpu_without_memory():
    none = some(dataclasses.replace(gpu_kind("h100-80"), memory_bytes=SPARE_BYTES))
    assert none.run() == []


def test_a_search_that_is_cut_off_says_so():
    search = some(gpu_kind("h100-80"))
    said = []
    search.say = said.append
    found = search.run(measured=1)
    assert search.skipped > 0 and said[-1].startswith(f"cut off after {search.measured} measured: {search.skipped:,}")
    assert f"{search.skipped:,} more layouts" in [*proposed(SFT, [], found, 4, search.gpu, search.skipped)][-1]
    assert "cut off" not in "".join(proposed(SFT, [], found, 4, search.gpu, 0))


def test_a_search_that_is_cut_off_looks_at_the_config_itself():
    """Also where it says how many generators there are, which follows from the others' tp."""

    class Looked(Some):
        looked: ClassVar[list[int]] = []

        def _learn(self, trained):
            pass

        def fitting(self, one, other, limit=math.inf):
            assert one.config == self.config
            self.looked.append(other.rollout.tp)

    path = CONFIGS / "nano/zero.yaml"
    config = load_config(path, ["rollout.dp=2"])
    search = Looked(config, read_model(config, path), 2, gpu_kind("h100-80"), Lengths(80), 1.5, 8)
    search.run(measured=0)
    assert Looked.looked == [config.rollout.tp] and search.skipped > 0


def test_a_search_builds_few_models_and_lists_parameters_once(monkeypatch):
    """What a search of DeepSeek-V3 took minutes for. A model is built for each choice of recomputation and for the stages of
    what is measured, whose kinds are three: the first, those in the middle, the last.
    """
    built, listed = [], []

    def counting(calls, function):
        return lambda *given, **named: calls.append(1) or function(*given, **named)

    rank._measured.cache_clear()
    parameters._counted.cache_clear()
    monkeypatch.setattr(rank, "Policy", counting(built, rank.Policy))
    monkeypatch.setattr(parameters, "parameters", counting(listed, parameters.parameters))
    search = some(gpu_kind("h100-80"), Search)
    trained = len(list(search.trained()))
    assert len(listed) == 1 and not built
    found = search.run()
    assert len(found) == 3 and len(listed) == 1
    assert search.measured <= 4 and len(built) <= 5 + 3 * search.measured < trained


def test_what_is_given_up_is_what_takes_longer():
    """A limit of seconds ends the choices of `memory` early, the quickest first, and changes none that is taken."""
    search = some(gpu_kind("h100-80"))
    (generated,), trained = search.generated(), list(search.trained())
    for one in trained[:3]:
        moves = search._moves(one)
        assert [seconds for seconds, _ in moves] == sorted(seconds for seconds, _ in moves) and len(moves) > 1
        found = search.fitting(one, generated)
        assert search.fitting(one, generated, found.seconds) is None
        assert search.fitting(one, generated, found.seconds * 1.001) == found


def test_a_search_of_nothing_says_why():
    config = load_config(CONFIGS / "nano/zero.yaml")
    hf, small = read_model(config, SFT), dataclasses.replace(gpu_kind("h100-80"), memory_bytes=1e5)
    with pytest.raises(ConfigError, match="the generator's weights are"):
        Search(config, hf, 4, small, Lengths(20), 1.5, 8).run()


def test_fuller_experts_bound_no_evener_ones():
    even, uneven = (Chunk("none", 1, 1, ep, 1, 64, uneven=by) for ep, by in ((2, 1.5), (4, 4.0)))
    assert even.share(uneven) == SURE and uneven.share(even) == 0 and uneven.share(uneven) == 1


def test_layers_that_skip_fp8_stand_for_none_that_compute_in_it():
    """Neither as a stage nor, where the search knows what a layer keeps, as a bound."""
    keys = ["fp8=blockwise", "fp8_skip_first_layers=2", "dtype=bfloat16", "recompute=none"]
    layout = ["parallel.pp=4", "parallel.layers_per_stage=[2,2,2,2]"]
    config = load_config(SFT, [*layout, *(f"model.{key}" for key in keys)])
    stages = {}
    for skipped in (2, 3):
        model = config.model.model_copy(update={"fp8_skip_first_layers": skipped})
        one = config.model_copy(update={"model": model})
        hf = read_model(config, SFT) | {"num_hidden_layers": 8, "first_k_dense_replace": 0}
        search = Search(one, hf, 4, gpu_kind("h100-80"), Lengths(80), 1.0, 8)
        trained = Trained(one, search.workload(one), 0.0, 0.0)
        stages[skipped] = search.ranks(trained)
        for held in stages[skipped]:
            (real,), least = held.memory.activations, search.bounds.activations(one, held.stage, trained.work)
            assert 0 < least.kept <= real.kept, (skipped, held.stage)
            assert least.kept + least.working <= 1.01 * (real.kept + real.working), (skipped, held.stage)
    assert [[held.stage for held in found] for found in stages.values()] == [[0, 1, 3], [0, 1, 2, 3]]
    layers = [held.memory.activations[0].layers for held in stages[2]]
    assert [*layers[0]] == [(True, False)] and layers[1][True, True] < layers[0][True, False]


def test_the_least_of_a_stage_has_moments_as_they_are_stored():
    path = CONFIGS / "moonlight_16b/sft.yaml"
    for keys, part in (([], 1), (["optimizer.precision_aware=true"], 2)):
        config = load_config(path, keys)
        search = Search(config, read_model(config, path), 8, gpu_kind("h100-80"), Lengths(), 1.0, 8)
        static = search.bounds.least_of(config, 0, None).memory.static
        assert part * static.exp_avg == part * static.exp_avg_sq == static.main_params > 0


def test_the_command_prints_words_for_the_shell():
    said: list[str] = []
    job = Job(SFT, ["seed=3"], 1, "h100-80", Lengths(80), 1.5, per_node=8)
    lines, found = search_lines(job, said.append)
    assert found and " s a step, fullest in " in lines[0] and any("measured 1:" in line for line in said)
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
    assert standalone_stages(61, 1, 32) == (*[2] * 30, 1, 0)
    assert standalone_stages(61, 1, 16) == (*[4] * 12, 5, 5, 3, 0)
    for layers, stages, further in itertools.product(range(2, 70), range(2, 20), (1, 2)):
        if layers >= stages:
            counts = standalone_stages(layers, further, stages)
            assert len(counts) == stages and sum(counts) == layers and min(counts[:-2], default=1) > 0 == counts[-1]
            assert counts[-2] + further <= max((further, *counts[:-2])) or stages == 2


def test_a_search_looks_at_the_loss_in_a_stage_of_its_own():
    """Only where layers of multi-token prediction are built; in layouts that the checks let pass."""
    hf = read_model(load_config(SFT), SFT) | {"num_hidden_layers": 4, "num_nextn_predict_layers": 1}
    for coefficient, apart in (("0", set()), ("0.1", {(2, None), (4, None)})):
        config = load_config(SFT, [f"model.mtp_loss_coefficient={coefficient}"])
        found = {one.parallel for one in candidates(config, hf, 4)}
        assert {(one.pp, one.vpp) for one in found if one.mtp_standalone} == apart
        assert {(one.pp, one.vpp) for one in found if not one.mtp_standalone} > {(2, None), (2, 2), (4, None)}
