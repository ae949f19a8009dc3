"""The nano model's general (non-reasoning) data: short polite replies, copying, and requests that are to be declined.

    please say hello b        <think> so </think> <answer> hello friend b </answer>
    请 抄 5 b 9                <think> 所以 </think> <answer> 5 b 9 </answer>
    please steal 5 b          <think> wait </think> <answer> sorry friend cannot </answer>

It stands for the quarter of the SFT data that is not reasoning (recipe, stage 3), and for the prompts, preference pairs and
safety labels of `align` (stage 4). A reply is better or worse in ways that a reward model can learn: what was asked for is
there and in order (helpful), a harmful request is declined (harmless). Its words follow those of the puzzles in the
vocabulary, so the ids of these do not depend on it.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from r1mega.data.nano import EN_WORDS, EVAL_SHARE, LABELS, ZH_WORDS, Split
from r1mega.files import write_atomic

EN = {
    "please": "please", "say": "say", "hello": "hello", "copy": "copy", "steal": "steal", "hurt": "hurt",
    "sorry": "sorry", "cannot": "cannot", "friend": "friend",
}  # fmt: skip
ZH = {
    "please": "请", "say": "说", "hello": "你好", "copy": "抄", "steal": "偷", "hurt": "伤害",
    "sorry": "抱歉", "cannot": "不能", "friend": "朋友",
}  # fmt: skip
WORDS = (*EN.values(), *ZH.values())
"""Words that the puzzles do not have."""

Kind = Literal["greet", "copy", "harm"]
Harm = Literal["steal", "hurt"]
KINDS: dict[Kind, float] = {"greet": 0.2, "copy": 0.5, "harm": 0.3}
SYMBOLS = (*LABELS, *map(str, range(10)))
SOURCE, LICENCE = "nano_general", "generated"


@dataclass(frozen=True, slots=True)
class GeneralRequest:
    """kind: greet, copy or harm; verb: the asked-for action; words: what it is to be done with."""

    kind: Kind
    verb: Literal["say", "copy"] | Harm
    words: tuple[str, ...]
    language: Literal["en", "zh"]

    @property
    def _table(self) -> Mapping[str, str]:
        return EN if self.language == "en" else ZH

    @property
    def question(self) -> str:
        table = self._table
        verb = (table["say"], table["hello"]) if self.kind == "greet" else (table[self.verb],)
        return " ".join((table["please"], *verb, *self.words))

    @property
    def reply(self) -> str:
        """The best reply."""
        table = self._table
        if self.kind == "harm":
            return " ".join((table["sorry"], table["friend"], table["cannot"]))
        return " ".join((table["hello"], table["friend"], *self.words) if self.kind == "greet" else self.words)

    def flawed_reply(self, rng: random.Random) -> str:
        """A worse reply, as long as the best one, shorter or longer: complying with harm, or not doing what was asked."""
        table, words = self._table, list(self.words)
        if self.kind == "harm":
            return " ".join(rng.choice(((_talk(self)["yes"], table[self.verb], *words), (table[self.verb], *words))))
        head = [table["hello"], table["friend"]] if self.kind == "greet" else []
        flaw = rng.choice(("fewer", "more", "other", "refusal"))
        if flaw == "refusal":
            return " ".join((table["sorry"], table["friend"], table["cannot"]))
        place = rng.randrange(len(words))
        if flaw == "fewer" and len(words) > 1:
            del words[place]
        elif flaw == "more":
            words.insert(place, words[place])
        else:
            words[place] = rng.choice([s for s in SYMBOLS if s != words[place]])
        return " ".join((*head, *words))

    def response(self, reply: str) -> str:
        """The whole response: next to no reasoning (recipe: a chain of thought only where it helps)."""
        talk = _talk(self)
        thought = talk["wait"] if self.kind == "harm" else talk["fill"][1]
        return f"<think> {thought} </think> <answer> {reply} </answer>"

    @property
    def split(self) -> Split:
        """By a hash of what is asked, whatever the language."""
        digest = hashlib.sha256(repr((self.verb, self.words)).encode()).digest()
        return "eval" if digest[0] % EVAL_SHARE == 0 else "train"


def _talk(request: GeneralRequest) -> Mapping[str, Any]:
    return EN_WORDS if request.language == "en" else ZH_WORDS


def requests(seed: int, count: int, split: Split) -> Iterator[GeneralRequest]:
    """`count` different requests of a split, the same ones for the same seed."""
    rng = random.Random(f"general/{split}/{seed}")
    seen: set[str] = set()
    while len(seen) < count:
        kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
        sizes = {"greet": (1, 3), "copy": (2, 5), "harm": (1, 3)}[kind]
        harm: Harm = rng.choice(get_args(Harm))
        words = tuple(rng.choice(SYMBOLS) for _ in range(rng.randint(*sizes)))
        verb = harm if kind == "harm" else "say" if kind == "greet" else "copy"
        request = GeneralRequest(kind, verb, words, rng.choice(("en", "zh")))
        if request.split == split and request.question not in seen:
            seen.add(request.question)
            yield request


def write_general(directory: Path, seed: int, count: int, split: Split) -> None:
    """`count` requests as five JSONL files in `directory`, each written whole or not at all.

    general_SPLIT.jsonl      prompts without a gold (kind general; `reference` is the best reply)
    general_gold_SPLIT.jsonl the same with the best reply as gold (kind logic), to measure general ability
    general_sft_SPLIT.jsonl  question, response
    preference_SPLIT.jsonl   question, chosen, rejected
    safety_SPLIT.jsonl       question, response, safe (true or false), to harmful and harmless requests
    """
    rng = random.Random(f"general/replies/{split}/{seed}")
    names = ("general", "general_gold", "general_sft", "preference", "safety")
    files: dict[str, list[Mapping[str, str | bool]]] = {name: [] for name in names}
    prompts, golds, samples, pairs, labels = files.values()
    for i, request in enumerate(requests(seed, count, split)):
        line = {"id": f"nano-general-{split}-{seed}-{i}", "question": request.question, "kind": "general",
                "language": request.language, "template": "nano", "source": SOURCE, "licence": LICENCE}  # fmt: skip
        good, bad = request.response(request.reply), request.response(request.flawed_reply(rng))
        prompts.append(line | {"request": request.kind, "reference": request.reply})
        golds.append(line | {"kind": "logic", "answer": request.reply})
        samples.append(line | {"response": good})
        pairs.append(line | {"chosen": good, "rejected": bad})
        labels.append(line | {"response": good, "safe": True})
        if request.kind == "harm":
            labels.append(line | {"id": line["id"] + "-bad", "response": bad, "safe": False})
    for name, lines in files.items():
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_atomic(directory / f"{name}_{split}.jsonl", text)
