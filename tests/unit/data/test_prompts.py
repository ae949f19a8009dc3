"""Prompt files: what loads, what is refused with file:line, what is skipped on request."""

import json
from pathlib import Path

import pytest

from r1mega.config.schema import DataConfig
from r1mega.data.prompts import load_prompts, scan_prompts
from r1mega.data.template import render
from r1mega.errors import ConfigError, DataError


class Bytes:
    """A tokenizer of bytes, with a beginning-of-text token."""

    bos_token_id, eos_token_id, end_token_ids, vocab_size = 256, 257, (257,), 258

    def encode(self, text):
        return list(text.encode())

    def encode_prompt(self, text):
        return [256, *self.encode(text)]

    def decode(self, token_ids):
        return bytes(i for i in token_ids if i < 256).decode()


def load(path, **keys):
    return load_prompts(DataConfig(prompts=(path,), template="nano", **keys), Bytes())


def write(directory, *lines):
    path = directory / "p.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def test_fields_template_and_defaults(tmp_path):
    path = write(
        tmp_path,
        {"question": "1+1?", "answer": "2"},
        "",
        {"id": 7, "question": "2+2?", "answer": ["4", "four"], "kind": "logic", "language": "zh", "tests": [1]},
    )
    first, second = load(path, language="en")
    assert (first.id, first.answers, first.kind, first.language) == (f"{path}:1", ("2",), "math", "en")
    assert Bytes().decode(first.token_ids) == "User: 1+1? Assistant:"
    assert first.token_ids[0] == 256
    assert (second.id, second.answers, second.kind, second.language) == ("7", ("4", "four"), "logic", "zh")
    assert second.metadata == {"tests": [1]}


def test_gsm8ks_own_lines_hold_a_solution_before_the_answer(tmp_path):
    solution = "48/2 = <<48/2=24>>24.\nTogether <<48+24=72>>72.\n#### 1,072"
    path = write(
        tmp_path, {"question": "q", "answer": solution}, {"question": "q", "answer": ["7", "so\n#### -3 "]},
        {"question": "q", "answer": "#### x", "kind": "logic"},
    )  # fmt: skip
    assert [p.answers for p in load(path)] == [("1072",), ("7", "-3"), ("#### x",)], "math alone is written so"


def test_questions_in_the_form_of_gsm8k(tmp_path):
    prompts = load(Path("tests/data/gsm8k_form.jsonl"))
    assert len(prompts) == 8
    assert prompts[0].answers == ("27",)
    assert "#### 27" in prompts[0].metadata["solution"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "not JSON"),
        ('["a"]', "a JSON list, not an object"),
        ('{"question": "\\ud800", "answer": "1"}', "not JSON .*surrogates not allowed"),
        ("[" * 100_000, "not JSON .*recursion"),
        ({"answer": "2"}, "'question' is missing"),
        ({"question": "q"}, "'answer' is missing"),
        ({"question": "q", "answer": True}, "'answer' is true: it must be a string or a finite number"),
        ({"question": "q", "answer": ["5", {}]}, r"'answer' is \[\"5\", {}\]"),
        ({"question": "q", "answer": []}, "it must be a string or a finite number, or a list of non-empty ones"),
        ({"question": "q", "answer": "1", "kind": "poem"}, "kind 'poem' has no reward; known are math"),
        ({"question": "q", "answer": "1", "kind": 3}, "'kind' is 3, not a string"),
        ({"question": "long " * 30, "answer": "1"}, "the prompt has 168 tokens, data.max_prompt_tokens is 100"),
    ],
)
def test_bad_line_is_fatal_with_its_place_or_skipped(tmp_path, line, message):
    path = write(tmp_path, {"question": "a", "answer": "1"}, line, {"question": "b", "answer": "2"})
    with pytest.raises(DataError, match=rf"p\.jsonl:2: .*{message}"):
        load(path, max_prompt_tokens=100)
    kept = load(path, max_prompt_tokens=100, on_bad_line="skip", on_long_prompt="skip")
    assert [p.question for p in kept] == ["a", "b"]


class NoTokenizer:
    """Where no question is near the limit, the scan needs no tokenizer at all."""

    def __fspath__(self):
        raise AssertionError("the tokenizer was asked for")


def test_scan_raises_what_loading_would_and_tokenises_only_near_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("r1mega.data.prompts.load_tokenizer", lambda _directory: Bytes())
    lines = [{"question": "x" * size, "answer": "1"} for size in (10, 75, 60)]
    config = DataConfig(prompts=(write(tmp_path, *lines),), template="nano", max_prompt_tokens=93)
    scan_prompts(config, tmp_path)  # 75 + 17 of the template + 1 = 93 tokens: just fits
    for changed in ({"max_prompt_tokens": 92}, {"prompts": (write(tmp_path, *lines, "{"),)}):
        broken = config.model_copy(update=changed)
        with pytest.raises(DataError) as loading:
            load_prompts(broken, Bytes())
        with pytest.raises(DataError) as scanning:
            scan_prompts(broken, tmp_path)
        assert str(scanning.value) == str(loading.value)
    with pytest.raises(DataError, match="no prompts left"):
        scan_prompts(config.model_copy(update={"prompts": (write(tmp_path, ""),)}), tmp_path)


def test_scan_of_short_questions_needs_no_tokenizer(tmp_path):
    scan_prompts(DataConfig(prompts=(write(tmp_path, {"question": "1+1?", "answer": "2"}),)), NoTokenizer())


def test_lines_without_a_gold_are_left_out_and_counted(tmp_path, caplog):
    """As in public sets: two of the MATH lines have null, two an empty text."""
    answers = ("1", None, "  ", "2")
    path = write(tmp_path, *({"question": str(i), "answer": a} for i, a in enumerate(answers)))
    assert [p.question for p in load(path)] == ["0", "3"]
    assert "2 lines without an answer were left out; the first: " + f"{path}:2" in caplog.text


def test_repeated_ids_become_unique(tmp_path):
    path = write(tmp_path, *({"id": "x", "question": q, "answer": "1"} for q in "abc"))
    assert [p.id for p in load(path)] == ["x", "x#2", "x#3"]
    # one that a file numbers itself, before and after its number is given
    for given in (["a", "a", "a#2", "a"], ["a#2", "a", "a", "a"]):
        path = write(tmp_path, *({"id": name, "question": "q", "answer": "1"} for name in given))
        found = [p.id for p in load(path)]
        assert len(set(found)) == 4 and found[0] == given[0]


def test_nothing_left_and_missing_file(tmp_path):
    with pytest.raises(DataError, match="no prompts left"):
        load(write(tmp_path, "broken"), on_bad_line="skip")
    with pytest.raises(DataError, match="gone.jsonl: no such file"):
        load(tmp_path / "gone.jsonl")


def test_templates():
    text = render("r1_zero", "What is 2+2?")
    assert text.startswith("A conversation between User and Assistant.")
    assert "<think> reasoning process here </think> <answer> answer here </answer>" in text
    assert text.endswith("User: What is 2+2?. Assistant:")
    assert render("Q: {{ question }}\n", "x") == "Q: x\n"
    for bad, message in (("nanoo", "neither a name"), ("{{ question", "line 1"), ("{{ answer }}", "only 'question'")):
        with pytest.raises(ConfigError, match=message):
            render(bad, "x")
