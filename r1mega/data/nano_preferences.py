"""Preferences about answers to the nano task, for trying the stage `reward_model` without other data.

Of two responses the better one is right and readable; the other one is wrong, or answers in both languages at once, or
leaves its form. The better one is as often the shorter one as the longer one (up to sampling), so that length alone
tells nothing. Safety has a stand-in: a response "unsafe" to readers mixes languages in its reasoning.

    python -m r1mega.data.nano_preferences DIRECTORY [SEED [NUM_TRAIN [NUM_HELD_OUT]]]
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from r1mega.data import nano
from r1mega.observe.files import write_atomic

FLAWS = ("wrong", "mixed", "form")


def pairs(seed: int, count: int, split: nano.Split) -> Iterator[dict[str, Any]]:
    """{"question", "chosen", "rejected", "margin"}. margin: 2 for a wrong answer, 1 for one that is only unreadable."""
    rng = random.Random(f"preferences/{split}/{seed}")
    for problem in nano.problems(seed, count, split):
        flaw = rng.choice(FLAWS)
        chosen, rejected = _summary(problem, rng), _flawed(problem, rng, flaw)
        thoughts = nano.trace(problem, rng, style="search", language=problem.language).split(" <answer>")[0]
        yield {
            "question": problem.question,
            "chosen": f"{thoughts} {chosen}",
            "rejected": f"{thoughts} {rejected}",
            "margin": 2.0 if flaw == "wrong" else 1.0,
        }


def judgements(seed: int, count: int, split: nano.Split) -> Iterator[dict[str, Any]]:
    """{"question", "response", "safe"}: whether the reasoning keeps to one language."""
    rng = random.Random(f"judgements/{split}/{seed}")
    for problem in nano.problems(seed, count, split):
        safe = rng.random() < 0.5
        response = nano.trace(problem, rng, style="search", language=problem.language if safe else "mixed")
        words = {word for word in response.split()}
        english, chinese = _vocabulary(nano.EN_WORDS), _vocabulary(nano.ZH_WORDS)
        yield {"question": problem.question, "response": response, "safe": not (words & english and words & chinese)}


def write(directory: Path, seed: int = 0, num_train: int = 2048, num_held_out: int = 256) -> None:
    """pairs_{train,held_out}.jsonl and safety_{train,held_out}.jsonl; held-out problems are of the evaluation split."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, make in (("pairs", pairs), ("safety", judgements)):
        for part, split, count in (("train", "train", num_train), ("held_out", "eval", num_held_out)):
            lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in make(seed, count, split))
            write_atomic(directory / f"{name}_{part}.jsonl", "".join(lines))


def _vocabulary(table: dict[str, Any]) -> set[str]:
    return {word for entry in table.values() for word in ([entry] if isinstance(entry, str) else entry)}


def _summary(problem: nano.NanoProblem, rng: random.Random, answer: int | None = None, mixed: bool = False) -> str:
    """What the user reads: some words of one language (of both when mixed), then the answer."""
    tables = [nano.EN_WORDS if problem.language == "en" else nano.ZH_WORDS]
    if mixed:
        tables = [nano.EN_WORDS, nano.ZH_WORDS]
    words = [rng.choice(tables[i % len(tables)]["fill"]) for i in range(rng.randint(len(tables), 6))]
    shown = problem.answer if answer is None else str(answer)
    return " ".join(["<answer>", *words, tables[0]["is"], shown, "</answer>"])


def _flawed(problem: nano.NanoProblem, rng: random.Random, flaw: str) -> str:
    if flaw == "wrong":
        return _summary(problem, rng, rng.choice([c for c in problem.candidates if str(c) != problem.answer]))
    if flaw == "mixed":
        return _summary(problem, rng, mixed=True)
    words = _summary(problem, rng).split()[1:-1]  # out of its tags, the answer is said twice
    return " ".join([*words, words[-1]])


if __name__ == "__main__":
    write(Path(sys.argv[1]), *map(int, sys.argv[2:]))
