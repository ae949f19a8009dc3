"""Rows, summaries, files and tables of an evaluation."""

import random

import pytest

from r1mega.errors import DataError
from r1mega.evaluate.compare import compare_results
from r1mega.evaluate.result import (
    EvaluationResult,
    evaluation_row,
    evaluation_rows,
    merge_results,
    read_result,
    write_result,
)
from r1mega.evaluate.run import evaluation_draw
from r1mega.evaluate.table import Table, format_table
from r1mega.observe.registry import find_metric
from r1mega.rollout.draw import GradedSample, Sample
from r1mega.types import Prompt, Reward, RewardStatus


def answer(text):
    return f"<think> well </think> <answer> {text} </answer>"


def group(name, texts, values, golds=("1/2",), kind="math", language=None, rating=None):
    """The arguments of evaluation_row. values: accuracy of each sample; None: the reward failed."""
    prompt = Prompt(name, f"{name}?", golds, kind, language, (1,), {} if rating is None else {"rating": rating})
    failed = Reward(None, {}, RewardStatus.FAILED)
    rewards = [failed if v is None else Reward(v, {"accuracy": v, "format": 1.0}, RewardStatus.OK) for v in values]
    samples = [Sample(name, i, text, length=i + 1, truncated=i == 0) for i, text in enumerate(texts)]
    return prompt, [GradedSample(*pair) for pair in zip(samples, rewards, strict=True)]


def test_seeds_are_those_of_earlier_versions():
    prompt = Prompt("a", "a?", ("1",), "math", None, (1,))
    names = ["evaluate/5/a", "evaluate/5/a/1", "evaluate/5/a/2"]
    draws = [evaluation_draw(prompt, index, seed=5) for index in range(3)]
    assert [draw.seed for draw in draws] == [random.Random(name).getrandbits(63) for name in names]
    assert [draw.key for draw in draws] == [("a", 0), ("a", 1), ("a", 2)]


def test_row_groups_equal_answers():
    """0.5 and 1/2 are one answer and win 2 : 1 : 1 although no text occurs twice."""
    texts = [answer("3"), answer("0.5"), "no answer", answer("1/2"), answer("4")]
    row = evaluation_row(*group("a", texts, [0, 1, 0, 1, 0]))
    assert row.answers == ("3", "0.5", None, "1/2", "4")
    assert (row.consensus, row.consensus_correct) == ("0.5", True)
    assert row.correct == (False, True, False, True, False)
    assert row.truncated == (True, False, False, False, False) and row.lengths == (1, 2, 3, 4, 5)


def test_consensus_without_answers_or_golds():
    assert evaluation_row(*group("a", ["x", "y"], [0, 0])).consensus_correct is False
    row = evaluation_row(*group("a", ["def f(): ..."], [1], golds=(), kind="code"))
    assert row.consensus_correct is None and row.correct == (True,)


def test_partial_accuracy_is_not_correct():
    assert evaluation_row(*group("a", [answer("1")], [0.99])).correct == (False,)


def example():
    rows = (
        evaluation_row(*group("a", [answer("1/2"), answer("3"), answer("3")], [1, 0, 0])),
        evaluation_row(*group("b", [answer("1/2"), answer("0.5"), answer("3")], [1, 1, None])),
        evaluation_row(*group("c", [answer("3"), answer("3"), answer("3")], [None, None, None])),
    )
    return EvaluationResult(rows, 3, 1.5, {"seed": 0})


def test_summary_by_hand():
    metrics = example().metrics()
    assert metrics["eval/accuracy"] == pytest.approx((1 / 3 + 1) / 2), "failed samples and prompts are left out"
    assert metrics["eval/excluded_fraction"] == pytest.approx(4 / 9)
    assert metrics["eval/consensus"] == pytest.approx(1 / 2), "a: 3 wins (wrong), b: right, c: not judged"
    assert metrics["eval/pass_at_3"] == 1.0, "a alone has 3 judged samples"
    assert metrics["eval/length_mean"] == 2.0 and metrics["eval/truncated_fraction"] == pytest.approx(1 / 3)
    assert metrics["eval/format"] == 1.0 and metrics["eval/prompts"] == 3
    assert metrics["eval/accuracy_low"] < metrics["eval/accuracy"] < metrics["eval/accuracy_high"]
    assert all(find_metric(name) for name in metrics)


def test_nothing_judged():
    result = EvaluationResult(example().rows[2:], 3, 0.1)
    assert result.accuracy is None and "eval/accuracy" not in result.metrics()
    assert "pass@1" not in format_table(result)


def test_merge_does_not_depend_on_the_division():
    whole = example()
    halves = [EvaluationResult(whole.rows[r::2], 3, 1.0 + r / 2, {"seed": 0}) for r in range(2)]
    assert merge_results(halves) == merge_results(halves[::-1]) == whole


def test_file_round_trip(tmp_path):
    path = tmp_path / "result.json"
    write_result(example(), path)
    assert read_result(path) == example()
    path.write_text('{"rows": [{"prompt": 1}]}')
    with pytest.raises(DataError, match="not the results file"):
        read_result(path)
    with pytest.raises(DataError, match="no such file"):
        read_result(tmp_path / "nowhere")


def test_table():
    table = format_table(example())
    assert "prompts x samples  3 x 3" in table and "pass@1             0.6667  (95% interval" in table
    assert "cons@3             0.5000" in table and "not judged         0.4444" in table
    single = EvaluationResult((evaluation_row(*group("a", [answer("1/2")], [1])),), 1, 0.1)
    assert "cons@" not in format_table(single)


def test_compare_pairs_by_prompt():
    first = EvaluationResult(tuple(evaluation_row(*group(n, [answer("1")], [n == "a"])) for n in "abcdefgh"), 1, 0)
    second = EvaluationResult(tuple(evaluation_row(*group(n, [answer("1")], [n != "x"])) for n in "xhgfedcba"), 1, 0)
    comparison = compare_results(first, second)
    assert comparison.num_prompts == 8
    assert comparison.difference.value == pytest.approx(7 / 8) and comparison.difference.low > 0.5
    assert (comparison.test.only_first, comparison.test.only_second) == (0, 7)
    assert comparison.test.p_value == pytest.approx(2 / 2**7)
    other = EvaluationResult((evaluation_row(*group("z", [answer("1")], [1])),), 1, 0)
    with pytest.raises(DataError, match="share no prompt"):
        compare_results(first, other)


def test_compare_refuses_other_questions():
    first = EvaluationResult((evaluation_row(*group("a", [answer("1")], [1])),), 1, 0)
    second = EvaluationResult((evaluation_row(*group("a", [answer("1")], [1], golds=("2",))),), 1, 0)
    with pytest.raises(DataError, match="prompt a is another question"):
        compare_results(first, second)


def test_choices_are_grouped_by_the_letter_that_they_name():
    texts = [answer("A"), answer("(b)"), answer("B"), answer("B. Paris")]
    row = evaluation_row(*group("a", texts, [0, 1, 1, 1], golds=("B",), kind="choice"))
    assert (row.consensus, row.consensus_correct) == ("(b)", True)


def test_rows_in_the_order_of_prompts_and_samples():
    first, second = group("a", ["x", "y"], [0, 1]), group("b", ["z", "w"], [1, 1])
    shuffled = [second[1][1], first[1][1], second[1][0], first[1][0]]
    rows = evaluation_rows([first[0], second[0]], shuffled, 2)
    assert [row.texts for row in rows] == [("x", "y"), ("z", "w")]
    with pytest.raises(ValueError, match="missing"):
        evaluation_rows([first[0], second[0]], shuffled[1:], 2)


def test_languages_and_reflection():
    """By hand: one of two mixes scripts; words in the question's language: all of 2, then 2 of 4."""
    texts = ["<think> so perhaps </think> <answer> 1 </answer>", "<think> wait no 等等 </think> <answer> 1 </answer>"]
    row = evaluation_row(*group("a", texts, [0, 0], language="en"))
    metrics = EvaluationResult((row,), 2, 0).metrics()
    assert metrics["eval/mixed_language_fraction"] == 0.5 and metrics["eval/reflection_fraction"] == 0.5
    assert metrics["eval/language_share"] == pytest.approx((1 + 2 / 4) / 2)
    assert "eval/language_share" not in example().metrics()


def test_rating_of_rated_problems():
    """One of two problems of rating 1500: the solver is as good as they are. One without a rating says nothing."""
    rows = [
        evaluation_row(*group("a", ["x"], [1], golds=(), kind="code", rating=1500)),
        evaluation_row(*group("b", ["x"], [0], golds=(), kind="code", rating=1500)),
        evaluation_row(*group("c", ["x"], [1], golds=(), kind="code")),
    ]
    metrics = EvaluationResult(tuple(rows), 1, 0).metrics()
    assert metrics["eval/rating"] == pytest.approx(1500, abs=0.01)
    assert metrics["eval/rating_low"] < 1500 < metrics["eval/rating_high"]
    assert "eval/rating" not in example().metrics()


@pytest.mark.parametrize("columns", ["40", "200"])
def test_a_printed_table_shows_every_figure_whole(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    Table(
        "t", ("task", "95% interval", "rating"), (("puzzles", "0.264-0.332", "–"), ("math_500", "0.8-0.9", "–"))
    ).print()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[-2:]] == [["puzzles", "0.264-0.332"], ["math_500", "0.8-0.9"]]
    assert "rating" not in "".join(lines)
