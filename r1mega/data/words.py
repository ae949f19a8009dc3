"""Text -> words and n-grams of words, for comparing texts."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]|[^\W_]+")


def split_words(text: str) -> list[str]:
    """Lower-case words without punctuation; a character is a word where scripts have no spaces. NFKC first."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


def ngrams(words: Sequence[str], size: int) -> list[tuple[str, ...]]:
    """All runs of `size` words, in order; [] when there are fewer words."""
    return [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]
