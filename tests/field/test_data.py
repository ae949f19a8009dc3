"""Data as people have it on disk: what loads, what is refused with its place and what to do."""

import gzip
import math
import subprocess

import pytest

from r1mega.config.schema import DataConfig
from r1mega.data.prompts import read_records, scan_prompts
from r1mega.data.record import UniqueIds, after_solution
from r1mega.data.sft import read_lines
from r1mega.errors import DataError
from tests.field.rows import assert_refused, records, score, task, write

# ------------------------------------------- commas behind ####: lm-evaluation-harness#4038


@pytest.mark.parametrize(
    ("written", "gold"),
    [
        ("0,1", "0,1"), ("70,000", "70000"), ("1,234,567.89", "1234567.89"), ("-2,500", "-2500"), ("$1,200", "$1200"),
        ("(1,200)", "(1,200)"), ("[-3,400]", "[-3,400]"), (r"\{1,200\}", r"\{1,200\}"), ("x = (2, 3,000)", "x = (2, 3,000)"),
        ("10,20,30", "10,20,30"), ("1,2", "1,2"), ("0,100", "0,100"), ("3,1,200", "3,1,200"), ("1,2000", "1,2000"),
        ("2,000 and 3,000", "2000 and 3000"), ("(a) 5,000", "(a) 5000"), ("3, 5", "3, 5"), ("1,00,000", "1,00,000"),
        ("x=1,y=2", "x=1,y=2"), ("0.5,125", "0.5,125"),
    ],
)  # fmt: skip
def test_only_the_commas_of_thousands_go(tmp_path, written, gold):
    assert after_solution(f"some steps\n#### {written}") == gold
    path = write(tmp_path / "p.jsonl", {"question": "q", "answer": f"so\n#### {written}"})
    assert [r.answers for r in records(path)] == [(gold,)]
    assert [r.answers for r in task("gsm8k", path)] == [(gold,)]


# --------------------------------------------------------------------------------------------- repeated ids


@pytest.mark.parametrize(
    "ids",
    [
        ["a", "a", "a#2"], ["a#2", "a", "a"], ["a", "a#2", "a", "a#3", "a"], ["a#2#2", "a", "a", "a#2"],
        [1, "1", 1.0], ["", None, math.nan], [None, None], ["x"] * 5,
    ],
)  # fmt: skip
def test_no_two_rows_have_one_id(tmp_path, ids):
    path = write(tmp_path / "p.jsonl", *({"question": "q", "answer": "1", "id": i} for i in ids))
    for found in (records(path), task("prompts", path), task("math", path)):
        assert len({r.id for r in found}) == len(ids)
    assert [r.id for r in records(path)] == [r.id for r in records(path)], "and the same in every start"


def test_ids_of_several_files_differ(tmp_path):
    paths = [write(tmp_path / f"{n}.jsonl", {"question": "q", "answer": "1", "id": i}) for n, i in enumerate("aab")]
    assert [r.id for r in records(*paths)] == ["a", "a#2", "b"]
    unique = UniqueIds()
    assert [unique(i) for i in ("a", "a", "a#2", "a")] == ["a", "a#2", "a#2#2", "a#3"]


# ---------------------------------------------------------------------- lines that cannot be judged, found at once

LEGS = {"question": "Legs of a cat?", "answer": "4", "metadata": {"source_dataset": "leg_counting"}}
BAD_LINES = [
    ({"kind": "code", "answer": "x", "tests": []}, "no tests"),
    ({"kind": "code", "test_list": ["x = 1"]}, "assert nothing"),
    ({"kind": "code", "input_output": '{"inputs": ["1"], "outputs": []}'}, "1 inputs and 0 outputs"),
    ({"kind": "instruction", "answer": "x"}, "two lists of one length"),
    ({"kind": "instruction", "instruction_id_list": ["no:such"], "kwargs": [{}]}, "'no:such' is not known"),
    ({"kind": "instruction", "instruction_id_list": ["keywords:frequency"], "kwargs": [{}]}, "is missing or out of"),
    ({"kind": "instruction", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [7]}, "an object for each"),
    ({"kind": "instruction", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{"n": 1}]}, "no_comma"),
    ({"kind": "reasoning_gym", "entry": {"question": "q"}}, "metadata.source_dataset"),
    ({"kind": "reasoning_gym", "entry": {"metadata": {"source_dataset": "coin_flip"}}}, "is blocked"),
    ({"kind": "reasoning_gym", "entry": {"metadata": {"source_dataset": "no_such"}}}, "no task 'no_such'"),
    ({"kind": "reasoning_gym", "entry": {k: v for k, v in LEGS.items() if k != "answer"}}, r"KeyError\('answer'\)"),
    ({"kind": "reasoning_gym", "entry": LEGS | {"answer": None}}, "the scorer of 'leg_counting' fails"),
    ({"kind": "reasoning_gym", "entry": LEGS | {"metadata": {"source_dataset": "sudoku"}}}, r"KeyError\('solution'\)"),
    ({"kind": "poem", "answer": "1"}, "kind 'poem' has no reward"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_a_line_that_cannot_be_judged_is_named_before_the_run(tmp_path, line, message):
    good = [{"question": str(i), "answer": "3"} for i in range(39)]
    path = write(tmp_path / "p.jsonl", *good, {"question": "q"} | line)
    with pytest.raises(DataError, match=rf"p\.jsonl:40: .*{message}"):
        scan_prompts(DataConfig(prompts=(path,)), tmp_path)
    assert len(records(path, on_bad_line="skip")) == 39
    with pytest.raises(DataError, match=rf"p\.jsonl:40: .*{message}"):
        task("prompts", path)


# ----------------------------------------------------------------------------- kinds that are judged by their keys


@pytest.mark.parametrize(
    "line",
    [
        {"kind": "code", "tests": [{"input": "1", "output": "1"}]},
        {"kind": "code", "tests": [{"input": "1", "output": "1"}], "answer": None},
        {"kind": "code", "test_list": ["assert f(1) == 1"], "answer": ""},
        {"kind": "instruction", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}], "answer": 5},
        {"kind": "instruction", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [None]},
        {"kind": "instruction", "instruction_id_list": ["punctuation:no_comma"], "kwargs": None},
        {"kind": "reasoning_gym", "entry": LEGS, "answer": {"a": 1}},
    ],
)
def test_what_is_judged_by_its_keys_needs_no_answer(tmp_path, line):
    path = write(tmp_path / "p.jsonl", {"question": "q"} | line)
    assert [r.answers for r in records(path)] == [()] == [r.answers for r in task("prompts", path)]


# -------------------------------------------------------------------- damaged and oddly encoded evaluation files

GPQA = "Question,Correct Answer,Incorrect Answer 1,Incorrect Answer 2,Incorrect Answer 3,Record ID\n"


@pytest.mark.parametrize(
    ("name", "form", "content", "message"),
    [
        ("x.csv", "gpqa", (GPQA + "5 °C,a,b,c,d,r\n").encode("cp1252"), r"x\.csv:2: not UTF-8 .*iconv -f CP1252"),
        ("x.csv", "gpqa", (GPQA + "ok,a,b,c,d,r\n").encode() + b"\xff\n", r"x\.csv:3: not UTF-8"),
        ("x.csv", "mmlu", "é,1,2,3,4,A\n".encode("latin-1"), r"x\.csv:1: not UTF-8"),
        ("x.csv", "gpqa", (GPQA + "ok,a,b,c,d,r\n").encode("utf-16"), "UTF-16 text; .*iconv -f UTF-16"),
        ("x.csv", "gpqa", (GPQA + "ok,a,b,c,d,r\n").encode("utf-16-le"), "UTF-16LE text; .*iconv -f UTF-16LE"),
        ("x.csv", "gpqa", b"Question,id,Correct Answer,id\n1,2,3,4\n", r"x\.csv:1: several columns are named id"),
        ("x.csv", "gpqa", GPQA.encode() + b'"open,a,b,c,d,r\n', r"x\.csv:2: a quote that is opened here is not closed"),
        ("x.csv", "gpqa", GPQA.encode() + b'q,a,b,c,d,"r\n' + b"q,a,b,c,d,r\n" * 9, r"x\.csv:2: a quote that is opened here"),
        ("x.csv", "mmlu", b'q,1,2,3,4,A\n\nq,1,2,3,4,"A\nq,1,2,3,4,A\n', r"x\.csv:3: a quote that is opened here is not closed"),
        ("x.csv", "mmlu", b'q,1,2,3,4,"A\nq,1,2,3,"4,A"\n', r"x\.csv:2: not CSV .*row of line 1 to 2\)"),
        ("x.csv", "mmlu", b'q,1,2,3,4,A\n"say "yes" now",1,2,3,4,A\n', r"x\.csv:2: not CSV .*row of line 2\); a quote within"),
        ("x.tsv", "gpqa", b'Question\tid\n"what is 5" long?\t1\n', r"x\.tsv:2: not CSV .*a quote within quotes is written twice"),
        ("x.csv", "gpqa", b'"Question,id\nq,1\n', r"x\.csv:1: a quote that is opened here is not closed"),
        ("x.jsonl", "math", b'{"problem": "caf\xe9", "answer": "1"}\n', r"x\.jsonl:1: not UTF-8"),
        ("x.jsonl", "math", b'{"problem": "p", "answer": "1"}\n' + b"[" * 100_000, r"x\.jsonl:2: not JSON .*recursion"),
        ("x.json", "math", b"[" * 100_000, "not JSON .*recursion"),
        ("x.json", "math", b'[{"problem": "caf\xe9"}]', r"x\.json: not UTF-8"),
        ("x.jsonl", "mmlu", rb'{"question": "?", "choices": ["\ud800", "b"], "answer": 0}', r"x\.jsonl:1: not JSON .*surro"),
        ("x.json", "mmlu", rb'[{"question": "?", "choices": ["\udfff", "b"], "answer": 0}]', "not JSON .*surrogates"),
        ("x.parquet", "math", b"PAR1" + bytes(40) + b"PAR1", "not a Parquet file, or a damaged one"),
        ("x.jsonl.gz", "math", gzip.compress(b'{"problem": "p", "answer": "1"}\n' * 99)[:-30], "cannot be read to its end"),
    ],
)  # fmt: skip
def test_damaged_files_are_refused_with_the_place(tmp_path, name, form, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        task(form, tmp_path / name)


def test_the_advice_for_a_file_of_windows_works(tmp_path):
    (tmp_path / "old.csv").write_bytes((GPQA + "5 °C – “x”,a,b,c,d,r\n").encode("cp1252"))
    new = tmp_path / "new.csv"
    new.write_bytes(subprocess.check_output(["iconv", "-f", "CP1252", "-t", "UTF-8", tmp_path / "old.csv"]))
    assert "5 °C – “x”" in task("gpqa", new)[0].question


# ------------------------------------------------------------------------------------------- golds that are no numbers


@pytest.mark.parametrize(
    "gold", [math.nan, "nan", "NaN", "+nan", "-NaN", "<NA>", None, "", "  ", "so ####", ["nan", None]]
)
def test_a_missing_number_is_no_gold(tmp_path, gold, caplog):
    path = write(tmp_path / "p.jsonl", {"question": "a", "answer": 33.0}, {"question": "b", "answer": gold})
    assert [r.answers for r in records(path)] == [("33",)]
    assert f"1 lines without an answer were left out; the first: {path}:2" in caplog.text
    with pytest.raises(DataError, match=r"p\.jsonl:2: the row has no answer"):
        task("aime24", path)


INFINITE = ("inf", "-inf", "+Infinity", "so it is #### inf")


@pytest.mark.parametrize("kind", ["choice", "logic"])
def test_what_is_no_gold_is_none_of_any_kind(tmp_path, kind):
    path = write(tmp_path / "p.jsonl", {"question": "a", "answer": "B"}, {"question": "b", "answer": "nan"})
    assert [r.answers for r in records(path, kind=kind)] == [("B",)]
    with pytest.raises(DataError, match=r"p\.jsonl:1: 'answer' is"):
        records(write(path, {"question": "a", "answer": "-inf"}), kind=kind)


@pytest.mark.parametrize("gold", [math.inf, -math.inf, True, {"value": 3}, ["1", math.nan], ["1", "nan"], *INFINITE])
def test_what_is_neither_text_nor_finite_number_is_no_gold_either(tmp_path, gold):
    path = write(tmp_path / "p.jsonl", {"question": "a", "answer": gold})
    with pytest.raises(DataError, match=r"p\.jsonl:1: 'answer' is"):
        records(path)
    with pytest.raises(DataError, match=r"p\.jsonl:1: 'answer' is"):
        task("aime24", path)


def test_a_missing_number_of_a_parquet_column(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "x.parquet"
    columns = {"problem": ["p", "q"], "answer": [33.0, math.nan], "id": [1.0, 2.0]}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    assert [(r.id, r.answers) for r in records(path)] == [("1", ("33",))]
    with pytest.raises(DataError, match=r"x\.parquet: row 2: the row has no answer"):
        task("aime24", path)
    columns = {"question": ["p"], "choices": [["1", None]], "answer": [0.0]}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    with pytest.raises(DataError, match="row 1: 'choices' holds what is neither"):
        task("mmlu", path)


@pytest.mark.parametrize("gold", ["NaN", "Infinity", "[1, NaN]", "true", "null"])
def test_golds_on_standard_input(gold):
    done = score("math", f'{{"gold": {gold}, "prediction": "nan"}}\n'.encode())
    assert_refused(done, "<stdin>:1: 'gold' must be a text or a finite number")


# ------------------------------------------------------------------------------- byte order marks on standard input

PAIR = b'{"gold": "1", "prediction": "1"}\n'


@pytest.mark.parametrize(
    "content",
    [b"\xef\xbb\xbf" + PAIR, PAIR + b"\xef\xbb\xbf" + PAIR, b"\xef\xbb\xbf\r\n" + PAIR[:-1] + b"\r\n"],
)
def test_a_byte_order_mark_before_pairs_is_left_out(content):
    done = score("math", content)
    assert done.exit_code == 0 and done.stdout.count('"value": 1.0') == content.count(b"gold")


def test_other_encodings_on_standard_input_are_named():
    for command in ("math", "code"):
        assert_refused(score(command, PAIR.replace(b'"1"', b'"\xe9"', 1)), "<stdin>:1: not UTF-8")
    assert_refused(score("code", b"\xef\xbb\xbf{\n"), "<stdin>:1: not JSON (Expecting property name")


def test_a_byte_order_mark_in_any_file(tmp_path):
    lines = b'\xef\xbb\xbf{"question": "q", "answer": "1", "response": "r"}\r\n\xef\xbb\xbf{"question": "r", "answer": "2"}\r\n'
    (tmp_path / "p.jsonl").write_bytes(lines)
    (tmp_path / "p.json").write_bytes(b'\xef\xbb\xbf[{"question": "q", "answer": "1"}]')
    (tmp_path / "p.csv").write_bytes(b"\xef\xbb\xbfquestion,answer\r\nq,1\r\n")
    assert [r.answers for r in records(tmp_path / "p.jsonl")] == [("1",), ("2",)]
    assert [item["question"] for _, item in read_lines(tmp_path / "p.jsonl")] == ["q", "r"]
    for name in ("p.json", "p.csv"):
        assert [r.answers for r in records(tmp_path / name)] == [("1",)]


def test_who_cannot_set_data_keys_is_not_advised_to(tmp_path):
    path = write(tmp_path / "x.jsonl", {"question": "q"})
    with pytest.raises(DataError, match="mend the line$"):
        list(read_records(DataConfig(prompts=(path,)), has_keys=False))
