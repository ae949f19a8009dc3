"""Accuracy of programs as a part: the sandbox runs in threads of this process, each of which only waits for its
children.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from r1mega.reward.code import CodeReward
from r1mega.reward.code_problem import Problem, problem_from
from r1mega.reward.parts import PartScore, ScoringItem

CONCURRENT_PROGRAMS = 4


class CodeAccuracy:
    """The prompt's metadata holds the tests, in any of the forms of `code_problem`. Raises RewardError where no
    sandbox can be had.

    timeout_seconds is not used: the limits of a program are those of its task and of the sandbox.
    """

    name = "accuracy"

    def __init__(self, timeout_seconds: float = 0.0, reward: CodeReward | None = None) -> None:
        self._reward = reward or CodeReward()
        self._executor = ThreadPoolExecutor(CONCURRENT_PROGRAMS, thread_name_prefix="reward-code")

    def score(self, item: ScoringItem) -> Future[PartScore]:
        problem = problem_from(item.prompt.metadata, f"prompt {item.prompt.id}")
        return self._executor.submit(self._grade, item.text.rpartition("</think>")[2], problem)

    def _grade(self, text: str, problem: Problem) -> PartScore:
        reward = self._reward.score(text, problem)
        return PartScore(reward.value, reward.reason, reward.status)
