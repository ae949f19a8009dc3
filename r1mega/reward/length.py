"""Length and repetition parts: soft overlong penalty, group-free length shaping, repeated n-grams."""

from __future__ import annotations

from dataclasses import dataclass

from r1mega.reward.parts import PartScore, ScoringItem


@dataclass(frozen=True, slots=True)
class Overlong:
    """Soft overlong punishment (DAPO, section 3.4, equation 13): 0 up to maximum - buffer, linear to -1 at the maximum.

    Both in tokens of the response.
    """

    max_response_tokens: int
    buffer_tokens: int
    name: str = "overlong"

    def score(self, item: ScoringItem) -> PartScore:
        length = len(item.response.token_ids)
        buffer = min(self.buffer_tokens, self.max_response_tokens)
        over = length - (self.max_response_tokens - buffer)
        return PartScore(-min(max(over, 0) / buffer, 1.0), f"{length} tokens")


@dataclass(frozen=True, slots=True)
class LengthShaping:
    """1 up to `free_tokens`, then linearly down to 0 at `max_response_tokens`: a mild preference for short
    reasoning.
    """

    free_tokens: int
    max_response_tokens: int
    name: str = "length"

    def score(self, item: ScoringItem) -> PartScore:
        length = len(item.response.token_ids)
        span = max(self.max_response_tokens - self.free_tokens, 1)
        return PartScore(1.0 - min(max(length - self.free_tokens, 0) / span, 1.0), f"{length} tokens")


@dataclass(frozen=True, slots=True)
class Repetition:
    """Minus the share of the response's n-grams of tokens that occurred before in it: 0 (none) to nearly -1 (a
    loop).
    """

    ngram: int
    name: str = "repetition"

    def score(self, item: ScoringItem) -> PartScore:
        tokens = item.response.token_ids
        count = len(tokens) - self.ngram + 1
        if count <= 0:
            return PartScore(0.0, f"shorter than {self.ngram} tokens")
        distinct = len({tokens[start : start + self.ngram] for start in range(count)})
        share = 1.0 - distinct / count
        return PartScore(-share, f"{share:.0%} of the {self.ngram}-grams repeat")
