"""Whether a response re-checks itself: a metric, never a reward (rewarding the words would only teach the words)."""

from __future__ import annotations

import re

_PHRASES = re.compile(
    r"\b(?:wait|hmm|let me (?:re-?check|double[- ]check|verify|check|reconsider|re-?think|"
    r"re-?examine|try again)|double[- ]check(?:ing)?|"
    r"(?:to|let's|let us|we (?:can|should)|i (?:should|will|'ll)) (?:verify|check|re-?check)|"
    r"check(?:ing)?:|verify(?:ing)?:|on second thought|"
    r"(?:that|this) (?:is|was|seems|looks) (?:wrong|incorrect|not right)|i made a mistake|going "
    r"back|re-?(?:check|evaluate|consider)(?:ing)?|"
    r"actually,? (?:no|that))\b|等等|等一下|重新(?:检查|考虑|计算)|再(?:检查|验证|算)一|验证一下|检查一下|不对",
    re.IGNORECASE,
)


def reflects(text: str) -> bool:
    """True when the response has a phrase of re-checking or correction (English or Chinese)."""
    return bool(_PHRASES.search(text))
