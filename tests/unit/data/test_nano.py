"""The nano task and its tokenizer."""

import itertools
import random
import re

import pytest

from r1mega.data import nano, nano_tokenizer
from r1mega.data.tokenizer import SentencePieceTokenizer, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    nano_tokenizer.train_tokenizer(directory)
    return directory


def parse(question):
    """(candidates, operands) of a question, by reading its text."""
    listed, operands = re.fullmatch(
        r"(?:which of|哪个 之中) ([a-d\d ]+?) (?:makes|使) \? ([+\-\d ]+) = 10", question
    ).groups()
    assert listed.split()[::2] == ["a", "b", "c", "d"]
    return listed.split()[1::2], operands.split()


def evaluate(question):
    """All candidates that solve a question."""
    candidates, operands = parse(question)
    return [c for c in candidates if int(c) + sum(map(int, operands)) == 10]


@pytest.mark.parametrize("split", ["train", "eval"])
def test_questions_have_exactly_the_given_answer(split):
    for problem in nano.problems(1, 300, split):
        assert evaluate(problem.question) == [problem.answer]
        assert problem.split == split


def test_evaluation_problems_are_in_neither_corpus_nor_training_prompts():
    """In no order of their candidates, in no language; judged from the texts."""

    def key(question):
        candidates, operands = parse(question)
        return frozenset(candidates), tuple(operands)

    held_out = {key(p.question) for p in nano.problems(3, 400, "eval")}
    assert len(held_out) == 400
    assert not held_out & {key(p.question) for p in nano.problems(4, 4000, "train")}
    assert not held_out & {key(question) for question, _ in nano.corpus(5, 20000)}


def test_same_seed_same_text_other_seed_other_text():
    first, again, other = (list(nano.corpus(seed, 50)) for seed in (7, 7, 8))
    assert first == again != other


def test_the_corpus_has_every_quality():
    """Persistent checking is nearly always right, guessing seldom; the mixture is in between."""
    rng = random.Random(0)
    drawn = list(nano.problems(0, 1500, "train"))

    def accuracy(style):
        hits = [re.search(r"<answer> (\d+) </answer>", nano.trace(p, rng, style)) for p in drawn]
        return sum(m is not None and m[1] == p.answer for m, p in zip(hits, drawn, strict=True)) / len(drawn)

    assert accuracy("search") == 1.0
    assert 0.15 < accuracy("direct") < 0.25
    assert 0.2 < accuracy(None) < 0.4
    mixed = [
        t for t in (nano.trace(p, rng) for p in drawn) if re.search(r"[a-z]{3,} .*[一-鿿]|[一-鿿].* (try|is|no)", t)
    ]
    assert 0.05 < len(mixed) / len(drawn) < 0.6
    broken = [t for t in (nano.trace(p, rng) for p in drawn) if t.count("<think>") * t.count("</answer>") != 1]
    assert 0 < len(broken) / len(drawn) < 0.2


def test_every_word_of_the_task_is_one_token(tokenizer_dir):
    tokenizer = load_tokenizer(tokenizer_dir)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert tokenizer.vocab_size <= nano_tokenizer.VOCAB_SIZE
    for question, completion in itertools.islice(nano.corpus(11, 200), 200):
        text = f"User: {question} Assistant: {completion}"
        ids = tokenizer.encode(text)
        assert len(ids) == len(text.split())
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode(f"User: {question} Assistant:") + tokenizer.encode(completion) == ids


@pytest.mark.parametrize(
    "text",
    [
        "Janet’s ducks lay 16 eggs: $2 each.\nHow much?",
        "\\frac{1}{2}  two  spaces",
        "你好，世界 \t tab",
        "<think>no space",
        "🙂 100 +10",
    ],
)
def test_any_text_survives_and_transformers_agrees(tokenizer_dir, text):
    from transformers import AutoTokenizer

    ours, theirs = load_tokenizer(tokenizer_dir), AutoTokenizer.from_pretrained(tokenizer_dir)
    ids = ours.encode(text)
    assert ours._model.unk_id() not in ids
    assert ours.decode(ids) == text
    assert theirs.encode(text, add_special_tokens=False) == ids
    assert theirs.decode(ids) == text


def test_transformers_agrees_on_the_corpus(tokenizer_dir):
    from transformers import AutoTokenizer

    ours, theirs = load_tokenizer(tokenizer_dir), AutoTokenizer.from_pretrained(tokenizer_dir)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 0)
    for question, completion in nano.corpus(12, 200):
        text = f"User: {question} Assistant: {completion}"
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)


def test_training_is_deterministic(tokenizer_dir, tmp_path):
    nano_tokenizer.train_tokenizer(tmp_path)
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (tokenizer_dir / name).read_bytes(), name


def test_a_tokenizer_whose_writing_was_cut_short_is_not_taken_for_whole(tmp_path, monkeypatch):
    """Stage `base` makes it again unless tokenizer.model is there, so that file comes last."""

    def killed(path, _):
        assert path.name == "tokenizer_config.json"  # after tokenizer.json
        raise KeyboardInterrupt

    monkeypatch.setattr(nano_tokenizer, "write_atomic", killed)
    with pytest.raises(KeyboardInterrupt):
        nano_tokenizer.train_tokenizer(tmp_path)
    assert (tmp_path / "tokenizer.json").exists() and not (tmp_path / "tokenizer.model").exists()
