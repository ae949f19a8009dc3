"""Math answers: kinds of fault that people reported, and pairs whose label is known by construction."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from r1mega.reward import math as rewards
from tests.field.constructed import labelled_pairs

PAIRS = Path(__file__).parent / "math"
KINDS = {
    "tiny_values": ("huggingface/Math-Verify#14", "different tiny values are not equal"),
    "no_value": ("floats of a column written as text", "a gold that is no value has no right answer"),
    "unsolved": ("huggingface/Math-Verify#10", "an equation handed back is not its solution"),
    "named_values": ("of the project's own reading", "values of named unknowns keep the order of their names"),
    "percent": ("of the project's own reading", "a percent sign is of the whole quotient before it"),
    "mixed_numbers": ("huggingface/Math-Verify tests/test_mixed_number_extraction.py", "whole number, proper fraction"),
    "left_sides": ("huggingface/Math-Verify tests/test_numina_cases.py", "the quantity on the left of a gold"),
    "qualifiers": ("sieval#26", "a range or domain behind the answer"),
    "approximations": ("NVIDIA/NeMo-Skills tests/test_math_equal.py", "an exact value, then its decimal"),
    "several_boxes": ("huggingface/Math-Verify tests/test_open_thoughts.py", "one box an item"),
    "undone_arithmetic": ("X-R1#53", "arithmetic handed back; prm800k's grader wants an integer for an integer"),
    "ranges": ("huggingface/Math-Verify tests/test_numina_cases.py", "a range of f, a ring of |x|"),
    "hashes": ("volcengine/verl#7274", "GSM8K's own form, #### 42"),
    "groups": ("huggingface/Math-Verify tests/test_numina_cases.py", "groups of assignments are tuples"),
    "letter_and_value": ("AI-MO/NuminaMath golds of AMC", "a gold of letter and value"),
    "combinatorics": ("golds of Chinese and Indian sets", "C_{10}^{3}, {}^{10}C_3, A_5^2"),
    "renamed_parameters": ("golds with k \\in Z", "an integer parameter may be named otherwise"),
    "notations": ("sieval#26, volcengine/verl", "\\boxed5, residues without a name, {,} as a decimal comma"),
}
"""Kind (a file of tests/field/math) -> the public report it was modelled on, and what is asked."""


def decide(gold: str, prediction: str, **keys: int) -> bool | None:
    answer = rewards.answer_of(prediction, bare=True)
    return False if answer is None else rewards.decide((gold,), answer, **keys).equal


def load(kind: str) -> list[dict]:
    return [json.loads(line) for line in (PAIRS / f"{kind}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_every_file_names_its_report():
    assert {path.stem for path in PAIRS.glob("*.jsonl")} == KINDS.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_kind(kind):
    pairs = load(kind)
    assert {pair["label"] for pair in pairs} == {True, False}
    assert [p for p in pairs if decide(p["gold"], p["prediction"]) is not p["label"]] == []


@pytest.mark.parametrize(
    ("gold", "answer", "accepted_with"),
    [
        ("54", "54", 0), ("54", "53+1", 1), ("54", "6\\times 9", 1), ("(3,4)", "(2+1, 3+1)", 2), ("391", "17\\times 23", 2),
        ("54", "2\\cdot 3^3", 1), ("1024", "2^{10}", 0), ("120", "5!", 0), ("120", "\\binom{10}{3}", 0), ("15", "7+8=15", 0),
        ("1500", "1.5\\times 10^3", 0), ("\\frac{9}{4}", "2\\frac14", 0), ("x=15", "x=7+8", 1), ("7+8", "15", 0),
        ("48480", "(55-15)\\times 1212", 4), ("45 minutes", "\\frac34 hour", 0), ("\\frac{\\pi}{3}", "60^\\circ", 0),
    ],
)  # fmt: skip
def test_how_much_arithmetic_may_be_left_is_a_key(gold, answer, accepted_with):
    accepted = [most for most in range(6) if decide(gold, f"\\boxed{{{answer}}}", max_work=most)]
    assert accepted == list(range(accepted_with, 6))


def test_pairs_that_are_equal_by_algebra_and_unequal_by_one_change():
    wrong: list[dict] = []
    start = time.process_time()
    for pair in labelled_pairs(20_000, seed=20_250_122):
        if decide(pair["gold"], pair["prediction"]) is not pair["label"]:
            wrong.append(pair)
    assert wrong == []
    assert time.process_time() - start < 60
