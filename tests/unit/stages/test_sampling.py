"""Windows of samples in one process that plays one rank after the other: shares, stops, resuming, what is refused."""

import contextlib
import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest

from r1mega.config.schema import ModelConfig, RolloutConfig
from r1mega.errors import DataError
from r1mega.observe.trace import PhaseTimer
from r1mega.stages import data_factory
from r1mega.stages import sampling as module
from r1mega.stages.sampling import PosedPrompt, Sampling, sample_draws
from r1mega.types import Completion, Prompt, Response, Reward, RewardStatus, SamplingSettings

POSED = [PosedPrompt(Prompt(name, f"{name}?", ("1",), "math", None, (place, 3))) for place, name in enumerate("abcde")]
TOKENIZER = SimpleNamespace(eos_token_id=0, end_token_ids=(0,), decode=lambda token_ids: " ".join(map(str, token_ids)))
TEXTS = SimpleNamespace(encode=lambda text: [int(word) for word in text.split()])


class Engine:
    """Responses are the seeds of their requests."""

    def __init__(self):
        self.drawn = 0

    def stream(self, requests):
        for index, request in enumerate(requests):
            self.drawn += 1
            yield Completion(index, 0, Response((request.seed, 0), (0.0, 0.0), "stop"))


class Scorer:
    """1 for even seeds; every fifth is not judged."""

    def submit(self, prompt, response, text):
        return int(text)

    def result(self, seed):
        if seed % 5 == 0:
            return Reward(None, {}, RewardStatus.UNJUDGED, "no verdict")
        return Reward(float(seed % 2 == 0), {"accuracy": float(seed % 2 == 0)}, RewardStatus.OK)


@pytest.fixture
def start(tmp_path, monkeypatch):
    """A function: one start as a rank of several; the sampling, and what its runtime noted."""

    def begun(directory="run", rank=0, world=1, tp=1, posed=POSED, stop_after=None, **options):
        engine, metrics = Engine(), {}
        told = lambda: stop_after is not None and engine.drawn >= stop_after  # noqa: E731

        class Runtime(SimpleNamespace):
            signalled = property(lambda self: told())

        runtime = Runtime(
            config=SimpleNamespace(seed=3), run_dir=tmp_path / directory, rank=rank, is_main=True, timer=PhaseTimer(),
            barrier=lambda: None, stop_requested=told, write_metrics=metrics.__setitem__,
        )  # fmt: skip
        monkeypatch.setattr(module.dist, "get_rank", lambda: rank)
        monkeypatch.setattr(module.dist, "get_world_size", lambda: world)
        monkeypatch.setattr(module.dist, "all_reduce", lambda sums: None)
        sampling = Sampling(runtime, "samples", posed, 4, SamplingSettings(), tp=tp, window=2, **options)
        missing = sampling.begin()
        return SimpleNamespace(sampling=sampling, missing=missing, engine=engine, metrics=metrics)

    return begun


def stored(tmp_path, directory="run"):
    return module.sample_store(tmp_path / directory, "samples", POSED, 0).read_graded()


def test_stopped_and_gone_on_with_other_ranks(start, tmp_path):
    whole = start("whole")
    assert (whole.missing, whole.sampling.num_windows, whole.sampling.finished_windows()) == (20, 3, 0)
    assert whole.sampling.run(whole.engine, TOKENIZER, Scorer()) and whole.engine.drawn == 20
    assert [whole.metrics[step]["group/num_sampled"] for step in (1, 2, 3)] == [8, 8, 4]
    expected = stored(tmp_path, "whole")
    assert len(expected) == 20 == len({g.sample.text for g in expected.values()})
    assert {g.reward.value for g in expected.values()} == {0.0, 1.0, None}, "one without a verdict counts as drawn"
    assert whole.metrics[1].keys() >= {"reward/accuracy", "tokens/rollout_per_second"}

    first = start(stop_after=11)
    assert not first.sampling.run(first.engine, TOKENIZER, Scorer()) and list(first.metrics) == [1]
    assert len(stored(tmp_path)) == 11, "what was drawn before the stop is graded and kept"
    ranks = [start(rank=rank, world=2) for rank in range(2)]
    assert [(r.missing, r.sampling.finished_windows()) for r in ranks] == [(9, 1)] * 2
    for rank in ranks:
        assert rank.sampling.run(rank.engine, TOKENIZER, Scorer()) and list(rank.metrics) == [2, 3]
    assert sum(rank.engine.drawn for rank in ranks) == 9 and stored(tmp_path) == expected
    assert [sum(r.metrics[step]["group/num_sampled"] for r in ranks) for step in (2, 3)] == [8, 4], "earlier ones count"
    again = start()
    assert again.missing == 0 and again.sampling.finished_windows() == 3


def test_failed_grades_are_asked_for_again(start, tmp_path):
    """The judge is away, comes back, and is away again: what it has not graded is graded later, and nothing is drawn twice."""

    class Away(Scorer):
        def __init__(self, fails):
            self.fails, self.asked = fails, 0

        def result(self, seed):
            self.asked += 1
            return Reward(None, {}, RewardStatus.FAILED, "away") if self.fails(seed) else super().result(seed)

    first = start()
    assert first.sampling.run(first.engine, TOKENIZER, Away(lambda seed: True))
    assert {g.reward.status for g in stored(tmp_path).values()} == {RewardStatus.FAILED}
    for fails, asked in ((lambda seed: True, 20), (lambda seed: seed % 2, 20)):
        again, judge = start(), Away(fails)
        assert (again.missing, again.sampling.num_failed, again.sampling.finished_windows()) == (0, 20, 0)
        assert again.sampling.run(None, TEXTS, judge) and judge.asked == asked
        assert list(again.metrics) == [1, 2, 3] and again.metrics[1]["group/num_sampled"] == 8
    stopping, judge = start(stop_after=0), Away(lambda seed: False)
    left = stopping.sampling.num_failed
    assert 0 < left < 20
    assert not stopping.sampling.run(None, TEXTS, judge) and not stopping.metrics
    assert start().sampling.num_failed == left - 1, "told to stop, it does not ask for the rest of the window"
    left -= 1
    for rank in range(2):  # by however many ranks
        last, judge = start(rank=rank, world=2), Away(lambda seed: False)
        assert last.sampling.run(None, TEXTS, judge) and judge.asked < left
    whole = start("whole")
    assert whole.sampling.run(whole.engine, TOKENIZER, Scorer())
    assert stored(tmp_path) == stored(tmp_path, "whole") and start().sampling.num_failed == 0


def test_further_ranks_of_a_generator_keep_nothing(start, tmp_path):
    other = start(rank=1, world=2, tp=2)
    assert other.sampling.run(other.engine, TOKENIZER, None) and other.engine.drawn == 20 and not other.metrics
    assert stored(tmp_path) == {}
    first = start(rank=0, world=2, tp=2)
    assert first.missing == 20 and first.sampling.run(first.engine, TOKENIZER, None)
    assert {g.reward.status for g in stored(tmp_path).values()} == {RewardStatus.UNJUDGED} and not first.metrics


def test_other_prompts_and_old_files_are_refused(start, tmp_path):
    run = start(stop_after=3)
    run.sampling.run(run.engine, TOKENIZER, Scorer())
    for other in (POSED[::-1], POSED[:-1], [*POSED[:-1], PosedPrompt(Prompt("e", "?", ("1",), "math", None, (9, 9)))]):
        with pytest.raises(DataError, match="its samples answer other prompts"):
            start(posed=other)
    assert start().missing == 17
    old = tmp_path / "old" / "raw" / "samples_00000.jsonl"
    old.parent.mkdir(parents=True)
    old.write_text(json.dumps({"step": 1, "prompt": 0, "sample": 0, "text": "1"}) + "\n")
    with pytest.raises(DataError, match=r"samples_\*\.jsonl are samples of an earlier version"):
        start("old")


def test_a_scorer_that_needs_the_generator_is_asked_at_the_windows_end(start, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_UNGRADED", 2)  # fewer than a window's
    run = start(scores_while_sampling=False)

    class Judge(Scorer):
        def result(self, seed):
            assert run.engine.drawn in (8, 16, 20)
            return super().result(seed)

    assert run.sampling.run(run.engine, TOKENIZER, Judge()) and len(stored(tmp_path)) == 20


@pytest.mark.parametrize("run_seed", [0, 17])
def test_seeds_are_those_of_earlier_versions(run_seed):
    """A number by the prompt's name, then splitmix64 of it and the sample's number, written out here."""

    def splitmix(value):
        value = (value * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % 2**64
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
        return value ^ (value >> 31)

    posed = PosedPrompt(POSED[0].prompt, (0, 3))
    draws = sample_draws(posed, run_seed, "samples", 3)
    first = random.Random(f"{run_seed}/samples/a").getrandbits(63)
    assert [draw.seed for draw in draws] == [splitmix((splitmix(first) + index) % 2**64) >> 1 for index in range(3)]
    assert [(draw.key, draw.prefix) for draw in draws] == [(("a", index), (0, 3)) for index in range(3)]


def test_a_data_stage_hands_on_the_dtype_of_its_cache(monkeypatch):
    monkeypatch.setattr(data_factory, "open_engine", lambda settings, _name: contextlib.nullcontext(settings))
    rollout = RolloutConfig(kv_cache_dtype="fp8")
    assert rollout.computes_in_fp8 and not RolloutConfig().computes_in_fp8
    made = data_factory.DataFactory.engine(None, ModelConfig(path=Path("unused")), 8, rollout)
    with made as settings:
        assert settings.kv_cache_dtype == "fp8"
