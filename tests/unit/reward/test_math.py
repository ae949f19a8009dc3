"""Math answers: hand-labelled pairs, the development pairs where they are at hand, and properties against exact
arithmetic.
"""

from __future__ import annotations

import io
import json
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1mega.data.language import language_share, mixes_languages
from r1mega.errors import DataError
from r1mega.reward import math as rewards
from r1mega.reward.extract import final_answer, last_boxed
from r1mega.reward.format import check_format
from tests.machine import shared_data

TESTS = Path(__file__).parents[2]


def load(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def decide(gold: str, prediction: str) -> bool | None:
    answer = rewards.answer_of(prediction, bare=True)
    return False if answer is None else rewards.decide((gold,), answer).equal


@pytest.mark.parametrize("label", [True, False])
def test_labelled_pairs(label):
    wrong = [
        p
        for p in load(TESTS / "data" / "answer_pairs.jsonl")
        if p["label"] is label and decide(p["gold"], p["prediction"]) is not label
    ]
    assert not wrong


def test_development_pairs_are_graded_without_a_false_positive():
    pairs = load(shared_data("verifier_dev.jsonl"))
    start = time.process_time()
    verdicts = [decide(pair["gold"], pair["prediction"]) for pair in pairs]
    seconds = time.process_time() - start
    false_positives = [p for p, v in zip(pairs, verdicts, strict=True) if v and not p["label"]]
    missed = [p for p, v in zip(pairs, verdicts, strict=True) if not v and p["label"]]
    assert not false_positives
    assert len(missed) <= 0.003 * sum(pair["label"] for pair in pairs), missed
    assert len(pairs) / seconds >= 1500


rationals = st.fractions(max_denominator=999).filter(lambda f: abs(f) < 10**6)


@given(rationals, rationals)
@settings(max_examples=100, deadline=None)
def test_fractions_agree_with_exact_arithmetic(a, b):
    written = f"\\frac{{{b.numerator}}}{{{b.denominator}}}"
    assert decide(str(a), written) is (a == b)
    assert decide(f"\\frac{{{3 * b.numerator}}}{{{3 * b.denominator}}}", written) is True


@given(st.integers(-(10**12), 10**12), st.integers(-5, 5))
@settings(max_examples=100, deadline=None)
def test_integers_are_compared_exactly(number, difference):
    assert decide(str(number), f"{number + difference:,}") is (difference == 0)
    assert decide(f"{number}.0", f"{number + difference}") is (difference == 0)


@given(st.lists(st.integers(-50, 50), min_size=2, max_size=5, unique=True), st.randoms())
@settings(max_examples=100, deadline=None)
def test_order_counts_in_tuples_only(values, rng):
    shuffled = list(values)
    rng.shuffle(shuffled)
    text, other = ", ".join(map(str, values)), ", ".join(map(str, shuffled))
    assert decide(text, other) is True
    assert decide(f"\\{{{text}\\}}", f"\\{{{other}\\}}") is True
    assert decide(f"({text})", f"({other})") is (values == shuffled)
    assert decide(text, ", ".join(map(str, values[:-1]))) is False
    assert decide(text, f"{other}, 99") is False


@given(st.lists(st.integers(-9, 9), min_size=3, max_size=5), st.lists(st.integers(-9, 9), min_size=3, max_size=5))
@settings(max_examples=60, deadline=None)
def test_polynomials_against_their_coefficients(a, b):
    def written(coefficients, reverse):
        terms = [f"{c} x^{{{power}}}" for power, c in enumerate(coefficients)]
        return " + ".join(reversed(terms) if reverse else terms).replace("+ -", "- ")

    def stripped(coefficients):
        return tuple(coefficients[: max((i + 1 for i, c in enumerate(coefficients) if c), default=0)])

    assert decide(written(a, False), written(b, True)) is (stripped(a) == stripped(b))


@given(st.text(max_size=60))
@settings(max_examples=150, deadline=None)
def test_any_text_is_decided_and_never_taken_for_a_gold(text):
    assert decide("8675309", text) in (False, None) or "8675309" in text


@given(st.text(alphabet="0123456789+-*/^(){}[]\\frac sqrtx,.=<>|%!_$&", max_size=80))
@settings(max_examples=250, deadline=None)
def test_any_formula_is_decided_in_time(text):
    start = time.process_time()
    decide("\\frac{1}{2} + x", text)
    assert time.process_time() - start < 1.0


@pytest.mark.parametrize(
    "text",
    [
        "9" * 5000,
        "(" * 3000 + "1" + ")" * 3000,
        "{" * 300 + "}" * 300,
        "9^{9^{9^9}}",
        "10^{10^{10}}",
        "99999!",
        "\\sqrt" * 500 + "2",
        "1,2," * 5000,
        "x^{99999}^{99999}",
        "-" * 1500 + "1",
        "\\frac" * 400,
        "|" * 999,
        "1e999999",
        "\\binom{99999}{5000}",
        "1" + " " * 1900 + "base 2 x",
        "^" + "$ " * 900 + "\\circ C x",
        "^" + "\\quad" * 300 + "base x",
        "^" + " \u200b" * 900 + "\\circ x",
        "2!" + "!" * 200,
        "\\{:5\\}",
        "AB_{10}",
        "\\text{1E99999999}_{10}",
    ],
)
def test_hostile_answers_end_at_once_and_score_nothing(text):
    start = time.process_time()
    assert not decide("5", text)
    assert time.process_time() - start < 1.0


@pytest.mark.parametrize(
    "unit",
    [
        "a",
        "\\boxed{",
        "\\[",
        "<think",
        "<answer>",
        "</answer>",
        "< ",
        "$",
        "`",
        "(",
        "1",
        "1,",
        "a ",
        "x_",
        "f(",
        "\u662f",
        "!",
        "'",
        "1a",
        "\\begin{a}",
    ],
)
def test_degenerate_responses_cost_linear_time(unit):
    """A policy that collapses repeats itself for 150,000 characters; nothing that scores it may be quadratic."""
    text = "<think>" + unit * (150_000 // len(unit))
    start = time.process_time()
    rewards.answer_of(text)
    rewards.answer_of(text.removeprefix("<think>"))
    check_format(text, "graded")
    mixes_languages(text)
    language_share(text, "en")
    rewards.decide(("\\frac{1}{2}",), "1" + (unit * 2000)[:1900] + "!")
    assert time.process_time() - start < 6.0


def test_unpaired_surrogates_are_text_like_any_other():
    assert not decide("\\text{A5}", "\\text{\ud800}+1")
    count, results = stream(['{"gold": "\\\\text{a b}", "prediction": "\\\\text{\\ud800}x"}\n'])
    assert count == 1 and results[0]["value"] == 0.0


def test_bytes_that_are_no_text_are_named():
    source = io.TextIOWrapper(io.BytesIO(b'{"gold": "1", "prediction": "1"}\n{"gold": "\xff"}\n'), encoding="utf-8")
    with pytest.raises(DataError, match=r"pairs.jsonl:\d: not JSON"):
        rewards.score_stream(source, io.StringIO(), "pairs.jsonl")


def test_several_golds():
    assert rewards.decide(("7", "\\frac{1}{2}"), "0.5").equal
    assert not rewards.decide(("7", "\\frac{1}{2}"), "8").equal


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so \\boxed{\\frac{1}{2}} done", "\\frac{1}{2}"),
        ("\\boxed{1} and \\boxed{2}", "2"),
        ("\\boxed{1} and \\boxed{2", "1"),
        ("\\boxed{\\{1, \\{2\\}\\}}", "\\{1, \\{2\\}\\}"),
        ("\\fbox{3}", "3"),
        ("\\boxed 4.", "4"),
        ("\\boxedness{3}", None),
        ("no box", None),
    ],
)
def test_last_boxed(text, answer):
    assert last_boxed(text) == answer


@pytest.mark.parametrize(
    ("text", "form", "answer"),
    [
        ("<think>x</think><answer> 7 </answer>", "any", "7"),
        ("<think><answer>5</answer></think><answer>6</answer>", "tag", "6"),
        ("<think>\\boxed{5}</think> nothing", "any", None),
        ("<think>so far \\boxed{5}", "any", None),
        ("<think>\\boxed{5}</think> \\boxed{6}", "boxed", "6"),
        ("<answer>1</answer><answer>2</answer>", "any", "2"),
        ("<answer>1</answer><answer>2", "any", "1"),
        ("<answer>so \\boxed{3}</answer>", "any", "3"),
        ("\\boxed{3}", "tag", None),
        ("<answer>5", "any", None),
        ("<answer></answer>", "any", ""),
    ],
)
def test_final_answer(text, form, answer):
    assert final_answer(text, form) == answer


def stream(lines: list[str]) -> tuple[int, list[dict]]:
    sink = io.StringIO()
    count = rewards.score_stream(iter(lines), sink, "pairs.jsonl")
    return count, [json.loads(line) for line in sink.getvalue().splitlines()]


def test_stream_keeps_the_order_across_workers():
    pairs = [
        ("\\int_0^1 x dx", "\\frac{1}{2}"),
        ("5", "5"),
        ("5", "6"),
        ("\\sum_{k=1}^{10} k", "55"),
        ("\\sum_{k=1}^{10} k", "54"),
        ("2", "2"),
    ]
    count, results = stream([json.dumps({"gold": g, "prediction": p}) + "\n" for g, p in pairs])
    assert count == 6
    assert [r["value"] for r in results] == [1.0, 1.0, 0.0, 1.0, 0.0, 1.0]
    assert all(r["status"] == "ok" and r["reason"] for r in results)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "list"),
        ('{"gold": "1"}', "'prediction'"),
        ('{"prediction": "1"}', "'gold'"),
        ('{"gold": [], "prediction": "1"}', "'gold'"),
    ],
)
def test_a_malformed_line_is_named(line, message):
    with pytest.raises(DataError, match=f"pairs.jsonl:2: .*{message}"):
        stream(['{"gold": "1", "prediction": "1"}\n', line + "\n"])


def test_a_cpu_hungry_comparison_scores_zero_and_is_not_a_failure():
    """The limit is CPU time of the worker: the same on a busy machine."""
    from r1mega.reward.pool import Task, WorkerPool

    with WorkerPool(1) as pool:
        outcome = pool.submit(Task("r1mega.reward.symbolic:same_by_algebra", (["5"], "9^{9^{9^9}}", 0.3), 60.0)).result(
            timeout=120
        )
    assert outcome.failure is None
    assert outcome.value["equal"] is False and "0.3 s of CPU" in outcome.value["reason"]


def test_worked_out_fraction_of_time_is_small_for_plain_answers():
    start = time.process_time()
    for number in range(256):
        assert rewards.decide((str(number),), f" {number} ").equal
    assert time.process_time() - start < 0.05


def test_numbers_equal_fractions_from_the_reference():
    assert Fraction("0.125") == Fraction(1, 8) and decide("0.125", "1/8")
