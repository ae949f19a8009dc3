"""What becomes of a program."""

from __future__ import annotations

from r1mega.reward.code_problem import problem_from
from r1mega.sandbox import Verdict


def verdict(reward, program, **record):
    result = reward.grade(f"```python\n{program}\n```", problem_from(record, "here"))
    return result.verdict if result.verdict is not Verdict.RUNTIME_ERROR else result.reason
