"""Language consistency: the share of target-language words in the chain of thought (paper: stage 2)."""

from __future__ import annotations

from dataclasses import dataclass

from r1mega.data.language import chain_of_thought, check_language, language_of, language_share
from r1mega.reward.parts import PartScore, ScoringItem


@dataclass(frozen=True, slots=True)
class LanguageConsistency:
    """target: ISO 639-1 code, or zh-Hans, zh-Hant; None: the prompt's own. An empty chain of thought scores 0. Raises
    RewardError for a target that is not known."""

    target: str | None = None
    name: str = "language"

    def __post_init__(self) -> None:
        if self.target is not None:
            check_language(self.target)

    def score(self, item: ScoringItem) -> PartScore:
        target = self.target or item.prompt.language or language_of(item.prompt.question)
        share = language_share(chain_of_thought(item.text), target)
        return PartScore(share, f"{share:.0%} of the words of the reasoning are {target}")
