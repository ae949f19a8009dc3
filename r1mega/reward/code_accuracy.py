"""Accuracy of programs as a part: the sandbox runs in threads of this process, each of which only waits for its
children.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from r1mega.config.rewards import RewardConfig
from r1mega.reward.code import CodeReward
from r1mega.reward.code_problem import Problem, problem_from
from r1mega.reward.parts import PartScore, ScoringItem
from r1mega.sandbox.backend import limits_of, open_backend


class CodeAccuracy:
    """The prompt's metadata holds the tests, in any of the forms of `code_problem`.

    num_concurrent: programs that run at once. Raises RewardError where no sandbox can be had.
    """

    name = "accuracy"

    def __init__(self, reward: CodeReward, num_concurrent: int = 4) -> None:
        self._reward = reward
        self._executor = ThreadPoolExecutor(num_concurrent, thread_name_prefix="reward-code")

    @classmethod
    def from_config(cls, config: RewardConfig) -> CodeAccuracy:
        sandbox = config.sandbox
        reward = CodeReward(open_backend(sandbox), limits_of(sandbox), config.accuracy.partial_credit)
        return cls(reward, sandbox.num_concurrent)

    def score(self, item: ScoringItem) -> Future[PartScore]:
        problem = problem_from(item.prompt.metadata, f"prompt {item.prompt.id}")
        return self._executor.submit(self._grade, item.text.rpartition("</think>")[2], problem)

    def _grade(self, text: str, problem: Problem) -> PartScore:
        reward = self._reward.score(text, problem)
        return PartScore(reward.value, reward.reason, reward.status)

    def close(self) -> None:
        """Wait for the programs that run; those in the queue are dropped."""
        self._executor.shutdown(cancel_futures=True)
