"""The files and schemas in which other projects have prompts and preferences: what loads as it is, what is refused by name."""

import bz2
import gzip
import io
import json
import lzma
import subprocess
import sys
import zipfile

import pytest

from r1mega.data.card import describe_file
from r1mega.data.preferences import read_pairs
from r1mega.data.sft import read_lines
from r1mega.errors import DataError
from tests.field.rows import assert_refused, records, score, task, write

VERL = {
    "data_source": "openai/gsm8k", "prompt": [{"role": "user", "content": "2+3?"}], "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "5"}, "extra_info": {"index": 0, "split": "train"},
}  # fmt: skip
SCHEMAS = [
    (VERL, "2+3?", ("5",), "math", "openai/gsm8k/train/0"),
    (
        VERL | {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+3?"}]},
        "Be brief.\n\n2+3?", ("5",), "math", "openai/gsm8k/train/0",
    ),
    (VERL | {"reward_model": {"ground_truth": ["5", "five"]}, "id": "z"}, "2+3?", ("5", "five"), "math", "z"),
    ({"prompt": [{"role": "user", "content": "2+3?"}], "label": "5"}, "2+3?", ("5",), "math", None),  # slime
    ({"prompt": "2+3?", "label": 5, "metadata": {"rm_type": "math"}}, "2+3?", ("5",), "math", None),
    ({"problem": "2+3?", "solution": r"so \boxed{5}", "answer": "5", "uuid": "u"}, "2+3?", ("5",), "math", None),  # open-r1
    ({"prompt": "2+3?", "solution": r"We add: \boxed{\frac{10}{2}}."}, "2+3?", (r"\frac{10}{2}",), "math", None),
    ({"prompt": [{"role": "user", "content": "2+3?"}], "solution": "$5$"}, "2+3?", ("$5$",), "math", None),  # TRL
    ({"prompt": "2+3?", "ground_truth": "5"}, "2+3?", ("5",), "math", None),
    ({"problem": "2+3?", "expected_answer": "5"}, "2+3?", ("5",), "math", None),
    (
        {key: json.dumps(value) if isinstance(value, list | dict) else value for key, value in VERL.items()},
        "2+3?", ("5",), "math", "openai/gsm8k/train/0",
    ),  # objects as texts of JSON
    ({"prompt": '[{"role"]: which bracket is wrong?', "label": "5"}, '[{"role"]: which bracket is wrong?', ("5",), "math", None),
    (VERL | {"reward_model": {"ground_truth": '["5"]'}, "id": "z"}, "2+3?", ("5",), "math", "z"),  # Skywork
    ({"problem": "2+3?", "answer": '["5", "five"]'}, "2+3?", ("5", "five"), "math", None),
    ({"problem": "2+3?", "answer": "[5, 6]"}, "2+3?", ("[5, 6]",), "math", None),  # an interval
    ({"question": "2+3?", "final_answer": "5", "difficulty": 2.0}, "2+3?", ("5",), "math", None),  # DeepMath
    ({"prompt": "[1, 2]", "label": "5"}, "[1, 2]", ("5",), "math", None),
    ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "2+3?"}]}], "answer": "5"}, "2+3?", ("5",), "math", None),
]  # fmt: skip


@pytest.mark.parametrize(("row", "question", "answers", "kind", "identity"), SCHEMAS)
@pytest.mark.parametrize("container", ["jsonl", "parquet"])
def test_schemas_of_other_projects_load_as_they_are(tmp_path, container, row, question, answers, kind, identity):
    path = tmp_path / f"x.{container}"
    if container == "jsonl":
        write(path, row)
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    (record,) = records(path)
    assert (record.question, record.answers, record.kind) == (question, answers, kind)
    assert record.id == (identity or record.where)
    (posed,) = task("prompts", path)
    assert (posed.question, posed.answers) == (question, answers)


def test_programs_in_verls_schema(tmp_path):
    tests = {"inputs": ["1\n"], "outputs": ["2\n"]}
    path = write(tmp_path / "x.jsonl", VERL | {"ability": "code", "reward_model": {"ground_truth": json.dumps(tests)}})
    (record,) = records(path)
    assert (record.kind, record.answers, record.metadata["input_output"]) == ("code", (), tests)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "label": "1"}, "a conversation"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}], "label": "1"}, "only text can be read"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "'answer' is missing; the row's keys: prompt, chosen, rejected"),
        ({"input": "q", "label": "1"}, r"'question' is missing or not a text \(the row's keys: input, label; known"),
        ({"prompt": "q", "solution": "a proof\nof two lines"}, r"no \\boxed"),
        ({"prompt": "q", "reward_model": {"ground_truth": {"target": 3}}}, r"'answer' is {\"target\": 3}"),
        ({"prompt": "q", "reward_model": {"ground_truth": '{"target": 3}'}}, r"'answer' is {\"target\": 3}"),
        ({"messages": [{"role": "user", "content": "q"}], "answer": "1"}, "known are question, problem, prompt: rename yours"),
    ],
)  # fmt: skip
def test_rows_that_are_no_prompts_say_what_they_are(tmp_path, row, message):
    with pytest.raises(DataError, match=rf"x\.jsonl:1: .*{message}"):
        records(write(tmp_path / "x.jsonl", row))


def rows_as(path, kind):
    """The same two rows in a container."""
    import datasets
    import pyarrow.feather

    rows = [{"question": "1+1?", "answer": "2"}, {"question": "2+2?", "answer": "4"}]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    packers = {
        "jsonl.gz": gzip.compress,
        "jsonl.bz2": bz2.compress,
        "jsonl.xz": lzma.compress,
        "txt": bytes,
        "ndjson": bytes,
    }
    target = path / f"x.{kind}"
    if kind in packers:
        target.write_bytes(packers[kind](lines))
    elif kind == "json.gz":
        target.write_bytes(gzip.compress(json.dumps(rows, indent=1).encode()))
    elif kind in ("json", "jsonl"):
        target.write_text(json.dumps(rows, indent=1))  # a list, whatever the name says
    elif kind == "lines.json":
        target.write_bytes(lines)
    elif kind in ("csv", "tsv"):
        mark = "," if kind == "csv" else "\t"
        target.write_text("\r\n".join([f"question{mark}answer", f"1+1?{mark}2", f"2+2?{mark}4"]))
    elif kind == "feather":
        pyarrow.feather.write_feather(pyarrow.Table.from_pylist(rows), path / "x.arrow", compression="uncompressed")
        target = path / "x.arrow"
    elif kind == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(target, num_shards=2)
    elif kind == "directory":
        target.mkdir()
        datasets.Dataset.from_list(rows[:1]).to_parquet(target / "train-00000-of-00002.parquet")
        datasets.Dataset.from_list(rows[1:]).to_parquet(target / "train-00001-of-00002.parquet")
        (target / "README.md").write_text("A data set.")
    elif kind == "lines directory":
        target.mkdir()
        for number, line in enumerate(lines.splitlines()):
            (target / f"{number}.jsonl.gz").write_bytes(gzip.compress(line))
    return target


CONTAINERS = (
    "jsonl.gz", "jsonl.bz2", "jsonl.xz", "json.gz", "txt", "ndjson", "json", "jsonl", "lines.json", "csv", "tsv", "feather",
    "saved", "directory", "lines directory",
)  # fmt: skip


@pytest.mark.parametrize("kind", CONTAINERS)
def test_containers_that_are_read(tmp_path, kind):
    path = rows_as(tmp_path, kind)
    assert [(r.question, r.answers) for r in records(path)] == [("1+1?", ("2",)), ("2+2?", ("4",))]
    assert [item["answer"] for _, item in read_lines(path)] == ["2", "4"]
    described = describe_file(path, "prompts", {})
    assert described.lines == 2 and len(described.sha256) == 64


ONE_ROW = (
    {"question": "q", "answer": "1"},
    {"prompt": [{"role": "user", "content": "q"}], "reward_model": {"ground_truth": "1"}},
    {"question": "q", "answer": "1", "tests": [{"input": "1", "output": "1"}], "extra": {}},
)


@pytest.mark.parametrize("row", ONE_ROW)
@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_file_of_one_row(tmp_path, row, indent):
    (tmp_path / "x.json").write_text(json.dumps(row, indent=indent) + "\n")
    assert [(r.question, r.answers) for r in records(tmp_path / "x.json")] == [("q", ("1",))]
    messages = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    (tmp_path / "y.json").write_text(json.dumps(messages, indent=indent))
    assert [item for _, item in read_lines(tmp_path / "y.json")] == [messages]


def test_a_first_question_that_begins_with_an_angle(tmp_path):
    (tmp_path / "x.csv").write_text("<b> makes text,bold,red,small,large,A\n")
    assert "\n\n<b> makes text\n\nA) bold" in task("mmlu", tmp_path / "x.csv")[0].question


def test_bad_lines_of_csv_are_skipped_where_that_is_asked(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes(b'question,answer\na,1\nragged,2,3\nshort\ncaf\xe9,4\n"two\nlines\xe9\nof it",5\nz,6\n')
    assert [(r.question, r.answers) for r in records(path, on_bad_line="skip")] == [("a", ("1",)), ("z", ("6",))]
    with pytest.raises(DataError, match=r"x\.csv:3: 2 columns expected.*set data.on_bad_line=skip"):
        records(path)
    path.write_bytes(b'question,answer\n"a "b" c",1\n"say ""hi"", it is 5"" long",2\n3" pipe,3\n')
    assert [r.answers for r in records(path, on_bad_line="skip")] == [("2",), ("3",)]
    path.write_bytes(b'question,answer\na,1\nb,"2\nc,3\n')
    with pytest.raises(DataError, match=r"x\.csv:3: a quote that is opened here"):  # it is not known what else is lost
        records(path, on_bad_line="skip")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"question,answer\ra,1\rb,2\r", "lines that end in a carriage return"),
        (b"question;answer\na;1\nb;2\n", "columns apart by ';', not by commas"),
        (b"question\tanswer\na\t1\nb\t2\n", "columns apart by '.t', not by commas"),
        (b'question|answer\n"a"|1\n"b"|2\n', "columns apart by '[|]', not by commas"),
    ],
)
def test_other_forms_of_csv_become_csv_by_the_advice(tmp_path, content, message):
    path = tmp_path / "x.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"x\.csv:1: {message}") as raised:
        records(path)
    advice = str(raised.value).split("write it anew: ")[1].replace("NEW", str(tmp_path / "y.csv"))
    subprocess.run(advice.replace("python -c", f"{sys.executable} -c"), shell=True, check=True)
    assert [r.answers for r in records(tmp_path / "y.csv")] == [("1",), ("2",)]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_the_advice_for_other_encodings_works(tmp_path, encoding):
    text = '{"question": "q", "answer": "1", "gold": "1", "prediction": "1"}\n'
    (tmp_path / "x.jsonl").write_bytes(text.encode(encoding))
    with pytest.raises(DataError, match="iconv -f UTF-") as raised:
        records(tmp_path / "x.jsonl", on_bad_line="skip")
    name = str(raised.value).split("iconv -f ")[1].split()[0]
    assert_refused(score("math", text.encode(encoding)), f"<stdin>:1: {name} text; write it anew: iconv -f {name}")
    new = tmp_path / "new.jsonl"
    new.write_bytes(subprocess.check_output(["iconv", "-f", name, "-t", "UTF-8", tmp_path / "x.jsonl"]))
    assert [r.answers for r in records(new)] == [("1",)]


def packed_zip(name="x.jsonl"):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr(name, "{}")
    return content.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl.zst", b"\x28\xb5\x2f\xfd\x00\x00", r"compressed by zstd; unpack it: zstd -d"),
        ("x.zip", packed_zip(), "a ZIP archive; unpack it: python -m zipfile -e"),
        ("x.xlsx", packed_zip("docProps/app.xml"), "a workbook; save the sheet with the rows as CSV in UTF-8"),
        ("x.xlsx", packed_zip("[Content_Types].xml"), "a workbook; save the sheet"),
        ("x.tar", bytes(257) + b"ustar\x0000" + bytes(300), "a tar archive; unpack it: tar -xf"),
        ("x.tar.gz", gzip.compress(bytes(257) + b"ustar\x0000" + bytes(300)), "a tar archive"),
        ("x.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer.*git lfs pull"),
        ("x.jsonl", b"<!DOCTYPE html><html>", "a web page"),
        ("x.jsonl", "{}".encode("utf-16"), "UTF-16 text; .*iconv -f UTF-16 -t UTF-8"),
        ("x.pkl", b"\x80\x04\x95\x00", "a Python pickle"),
        ("x.txt", b"What is 2+2?\n", "unknown kind of file '.txt'"),
        ("x.json", b'{"question": {"0": "q"}, "answer": {"0": "1"}}', r"a JSON dict with the keys question, answer, not a list"),
        ("x.json", b'{"data": [{"question": "q"}]}', "a JSON dict with the keys data"),
    ],
)  # fmt: skip
def test_containers_that_are_refused_by_name(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as raised:
        records(tmp_path / name, on_bad_line="skip")
    assert f"{name}:1" not in str(raised.value), "line 1 is not to blame"


def test_directories_that_are_refused_by_name(tmp_path):
    import datasets

    rows = datasets.Dataset.from_list([{"question": "q", "answer": "1"}])
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(tmp_path / "both")
    with pytest.raises(DataError, match="both: holds the splits test, train; name the one that is meant"):
        records(tmp_path / "both")
    assert len(records(tmp_path / "both" / "train")) == 1, "the advice works"
    (tmp_path / "hub/data").mkdir(parents=True)
    for split in ("train", "test"):
        rows.to_parquet(tmp_path / f"hub/data/{split}-00000-of-00001.parquet")
    with pytest.raises(DataError, match="hub: a directory without data files.*there are some in .*hub/data"):
        records(tmp_path / "hub")
    with pytest.raises(DataError, match="hub/data: holds files of several splits"):
        records(tmp_path / "hub/data")
    with pytest.raises(DataError, match="gone: no such file"):
        records(tmp_path / "gone")


def test_preferences_are_read_from_the_same_containers(tmp_path):
    row = json.dumps({"question": "q", "chosen": "a", "rejected": "b"}) + "\n"
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(row.encode()))
    assert [pair.chosen for pair in read_pairs([tmp_path / "x.jsonl.gz"])] == ["a"]


def turn(role, content):
    return {"role": role, "content": content}


USER, GOOD, BAD = turn("user", "q"), turn("assistant", "a"), turn("assistant", "b")
PAIRS = [
    {"prompt": "q", "chosen": "a", "rejected": "b"},
    {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    {"prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
]


@pytest.mark.parametrize("row", PAIRS)
def test_preferences_in_trls_schema(tmp_path, row):
    (pair,) = read_pairs([write(tmp_path / "x.jsonl", row)])
    assert (pair.question, pair.chosen, pair.rejected) == ("q", "a", "b")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "q", "chosen": [GOOD, USER, GOOD], "rejected": "b"},
            r"'chosen' is a conversation \(assistant, user, assis",
        ),
        (
            {"prompt": "p", "chosen": [USER, GOOD], "rejected": "b"},
            "'chosen' answers 'q', which is not the row's question",
        ),
        ({"prompt": [USER, GOOD, USER], "chosen": "a", "rejected": "b"}, "'prompt' is a conversation"),
        (
            {"prompt": "q", "better": "a", "worse": "b"},
            "'chosen' is missing or not a text; the row's keys: prompt, better, worse",
        ),
        (
            {"input": "q", "chosen": "a", "rejected": "b"},
            r"'question' is missing or not a text \(the row's keys: input",
        ),
    ],
)
def test_preferences_that_are_none_are_named(tmp_path, row, message):
    with pytest.raises(DataError, match=rf"x\.jsonl:1: {message}"):
        read_pairs([write(tmp_path / "x.jsonl", row)])
