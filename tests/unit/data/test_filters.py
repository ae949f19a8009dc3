"""Each filter takes what it is for and nothing else; the funnel's counts add up."""

import dataclasses

import pytest

from r1mega.config.data_factory import FilterConfig
from r1mega.data.filters import Candidate, apply_filters, build_filters, longest_paragraph, repeated_share

GOOD = Candidate(
    "p/0", "p", "What is 2 + 3?", "<think>First I take two. Then I add three, which gives five.</think>\n<answer>5</answer>",
    "math", "en", "r1_zero", "test", tokens=30, parts={"accuracy": 1.0, "format": 1.0},
)  # fmt: skip
CONFIG = FilterConfig(
    max_tokens=40,
    min_tokens=10,
    min_language_share=0.9,
    max_paragraph_chars=60,
    repetition_ngram=3,
    max_repeated_share=0.1,
)


def response(reasoning):
    return f"<think>{reasoning}</think>\n<answer>5</answer>"


BAD = {
    "unscored": {"scored": False},
    "truncated": {"truncated": True},
    "low accuracy": {"parts": {"accuracy": 0.0, "format": 1.0}},
    "low format": {"parts": {"accuracy": 1.0, "format": 0.5}},
    "length": {"tokens": 41},
    "unreadable": {"response": response("two \ufffd three gives five")},
    "mixed language": {"response": response("First I take two. 然后 加 三 得 五.")},
    "other language": {"response": response("Zuerst nehme ich zwei und dann addiere ich noch drei dazu.")},
    "long paragraph": {"response": response("I add two and three and then one more thing to be quite sure of it.")},
    "code block": {"response": response("I run\n```python\nprint(2 + 3)\n```\nand see five.")},
    "repetition": {"response": response("It is five. It is five. It is five. It is five.")},
}


@pytest.mark.parametrize("name", BAD)
def test_a_filter_takes_its_case_and_counts_it(name):
    candidates = [GOOD, dataclasses.replace(GOOD, id="p/1", **BAD[name]), dataclasses.replace(GOOD, id="p/2")]
    kept, counts = apply_filters(candidates, build_filters(CONFIG))
    assert [c.id for c in kept] == ["p/0", "p/2"]
    assert {c.name: c.taken for c in counts if c.taken} == {name: 1}
    assert [c.name for c in counts] == list(BAD), "the order of the documentation"
    seen = 3
    for count in counts:
        assert count.seen == seen
        seen -= count.taken


@pytest.mark.parametrize(
    ("key", "value", "name"),
    [("truncated", False, "truncated"), ("unreadable", False, "unreadable"), ("mixed_language", False, "mixed language"),
     ("min_language_share", 0.0, "other language"), ("max_paragraph_chars", None, "long paragraph"), ("code_blocks", False, "code block")],
)  # fmt: skip
def test_what_is_switched_off_takes_nothing(key, value, name):
    assert name not in [n for n, _ in build_filters(CONFIG.model_copy(update={key: value}))]


def test_a_part_that_the_kind_does_not_have_is_not_asked_for():
    config = CONFIG.model_copy(update={"min_parts": {"accuracy": 1.0, "judge": 0.5}})
    candidates = [
        GOOD,
        dataclasses.replace(GOOD, id="j", parts={"judge": 0.2}),
        dataclasses.replace(GOOD, id="k", parts={"judge": 0.5}),
    ]
    kept, _ = apply_filters(candidates, build_filters(config))
    assert [c.id for c in kept] == ["p/0", "k"]


def test_code_and_paragraphs_of_the_answer_do_not_count():
    answer = "<think>I write it.</think>\n<answer>```python\n" + "x = 1; " * 50 + "```</answer>"
    kept, _ = apply_filters(
        [dataclasses.replace(GOOD, response=answer)],
        build_filters(CONFIG.model_copy(update={"max_repeated_share": 1.0})),
    )
    assert len(kept) == 1


def test_measures():
    assert longest_paragraph(response("a" * 7 + "\n\n" + "b" * 9 + "\n" + "c" * 5)) == 9
    assert repeated_share("a b c a b c", 3) == pytest.approx(1 / 4)  # abc bca cab abc
    assert repeated_share("a b", 3) == 0.0
