"""Tasks judged by their real scorers: reference solutions are right, near misses wrong. Nothing is generated here."""

import json
from pathlib import Path

import pytest

from r1mega.config.rewards import RewardConfig
from r1mega.evaluate.forms import FormOptions
from r1mega.evaluate.patch import extract_patch, write_predictions
from r1mega.evaluate.result import EvaluationResult, evaluation_rows
from r1mega.evaluate.run import open_scorer
from r1mega.evaluate.tasks import TASKS, load_task
from r1mega.rollout.draw import Sample, grade_samples
from r1mega.types import Prompt
from tests.machine import needs_bwrap, shared_data

pytestmark = pytest.mark.heavy

SAMPLES = Path("tests/data/evaluate")


@pytest.fixture(scope="module")
def scorer():
    with open_scorer(RewardConfig()) as scorer:
        yield scorer


def evaluate(scorer, name, path, answers, **options):
    """The result of a task when answers(record id) are the responses."""
    records = load_task(TASKS[name], path, FormOptions(**options))
    prompts = [Prompt(r.id, r.question, r.answers, r.kind, r.language, (1,), r.metadata) for r in records]
    texts = {p.id: answers(p.id) if callable(answers) else answers[p.id] for p in prompts}
    work = [(p, Sample(p.id, i, text, 1, False)) for p in prompts for i, text in enumerate(texts[p.id])]
    num_samples = len(next(iter(texts.values())))
    return EvaluationResult(evaluation_rows(prompts, grade_samples(scorer, work), num_samples), num_samples, 0)


def verdicts(result):
    return [row.correct for row in result.rows]


def fenced(code):
    return f"<think> easy </think>\n<answer>\n```python\n{code}\n```\n</answer>"


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_humaneval(scorer, path, ids=None):
    rows = rows_of(path)
    whole = {row["task_id"]: fenced(row["prompt"] + row["canonical_solution"]) for row in rows}
    wrong = {row["task_id"]: fenced(f"def {row['entry_point']}(*a, **k):\n    return 'no'") for row in rows}
    result = evaluate(scorer, "humaneval", path, {i: [whole[i], wrong[i]] for i in whole})
    assert verdicts(result) == [(True, False)] * len(rows)
    assert result.accuracy.value == 0.5 and result.pass_at(2) == 1.0 and result.consensus is None


def check_mbpp(scorer, path):
    rows = rows_of(path)
    result = evaluate(scorer, "mbpp", path, {str(r["task_id"]): [fenced(r["code"]), fenced("pass")] for r in rows})
    assert verdicts(result) == [(True, False)] * len(rows)


@needs_bwrap
def test_reference_solutions_of_own_problems(scorer):
    check_humaneval(scorer, SAMPLES / "humaneval.jsonl")
    check_mbpp(scorer, SAMPLES / "mbpp.jsonl")


@needs_bwrap
@pytest.mark.parametrize(("check", "name"), [(check_humaneval, "humaneval"), (check_mbpp, "mbpp")])
def test_reference_solutions_of_the_published_sets(scorer, tmp_path, check, name):
    """40 of each: the first ones."""
    source = shared_data(f"{name}.jsonl")
    part = tmp_path / f"{name}.jsonl"
    part.write_text("\n".join(source.read_text().splitlines()[:40]) + "\n")
    check(scorer, part)


@needs_bwrap
def test_programs_by_streams_and_by_calls(scorer):
    add = "print(sum(map(int, input().split())))"
    scale = "class Solution:\n    def scale(self, values, k):\n        return [v * k for v in values]"
    answers = {"own_a": [fenced(add), fenced("print(5)")], "9901": [fenced(scale), fenced(scale.replace("* k", "+ k"))]}
    result = evaluate(scorer, "livecodebench", SAMPLES / "livecodebench.jsonl", answers)
    assert verdicts(result) == [(True, False)] * 2


@needs_bwrap
def test_rating_from_programs(scorer):
    """The 800 solved, the 1400 not: by symmetry the most likely rating is halfway."""
    twice = fenced("print(2 * int(input()))")
    result = evaluate(scorer, "codeforces", SAMPLES / "codeforces.jsonl", {"0/A": [twice], "0/E": [twice]})
    assert verdicts(result) == [(True,), (False,)]
    assert result.metrics()["eval/rating"] == pytest.approx(1100, abs=0.01)


def test_choices(scorer):
    right, wrong = "I think so. </think> \\boxed{B}", "</think> \\boxed{A}"
    result = evaluate(scorer, "mmlu", SAMPLES / "mmlu.jsonl", lambda _: [right, wrong, "B"])
    assert verdicts(result) == [(True, False, False), (False, True, False)], "a letter without a box is no answer"


def test_math(scorer):
    texts = lambda i: ["<answer> $\\frac{6}{8}$ </answer>", "\\boxed{0.75}", "\\boxed{0.7}"]  # noqa: E731
    result = evaluate(scorer, "math500", SAMPLES / "math500.jsonl", texts)
    assert verdicts(result) == [(True, True, False)] and result.consensus == 1.0


def test_instructions(scorer):
    good = "the rain is falling on the roof of the old house and nobody in the village minds it."
    texts = lambda i: [good, good.capitalize(), good.replace(" and", ", and")]  # noqa: E731
    result = evaluate(scorer, "ifeval", SAMPLES / "ifeval.jsonl", texts)
    assert verdicts(result) == [(True, False, False)]


PATCH = "--- a/ratio.py\n+++ b/ratio.py\n@@ -1 +1 @@\n-x / y\n+x / y if y else 0\n"


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (f"<think> ```diff\nno\n``` </think> Here:\n<patch>\n{PATCH}</patch>", PATCH),
        (f"```python\nx = 1\n```\n```diff\n{PATCH}```", PATCH),
        (f"</think><answer>\n```\n{PATCH}```\n</answer>", PATCH),
        (PATCH, PATCH),
        ("<think> nothing comes to mind </think>", ""),
    ],
)
def test_patch_in_a_response(response, expected):
    assert extract_patch(response) == expected


def test_predictions_in_the_harness_form(scorer, tmp_path):
    answers = {"own__thing-1": [f"<patch>\n{PATCH}</patch>"], "own__thing-2": ["I cannot."]}
    result = evaluate(scorer, "swe_bench", SAMPLES / "swe_bench.jsonl", answers)
    assert result.accuracy is None, "not judged here"
    write_predictions(result.rows, "zero", tmp_path / "predictions.jsonl")
    lines = rows_of(tmp_path / "predictions.jsonl")
    assert lines[0] == {"instance_id": "own__thing-1", "model_name_or_path": "zero", "model_patch": PATCH}
    assert lines[1]["model_patch"] == "I cannot.\n" and len(lines) == 2
