"""What the config's keys change: the answer's form, partial credit, the sandbox, which prompts and steps a part counts
for; and what scoring reports about itself."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from pydantic import ValidationError

from r1mega.config.rewards import (
    AccuracyReward,
    JudgeReward,
    LengthReward,
    PreferenceReward,
    RewardConfig,
    RewardPool,
    SandboxConfig,
)
from r1mega.errors import RewardError
from r1mega.platform import watchdog
from r1mega.reward.compose import RewardScorer, WeightedPart
from r1mega.reward.length import Repetition
from r1mega.sandbox import SandboxUnavailable
from r1mega.types import Prompt, Response, RewardStatus
from tests.machine import needs_bwrap

pytestmark = pytest.mark.heavy

TWO_CASES = {"input_output": {"inputs": ["1\n", "5\n"], "outputs": ["2\n", "10\n"]}}
HALF_RIGHT = "<think>x</think>```python\nn = int(input())\nprint(2 if n == 1 else 0)\n```"


def prompt(kind="math", answers=("4",), question="What is the sum of two and two?", **metadata) -> Prompt:
    return Prompt("p7", question, answers, kind, "en", (1, 2), metadata)


def score(config: RewardConfig, text: str, prompt_: Prompt | None = None, num_tokens: int = 10, step: int = 1):
    with RewardScorer(config, max_response_tokens=100) as scorer:
        scorer.step = step
        response = Response((1,) * num_tokens, (0.0,) * num_tokens, "stop")
        return scorer.result(scorer.submit(prompt_ or prompt(), response, text))


@pytest.mark.parametrize(
    ("form", "boxed", "tagged", "both"), [("any", 1.0, 1.0, 0.0), ("boxed", 1.0, 0.0, 1.0), ("tag", 0.0, 1.0, 0.0)]
)
@pytest.mark.parametrize("kind", ["math", "choice"])
def test_form_of_the_answer(form, boxed, tagged, both, kind):
    config = RewardConfig(accuracy=AccuracyReward(form=form))
    gold = prompt(kind, ("4",) if kind == "math" else ("B",))
    right, wrong = ("4", "5") if kind == "math" else ("B", "C")
    assert score(config, f"\\boxed{{{right}}}", gold).parts["accuracy"] == boxed
    assert score(config, f"<answer>{right}</answer>", gold).parts["accuracy"] == tagged
    assert score(config, f"<answer>{wrong}</answer> \\boxed{{{right}}}", gold).parts["accuracy"] == both


@needs_bwrap
def test_partial_credit_and_limits_for_programs():
    question = prompt("code", (), **TWO_CASES)
    assert score(RewardConfig(), HALF_RIGHT, question).parts["accuracy"] == 0.0
    generous = RewardConfig(accuracy=AccuracyReward(partial_credit=True))
    assert score(generous, HALF_RIGHT, question).parts["accuracy"] == 0.5
    endless = RewardConfig(sandbox=SandboxConfig(wall_seconds=0.5))
    stopped = score(endless, "```python\nwhile True: pass\n```", question)
    assert stopped.parts["accuracy"] == 0.0 and "time_limit" in stopped.reason
    small = RewardConfig(sandbox=SandboxConfig(memory_bytes=64 << 20, wall_seconds=60.0))
    hungry = score(small, "```python\nx = bytes([1]) * (200 << 20)\n```", question)
    assert hungry.parts["accuracy"] == 0.0 and "memory_limit" in hungry.reason


def test_a_remote_sandbox_that_is_not_there_is_said_at_once():
    config = RewardConfig(sandbox=SandboxConfig(url="http://127.0.0.1:9"))
    with pytest.raises(RewardError, match="no usable service at http://127.0.0.1:9 "):
        score(config, HALF_RIGHT, prompt("code", (), **TWO_CASES))


@needs_bwrap
def test_an_interpreter_that_is_not_there():
    config = RewardConfig(sandbox=SandboxConfig(python=Path("/usr/bin/no-such-python")))
    with pytest.raises(SandboxUnavailable, match="no-such-python"):
        score(config, HALF_RIGHT, prompt("code", (), **TWO_CASES))


@needs_bwrap
def test_libraries_reach_the_answers(tmp_path_factory):
    library = tmp_path_factory.mktemp("library")
    (library / "doubling.py").write_text("def twice(n): return 2 * n\n")
    for directory in (library, *library.parents):
        if directory != Path("/") and not directory.stat().st_mode & 0o001:
            directory.chmod(0o755)
    config = RewardConfig(sandbox=SandboxConfig(libraries=(library,)))
    program = "```python\nimport doubling\nprint(doubling.twice(int(input())))\n```"
    assert score(config, program, prompt("code", (), **TWO_CASES)).parts["accuracy"] == 1.0


def test_length_shaping_is_a_part():
    config = RewardConfig(length=LengthReward(weight=0.5, free_tokens=20))
    reward = score(config, "\\boxed{4}", num_tokens=60)
    assert reward.parts["length"] == 0.5 and reward.value == pytest.approx(1.0 + 0.5 * 0.5)


def test_general_prompts_have_no_accuracy():
    reward = score(RewardConfig(), "<think>hm</think><answer>A poem.</answer>", prompt("general", ()))
    assert dict(reward.parts) == {"format": 1.0} and reward.value == pytest.approx(0.1)


def test_a_part_counts_for_its_kinds_from_its_step_on():
    entry = WeightedPart(1.0, Repetition(2), kinds=("general", "safety"), from_step=1301)
    assert not entry.applies(prompt("general"), 1300) and entry.applies(prompt("general"), 1301)
    assert entry.applies(prompt("safety"), 1700) and not entry.applies(prompt("math"), 1700)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (RewardConfig(helpfulness=PreferenceReward(weight=1.0)), "reward.helpfulness.model = None"),
        (RewardConfig(harmlessness=PreferenceReward(weight=1.0, model="/no/such")), "reward.harmlessness.model"),
        (RewardConfig(judge=JudgeReward(weight=1.0)), "wants url"),
        (RewardConfig(judge=JudgeReward(weight=1.0, engine="policy", low=3, high=3)), "must be below high"),
        (RewardConfig(judge=JudgeReward(weight=1.0, engine="policy", prompt="rate it")), "no Jinja2"),
        (RewardConfig(length=LengthReward(weight=1.0, free_tokens=200)), "reward.length.free_tokens = 200"),
    ],
)
def test_what_cannot_work_is_said_before_anything_starts(config, message):
    problems = list(config.problems(max_response_tokens=100))
    assert len(problems) == 1 and message in problems[0]


def test_unknown_forms_are_refused():
    with pytest.raises(ValidationError, match="boxed"):
        AccuracyReward(form="underlined")


def test_a_failed_member_keeps_its_place_and_its_reason_is_logged(caplog):
    """What a worker could not score is left out; the others of the group keep their order and values."""
    config = RewardConfig(accuracy=AccuracyReward(timeout_seconds=0.001), pool=RewardPool(max_retries=0))
    texts = ["\\boxed{4}", "\\boxed{\\exp\\{\\ln 4\\}}", "\\boxed{5}"]
    with caplog.at_level(logging.WARNING), RewardScorer(config, max_response_tokens=100) as scorer:
        tickets = [scorer.submit(prompt(), Response((1,), (0.0,), "stop"), text) for text in texts]
        rewards = [scorer.result(ticket) for ticket in tickets]
        activity = scorer.activity()
    assert [reward.value for reward in rewards] == [1.0, None, 0.0]
    assert rewards[1].status is RewardStatus.FAILED and "within 0.001 s" in rewards[1].reason
    assert any("prompt p7 is left out" in r.getMessage() and "0.001 s" in r.getMessage() for r in caplog.records)
    assert (activity.deferred, activity.failed, activity.kills, activity.retries) == (1, 1, 1, 0)
    assert activity.queue_max == 1 and 0 < activity.p50_seconds == activity.p99_seconds


def test_activity_is_of_what_came_since():
    before = watchdog._ticks["score"]
    with RewardScorer(RewardConfig(accuracy=AccuracyReward(timeout_seconds=60.0)), max_response_tokens=100) as scorer:
        for count in (2, 1):
            tickets = [
                scorer.submit(prompt(), Response((1,), (0.0,), "stop"), "\\boxed{\\exp\\{\\ln 4\\}}")
                for _ in range(count)
            ]
            assert all(scorer.result(ticket).value == 1.0 for ticket in tickets)
            activity = scorer.activity()
            assert (activity.deferred, activity.failed, activity.kills) == (count, 0, 0)
            assert activity.queue_max == count
        assert scorer.activity().deferred == 0
    assert watchdog._ticks["score"] - before == 3  # the watchdog sees each come
