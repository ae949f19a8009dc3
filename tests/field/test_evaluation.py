"""Evaluation as people do it: choices in their spellings, instructions with what they are given."""

import json

import pytest

from r1mega.errors import DataError, RewardError
from r1mega.evaluate.forms import FormOptions
from r1mega.evaluate.tasks import TASKS, load_task
from r1mega.reward.choice import same_choice
from r1mega.reward.extract import final_answer
from r1mega.reward.instruction import InstructionAccuracy, check_line, follows
from r1mega.reward.parts import Deferred, ScoringItem
from r1mega.reward.pool import Outcome
from r1mega.types import Prompt, Response, RewardStatus

# -------------------------------------------------------- spellings of a choice: NeMo-Gym#1844

SPELLINGS = (
    r"\mathbf{B}", "Option (B): Paris", "B、巴黎", "B", "b", "(B)", "[B]", "{B}", "<B>", '"B"', "“B”", "【B】", "（B）", "Ｂ", "Ⓑ",
    r"\textbf{B}", r"\text{(B)}", r"\mathrm{B}", r"\boldsymbol{B}", r"$\mathbf{(B)}$", r"\(B\)", r"\left(B\right)",
    r"\textbf{(B) }Paris", r"\mathbf{(B)}\ 12", r"\text{B. Paris}", r"\text{\textbf{B}}", "**B**", "**(B)** Paris", "`B`", "*B*",
    "B.", "B:", "B)", "B。", "B. Paris", "B: Paris", "B) Paris", "(B) Paris", "[B] Paris", "B - Paris", "B – Paris", "B\nParis",
    "B，巴黎", "B：巴黎", "B．巴黎", "option B", "Option B.", "Choice (B)", "choice B: Paris", "Answer: B", "The answer is B",
    "The correct option is (B)", "The correct answer is option B", "B is correct", "(B) is the right answer", "选B", "选择B",
    "答案：B", "答案是B", "正确答案为（B）", "选项B", "B是正确的", "B. B", "Option **B**", "B; Paris",
    r"\textcolor{blue}{B}", r"\color{red}{B}", r"{\color{red}B}", r"\Large B", r"\mathbb{B}", "B选项", "B 选项", "B项", "B 巴黎", "⟨B⟩",
    r"\langle B\rangle", "《B》", "B. Paris (option B)",
)  # fmt: skip
OTHERS = (
    "A", r"\mathbf{A}", "Option (A): Paris", "A、巴黎", "B、C", "B, C", "B,C", "B; C", "B: A", "A or B", "B or C", "B and D", "(B) or (C)",
    "B. No, C.", "b, c", "B/C", "BC", "B Paris", "Bonn", r"\mathbf{BC}", "Option (B), (C)", "B、C、D", "not B", "B is not correct",
    "B - D", "B\nC", "Both B and C", "A. B", "选B和C", "答案不是B", "", "B or not", r"\mathbf{B}, \mathbf{C}",
    "Option (B): Paris; option D", "B: Paris, or is it choice (C)", "B 和C", "B 或 C", "B 不对", "B 错误", "B 巴黎，C 伦敦", r"\Large A",
)  # fmt: skip


@pytest.mark.parametrize("text", SPELLINGS)
def test_a_choice_is_read_however_it_is_spelled(text):
    assert same_choice("B", text) and not same_choice("C", text) and not same_choice("E", text)
    assert same_choice("B", final_answer(f"<answer>{text}</answer>"))
    assert same_choice("(B)", text) and same_choice("b", text) and same_choice(r"\text{B}", text)


@pytest.mark.parametrize("text", OTHERS)
def test_another_choice_or_a_second_one_is_refused(text):
    assert not same_choice("B", text)


@pytest.mark.parametrize(
    ("gold", "text", "same"),
    [
        ("Paris", "paris.", True), ("Paris", r"\text{Paris}", True), ("Paris", "London", False), ("knight", "Knight", True),
        ("A: knight, B: knave", "A: knight, B: knave", True), ("A: knight, B: knave", "A", False),
        ("B. Paris", "B", True), ("B. Paris", "(B)", True), ("B. Paris", "Paris", True), ("B. Paris", "B) Paris", True),
        ("B. Paris", "C", False), ("B. Paris", "London", False), ("B. Paris", "B. London", False), ("(B) Paris", "b", True),
        ("B. Paris", "C. Paris", False), ("B. Paris", "B or C", False), ("A: knight", "A", False),
        ("x²", "x2", False), ("A man", "A", False), ("A", "A man", False), ("yes", "Yes!", True),
    ],
)  # fmt: skip
def test_answers_in_words_are_compared_as_words(gold, text, same):
    assert same_choice(gold, text) is same


# ------------------------------------------------------- verdicts that change from run to run: olmo-eval#320

LETTERS = "eeeeeeee aaaaaaaa tttttttt oooooooo iiiiiiii nnnnnnnn ssssssss"


@pytest.mark.parametrize(
    ("letter", "text", "verdict"),
    [("!", LETTERS, False), ("!", "!!!! !!", True), ("#", "#" * 5 + LETTERS, False), ("#", "# " * 6, True), (" ", LETTERS, True),
     ("é", "é" * 6, True), ("É", "é" * 6, True), ("E", LETTERS, True), ("z", LETTERS, False), ("7", "7" * 6, True)],
)  # fmt: skip
def test_any_character_is_counted_as_it_is(letter, text, verdict):
    arguments = {"letter": letter, "let_frequency": 6, "let_relation": "at least"}
    assert {follows(["keywords:letter_frequency"], [arguments], "p", text)[0][1] for _ in range(20)} == {verdict}


INCOMPLETE = [
    ("keywords:letter_frequency", {"let_frequency": 6, "let_relation": "at least"}),
    ("keywords:letter_frequency", {"letter": "ab", "let_frequency": 6, "let_relation": "at least"}),
    ("keywords:letter_frequency", {"letter": "!", "let_frequency": -1, "let_relation": "at least"}),
    ("keywords:frequency", {"keyword": "rain"}),
    ("keywords:existence", {}),
    ("length_constraints:number_words", {"num_words": 10}),
    ("length_constraints:number_words", {"relation": "at least"}),
    ("length_constraints:number_paragraphs", {}),
    ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 2, "nth_paragraph": 3, "first_word": "a"}),
    ("language:response_language", {}),
    ("startend:end_checker", {}),
    ("count:numbers", {}),
    ("startend:end_checker", {"end_phrase": 5}),
    ("keywords:existence", {"keywords": [1, 2]}),
    ("keywords:existence", {"keywords": "word"}),
    ("keywords:forbidden_words", {"forbidden_words": ["word", 3]}),
    ("detectable_content:postscript", {"postscript_marker": 7}),
    ("length_constraints:number_words", {"num_words": "10", "relation": "at least"}),
    ("no:such", {}),
    ("punctuation:no_comma", {"letter": "a"}),
]


@pytest.mark.parametrize(("name", "arguments"), INCOMPLETE)
def test_what_would_be_left_to_chance_is_refused(name, arguments):
    with pytest.raises((RewardError, TypeError, AttributeError)):
        follows([name], [arguments], "p", LETTERS)
    with pytest.raises(DataError, match=f"x.jsonl:3: instruction '{name}'"):
        check_line({"instruction_id_list": [name], "kwargs": [arguments]}, "x.jsonl:3")


def test_a_span_that_begins_at_0_is_that_span():
    arguments = {"prompt_to_repeat": "one two three four", "n_start": 0, "n_end": 2}
    for text, verdict in (("one two", True), ("two three", False)):
        assert {follows(["repeat:repeat_span"], [arguments], "p", text)[0][1] for _ in range(9)} == {verdict}


# -------------------------------------------------------------------------------------- arguments that are null


def item(**metadata):
    prompt = Prompt("p0", "question", (), "instruction", None, (1,), metadata)
    return ScoringItem(prompt, Response((1,), (0.0,), "stop"), "A plain answer.")


@pytest.mark.parametrize(
    "arguments", [[None], None, [{}], [{"letter": None, "num_words": None}], [{"let": float("nan")}]]
)
def test_null_is_no_arguments(arguments):
    metadata = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": arguments}
    check_line(metadata, "x.jsonl:1")
    deferred = InstructionAccuracy().score(item(**metadata))
    assert isinstance(deferred, Deferred) and follows(*deferred.task.arguments) == [("punctuation:no_comma", True)]


@pytest.mark.parametrize("arguments", [{"kwargs": None}, {}, {"kwargs": [None]}])
def test_the_published_form_takes_null_as_well(tmp_path, arguments):
    row = {"key": 1, "prompt": "p", "instruction_id_list": ["punctuation:no_comma"]} | arguments
    (tmp_path / "x.jsonl").write_text(json.dumps(row))
    (record,) = load_task(TASKS["ifeval"], tmp_path / "x.jsonl", FormOptions())
    check_line(record.metadata, "x")


def test_whole_numbers_that_came_as_floats_are_whole_numbers():
    metadata = {
        "instruction_id_list": ["length_constraints:number_paragraphs"],
        "kwargs": [{"num_paragraphs": 1.0, "x": None}],
    }
    check_line(metadata, "x.jsonl:1")
    assert InstructionAccuracy().score(item(**metadata)).task.arguments[1] == [{"num_paragraphs": 1}]


@pytest.mark.parametrize("arguments", [[7], ["{}"], [[]], [{}, {}], "{}", {}])
def test_what_is_no_object_is_refused(arguments):
    with pytest.raises(DataError, match="x.jsonl:1: "):
        check_line({"instruction_id_list": ["punctuation:no_comma"], "kwargs": arguments}, "x.jsonl:1")


# ------------------------------------------------------ instructions that occur twice: tinker-cookbook#893


@pytest.mark.parametrize(
    ("verdicts", "value", "reason"),
    [
        ([("a", False), ("a", True)], 0.0, "not followed: a"),
        ([("a", True), ("a", False)], 0.0, "not followed: a"),
        ([("a", False), ("a", False)], 0.0, "not followed: a"),
        ([("a", False), ("b", True), ("a", True), ("b", False)], 0.0, "not followed: a, b"),
        ([("a", True), ("a", True)], 1.0, "all instructions followed"),
    ],
)
def test_the_reason_is_of_every_occurrence(verdicts, value, reason):
    score = InstructionAccuracy()._finish(Outcome(verdicts))
    assert (score.value, score.reason, score.status) == (value, reason, RewardStatus.OK)
    share = InstructionAccuracy(partial_credit=True)._finish(Outcome(verdicts)).value
    assert share == sum(passed for _, passed in verdicts) / len(verdicts)
