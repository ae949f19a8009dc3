"""Verifiable instructions (IFEval, IFBench) through the checkers of if-verifiable, offline, in a worker process.

The final text alone is checked: what follows `</think>`, without the answer tags. Two of IFBench's checkers want
NLTK data (DATA_NEEDED) and are refused by name where it is not installed. NLTK's sentence data (`punkt_tab`) is used
where it is installed; otherwise an untrained Punkt tokenizer with the usual abbreviations stands in, which may count a
sentence more after a rare abbreviation.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn

from r1mega.data.rows import is_missing
from r1mega.errors import DataError, RewardError
from r1mega.reward.extract import final_text
from r1mega.reward.parts import Deferred, PartScore, ScoringItem
from r1mega.reward.pool import Outcome, Task
from r1mega.types import RewardStatus

if TYPE_CHECKING:  # workers import this module and want no pydantic
    from r1mega.config.rewards import RewardConfig

logger = logging.getLogger(__name__)

_ABBREVIATIONS = frozenset(
    "dr mr mrs ms prof st jr sr vs etc e.g i.e inc ltd co corp u.s u.k a.m p.m no vol fig al "
    "gen col sgt capt lt rev hon mt ave".split()
)
_START_SECONDS = 5.0
DATA_NEEDED: Mapping[str, str] = {
    "ratio:stop_words": "corpora/stopwords",
    "words:start_verb": "taggers/averaged_perceptron_tagger_eng",
}
"""IFBench's instructions that are checked with NLTK data."""
BLOCKED_CHECKERS: Mapping[str, str] = {"format:quote_unquote": "raises on a quotation mark at the end of a text"}
"""if-verifiable 0.1.2 checkers that cannot be trusted, with the reason."""


_STAND_IN = "One two three, four. Five six seven."
_LISTS = {"keywords", "forbidden_words"}
_TAKEN_AS_GIVEN: Mapping[str, tuple[str, str, re.Pattern[str], object]] = {
    "keywords:letter_frequency": ("letter", "_letter", re.compile("[A-Za-z]"), "a"),
    "repeat:repeat_span": ("n_start", "_n_start", re.compile("[1-9][0-9]*"), 1),
}
"""(key, the checker's attribute, values that its description takes, one of these) of arguments that if-verifiable 0.1.2
replaces by a random one when they are no letter (IFEval asks for '!' and '#'), or 0."""


@dataclass(frozen=True, slots=True)
class InstructionAccuracy:
    """Metadata keys of the prompt: `instruction_id_list` and `kwargs`, as in IFEval's file.

    1 when all instructions are followed (prompt-level strict), else 0; with partial_credit the share that are.
    """

    timeout_seconds: float = _START_SECONDS
    partial_credit: bool = False
    name: str = "accuracy"

    @classmethod
    def from_config(cls, config: RewardConfig) -> InstructionAccuracy:
        return cls(config.accuracy.timeout_seconds, config.accuracy.partial_credit)

    def score(self, item: ScoringItem) -> PartScore | Deferred:
        ids, arguments = _instructions(item.prompt.metadata, f"prompt {item.prompt.id}")
        answer = final_text(item.text)
        if not answer:
            return PartScore(0.0, "no final text")
        work = (ids, arguments, item.prompt.question, answer)
        return Deferred(Task("r1mega.reward.instruction:follows", work, self.timeout_seconds), self._finish)

    def _finish(self, outcome: Outcome) -> PartScore:
        if outcome.failure is not None:
            return PartScore(None, outcome.failure, RewardStatus.FAILED)
        verdicts = [passed for _, passed in outcome.value]
        broken = dict.fromkeys(name for name, passed in outcome.value if not passed)  # an id may occur several times
        value = sum(verdicts) / len(verdicts) if self.partial_credit else float(all(verdicts))
        return PartScore(value, f"not followed: {', '.join(broken)}" if broken else "all instructions followed")


def _instructions(metadata: Mapping[str, object], where: str) -> tuple[list[str], list[dict[str, object]]]:
    """(ids, their arguments). No arguments are null or an empty object; those without a value (Parquet has every key in every
    row) are left out. DataError for anything else.
    """
    ids, arguments = metadata.get("instruction_id_list"), metadata.get("kwargs")
    if isinstance(ids, list) and arguments is None:
        arguments = [None] * len(ids)
    if (
        not isinstance(ids, Sequence)
        or not isinstance(arguments, Sequence)
        or isinstance(ids, str)
        or len(ids) != len(arguments)
        or not ids
        or not all(isinstance(name, str) for name in ids)
    ):
        raise DataError(
            f"{where}: kind 'instruction' needs 'instruction_id_list' and 'kwargs', two lists of one length"
        )
    if not all(isinstance(values, Mapping | None) for values in arguments):
        raise DataError(f"{where}: 'kwargs' is {arguments!r:.60}: an object for each instruction, or null")
    given = [{key: value for key, value in (values or {}).items() if not is_missing(value)} for values in arguments]
    return list(ids), [{key: _whole(value) for key, value in values.items()} for values in given]


def _whole(value: object) -> object:
    """A column of whole numbers of which one is missing comes as floats."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def check_line(metadata: Mapping[str, object], where: str) -> None:
    """DataError for a line whose instructions cannot be checked: unknown or blocked ones, and arguments that are missing, or
    not those of the instruction: its checker is run once. RewardError without the checkers.
    """
    _registry()
    for name, values in zip(*_instructions(metadata, where), strict=True):
        try:
            texts = [one for one in values.values() if isinstance(one, str)]
            _built(name, values, _STAND_IN).check_following(" ".join([_STAND_IN, *texts]))
        except Exception as error:  # a checker raises whatever its arguments lead to
            raise DataError(f"{where}: instruction {name!r} with {values!r:.80}: {error}") from error


def follows(
    ids: Sequence[str], arguments: Sequence[Mapping[str, object] | None], prompt: str, answer: str
) -> list[tuple[str, bool]]:
    """(instruction id, followed) of each instruction, strictly. Runs in a worker. Raises RewardError for an unknown
    id, and for arguments that leave something to chance.
    """
    results = []
    for name, values in zip(ids, arguments, strict=True):
        checker = _built(name, values or {}, prompt)
        results.append((name, bool(answer.strip()) and bool(checker.check_following(answer))))
    return results


def _built(name: str, values: Mapping[str, object], prompt: str) -> Any:
    """The checker of an instruction, with its arguments."""
    checker = _checker(name)(name)
    given = {key: value for key, value in values.items() if value is not None}
    for key in _LISTS & given.keys():
        listed = given[key]
        if not isinstance(listed, list) or not all(isinstance(one, str) and one for one in listed):
            raise RewardError(f"{key!r} must be a list of texts")
    key, attribute, accepted, stand_in = _TAKEN_AS_GIVEN.get(name, ("", "", re.compile(""), None))
    value = given.get(key)
    is_replaced = key in given and not accepted.fullmatch(str(value))
    checker.build_description(**(given | {key: stand_in} if is_replaced else given))
    if "prompt" in (checker.get_instruction_args() or {}):
        checker.build_description(prompt=prompt)
    if is_replaced:
        if type(value) is not type(stand_in) or (isinstance(value, str) and len(value) != 1):
            raise RewardError(f"{key!r} must be {'one character' if isinstance(stand_in, str) else 'a whole number'}")
        setattr(checker, attribute, value.lower() if isinstance(value, str) else value)
    return checker


class _NoChance:
    """Stands where if-verifiable 0.1.2 has the module `random`: its checkers draw the arguments that they do not get, or do
    not take, and the same answer would be judged now so, now so.
    """

    def __getattr__(self, name: str) -> NoReturn:
        raise RewardError("an argument that it needs is missing or out of range, and its checker would draw one")


def prepare() -> None:
    """Import the checkers outside the limit of the first item."""
    _registry()


def _checker(name: str) -> Any:
    if name in BLOCKED_CHECKERS:
        raise RewardError(f"the checker of {name!r} is blocked, it {BLOCKED_CHECKERS[name]}; remove the instruction")
    if name in (ifeval := _registry()):
        return ifeval[name]
    if name not in (ifbench := _ifbench_registry()):
        raise RewardError(f"instruction {name!r} is not known; known: {', '.join(sorted({*ifeval, *ifbench}))}")
    if name in DATA_NEEDED:
        import nltk

        try:
            nltk.data.find(DATA_NEEDED[name])
        except LookupError:
            raise RewardError(
                f"instruction {name!r} needs NLTK's {DATA_NEEDED[name]}, which is not installed"
            ) from None
    return ifbench[name]


@lru_cache(maxsize=1)
def _registry() -> dict[str, Any]:
    try:
        from if_verifiable.ifeval import INSTRUCTION_DICT, instructions, instructions_util
    except ImportError as error:
        raise RewardError("instruction rewards need if-verifiable: pip install if-verifiable") from error
    import langdetect

    langdetect.DetectorFactory.seed = 0  # otherwise the same text may be judged differently
    instructions.random = instructions_util.random = _NoChance()
    _make_offline(instructions_util)
    return INSTRUCTION_DICT


@lru_cache(maxsize=1)
def _ifbench_registry() -> dict[str, Any]:
    """Patch of if-verifiable 0.1.2, ifbench/instructions_util.py: importing it downloads NLTK data."""
    import nltk

    _registry()  # has prepared NLTK's paths
    download, nltk.download = nltk.download, lambda *_args, **_kwargs: False
    try:
        from if_verifiable.ifbench import INSTRUCTION_DICT, instructions, instructions_util
    finally:
        nltk.download = download
    instructions.random = instructions_util.random = _NoChance()
    _make_offline(instructions_util)
    instructions.nltk = SimpleNamespace(
        word_tokenize=instructions_util.nltk.word_tokenize, ngrams=nltk.ngrams, pos_tag=nltk.pos_tag
    )
    return INSTRUCTION_DICT


def _make_offline(util: Any) -> None:
    """Patch of if-verifiable 0.1.2, ifeval/instructions_util.py and its copy under ifbench/: their tokenizers load NLTK
    data that is fetched over the network.
    """
    import nltk

    for name in ("_get_sentence_tokenizer", "nltk"):
        if not hasattr(util, name):
            raise RewardError(
                f"if_verifiable.ifeval.instructions_util has no {name}: this patch is for if-verifiable 0.1.2"
            )
    bundled = importlib.util.find_spec("llama_index")
    for base in (bundled and bundled.submodule_search_locations) or ():
        nltk.data.path.append(str(Path(base) / "core" / "_static" / "nltk_cache"))
    try:
        nltk.data.find("tokenizers/punkt_tab")
        sentences = nltk.tokenize.PunktTokenizer("english")
    except LookupError:
        logger.warning("NLTK's punkt_tab is not installed: sentences are counted by an untrained Punkt tokenizer")
        parameters = nltk.tokenize.punkt.PunktParameters()
        parameters.abbrev_types.update(_ABBREVIATIONS)
        sentences = nltk.tokenize.punkt.PunktSentenceTokenizer(parameters)
    words = nltk.tokenize.TreebankWordTokenizer()

    def word_tokenize(text: str) -> list[str]:
        return [word for sentence in sentences.tokenize(text) for word in words.tokenize(sentence)]

    util._get_sentence_tokenizer = lambda: sentences
    util.nltk = SimpleNamespace(word_tokenize=word_tokenize, tokenize=nltk.tokenize, data=nltk.data, corpus=nltk.corpus)
