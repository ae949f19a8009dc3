"""Published files become prompts: own samples in the published forms, against what a person reads in them."""

import base64
import json
import pickle
import zlib
from collections import Counter
from pathlib import Path
from typing import get_args

import pytest

from r1mega.config.rewards import ACCURACY
from r1mega.config.stages.evaluate import Form
from r1mega.data.rows import Row, read_rows
from r1mega.errors import DataError
from r1mega.evaluate.forms import FormOptions
from r1mega.evaluate.tasks import TASKS, load_task
from tests.machine import shared_data

SAMPLES = Path("tests/data/evaluate")


def load(name, file, **options):
    number = options.pop("num_prompts", None)
    return load_task(TASKS[name], SAMPLES / file, FormOptions(**options), number)


def test_the_configs_names_are_the_tasks():
    assert set(get_args(Form)) == set(TASKS)
    for task in TASKS.values():  # the recipe's sampling
        assert (task.temperature, task.top_p, task.max_tokens) == (0.6, 0.95, 32768) and 1 <= task.num_samples <= 64


def test_math_forms():
    first, second = load("gsm8k", "gsm8k.jsonl")
    assert first.answers == ("1234",) and second.answers == ("3",) and first.kind == "math"
    assert first.question.startswith("A shelf holds 1,200 books.") and first.question.endswith("within \\boxed{}.")
    (problem,) = load("math500", "math500.jsonl")
    assert (problem.id, problem.answers) == ("test/own/1.json", ("\\frac{3}{4}",))
    assert [(r.id, r.answers) for r in load("aime24", "aime.jsonl")] == [("2099-I-1", ("9",)), ("7", ("8",))]


def test_mmlu_by_index_by_letter_and_as_the_original_csv():
    first, second = load("mmlu", "mmlu.jsonl")
    assert (first.answers, second.answers, first.kind) == (("B",), ("A",), "choice")
    assert "Which is a city?\n\nA) Seine\nB) Paris\nC) Alps\nD) Loire" in first.question
    assert (first.id, second.id) == ("own_geography/0", "own_geography/1")
    even, odd = load("mmlu", "mmlu_original.csv")
    assert (even.answers, odd.answers) == (("C",), ("D",)) and "\nC) 8, say\n" in even.question
    assert "Which, of these, is odd?" in odd.question


def test_gpqa_is_shuffled_by_seed_and_record_alone():
    rights = {"rec1": "a proton", "rec2": "water"}
    letters = Counter()
    for seed in range(200):
        for record in load("gpqa", "gpqa.csv", seed=seed):
            (letter,) = record.answers
            assert f"\n{letter}) {rights[record.id]}" in record.question
            assert all(f"\n{other}) " in record.question for other in "ABCD")
            letters[letter] += 1
    assert min(letters.values()) > 60, "the right answer stands in each place about as often"  # 100 expected, sd 8.7
    assert load("gpqa", "gpqa.csv", seed=5) == load("gpqa", "gpqa.csv", seed=5)
    assert load("gpqa", "gpqa.csv", seed=5, num_prompts=1) == load("gpqa", "gpqa.csv", seed=5)[:1]
    assert len({load("gpqa", "gpqa.csv", seed=seed)[0].question for seed in range(20)}) > 5


def test_code_forms():
    first, _ = load("humaneval", "humaneval.jsonl")
    assert first.kind == "code" and first.metadata["entry_point"] == "running_sum"
    assert "def running_sum" in first.question and "assert" not in first.question, "the tests are not shown"
    assert "canonical_solution" not in first.metadata
    first, second = load("mbpp", "mbpp.jsonl")
    assert "assert count_vowels('Alone') == 3" in first.question, "MBPP's tests are shown: they name the function"
    assert second.id == "9002" and second.metadata["test_imports"] == ["import math"]


def test_livecodebench_streams_functions_and_dates():
    stream, function = load("livecodebench", "livecodebench.jsonl")
    assert stream.metadata["tests"] == [{"input": "2 3\n", "output": "5\n"}, {"input": "-1 1\n", "output": "0\n"}]
    assert "standard input" in stream.question and "standard input" not in function.question
    assert function.metadata["entry_point"] == "scale" and "class Solution" in function.question
    assert function.metadata["tests"][0] == {"arguments": [[1, 2], 3], "expected": [3, 6]}
    early = load("livecodebench", "livecodebench.jsonl", since="2024-08-01", until="2025-01-31")
    assert [r.id for r in early] == ["own_a"]
    assert [r.id for r in load("livecodebench", "livecodebench.jsonl", since="2025-02-01")] == ["9901"]
    with pytest.raises(DataError, match="no row of task livecodebench is left"):
        load("livecodebench", "livecodebench.jsonl", since="2030-01-01")


class Evil:
    def __reduce__(self):
        return print, ("executed",)


def packed(value):
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


def test_livecodebench_packed_cases_and_no_code_in_them(tmp_path, capsys):
    row = json.loads((SAMPLES / "livecodebench.jsonl").read_text().splitlines()[0])
    path = tmp_path / "lcb.jsonl"
    path.write_text(json.dumps(row | {"private_test_cases": packed(row["private_test_cases"])}))
    unpacked = load_task(TASKS["livecodebench"], path, FormOptions())[0]
    assert unpacked.metadata == load("livecodebench", "livecodebench.jsonl")[0].metadata
    for bad in (packed(Evil()), packed([1, 2]), "nonsense", base64.b64encode(b"x").decode()):
        path.write_text(json.dumps(row | {"private_test_cases": bad}))
        with pytest.raises(DataError, match=r"lcb\.jsonl:1: 'private_test_cases' is neither JSON nor packed JSON"):
            load_task(TASKS["livecodebench"], path, FormOptions())
    assert "executed" not in capsys.readouterr().out


def test_codeforces_leaves_out_what_equality_does_not_judge(caplog):
    first, second = load("codeforces", "codeforces.jsonl")
    assert (first.id, second.id) == ("0/A", "0/E")
    assert (first.metadata["rating"], second.metadata["rating"]) == (800.0, 1400.0)
    assert first.metadata["time_limit"] == 2.0 and first.metadata["memory_limit_mb"] == 256.0
    assert "Example 1\nInput:\n1\nOutput:\n2" in first.question and "-8" not in first.question
    assert "3 rows" in caplog.text


def test_instructions_and_patches():
    (record,) = load("ifeval", "ifeval.jsonl")
    assert record.question == "Describe rain in lower case, without commas." and record.kind == "instruction"
    assert record.metadata["instruction_id_list"] == ["change_case:english_lowercase", "punctuation:no_comma"]
    plain, posed = load("swe_bench", "swe_bench.jsonl")
    assert plain.kind == "patch" and "Division by zero in ratio()." in plain.question and "abc123" in plain.question
    assert posed.question == "You will be given a code base and an issue. ..."


def test_every_kind_has_a_judge():
    """But for patches, which are judged elsewhere."""
    files = {
        "aime24": "aime.jsonl", "aime25": "aime.jsonl", "math": "math500.jsonl", "gpqa": "gpqa.csv",
        "prompts": "../gsm8k_form.jsonl",
    }  # fmt: skip
    for name in TASKS:
        for record in load(name, files.get(name, f"{name}.jsonl")):
            assert record.kind in ACCURACY or record.kind == "patch"


def test_ids_are_unique(tmp_path):
    path = tmp_path / "twice.jsonl"
    path.write_text('{"id": "a", "question": "1?", "answer": "1"}\n' * 3)
    assert [r.id for r in load_task(TASKS["math"], path, FormOptions())] == ["a", "a#2", "a#3"]


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("gsm8k", '{"question": "1?"}', r":2: 'answer' is missing; the row's keys: question"),
        ("gsm8k", '{"question": "", "answer": "1"}', r":2: 'question' is missing or not a text \(\"\""),
        ("gsm8k", r'{"question": "\ud83d", "answer": "1"}', r":2: not JSON .*surrogates not allowed"),
        ("gsm8k", "[1]", r": row 1: a JSON int, not an object"),
        ("gsm8k", '{"question', r":2: not JSON"),
        ("mmlu", '{"question": "?", "choices": ["a", "b"], "answer": "C"}', r":2: 'answer' is 'C', neither a letter"),
        ("mmlu", '{"question": "?", "choices": ["a"], "answer": "A"}', r":2: 'choices' must be a list of 2 to 10"),
        ("mbpp", '{"task_id": 1, "text": "?", "test_list": []}', r":2: 'test_list' must be"),
        ("ifeval", '{"key": 1, "prompt": "?", "instruction_id_list": ["a"], "kwargs": []}', ":2: .*two lists of one"),
        (
            "prompts",
            '{"question": "?", "answer": "1", "kind": "poem"}',
            r":2: kind 'poem' has no reward; known are math",
        ),
        ("prompts", '{"question": "?", "answer": {"n": 1}}', r":2: 'answer' is {\"n\": 1}: it must be a string"),
        ("prompts", '{"question": "?", "answer": "1", "language": 7}', r":2: 'language' is 7, not a string"),
    ],
)
def test_bad_rows_are_named(tmp_path, name, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text("\n" + line + "\n")
    with pytest.raises(DataError, match=message):
        load_task(TASKS[name], path, FormOptions())


def test_containers_hold_the_same_rows(tmp_path):
    import datasets

    rows = [{"id": "a", "problem": "1+1?", "answer": "2"}, {"id": "b", "problem": "2,5 and\n3?", "answer": "10"}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "x.json").write_text(json.dumps(rows))
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(tmp_path / "x.parquet")
    table.to_csv(tmp_path / "x.csv")
    read = [[row.values for row in read_rows(tmp_path / f"x.{kind}")] for kind in ("jsonl", "json", "parquet", "csv")]
    assert all(values == rows for values in read)
    for name, content, message in (
        ("y.json", "{}", "not a list"), ("y.parquet", "x", "not a Parquet file"), ("y.txt", "x", "unknown kind"),
        ("y.csv", "question,answer\n1,2,3\n", r"y\.csv:2: 2 columns expected"),
    ):  # fmt: skip
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=message):
            list(read_rows(tmp_path / name))
    with pytest.raises(DataError, match="no such file"):
        list(read_rows(tmp_path / "gone.jsonl"))
    assert Row("x", 3, {}).identity("id") == "2"


@pytest.mark.parametrize(
    ("name", "file", "count"),
    [
        ("gsm8k", "gsm8k_test.jsonl", 1319), ("math500", "math500.jsonl", 500), ("aime24", "aime24.jsonl", 30),
        ("aime25", "aime25.jsonl", 30), ("mmlu", "mmlu_val.jsonl", 1531), ("humaneval", "humaneval.jsonl", 164),
        ("mbpp", "mbpp.jsonl", 974), ("ifeval", "ifeval_prompts.jsonl", 541),
    ],
)  # fmt: skip
def test_published_sets_are_read_whole(name, file, count):
    records = load_task(TASKS[name], shared_data(file), FormOptions())
    assert len(records) == len({record.id for record in records}) == count
