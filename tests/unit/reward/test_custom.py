"""`reward.custom`: parts that are not r1mega's own, good ones and those that are none."""

from __future__ import annotations

import pytest

from r1mega.config.load import load_config
from r1mega.config.rewards import CustomReward, RewardConfig
from r1mega.errors import ConfigError, RewardError
from r1mega.reward.compose import RewardScorer
from r1mega.reward.custom import load_part
from r1mega.stages import check_rewards
from r1mega.types import Prompt, Response, RewardStatus

pytestmark = pytest.mark.heavy

PARTS = """
import math
from concurrent.futures import Future
from r1mega.reward.parts import Deferred, PartScore
from r1mega.reward.pool import Task
from r1mega.types import RewardStatus

CLOSED = []


class Words:
    def __init__(self, limit=3):
        self.limit = limit
    def score(self, item):
        return PartScore(float(len(item.text.split()) <= self.limit), f"at most {self.limit}")
    def close(self):
        CLOSED.append(self.limit)


class Later:
    def score(self, item):
        future = Future()
        future.set_result(PartScore(0.25, "later"))
        return future


class Worker:
    def score(self, item):
        return Deferred(Task("math:sqrt", (16.0,), 30.0), lambda outcome: PartScore(outcome.value, "by a worker"))


class Failed:
    def score(self, item):
        return PartScore(None, "no service", RewardStatus.FAILED)


class Raises:
    def score(self, item):
        return PartScore(1 / 0)


class Infinite:
    def score(self, item):
        return PartScore(math.inf)


class Number:
    def score(self, item):
        return 0.5


class Text:
    def score(self, item):
        return PartScore("much")


class Narrow:
    def score(self, item):
        import numpy
        return PartScore(numpy.float32(0.5))


class LaterRaises:
    def score(self, item):
        future = Future()
        future.set_exception(OSError("no service"))
        return future


class LaterNumber:
    def score(self, item):
        future = Future()
        future.set_result(0.5)
        return future


class WorkerInfinite:
    def score(self, item):
        return Deferred(Task("math:sqrt", (16.0,), 30.0), lambda outcome: PartScore(math.nan))


class WorkerRaises:
    def score(self, item):
        return Deferred(Task("math:sqrt", (16.0,), 30.0), lambda outcome: outcome.nothing)


class Together:
    def __init__(self):
        self.score, self.flush = lambda item: self, lambda: None


class NoStatus:
    def score(self, item):
        return PartScore(None)


class Scoreless:
    pass


def function(limit):
    return limit
"""


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    """The parts above, as a module that a user put on the path."""
    (tmp_path / "users_parts.py").write_text(PARTS)
    (tmp_path / "broken_parts.py").write_text("import r1mega.no_such_thing\n")
    monkeypatch.syspath_prepend(tmp_path)
    import sys

    yield
    sys.modules.pop("users_parts", None)


def scored(*names: str, kind: str = "math", step: int = 1, **sections):
    custom = {name.lower(): {"part": f"users_parts:{name}"} for name in names} | sections
    config = RewardConfig.model_validate({"accuracy": {"weight": 0}, "format": {"weight": 0}, "custom": custom})
    prompt = Prompt("p7", "2 + 2?", ("4",), kind, "en", (1, 2))
    with RewardScorer(config, max_response_tokens=64) as scorer:
        scorer.step = step
        ticket = scorer.submit(prompt, Response((3,), (0.0,), "stop"), "it is 4 <answer>4</answer>")
        scorer.flush()
        return scorer.result(ticket)


def test_it_counts_by_its_weight_under_its_own_name():
    short = {"part": "users_parts:Words", "weight": 0.5, "settings": {"limit": 9}}
    reward = scored("Later", short=short)
    assert reward.parts["short"] == 1.0 and reward.parts["later"] == 0.25
    assert reward.value == pytest.approx(0.5 + 0.25)
    assert "at most 9" in reward.reason


def test_a_worker_computes_what_is_deferred():
    assert scored("Worker").parts["worker"] == 4.0


def test_a_value_becomes_a_plain_number():
    """What is written as JSON, step for step."""
    assert type(scored("Narrow").parts["narrow"]) is float


def test_weight_0_is_not_computed():
    assert scored(raises={"part": "users_parts:Raises", "weight": 0}).parts.keys() == {"accuracy", "format"}


def test_kinds_and_steps():
    late = {"part": "users_parts:Words", "from_step": 3}
    general = {"part": "users_parts:Words", "kinds": ["general"]}
    assert {"late", "general"}.isdisjoint(scored(late=late, general=general).parts)
    assert "late" in scored(late=late, general=general, step=3).parts
    assert "general" in scored(late=late, general=general, kind="general").parts


def test_a_failure_leaves_the_response_out():
    reward = scored("Failed")
    assert reward.value is None and reward.status is RewardStatus.FAILED and "failed: no service" in reward.reason


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("Raises", "ZeroDivisionError: division by zero"),
        ("Infinite", "value inf; give a finite one"),
        ("Number", "0.5 is no score; give a PartScore"),
        ("Text", "ValueError: could not convert string to float"),
        ("LaterRaises", "OSError: no service"),
        ("LaterNumber", "0.5 is no score"),
        ("WorkerInfinite", "value nan; give a finite one"),
        ("WorkerRaises", "AttributeError: .*nothing"),
        ("NoStatus", "value None with status ok"),
    ],
)
def test_what_is_no_score_is_told_with_part_and_prompt(name, says):
    with pytest.raises(RewardError, match=f"reward part '{name.lower()}', prompt p7: {says}"):
        scored(name)


@pytest.mark.parametrize(
    ("part", "settings", "says"),
    [
        (
            "no_such_module:Part",
            {},
            "No module named 'no_such_module'; install its package .* or put its folder on PYTHONPATH",
        ),
        ("broken_parts:Part", {}, "No module named 'r1mega.no_such_thing'"),
        ("users_parts:Absent", {}, "AttributeError: .*Absent"),
        ("users_parts:Words", {"limits": 3}, "settings = {'limits': 3}: TypeError: .*'limits'"),
        ("users_parts:Scoreless", {}, "has no method score"),
        ("users_parts:function", {"limit": 3}, "has no method score"),
    ],
)
def test_what_is_no_part_is_refused(part, settings, says):
    with pytest.raises(ConfigError, match=rf"reward\.custom\.mine\.part = {part}.*{says}"):
        load_part("mine", CustomReward(part=part, settings=settings))


@pytest.mark.parametrize("overdraw", [1, 2])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("part", "weight"), [("Together", 1), ("Together", 0), ("Words", 1)])
def test_a_part_that_waits_for_all_is_refused_where_rewards_are_read_before(overdraw, dynamic, part, weight):
    config = load_config("configs/nano/zero.yaml", [
        f"reward.custom.mine.part=users_parts:{part}", f"reward.custom.mine.weight={weight}",
        f"rollout.partial.overdraw={overdraw}", f"algorithm.dynamic_sampling.enabled={dynamic}",
    ])  # fmt: skip
    if part == "Together" and weight and dynamic and overdraw > 1:
        with pytest.raises(ConfigError, match=r"^reward\.custom\.mine\.part = users_parts:Together has flush\(\)"):
            check_rewards(config)
    else:
        check_rewards(config)


def test_a_part_is_closed_with_the_scorer():
    scored("Words")
    import users_parts

    assert users_parts.CLOSED == [3]


@pytest.mark.parametrize("name", ["accuracy", "pool", "mean", "two words", "a.b"])
def test_names_that_are_taken_or_no_words(name):
    config = RewardConfig(custom={name: CustomReward(part="users_parts:Words")})
    assert [problem for problem in config.problems(64) if f"reward.custom.{name}" in problem]


@pytest.mark.parametrize("part", ["users_parts", "users_parts.Words", ":Words", "users_parts:", "users parts:Words"])
def test_a_part_is_named_by_module_and_class(part):
    with pytest.raises(ValueError, match="string_pattern_mismatch"):
        CustomReward(part=part)
