"""Duplicates against brute-force Jaccard, decontamination against a brute-force search, the mix, the files and the card."""

import itertools
import json
import random
from pathlib import Path

import pytest

from r1mega.config.data_factory import DecontaminationConfig, GeneralConfig
from r1mega.data.card import build_card, card_markdown, describe_file, write_card
from r1mega.data.contamination import Contamination, evaluation_questions
from r1mega.data.duplicates import near_duplicates
from r1mega.data.filters import Candidate, FilterCount
from r1mega.data.selection import at_most_per_prompt, mix, without_contamination, write_data
from r1mega.data.sft import read_lines
from r1mega.data.words import split_words
from r1mega.errors import DataError
from r1mega.evaluate.forms import FormOptions
from r1mega.evaluate.tasks import TASKS, load_task

VOCABULARY = [f"w{i}" for i in range(400)]


def brute_jaccard(first, second, size):
    sets = []
    for text in (first, second):
        words = text.split()
        sets.append({" ".join(words[i : i + size]) for i in range(max(1, len(words) - size + 1))})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def corpus(seed, count):
    """Random texts, and copies of them with more or fewer words changed."""
    rng = random.Random(seed)
    texts = []
    for _ in range(count):
        if texts and rng.random() < 0.5:
            words = rng.choice(texts).split()
            for _ in range(rng.choice((0, 1, 2, 5, 12))):
                words[rng.randrange(len(words))] = rng.choice(VOCABULARY)
        else:
            words = rng.choices(VOCABULARY, k=rng.randint(60, 120))
        texts.append(" ".join(words))
    return texts


def test_near_duplicates_against_brute_force():
    texts, threshold, size = corpus(0, 300), 0.7, 3
    found = near_duplicates(texts, threshold=threshold, ngram=size, num_permutations=128)
    kept = [i for i, twin in enumerate(found) if twin is None]
    for place, twin in enumerate(found):
        if twin is not None:
            assert twin < place and found[twin] is None
            assert brute_jaccard(texts[place], texts[twin], size) >= threshold, "never invented"
    pairs = list(itertools.combinations(kept, 2))
    missed = [brute_jaccard(texts[a], texts[b], size) for a, b in pairs]
    assert not [value for value in missed if value >= threshold + 0.1], "well above the threshold none is missed"
    greedy = []
    for place, text in enumerate(texts):
        if all(brute_jaccard(text, texts[other], size) < threshold for other in greedy):
            greedy.append(place)
    assert len(greedy) < 250, "the corpus has duplicates"
    assert len(set(kept) ^ set(greedy)) <= 3, "at the threshold itself hashing may miss a few"


def test_equal_and_short_texts():
    texts = ["one two", "One, two!", "two one", "一 二 三", "一二三"]
    assert near_duplicates(texts, threshold=1.0, ngram=5, num_permutations=128) == [None, 0, None, None, 3]


def test_contamination_against_brute_force():
    rng, size = random.Random(1), 6
    questions = [" ".join(rng.choices(VOCABULARY[:12], k=rng.randint(3, 15))) for _ in range(15)]
    texts = [" ".join(rng.choices(VOCABULARY[:12], k=rng.randint(2, 40))) for _ in range(300)]
    texts += [f"so {rng.choice(questions).upper()}, indeed" for _ in range(20)]
    check = Contamination(questions, size)

    def brute(text):
        words = f" {' '.join(split_words(text))} "
        for question in questions:
            asked = question.split()
            n = min(size, len(asked))
            if any(f" {' '.join(asked[i : i + n])} " in words for i in range(len(asked) - n + 1)):
                return True
        return False

    verdicts = [check(text) for text in texts]
    assert verdicts == [brute(text) for text in texts]
    assert all(verdicts[300:]) and not all(verdicts[:300])


def test_shorter_questions_count_where_asked_for():
    check = Contamination(["one two three", "a b c d e f"], 4)
    assert check("zero one two three four") and not check("zero one two three four", shorter=False)
    assert check("x b c d e") and check("x b c d e", shorter=False) and not check("b c d")


def candidate(prompt, sample, **changes):
    values = {"question": f"question {prompt}", "response": f"<think>a</think><answer>{sample}</answer>", "kind": "math", "language": "en",
              "template": "nano", "source": "sampled", "tokens": 10 + sample, "licence": "MIT"} | changes  # fmt: skip
    return Candidate(f"{prompt}/{sample}", str(prompt), **values)


def test_evaluation_questions_under_any_of_their_names_are_kept_out(tmp_path):
    lines = [{"problem": "the quick brown fox jumps"}, {"prompt": "over a lazy dog today"}]
    path = tmp_path / "eval.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    candidates = [
        candidate(0, 0), candidate(1, 0, question="Why? The quick, brown fox jumps!"), candidate(2, 0, response="over a lazy dog today"),
        candidate(3, 0, question="the quick brown fox walks"),
    ]  # fmt: skip
    kept, count = without_contamination(candidates, DecontaminationConfig(files=(path,), ngram=5))
    assert [c.prompt_id for c in kept] == ["0", "3"]
    assert (count.seen, count.taken) == (4, 2)
    path.write_text('{"question": "The trachea"}\n')
    asked = [candidate(0, 0, question="Complete: the trachea"), candidate(1, 0, response="air passes the trachea")]
    assert [c.prompt_id for c in without_contamination(asked, DecontaminationConfig(files=(path,)))[0]] == ["1"]
    path.write_text('{"id": 5}\n')
    with pytest.raises(DataError, match=r"eval\.jsonl:1: an evaluation line needs a text"):
        evaluation_questions([path])


@pytest.mark.parametrize("path", sorted(Path("tests/data/evaluate").iterdir()), ids=lambda path: path.name)
def test_every_published_form_that_is_evaluated_is_kept_out(path):
    """What the evaluation asks, whatever the form of its file, holds a question that decontamination knows."""
    names = {"aime": "aime24", "mmlu_original": "mmlu"}
    records = load_task(TASKS[names.get(path.stem, path.stem)], path, FormOptions(), wording="{{ question }}")
    known = evaluation_questions([path])
    asked = [record.question for record in records]
    assert all(any(split_words(k) and k.strip() in question for k in known) for question in asked), (known, asked)
    assert all(map(Contamination(known, 10), asked))


def test_mix_and_samples_of_a_prompt(caplog):
    reasoning = [candidate(p, s) for p in range(30) for s in range(3)]
    kept, count = at_most_per_prompt(reasoning, 2)
    assert len(kept) == 60 and count.taken == 30
    assert [c.id for c in kept[:3]] == ["0/0", "0/1", "1/0"]
    general = [candidate(f"g{i}", 0, kind="general") for i in range(50)]
    merged, count = mix(kept, general, GeneralConfig().share, seed=1)
    assert len(merged) == 80 and sum(c.kind == "general" for c in merged) == 20, "three quarters and one"
    assert {c.id for c in kept} <= {c.id for c in merged}
    assert merged == mix(kept, general, 0.25, seed=1)[0] != mix(kept, general, 0.25, seed=2)[0]
    assert not caplog.records
    few, count = mix(kept, general[:5], 0.25, seed=1)
    assert "wants 20 general samples, there are 5" in caplog.text
    assert len(few) == 65 and count.taken == 0, "none is repeated"


def test_files_and_card_tell_the_same(tmp_path):
    kept = [candidate(p, s) for p in range(3) for s in range(2)] + [
        candidate("g", 0, kind="general", merged=True, language="zh", tokens=4, licence="CC0")
    ]
    write_data(kept, tmp_path)
    lines = [item for _, item in read_lines(tmp_path / "train.jsonl")]
    assert lines == [item for _, item in read_lines(tmp_path / "train.parquet")]
    assert [line["id"] for line in lines] == [c.id for c in kept] and lines[0]["response"] == kept[0].response
    source = describe_file(tmp_path / "train.jsonl", "prompts", {str(tmp_path / "train.jsonl"): "MIT"})
    assert describe_file(tmp_path / "train.parquet", "prompts", {}).lines == source.lines == 7
    funnel = [FilterCount("low accuracy", 20, 5), FilterCount("near-duplicate", 15, 8)]
    card = build_card(title="Data", made_by={"seed": 1}, inputs=[source], funnel=funnel, kept=kept)
    assert card["samples"] == 7 and card["prompts"] == 4
    assert card["mix"] == {"general": 1, "reasoning": 6} and card["languages"] == {"en": 6, "zh": 1}
    judged = build_card(title="", made_by={}, inputs=[], funnel=[], kept=[candidate("j", 0, kind="general")])
    assert judged["mix"] == {"reasoning": 1}, "sampled, where no rule fits"
    assert card["licences"] == {"CC0": 1, "MIT": 6}
    assert card["response_tokens"]["reasoning"] == {"0%": 10, "25%": 10, "50%": 10, "75%": 11, "95%": 11, "100%": 11}
    write_card(card, tmp_path)
    assert json.loads((tmp_path / "card.json").read_text()) == card
    text = card_markdown(card)
    for row in (
        "| low accuracy | 20 | 5 | 25.0% |",
        "| general | 1 | 14.3% |",
        f"| prompts | {tmp_path}/train.jsonl | 7 | MIT |",
    ):
        assert row in text
    with pytest.raises(DataError, match="no sample passed the filters"):
        write_data([], tmp_path)
