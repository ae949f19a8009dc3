"""Composition: weights, statuses, parts by config, other accuracies, length and repetition."""

from __future__ import annotations

import time

import pytest

from r1mega.config.rewards import (
    AccuracyReward,
    FormatReward,
    LanguageReward,
    OverlongReward,
    RepetitionReward,
    RewardConfig,
)
from r1mega.errors import DataError, RewardError
from r1mega.reward.compose import RewardScorer, compose
from r1mega.reward.length import LengthShaping, Overlong, Repetition
from r1mega.reward.parts import PartScore, ScoringItem
from r1mega.reward.reflection import reflects
from r1mega.types import Prompt, Response, RewardStatus

pytestmark = pytest.mark.heavy

RIGHT = "<think>Two and two make four, and that is the sum.</think><answer>4</answer>"


def prompt(kind: str = "math", answers: tuple[str, ...] = ("4",), **metadata) -> Prompt:
    return Prompt("p0", "What is the sum of two and two?", answers, kind, "en", (1, 2), metadata)


def response(num_tokens: int = 10, tokens: tuple[int, ...] | None = None) -> Response:
    tokens = tuple(range(num_tokens)) if tokens is None else tokens
    return Response(tokens, (0.0,) * len(tokens), "stop")


SHARED: list[RewardScorer] = []


@pytest.fixture(scope="module", autouse=True)
def shared_scorer():
    """One worker for the whole file: it imports the libraries once. The limits are generous, for busy machines."""
    config = RewardConfig(accuracy=AccuracyReward(timeout_seconds=60.0))
    with RewardScorer(config, max_response_tokens=100) as scorer:
        SHARED.append(scorer)
        yield
        SHARED.clear()


def score(text: str, config: RewardConfig | None = None, prompt_: Prompt | None = None, num_tokens: int = 10):
    scorer = RewardScorer(config, max_response_tokens=100) if config else SHARED[0]
    return scorer.result(scorer.submit(prompt_ or prompt(), response(num_tokens), text))


def test_value_is_the_weighted_sum_of_the_parts():
    config = RewardConfig(
        accuracy=AccuracyReward(weight=2.0),
        format=FormatReward(weight=0.25),
        language=LanguageReward(weight=0.5),
        overlong=OverlongReward(weight=1.0, buffer_tokens=20),
        repetition=RepetitionReward(weight=1.0, ngram=2),
    )
    reward = score(RIGHT, config, num_tokens=90)
    assert dict(reward.parts) == {"accuracy": 1.0, "format": 1.0, "language": 1.0, "overlong": -0.5, "repetition": 0.0}
    assert reward.value == pytest.approx(2.0 + 0.25 + 0.5 - 0.5)
    assert reward.status == RewardStatus.OK
    assert all(name in reward.reason for name in reward.parts)


def test_parts_without_weight_are_not_computed():
    assert set(score(RIGHT).parts) == {"accuracy", "format"}
    assert score("<think>x</think><answer>5</answer>").parts == {"accuracy": 0.0, "format": 1.0}
    assert score("no tags, but \\boxed{4}").parts == {"accuracy": 1.0, "format": 0.0}
    assert score("4").parts == {"accuracy": 0.0, "format": 0.0}


def test_a_failed_part_leaves_no_value():
    reward = compose(
        {"accuracy": PartScore(None, "the worker died", RewardStatus.FAILED), "format": PartScore(1.0, "well formed")},
        {"accuracy": 1.0, "format": 0.1},
    )
    assert reward.value is None and reward.status == RewardStatus.FAILED
    assert reward.parts == {"format": 1.0} and "accuracy: the worker died" in reward.reason


def test_unjudged_is_not_zero():
    reward = compose({"judge": PartScore(None, "no verdict", RewardStatus.UNJUDGED)}, {"judge": 1.0})
    assert (reward.value, reward.status) == (None, RewardStatus.UNJUDGED)


def test_results_come_in_the_order_of_the_tickets_while_a_worker_is_busy():
    with RewardScorer(RewardConfig(), max_response_tokens=100) as scorer:
        texts = ["\\boxed{\\exp\\{\\ln 4\\}}", "\\boxed{4}", "\\boxed{\\exp\\{\\ln 5\\}}", "\\boxed{5}"]
        tickets = [scorer.submit(prompt(), response(), text) for text in texts]
        assert [scorer.result(ticket).parts["accuracy"] for ticket in tickets] == [1.0, 1.0, 0.0, 0.0]
        assert scorer.metrics().submitted == 2  # plain answers never see a worker


def test_plain_answers_cost_a_few_milliseconds_a_step():
    with RewardScorer(RewardConfig(), max_response_tokens=100) as scorer:
        texts = [f"<think>so it is {n}</think><answer>{n}</answer>" for n in range(256)]
        seconds = []
        for _ in range(5):
            start = time.process_time()
            rewards = [scorer.result(scorer.submit(prompt(), response(), text)) for text in texts]
            seconds.append(time.process_time() - start)
        assert min(seconds) < 0.05
        assert sum(reward.parts["accuracy"] for reward in rewards) == 1.0
        assert scorer.metrics().submitted == 0


def test_unknown_kind_is_an_error():
    with pytest.raises(RewardError, match="p0.*'poetry'.*math"):
        score(RIGHT, prompt_=prompt("poetry"))


@pytest.mark.parametrize(
    ("gold", "text", "value"),
    [
        ("B", "<answer>B</answer>", 1.0),
        ("B", "<answer>(b)</answer>", 1.0),
        ("B", "\\boxed{\\text{B}}", 1.0),
        ("B", "<answer>B. Paris</answer>", 1.0),
        ("B", "<answer>option B</answer>", 1.0),
        ("B", "<answer>The answer is B.</answer>", 1.0),
        ("(B)", "<answer>B</answer>", 1.0),
        ("B", "<answer>C</answer>", 0.0),
        ("B", "<answer>A or B</answer>", 0.0),
        ("B", "<answer>B or C</answer>", 0.0),
        ("B", "<answer>(A) (B)</answer>", 0.0),
        ("B", "<answer>B. (C)</answer>", 0.0),
        ("B", "<answer></answer>", 0.0),
        ("B", "B", 0.0),
        ("knight", "<answer>Knight</answer>", 1.0),
        ("knight", "<answer>knave</answer>", 0.0),
        ("knight", "<answer>knight, knave</answer>", 0.0),
        ("B", "<answer>B. No, C.</answer>", 0.0),
        ("-3", "<answer>3</answer>", 0.0),
        ("3.5", "<answer>35</answer>", 0.0),
        ("I, II", "<answer>III</answer>", 0.0),
        ("red, blue", "<answer>Red and blue</answer>", 1.0),
        ("red, blue", "<answer>blue, red</answer>", 0.0),
    ],
)
def test_choice(gold, text, value):
    assert score(text, prompt_=prompt("choice", (gold,))).parts["accuracy"] == value


def reasoning_gym_prompt(task: str, index: int = 0) -> Prompt:
    import reasoning_gym

    entry = reasoning_gym.create_dataset(task, size=index + 1, seed=3)[index]
    return prompt("reasoning_gym", (), entry=entry)


@pytest.mark.parametrize(
    "task", ["chain_sum", "basic_arithmetic", "number_sorting", "spell_backward", "knights_knaves"]
)
def test_reasoning_gym_scores_by_the_tasks_own_scorer(task):
    pytest.importorskip("reasoning_gym")
    question = reasoning_gym_prompt(task)
    right = question.metadata["entry"]["answer"]
    assert score(f"<answer>{right}</answer>", prompt_=question).parts["accuracy"] == 1.0
    assert score("<answer>surely not this</answer>", prompt_=question).parts["accuracy"] == 0.0


def test_untrustworthy_scorers_are_blocked_by_name():
    pytest.importorskip("reasoning_gym")
    from r1mega.reward.choice import BLOCKED_SCORERS

    for task in BLOCKED_SCORERS:
        with pytest.raises(DataError, match=f"'{task}' is blocked"):
            score("<answer>a</answer>", prompt_=reasoning_gym_prompt(task))


def test_instructions():
    pytest.importorskip("if_verifiable")
    question = prompt(
        "instruction",
        (),
        instruction_id_list=[
            "punctuation:no_comma",
            "length_constraints:number_sentences",
            "change_case:capital_word_frequency",
        ],
        kwargs=[
            {},
            {"relation": "less than", "num_sentences": 3},
            {"capital_relation": "at least", "capital_frequency": 2},
        ],
    )
    good = "<think>no commas, they say</think><answer>I met Dr. Smith at NOON. It was GOOD.</answer>"
    assert score(good, prompt_=question).parts["accuracy"] == 1.0
    broken = score(good.replace("at NOON", "at NOON, really"), prompt_=question)
    assert broken.parts["accuracy"] == 0.0 and "punctuation:no_comma" in broken.reason
    assert score(good.replace("GOOD.", "GOOD. Bye. Now."), prompt_=question).parts["accuracy"] == 0.0
    assert score("<think>only thoughts</think>", prompt_=question).parts["accuracy"] == 0.0


@pytest.mark.parametrize(
    ("name", "arguments", "good", "bad"),
    [
        ("count:numbers", {"N": 2}, "I have 2 cats and 3 dogs.", "I have 2 cats."),
        ("format:no_whitespace", {}, "Nowhitespacehere", "white space"),
        ("count:unique_word_count", {"N": 4}, "all of these differ", "all all all all"),
        ("words:prime_lengths", {}, "we see seven", "we see good things"),
        ("count:conjunctions", {"small_n": 2}, "Now and then, but not often.", "Now and then and now."),
        ("words:alphabet", {}, "Apples become cider drinks.", "Apples taste great."),
        ("format:title_case", {}, "The Quick Fox Ran Home", "the quick fox ran home"),
    ],
)
def test_ifbench_instructions(name, arguments, good, bad):
    pytest.importorskip("if_verifiable")
    question = prompt("instruction", (), instruction_id_list=[name], kwargs=[arguments])
    for answer, value in ((good, 1.0), (bad, 0.0)):
        reward = score(f"<think>hm</think><answer>{answer}</answer>", prompt_=question)
        assert reward.parts.get("accuracy") == value, reward.reason


def test_instructions_that_want_missing_data_are_refused_by_name():
    nltk = pytest.importorskip("nltk")
    pytest.importorskip("if_verifiable")
    try:
        nltk.data.find("taggers/averaged_perceptron_tagger_eng")
        pytest.skip("the data is installed here")
    except LookupError:
        reward = score(RIGHT, prompt_=prompt("instruction", (), instruction_id_list=["words:start_verb"], kwargs=[{}]))
    assert reward.status == RewardStatus.FAILED and "averaged_perceptron_tagger_eng" in reward.reason


def test_checkers_that_raise_are_blocked_by_name():
    pytest.importorskip("if_verifiable")
    reward = score(RIGHT, prompt_=prompt("instruction", (), instruction_id_list=["format:quote_unquote"], kwargs=[{}]))
    assert reward.status == RewardStatus.FAILED and "'format:quote_unquote' is blocked" in reward.reason


def test_unknown_instruction_is_not_skipped():
    pytest.importorskip("if_verifiable")
    reward = score(RIGHT, prompt_=prompt("instruction", (), instruction_id_list=["no:such"], kwargs=[{}]))
    assert reward.status == RewardStatus.FAILED and "'no:such' is not known" in reward.reason


@pytest.mark.parametrize(("tokens", "value"), [(0, 0.0), (60, 0.0), (80, -0.5), (100, -1.0), (130, -1.0)])
def test_overlong(tokens, value):
    assert Overlong(100, 40).score(ScoringItem(prompt(), response(tokens), "")).value == pytest.approx(value)


@pytest.mark.parametrize(("tokens", "value"), [(0, 1.0), (20, 1.0), (60, 0.5), (100, 0.0), (200, 0.0)])
def test_length_shaping(tokens, value):
    assert LengthShaping(20, 100).score(ScoringItem(prompt(), response(tokens), "")).value == pytest.approx(value)


@pytest.mark.parametrize(
    ("tokens", "value"),
    [((1, 2, 3, 4, 5), 0.0), ((1, 2, 1, 2, 1, 2), -3 / 5), ((7,) * 11, -9 / 10), ((1,), 0.0), ((), 0.0)],
)
def test_repetition(tokens, value):
    assert Repetition(2).score(ScoringItem(prompt(), response(tokens=tokens), "")).value == pytest.approx(value)


def test_reflection_is_seen():
    for text in ("Wait, that is wrong.", "Let me check this again", "let me double-check", "等等，不对"):
        assert reflects(text)
    for text in ("We add two and two.", "The waiter brings a check for 5 dollars.", ""):
        assert not reflects(text)
