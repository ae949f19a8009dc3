"""Rows, summaries, files and tables of an evaluation."""

import pytest

from r1mega.errors import DataError
from r1mega.evaluate.result import (
    EvaluationResult,
    compare_results,
    evaluation_row,
    format_table,
    merge_results,
    read_result,
    write_result,
)
from r1mega.observe.registry import find_metric
from r1mega.types import Prompt, Response, Reward, RewardStatus, RolloutGroup


def answer(text):
    return f"<think> well </think> <answer> {text} </answer>"


def group(name, texts, values, golds=("1/2",), kind="math"):
    """values: accuracy of each sample; None: the reward failed."""
    prompt = Prompt(name, f"{name}?", golds, kind, None, (1,))
    responses = [Response((7,) * (i + 1), (0.0,) * (i + 1), "length" if i == 0 else "stop") for i in range(len(texts))]
    failed = Reward(None, {}, RewardStatus.FAILED)
    rewards = [failed if v is None else Reward(v, {"accuracy": v, "format": 1.0}, RewardStatus.OK) for v in values]
    return RolloutGroup(prompt, tuple(responses), tuple(texts), tuple(rewards), -1)


def test_row_groups_equal_answers():
    """0.5 and 1/2 are one answer and win 2 : 1 : 1 although no text occurs twice."""
    texts = [answer("3"), answer("0.5"), "no answer", answer("1/2"), answer("4")]
    row = evaluation_row(group("a", texts, [0, 1, 0, 1, 0]))
    assert row.answers == ("3", "0.5", None, "1/2", "4")
    assert (row.consensus, row.consensus_correct) == ("0.5", True)
    assert row.correct == (False, True, False, True, False)
    assert row.truncated == (True, False, False, False, False) and row.lengths == (1, 2, 3, 4, 5)


def test_consensus_without_answers_or_golds():
    assert evaluation_row(group("a", ["x", "y"], [0, 0])).consensus_correct is False
    row = evaluation_row(group("a", ["def f(): ..."], [1], golds=(), kind="code"))
    assert row.consensus_correct is None and row.correct == (True,)


def test_partial_accuracy_is_not_correct():
    assert evaluation_row(group("a", [answer("1")], [0.99])).correct == (False,)


def example():
    rows = (
        evaluation_row(group("a", [answer("1/2"), answer("3"), answer("3")], [1, 0, 0])),
        evaluation_row(group("b", [answer("1/2"), answer("0.5"), answer("3")], [1, 1, None])),
        evaluation_row(group("c", [answer("3"), answer("3"), answer("3")], [None, None, None])),
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
    single = EvaluationResult((evaluation_row(group("a", [answer("1/2")], [1])),), 1, 0.1)
    assert "cons@" not in format_table(single)


def test_compare_pairs_by_prompt():
    first = EvaluationResult(tuple(evaluation_row(group(n, [answer("1")], [n == "a"])) for n in "abcdefgh"), 1, 0)
    second = EvaluationResult(tuple(evaluation_row(group(n, [answer("1")], [n != "x"])) for n in "xhgfedcba"), 1, 0)
    comparison = compare_results(first, second)
    assert comparison.num_prompts == 8
    assert comparison.difference.value == pytest.approx(7 / 8) and comparison.difference.low > 0.5
    assert (comparison.test.only_first, comparison.test.only_second) == (0, 7)
    assert comparison.test.p_value == pytest.approx(2 / 2**7)
    other = EvaluationResult((evaluation_row(group("z", [answer("1")], [1])),), 1, 0)
    with pytest.raises(DataError, match="share no prompt"):
        compare_results(first, other)
