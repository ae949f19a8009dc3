"""The nano model's general data: vocabulary, splits, and replies that are as good or bad as their files say."""

import json
import random

import pytest

from r1mega.data import nano, nano_general, nano_tokenizer
from r1mega.data.tokenizer import load_tokenizer
from r1mega.reward.format import check_format

PUZZLE_IDS = {"User:": 4, "</answer>": 9, "which": 14, "或许": 37, "+1": 38, "-9": 55, "0": 56, "23": 79}
"""Ids of the vocabulary before there was general data: published base models have them."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    nano_tokenizer.train_tokenizer(directory)
    return load_tokenizer(directory)


def test_words_are_single_tokens_after_those_of_the_puzzles(tokenizer):
    assert {word: tokenizer.encode(word) for word in PUZZLE_IDS} == {word: [i] for word, i in PUZZLE_IDS.items()}
    ids = [tokenizer.encode(word) for word in nano_general.WORDS]
    assert ids == [[80 + i] for i in range(len(nano_general.WORDS))]
    assert tokenizer.vocab_size <= nano_tokenizer.VOCAB_SIZE
    assert not set(nano_general.WORDS) & set(nano.WORDS)


def test_files(tmp_path, tokenizer):
    for split, count in (("train", 200), ("eval", 40)):
        nano_general.write_general(tmp_path, 1, count, split)
    files = {p.stem: [json.loads(line) for line in p.read_text().splitlines()] for p in tmp_path.glob("*.jsonl")}
    asked = {
        name: {tuple(line["question"].split()[1:]) for line in files[name]}
        for name in ("general_train", "general_eval")
    }
    assert len(files["general_train"]) == 200 and not asked["general_train"] & asked["general_eval"]
    assert [line["answer"] for line in files["general_gold_eval"]] == [
        line["reference"] for line in files["general_eval"]
    ]
    for line in files["preference_train"]:
        assert line["chosen"] != line["rejected"]
    lengths = [len(line["chosen"].split()) - len(line["rejected"].split()) for line in files["preference_train"]]
    assert min(lengths) < 0 < max(lengths), "the better reply must be neither always the longer nor always the shorter"
    for line in files["safety_train"]:
        complies = any(verb in line["response"].split() for verb in ("steal", "hurt", "偷", "伤害"))
        assert line["safe"] != complies
    for line in files["general_sft_train"]:
        assert check_format(line["response"]).value == 1.0
        verb, words = line["question"].split()[1], line["question"].split()[2:]
        answer = line["response"].split("<answer> ")[1].removesuffix(" </answer>").split()
        if verb in ("copy", "抄"):
            assert answer == words
        elif verb in ("say", "说"):
            assert answer[2:] == words[1:] and answer[0] in ("hello", "你好")
        else:
            assert answer in (["sorry", "friend", "cannot"], ["抱歉", "朋友", "不能"])
        text = f"User: {line['question']} Assistant: {line['response']}"
        assert len(tokenizer.encode(text)) == len(text.split())


def test_a_flawed_reply_is_never_the_best_one():
    rng = random.Random(0)
    for request in nano_general.requests(3, 300, "train"):
        assert all(request.flawed_reply(rng) != request.reply for _ in range(5))
