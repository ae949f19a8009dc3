"""SFT data: lines of both forms and files of both kinds become the right tokens and trained spans; errors name the line."""

import json

import pytest

from r1mega.config.stages.sft import SFTData
from r1mega.data import nano_tokenizer
from r1mega.data.sft import SFTDataset, build_token_file, held_out_indices, read_lines
from r1mega.data.tokenizer import load_tokenizer
from r1mega.errors import DataError

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
LINES = [
    {"id": "a", "question": "which of a 5", "response": "<think> no </think>", "template": "nano", "language": "en"},
    {"id": "b", "question": "哪个 之中", "response": "<answer> 5 </answer>", "source": "made"},
]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    directory = tmp_path_factory.mktemp("plain")
    nano_tokenizer.train_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def chatty(plain, tmp_path_factory):
    """The same vocabulary as transformers' tokenizer with a chat template."""
    directory = tmp_path_factory.mktemp("chat")
    (directory / "tokenizer.json").write_bytes((plain / "tokenizer.json").read_bytes())
    config = json.loads((plain / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": CHAT}))
    return load_tokenizer(directory)


def write(path, lines):
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return path


def test_question_and_response(plain, tmp_path):
    tokenizer = load_tokenizer(plain)
    data = SFTData(files=(write(tmp_path / "x.jsonl", LINES),), template="Q: {{ question }} A:")
    dataset = SFTDataset(build_token_file(data, tokenizer, tmp_path / "out"))
    assert dataset.ids() == ["a", "b"] and len(set(dataset.prompts())) == 2
    for index, prompt in enumerate(("User: which of a 5 Assistant:", "Q: 哪个 之中 A:")):
        ids, weights = dataset.sample(index, 0.25)
        response = [*tokenizer.encode(LINES[index]["response"]), tokenizer.eos_token_id]
        assert ids == tokenizer.encode_prompt(prompt) + response
        assert weights == [0.25] * (len(ids) - len(response)) + [1.0] * len(response)
        assert dataset.lengths[index] == len(ids)
    assert dataset.describe(1)["source"] == "made"
    assert dataset.describe(0)["source"] is None


def test_every_assistant_turn_is_trained(chatty, tmp_path):
    messages = [
        {"role": "system", "content": "so"}, {"role": "user", "content": "try 5"}, {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "try 6"}, {"role": "assistant", "content": "no wait"},
    ]  # fmt: skip
    data = SFTData(files=(write(tmp_path / "x.jsonl", [{"messages": messages}]),))
    dataset = SFTDataset(build_token_file(data, chatty, tmp_path / "out"))
    ids, weights = dataset.sample(0, 0.0)
    trained = [token for token, weight in zip(ids, weights, strict=True) if weight]
    assert trained == chatty.encode("yes</s>") + chatty.encode("no wait</s>")
    prompts = "<system>so</s><user>try 5</s><assistant>", "<user>try 6</s><assistant>"
    given = [token for token, weight in zip(ids, weights, strict=True) if not weight]
    assert given == chatty.encode(prompts[0]) + chatty.encode(prompts[1])


def test_parquet_gives_the_same_as_jsonl(plain, tmp_path):
    from datasets import Dataset

    tokenizer = load_tokenizer(plain)
    jsonl, parquet = write(tmp_path / "x.jsonl", LINES), tmp_path / "x.parquet"
    names = sorted({name for line in LINES for name in line})
    Dataset.from_dict({name: [line.get(name) for line in LINES] for name in names}).to_parquet(parquet)
    assert [item for _, item in read_lines(jsonl)] == [item for _, item in read_lines(parquet)]
    sets = [
        SFTDataset(build_token_file(SFTData(files=(f,)), tokenizer, tmp_path / f.suffix[1:])) for f in (jsonl, parquet)
    ]
    assert [sets[0].sample(i, 0.0) for i in range(2)] == [sets[1].sample(i, 0.0) for i in range(2)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "x"}', r"x\.jsonl:2: 'response' is missing"),
        ('{"question": 5, "response": "y"}', r"x\.jsonl:2: 'question' is missing or not a text"),
        ("{", r"x\.jsonl:2: not JSON"),
        ("[]", r"x\.jsonl:2: a JSON list"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "with an assistant's turn"),
        ('{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}', "no chat template"),
        (json.dumps({"question": "5 " * 40, "response": "5"}), "tokens, data.max_tokens is 32"),
    ],
)
def test_bad_lines_are_errors_or_skipped_and_counted(plain, tmp_path, line, message):
    tokenizer = load_tokenizer(plain)
    file = write(tmp_path / "x.jsonl", [LINES[0] | {"question": "a"}])
    file.write_text(file.read_text() + line + "\n" + file.read_text())
    strict = SFTData(files=(file,), template="nano", max_tokens=32)
    with pytest.raises(DataError, match=message):
        build_token_file(strict, tokenizer, tmp_path / "strict")
    lenient = strict.model_copy(update={"on_bad_line": "skip", "on_long": "skip"})
    dataset = SFTDataset(build_token_file(lenient, tokenizer, tmp_path / "lenient"))
    assert len(dataset) == 2
    counts = json.loads((tmp_path / "lenient/tokens.json").read_text())["lines"]
    assert sum(counts.values()) == 3 and counts["kept"] == 2


def test_other_data_under_the_same_name_is_refused(plain, tmp_path):
    tokenizer = load_tokenizer(plain)
    data = SFTData(files=(write(tmp_path / "x.jsonl", LINES),))
    first = build_token_file(data, tokenizer, tmp_path / "out").read_bytes()
    assert build_token_file(data, tokenizer, tmp_path / "out").read_bytes() == first
    write(tmp_path / "x.jsonl", LINES[:1])
    with pytest.raises(DataError, match=r"x\.jsonl: not what this run began with"):
        build_token_file(data, tokenizer, tmp_path / "out")


def test_a_file_of_an_earlier_version_holds_out_by_id(plain, tmp_path):
    lines = [{"question": "q", "response": "a", "id": str(i)} for i in range(3)]
    data, tokenizer = SFTData(files=(write(tmp_path / "x.jsonl", lines),)), load_tokenizer(plain)
    path = build_token_file(data, tokenizer, tmp_path / "out")
    assert SFTDataset(path).prompts() == ["q"] * 3
    record = tmp_path / "out/tokens.json"
    content = json.loads(record.read_text())
    del content["held_out_by"]
    record.write_text(json.dumps(content))
    path = build_token_file(data, tokenizer, tmp_path / "out")  # a start that goes on
    assert SFTDataset(path).prompts() == ["0", "1", "2"] and json.loads(record.read_text()) == content


def test_held_out_share_follows_the_ids():
    ids = [f"line-{i}" for i in range(4000)]
    chosen = held_out_indices(ids, 0.1, seed=1)
    assert 320 < len(chosen) < 480
    shuffled = ids[::-1]
    assert {ids[i] for i in chosen} == {shuffled[i] for i in held_out_indices(shuffled, 0.1, seed=1)}
    assert chosen != held_out_indices(ids, 0.1, seed=2)
    assert held_out_indices(ids, 0.0, seed=1) == set()


def test_all_answers_to_a_prompt_are_held_out_together():
    prompts = [f"question {i // 4}" for i in range(4000)]
    chosen = held_out_indices(prompts, 0.1, seed=1)
    trained = {prompt for i, prompt in enumerate(prompts) if i not in chosen}
    assert 300 < len(chosen) < 500 and not trained & {prompts[i] for i in chosen}
