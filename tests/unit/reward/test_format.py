"""Format reward: the paper's form and the tricks against it."""

import pytest

from r1mega.reward.format import check_format

GOOD = "<think>two and two</think><answer>4</answer>"


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        "<think>\na\n</think>\n\n<answer>\n4\n</answer>\n",
        "<think>a < b</think> <answer>1 > 0</answer>",
        "<think>a</think><answer>∅</answer>",
    ],
)
def test_well_formed(text):
    for mode in ("strict", "graded"):
        assert check_format(text, mode).value == 1.0
        assert check_format(text, mode).problems == ()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "<think> is missing"),
        ("4", "<answer> is missing"),
        ("<answer>4</answer>", "<think> is missing"),
        ("<think>a</think>4", "<answer> is missing"),
        ("<think>a</think><answer>4", "</answer> is missing"),
        ("<think>a<answer>4</answer></think>", "out of order"),
        ("<answer>4</answer><think>a</think>", "out of order"),
        ("<think>a</think><answer>4</answer><answer>5</answer>", "<answer> occurs 2 times"),
        ("<think>a<think>b</think></think><answer>4</answer>", "<think> occurs 2 times"),
        ("<think>a</think><answer><think></answer>", "<think> occurs 2 times"),
        ("<think></think><answer>4</answer>", "reasoning is empty"),
        ("<think> \n.\u200b</think><answer>4</answer>", "reasoning is empty"),
        ("<think>a</think><answer> </answer>", "answer is empty"),
        ("<think>\u3164\u115f</think><answer>4</answer>", "reasoning is empty"),
        ("Sure! <think>a</think><answer>4</answer>", "text before <think>"),
        ("<think>a</think>so<answer>4</answer>", "text between"),
        ("<think>a</think><answer>4</answer> bye", "text after </answer>"),
        ("<think>a</think><answer>4</answer><ANSWER>5</ANSWER>", "another spelling"),
        ("<think>a < /think ></think><answer>4</answer>", "another spelling"),
        ("<think>a</think><answer>＜answer＞4</answer>", "another spelling"),
        ("<think>a<th\u200bink></think><answer>4</answer>", "another spelling"),
        ("<think>a</think><answer x='1'>4</answer>", "<answer> is missing"),
    ],
)
def test_tricks_score_nothing_strictly_and_less_when_graded(text, problem):
    strict = check_format(text)
    assert strict.value == 0.0
    assert any(problem in found for found in strict.problems), strict.problems
    assert check_format(text, "graded").value <= 0.5


def test_graded_rises_with_each_tag():
    texts = [
        "4",
        "<think>a",
        "<think>a</think>",
        "<think>a</think><answer>4",
        "x<think>a</think><answer>4</answer>",
        GOOD,
    ]
    values = [check_format(text, "graded").value for text in texts]
    assert values == [0.0, 0.125, 0.25, 0.375, 0.5, 1.0]


def test_prompt_that_opens_the_reasoning():
    rest = GOOD.removeprefix("<think>")
    assert check_format(rest, prompt_opens_think=True).value == 1.0
    assert check_format(GOOD, prompt_opens_think=True).value == 0.0
    assert check_format(rest).value == 0.0
    assert check_format("a", "graded", prompt_opens_think=True).value == 0.0
