"""The nano task: arithmetic that one guesses and checks, and a corpus of reasoning about it in mixed quality.

    question     which of a 5 b 0 c 9 d 3 makes ? +4 +3 = 10        (or: 哪个 之中 a 5 b 0 c 9 d 3 使 ? +4 +3 = 10)
    completion   <think> try a 5 +4 is 9 +3 is 12 no wait try b 0 +4 is 4 +3 is 7 no wait try c 9 ... is 10 yes </think>
                 <answer> 3 </answer>

A model that has never seen a subtraction from 10 done cannot tell the right candidate before it has tried; so checking
pays, and so does going on after a failed check. The corpus seldom does: most of its writers guess, or give up after a check or two and
answer what they have just refuted. Every skill that a good answer needs is in it (copying, adding, judging the result,
trying the next), what is missing is the habit. That is what RL from rewards alone has to find, and what it shows: longer
responses, more self-correction, higher accuracy. The writers also mix English and Chinese words.

All words are separated by spaces and few, so that each is one token (`nano_tokenizer`). Training and evaluation problems
are told apart by a hash of the problem (whatever the order of its candidates and its language), so that no evaluation
problem is ever in the corpus or among the RL prompts. Single sums such as 5 +4 occur in both: they are the skill.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from r1mega.files import write_atomic

TARGET, NUM_CANDIDATES, NUM_OPERANDS, MAX_VALUE = 10, 4, 2, 23
EVAL_SHARE = 16  # one problem in 16 is for evaluation

EN_WORDS = {"try": "try", "is": "is", "no": "no", "wait": "wait", "yes": "yes", "fill": ("maybe", "so", "perhaps")}
ZH_WORDS = {"try": "试", "is": "得", "no": "错", "wait": "等等", "yes": "对", "fill": ("也许", "所以", "或许")}
QUESTION_WORDS = ("which", "of", "makes", "哪个", "之中", "使", "?", "=")
LABELS = ("a", "b", "c", "d")
TAGS = ("User:", "Assistant:", "<think>", "</think>", "<answer>", "</answer>")
WORDS = (
    *TAGS,
    *LABELS,
    *QUESTION_WORDS,
    *(
        word
        for table in (EN_WORDS, ZH_WORDS)
        for entry in table.values()
        for word in ([entry] if isinstance(entry, str) else entry)
    ),
    *(f"{sign}{digit}" for sign in "+-" for digit in range(1, 10)),
    *(str(number) for number in range(MAX_VALUE + 1)),
)
"""Every word that the task uses."""

STYLES = {"direct": 0.28, "ramble": 0.12, "check": 0.60}
LANGUAGES = {"en": 0.35, "zh": 0.25, "mixed": 0.40}
PATIENCE = {1: 0.66, 2: 0.10, 3: 0.06, 4: 0.18}
"""Share of the checking writers that give up after so many failed checks. The few persistent ones make every skill, the
last candidates included, learnable; the many impatient ones make it unusual."""
SLIP, BROKEN = 0.02, 0.10
"""Probabilities in the corpus: a wrong sum, a tag left out."""

Split = Literal["train", "eval"]


@dataclass(frozen=True, slots=True)
class NanoProblem:
    """Which of `candidates`, followed by the signed `operands`, makes TARGET? Exactly one does."""

    candidates: tuple[int, ...]
    operands: tuple[int, ...]
    language: Literal["en", "zh"]

    @property
    def answer(self) -> str:
        return str(next(c for c in self.candidates if c + sum(self.operands) == TARGET))

    @property
    def question(self) -> str:
        listed = " ".join(f"{label} {candidate}" for label, candidate in zip(LABELS, self.candidates, strict=True))
        sum_ = f"? {' '.join(f'{o:+d}' for o in self.operands)} = {TARGET}"
        return f"which of {listed} makes {sum_}" if self.language == "en" else f"哪个 之中 {listed} 使 {sum_}"

    @property
    def identity(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What makes it another problem than others: neither the order of the candidates nor the language."""
        return tuple(sorted(self.candidates)), self.operands

    @property
    def split(self) -> Split:
        """By a hash of the identity."""
        digest = hashlib.sha256(repr(self.identity).encode()).digest()
        return "eval" if digest[0] % EVAL_SHARE == 0 else "train"


def problems(seed: int, count: int, split: Split) -> Iterator[NanoProblem]:
    """`count` different problems of a split, the same ones for the same seed."""
    rng = random.Random(f"problems/{split}/{seed}")
    seen: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
    while len(seen) < count:
        problem = _draw(rng)
        if problem.split == split and problem.identity not in seen:
            seen.add(problem.identity)
            yield problem


def corpus(seed: int, num_samples: int) -> Iterator[tuple[str, str]]:
    """(question, completion) pairs over training problems; completions of every quality."""
    rng = random.Random(f"corpus/{seed}")
    for _ in range(num_samples):
        problem = _draw(rng)
        while problem.split != "train":
            problem = _draw(rng)
        yield problem.question, trace(problem, rng)


def trace(problem: NanoProblem, rng: random.Random, style: str | None = None, language: str | None = None) -> str:
    """One writer's completion. style: 'direct', 'ramble', 'check', or 'search' (checks until it finds, without slips;
    not in the corpus); language: 'en', 'zh' or 'mixed'. None: drawn as in the corpus. Only drawn styles leave out tags.
    """
    broken = style is None and rng.random() < BROKEN
    style, language = style or _choose(rng, STYLES), language or _choose(rng, LANGUAGES)

    def words() -> dict:
        return EN_WORDS if language == "en" or (language == "mixed" and rng.random() < 0.5) else ZH_WORDS

    if style in ("check", "search"):
        thoughts, answer = _check(problem, rng, words, style == "search")
    else:
        count = rng.randint(2, 8) if style == "ramble" else rng.randint(0, 1)
        thoughts, answer = [rng.choice(words()["fill"]) for _ in range(count)], rng.choice(problem.candidates)
    parts = ["<think>", *thoughts, "</think>", "<answer>", str(answer), "</answer>"]
    if broken:
        parts.remove(rng.choice(("<think>", "</think>", "<answer>", "</answer>")))
    return " ".join(parts)


def write_prompts(path: Path, seed: int, count: int, split: Split) -> None:
    """A prompt file (JSONL of id, question, answer, kind, language, split), written whole or not at all."""
    lines = (
        {
            "id": f"nano-{split}-{seed}-{i}",
            "question": problem.question,
            "answer": problem.answer,
            "kind": "math",
            "language": problem.language,
            "split": split,
            "licence": "generated",
        }
        for i, problem in enumerate(problems(seed, count, split))
    )
    write_atomic(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _check(problem: NanoProblem, rng: random.Random, words, persistent: bool) -> tuple[list[str], int]:
    """Try the candidates in their order, each in words of one language; the answer is the last one tried."""
    thoughts: list[str] = []
    table: dict[str, str] = {}
    patience = NUM_CANDIDATES if persistent else _choose(rng, PATIENCE)
    for label, candidate in zip(LABELS[:patience], problem.candidates, strict=False):
        if thoughts:
            thoughts.append(table["wait"])
        table, value = words(), candidate
        thoughts += [table["try"], label, str(candidate)]
        for operand in problem.operands:
            value = min(MAX_VALUE, max(0, value + operand))
            if not persistent and rng.random() < SLIP:
                value = min(MAX_VALUE, max(0, value + rng.choice((-3, -2, -1, 1, 2, 3))))
            thoughts += [f"{operand:+d}", table["is"], str(value)]
        thoughts.append(table["yes"] if value == TARGET else table["no"])
        if value == TARGET:
            break
    return thoughts, candidate


def _draw(rng: random.Random) -> NanoProblem:
    """A problem whose sums all stay within 0..MAX_VALUE; the right candidate's place is uniform."""
    while True:
        operands = tuple(rng.choice((-1, 1)) * size for size in rng.sample(range(1, 10), NUM_OPERANDS))
        right = TARGET - sum(operands)
        if not 0 <= right <= 9:
            continue
        others = rng.sample([c for c in range(10) if c != right], NUM_CANDIDATES - 1)
        place = rng.randrange(NUM_CANDIDATES)
        candidates = (*others[:place], right, *others[place:])
        sums = [c + sum(operands[: i + 1]) for c in candidates for i in range(NUM_OPERANDS)]
        if min(sums) >= 0 and max(sums) <= MAX_VALUE:
            return NanoProblem(candidates, operands, rng.choice(("en", "zh")))


def _choose(rng: random.Random, weights: dict) -> Any:
    return rng.choices(list(weights), list(weights.values()))[0]
