"""Verifiable instructions (IFEval, IFBench) through the checkers of if-verifiable, offline, in a worker process.

The final text alone is checked: what follows `</think>`, without the answer tags. Two of IFBench's checkers want
NLTK data (DATA_NEEDED) and are refused by name where it is not installed. NLTK's sentence data (`punkt_tab`) is used
where it is installed; otherwise an untrained Punkt tokenizer with the usual abbreviations stands in, which may count a
sentence more after a rare abbreviation.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from r1mega.errors import RewardError
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
        ids, arguments = item.prompt.metadata.get("instruction_id_list"), item.prompt.metadata.get("kwargs")
        if (
            not isinstance(ids, Sequence)
            or not isinstance(arguments, Sequence)
            or len(ids) != len(arguments)
            or not ids
        ):
            raise RewardError(
                f"prompt {item.prompt.id}: kind 'instruction' needs 'instruction_id_list' and "
                f"'kwargs', two lists of one length"
            )
        answer = final_text(item.text)
        if not answer:
            return PartScore(0.0, "no final text")
        work = (list(ids), [dict(values) for values in arguments], item.prompt.question, answer)
        return Deferred(Task("r1mega.reward.instruction:follows", work, self.timeout_seconds), self._finish)

    def _finish(self, outcome: Outcome) -> PartScore:
        if outcome.failure is not None:
            return PartScore(None, outcome.failure, RewardStatus.FAILED)
        followed: Mapping[str, bool] = dict(outcome.value)
        verdicts = [passed for _, passed in outcome.value]
        broken = [name for name, passed in followed.items() if not passed]
        value = sum(verdicts) / len(verdicts) if self.partial_credit else float(all(verdicts))
        return PartScore(value, f"not followed: {', '.join(broken)}" if broken else "all instructions followed")


def follows(
    ids: Sequence[str], arguments: Sequence[Mapping[str, Any]], prompt: str, answer: str
) -> list[tuple[str, bool]]:
    """(instruction id, followed) of each instruction, strictly. Runs in a worker. Raises RewardError for an unknown
    id.
    """
    results = []
    for name, values in zip(ids, arguments, strict=True):
        checker = _checker(name)(name)
        checker.build_description(**{key: value for key, value in values.items() if value is not None})
        if "prompt" in (checker.get_instruction_args() or {}):
            checker.build_description(prompt=prompt)
        results.append((name, bool(answer.strip()) and bool(checker.check_following(answer))))
    return results


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
        from if_verifiable.ifeval import INSTRUCTION_DICT, instructions_util
    except ImportError as error:
        raise RewardError("instruction rewards need if-verifiable: pip install if-verifiable") from error
    import langdetect

    langdetect.DetectorFactory.seed = 0  # otherwise the same text may be judged differently
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
